"""The geometry node group that shows a splat point cloud before Blender 5.3.

In the viewport, and wherever "Face Camera" is off, every splat is an ellipsoid instance: right from any direction, and
in reflections. In renders every splat is a square in the plane of its centre that faces the active camera, stretched as
EWA splatting projects it (Zwicker et al. 2001): Cycles then meets the splats in the order of their centres, which is
how splats are fitted and which overlapping ellipsoids cannot give.
"""

from __future__ import annotations

import bpy

from . import material
from .layout import RADIANCE, ROTATION, SCALE, SH_C0
from .tree import Tree, output

NAME = "Gaussian Splats"
FACE_CAMERA = "Face Camera in Renders"
BLEND_IN_DISPLAY_SPACE = "Blend in Display Space"
SPLAT_SIZE = "Splat Size"
SMOOTHING = "Smoothing"

# Standard deviation in pixels of the low-pass filter that splat renderers add to each splat (variance 0.3).
LOW_PASS_PIXELS = 0.3**0.5
# A flat splat's frame must stay invertible in single precision: its thinnest axis is at least this share of its widest.
_THINNEST = 1e-3
# Distance from the centre to the nearest face of the unit icosphere with 80 faces (Blender's "subdivisions 2").
_INSCRIBED = 0.9341723
# Splats nearer than this to the camera are left out, and no splat is projected as if further off-axis than this tangent.
_NEAR, _OFF_AXIS = 0.01, 1.5


def attach(object: bpy.types.Object) -> bpy.types.Modifier:
    """Show a splat point cloud through the node group; the object's modifier is made once."""
    modifier = modifier_of(object) or object.modifiers.new(NAME, "NODES")
    modifier.node_group = ensure()
    return modifier


def ensure() -> bpy.types.NodeTree:
    """The node group of this file, made on first use."""
    group = bpy.data.node_groups.get(NAME)
    return group if group is not None else _make()


def modifier_of(object: bpy.types.Object) -> bpy.types.Modifier | None:
    """The modifier that shows the splats; None on native splats and on other objects."""
    return next((m for m in object.modifiers if m.type == "NODES" and m.node_group and m.node_group.name == NAME), None)


def input_property(modifier: bpy.types.Modifier, name: str) -> tuple[bpy.types.bpy_struct, str]:
    """Where a modifier keeps one of the group's inputs: the owner and the property, for drawing, keyframes and drivers.

    From Blender 5.2 an input is a property of its own; before, it is a custom property of the modifier.
    """
    key = next(item.identifier for item in modifier.node_group.interface.items_tree if item.name == name and item.in_out == "INPUT")
    if hasattr(modifier, "properties"):
        return getattr(modifier.properties.inputs, key), "value"
    return modifier, f'["{key}"]'


def set_input(object: bpy.types.Object, name: str, value: bool | float) -> None:
    """Set one of the group's inputs on an object's modifier; nothing on native splats, which have no modifier."""
    modifier = modifier_of(object)
    if modifier:
        owner, place = input_property(modifier, name)
        if place == "value":
            owner.value = value
        else:
            owner[place[2:-2]] = value
        object.update_tag()


def _make() -> bpy.types.NodeTree:
    group = bpy.data.node_groups.new(NAME, "GeometryNodeTree")
    group.is_modifier = True
    _interface(group)
    t = Tree(group)
    given = t.node("NodeGroupInput").outputs
    radiance = t.node("FunctionNodeSeparateColor", {0: _attribute(t, RADIANCE, "FLOAT_COLOR")}).outputs
    points = t.node(
        "GeometryNodeStoreNamedAttribute",
        {"Geometry": given["Geometry"], "Name": material.EMISSION, "Value": _emission(t, radiance, given[BLEND_IN_DISPLAY_SPACE])},
        data_type="FLOAT_COLOR",
        domain="POINT",
    ).outputs["Geometry"]
    # A splat ends where its alpha falls to 1/255, at k = sqrt(2 ln(255 o)) standard deviations.
    opacity = radiance["Alpha"]
    logarithm = t.math("LOGARITHM", t.math("DIVIDE", opacity, material.ALPHA_MIN), 2.718281828459045)
    reach = t.math("SQRT", t.math("MULTIPLY", t.math("MAXIMUM", logarithm, 0.0), 2.0))
    visible = t.math("GREATER_THAN", opacity, material.ALPHA_MIN)
    scale = t.vector("SCALE", _attribute(t, SCALE, "FLOAT_VECTOR"), given[SPLAT_SIZE])
    rotation = _attribute(t, ROTATION, "QUATERNION")

    ellipsoids = _ellipsoids(t, points, visible, scale, rotation, reach)
    squares = _squares(t, points, visible, scale, rotation, reach, given[SMOOTHING])
    in_render = t.node("FunctionNodeBooleanMath", {0: t.node("GeometryNodeIsViewport").outputs[0]}, operation="NOT").outputs[0]
    use_squares = t.node("FunctionNodeBooleanMath", {0: in_render, 1: given[FACE_CAMERA]}, operation="AND").outputs[0]
    shown = t.node("GeometryNodeSwitch", {"Switch": use_squares, "False": ellipsoids, "True": squares}, input_type="GEOMETRY")
    t.node("NodeGroupOutput", {0: output(shown, "Output")})
    t.arrange()
    return group


