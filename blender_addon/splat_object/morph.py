"""The node group that blends an object into another, splat by splat.

Both ends are in the object itself: its own attributes and the other's under names of their own. So it needs no other object, and what
happens to the two that it was made of does not change it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import bpy
import numpy as np

from ...generator.errors import InputError
from . import cells, inputs
from .layout import POSITION, RADIANCE, ROTATION, SCALE
from .object import from_values, read, to_values, transformed, write
from .tree import Tree, output

if TYPE_CHECKING:
    from ...generator.gaussians import Gaussians

NAME = "Gaussian Morph"
FACTOR = "Factor"
_OTHER = "morph:"  # begins the names of the other end's attributes
# Their type, the name of its values and how many a point has; a colour and not a 4-vector, which nodes cannot read before 5.2.
_ENDS = {
    POSITION: ("FLOAT_VECTOR", "vector", 3),
    SCALE: ("FLOAT_VECTOR", "vector", 3),
    ROTATION: ("QUATERNION", "value", 4),
    RADIANCE: ("FLOAT_COLOR", "color", 4),
}


def make(
    first: Gaussians, second: Gaussians, name: str, factor: float = 0.5, collection: bpy.types.Collection | None = None
) -> bpy.types.Object:
    """A splat object that is the first at factor 0 and the second at 1; both hold every cell in order.

    Raises:
        InputError: they differ in number, or a number is not finite.
    """
    if len(first) != len(second):
        raise InputError(f"objects of {len(first)} and {len(second)} splats do not correspond")
    values = to_values(second, name)
    object = write(first, name, collection)
    cells.number(object)
    attributes = object.data.attributes
    for key, (kind, _, _) in _ENDS.items():  # all are created before any is filled: creating one may move the others' storage
        attributes.new(_OTHER + key, kind, "POINT")
    for key, (_, field, _) in _ENDS.items():
        attributes[_OTHER + key].data.foreach_set(field, np.ascontiguousarray(values[key], np.float32).ravel())
    modifier = object.modifiers.new(NAME, "NODES")
    modifier.node_group = ensure()
    object.modifiers.move(len(object.modifiers) - 1, 0)  # before the modifier that shows the splats
    inputs.set_value(modifier, FACTOR, factor)
    return object


def modifier_of(object: bpy.types.Object | None) -> bpy.types.Modifier | None:
    """The modifier that morphs; None on other objects."""
    modifiers = object.modifiers if object is not None else ()
    return next((m for m in modifiers if m.type == "NODES" and m.node_group and m.node_group.name.partition(".")[0] == NAME), None)


def current(object: bpy.types.Object, world: bool = False) -> Gaussians:
    """The Gaussians of a splat object, of a morph those at its present factor; float32 on the CPU.

    Args:
        world: give them in the world frame instead of the object's own, as `read` does.

    Raises:
        InputError: the object is not a splat object.
    """
    gaussians = _at_factor(object, read(object))
    return transformed(gaussians, np.array(object.matrix_world, dtype=np.float64)) if world else gaussians


def _at_factor(object: bpy.types.Object, gaussians: Gaussians) -> Gaussians:
    modifier = modifier_of(object)
    if modifier is None or _OTHER + RADIANCE not in object.data.attributes:
        return gaussians
    from ...generator.atlas import morph

    other = {}
    for key, (_, field, width) in _ENDS.items():
        flat = np.empty(len(object.data.points) * width, np.float32)
        object.data.attributes[_OTHER + key].data.foreach_get(field, flat)
        other[key] = flat.reshape(-1, width)
    second = from_values(other)
    return morph(gaussians, second, min(1.0, max(0.0, float(inputs.get_value(modifier, FACTOR)))))


def ensure() -> bpy.types.NodeTree:
    """This file's own node group, made on first use."""
    own = (group for group in bpy.data.node_groups if group.library is None and group.name.partition(".")[0] == NAME)
    return next(own, None) or _make()


def _make() -> bpy.types.NodeTree:
    group = bpy.data.node_groups.new(NAME, "GeometryNodeTree")
    group.is_modifier = True
    interface = group.interface
    interface.new_socket("Geometry", in_out="OUTPUT", socket_type="NodeSocketGeometry")
    interface.new_socket("Geometry", in_out="INPUT", socket_type="NodeSocketGeometry")
    socket = interface.new_socket(FACTOR, in_out="INPUT", socket_type="NodeSocketFloat")
    socket.description = "0 shows the first object, 1 the second"
    socket.subtype = "FACTOR"
    socket.min_value, socket.max_value, socket.default_value = 0.0, 1.0, 0.5
    t = Tree(group)
    given = t.node("NodeGroupInput").outputs
    factor = t.math("MINIMUM", t.math("MAXIMUM", given[FACTOR], 0.0), 1.0)

    def attribute(name: str, kind: str) -> bpy.types.NodeSocket:
        return output(t.node("GeometryNodeInputNamedAttribute", {"Name": name}, data_type=kind), "Attribute")

    def pair(name: str, kind: str) -> tuple[bpy.types.NodeSocket, bpy.types.NodeSocket]:
        return attribute(name, kind), attribute(_OTHER + name, kind)

    def mixed(kind: str, first, second) -> bpy.types.NodeSocket:
        node = t.node("ShaderNodeMix", {"Factor": factor, "A": first, "B": second}, data_type=kind)
        return output(node, "Result")

    position = mixed("VECTOR", t.node("GeometryNodeInputPosition").outputs[0], attribute(_OTHER + POSITION, "FLOAT_VECTOR"))
    # a^(1-f) b^f: linear in the logarithms.
    axes = [t.node("ShaderNodeSeparateXYZ", {0: end}).outputs for end in pair(SCALE, "FLOAT_VECTOR")]
    rest = t.math("SUBTRACT", 1.0, factor)
    powers = [t.math("MULTIPLY", t.math("POWER", axes[0][i], rest), t.math("POWER", axes[1][i], factor)) for i in range(3)]
    scale = t.node("ShaderNodeCombineXYZ", dict(enumerate(powers))).outputs[0]
    rotation = mixed("ROTATION", *pair(ROTATION, "QUATERNION"))  # along the shorter arc
    colours = [t.node("FunctionNodeSeparateColor", {0: end}).outputs for end in pair(RADIANCE, "FLOAT_COLOR")]
    # By numbers: a mix of colours leaves the alpha of the first.
    parts = [mixed("FLOAT", colours[0][i], colours[1][i]) for i in range(4)]
    radiance = t.node("FunctionNodeCombineColor", dict(enumerate(parts))).outputs[0]

    points = t.node("GeometryNodeSetPosition", {"Geometry": given["Geometry"], "Position": position}).outputs[0]
    for name, kind, value in ((SCALE, "FLOAT_VECTOR", scale), (ROTATION, "QUATERNION", rotation), (RADIANCE, "FLOAT_COLOR", radiance)):
        stored = {"Geometry": points, "Name": name, "Value": value}
        points = t.node("GeometryNodeStoreNamedAttribute", stored, data_type=kind, domain="POINT").outputs["Geometry"]
    t.node("NodeGroupOutput", {0: points})
    t.arrange()
    return group
