"""The "Gaussian Atlas" tab of the 3D view's sidebar, a panel a file."""

from __future__ import annotations

from . import edit, generate, model, render, splat_object

# In the order in which the tab shows them.
CLASSES = (*generate.CLASSES, *splat_object.CLASSES, *edit.CLASSES, *render.CLASSES, *model.CLASSES)
