"""The "Gaussian Atlas" tab of the 3D view's sidebar."""

from __future__ import annotations

import textwrap

import bpy

from ..generator.errors import InputError
from . import extension, properties, render_settings, service, splat_object
from .splat_object import node_group


class _Panel:
    bl_space_type = "VIEW_3D"
    bl_region_type = "UI"
    bl_category = "Gaussian Atlas"


class GeneratePanel(_Panel, bpy.types.Panel):
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


class ObjectPanel(_Panel, bpy.types.Panel):
    bl_idname = "GAUSSIAN_ATLAS_PT_object"
    bl_label = "Splat Object"

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        return splat_object.is_splats(context.active_object)

    def draw(self, context: bpy.types.Context) -> None:
        layout = self.layout
        object = context.active_object
        layout.label(text=f"{len(object.data.points):,} Gaussians", icon="OUTLINER_OB_POINTCLOUD")
        provenance = properties.stored_provenance(object)
        if provenance:
            column = layout.column(align=True)
            column.label(text=f"\u201c{provenance.prompt}\u201d")
            if provenance.negative_prompt:
                column.label(text=f"not \u201c{provenance.negative_prompt}\u201d")
            column.label(text=f"Seed {provenance.seed}, {provenance.steps} steps, guidance {provenance.guidance:g}")
            column.label(text=f"{provenance.model_name} ({provenance.model_hash[:8]}), version {provenance.program_version}")
            layout.operator("gaussian_atlas.regenerate", icon="FILE_REFRESH")
        elif object.gaussian_atlas.file:
            layout.label(text=object.gaussian_atlas.file, icon="FILE")
        modifier = node_group.modifier_of(object)
        if modifier:
            column = layout.column(align=True)
            column.prop(modifier, f'["{node_group.input_key(node_group.SPLAT_SIZE)}"]', text=node_group.SPLAT_SIZE)
            column.prop(
                modifier, f'["{node_group.input_key(node_group.BLEND_IN_DISPLAY_SPACE)}"]', text="Blend in Display Space (Raw View)"
            )
        layout.operator("gaussian_atlas.export_splats", icon="EXPORT")


class RenderPanel(_Panel, bpy.types.Panel):
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
        if render_settings.stored_values(context.scene):
            layout.operator("gaussian_atlas.render_settings", text="Put Settings Back", icon="LOOP_BACK").restore = True


class ModelPanel(_Panel, bpy.types.Panel):
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


def draw_problem(layout: bpy.types.UILayout, context: bpy.types.Context, status: properties.GaussianAtlasStatus) -> None:
    """An error with the button that mends it."""
    box = layout.box()
    draw_text(box, context, status.error, icon="ERROR")
    if status.fix_operator:
        box.operator(status.fix_operator, text=status.fix_label)


def draw_text(layout: bpy.types.UILayout, context: bpy.types.Context, text: str, icon: str) -> None:
    """A text over as many lines as the region's width asks for: labels do not wrap by themselves."""
    scale = context.preferences.system.ui_scale or 1.0  # 0 in background
    width = context.region.width if context.region else 250
    characters = max(20, int(width / (7 * scale)))
    column = layout.column(align=True)
    for index, line in enumerate(textwrap.wrap(text, characters)):
        column.label(text=line, icon=icon if index == 0 else "BLANK1")


CLASSES = (GeneratePanel, ObjectPanel, RenderPanel, ModelPanel)
