"""Splats to a mesh: where its surface lies, that it is closed and coloured, and what files of it hold."""

from __future__ import annotations

import json
import struct
import threading
from types import SimpleNamespace

import numpy as np
import pytest

RED, BLUE = (0.9, 0.1, 0.1), (0.1, 0.2, 0.8)


@pytest.fixture
def ball(extension):
    """ball(count=3000, radius=0.5, centre=(0, 0, 0)): flat splats on a sphere, red above and blue below."""
    import torch

    Gaussians = extension("generator.gaussians").Gaussians

    def make(count=3000, radius=0.5, centre=(0.0, 0.0, 0.0)):
        random = torch.Generator().manual_seed(0)
        normals = torch.nn.functional.normalize(torch.randn(count, 3, generator=random), dim=1)
        half = torch.nn.functional.normalize(normals + torch.tensor([1e-4, 0, 1.0]), dim=1)  # half way from +Z to the normal
        turn = torch.stack([half[:, 2], -half[:, 1], half[:, 0], torch.zeros(count)], dim=1)
        colors = torch.where(normals[:, 2:] > 0, torch.tensor(RED), torch.tensor(BLUE))
        return Gaussians(
            means=radius * normals + torch.tensor(centre),
            quaternions=turn,
            scales=torch.tensor([[0.03, 0.03, 0.004]]).repeat(count, 1) * radius / 0.5,
            opacities=torch.full((count,), 0.9),
            colors=colors,
        )

    return make


@pytest.fixture
def mesh(extension):
    return extension("blender_addon.mesh")


def joined(extension, *parts):
    return extension("generator.gaussians").concatenate(list(parts))


def edge_uses(faces):
    edges = np.sort(np.concatenate([faces[:, :2], faces[:, 1:], faces[:, ::2]]), axis=1)
    return np.unique(edges, axis=0, return_counts=True)[1]


def test_the_surface_of_a_ball(bpy, mesh, ball):
    options = mesh.Options(resolution=48, faces=0)
    made = mesh.build(mesh.prepare(ball(), options), "ball", options)
    vertices, faces = mesh.triangles(made)
    assert (edge_uses(faces) == 2).all(), "closed: every edge has two faces"
    assert len(np.unique(mesh.parts(len(vertices), faces))) == 1, "filled: there is no inner surface"
    radii = np.linalg.norm(vertices, axis=1)
    step = 1.0 / 48
    assert 0.5 - step < radii.mean() < 0.5 + 1.6 * step and radii.std() < 0.3 * step
    corners = vertices[faces]
    volume = np.einsum("ij,ij->i", corners[:, 0], np.cross(corners[:, 1], corners[:, 2])).sum() / 6
    assert volume > 0.45, "faces point outwards"
    colors = np.empty(4 * len(vertices), np.float32)
    made.color_attributes[mesh.COLOR].data.foreach_get("color", colors)
    colors = colors.reshape(-1, 4)[:, :3]
    linear = [np.where(np.array(c) <= 0.04045, np.array(c) / 12.92, ((np.array(c) + 0.055) / 1.055) ** 2.4) for c in (RED, BLUE)]
    for side, expected in ((vertices[:, 2] > 0.1, linear[0]), (vertices[:, 2] < -0.1, linear[1])):
        assert np.allclose(colors[side], expected, atol=0.02)
    assert made.materials[0].name == mesh.MATERIAL


def test_faces_are_limited_and_crumbs_dropped(bpy, extension, mesh, ball):
    both = joined(extension, ball(), ball(20, 0.01, (0.5, 0.5, 0.9)))
    options = mesh.Options(resolution=48, faces=1500)
    made = mesh.build(mesh.prepare(both, options), "ball", options)
    vertices, faces = mesh.triangles(made)
    assert 1000 < len(faces) <= 1600 and (edge_uses(faces) == 2).all()
    assert np.abs(np.linalg.norm(vertices, axis=1) - 0.5).max() < 0.06, "the crumb is gone, the ball is still one"
    options = mesh.Options(resolution=48, keep=0.0, faces=0)
    everything = mesh.triangles(mesh.build(mesh.prepare(both, options), "both", options))
    assert len(np.unique(mesh.parts(len(everything[0]), everything[1]))) == 2


