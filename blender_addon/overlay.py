"""The objects that are being made, drawn over the 3D views.

They are drawn and not made: there is no data-block, so nothing of them can be saved, undone, rendered or left behind, and
nothing is evaluated, so the window stays as free as before. Their colours show in every shading mode.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import bpy
import numpy as np

if TYPE_CHECKING:
    import gpu

    from .generation import Preview

log = logging.getLogger(__name__)

# How many standard deviations of a Gaussian are drawn.
_EXTENT = 2.5

_shown: dict[int, tuple[Preview, tuple[float, float, float]]] = {}
_scene = ""
_handler: object | None = None

_VERTEX = """
void main() {
  gl_Position = view_projection * vec4(position, 1.0);
  gl_PointSize = max(2.0, 2.0 * extent * radius * pixels / gl_Position.w);
  // What a handler after the view draws is taken for linear light.
  vec3 linear_rgb = mix(color.rgb / 12.92, pow((color.rgb + 0.055) / 1.055, vec3(2.4)), step(0.04045, color.rgb));
  shade = vec4(linear_rgb, color.a);
}
"""
_FRAGMENT = """
void main() {
  vec2 from_centre = (gl_PointCoord - 0.5) * 2.0 * extent;
  float falloff = exp(-0.5 * dot(from_centre, from_centre));
  if (length(from_centre) > extent) { discard; }
  result = vec4(shade.rgb, shade.a * falloff);
}
"""


def show(scene: bpy.types.Scene, preview: Preview, location: Sequence[float]) -> None:
    """Draw an object of the run at a location (Blender units) in the 3D views of a scene, instead of how it looked before."""
    global _handler, _scene
    _scene = scene.name_full
    x, y, z = location
    _shown[preview.index] = (preview, (x, y, z))
    if _handler is None:
        _handler = bpy.types.SpaceView3D.draw_handler_add(_draw, (), "WINDOW", "POST_VIEW")


def clear() -> None:
    """Draw nothing any more."""
    global _handler
    _shown.clear()
    if _handler is not None:
        bpy.types.SpaceView3D.draw_handler_remove(_handler, "WINDOW")
    _handler = None


def shown() -> dict[int, tuple[Preview, tuple[float, float, float]]]:
    """What is drawn: by its place in the run, each object as it looks and its location."""
    return dict(_shown)


def sorted_points(view: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every point that is drawn, the farthest first: positions [N, 3] in the world, colours [N, 4], radii [N].

    Args:
        view: matrix [4, 4] from the world to the camera, which looks along -Z.
    """
    items = list(_shown.values())
    positions = np.concatenate([preview.positions + np.asarray(location, np.float32) for preview, location in items])
    colors = np.concatenate([preview.colors for preview, _ in items])
    radii = np.concatenate([preview.radii for preview, _ in items])
    order = np.argsort(positions @ view[2, :3].astype(np.float32))
    return positions[order], colors[order], radii[order]


def _draw() -> None:
    """Blender calls this at every redraw of a 3D view; a graphics driver that cannot do it is told of once."""
    if not _shown or bpy.context.scene.name_full != _scene:
        return
    try:
        _draw_points(bpy.context)
    except Exception:
        log.exception("the objects that are being made cannot be drawn here")
        clear()


def _draw_points(context: bpy.types.Context) -> None:
    import gpu

    region = context.region_data
    positions, colors, radii = sorted_points(np.array(region.view_matrix))
    points = gpu.types.GPUVertBuf(_format(), len(positions))
    points.attr_fill("position", np.ascontiguousarray(positions, np.float32))
    points.attr_fill("color", np.ascontiguousarray(colors, np.float32))
    points.attr_fill("radius", np.ascontiguousarray(radii[:, None], np.float32))
    shader = _shader()
    shader.bind()
    shader.uniform_float("view_projection", region.perspective_matrix)
    # Pixels that a length of 1 takes at the distance of 1.
    shader.uniform_float("pixels", region.window_matrix[1][1] * context.region.height / 2)
    shader.uniform_float("extent", _EXTENT)
    gpu.state.program_point_size_set(True)
    gpu.state.depth_test_set("LESS_EQUAL")
    gpu.state.blend_set("ALPHA")
    gpu.types.GPUBatch(type="POINTS", buf=points).draw(shader)
    gpu.state.blend_set("NONE")
    gpu.state.depth_test_set("NONE")
    gpu.state.program_point_size_set(False)


@cache
def _format() -> gpu.types.GPUVertFormat:
    import gpu

    layout = gpu.types.GPUVertFormat()
    for name, width in (("position", 3), ("color", 4), ("radius", 1)):
        layout.attr_add(id=name, comp_type="F32", len=width, fetch_mode="FLOAT")
    return layout


@cache
def _shader() -> gpu.types.GPUShader:
    import gpu

    varying = gpu.types.GPUStageInterfaceInfo("gaussian_atlas_overlay")
    varying.smooth("VEC4", "shade")
    info = gpu.types.GPUShaderCreateInfo()
    for index, (kind, name) in enumerate((("VEC3", "position"), ("VEC4", "color"), ("FLOAT", "radius"))):
        info.vertex_in(index, kind, name)
    for kind, name in (("MAT4", "view_projection"), ("FLOAT", "pixels"), ("FLOAT", "extent")):
        info.push_constant(kind, name)
    info.vertex_out(varying)
    info.fragment_out(0, "VEC4", "result")
    info.vertex_source(_VERTEX)
    info.fragment_source(_FRAGMENT)
    return gpu.shader.create_from_info(info)
