"""The geometry node group that shows a splat point cloud before Blender 5.3.

Three displays, chosen for the viewport and for renders:

* Ellipsoids: every splat is an instance, right from any direction and in reflections.
* Camera quads: every splat is a square in the plane of its centre that faces the active camera, stretched as EWA
  splatting projects it (Zwicker et al. 2001): Cycles then meets the splats in the order of their centres, which is how
  splats are fitted and which overlapping ellipsoids cannot give.
* Points: Blender's own spheres, one a splat, opaque: no instances, so millions can be shown.

Where Blender draws splats itself the group only leaves out, widens and tints.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import bpy

from . import inputs, layout, material
from .layout import RADIANCE, ROTATION, SCALE, SH_C0
from .tree import Tree, output

NAME = "Gaussian Splats"
# Of the nodes and inputs. Raise it with every change to them: `upgrade` then rebuilds what older files hold.
VERSION = 2
_VERSION = "gaussian_splats_version"
_NATIVE = "gaussian_splats_native"  # set where Blender draws the splats itself

# Standard deviation in pixels of the low-pass filter that splat renderers add to each splat (variance 0.3).
LOW_PASS_PIXELS = 0.3**0.5
# A flat splat's frame must stay invertible in single precision: its thinnest axis is at least this share of its widest.
_THINNEST = 1e-3
# Distance from the centre to the nearest face of the unit icosphere with 80 faces (Blender's "subdivisions 2").
_INSCRIBED = 0.9341723
# Splats nearer than this to the camera are left out, and no splat is projected as if further off-axis than this tangent.
_NEAR, _OFF_AXIS = 0.01, 1.5
# Splats that stand for others are widened up to ten times.
_LEAST_KEPT = 0.01
_RGB = ("Red", "Green", "Blue")


def attach(object: bpy.types.Object, native: bool | None = None) -> bpy.types.Modifier:
    """The modifier of a splat object, with this file's node group; made where there is none."""
    modifier = modifier_of(object)
    if modifier is None:
        modifier = object.modifiers.new(NAME, "NODES")
        modifier.node_group = ensure(native)
    return modifier


def ensure(native: bool | None = None) -> bpy.types.NodeTree:
    """This file's own node group of this version, made on first use. Older ones are `upgrade`'s to rebuild, with their values."""
    native = layout.native() if native is None else native
    own = (group for group in bpy.data.node_groups if group.library is None and version(group))
    group = next((group for group in own if not outdated(group, native)), None)
    if group is None:
        group = bpy.data.node_groups.new(NAME, "GeometryNodeTree")
        build(group, native)
    return group


def version(group: bpy.types.NodeTree | None) -> int:
    """The version of a group that shows splats; 0 for any other group."""
    if group is None or group.bl_idname != "GeometryNodeTree":
        return 0
    if _VERSION in group:
        return group[_VERSION] if isinstance(group[_VERSION], int) else 0
    # The first version had no number: its name and one of its inputs tell. A second one in a file ends in .001.
    is_first = group.name.partition(".")[0] == NAME and any(item.name == inputs.SPLAT_SIZE for item in group.interface.items_tree)
    return 1 if is_first else 0


def outdated(group: bpy.types.NodeTree, native: bool) -> bool:
    """Whether a group that shows splats is of an older version, or made for the other way of drawing."""
    return version(group) < VERSION or bool(group.get(_NATIVE)) != native


def modifier_of(object: bpy.types.Object) -> bpy.types.Modifier | None:
    """The modifier that shows the splats; None on other objects."""
    return next((m for m in object.modifiers if m.type == "NODES" and version(m.node_group)), None)


def set_input(object: bpy.types.Object, name: str, value: bool | float | str | bpy.types.Object) -> None:
    """Set one of the group's inputs on an object's modifier; nothing where the object or this Blender has no such input."""
    modifier = modifier_of(object)
    if modifier and name in inputs.names(modifier):
        inputs.set_value(modifier, name, value)