def test_bad_options_are_one_line(bpy, extension, mesh, ball):
    InputError = extension("generator.errors").InputError
    for options, message in (
        (mesh.Options(threshold=0.0), "threshold must lie between"),
        (mesh.Options(resolution=4), "resolution must be at least 8"),
    ):
        with pytest.raises(InputError, match=message):
            mesh.prepare(ball(50), options)
    faint = ball(50).replace(opacities=ball(50).opacities * 0.1)
    with pytest.raises(InputError, match="no opacity reaches the threshold 0.6"):
        mesh.prepare(faint, mesh.Options(resolution=16))
    with pytest.raises(InputError, match="no Gaussian is visible"):
        mesh.prepare(faint.replace(opacities=faint.opacities * 0), mesh.Options(resolution=16))


def test_the_operator_puts_the_mesh_where_the_splats_are(bpy, extension, ball):
    object = extension("blender_addon.splat_object").write(ball(1500), "ball")
    object.location, object.scale = (1, 2, 3), (1, 1, 2)
    bpy.context.view_layer.objects.active = object
    bpy.context.view_layer.update()
    before = set(bpy.data.scenes), set(bpy.data.node_groups)
    assert bpy.ops.gaussian_atlas.to_mesh(resolution=32) == {"FINISHED"}
    made = bpy.context.active_object
    bpy.context.view_layer.update()
    assert made.type == "MESH" and made.matrix_world == object.matrix_world and made.select_get()
    assert (set(bpy.data.scenes), set(bpy.data.node_groups)) == before, "nothing of the work is left"
    assert [m.name for m in bpy.data.meshes] == [made.data.name]
    bpy.context.view_layer.objects.active = made
    assert not bpy.ops.gaussian_atlas.to_mesh.poll()


def test_the_collection_may_go_while_the_mesh_is_made(bpy, extension, mesh, ball, monkeypatch):
    object = extension("blender_addon.splat_object").write(ball(300), "ball")
    bpy.context.view_layer.objects.active = object
    place = bpy.data.collections.new("place")
    bpy.context.scene.collection.children.link(place)
    bpy.context.view_layer.active_layer_collection = bpy.context.view_layer.layer_collection.children["place"]
    assert bpy.ops.gaussian_atlas.to_mesh(resolution=16) == {"FINISHED"}
    assert bpy.context.active_object.users_collection == (place,)
    bpy.context.view_layer.objects.active = object
    prepare = mesh.prepare

    def remove(*arguments):
        bpy.data.collections.remove(place)
        return prepare(*arguments)

    monkeypatch.setattr(mesh, "prepare", remove)
    assert bpy.ops.gaussian_atlas.to_mesh(resolution=16) == {"FINISHED"}
    made = bpy.context.active_object
    assert made.type == "MESH" and made.users_collection == (bpy.context.scene.collection,)


def test_a_conversion_is_cancelled_at_its_next_block(bpy, extension, mesh, ball):
    errors, gaussians = extension("generator.errors"), ball(300)
    asked = 0

    def cancelled_after(calls):
        def check():
            nonlocal asked
            asked += 1
            if asked > calls:
                raise errors.Cancelled("stopped")

        return check

    mesh.prepare(gaussians, mesh.Options(resolution=32, fill=0), cancelled_after(1000))
    sampling, asked = asked, 0
    mesh.prepare(gaussians, mesh.Options(resolution=32), cancelled_after(1000))
    everything = asked
    assert 2 <= sampling < everything - 5, "blocks of the density, and parts of the filling"
    for calls in (0, sampling, everything - 1):
        asked = 0
        with pytest.raises(errors.Cancelled):
            mesh.prepare(gaussians, mesh.Options(resolution=32), cancelled_after(calls))
        assert asked == calls + 1
    # The operator's own work asks the event.
    bpy.context.view_layer.objects.active = extension("blender_addon.splat_object").write(gaussians, "ball")
    operator = extension("blender_addon.operators.mesh").ToMeshOperator
    stand = SimpleNamespace(resolution=32, threshold=0.6, fill=2, smooth=0, faces=0, keep=0.0)
    work, cancel = operator.work(stand, bpy.context, True), threading.Event()
    cancel.set()
    with pytest.raises(errors.Cancelled):
        work(lambda *_: None, cancel)


