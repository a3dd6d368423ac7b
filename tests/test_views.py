"""Views of objects: the geometry behind the pixels, colours, files, and a run that survives its objects."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import zipfile

import numpy as np
import pytest
import torch

from generator.errors import InputError, WorkError
from generator.render.cameras import Cameras
from trainer import scene, views
from trainer.sources import SourceObject
from trainer.views import DamagedViews, Views, ViewSettings, read_records, render_object, render_objects, views_path

needs_blender = pytest.mark.skipif(views.importlib.util.find_spec("bpy") is None, reason="Blender as a module is not installed")

_CORNERS = np.array([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)], dtype=float)
_QUADS = [(1, 2, 4, 3), (5, 7, 8, 6), (1, 5, 6, 2), (3, 4, 8, 7), (1, 3, 7, 5), (2, 6, 8, 4)]


def write_boxes(path, boxes, materials="") -> SourceObject:
    """An OBJ (Y up) of axis-aligned boxes (low, high, material)."""
    lines = [f"mtllib {path.stem}.mtl"]
    for number, (low, high, material) in enumerate(boxes):
        points = np.array(low) + _CORNERS * (np.array(high) - np.array(low))
        lines += [f"v {x} {y} {z}" for x, y, z in points]
        lines.append(f"usemtl {material}")
        lines += ["f " + " ".join(str(8 * number + i) for i in quad) for quad in _QUADS]
    path.write_text("\n".join(lines) + "\n")
    path.with_suffix(".mtl").write_text(materials)
    return SourceObject(id=path.stem, name=path.stem, path=path, captions=[path.stem])


def material(name, colour, extra="") -> str:
    return f"newmtl {name}\nKd {colour[0]} {colour[1]} {colour[2]}\n{extra}\n"


def project(cameras: Cameras, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixels [V, N, 2] and depths [V, N] of world points [N, 3]."""
    world = np.concatenate([points, np.ones((len(points), 1))], axis=1)
    camera = np.einsum("vij,nj->vni", cameras.viewmats.double().numpy(), world)[..., :3]
    pixels = np.einsum("vij,vnj->vni", cameras.Ks.double().numpy(), camera)
    return pixels[..., :2] / pixels[..., 2:], camera[..., 2]


@pytest.fixture(scope="module")
def corners(tmp_path_factory) -> Views:
    """A small red cube off-centre, between two specks that pin the bounding box."""
    path = tmp_path_factory.mktemp("corners") / "corners.obj"
    tiny = 0.04
    red = ((0.5, 0.7, 0.3), (0.5 + tiny, 0.7 + tiny, 0.3 + tiny))
    boxes = [
        ((-1.0, -1.0, -1.0), (-0.98, -0.98, -0.98), "grey"),
        ((0.98, 0.98, 0.98), (1.0, 1.0, 1.0), "grey"),
        (*red, "red"),
    ]
    source = write_boxes(path, boxes, material("grey", (0.5, 0.5, 0.5)) + material("red", (0.9, 0.05, 0.05)))
    return render_object(source, ViewSettings(train=6, held_out=2, size=160, samples=16))


@needs_blender
def test_pixels_and_depth_lie_where_the_cameras_project(corners):
    # Mesh (x, y, z), Y up with the front to +Z, becomes (x, -z, y) / 2: the longest side goes from 2 to 1.
    low, high = np.array([0.5, 0.7, 0.3]), np.array([0.54, 0.74, 0.34])
    points = low + _CORNERS * (high - low)
    centre = ((low + high) / 2)[None]
    turn = np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0]]) / 2
    pixels, depth = project(corners.cameras, centre @ turn.T)
    _, corner_depth = project(corners.cameras, points @ turn.T)
    checked = 0
    for view in range(len(corners)):
        rgba = corners.rgba[view].astype(float)
        weight = (rgba[..., 0] > 1.8 * rgba[..., 1]) * rgba[..., 3]
        if weight.sum() == 0:
            continue
        rows, columns = np.mgrid[: weight.shape[0], : weight.shape[1]] + 0.5
        centroid = np.array([(weight * columns).sum(), (weight * rows).sum()]) / weight.sum()
        assert np.abs(centroid - pixels[view, 0]).max() < 0.5
        seen = corners.depth[view][(weight > 250) & (corners.depth[view] > 0)].astype(float)
        assert seen.min() > corner_depth[view].min() - 1e-2
        assert seen.min() < depth[view, 0]
        checked += 1
    assert checked >= 6


