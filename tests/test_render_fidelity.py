"""What Blender renders against the generator's own renderer of the same Gaussians."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.rendering import psnr, read_png, render_in_blender, render_passes, translucent

_ALONE = "GAUSSIAN_ATLAS_TEST_EEVEE"
ROOT = Path(__file__).resolve().parent.parent


def off_centre(extension, size=160):
    """A camera whose optical axis does not pass through the image's centre, looking down at an object beside it."""
    cameras = extension("generator.render").Cameras.orbit(count=1, size=size, elevation=40.0, start=200.0)
    Ks = cameras.Ks.clone()
    Ks[0, 0, 2] += 17.0
    Ks[0, 1, 2] -= 9.0
    return type(cameras)(cameras.viewmats, Ks, cameras.width, cameras.height)


def compare(bpy, extension, gaussians, cameras, path, matrix=None, **how) -> float:
    """dB between Blender's render of Gaussians, their object moved by a matrix, and the generator's own."""
    splat_object = extension("blender_addon.splat_object")
    object = splat_object.write(gaussians)
    if matrix is not None:
        object.matrix_world = matrix
        bpy.context.view_layer.update()
    image = render_in_blender(bpy, extension, object, cameras, path, **how)
    reference = extension("generator.render").render(splat_object.read(object, world=True), cameras).rgb[0].numpy()
    bpy.data.objects.remove(object)
    return psnr(image, reference)


def rotated_and_stretched():
    from mathutils import Matrix

    return Matrix.Translation((0.05, 0.1, -0.1)) @ Matrix.Rotation(0.7, 4, (1, 2, 0.5)) @ Matrix.Diagonal((1.2, 0.6, 0.9, 1.0))


def generated(extension):
    """An object of the starter model."""
    model = extension("blender_addon.extension").STARTER_MODEL
    if not (model / "bundle.json").exists():
        pytest.skip("the starter model is not there: make train PRESET=starter")
    pipeline = extension("generator").GaussianAtlasPipeline.from_pretrained(model, device="cpu", allow_download=False)
    return pipeline("a red armchair", seed=0, num_inference_steps=8).gaussians[0]


@pytest.mark.parametrize("view", [0, 3])
@pytest.mark.parametrize(("display", "bound"), [("Camera Quads", 60), ("Ellipsoids", 48)])
def test_cycles_matches_on_the_translucent_torus(bpy, extension, torus, tmp_path, view, display, bound):
    cameras = extension("generator.render").Cameras.orbit(count=5, size=192, elevation=35.0)[view : view + 1]
    assert compare(bpy, extension, translucent(torus), cameras, tmp_path / "view.png", display=display) >= bound


@pytest.mark.parametrize(("display", "bound"), [("Camera Quads", 55), ("Ellipsoids", 40)])
def test_cycles_matches_on_a_generated_object(bpy, extension, tmp_path, display, bound):
    cameras = extension("generator.render").Cameras.orbit(count=1, size=256)
    assert compare(bpy, extension, generated(extension), cameras, tmp_path / "view.png", display=display) >= bound


@pytest.mark.parametrize(("display", "bound", "opaque_bound"), [("Camera Quads", 55, 55), ("Ellipsoids", 42, 37)])
def test_cycles_matches_on_a_rotated_and_stretched_object(bpy, extension, torus, tmp_path, display, bound, opaque_bound):
    """The opaque torus too: what is hidden stays hidden. Ellipsoids are met by their surfaces there, not by their centres."""
    cameras = extension("generator.render").Cameras.orbit(count=1, size=160, elevation=20.0)
    matrix = rotated_and_stretched()
    assert compare(bpy, extension, translucent(torus), cameras, tmp_path / "view.png", matrix, display=display) >= bound
    assert compare(bpy, extension, torus(4096), cameras, tmp_path / "view.png", matrix, display=display) >= opaque_bound


