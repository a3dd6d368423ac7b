"""The attribute layout of a splat object: the one table that reading, writing, nodes and shader share.

The names are those of Blender 5.3's native splats on every version, so that a file keeps its meaning when it is
opened in a newer Blender.
"""

from __future__ import annotations

from dataclasses import dataclass

import bpy
import numpy as np

from ...generator.errors import InputError

# Y_0^0, the spherical harmonic of degree 0: colour = 0.5 + SH_C0 * coefficient (Kerbl et al. 2023).
SH_C0 = 0.28209479177387814
POSITION, SCALE, ROTATION, RADIANCE = "position", "scale", "rotation", "radiance:base"


@dataclass(frozen=True)
class Attribute:
    """One POINT attribute of a splat object."""

    name: str
    type: str  # Attribute.data_type
    width: int  # numbers a point
    meaning: str


def native() -> bool:
    """Whether this Blender draws splats itself (5.3 and later)."""
    kind = bpy.types.PointCloud.bl_rna.properties.get("type")
    return kind is not None and "GAUSSIAN_SPLAT" in kind.enum_items


def radiance_type(native: bool) -> str:
    """Radiance is a plain 4-vector for native splats; elsewhere a colour, which the nodes of every version can read."""
    return "FLOAT4" if native else "FLOAT_COLOR"


def attributes() -> tuple[Attribute, ...]:
    """The layout in this Blender."""
    radiance = radiance_type(native())
    return (
        Attribute(POSITION, "FLOAT_VECTOR", 3, "mean, object frame"),
        Attribute(SCALE, "FLOAT_VECTOR", 3, "standard deviations along the Gaussian's axes, linear"),
        Attribute(ROTATION, "QUATERNION", 4, "unit quaternion (w, x, y, z), Gaussian axes to object frame"),
        Attribute(RADIANCE, radiance, 4, "rgb: spherical-harmonics coefficients of degree 0; w: opacity 0..1"),
    )


def fill(cloud: bpy.types.PointCloud, values: dict[str, np.ndarray]) -> None:
    """Write every attribute; values[name] is float32 [N, width].

    All are created before any is filled: creating one may move the others' storage.
    """
    table = attributes()
    for attribute in table:
        if attribute.name not in cloud.attributes:
            cloud.attributes.new(attribute.name, attribute.type, "POINT")
    for attribute in table:
        stored = cloud.attributes[attribute.name]
        flat = np.ascontiguousarray(values[attribute.name], dtype=np.float32).ravel()
        stored.data.foreach_set(_field(stored, attribute.width), flat)
    cloud.update_tag()


def convert(cloud: bpy.types.PointCloud, native: bool) -> bool:
    """Give a splat point cloud the attribute types of native or of other splats. Returns whether there was anything to do."""
    kind = radiance_type(native)
    stored = cloud.attributes[RADIANCE]
    changed = stored.data_type != kind and len(stored.data) > 0
    if changed:
        flat = np.empty(4 * len(stored.data), np.float32)
        stored.data.foreach_get(_field(stored, 4), flat)
        cloud.attributes.remove(stored)
        stored = cloud.attributes.new(RADIANCE, kind, "POINT")
        stored.data.foreach_set(_field(stored, 4), flat)
    if native:
        changed |= make_native(cloud)
    cloud.update_tag()
    return changed


def make_native(cloud: bpy.types.PointCloud) -> bool:
    """Have Blender 5.3 and later draw a point cloud as splats. Returns whether it did not before."""
    changed = cloud.type != "GAUSSIAN_SPLAT"
    cloud.type = "GAUSSIAN_SPLAT"
    return changed


def extract(cloud: bpy.types.PointCloud) -> dict[str, np.ndarray]:
    """Every attribute as float32 [N, width].

    Raises:
        InputError: the point cloud is empty, lacks an attribute of the layout or has it in another shape.
    """
    count = len(cloud.points)
    if count == 0:
        raise InputError(f"point cloud {cloud.name!r} is empty: there are no splats in it")
    values = {}
    for attribute in attributes():
        stored = cloud.attributes.get(attribute.name)
        if stored is None or stored.domain != "POINT":
            raise InputError(f"point cloud {cloud.name!r} has no point attribute {attribute.name!r}: it is not a splat object")
        field = _field(stored, attribute.width)
        if field is None:
            raise InputError(f"attribute {attribute.name!r} of point cloud {cloud.name!r} is {stored.data_type}, not {attribute.type}")
        flat = np.empty(count * attribute.width, np.float32)
        stored.data.foreach_get(field, flat)
        values[attribute.name] = flat.reshape(count, attribute.width)
    return values


def _field(stored: bpy.types.Attribute, width: int) -> str | None:
    """The name under which an attribute's values are reached ("vector", "color", "value"); None where none has this width.

    Found by width, not by type: a file of another Blender may hold radiance as its other type with the same numbers.
    """
    if len(stored.data) == 0:
        return None
    properties = stored.data[0].bl_rna.properties
    return next((p.identifier for p in properties if p.type == "FLOAT" and getattr(p, "array_length", 0) == width), None)


def is_splats(object: bpy.types.Object | None) -> bool:
    """Whether an object carries the layout."""
    if object is None or object.type != "POINTCLOUD":
        return False
    return all(attribute.name in object.data.attributes for attribute in attributes())