def _interface(group: bpy.types.NodeTree) -> None:
    def socket(name: str, kind: str, description: str, **values: bool | float) -> None:
        item = group.interface.new_socket(name, in_out="INPUT", socket_type=kind)
        item.description = description
        for key, value in values.items():
            setattr(item, key, value)

    group.interface.new_socket("Geometry", in_out="OUTPUT", socket_type="NodeSocketGeometry")
    group.interface.new_socket("Geometry", in_out="INPUT", socket_type="NodeSocketGeometry")
    socket(SPLAT_SIZE, "NodeSocketFloat", "Factor on every splat's standard deviations", default_value=1.0, min_value=0.0, max_value=10.0)
    socket(
        FACE_CAMERA,
        "NodeSocketBool",
        "Render squares that face the active camera: exact order, and faster. Off for panoramic or orthographic cameras, mirrors and glass",
        default_value=True,
    )
    socket(
        SMOOTHING,
        "NodeSocketFloat",
        "Standard deviation added to splats that face the camera, per unit of distance. Splat renderers add 0.55 pixels",
        default_value=0.0,
        min_value=0.0,
        max_value=0.1,
    )
    socket(
        BLEND_IN_DISPLAY_SPACE,
        "NodeSocketBool",
        "Emit display values, which blend as splats were fitted under the Raw view. Off: scene-linear values, for the Standard view",
        default_value=False,
    )


def _attribute(t: Tree, name: str, kind: str) -> bpy.types.NodeSocket:
    return output(t.node("GeometryNodeInputNamedAttribute", {"Name": name}, data_type=kind), "Attribute")


def _emission(t: Tree, radiance: bpy.types.NodeOutputs, display: bpy.types.NodeSocket) -> bpy.types.NodeSocket:
    """What a splat emits: its display colour 0.5 + C0 f as it is, or decoded to scene-linear."""
    names = ("Red", "Green", "Blue")
    values = [t.math("MAXIMUM", t.math("MULTIPLY_ADD", radiance[name], SH_C0, 0.5), 0.0) for name in names]
    linear = [_srgb_to_linear(t, value) for value in values]
    as_shown, as_linear = (
        t.node("FunctionNodeCombineColor", dict(zip(names, three, strict=True))).outputs[0] for three in (values, linear)
    )
    return output(t.node("GeometryNodeSwitch", {"Switch": display, "False": as_linear, "True": as_shown}, input_type="RGBA"), "Output")


def _srgb_to_linear(t: Tree, value: bpy.types.NodeSocket) -> bpy.types.NodeSocket:
    """The sRGB transfer function of IEC 61966-2-1, decoding."""
    power = t.math("POWER", t.math("DIVIDE", t.math("ADD", value, 0.055), 1.055), 2.4)
    low = t.math("LESS_THAN", value, 0.04045)
    return t.math("ADD", t.math("MULTIPLY", t.math("SUBTRACT", 1.0, low), power), t.math("MULTIPLY", low, t.math("DIVIDE", value, 12.92)))


def _ellipsoids(t: Tree, points, visible, scale, rotation, reach) -> bpy.types.NodeSocket:
    """Icospheres that contain each splat's ellipsoid."""
    x, y, z = t.node("ShaderNodeSeparateXYZ", {0: scale}).outputs
    floor = t.math("MULTIPLY", t.math("MAXIMUM", t.math("MAXIMUM", x, y), z), _THINNEST)
    floors = t.node("ShaderNodeCombineXYZ", {0: floor, 1: floor, 2: floor}).outputs[0]
    radii = t.vector("SCALE", t.vector("MAXIMUM", scale, floors), reach)
    sphere = t.node("GeometryNodeMeshIcoSphere", {"Radius": 1 / _INSCRIBED, "Subdivisions": 2}).outputs["Mesh"]
    sphere = t.node("GeometryNodeSetMaterial", {"Geometry": sphere, "Material": material.ellipsoid()}).outputs["Geometry"]
    return t.node(
        "GeometryNodeInstanceOnPoints", {"Points": points, "Selection": visible, "Instance": sphere, "Rotation": rotation, "Scale": radii}
    ).outputs["Instances"]


