"""The inputs of the modifier that shows splats: one table, and where Blender keeps their values.

Every input can be keyframed and driven. Names are what a file keeps, so a name is never given another meaning.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import bpy

from ...generator.errors import InputError

ELLIPSOIDS, CAMERA_QUADS, POINTS = DISPLAYS = ("Ellipsoids", "Camera Quads", "Points")

VIEWPORT_DISPLAY = "Viewport Display"
RENDER_DISPLAY = "Render Display"
SMOOTHING = "Smoothing"
BLEND_IN_DISPLAY_SPACE = "Blend in Display Space"
SPLAT_SIZE = "Splat Size"
TINT = "Tint"
TINT_STRENGTH = "Tint Strength"
SPLATS_KEPT = "Splats Kept"
OPACITY_THRESHOLD = "Opacity Threshold"
CROP = "Crop"
CROP_BOX = "Crop Box"
INVERT_CROP = "Invert Crop"


@dataclass(frozen=True)
class Input:
    """One input of the group."""

    name: str
    panel: str
    kind: str  # bl_idname of its socket
    default: Any  # a menu's is the item's name
    description: str
    settings: dict[str, Any] = field(default_factory=dict)  # other properties of the interface's socket
    drawn_only: bool = False  # has no meaning where Blender draws splats itself

    @property
    def is_menu(self) -> bool:
        return self.kind == "NodeSocketMenu"


_SHARE = {"min_value": 0.0, "max_value": 1.0, "subtype": "FACTOR"}
_DISPLAYS = (
    "Ellipsoids are right from any side. Camera quads face the active camera and blend in exact order: for final frames. Points are "
    "opaque dots, fast with millions"
)
TABLE = (
    Input(VIEWPORT_DISPLAY, "Display", "NodeSocketMenu", ELLIPSOIDS, f"How the viewport shows the splats. {_DISPLAYS}", drawn_only=True),
    Input(
        RENDER_DISPLAY,
        "Display",
        "NodeSocketMenu",
        CAMERA_QUADS,
        f"How renders show the splats. {_DISPLAYS}. Take ellipsoids for panoramic cameras, mirrors and glass",
        drawn_only=True,
    ),
    Input(
        SMOOTHING,
        "Display",
        "NodeSocketFloat",
        0.0,
        "Standard deviation added to every splat that a render shows, per unit of distance. Splat renderers add 0.55 pixels",
        {"min_value": 0.0, "max_value": 0.1},
        drawn_only=True,
    ),
    Input(
        BLEND_IN_DISPLAY_SPACE,
        "Display",
        "NodeSocketBool",
        False,
        "Emit display values, which blend as splats were fitted under the Raw view. Off: scene-linear values, for the Standard view",
        drawn_only=True,
    ),
    Input(
        SPLAT_SIZE,
        "Look",
        "NodeSocketFloat",
        1.0,
        "Factor on every splat's standard deviations",
        {"min_value": 0.0, "max_value": 10.0},
    ),
    Input(TINT, "Look", "NodeSocketColor", (1.0, 1.0, 1.0, 1.0), "Colour that the splats' own are multiplied by"),
    Input(TINT_STRENGTH, "Look", "NodeSocketFloat", 0.0, "Share of the tint: 0 leaves the splats' own colours", _SHARE),
    Input(
        SPLATS_KEPT,
        "Reduce",
        "NodeSocketFloat",
        1.0,
        "Share of the splats that is shown, the same ones in every frame; a larger share only adds. The rest is widened to cover as much",
        _SHARE,
    ),
    Input(OPACITY_THRESHOLD, "Reduce", "NodeSocketFloat", 0.0, "Splats of this opacity or less are left out", _SHARE),
    Input(CROP, "Reduce", "NodeSocketBool", False, "Show only the splats whose centres are in the crop box"),
    Input(
        CROP_BOX,
        "Reduce",
        "NodeSocketObject",
        None,
        "The object whose cube from -1 to 1 along its own axes is the box: an empty drawn as a cube of size 1, moved, turned and scaled",
    ),
    Input(INVERT_CROP, "Reduce", "NodeSocketBool", False, "Show the splats outside of the crop box instead"),
)


def shape(group: bpy.types.NodeTree, table: tuple[Input, ...] = TABLE) -> None:
    """Give a group the geometry sockets and the inputs of the table, in its order.

    What has a name and kind of the table stays, with its identifier, so that modifiers keep their values and animation;
    what is not in the table goes. The defaults of menus are set by `finish_menus`, once the menus are linked.
    """
    interface = group.interface
    known = {(entry.name, entry.kind) for entry in table}
    for item in list(interface.items_tree):
        if item.item_type == "SOCKET" and item.socket_type != "NodeSocketGeometry" and (item.name, item.socket_type) not in known:
            interface.remove(item)
    for direction in ("OUTPUT", "INPUT"):
        if not any(item.item_type == "SOCKET" and item.in_out == direction and item.name == "Geometry" for item in interface.items_tree):
            interface.new_socket("Geometry", in_out=direction, socket_type="NodeSocketGeometry")
    panels = {item.name: item for item in interface.items_tree if item.item_type == "PANEL"}
    for position, entry in enumerate(table):
        panel = panels.get(entry.panel) or panels.setdefault(entry.panel, interface.new_panel(entry.panel))
        item = _socket(group, entry.name) or interface.new_socket(entry.name, in_out="INPUT", socket_type=entry.kind)
        item.description = entry.description
        for key, value in entry.settings.items():
            setattr(item, key, value)
        if not entry.is_menu and entry.default is not None:
            item.default_value = entry.default
        interface.move_to_parent(item, panel, position)


def finish_menus(group: bpy.types.NodeTree, table: tuple[Input, ...] = TABLE) -> None:
    """Set the defaults of the menus, whose items come from the nodes that they are linked to."""
    for entry in table:
        if entry.is_menu:
            _own_socket(group, entry.name).default_value = entry.default


def names(modifier: bpy.types.Modifier) -> Iterator[str]:
    """The names of the inputs that a modifier has: a linked group of an earlier version has fewer."""
    return (entry.name for entry in TABLE if has(modifier, entry.name))


def has(modifier: bpy.types.Modifier, name: str) -> bool:
    """Whether a modifier's group has an input."""
    return _socket(modifier.node_group, name) is not None