def build(group: bpy.types.NodeTree, native: bool) -> None:
    """Fill a group with this version's nodes; inputs that it has already keep their identifiers."""
    group.is_modifier = True
    group.nodes.clear()
    table = tuple(entry for entry in inputs.TABLE if not (native and entry.drawn_only))
    inputs.shape(group, table)
    t = Tree(group)
    given = t.node("NodeGroupInput").outputs
    radiance = t.node("FunctionNodeSeparateColor", {0: _attribute(t, RADIANCE, "FLOAT_COLOR")}).outputs
    opacity = radiance["Alpha"]
    shown = t.node("GeometryNodeSeparateGeometry", {"Geometry": given["Geometry"], "Selection": _selection(t, given, opacity)}).outputs[0]
    scale = t.vector("SCALE", _attribute(t, SCALE, "FLOAT_VECTOR"), _widening(t, given))
    colour = _colour(t, given, radiance)
    result = _edited(t, given, shown, scale, colour, opacity) if native else _drawn(t, given, shown, scale, colour, opacity)
    t.node("NodeGroupOutput", {0: result})
    inputs.finish_menus(group, table)
    t.arrange()
    group[_VERSION] = VERSION
    group[_NATIVE] = native


def _attribute(t: Tree, name: str, kind: str) -> bpy.types.NodeSocket:
    return output(t.node("GeometryNodeInputNamedAttribute", {"Name": name}, data_type=kind), "Attribute")


def _boolean(t: Tree, operation: str, *operands: bpy.types.NodeSocket) -> bpy.types.NodeSocket:
    return t.node("FunctionNodeBooleanMath", dict(enumerate(operands)), operation=operation).outputs[0]


def _selection(t: Tree, given: bpy.types.NodeOutputs, opacity: bpy.types.NodeSocket) -> bpy.types.NodeSocket:
    """Which splats are shown: opaque enough, drawn by lot, and on the right side of the crop box."""
    seen = t.math("GREATER_THAN", opacity, t.math("MAXIMUM", given[inputs.OPACITY_THRESHOLD], material.ALPHA_MIN))
    # A number from 0 to 1 that is a hash of the point's id, or else its index: as long as the share rises, splats only appear.
    lot = output(t.node("FunctionNodeRandomValue", data_type="FLOAT"), "Value")
    kept = _boolean(t, "NOT", t.math("GREATER_THAN", lot, given[inputs.SPLATS_KEPT]))
    box = t.node("GeometryNodeObjectInfo", {"Object": given[inputs.CROP_BOX]}, transform_space="RELATIVE").outputs["Transform"]
    to_box, invertible = t.node("FunctionNodeInvertMatrix", {0: box}).outputs
    local = t.node("FunctionNodeTransformPoint", {0: t.node("GeometryNodeInputPosition").outputs[0], 1: to_box}).outputs[0]
    x, y, z = t.node("ShaderNodeSeparateXYZ", {0: t.vector("ABSOLUTE", local)}).outputs
    outside = t.math("GREATER_THAN", t.math("MAXIMUM", t.math("MAXIMUM", x, y), z), 1.0)
    inside = _boolean(t, "AND", invertible, _boolean(t, "NOT", outside))  # a box scaled to nothing holds nothing
    cropped = _boolean(t, "IMPLY", given[inputs.CROP], _boolean(t, "XOR", inside, given[inputs.INVERT_CROP]))
    return _boolean(t, "AND", _boolean(t, "AND", seen, kept), cropped)


def _widening(t: Tree, given: bpy.types.NodeOutputs) -> bpy.types.NodeSocket:
    """The factor on standard deviations: a share q of the splats of a surface covers it when each has 1/q of the area."""
    share = t.math("MAXIMUM", given[inputs.SPLATS_KEPT], _LEAST_KEPT)
    return t.math("DIVIDE", given[inputs.SPLAT_SIZE], t.math("SQRT", share))


def _colour(t: Tree, given: bpy.types.NodeOutputs, radiance: bpy.types.NodeOutputs) -> list[bpy.types.NodeSocket]:
    """The tinted display colour as three numbers: 0.5 + C0 f, times the tint as the display shows it."""
    own = [t.math("MAXIMUM", t.math("MULTIPLY_ADD", radiance[name], SH_C0, 0.5), 0.0) for name in _RGB]
    tint = t.node("FunctionNodeSeparateColor", {0: given[inputs.TINT]}).outputs
    strength = given[inputs.TINT_STRENGTH]
    factors = [t.math("MULTIPLY_ADD", strength, t.math("SUBTRACT", _linear_to_srgb(t, tint[name]), 1.0), 1.0) for name in _RGB]
    return [t.math("MULTIPLY", value, factor) for value, factor in zip(own, factors, strict=True)]