def _squares(t: Tree, points, visible, scale, rotation, reach, smoothing) -> bpy.types.NodeSocket:
    """Squares that contain each splat's projection, in the plane of its centre and facing the active camera.

    In camera space (X right, Y up, looking along -Z, depth d = -z) a half axis a of the ellipsoid is seen at
    (a_x + (x/d) a_z, a_y + (y/d) a_z) in that plane: the EWA Jacobian times d / focal length. The sum of the outer
    products, plus the smoothing, is the splat's 2D covariance; its eigenvectors are the square's sides.
    """
    camera = t.node("GeometryNodeObjectInfo", {"Object": t.node("GeometryNodeInputActiveCamera").outputs[0]}, transform_space="RELATIVE")
    to_object = camera.outputs["Transform"]
    to_camera = t.node("FunctionNodeInvertMatrix", {0: to_object}).outputs[0]
    centre = t.node("FunctionNodeTransformPoint", {0: t.node("GeometryNodeInputPosition").outputs[0], 1: to_camera}).outputs[0]
    x, y, z = t.node("ShaderNodeSeparateXYZ", {0: centre}).outputs
    depth = t.math("MAXIMUM", t.math("MULTIPLY", z, -1.0), _NEAR)
    slopes = [t.math("MAXIMUM", t.math("MINIMUM", t.math("DIVIDE", v, depth), _OFF_AXIS), -_OFF_AXIS) for v in (x, y)]

    blur = t.math("MULTIPLY", depth, smoothing)
    variance = t.math("MULTIPLY", blur, blur)
    xx, xy, yy = variance, 0.0, variance
    for axis, length in enumerate(t.node("ShaderNodeSeparateXYZ", {0: scale}).outputs):
        along = t.node("ShaderNodeCombineXYZ", {axis: length}).outputs[0]
        turned = t.node("FunctionNodeRotateVector", {0: along, 1: rotation}).outputs[0]
        seen = t.node("FunctionNodeTransformDirection", {0: turned, 1: to_camera}).outputs[0]
        a, b, c = t.node("ShaderNodeSeparateXYZ", {0: seen}).outputs
        u, v = t.math("MULTIPLY_ADD", slopes[0], c, a), t.math("MULTIPLY_ADD", slopes[1], c, b)
        xx, xy, yy = t.math("MULTIPLY_ADD", u, u, xx), t.math("MULTIPLY_ADD", u, v, xy), t.math("MULTIPLY_ADD", v, v, yy)

    middle = t.math("MULTIPLY", t.math("ADD", xx, yy), 0.5)
    half = t.math("MULTIPLY", t.math("SUBTRACT", xx, yy), 0.5)
    radius = t.math("SQRT", t.math("ADD", t.math("MULTIPLY", half, half), t.math("MULTIPLY", xy, xy)))
    angle = t.math("MULTIPLY", t.math("ARCTAN2", xy, half), 0.5)
    major = t.math("SQRT", t.math("ADD", middle, radius))
    minor = t.math(
        "MAXIMUM", t.math("SQRT", t.math("MAXIMUM", t.math("SUBTRACT", middle, radius), 0.0)), t.math("MULTIPLY", major, _THINNEST)
    )
    turn = t.node("FunctionNodeEulerToRotation", {0: t.node("ShaderNodeCombineXYZ", {2: angle}).outputs[0]}).outputs[0]
    sides = t.node("ShaderNodeCombineXYZ", {0: t.math("MULTIPLY", major, reach), 1: t.math("MULTIPLY", minor, reach), 2: major}).outputs[0]
    place = t.node("FunctionNodeCombineTransform", {0: centre, 1: turn, 2: sides}).outputs[0]
    place = t.node("FunctionNodeMatrixMultiply", {0: to_object, 1: place}).outputs[0]

    square = t.node("GeometryNodeMeshGrid", {"Size X": 2.0, "Size Y": 2.0, "Vertices X": 2, "Vertices Y": 2}).outputs["Mesh"]
    square = t.node("GeometryNodeSetMaterial", {"Geometry": square, "Material": material.facing()}).outputs["Geometry"]
    before = t.math("GREATER_THAN", t.math("MULTIPLY", z, -1.0), _NEAR)
    instances = t.node(
        "GeometryNodeInstanceOnPoints", {"Points": points, "Selection": t.math("MULTIPLY", visible, before), "Instance": square}
    ).outputs["Instances"]
    return t.node("GeometryNodeSetInstanceTransform", {"Instances": instances, "Transform": place}).outputs[0]
