"""The extension's preferences: model, device, prompts."""

from __future__ import annotations

import bpy
from bpy.props import BoolProperty, EnumProperty, StringProperty

from ..generator.errors import InputError
from . import extension, models, service

# Blender keeps no reference to the texts of a dynamic enumeration: they must stay alive here.
_items: list[tuple[str, str, str, int]] = []


def model_items(self: GaussianAtlasPreferences | None, context: bpy.types.Context | None) -> list[tuple[str, str, str, int]]:
    """The bundled model, the installed ones, and the chosen folder where it is neither."""
    choices = [
        (str(model.folder), model.info.title, f"{model.info.licence}; {model.folder}")
        for model in models.installed(extension.models_folder())
    ]
    choices = [("", *choices[0][1:]), *choices[1:]] if choices and choices[0][0] == str(extension.STARTER_MODEL) else choices
    chosen = self.model_path if self else ""
    if chosen not in {path for path, _, _ in choices}:
        choices.append((chosen, chosen.rstrip("/\\").replace("\\", "/").rpartition("/")[2] or "No model", chosen))
    _items[:] = [(path or models.STARTER, title, text, index) for index, (path, title, text) in enumerate(choices)]
    return _items


def _get_model(self: GaussianAtlasPreferences) -> int:
    return next((number for path, _, _, number in model_items(self, None) if path == (self.model_path or models.STARTER)), 0)


def _set_model(self: GaussianAtlasPreferences, number: int) -> None:
    path = model_items(self, None)[number][0]
    self.model_path = "" if path == models.STARTER else path


class GaussianAtlasPreferences(bpy.types.AddonPreferences):
    bl_idname = extension.PACKAGE

    model_path: StringProperty(
        name="Model Folder",
        description="Folder of the model to generate with; empty for the starter model that comes with the extension",
        subtype="DIR_PATH",
        default="",
    )
    model: EnumProperty(name="Model", description="The model to generate with", items=model_items, get=_get_model, set=_set_model)
    device: EnumProperty(
        name="Device",
        description="Where the model runs",
        items=[
            ("auto", "Automatic", "An NVIDIA GPU where one can be used, else the processor"),
            ("cpu", "CPU", "The processor"),
            ("cuda", "NVIDIA GPU", "A GPU through CUDA"),
        ],
        default="auto",
    )
    remember_prompts: BoolProperty(
        name="Remember Prompts", description="Keep the prompts that were generated, on this computer only", default=True
    )

    def draw(self, context: bpy.types.Context) -> None:
        layout = self.layout
        layout.use_property_split = True
        column = layout.column()
        column.prop(self, "model")
        column.prop(self, "model_path", placeholder="The bundled starter model")
        folder = extension.model_folder(context)
        try:
            info = service.describe(folder)
        except InputError as error:
            column.label(text=str(error), icon="ERROR")
            if self.model_path:
                column.operator("gaussian_atlas.use_starter_model")
        else:
            column.label(text=info.title, icon="CHECKMARK")
        row = column.row()
        row.operator("gaussian_atlas.install_model_file", icon="FILE_FOLDER")
        row.operator("gaussian_atlas.install_model_hub", icon="URL")
        installed = [model for model in models.installed(extension.models_folder()) if model.name != models.STARTER]
        for model in installed:
            row = column.row()
            row.label(text=f"{model.info.title}, {model.info.size / 1e6:,.0f} MB", icon="DISK_DRIVE")
            row.operator("gaussian_atlas.remove_model", text="Remove", icon="TRASH").name = model.name
        column.separator()
        column.prop(self, "device")
        if self.device == "cuda" and service.cuda_reason():
            column.label(text=f"CUDA cannot be used here: {service.cuda_reason()}", icon="ERROR")
        column.separator()
        column.prop(self, "remember_prompts")
        column.operator("gaussian_atlas.clear_prompts", icon="TRASH")


CLASSES = (GaussianAtlasPreferences,)
