"""The button that adapts the scene's render settings to splats, and puts them back."""

from __future__ import annotations

import bpy
from bpy.props import BoolProperty

from .. import render_settings


class RenderSettingsOperator(bpy.types.Operator):
    """Set the transparent bounces, the view transform and the smoothing that splats need. The old values are kept and can be put back"""

    bl_idname = "gaussian_atlas.render_settings"
    bl_label = "Adapt Render Settings"
    bl_options = {"REGISTER", "UNDO"}

    restore: BoolProperty(name="Put Back", description="Put back the values from before", default=False)

    @classmethod
    def description(cls, context: bpy.types.Context, properties: bpy.types.OperatorProperties) -> str:
        if properties.restore:
            return "Put back the render settings from before they were adapted to splats"
        changes = render_settings.changes(context.scene)
        return "\n".join(["Set what splats need; the old values are kept:", *map(str, changes)]) if changes else "Nothing to change"

    def execute(self, context: bpy.types.Context) -> set[str]:
        changes, refused = render_settings.restore(context.scene) if self.restore else (render_settings.apply(context.scene), [])
        for change in changes:
            self.report({"INFO"}, str(change))
        for line in refused:
            self.report({"WARNING"}, line)
        if not changes and not refused:
            self.report({"INFO"}, "Render settings: nothing to change")
        return {"FINISHED"}


CLASSES = (RenderSettingsOperator,)