def _combined(t: Tree, values: list[bpy.types.NodeSocket], alpha: bpy.types.NodeSocket | float = 1.0) -> bpy.types.NodeSocket:
    return t.node("FunctionNodeCombineColor", dict(zip(_RGB, values, strict=True)) | {"Alpha": alpha}).outputs[0]


def _edited(t: Tree, given, points, scale, colour, opacity) -> bpy.types.NodeSocket:
    """The same attributes with their new values, for Blender to draw; the very same point cloud where nothing is asked for."""
    points = _stored(t, points, SCALE, "FLOAT_VECTOR", scale)
    # Nodes cannot make a 4-vector, so tinted radiance is a colour: the same four numbers.
    coefficients = [t.math("DIVIDE", t.math("SUBTRACT", value, 0.5), SH_C0) for value in colour]
    tinted = _stored(t, points, RADIANCE, "FLOAT_COLOR", _combined(t, coefficients, opacity))
    is_tinted = t.math("GREATER_THAN", given[inputs.TINT_STRENGTH], 0.0)
    points = _switch(t, is_tinted, points, tinted)
    asked = [
        t.math("GREATER_THAN", t.math("ABSOLUTE", t.math("SUBTRACT", given[inputs.SPLAT_SIZE], 1.0)), 0.0),
        t.math("LESS_THAN", given[inputs.SPLATS_KEPT], 1.0),
        t.math("GREATER_THAN", given[inputs.OPACITY_THRESHOLD], 0.0),
        given[inputs.CROP],
        is_tinted,
    ]
    return _switch(t, functools.reduce(lambda a, b: _boolean(t, "OR", a, b), asked), given["Geometry"], points)


def _switch(t: Tree, on, off_value, on_value, kind: str = "GEOMETRY") -> bpy.types.NodeSocket:
    return output(t.node("GeometryNodeSwitch", {"Switch": on, "False": off_value, "True": on_value}, input_type=kind), "Output")


def _stored(t: Tree, points, name: str, kind: str, value) -> bpy.types.NodeSocket:
    node = t.node("GeometryNodeStoreNamedAttribute", {"Geometry": points, "Name": name}, data_type=kind, domain="POINT")
    t.set(next(socket for socket in node.inputs if socket.name == "Value" and socket.enabled), value)
    return node.outputs["Geometry"]


def _drawn(t: Tree, given, points, scale, colour, opacity) -> bpy.types.NodeSocket:
    """What stands for the splats in the viewport or in renders."""
    linear = _combined(t, [_srgb_to_linear(t, value) for value in colour])
    emission = _switch(t, given[inputs.BLEND_IN_DISPLAY_SPACE], linear, _combined(t, colour), "RGBA")
    points = _stored(t, points, material.EMISSION, "FLOAT_COLOR", emission)
    # A splat ends where its alpha falls to 1/255, at k = sqrt(2 ln(255 o)) standard deviations.
    logarithm = t.math("LOGARITHM", t.math("DIVIDE", opacity, material.ALPHA_MIN), 2.718281828459045)
    reach = t.math("SQRT", t.math("MULTIPLY", t.math("MAXIMUM", logarithm, 0.0), 2.0))
    view = _view(t, scale, given[inputs.SMOOTHING])
    in_viewport = t.node("GeometryNodeIsViewport").outputs[0]
    menu = _switch(t, in_viewport, given[inputs.RENDER_DISPLAY], given[inputs.VIEWPORT_DISPLAY], "MENU")
    choice = t.node("GeometryNodeMenuSwitch", data_type="GEOMETRY")
    items = choice.enum_items
    while len(items) < len(inputs.DISPLAYS):
        items.new("")
    for item, name in zip(items, inputs.DISPLAYS, strict=True):
        item.name = name
    t.set(choice.inputs[0], menu)
    t.set(choice.inputs[inputs.ELLIPSOIDS], _ellipsoids(t, points, view, reach, in_viewport))
    t.set(choice.inputs[inputs.CAMERA_QUADS], _squares(t, points, view, reach))
    t.set(choice.inputs[inputs.POINTS], _points(t, points, scale, opacity))
    return choice.outputs[0]