@pytest.mark.parametrize("shape", ["WIDE", "TALL", "ORTHO"])
def test_the_button_is_all_that_a_render_needs(bpy, extension, torus, tmp_path, shape):
    """A splat object, a camera, "Adapt Render Settings", F12; and everything back as it was."""
    module, preview = extension("generator.render"), extension("blender_addon.preview")
    cameras = module.Cameras.orbit(count=1, size=120, elevation=35.0)
    object = extension("blender_addon.splat_object").write(translucent(torus), "ring")
    scene = bpy.context.scene
    camera = extension("blender_addon.splat_object").camera_from(cameras, 0)
    scene.collection.objects.link(camera)
    scene.camera, scene.world = camera, preview.plain_world(preview.WHITE)
    scene.render.resolution_x = scene.render.resolution_y = 240
    scene.render.resolution_percentage = 50
    scene.render.engine, scene.cycles.samples, scene.cycles.filter_width, scene.cycles.use_denoising = "CYCLES", 1, 0.01, False
    scene.render.dither_intensity = 0
    camera.data.sensor_fit = {"WIDE": "HORIZONTAL", "TALL": "VERTICAL", "ORTHO": "AUTO"}[shape]
    if shape == "TALL":
        camera.data.sensor_height = camera.data.sensor_width
    inputs = extension("blender_addon.splat_object.inputs")
    modifier = extension("blender_addon.splat_object.node_group").modifier_of(object)
    inputs.set_value(modifier, inputs.BLEND_IN_DISPLAY_SPACE, True)
    scene.view_settings.view_transform = "Raw"
    said = [str(change) for change in extension("blender_addon.render_settings").changes(scene)]
    assert any(line.startswith("Smoothing of ring: 0 to 0.00") for line in said), said
    bpy.ops.gaussian_atlas.render_settings()
    if shape == "ORTHO":
        camera.data.type, camera.data.ortho_scale = "ORTHO", 1.5
        bpy.ops.gaussian_atlas.render_settings()
        assert np.isclose(inputs.get_value(modifier, inputs.SMOOTHING), 0.3**0.5 * 1.5 / 120)
    else:
        preview.render(scene, tmp_path / "view.png")
        assert psnr(read_png(tmp_path / "view.png"), module.render(translucent(torus), cameras).rgb[0].numpy()) >= 55
    assert extension("blender_addon.render_settings").changes(scene) == []
    bpy.ops.gaussian_atlas.render_settings(restore=True)
    assert inputs.get_value(modifier, inputs.SMOOTHING) == 0
    owner, path = inputs.place(modifier, inputs.SMOOTHING)
    owner.keyframe_insert(path, frame=1)
    said = [str(change) for change in extension("blender_addon.render_settings").changes(scene)]
    assert not any(line.startswith("Smoothing") for line in said), "what is animated is the artist's"


@pytest.mark.parametrize("display", ["Camera Quads", "Ellipsoids"])
def test_a_density_of_two_is_every_splat_twice(bpy, extension, torus, tmp_path, display):
    splat_object, inputs = extension("blender_addon.splat_object"), extension("blender_addon.splat_object.inputs")
    cameras = extension("generator.render").Cameras.orbit(count=1, size=64, elevation=35.0)
    gaussians = translucent(torus, 40)
    dense = splat_object.write(gaussians, "dense")
    extension("blender_addon.splat_object.node_group").set_input(dense, inputs.DENSITY, 2.0)
    one = render_in_blender(bpy, extension, dense, cameras, tmp_path / "dense.png", display=display)
    bpy.data.objects.remove(dense)
    for name in "ab":
        twice = splat_object.write(gaussians, name)
        extension("blender_addon.splat_object.node_group").set_input(twice, inputs.RENDER_DISPLAY, display)
        extension("blender_addon.splat_object.node_group").set_input(twice, inputs.SMOOTHING, 0.3**0.5 / float(cameras.Ks[0, 0, 0]))
        extension("blender_addon.splat_object.node_group").set_input(twice, inputs.BLEND_IN_DISPLAY_SPACE, True)
    # Not in the very same place, where the order of surfaces would be left to chance.
    twice.location = 1e-5 * np.array([1.0, -1.0, 1.0])
    two = render_in_blender(bpy, extension, twice, cameras, tmp_path / "twice.png", display=display)
    plain = extension("generator.render").render(gaussians, cameras).rgb[0].numpy()
    assert psnr(one, two) > 45 and psnr(plain, two) < 30