def place(modifier: bpy.types.Modifier, name: str) -> tuple[bpy.types.bpy_struct, str]:
    """Where a modifier keeps an input: the owner and the property, for drawing, keyframes and drivers.

    From Blender 5.2 an input is a property of its own; before, it is a custom property of the modifier.

    Raises:
        InputError: the modifier's group has no such input.
    """
    socket = _own_socket(modifier.node_group, name)
    if hasattr(modifier, "properties"):
        return getattr(modifier.properties.inputs, socket.identifier), "value"
    return modifier, f'["{socket.identifier}"]'


def data_path(modifier: bpy.types.Modifier, name: str) -> str:
    """An input's path from its object, as F-curves and drivers have it.

    Raises:
        InputError: the modifier's group has no such input.
    """
    socket = _own_socket(modifier.node_group, name)
    tail = f".properties.inputs.{socket.identifier}.value" if hasattr(modifier, "properties") else f'["{socket.identifier}"]'
    return f'modifiers["{bpy.utils.escape_identifier(modifier.name)}"]{tail}'


def get_value(modifier: bpy.types.Modifier, name: str) -> Any:
    """An input's value; a menu's is the item's name.

    Raises:
        InputError: the modifier's group has no such input.
    """
    owner, path = place(modifier, name)
    if path == "value":
        return owner.value
    value = owner[path[2:-2]]
    kind = _own_socket(modifier.node_group, name).socket_type
    if kind == "NodeSocketMenu":
        return DISPLAYS[value]
    return bool(value) if kind == "NodeSocketBool" else value


def set_value(modifier: bpy.types.Modifier, name: str, value: Any) -> None:
    """Set an input; a menu takes the item's name.

    Raises:
        InputError: the modifier's group has no such input.
    """
    owner, path = place(modifier, name)
    if path == "value":
        owner.value = value
    else:
        is_menu = _own_socket(modifier.node_group, name).socket_type == "NodeSocketMenu"
        owner[path[2:-2]] = DISPLAYS.index(value) if is_menu else value
    modifier.id_data.update_tag()


def curves(object: bpy.types.Object) -> Iterator[bpy.types.FCurve]:
    """The F-curves of an object's own action, and its drivers."""
    animation = object.animation_data
    if animation is None:
        return
    yield from animation.drivers
    if animation.action is not None and animation.action.library is None:
        for layer in animation.action.layers:
            for strip in layer.strips:
                for bag in strip.channelbags:
                    yield from bag.fcurves


def is_animated(modifier: bpy.types.Modifier, name: str) -> bool:
    """Whether keyframes or a driver of the object set an input."""
    path = data_path(modifier, name)
    return any(curve.data_path == path for curve in curves(modifier.id_data))


def _socket(group: bpy.types.NodeTree, name: str) -> bpy.types.NodeTreeInterfaceSocket | None:
    return next((i for i in group.interface.items_tree if i.item_type == "SOCKET" and i.in_out == "INPUT" and i.name == name), None)


def _own_socket(group: bpy.types.NodeTree, name: str) -> bpy.types.NodeTreeInterfaceSocket:
    socket = _socket(group, name)
    if socket is None:
        raise InputError(f"node group {group.name!r} has no input {name!r}")
    return socket