def _srgb_to_linear(t: Tree, value: bpy.types.NodeSocket) -> bpy.types.NodeSocket:
    """The sRGB transfer function of IEC 61966-2-1, decoding."""
    power = t.math("POWER", t.math("DIVIDE", t.math("ADD", value, 0.055), 1.055), 2.4)
    low = t.math("LESS_THAN", value, 0.04045)
    return t.math("ADD", t.math("MULTIPLY", t.math("SUBTRACT", 1.0, low), power), t.math("MULTIPLY", low, t.math("DIVIDE", value, 12.92)))


def _linear_to_srgb(t: Tree, value: bpy.types.NodeSocket) -> bpy.types.NodeSocket:
    """The same, encoding."""
    power = t.math("MULTIPLY_ADD", t.math("POWER", value, 1 / 2.4), 1.055, -0.055)
    low = t.math("LESS_THAN", value, 0.0031308)
    return t.math("ADD", t.math("MULTIPLY", t.math("SUBTRACT", 1.0, low), power), t.math("MULTIPLY", low, t.math("MULTIPLY", value, 12.92)))


class _View(NamedTuple):
    """A field of splats in the active camera's space: X right, Y up, looking along -Z; and its scales and blur."""

    to_object: bpy.types.NodeSocket
    centre: bpy.types.NodeSocket
    z: bpy.types.NodeSocket
    slopes: list[bpy.types.NodeSocket]  # x/d and y/d at depth d = -z; 0 under an orthographic camera
    axes: list[bpy.types.NodeSocket]  # the splat's unit axes, as long as the object's scale makes them
    lengths: list[bpy.types.NodeSocket]  # standard deviations along them, object units
    blur: bpy.types.NodeSocket  # standard deviation of the smoothing, world units


def _view(t: Tree, scale: bpy.types.NodeSocket, smoothing: bpy.types.NodeSocket) -> _View:
    active = t.node("GeometryNodeInputActiveCamera").outputs[0]
    to_object = t.node("GeometryNodeObjectInfo", {"Object": active}, transform_space="RELATIVE").outputs["Transform"]
    parallel = t.node("GeometryNodeCameraInfo", {0: active}).outputs["Is Orthographic"]
    to_camera = t.node("FunctionNodeInvertMatrix", {0: to_object}).outputs[0]
    centre = t.node("FunctionNodeTransformPoint", {0: t.node("GeometryNodeInputPosition").outputs[0], 1: to_camera}).outputs[0]
    x, y, z = t.node("ShaderNodeSeparateXYZ", {0: centre}).outputs
    depth = t.math("MAXIMUM", t.math("MULTIPLY", z, -1.0), _NEAR)
    perspective = t.math("SUBTRACT", 1.0, parallel)
    slopes = [t.math("MAXIMUM", t.math("MINIMUM", t.math("DIVIDE", v, depth), _OFF_AXIS), -_OFF_AXIS) for v in (x, y)]
    slopes = [t.math("MULTIPLY", slope, perspective) for slope in slopes]
    blur = t.math("MULTIPLY", smoothing, t.math("ADD", t.math("MULTIPLY", depth, perspective), parallel))
    rotation = _attribute(t, ROTATION, "QUATERNION")
    axes = []
    for axis in ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)):
        turned = t.node("FunctionNodeRotateVector", {0: axis, 1: rotation}).outputs[0]
        axes.append(t.node("FunctionNodeTransformDirection", {0: turned, 1: to_camera}).outputs[0])
    return _View(to_object, centre, z, slopes, axes, list(t.node("ShaderNodeSeparateXYZ", {0: scale}).outputs), blur)


