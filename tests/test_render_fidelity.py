"""What Blender renders against the generator's own renderer of the same Gaussians."""

from __future__ import annotations

import numpy as np
import pytest


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(-10 * np.log10(np.mean((a - b) ** 2)))


def render_raw(bpy, extension, gaussians, cameras, path, blend_in_display_space=True) -> np.ndarray:
    """F12 in Cycles, one sample at the pixel centre, over white: display values [H, W, 3]."""
    splat_object = extension("blender_addon.splat_object")
    node_group = extension("blender_addon.splat_object.node_group")
    scene = bpy.context.scene
    focal = float(cameras.Ks[0, 0, 0])
    object = splat_object.write(gaussians, "splats")
    node_group.set_input(object, node_group.BLEND_IN_DISPLAY_SPACE, blend_in_display_space)
    node_group.set_input(object, node_group.SMOOTHING, node_group.LOW_PASS_PIXELS / focal)
    scene.camera = splat_object.camera_from(cameras, 0)
    scene.collection.objects.link(scene.camera)
    extension("blender_addon.render_settings").apply(scene)
    scene.view_settings.view_transform = "Raw" if blend_in_display_space else "Standard"
    scene.render.engine = "CYCLES"
    scene.cycles.samples = 1
    scene.cycles.use_denoising = False
    scene.cycles.filter_width = 0.01
    scene.render.resolution_x, scene.render.resolution_y = cameras.width, cameras.height
    scene.render.resolution_percentage = 100
    scene.world = extension("blender_addon.preview").plain_world((1.0, 1.0, 1.0))
    scene.render.image_settings.file_format = "PNG"
    scene.render.filepath = str(path)
    bpy.ops.render.render(write_still=True)
    from PIL import Image

    return np.asarray(Image.open(path).convert("RGB"), np.float32) / 255


@pytest.mark.parametrize("view", [0, 3])
def test_cycles_matches_the_cpu_renderer(bpy, extension, torus, tmp_path, view):
    render_module = extension("generator.render")
    gaussians = torus(4096)
    cameras = render_module.Cameras.orbit(count=5, size=192, elevation=35.0)[view : view + 1]
    reference = render_module.render(gaussians, cameras).rgb[0].numpy()
    image = render_raw(bpy, extension, gaussians, cameras, tmp_path / "view.png")
    assert psnr(image, reference) >= 35
