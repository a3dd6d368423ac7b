"""The model: give its memory back, choose another."""

from __future__ import annotations

import bpy

from .. import extension, service
from .base import running


class UnloadModelOperator(bpy.types.Operator):
    """Drop the loaded model and give its memory back; the next generation loads it again"""

    bl_idname = "gaussian_atlas.unload_model"
    bl_label = "Unload Model"

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        if running():
            cls.poll_message_set("A generation is using the model")
            return False
        return True

    def execute(self, context: bpy.types.Context) -> set[str]:
        self.report({"INFO"}, "Model unloaded" if service.unload() else "No model was loaded")
        return {"FINISHED"}


class UseStarterModelOperator(bpy.types.Operator):
    """Choose the starter model that comes with the extension"""

    bl_idname = "gaussian_atlas.use_starter_model"
    bl_label = "Use the Starter Model"
    bl_options = {"INTERNAL"}

    def execute(self, context: bpy.types.Context) -> set[str]:
        context.preferences.addons[extension.PACKAGE].preferences.model_path = ""
        return {"FINISHED"}


class OpenPreferencesOperator(bpy.types.Operator):
    """Open this extension's preferences"""

    bl_idname = "gaussian_atlas.open_preferences"
    bl_label = "Open Preferences"
    bl_options = {"INTERNAL"}

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        return not bpy.app.background

    def execute(self, context: bpy.types.Context) -> set[str]:
        return bpy.ops.preferences.addon_show(module=extension.PACKAGE)


CLASSES = (UnloadModelOperator, UseStarterModelOperator, OpenPreferencesOperator)