def _ellipsoids(t: Tree, points, view: _View, reach, in_viewport) -> bpy.types.NodeSocket:
    """Icospheres that contain each splat's ellipsoid; in renders smoothed by as much as is seen from the active camera.

    The smoothing is a ball in the world: it adds to the variance along each of the splat's axes.
    """
    blur = t.math("MULTIPLY", view.blur, t.math("SUBTRACT", 1.0, in_viewport))
    lengths = []
    for length, axis in zip(view.lengths, view.axes, strict=True):
        added = t.math("DIVIDE", blur, t.math("MAXIMUM", t.vector("LENGTH", axis), 1e-9))
        lengths.append(t.math("SQRT", t.math("MULTIPLY_ADD", added, added, t.math("MULTIPLY", length, length))))
    floor = t.math("MULTIPLY", t.math("MAXIMUM", t.math("MAXIMUM", *lengths[:2]), lengths[2]), _THINNEST)
    radii = [t.math("MULTIPLY", t.math("MAXIMUM", length, floor), reach) for length in lengths]
    sphere = t.node("GeometryNodeMeshIcoSphere", {"Radius": 1 / _INSCRIBED, "Subdivisions": 2}).outputs["Mesh"]
    sphere = t.node("GeometryNodeSetMaterial", {"Geometry": sphere, "Material": material.ellipsoid()}).outputs["Geometry"]
    scale = t.node("ShaderNodeCombineXYZ", dict(enumerate(radii))).outputs[0]
    rotation = _attribute(t, ROTATION, "QUATERNION")
    return t.node("GeometryNodeInstanceOnPoints", {"Points": points, "Instance": sphere, "Rotation": rotation, "Scale": scale}).outputs[
        "Instances"
    ]


def _points(t: Tree, points, scale, opacity) -> bpy.types.NodeSocket:
    """Opaque spheres that hide as much as the splat does on average: pi r^2 = 2 pi s^2 o, s the mean of its two wider axes."""
    x, y, z = t.node("ShaderNodeSeparateXYZ", {0: scale}).outputs
    thinnest = t.math("MINIMUM", t.math("MINIMUM", x, y), z)
    width = t.math("MULTIPLY", t.math("SUBTRACT", t.math("ADD", t.math("ADD", x, y), z), thinnest), 0.5)
    radius = t.math("MULTIPLY", width, t.math("SQRT", t.math("MULTIPLY", opacity, 2.0)))
    points = t.node("GeometryNodeSetPointRadius", {"Points": points, "Radius": radius}).outputs[0]
    return t.node("GeometryNodeSetMaterial", {"Geometry": points, "Material": material.dot()}).outputs["Geometry"]


def _squares(t: Tree, points, view: _View, reach) -> bpy.types.NodeSocket:
    """Squares that contain each splat's projection, in the plane of its centre and facing the active camera.

    A half axis a of the ellipsoid is seen at (a_x + (x/d) a_z, a_y + (y/d) a_z) in that plane: the EWA Jacobian times
    d / focal length. The sum of the outer products, plus the smoothing, is the splat's 2D covariance; its eigenvectors
    are the square's sides.
    """
    variance = t.math("MULTIPLY", view.blur, view.blur)
    xx, xy, yy = variance, 0.0, variance
    for length, axis in zip(view.lengths, view.axes, strict=True):
        a, b, c = t.node("ShaderNodeSeparateXYZ", {0: t.vector("SCALE", axis, length)}).outputs
        u, v = t.math("MULTIPLY_ADD", view.slopes[0], c, a), t.math("MULTIPLY_ADD", view.slopes[1], c, b)
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
    place = t.node("FunctionNodeCombineTransform", {0: view.centre, 1: turn, 2: sides}).outputs[0]
    place = t.node("FunctionNodeMatrixMultiply", {0: view.to_object, 1: place}).outputs[0]

    square = t.node("GeometryNodeMeshGrid", {"Size X": 2.0, "Size Y": 2.0, "Vertices X": 2, "Vertices Y": 2}).outputs["Mesh"]
    square = t.node("GeometryNodeSetMaterial", {"Geometry": square, "Material": material.facing()}).outputs["Geometry"]
    before = t.math("GREATER_THAN", t.math("MULTIPLY", view.z, -1.0), _NEAR)
    instances = t.node("GeometryNodeInstanceOnPoints", {"Points": points, "Selection": before, "Instance": square}).outputs["Instances"]
    return t.node("GeometryNodeSetInstanceTransform", {"Instances": instances, "Transform": place}).outputs[0]