@needs_blender
def test_depth_and_normals_agree_with_a_known_box(tmp_path):
    source = write_boxes(tmp_path / "box.obj", [((0, 0, 0), (3, 2, 1), "m")], material("m", (1, 1, 1)))
    seen = render_object(source, ViewSettings(train=8, held_out=4, size=64, samples=4))
    half = np.array([0.5, 1 / 6, 1 / 3])  # X 3, depth (Y) 1, height (Z) 2
    positions = seen.cameras.positions.double().numpy()
    inverse = np.linalg.inv(seen.cameras.Ks.double().numpy())
    for view in range(len(seen)):
        solid = (seen.rgba[view, ..., 3] == 255) & (seen.depth[view] > 0)
        rows, columns = np.nonzero(solid)
        rays = np.stack([columns + 0.5, rows + 0.5, np.ones(len(rows))], axis=1) @ inverse[view].T
        rotation = seen.cameras.viewmats[view, :3, :3].double().numpy()
        points = positions[view] + seen.depth[view][solid][:, None].astype(float) * rays @ rotation
        # Depth is sampled within the pixel, so points may lie half a pixel beside the surface.
        outside = np.abs(np.abs(points) - half).min(axis=1)
        assert np.median(outside) < 5e-3 and outside.max() < 4e-2
        normals = seen.normals[view][solid] / 127
        assert np.allclose(np.linalg.norm(normals, axis=1), 1, atol=0.02)
        towards = ((positions[view] - points) * normals).sum(1)
        assert (towards > 0).mean() > 0.99
    assert not seen.depth[seen.rgba[..., 3] == 0].any()
    assert not seen.normals[seen.rgba[..., 3] == 0].any()


@needs_blender
@pytest.mark.parametrize("box", [(1, 1, 1), (0.1, 1, 0.1)])
def test_the_rig_of_g_objaverse_fills_the_frame_and_cuts_nothing(tmp_path, box):
    source = write_boxes(tmp_path / "box.obj", [((0, 0, 0), box, "m")], material("m", (0.5, 0.5, 0.5)))
    seen = render_object(source, ViewSettings(train=12, held_out=2, size=64, samples=4, rig="g_objaverse"))
    covered = seen.rgba[..., 3] > 0
    border = np.concatenate([covered[:, [0, -1]].reshape(14, -1), covered[:, :, [0, -1]].reshape(14, -1)], axis=1)
    assert not border.any()
    rows = covered.any(2).sum(1)
    assert rows.max() >= 50, "the longest diagonal comes near the frame"


def test_the_rig_of_g_objaverse_has_two_rings_top_and_bottom():
    cameras, split = ViewSettings(train=36, held_out=4, size=32, rig="g_objaverse").cameras(0.5)
    positions = cameras.positions.double()
    distance = positions.norm(dim=1)
    assert torch.allclose(distance, distance[0]) and distance[0] == pytest.approx(1.04 * 0.5 / math.sin(math.radians(19.8)), rel=1e-4)
    heights = torch.rad2deg(torch.asin(positions[:, 2] / distance))
    upper, level, ends = heights[:23], heights[23:38], heights[38:]
    assert upper.min() >= 5 - 1e-3 and upper.max() <= 30 + 1e-3 and len(set(upper.round(decimals=2).tolist())) == 23
    assert level.abs().max() < 1e-3 and ends.tolist() == pytest.approx([90, -90], abs=1e-3)
    azimuths = torch.atan2(positions[23:38, 0], -positions[23:38, 1])
    assert torch.allclose(torch.sort(azimuths % (2 * math.pi)).values.diff(), torch.tensor(2 * math.pi / 15).double(), atol=1e-5)
    assert (split == "held_out").sum() == 4 and (split[:23] == "held_out").any() and (split[23:38] == "held_out").any()
    with pytest.raises(InputError, match="rig must be one of"):
        ViewSettings(rig="ring")
    with pytest.raises(InputError, match="6 cameras"):
        ViewSettings(train=4, held_out=1, rig="g_objaverse")