def test_the_preview_before_white_looks_as_the_fit_was_blended(bpy, extension, tmp_path):
    """In linear light, which lets more of the white through: the density makes up for it."""
    splat_object, preview = extension("blender_addon.splat_object"), extension("blender_addon.preview")
    node_group, inputs = extension("blender_addon.splat_object.node_group"), extension("blender_addon.splat_object.inputs")
    gaussians = generated(extension)
    object = splat_object.write(gaussians, "object")
    pictures = {}
    for name, exact, density in (("exact", True, None), ("preview", False, None), ("thin", False, 1.0)):
        bpy.context.scene.view_settings.view_transform = "Standard"
        preview.look_at(bpy.context.scene, object, 128, samples=2, exact=exact)
        if density:
            node_group.set_input(object, inputs.DENSITY, density)
        preview.render(bpy.context.scene, tmp_path / f"{name}.png")
        pictures[name] = read_png(tmp_path / f"{name}.png")
    near, far = (psnr(pictures["exact"], pictures[name]) for name in ("preview", "thin"))
    assert near > 35 and near > far + 6, (near, far)


def test_cycles_matches_where_hundreds_of_splats_lie_behind_a_pixel(bpy, extension, torus, tmp_path):
    cameras = extension("generator.render").Cameras.orbit(count=1, size=40, elevation=35.0)
    assert compare(bpy, extension, translucent(torus, 8192), cameras, tmp_path / "view.png") >= 55


def test_cycles_matches_where_large_translucent_splats_cross(bpy, extension, torus, tmp_path):
    gaussians = torus(60)  # few and wide: the order of crossing splats decides
    gaussians = gaussians.replace(opacities=gaussians.opacities * 0.6)
    assert compare(bpy, extension, gaussians, off_centre(extension), tmp_path / "view.png") >= 50


def test_cycles_matches_under_a_sheared_object(bpy, extension, torus, tmp_path):
    from mathutils import Matrix

    module = extension("generator.render")
    splat_object = extension("blender_addon.splat_object")
    object = splat_object.write(torus(1000))
    # An object has no shear of its own: a parent with uneven scale gives it one.
    parent = bpy.data.objects.new("parent", None)
    bpy.context.scene.collection.objects.link(parent)
    object.parent = parent
    parent.matrix_world = Matrix.Translation((0.05, 0.1, -0.1)) @ Matrix.Rotation(0.7, 4, "X") @ Matrix.Diagonal((1.2, 0.6, 0.9, 1.0))
    object.rotation_euler.z = 0.5
    bpy.context.view_layer.update()
    assert np.allclose(object.matrix_world, parent.matrix_world @ Matrix.Rotation(0.5, 4, "Z"), atol=1e-6)
    cameras = module.Cameras.orbit(count=1, size=160)
    reference = module.render(splat_object.read(object, world=True), cameras).rgb[0].numpy()
    image = render_in_blender(bpy, extension, object, cameras, tmp_path / "view.png")
    assert psnr(image, reference) >= 45


