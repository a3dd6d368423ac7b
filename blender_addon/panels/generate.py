"""The prompt, its settings, the button, and the progress."""

from __future__ import annotations

import bpy

from ...generator import vocabulary
from ...generator.errors import InputError
from .. import extension, history, properties, service
from .common import SidebarPanel, draw_text

_MENU_MAX = 20


class PromptsMenu(bpy.types.Menu):
    bl_idname = "GAUSSIAN_ATLAS_MT_prompts"
    bl_label = "Earlier Prompts"

    def draw(self, context: bpy.types.Context) -> None:
        layout = self.layout
        prompts = history.read(extension.history_file()).prompts
        if not prompts:
            layout.label(text="None yet")
            return
        for prompt in prompts[:_MENU_MAX]:
            layout.operator("gaussian_atlas.use_prompt", text=prompt, translate=False).prompt = prompt
        layout.separator()
        layout.operator("gaussian_atlas.clear_prompts", icon="TRASH")


class GeneratePanel(SidebarPanel, bpy.types.Panel):
    bl_idname = "GAUSSIAN_ATLAS_PT_generate"
    bl_label = "Generate"

    def draw(self, context: bpy.types.Context) -> None:
        layout = self.layout
        settings = context.scene.gaussian_atlas
        status = context.window_manager.gaussian_atlas
        try:
            info = service.describe(extension.model_folder(context))
        except InputError:  # the panel of the model says so
            info = None
        inputs = layout.column()
        inputs.enabled = not status.running
        row = inputs.row(align=True)
        row.prop(settings, "prompt", text="", placeholder="a red armchair")
        row.menu("GAUSSIAN_ATLAS_MT_prompts", text="", icon="TIME")
        inputs.prop(settings, "negative_prompt", text="", placeholder="Not (optional)")
        if info and (hint := vocabulary.hint(settings.prompt, info.vocabulary)):
            draw_text(inputs, context, hint, icon="INFO")
        row = inputs.row(align=True)
        row.prop(settings, "mix_prompt", text="", placeholder="Mix with (optional)")
        if settings.mix_prompt:
            row.prop(settings, "mix_weight", text="")
        row = inputs.row(align=True)
        row.prop(settings, "seed")
        row.operator("gaussian_atlas.random_seed", text="", icon="FILE_REFRESH")
        # Locked: every press of the button takes the same seed.
        row.prop(settings, "randomize_seed", text="", icon="UNLOCKED" if settings.randomize_seed else "LOCKED", invert_checkbox=True)
        column = inputs.column(align=True)
        column.prop(settings, "steps")
        column.prop(settings, "guidance")
        column.prop(settings, "count")
        if status.running:
            row = layout.row(align=True)
            row.progress(text=status.stage, factor=status.fraction)
            row.operator("gaussian_atlas.cancel", text="", icon="X")
        else:
            row = layout.row()
            row.scale_y = 1.5
            row.operator("gaussian_atlas.generate", icon="OUTLINER_OB_POINTCLOUD")
            if info and (seconds := expected_seconds(context, info)):
                layout.label(text=f"Takes {show_seconds(seconds)}", icon="PREVIEW_RANGE")
        if status.error:
            draw_problem(layout, context, status)


def expected_seconds(context: bpy.types.Context, info: service.ModelInfo) -> float:
    """Seconds that the settings will take, from earlier runs on this machine; 0 where there were none."""
    settings = context.scene.gaussian_atlas
    device = extension.device(context)
    speed = history.read(extension.history_file()).speeds.get(history.speed_key(info.sha256, device))
    if speed is None:
        return 0.0
    loaded = service.is_loaded(extension.model_folder(context), device)
    return history.estimate(speed, settings.steps, settings.count, settings.guidance > 1, loaded)


def show_seconds(seconds: float) -> str:
    """A duration as a person says it."""
    if seconds < 1:
        return "less than a second"
    if seconds < 90:
        return f"about {seconds:.0f} s"
    if seconds < 90 * 60:
        return f"about {seconds / 60:.0f} min"
    return f"about {seconds / 3600:.0f} h"


def draw_problem(layout: bpy.types.UILayout, context: bpy.types.Context, status: properties.GaussianAtlasStatus) -> None:
    """An error with the button that mends it."""
    box = layout.box()
    draw_text(box, context, status.error, icon="ERROR")
    if status.fix_operator:
        box.operator(status.fix_operator, text=status.fix_label)


CLASSES = (PromptsMenu, GeneratePanel)