@needs_blender
def test_the_front_faces_minus_y_and_up_is_z(tmp_path):
    # Front (+Z of a Y-up mesh) blue, top (+Y) green, as thin plates on a grey block.
    boxes = [
        ((-1, -1, -1), (1, 1, 1), "grey"),
        ((-0.9, -0.9, 1.0), (0.9, 0.9, 1.05), "blue"),
        ((-0.9, 1.0, -0.9), (0.9, 1.05, 0.9), "green"),
    ]
    text = material("grey", (0.5, 0.5, 0.5)) + material("blue", (0, 0, 1)) + material("green", (0, 1, 0))
    source = write_boxes(tmp_path / "front.obj", boxes, text)
    colour, _, normals = _from(source, [[0.0, -1.9, 0.0], [0.0, 0.0, 1.9], [0.0, 1.9, 0.0]])
    middle = colour[:, 20:44, 20:44, :3].mean(axis=(1, 2))
    assert middle[0].argmax() == 2 and middle[1].argmax() == 1
    assert np.ptp(middle[2]) < 0.05
    assert np.allclose(normals[0, 32, 32], (0, -1, 0), atol=0.02) and np.allclose(normals[1, 32, 32], (0, 0, 1), atol=0.02)


def _from(source, positions, size=64, samples=16):
    """Linear premultiplied colour, depth and normals of a source seen from given positions."""
    import tempfile
    from pathlib import Path

    rotation = None if source.rotation is None else np.array(source.rotation)
    scene.load_object(source.path, up=source.up, rotation=rotation, size=source.size)
    with tempfile.TemporaryDirectory() as name:
        return scene.render_cameras(Cameras.look_at(torch.tensor(positions), size), Path(name), samples)


@needs_blender
def test_exposure_keeps_white_white_and_grey_grey(tmp_path):
    for display, low, high in ((1.0, 0.85, 1.0), (0.5, 0.42, 0.55)):
        source = write_boxes(tmp_path / "plain.obj", [((0, 0, 0), (1, 1, 1), "m")], material("m", (display,) * 3))
        colour, _, _ = _from(source, [[0.0, -1.9, 0.0], [0.0, 0.0, 1.9], [1.9, 0.0, 0.0]])
        pixels = scene.straight_srgb(colour)[:, 24:40, 24:40, :3] / 255
        assert low < pixels.mean() < high
        assert pixels.max() - pixels.min() > 0.01, "the light must tell the sides apart"


@needs_blender
def test_catalogue_size_stretches_and_rotation_comes_first(tmp_path):
    source = write_boxes(tmp_path / "bar.obj", [((0, 0, 0), (4, 1, 1), "m")], material("m", (1, 1, 1)))
    # A quarter turn about the mesh's Z axis stands the bar up, the size then halves its height.
    upright = dataclasses.replace(source, rotation=((0, -1, 0), (1, 0, 0), (0, 0, 1)), size=(0.5, 0.5, 1.0))
    colour, depth, _ = _from(upright, [[0.0, -1.9, 0.0]], size=100)
    rows, columns = np.nonzero(colour[0, ..., 3] > 0.5)
    assert np.ptp(rows) / np.ptp(columns) == pytest.approx(2, rel=0.1)
    assert depth[0, 50, 50] == pytest.approx(1.9 - 0.25, abs=1e-2)


@needs_blender
def test_two_coincident_faces_each_show_on_their_own_side(tmp_path):
    # One square twice, wound both ways, red to the front (+Z), blue to the back.
    (tmp_path / "sheet.mtl").write_text(material("red", (1, 0, 0)) + material("blue", (0, 0, 1)))
    path = tmp_path / "sheet.obj"
    square = "v -1 -1 0\nv 1 -1 0\nv 1 1 0\nv -1 1 0\n"
    path.write_text(f"mtllib sheet.mtl\n{square}{square}usemtl red\nf 1 2 3 4\nusemtl blue\nf 8 7 6 5\n")
    colour, _, _ = _from(SourceObject(id="sheet", name="sheet", path=path), [[0.0, -1.9, 0.0], [0.0, 1.9, 0.0]])
    front, back = colour[0, 24:40, 24:40], colour[1, 24:40, 24:40]
    assert front[..., 0].min() > 0.3 and front[..., 2].max() < 0.1
    assert back[..., 2].min() > 0.3 and back[..., 0].max() < 0.1


