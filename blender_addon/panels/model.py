"""The model that generates: the choice, its card, the device."""

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
        preferences = context.preferences.addons[extension.PACKAGE].preferences
        running = context.window_manager.gaussian_atlas.running
        folder = extension.model_folder(context)
        column = layout.column()
        column.enabled = not running
        column.prop(preferences, "model", text="")
        column.prop(preferences, "device")
        if preferences.device != "cpu" and service.cuda_reason():
            wrong = preferences.device == "cuda"
            draw_text(
                column, context, f"{'No CUDA' if wrong else 'Uses the CPU'}: {service.cuda_reason()}", icon="ERROR" if wrong else "INFO"
            )
        try:
            info = service.describe(folder)
        except InputError as error:
            draw_text(layout, context, str(error), icon="ERROR")
        else:
            draw_card(layout, context, info, service.is_loaded(folder))
        if service.is_loaded():
            layout.operator("gaussian_atlas.unload_model", icon="X")
        layout.operator("gaussian_atlas.install_model_file", icon="FILE_FOLDER")
        layout.operator("gaussian_atlas.open_preferences", icon="PREFERENCES")


def draw_card(layout: bpy.types.UILayout, context: bpy.types.Context, info: service.ModelInfo, loaded: bool) -> None:
    """What a model says of itself."""
    box = layout.box().column(align=True)
    box.label(text=info.title, icon="CHECKMARK" if loaded else "DISK_DRIVE")
    facts = [f"{info.size / 1e6:,.0f} MB"] * bool(info.size) + [f"{info.gaussians:,} Gaussians"] * bool(info.gaussians)
    for text in (f"Licence: {info.licence}" if info.licence else "", ", ".join(facts), "In memory" if loaded else ""):
        if text:
            box.label(text=text)
    if info.vocabulary:
        few = ", ".join(info.vocabulary[:: max(1, len(info.vocabulary) // 6)][:6])
        draw_text(box, context, f"Knows {len(info.vocabulary)} objects, such as {few}", icon="NONE")
    for name, value in list(info.metrics.items())[:6]:
        if isinstance(value, int | float):
            box.label(text=f"{name.replace('_', ' ').capitalize()}: {value:g}")


CLASSES = (ModelPanel,)