@pytest.mark.parametrize("display", ["Camera Quads", "Ellipsoids"])
def test_orthographic_camera_sees_what_a_far_one_does(bpy, extension, torus, tmp_path, display):
    gaussians = translucent(torus)
    module = extension("generator.render")
    cameras = module.Cameras.orbit(count=1, size=160, elevation=35.0)
    # A thousand times as far away with a focal length a thousand times as long: the rays are parallel.
    viewmats, Ks = cameras.viewmats.clone(), cameras.Ks.clone()
    distance = float(viewmats[0, 2, 3])
    width = cameras.width * distance / float(Ks[0, 0, 0])  # of what the frame shows, in the object's plane
    viewmats[0, 2, 3] *= 1000
    Ks[0, 0, 0] *= 1000
    Ks[0, 1, 1] *= 1000
    reference = module.render(gaussians, module.Cameras(viewmats, Ks, cameras.width, cameras.height)).rgb[0].numpy()
    object = extension("blender_addon.splat_object").write(gaussians)
    render_in_blender(bpy, extension, object, cameras, tmp_path / "view.png", display=display)
    scene, inputs = bpy.context.scene, extension("blender_addon.splat_object.inputs")
    scene.camera.data.type, scene.camera.data.ortho_scale = "ORTHO", width
    node_group = extension("blender_addon.splat_object.node_group")
    node_group.set_input(object, inputs.SMOOTHING, node_group.LOW_PASS_PIXELS * width / cameras.width)
    extension("blender_addon.preview").render(scene, tmp_path / "view.png")
    assert psnr(read_png(tmp_path / "view.png"), reference) >= 48


@pytest.mark.parametrize("display", ["Camera Quads", "Ellipsoids"])
def test_splats_that_are_thinned_look_alike(bpy, extension, torus, tmp_path, display):
    """Half of the splats, widened, come nearer to the whole than half of them as they were."""
    gaussians = torus(4096)
    cameras = extension("generator.render").Cameras.orbit(count=1, size=96, elevation=35.0)
    inputs, node_group = extension("blender_addon.splat_object.inputs"), extension("blender_addon.splat_object.node_group")
    object = extension("blender_addon.splat_object").write(gaussians)
    whole = render_in_blender(bpy, extension, object, cameras, tmp_path / "view.png", display=display)
    close = {}
    for size in (1.0, 0.5**0.5):  # the second takes the widening back
        node_group.set_input(object, inputs.SPLATS_KEPT, 0.5)
        node_group.set_input(object, inputs.SPLAT_SIZE, size)
        image = render_in_blender(bpy, extension, object, cameras, tmp_path / "view.png", display=display)
        close[size] = psnr(image, whole)
    assert close[1.0] > close[0.5**0.5] + 3, close


@pytest.mark.parametrize("display", ["Camera Quads", "Ellipsoids"])
def test_alpha_film_is_straight_and_right(bpy, extension, torus, tmp_path, display):
    """A PNG with alpha, laid over white, is the render over white; its alpha is that of the reference."""
    from PIL import Image

    gaussians = translucent(torus)
    module = extension("generator.render")
    cameras = module.Cameras.orbit(count=1, size=128, elevation=35.0)
    object = extension("blender_addon.splat_object").write(gaussians)
    over_white = render_in_blender(bpy, extension, object, cameras, tmp_path / "view.png", display=display)
    scene = bpy.context.scene
    scene.render.film_transparent = True
    scene.render.image_settings.color_mode = "RGBA"
    extension("blender_addon.preview").render(scene, tmp_path / "alpha.png")
    straight = np.asarray(Image.open(tmp_path / "alpha.png"), np.float32) / 255
    color, alpha = straight[..., :3], straight[..., 3:]
    assert psnr(color * alpha + 1 - alpha, over_white) >= 50
    assert psnr(alpha[..., 0], module.render(gaussians, cameras).alpha[0].numpy()) >= 50
    assert alpha.min() == 0 and alpha.max() > 0.9


@pytest.mark.parametrize("display", ["Camera Quads", "Ellipsoids"])
def test_z_pass_is_the_depth_of_the_first_splat_that_counts(bpy, extension, torus, tmp_path, display):
    """Cycles takes the first splat whose own alpha reaches the view layer's threshold: on a solid object its surface."""
    gaussians = torus(4096)
    module = extension("generator.render")
    cameras = module.Cameras.orbit(count=1, size=128, elevation=35.0)
    object = extension("blender_addon.splat_object").write(gaussians)
    render_in_blender(bpy, extension, object, cameras, tmp_path / "view.png", display=display)
    bpy.context.scene.view_layers[0].pass_alpha_threshold = 0.1
    z = render_passes(bpy, tmp_path / "passes.exr")["Z"]
    expected = module.render(gaussians, cameras)
    solid, empty = expected.alpha[0].numpy() > 0.95, expected.alpha[0].numpy() == 0
    error = np.abs(z - expected.depth[0].numpy())[solid]
    assert (z[solid] < 100).all() and (z[empty] > 1e6).all()
    assert np.median(error) < 0.05 and np.percentile(error, 95) < 0.15  # the object is 1 wide, the tube 0.28


