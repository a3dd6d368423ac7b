"""Every operator of the extension."""

from __future__ import annotations

from . import files, generate, model, render_settings

CLASSES = (*generate.CLASSES, *files.CLASSES, *model.CLASSES, *render_settings.CLASSES)
