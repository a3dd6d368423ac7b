"""A scene that shows a splat object from its best side, and its render in Cycles."""

from __future__ import annotations

from pathlib import Path

import bpy

from ..generator.errors import WorkError
from ..generator.files import replacing
from . import render_settings, splat_object
from .splat_object import inputs, node_group

# Seen a little from the right and from above: front, side and top of an object show at once.
AZIMUTH, ELEVATION = 30.0, 20.0
WHITE = (1.0, 1.0, 1.0)
# Before white, in linear light, this shows splats most as their fits were blended, in display values (docs/blender.md).
DENSITY_BEFORE_WHITE = 2.0


def empty_scene() -> bpy.types.Scene:
    """Leave the open file for an empty one and return its scene. Preferences and extensions stay."""
    bpy.ops.wm.read_homefile(use_empty=True, use_factory_startup=True)
    return bpy.context.scene


def plain_world(color: tuple[float, float, float], name: str = "Plain") -> bpy.types.World:
    """A world of one scene-linear colour."""
    world = bpy.data.worlds.new(name)
    if world.node_tree is None:
        world.use_nodes = True  # the default, and deprecated, from Blender 5.0
    nodes = world.node_tree.nodes
    nodes.clear()
    background = nodes.new("ShaderNodeBackground")
    background.inputs["Color"].default_value = (*color, 1.0)
    surface = nodes.new("ShaderNodeOutputWorld")
    surface.location = (220, 0)
    world.node_tree.links.new(background.outputs[0], surface.inputs["Surface"])
    return world


def look_at(
    scene: bpy.types.Scene,
    object: bpy.types.Object,
    size: int,
    samples: int = 4,
    azimuth: float = AZIMUTH,
    elevation: float = ELEVATION,
    exact: bool = False,
) -> None:
    """A camera that sees all of a splat object, and the smoothing that belongs to its pixels.

    Args:
        size: image side in pixels.
        azimuth, elevation: where the camera stands, in degrees, as `splat_object.framing` takes them.
        exact: blend display values under the Raw view, as splat renderers do. Otherwise the view is Standard and blending is
            linear, which fits everything else in a scene; the density makes up for what that lets through of the white behind.
    """
    cameras = splat_object.framing(splat_object.current(object, world=True), size, azimuth, elevation)
    camera = splat_object.camera_from(cameras, 0)
    scene.collection.objects.link(camera)
    node_group.set_input(object, inputs.SMOOTHING, node_group.LOW_PASS_PIXELS / float(cameras.Ks[0, 0, 0]))
    node_group.set_input(object, inputs.BLEND_IN_DISPLAY_SPACE, exact)
    node_group.set_input(object, inputs.DENSITY, 1.0 if exact else DENSITY_BEFORE_WHITE)
    set_up(scene, camera, (size, size), samples)
    if exact:
        scene.view_settings.view_transform = "Raw"


def set_up(scene: bpy.types.Scene, camera: bpy.types.Object, size: tuple[int, int], samples: int = 4) -> None:
    """Render a camera in Cycles over plain white, with the settings that splats need.

    Args:
        size: width and height in pixels.
        samples: per pixel; splats are free of noise, so samples only smooth the edges.
    """
    scene.camera = camera
    scene.world = plain_world(WHITE)
    scene.render.engine = "CYCLES"
    scene.cycles.device = "CPU"
    scene.cycles.samples = samples
    scene.cycles.use_adaptive_sampling = False
    scene.cycles.use_denoising = False
    scene.render.resolution_x, scene.render.resolution_y = size
    scene.render.resolution_percentage = 100
    render_settings.apply(scene)
    scene.render.image_settings.file_format = "PNG"
    scene.render.image_settings.color_mode = "RGB"


def render(scene: bpy.types.Scene, path: Path) -> None:
    """Render the scene's camera to a PNG, which appears only when it is complete.

    Raises:
        InputError: the place cannot be written.
        WorkError: Blender did not render.
    """
    with replacing(path) as temporary:
        scene.render.filepath = str(temporary.resolve())
        try:
            bpy.ops.render.render(write_still=True, scene=scene.name)
        except RuntimeError as error:
            raise WorkError(f"cannot render {path.name}: {' '.join(str(error).split())}") from error
        finally:
            scene.render.filepath = f"//{path.name}"
        if not temporary.exists():
            raise WorkError(f"cannot render {path.name}: Blender wrote no image")


def save_blend(path: Path) -> None:
    """Save a copy of the open file, which appears only when it is complete.

    Raises:
        InputError: the place cannot be written.
        WorkError: Blender did not save.
    """
    with replacing(path) as temporary:
        try:
            bpy.ops.wm.save_as_mainfile(filepath=str(temporary.resolve()), copy=True, compress=True)
        except RuntimeError as error:
            raise WorkError(f"cannot save {path.name}: {' '.join(str(error).split())}") from error