@pytest.mark.parametrize("display", ["Camera Quads", "Ellipsoids", "Points"])
def test_splats_cast_shadows(bpy, extension, torus, tmp_path, display):
    """A sun overhead: dark under the torus, bright in its hole and outside; half as dark where it is half as dense."""
    gaussians = torus(1500)
    gaussians = gaussians.replace(scales=gaussians.scales * 1.5)
    object = extension("blender_addon.splat_object").write(gaussians)
    object.location.z = 1.0
    scene, preview = bpy.context.scene, extension("blender_addon.preview")
    floor = bpy.data.meshes.new("floor")
    floor.from_pydata([(-1, -1, 0), (1, -1, 0), (1, 1, 0), (-1, 1, 0)], [], [(0, 1, 2, 3)])
    scene.collection.objects.link(bpy.data.objects.new("floor", floor))
    sun = bpy.data.objects.new("sun", bpy.data.lights.new("sun", "SUN"))
    sun.data.energy, sun.data.angle = 3.0, 0.0
    scene.collection.objects.link(sun)
    camera = bpy.data.objects.new("camera", bpy.data.cameras.new("camera"))
    camera.location, camera.data.type, camera.data.ortho_scale = (0, 0, 0.5), "ORTHO", 2.0  # between the floor and the splats
    scene.collection.objects.link(camera)
    preview.set_up(scene, camera, (64, 64), samples=4)
    scene.world = preview.plain_world((0, 0, 0))
    scene.cycles.max_bounces = 0  # the splats' own light would brighten the floor
    extension("blender_addon.splat_object.node_group").set_input(object, "Render Display", display)
    preview.render(scene, tmp_path / "floor.png")
    image = read_png(tmp_path / "floor.png").mean(-1)
    y, x = np.mgrid[-1:1:64j, -1:1:64j]
    radius = np.hypot(x, y)
    outside, hole = image[radius > 0.7], image[radius < 0.12]
    tube = image[np.abs(radius - 0.36) < 0.06]
    if display == "Camera Quads":
        # The camera looks the other way: squares of splats behind it are left out, and cast nothing.
        assert tube.mean() > 0.9 * outside.mean()
    else:
        assert tube.mean() < 0.35 * outside.mean() and hole.mean() > 0.9 * outside.mean() > 0.3


def test_standard_view_shows_the_splats_own_colours(bpy, extension, tmp_path):
    """Where one opaque splat is all there is to see, linear emission under Standard is its display colour."""
    import torch

    Gaussians = extension("generator.gaussians").Gaussians
    color = (0.8, 0.35, 0.02)
    one = Gaussians(torch.zeros(1, 3), torch.tensor([[1.0, 0, 0, 0]]), torch.full((1, 3), 0.3), torch.ones(1), torch.tensor([color]))
    cameras = extension("generator.render").Cameras.orbit(count=1, size=65)
    object = extension("blender_addon.splat_object").write(one)
    image = render_in_blender(bpy, extension, object, cameras, tmp_path / "view.png", display_blending=False)
    assert np.allclose(image[32, 32], color, atol=0.012)  # 8 bits, and 0.1 % of the white behind