def test_a_splat_as_large_as_its_box_is_sampled_in_slabs(extension, monkeypatch):
    import torch

    density, Gaussians = extension("generator.density"), extension("generator.gaussians").Gaussians
    generator = torch.Generator().manual_seed(0)
    quaternions = torch.nn.functional.normalize(torch.randn(5, 4, generator=generator), dim=1)
    scales = torch.tensor([[0.5, 0.4, 0.3], [0.05, 0.6, 0.02], [0.03, 0.03, 0.03], [0.4, 0.4, 0.01], [0.001, 0.1, 0.1]])
    means, colors = torch.rand(5, 3, generator=generator) - 0.5, torch.rand(5, 3, generator=generator)
    few = Gaussians(means, quaternions, scales, torch.full((5,), 0.9), colors)
    blocks, sizes = torch.cartesian_prod, []

    def watch(*axes):
        made = blocks(*axes)
        sizes.append(len(made))
        return made

    monkeypatch.setattr(torch, "cartesian_prod", watch)
    alone = density.sample(few[:1], 40)
    assert sum(sizes) <= np.prod(alone.shape), "no block is larger than the grid"
    whole = density.sample(few, 40)
    sizes.clear()
    monkeypatch.setattr(density, "_AT_ONCE", 5000)
    slabs = density.sample(few, 40)
    assert max(sizes) <= 5000 and len(sizes) > 10
    for name in ("density", "colors", "weights"):
        assert np.allclose(getattr(whole, name), getattr(slabs, name), rtol=1e-5, atol=1e-6), name


def test_the_field_is_the_sum_of_the_splats(extension, ball):
    """The equation, voxel by voxel: what blocks and slabs must not change."""
    import torch

    density = extension("generator.density")
    gaussians = ball(60)
    field = density.sample(gaussians, 12)
    wide = density._touching(gaussians, lambda: None)
    covariances = wide.covariances().double() / field.step**2 + 0.6**2 * torch.eye(3)
    grid = torch.from_numpy(np.stack(np.indices(field.shape), -1).reshape(-1, 1, 3)) * 1.0
    offset = grid - (wide.means.double() - torch.from_numpy(field.origin)) / field.step
    distance2 = torch.einsum("gni,nij,gnj->gn", offset, torch.linalg.inv(covariances), offset)
    alpha = torch.where(distance2 < 9, wide.opacities.double() * torch.exp(-distance2 / 2), 0.0)
    expected = -torch.log1p(-alpha).sum(1).reshape(field.shape).numpy()
    # A splat's block is as wide as its axes ask for, counted from the nearest voxel: at its rim a voxel may be missed.
    assert (np.abs(field.density - expected) < 0.03).all() and np.abs(field.density - expected).mean() < 1e-3


@pytest.mark.parametrize("size", [1e-30, 1e-9, 1e25])
def test_splats_without_a_size_are_refused(extension, size):
    import torch

    one = torch.ones(1, 3)
    Gaussians, InputError = extension("generator.gaussians").Gaussians, extension("generator.errors").InputError
    splat = Gaussians(0.5 * one, torch.tensor([[1.0, 0, 0, 0]]), size * one, torch.ones(1), 0.5 * one)
    with pytest.raises(InputError, match="scale the object first"):
        extension("generator.density").sample(splat, 16)


@pytest.mark.parametrize("radius", [0, 1, 3])
def test_a_mask_grows_by_a_cube(extension, radius):
    import torch

    mask = torch.rand(9, 7, 8, generator=torch.Generator().manual_seed(0)) > 0.97
    pooled = torch.nn.functional.max_pool3d(mask[None, None].float(), 2 * radius + 1, stride=1, padding=radius)[0, 0] > 0
    assert torch.equal(extension("generator.density")._dilated(mask, radius, lambda: None), pooled)


