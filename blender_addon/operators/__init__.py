"""Every operator of the extension."""

from __future__ import annotations

from . import base, files, generate, model, prompts, render_settings

CLASSES = (*base.CLASSES, *generate.CLASSES, *files.CLASSES, *model.CLASSES, *prompts.CLASSES, *render_settings.CLASSES)
