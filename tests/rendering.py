"""What tests and benchmarks of Blender's renders share: set up, rendered, read back, compared."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(-10 * np.log10(max(np.mean((a - b) ** 2), 1e-12)))


def read_png(path) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(path).convert("RGB"), np.float32) / 255


def read_exr(path: Path) -> dict[str, np.ndarray]:
    """The channels [H, W] of an uncompressed scan-line OpenEXR file (the format's own specification, "File Layout")."""
    data = Path(path).read_bytes()

    def text(position: int) -> tuple[str, int]:
        end = data.index(b"\0", position)
        return data[position:end].decode(), end + 1

    position, channels = 8, []
    while data[position]:
        name, position = text(position)
        _, position = text(position)
        size = int.from_bytes(data[position : position + 4], "little")
        value, position = position + 4, position + 4 + size
        if name == "channels":
            while data[value]:
                channel, value = text(value)
                channels.append((channel, {1: "<f2", 2: "<f4"}[int.from_bytes(data[value : value + 4], "little")]))
                value += 16
        elif name == "compression":
            assert data[value] == 0
        elif name == "dataWindow":
            left, top, right, bottom = np.frombuffer(data[value : value + 16], "<i4")
    width, height = right - left + 1, bottom - top + 1
    position += 1 + 8 * height  # the table of line offsets
    image = {name: np.empty((height, width), np.float32) for name, _ in channels}
    for _ in range(height):
        row = int.from_bytes(data[position : position + 4], "little", signed=True) - top
        position += 8
        for name, kind in channels:
            size = width * np.dtype(kind).itemsize
            image[name][row] = np.frombuffer(data[position : position + size], kind)
            position += size
    return image


def render_passes(bpy, path: Path) -> dict[str, np.ndarray]:
    """The scene once more with the Z pass, as it is set up: channels by name."""
    scene = bpy.context.scene
    scene.view_layers[0].use_pass_z = True
    settings = scene.render.image_settings
    if hasattr(settings, "media_type"):  # from Blender 5.0
        settings.media_type = "MULTI_LAYER_IMAGE"
        settings.use_exr_interleave = True
    settings.file_format, settings.exr_codec, settings.color_depth = "OPEN_EXR_MULTILAYER", "NONE", "32"
    scene.render.filepath = str(path)
    bpy.ops.render.render(write_still=True)
    return {name.rpartition(".")[2]: values for name, values in read_exr(path).items()}


def render_in_blender(bpy, extension, object, cameras, path, display_blending=True, display="Camera Quads", engine="CYCLES") -> np.ndarray:
    """F12 of a splat object, one sample at the pixel's centre, over white: display values [H, W, 3]."""
    splat_object, preview = extension("blender_addon.splat_object"), extension("blender_addon.preview")
    node_group, inputs = (extension(f"blender_addon.splat_object.{name}") for name in ("node_group", "inputs"))
    scene = bpy.context.scene
    node_group.set_input(object, inputs.BLEND_IN_DISPLAY_SPACE, display_blending)
    node_group.set_input(object, inputs.RENDER_DISPLAY, display)
    node_group.set_input(object, inputs.SMOOTHING, node_group.LOW_PASS_PIXELS / float(cameras.Ks[0, 0, 0]))
    camera = splat_object.camera_from(cameras, 0)
    scene.collection.objects.link(camera)
    preview.set_up(scene, camera, samples=1, size=(cameras.width, cameras.height))
    scene.view_settings.view_transform = "Raw" if display_blending else "Standard"
    scene.render.dither_intensity = 0
    scene.cycles.filter_width = 0.01
    if engine != "CYCLES":
        scene.render.engine = engine
        scene.render.filter_size = 0.0
        scene.eevee.taa_render_samples = 1
    preview.render(scene, path)
    return read_png(path)


def translucent(torus, count=4096):
    """The torus that the figures in the documentation are of: the light passes several splats."""
    gaussians = torus(count)
    return gaussians.replace(opacities=gaussians.opacities * 0.4)


def painted_torus(extension, count: int = 4096, seed: int = 0):
    """Fairly opaque, flat Gaussians on a painted torus, an object of the project's frame."""
    import torch

    Gaussians = extension("generator.gaussians").Gaussians
    random = np.random.default_rng(seed)
    u, v = random.uniform(0, 2 * np.pi, (2, count))
    ring, tube = 0.36, 0.14
    normal = np.stack([np.cos(u) * np.cos(v), np.sin(u) * np.cos(v), np.sin(v)], axis=1)
    means = np.stack([ring * np.cos(u), ring * np.sin(u), np.zeros(count)], axis=1) + tube * normal
    # A quaternion that turns +Z to the normal, then a random spin about it.
    half = normal + np.array([0, 0, 1.0])
    half /= np.linalg.norm(half, axis=1, keepdims=True)
    spin = random.uniform(0, np.pi, count)
    turn = np.stack([half[:, 2], -half[:, 1], half[:, 0], np.zeros(count)], axis=1)
    about = np.stack([np.cos(spin), np.zeros(count), np.zeros(count), np.sin(spin)], axis=1)
    w1, x1, y1, z1 = turn.T
    w2, x2, y2, z2 = about.T
    quaternions = np.stack(
        [
            w1 * w2 - x1 * x2 - y1 * y2 - z1 * z2,
            w1 * x2 + x1 * w2 + y1 * z2 - z1 * y2,
            w1 * y2 - x1 * z2 + y1 * w2 + z1 * x2,
            w1 * z2 + x1 * y2 - y1 * x2 + z1 * w2,
        ],
        axis=1,
    )
    width = np.sqrt(4 * np.pi**2 * ring * tube / count)
    scales = np.stack([random.uniform(0.5, 0.8, count), random.uniform(0.5, 0.8, count), np.full(count, 0.1)], axis=1) * width
    colors = 0.5 + 0.45 * np.stack([np.sin(3 * u), np.sin(2 * v + 1), np.cos(u + v)], axis=1)
    opacities = random.uniform(0.7, 0.98, count)
    tensors = (torch.tensor(a, dtype=torch.float32) for a in (means, quaternions, scales, opacities, colors))
    return Gaussians(*tensors)