@needs_blender
def test_glass_is_translucent_and_a_broken_texture_leaves_the_colour(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"not an image")
    text = material("glass", (0.2, 0.8, 0.2), "d 0.5") + material("broken", (0.8, 0.1, 0.1), "map_Kd broken.png")
    source = write_boxes(tmp_path / "two.obj", [((0, 0, 0), (1, 1, 0.01), "glass"), ((2, 0, 0), (3, 1, 0.01), "broken")], text)
    pixels = scene.straight_srgb(_from(source, [[0.0, -1.9, 0.0]], size=90)[0])[0] / 255
    glass, solid = pixels[45, 20], pixels[45, 70]
    assert 0.4 < glass[3] < 0.95 and glass[1] > glass[0]
    assert solid[3] == 1 and solid[0] > 2 * solid[1], "magenta or grey would mean that the missing map is in use"


@needs_blender
def test_a_mesh_without_faces_or_extent_is_refused(tmp_path):
    path = tmp_path / "points.obj"
    path.write_text("v 0 0 0\nv 1 0 0\n")
    with pytest.raises(InputError, match="no faces"):
        scene.load_object(path)
    path.write_text("v 0 0 0\nv 0 0 0\nv 0 0 0\nf 1 2 3\n")
    with pytest.raises(InputError, match="no faces|no extent"):
        scene.load_object(path)


def test_coincident_faces_finds_pairs_and_decals_only():
    square = (np.array([0.0, 0, 0]), np.array([1.0, 1, 0]))
    far = (np.array([2.0, 0, 0]), np.array([3.0, 1, 0]))
    small = (np.array([0.4, 0.4, 0]), np.array([0.6, 0.6, 0]))
    up, down = [0, 0, 1], [0, 0, -1]
    cases = [
        ([(up, square, 0), (down, square, 0)], [True, True]),
        ([(up, square, 0), (down, far, 0)], [False, False]),
        ([(up, square, 0), (up, small, 1)], [False, True]),
        ([(up, square, 0), (up, small, 0)], [False, False]),
    ]
    for faces, expected in cases:
        lows, highs = (np.array([box[i] for _, box, _ in faces]) for i in (0, 1))
        mask = scene.coincident_faces(
            np.array([n for n, _, _ in faces], float), np.zeros(len(faces)), lows, highs, np.array([m for _, _, m in faces])
        )
        assert mask.tolist() == expected


def test_srgb_round_trip_and_straight_alpha():
    values = np.linspace(0, 1, 101)
    assert np.allclose(scene.linear_to_srgb(scene.srgb_to_linear(values)), values, atol=1e-9)
    # Half-covered pixels keep the full colour: premultiplied 0.25 at alpha 0.5 is linear 0.5, display 188.
    pixels = scene.straight_srgb(np.array([[0.25, 0.25, 0.25, 0.5], [0, 0, 0, 0], [0.001, 0, 0, 0.0005]]))
    assert pixels[0].tolist() == [188, 188, 188, 128]
    assert not pixels[1:].any()


def _views(identifier="a", size=8) -> Views:
    settings = ViewSettings(train=3, held_out=2, size=size, samples=1)
    cameras, split = settings.cameras()
    rng = np.random.default_rng(0)
    shape = (5, size, size)
    return Views(
        identifier,
        rng.integers(0, 256, (*shape, 4)).astype(np.uint8),
        rng.random(shape).astype(np.float16),
        rng.integers(-127, 128, (*shape, 3)).astype(np.int8),
        cameras,
        split,
    )


def test_files_come_back_as_they_were(tmp_path):
    made = _views()
    made.save(tmp_path / "a.npz")
    read = Views.load(tmp_path / "a.npz")
    for name in ("rgba", "depth", "normals", "split"):
        assert np.array_equal(getattr(read, name), getattr(made, name)) and getattr(read, name).dtype == getattr(made, name).dtype
    assert torch.equal(read.cameras.viewmats, made.cameras.viewmats) and torch.equal(read.cameras.Ks, made.cameras.Ks)
    assert read.id == "a" and [p.name for p in tmp_path.iterdir()] == ["a.npz"]
    assert len(read.select("train")) == 3 and len(read.select("held_out")) == 2
    assert np.array_equal(read.select("held_out").rgba, made.rgba[3:])


def test_damaged_files_are_named(tmp_path):
    path = tmp_path / "a.npz"
    with pytest.raises(InputError, match="no such file"):
        Views.load(path)
    _views().save(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match="a.npz: not a file of views"):
        Views.load(path)
    np.savez(path, rgba=np.zeros((1, 2, 2, 4), np.uint8))
    with pytest.raises(InputError, match="not a file of views"):
        Views.load(path)


