"""Gaussian Atlas: text to 3D Gaussians inside Blender. This file is only the extension's entry point."""

from __future__ import annotations


def register() -> None:
    # Imported here so that Python tools may import the repository root outside Blender.
    from . import blender_addon

    blender_addon.register()


def unregister() -> None:
    from . import blender_addon

    blender_addon.unregister()
