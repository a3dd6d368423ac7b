"""Files of other versions: splat objects get this version's nodes and this Blender's attributes, and keep what was set.

Runs after a file is opened or appended from. What is linked from a library belongs to that library and is left alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import bpy

from . import inputs, layout, node_group

# An input of the first version, and what its off and on are now; F-curves keep their 0 and 1.
_FACE_CAMERA = "Face Camera in Renders"
_DISPLAY_OF = {False: inputs.ELLIPSOIDS, True: inputs.CAMERA_QUADS}


def upgrade(native: bool | None = None) -> list[str]:
    """Bring the open file's splat objects up to date. Returns what was done, a line each.

    Args:
        native: whether Blender draws splats itself; asked by default.
    """
    native = layout.native() if native is None else native
    done = []
    for object in bpy.data.objects:
        if object.library is None and object.type == "POINTCLOUD" and object.data.library is None and layout.is_splats(object):
            if layout.convert(object.data, native):
                done.append(f"point cloud {object.data.name!r}: radiance as {layout.radiance_type(native)}")
                node_group.attach(object, native)
    for group in bpy.data.node_groups:
        old = node_group.version(group)
        if group.library is None and 0 < old <= node_group.VERSION and node_group.outdated(group, native):
            _rebuild(group, native)
            done.append(f"node group {group.name!r}: version {old} to {node_group.VERSION}{' for native splats' if native else ''}")
    return done


def _rebuild(group: bpy.types.NodeTree, native: bool) -> None:
    """This version's nodes in a group, and on every modifier the values from before."""
    before = [(modifier, _values(modifier), _path(modifier, _FACE_CAMERA)) for modifier in _users(group)]
    node_group.build(group, native)
    for modifier, values, face_camera in before:
        known = set(inputs.names(modifier))
        if _FACE_CAMERA in values:
            values[inputs.RENDER_DISPLAY] = _DISPLAY_OF[values.pop(_FACE_CAMERA)]
        # A new input of a group is not given its default on modifiers that are there already.
        defaults = {entry.name: entry.default for entry in inputs.TABLE if entry.default is not None}
        for name, value in (defaults | values).items():
            if name in known:
                inputs.set_value(modifier, name, value)
        if face_camera and inputs.RENDER_DISPLAY in known:
            for curve in inputs.curves(modifier.id_data):
                if curve.data_path == face_camera:
                    curve.data_path = inputs.data_path(modifier, inputs.RENDER_DISPLAY)


def _users(group: bpy.types.NodeTree) -> Iterator[bpy.types.Modifier]:
    for object in bpy.data.objects:
        if object.library is None:
            yield from (m for m in object.modifiers if m.type == "NODES" and m.node_group == group)


def _values(modifier: bpy.types.Modifier) -> dict[str, Any]:
    names = [*(entry.name for entry in inputs.TABLE), _FACE_CAMERA]
    values = {name: inputs.get_value(modifier, name) for name in names if inputs.has(modifier, name)}
    return {name: value[:] if hasattr(value, "__len__") and not isinstance(value, str) else value for name, value in values.items()}


def _path(modifier: bpy.types.Modifier, name: str) -> str | None:
    return inputs.data_path(modifier, name) if inputs.has(modifier, name) else None


@bpy.app.handlers.persistent
def _after_loading(*_: object) -> None:
    for line in upgrade():
        print(f"Gaussian Atlas: {line}")


# Appending has a handler of its own, where this Blender has it.
_HANDLERS = [name for name in ("load_post", "blend_import_post") if hasattr(bpy.app.handlers, name)]


def register() -> None:
    for name in _HANDLERS:
        getattr(bpy.app.handlers, name).append(_after_loading)


def unregister() -> None:
    for name in _HANDLERS:
        getattr(bpy.app.handlers, name).remove(_after_loading)
