"""The model that generates."""

from __future__ import annotations

import bpy

from ...generator.errors import InputError
from .. import extension, service
from .common import SidebarPanel, draw_text


class ModelPanel(SidebarPanel, bpy.types.Panel):
    bl_idname = "GAUSSIAN_ATLAS_PT_model"
    bl_label = "Model"
    bl_options = {"DEFAULT_CLOSED"}

    def draw(self, context: bpy.types.Context) -> None:
        layout = self.layout
        folder = extension.model_folder(context)
        try:
            info = service.describe(folder)
        except InputError as error:
            draw_text(layout, context, str(error), icon="ERROR")
        else:
            layout.label(text=f"{info.name} {info.version}".strip(), icon="CHECKMARK" if service.is_loaded(folder) else "DISK_DRIVE")
        layout.operator("gaussian_atlas.open_preferences", icon="PREFERENCES")
        if service.is_loaded():
            layout.operator("gaussian_atlas.unload_model", icon="X")


CLASSES = (ModelPanel,)
