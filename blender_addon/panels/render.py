"""The render settings that splats need."""

from __future__ import annotations

import bpy

from .. import render_settings
from .common import SidebarPanel


class RenderPanel(SidebarPanel, bpy.types.Panel):
    bl_idname = "GAUSSIAN_ATLAS_PT_render"
    bl_label = "Render"
    bl_options = {"DEFAULT_CLOSED"}

    def draw(self, context: bpy.types.Context) -> None:
        layout = self.layout
        changes = render_settings.changes(context.scene)
        if changes:
            column = layout.column(align=True)
            column.label(text="Splats need other settings:", icon="INFO")
            for change in changes:
                column.label(text=str(change))
            layout.operator("gaussian_atlas.render_settings").restore = False
        else:
            layout.label(text="The settings fit splats", icon="CHECKMARK")
        if context.scene.render.engine == "BLENDER_WORKBENCH":
            layout.label(text="Workbench shows splats without colours", icon="INFO")
        if render_settings.stored_values(context.scene):
            layout.operator("gaussian_atlas.render_settings", text="Put Settings Back", icon="LOOP_BACK").restore = True


CLASSES = (RenderPanel,)
