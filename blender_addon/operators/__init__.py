"""Every operator of the extension."""

from __future__ import annotations

from . import base, files, generate, model, render_settings

CLASSES = (*base.CLASSES, *generate.CLASSES, *files.CLASSES, *model.CLASSES, *render_settings.CLASSES)
