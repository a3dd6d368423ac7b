"""Which cell of its atlas each splat of a generated object is, and which splats a person means."""

from __future__ import annotations

import bpy
import numpy as np

from ...generator.errors import InputError
from . import layout

# Counted from 1, because Blender fills the attribute with 0 where splats without it come in: 0 is no cell.
CELL = "atlas_cell"
# Edit Mode's own attribute; where it is missing everything is selected.
_SELECTION = ".selection"


def number(object: bpy.types.Object, cells: np.ndarray | None = None) -> None:
    """Remember the cell of each splat, counted from 0 and -1 for none; by default splat i is cell i."""
    cloud = object.data
    cells = np.arange(len(cloud.points)) if cells is None else cells
    stored = cloud.attributes.get(CELL) or cloud.attributes.new(CELL, "INT", "POINT")
    stored.data.foreach_set("value", (cells + 1).astype(np.int32))
    cloud.update_tag()


def stored(object: bpy.types.Object | None) -> np.ndarray | None:
    """The cell of each splat [N] int64, -1 for none; None where the object has no cells."""
    if object is None or object.type != "POINTCLOUD":
        return None
    attribute = object.data.attributes.get(CELL)
    if attribute is None or attribute.data_type != "INT" or attribute.domain != "POINT":
        return None
    values = np.empty(len(object.data.points), np.int32)
    attribute.data.foreach_get("value", values)
    return values.astype(np.int64) - 1


def selected(object: bpy.types.Object) -> np.ndarray:
    """Mask [N] of the splats that are selected in the object's Edit Mode, or were when it was left; none where it never was in it."""
    count = len(object.data.points)
    attribute = object.data.attributes.get(_SELECTION)
    if attribute is None:
        return np.full(count, object.mode == "EDIT")
    kind = np.float32 if attribute.data_type == "FLOAT" else bool
    values = np.empty(count, kind)
    attribute.data.foreach_get("value", values)
    mask = values > 0
    # Blender 5.2 makes point clouds with everything selected: outside Edit Mode that is nobody's choice.
    return mask if object.mode == "EDIT" or not mask.all() else np.zeros(count, bool)


def inside(object: bpy.types.Object, volume: bpy.types.Object) -> np.ndarray:
    """Mask [N] of the splats whose centres are in the box of another object: its bounding box along its own axes, or of an empty the
    cube that its display size gives.

    Raises:
        InputError: the other object is flat or scaled to nothing.
    """
    positions = layout.extract(object.data)[layout.POSITION].astype(np.float64)
    if volume.type == "EMPTY":
        low, high = np.full(3, -volume.empty_display_size), np.full(3, volume.empty_display_size)
    else:
        corners = np.array(volume.bound_box)
        low, high = corners.min(0), corners.max(0)
    matrix = np.array(volume.matrix_world, dtype=np.float64)
    if abs(np.linalg.det(matrix[:3, :3])) < 1e-12 or (high - low <= 0).any():
        raise InputError(f"{volume.name!r} encloses nothing: it is flat or scaled to nothing")
    to_volume = np.linalg.inv(matrix) @ np.array(object.matrix_world, dtype=np.float64)
    local = positions @ to_volume[:3, :3].T + to_volume[:3, 3]
    return ((local >= low) & (local <= high)).all(1)