def test_framing_fills_the_frame(extension, torus):
    gaussians = torus(2000)
    module = extension("generator.render")
    for azimuth, elevation in ((30, 20), (0, 0), (120, 89), (200, -40)):
        cameras = extension("blender_addon.splat_object").framing(gaussians, 128, azimuth, elevation)
        alpha = module.render(gaussians, cameras).alpha[0].numpy() > 0.5
        rows, columns = np.flatnonzero(alpha.any(1)), np.flatnonzero(alpha.any(0))
        assert min(rows[0], columns[0], 127 - rows[-1], 127 - columns[-1]) >= 4
        assert max(rows[-1] - rows[0], columns[-1] - columns[0]) >= 0.8 * 128


def test_blender_camera_sees_what_the_camera_sees(bpy, extension):
    from bpy_extras.object_utils import world_to_camera_view
    from mathutils import Vector

    cameras = off_centre(extension, size=200)
    camera = extension("blender_addon.splat_object").camera_from(cameras, 0)
    scene = bpy.context.scene
    scene.collection.objects.link(camera)
    scene.render.resolution_x = scene.render.resolution_y = 200
    bpy.context.view_layer.update()
    for point in ((0, 0, 0), (0.3, -0.2, 0.1), (-0.4, 0.4, 0.5)):
        local = cameras.viewmats[0].double().numpy() @ np.array([*point, 1.0])
        pixel = cameras.Ks[0].double().numpy() @ (local[:3] / local[2])
        seen = world_to_camera_view(scene, camera, Vector(point))
        assert math.isclose(seen.x * 200, pixel[0], abs_tol=1e-3)
        assert math.isclose((1 - seen.y) * 200, pixel[1], abs_tol=1e-3)


def test_camera_of_oblong_pixels_is_refused(bpy, extension):
    cameras = off_centre(extension)
    cameras.Ks[0, 1, 1] *= 1.1
    with pytest.raises(extension("generator.errors").InputError, match="focal lengths"):
        extension("blender_addon.splat_object").camera_from(cameras, 0)


@pytest.mark.skipif(_ALONE not in os.environ, reason="run by test_eevee_matches_the_cpu_renderer in a process of its own")
def test_eevee_alone(bpy, extension, torus, tmp_path):
    engines = bpy.types.RenderSettings.bl_rna.properties["engine"].enum_items
    engine = next(name for name in ("BLENDER_EEVEE", "BLENDER_EEVEE_NEXT") if name in engines)
    module = extension("generator.render")
    cameras = module.Cameras.orbit(count=1, size=128, elevation=35.0)
    how = {"path": tmp_path / "view.png", "engine": engine}
    for display, bound in (("Camera Quads", 55), ("Ellipsoids", 52)):
        assert compare(bpy, extension, translucent(torus, 2048), cameras, display=display, **how) >= bound, display
        stretched = compare(bpy, extension, translucent(torus, 1024), cameras, matrix=rotated_and_stretched(), display=display, **how)
        assert stretched >= bound - 5, display
        assert compare(bpy, extension, generated(extension), cameras, display=display, **how) >= 40, display
    # The Z pass has the opaque points only: what EEVEE blends leaves no depth.
    gaussians = torus(4096)
    object = extension("blender_addon.splat_object").write(gaussians)
    render_in_blender(bpy, extension, object, cameras, display="Points", **how)
    z = render_passes(bpy, tmp_path / "passes.exr")["Z"]
    expected = module.render(gaussians, cameras)
    error = np.abs(z - expected.depth[0].numpy())[expected.alpha[0].numpy() > 0.97]
    assert np.median(error) < 0.05


def test_eevee_matches_the_cpu_renderer(tmp_path):
    """In a process of its own: without an EGL driver Blender aborts at the first EEVEE render."""
    arguments = ["-q", "-p", "no:cacheprovider", "--basetemp", str(tmp_path / "inner"), f"{Path(__file__)}::test_eevee_alone"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments], cwd=ROOT, env=os.environ | {_ALONE: "1"}, capture_output=True, text=True
    )
    if done.returncode < 0:
        pytest.skip("EEVEE cannot start here: no EGL driver (Debian: libegl1 libgl1-mesa-dri)")
    assert done.returncode == 0, done.stdout[-3000:]
