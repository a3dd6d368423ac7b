"""The extension's preferences."""

from __future__ import annotations

import bpy
from bpy.props import StringProperty

from ..generator.errors import InputError
from . import extension, service


class GaussianAtlasPreferences(bpy.types.AddonPreferences):
    bl_idname = extension.PACKAGE

    model_path: StringProperty(
        name="Model",
        description="Folder of the model to generate with; empty for the starter model that comes with the extension",
        subtype="DIR_PATH",
        default="",
    )

    def draw(self, context: bpy.types.Context) -> None:
        layout = self.layout
        layout.prop(self, "model_path", placeholder="The bundled starter model")
        folder = extension.model_folder(context)
        try:
            info = service.describe(folder)
        except InputError as error:
            layout.label(text=str(error), icon="ERROR")
            if self.model_path:
                layout.operator("gaussian_atlas.use_starter_model")
        else:
            layout.label(text=f"{info.name} {info.version}".strip(), icon="CHECKMARK")


CLASSES = (GaussianAtlasPreferences,)
