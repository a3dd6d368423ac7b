"""The prompt, its settings, the button, and the progress."""

from __future__ import annotations

import bpy

from .. import properties
from .common import SidebarPanel, draw_text


class GeneratePanel(SidebarPanel, bpy.types.Panel):
    bl_idname = "GAUSSIAN_ATLAS_PT_generate"
    bl_label = "Generate"

    def draw(self, context: bpy.types.Context) -> None:
        layout = self.layout
        settings = context.scene.gaussian_atlas
        status = context.window_manager.gaussian_atlas
        inputs = layout.column()
        inputs.enabled = not status.running
        inputs.prop(settings, "prompt", text="", placeholder="a red armchair")
        inputs.prop(settings, "negative_prompt", text="", placeholder="Not (optional)")
        row = inputs.row(align=True)
        row.prop(settings, "seed")
        row.prop(settings, "randomize_seed", text="", icon="FILE_REFRESH")
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
        if status.error:
            draw_problem(layout, context, status)


def draw_problem(layout: bpy.types.UILayout, context: bpy.types.Context, status: properties.GaussianAtlasStatus) -> None:
    """An error with the button that mends it."""
    box = layout.box()
    draw_text(box, context, status.error, icon="ERROR")
    if status.fix_operator:
        box.operator(status.fix_operator, text=status.fix_label)


CLASSES = (GeneratePanel,)