def read_glb(path):
    """Positions [V, 3], colours [V, 3 or 4] in 0..1 and triangles [F, 3] of a .glb with one mesh, by the specification alone."""
    content = path.read_bytes()
    magic, version, length, json_length, kind = struct.unpack_from("<4sIII4s", content)
    assert (magic, version, kind, length) == (b"glTF", 2, b"JSON", len(content))
    document = json.loads(content[20 : 20 + json_length])
    binary = content[28 + json_length :]
    widths, kinds = {"SCALAR": 1, "VEC3": 3, "VEC4": 4}, {5121: "u1", 5123: "<u2", 5125: "<u4", 5126: "<f4"}

    def accessor(index):
        entry = document["accessors"][index]
        view = document["bufferViews"][entry["bufferView"]]
        start, width = view.get("byteOffset", 0) + entry.get("byteOffset", 0), widths[entry["type"]]
        values = np.frombuffer(binary, kinds[entry["componentType"]], entry["count"] * width, start).reshape(-1, width)
        return values / np.iinfo(values.dtype).max if entry.get("normalized") else values

    (node,) = document["nodes"]
    assert not {"matrix", "rotation", "scale", "translation"} & set(node)
    (primitive,) = document["meshes"][0]["primitives"]
    color = accessor(primitive["attributes"]["COLOR_0"])
    return accessor(primitive["attributes"]["POSITION"]), color, accessor(primitive["indices"]).reshape(-1, 3), document


def test_convert_to_glb_has_y_up_and_shows_its_colours(bpy, extension, ball, tmp_path, capfd):
    # A ball with a nose in front (-Y in Blender, +Z in glTF), red on top.
    formats = extension("generator.formats")
    formats.save(joined(extension, ball(), ball(300, 0.1, (0, -0.55, 0))), tmp_path / "ein Kopf.ply", up="-Y")
    main = extension("blender_addon.batch").main
    assert main(["convert", str(tmp_path / "ein Kopf.ply"), str(tmp_path / "Kopf ü.glb"), "--resolution", "48"]) == 0
    assert "faces" in capfd.readouterr().out
    points, colors, faces, document = read_glb(tmp_path / "Kopf ü.glb")
    assert points[:, 2].max() > 0.6 and points[:, 2].min() > -0.56, "the nose looks towards +Z"
    top, bottom = colors[points[:, 1] > 0.3][:, :3], colors[points[:, 1] < -0.3][:, :3]
    assert (top[:, 0] > 0.6).all() and (bottom[:, 2] > 0.5).all(), "red is up (+Y), blue is down"
    assert document["materials"][0]["pbrMetallicRoughness"].get("baseColorFactor", [1, 1, 1, 1])[:3] == [1, 1, 1]
    assert len(faces) > 1000 and sorted(p.name for p in tmp_path.iterdir()) == ["Kopf ü.glb", "ein Kopf.ply"]


def test_convert_to_obj_and_stl(bpy, extension, ball, tmp_path, capfd):
    extension("generator.formats").save(ball(), tmp_path / "ball.ply")
    main = extension("blender_addon.batch").main
    for suffix in (".obj", ".stl"):
        arguments = ["convert", str(tmp_path / "ball.ply"), str(tmp_path / f"ball{suffix}"), "--resolution", "32", "--faces", "2000"]
        assert main(arguments) == 0
    lines = [line.split() for line in (tmp_path / "ball.obj").read_text().splitlines() if line.startswith("v ")]
    vertices = np.array([[float(number) for number in line[1:]] for line in lines])
    assert vertices.shape[1] == 6, "colours stand behind the coordinates"
    assert np.allclose(vertices[vertices[:, 1] > 0.3][:, 3:], RED, atol=0.03), "Y is up, colours are display values"
    content = (tmp_path / "ball.stl").read_bytes()
    (count,) = struct.unpack_from("<I", content, 80)
    assert 1000 < count <= 2100 and len(content) == 84 + 50 * count
    capfd.readouterr()
    for bad, message in (("ball.fbx", "mesh files in .glb, .obj, .stl"), ("nowhere/ball.glb", "does not exist; make it first")):
        assert main(["convert", str(tmp_path / "ball.ply"), str(tmp_path / bad)]) == 2
        errors = capfd.readouterr().err
        assert message in errors and len(errors.strip().splitlines()) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ball.obj", "ball.ply", "ball.stl"]
