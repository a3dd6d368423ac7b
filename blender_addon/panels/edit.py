"""Variations, regenerated splats and morphs of the selected objects."""

from __future__ import annotations

import bpy

from ...generator import records
from ..operators.edit import problem_of
from ..splat_object import inputs, morph
from .common import SidebarPanel


class EditPanel(SidebarPanel, bpy.types.Panel):
    bl_idname = "GAUSSIAN_ATLAS_PT_edit"
    bl_label = "Variations and Edits"

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        return not problem_of(context.active_object)

    def draw(self, context: bpy.types.Context) -> None:
        layout = self.layout
        settings = context.scene.gaussian_atlas
        object = context.active_object
        if described := records.describe(object.gaussian_atlas.edit):
            layout.label(text=described)
        modifier = morph.modifier_of(object)
        if modifier:
            layout.prop(*inputs.place(modifier, morph.FACTOR), text="Morph")
        own = object.gaussian_atlas.prompt
        column = layout.column(align=True)
        column.prop(settings, "edit_prompt", text="", placeholder=own)
        column.prop(settings, "edit_strength")
        column.prop(settings, "edit_count")
        column.operator("gaussian_atlas.vary", icon="DUPLICATE")
        layout.operator("gaussian_atlas.inpaint", icon="BRUSH_DATA")
        layout.operator("gaussian_atlas.morph", icon="MOD_SIMPLEDEFORM")


CLASSES = (EditPanel,)
