"""Every operator of the extension."""

from __future__ import annotations

from . import base, edit, files, generate, mesh, model, prompts, render_settings, show_colors, splat_object

_MODULES = (base, generate, edit, files, mesh, model, prompts, render_settings, show_colors, splat_object)
CLASSES = tuple(cls for module in _MODULES for cls in module.CLASSES)
