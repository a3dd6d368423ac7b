"""The 3D view's shading: the Solid and the Wireframe mode draw splats without their colours."""

from __future__ import annotations

import bpy


def needed(context: bpy.types.Context) -> bool:
    """Whether the 3D view shows splats without their colours."""
    space = getattr(context, "space_data", None)
    return space is not None and space.type == "VIEW_3D" and space.shading.type in ("SOLID", "WIREFRAME")


class ShowColorsOperator(bpy.types.Operator):
    """Switch this 3D view to the Material Preview, which draws splats in their colours"""

    bl_idname = "gaussian_atlas.show_colors"
    bl_label = "Show Colors"
    bl_options = {"INTERNAL"}

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        return needed(context)

    def execute(self, context: bpy.types.Context) -> set[str]:
        context.space_data.shading.type = "MATERIAL"
        return {"FINISHED"}


CLASSES = (ShowColorsOperator,)