def npz(path, compress=zipfile.ZIP_DEFLATED, **entries) -> None:
    """The file of `_views`, other entries in their places."""
    _views().save(path)
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compress) as archive:
        for name, data in (content | {f"{name}.npy": data for name, data in entries.items()}).items():
            archive.writestr(name, data)


def npy(shape, dtype="|u1", data=b"") -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue() + data


def test_views_that_lie_are_named_and_cost_nothing(tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    lies = {
        "ten trillion pixels": {"rgba": npy((10_000, 10_000, 25_000, 4))},
        "no pixels": {"rgba": b""},
        "objects": {"id": npy((), "|O", b"x")},
        "one axis": {"rgba": npy((4,), data=b"abcd")},
        "words for numbers": {"viewmats": npy((1,), "<U2", b"ab\0\0\0\0\0\0")},
        "a name that is no text": {"id": npy((), "<U1", b"\xff\xff\xff\x7f")},
        "a header that is none": {"rgba": b"\x93NUMPY\x01\0\x10\0" + b"(" * 16},
    }
    for name, entries in lies.items():
        npz(path, **entries)
        with pytest.raises(DamagedViews, match="a.npz: not a file of views .*: delete it and render it again"):
            print(name, Views.load(path))
    npz(path, compress=zipfile.ZIP_BZIP2)
    with pytest.raises(DamagedViews, match="packed in an unknown way"):
        Views.load(path)
    # Every byte that is not as it was is named, or what was not read: zlib, zip and NumPy complain each in a way of its own.
    _views().save(path)
    whole = path.read_bytes()
    for place in range(0, len(whole), 41):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            Views.load(path)
        except InputError as error:
            assert "a.npz" in str(error) and "\n" not in str(error)
    # What it says to hold is counted before anything is unpacked.
    path.write_bytes(whole)
    monkeypatch.setattr(views, "_MOST_BYTES", 1000)
    monkeypatch.setattr(zipfile.ZipFile, "open", lambda *_: pytest.fail("unpacked"))
    with pytest.raises(DamagedViews, match="it unpacks to more than"):
        Views.load(path)


def test_records_survive_what_only_python_takes_for_the_end_of_a_line(tmp_path):
    captions = ["a chair\u2028made\x85of\x0bwood"]
    views.add_records(tmp_path, [{"id": "chair", "captions": captions}])
    assert read_records(tmp_path) == [{"id": "chair", "captions": captions, "imported": True}]


def test_composite_blends_over_the_background():
    made = _views()
    made.rgba[0, 0, 0] = (255, 0, 0, 0)
    made.rgba[0, 0, 1] = (0, 255, 0, 255)
    image = made.composite((0.25, 0.5, 1.0))
    assert np.allclose(image[0, 0, 0], (0.25, 0.5, 1.0)) and np.allclose(image[0, 0, 1], (0, 1, 0))


@needs_blender
def test_a_run_records_failures_goes_on_and_resumes(tmp_path):
    settings = ViewSettings(train=2, held_out=1, size=16, samples=1)
    good = [write_boxes(tmp_path / f"{name}.obj", [((0, 0, 0), (1, 2, 1), "m")], material("m", (1, 0, 0))) for name in ("one", "two")]
    (tmp_path / "bad.obj").write_text("nothing here\n")
    bad = SourceObject(id="bad", name="bad", path=tmp_path / "bad.obj", captions=["bad"])
    out = tmp_path / "views"
    records = render_objects([good[0], bad, good[1]], out, settings, workers=1, progress=False)
    assert [r["status"] for r in records] == ["ok", "failed", "ok"], records
    assert "no faces" in records[1]["reason"]
    assert [r["id"] for r in read_records(out)] == ["one", "bad", "two"]
    assert len(Views.load(views_path(out, "two"))) == 3
    # A second run leaves what is there, follows new captions and tries again what failed.
    before = views_path(out, "one").stat().st_mtime_ns
    write_boxes(tmp_path / "bad.obj", [((0, 0, 0), (1, 2, 1), "m")], "")
    renamed = dataclasses.replace(good[0], captions=["a better caption"])
    records = render_objects([renamed, bad, good[1]], out, settings, workers=1, progress=False)
    assert [r["status"] for r in records] == ["ok", "ok", "ok"]
    assert views_path(out, "one").stat().st_mtime_ns == before
    assert read_records(out)[0]["captions"] == ["a better caption"]
    assert str(tmp_path) not in (out / views.RECORDS).read_text()
    assert not list(out.glob(".*"))


def _crash(identifier, source, settings, directory):
    """Dies on objects named "crash", hangs on "hang", and leaves a file for others."""
    import os
    import time

    if identifier == "crash":
        os.kill(os.getpid(), 9)
    if identifier == "hang":
        time.sleep(1000)
    views_path(directory, identifier).write_bytes(b"")
    return {"seconds": {"views": 1.5}}


@needs_blender
def test_a_crash_or_a_hang_costs_one_object(tmp_path, monkeypatch):
    monkeypatch.setattr(views, "_render_one", _crash)
    objects = [SourceObject(id=name, name=name, path=tmp_path / "x.obj") for name in ("a", "crash", "b", "hang", "c")]
    records = render_objects(objects, tmp_path / "out", ViewSettings(size=8), workers=1, timeout=3, progress=False)
    assert [r["status"] for r in records] == ["ok", "failed", "ok", "failed", "ok"]
    assert all("the worker died 3 times" in records[i]["reason"] for i in (1, 3)) and [r["seconds"] for r in records[::2]] == [1.5] * 3


def test_arguments_are_checked(tmp_path, monkeypatch):
    source = SourceObject(id="a", name="a", path=tmp_path / "a.obj")
    with pytest.raises(InputError, match="share an id"):
        render_objects([source, source], tmp_path / "out")
    for name in ("train", "size", "samples"):
        with pytest.raises(InputError, match=name):
            ViewSettings(**{name: 0})
    monkeypatch.setattr(views.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(WorkError, match="bpy"):
        render_objects([source], tmp_path / "out")


def test_a_folder_keeps_to_its_settings(tmp_path):
    (tmp_path / views.SETTINGS).write_text(json.dumps({**dataclasses.asdict(ViewSettings()), "size": 64}))
    with pytest.raises(InputError, match="other settings"):
        views._check_settings(tmp_path, ViewSettings())
    before = dataclasses.asdict(ViewSettings())
    del before["rig"]
    (tmp_path / views.SETTINGS).write_text(json.dumps(before))
    views._check_settings(tmp_path, ViewSettings())
    (tmp_path / views.SETTINGS).write_text("3")
    with pytest.raises(InputError, match="not readable"):
        views._check_settings(tmp_path, ViewSettings())


def test_records_survive_a_line_cut_short(tmp_path):
    (tmp_path / views.RECORDS).write_text('{"id": "a", "status": "failed"}\n{"id": "a", "status": "ok"}\n{"id": "b", "sta')
    assert read_records(tmp_path) == [{"id": "a", "status": "ok"}]


@needs_blender
def test_vertices_of_a_ply_bring_colour_and_opacity(tmp_path):
    """Two boards side by side: a whole red one, and a clear blue one."""
    points, faces = [], []
    for number, (left, colour) in enumerate([(-1.0, (200, 20, 20, 255)), (0.0, (20, 20, 200, 77))]):
        points += [(left + x, 0.0, z, *colour) for x, z in ((0, 0), (1, 0), (1, 1), (0, 1))]
        faces.append([4 * number + i for i in range(4)])
    header = ["ply", "format ascii 1.0", f"element vertex {len(points)}", *(f"property float {c}" for c in "xyz")]
    header += [f"property uchar {c}" for c in ("red", "green", "blue", "alpha")]
    header += [f"element face {len(faces)}", "property list uchar int vertex_indices", "end_header"]
    lines = [*header, *(" ".join(map(str, p)) for p in points), *("4 " + " ".join(map(str, f)) for f in faces)]
    path = tmp_path / "boards.ply"
    path.write_text("\n".join(lines) + "\n")
    seen = render_object(SourceObject(id="boards", name="boards", path=path, captions=["boards"], up="z"), ViewSettings(1, 1, 64, 16))
    view = seen.select("held_out")
    rgba = view.rgba[0].astype(int)
    columns = np.flatnonzero((rgba[..., 3] > 0).any(0))
    middle = rgba[rgba.shape[0] // 2]
    left, right = middle[columns[0] + 4], middle[columns[-1] - 4]
    assert left[3] == 255 and left[0] > 120 and left[0] > 3 * left[2]
    assert right[3] == pytest.approx(77, abs=25) and right[2] > 120 and right[2] > 3 * right[0]
