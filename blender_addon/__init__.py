"""Everything that lives inside Blender. Importing it needs bpy; torch and diffusers are imported only when used."""

from __future__ import annotations

import bpy

from . import batch, operators, overlay, panels, preferences, properties, service
from .operators import base, files
from .splat_object import upgrade

_CLASSES = (*properties.CLASSES, *preferences.CLASSES, *operators.CLASSES, *panels.CLASSES)
_commands: list = []


def register() -> None:
    for cls in _CLASSES:
        bpy.utils.register_class(cls)
    properties.attach()
    base.attach()
    files.add_to_menus()
    upgrade.register()
    _commands.append(bpy.utils.register_cli_command("gaussian_atlas", batch.main))


def unregister() -> None:
    base.end_running(bpy.context)
    overlay.clear()
    service.unload()
    while _commands:
        bpy.utils.unregister_cli_command(_commands.pop())
    upgrade.unregister()
    files.remove_from_menus()
    base.detach()
    properties.detach()
    for cls in reversed(_CLASSES):
        bpy.utils.unregister_class(cls)
