"""The active splat object: where it came from and how it is shown."""

from __future__ import annotations

import bpy

from .. import properties, splat_object
from ..operators import show_colors
from ..splat_object import inputs, node_group
from .common import SidebarPanel


class ObjectPanel(SidebarPanel, bpy.types.Panel):
    bl_idname = "GAUSSIAN_ATLAS_PT_object"
    bl_label = "Splat Object"

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        return splat_object.is_splats(context.active_object)

    def draw(self, context: bpy.types.Context) -> None:
        layout = self.layout
        object = context.active_object
        layout.label(text=f"{len(object.data.points):,} Gaussians", icon="OUTLINER_OB_POINTCLOUD")
        if show_colors.needed(context):
            layout.operator("gaussian_atlas.show_colors", icon="SHADING_TEXTURE")
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
        layout.operator("gaussian_atlas.to_mesh", icon="MESH_DATA")
        layout.operator("gaussian_atlas.export_splats", icon="EXPORT")


class DisplayPanel(SidebarPanel, bpy.types.Panel):
    """Every input of the object's modifier, as it is grouped there."""

    bl_idname = "GAUSSIAN_ATLAS_PT_display"
    bl_label = "Display"
    bl_parent_id = "GAUSSIAN_ATLAS_PT_object"
    bl_options = {"DEFAULT_CLOSED"}

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        object = context.active_object
        return splat_object.is_splats(object) and node_group.modifier_of(object) is not None

    def draw(self, context: bpy.types.Context) -> None:
        modifier = node_group.modifier_of(context.active_object)
        columns = {}
        for entry in inputs.TABLE:
            if not inputs.has(modifier, entry.name):
                continue
            if entry.panel not in columns:
                columns[entry.panel] = self.layout.column(align=True)
                columns[entry.panel].label(text=entry.panel)
            column, (owner, place) = columns[entry.panel], inputs.place(modifier, entry.name)
            if entry.name == inputs.CROP_BOX:
                row = column.row(align=True)
                row.prop_search(owner, place, bpy.data, "objects", text=entry.name)
                row.operator("gaussian_atlas.add_crop_box", text="", icon="ADD")
            else:
                column.prop(owner, place, text=entry.name)


CLASSES = (ObjectPanel, DisplayPanel)
