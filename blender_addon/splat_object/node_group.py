"""The geometry node group that shows a splat point cloud before Blender 5.3: one ellipsoid instance a splat."""

from __future__ import annotations

import bpy

from . import material
from .layout import RADIANCE, ROTATION, SCALE, SH_C0
from .tree import Tree, output

NAME = "Gaussian Splats"
MODIFIER = "Gaussian Splats"
BLEND_IN_DISPLAY_SPACE = "Blend in Display Space"
SPLAT_SIZE = "Splat Size"

# A flat splat's frame must stay invertible in single precision: its thinnest axis is at least this share of its widest.
_THINNEST = 1e-3
# Distance from the centre to the nearest face of the unit icosphere with 80 faces (Blender's "subdivisions 2").
_INSCRIBED = 0.9341723


def ensure() -> bpy.types.NodeTree:
    """The node group of this file, made on first use."""
    group = bpy.data.node_groups.get(NAME)
    return group if group is not None else _make()


def attach(object: bpy.types.Object) -> bpy.types.Modifier:
    """Show a splat point cloud through the node group; the object's modifier is made once."""
    modifier = modifier_of(object) or object.modifiers.new(MODIFIER, "NODES")
    modifier.node_group = ensure()
    return modifier


def modifier_of(object: bpy.types.Object) -> bpy.types.Modifier | None:
    """The modifier that shows the splats; None on native splats and on other objects."""
    return next((m for m in object.modifiers if m.type == "NODES" and m.node_group and m.node_group.name == NAME), None)


def input_key(name: str) -> str:
    """The modifier's key of one of the group's inputs."""
    return next(item.identifier for item in ensure().interface.items_tree if item.name == name and item.in_out == "INPUT")


def set_input(object: bpy.types.Object, name: str, value: bool | float) -> None:
    """Set one of the group's inputs on an object's modifier."""
    modifier = modifier_of(object)
    modifier[input_key(name)] = value
    object.update_tag()


def _make() -> bpy.types.NodeTree:
    group = bpy.data.node_groups.new(NAME, "GeometryNodeTree")
    group.is_modifier = True
    interface = group.interface
    interface.new_socket("Geometry", in_out="INPUT", socket_type="NodeSocketGeometry")
    interface.new_socket("Geometry", in_out="OUTPUT", socket_type="NodeSocketGeometry")
    display = interface.new_socket(BLEND_IN_DISPLAY_SPACE, in_out="INPUT", socket_type="NodeSocketBool")
    display.description = "Emit display values: exact blending under the Raw view transform. Off: linear values for the Standard view"
    size = interface.new_socket(SPLAT_SIZE, in_out="INPUT", socket_type="NodeSocketFloat")
    size.description = "Factor on every splat's standard deviations"
    size.default_value, size.min_value, size.max_value = 1.0, 0.0, 10.0

    t = Tree(group)
    given = t.node("NodeGroupInput")
    scale = output(t.node("GeometryNodeInputNamedAttribute", {"Name": SCALE}, data_type="FLOAT_VECTOR"), "Attribute")
    rotation = output(t.node("GeometryNodeInputNamedAttribute", {"Name": ROTATION}, data_type="QUATERNION"), "Attribute")
    radiance = output(t.node("GeometryNodeInputNamedAttribute", {"Name": RADIANCE}, data_type="FLOAT_COLOR"), "Attribute")
    channels = t.node("FunctionNodeSeparateColor", {0: radiance})
    opacity = channels.outputs["Alpha"]

    # The surface is where alpha falls to 1/255: k = sqrt(2 ln(255 o)) standard deviations.
    reach = t.math("SQRT", t.math("MULTIPLY", t.math("LOGARITHM", t.math("DIVIDE", opacity, material.ALPHA_MIN), 2.718281828459045), 2.0))
    widest = t.math("MULTIPLY", _largest(t, scale), _THINNEST)
    floor = t.node("ShaderNodeCombineXYZ", {0: widest, 1: widest, 2: widest}).outputs[0]
    radii = t.vector("SCALE", t.vector("MAXIMUM", scale, floor), t.math("MULTIPLY", reach, given.outputs[SPLAT_SIZE]))

    colors = [t.math("MAXIMUM", t.math("MULTIPLY_ADD", channels.outputs[c], SH_C0, 0.5), 0.0) for c in ("Red", "Green", "Blue")]
    shown = t.node("FunctionNodeCombineColor", {c: v for c, v in zip(("Red", "Green", "Blue"), colors, strict=True)}).outputs[0]
    linear = t.node("FunctionNodeCombineColor", {c: _srgb_to_linear(t, v) for c, v in zip(("Red", "Green", "Blue"), colors, strict=True)})
    emission = output(
        t.node(
            "GeometryNodeSwitch",
            {"Switch": given.outputs[BLEND_IN_DISPLAY_SPACE], "False": linear.outputs[0], "True": shown},
            input_type="RGBA",
        ),
        "Output",
    )
    points = t.node(
        "GeometryNodeStoreNamedAttribute",
        {"Geometry": given.outputs["Geometry"], "Name": material.EMISSION, "Value": emission},
        data_type="FLOAT_COLOR",
        domain="POINT",
    ).outputs["Geometry"]

    sphere = t.node("GeometryNodeMeshIcoSphere", {"Radius": 1 / _INSCRIBED, "Subdivisions": 2}).outputs["Mesh"]
    sphere = t.node("GeometryNodeSetMaterial", {"Geometry": sphere, "Material": material.ensure()}).outputs["Geometry"]
    instances = t.node(
        "GeometryNodeInstanceOnPoints",
        {
            "Points": points,
            "Selection": t.math("GREATER_THAN", opacity, material.ALPHA_MIN),
            "Instance": sphere,
            "Rotation": rotation,
            "Scale": radii,
        },
    ).outputs["Instances"]
    t.node("NodeGroupOutput", {0: instances})
    t.arrange()
    return group


def _largest(t: Tree, vector: bpy.types.NodeSocket) -> bpy.types.NodeSocket:
    x, y, z = t.node("ShaderNodeSeparateXYZ", {0: vector}).outputs
    return t.math("MAXIMUM", t.math("MAXIMUM", x, y), z)


def _srgb_to_linear(t: Tree, value: bpy.types.NodeSocket) -> bpy.types.NodeSocket:
    """The sRGB transfer function of IEC 61966-2-1, decoding."""
    power = t.math("POWER", t.math("DIVIDE", t.math("ADD", value, 0.055), 1.055), 2.4)
    low = t.math("LESS_THAN", value, 0.04045)
    return t.math("ADD", t.math("MULTIPLY", t.math("SUBTRACT", 1.0, low), power), t.math("MULTIPLY", low, t.math("DIVIDE", value, 12.92)))
