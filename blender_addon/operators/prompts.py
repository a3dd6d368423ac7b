"""Earlier prompts: choose one, forget them; an example."""

from __future__ import annotations

import random

import bpy
from bpy.props import StringProperty

from ...generator.errors import InputError
from .. import extension, history, service
from .base import clear_error


class UsePromptOperator(bpy.types.Operator):
    """Take this prompt"""

    bl_idname = "gaussian_atlas.use_prompt"
    bl_label = "Use Prompt"
    bl_options = {"INTERNAL", "UNDO"}

    prompt: StringProperty(name="Prompt")

    def execute(self, context: bpy.types.Context) -> set[str]:
        context.scene.gaussian_atlas.prompt = self.prompt
        return {"FINISHED"}


class ExamplePromptOperator(bpy.types.Operator):
    """Write one of the objects that the model was trained on into the prompt"""

    bl_idname = "gaussian_atlas.example_prompt"
    bl_label = "Example Prompt"
    bl_options = {"INTERNAL", "UNDO"}

    def execute(self, context: bpy.types.Context) -> set[str]:
        try:
            vocabulary = service.describe(extension.model_folder(context)).vocabulary
        except InputError:
            vocabulary = ()
        context.scene.gaussian_atlas.prompt = f"a {random.choice(vocabulary)}" if vocabulary else "a red armchair"
        clear_error(context)
        return {"FINISHED"}


class ClearPromptsOperator(bpy.types.Operator):
    """Forget all earlier prompts"""

    bl_idname = "gaussian_atlas.clear_prompts"
    bl_label = "Forget Earlier Prompts"
    bl_options = {"INTERNAL"}

    def execute(self, context: bpy.types.Context) -> set[str]:
        try:
            history.clear_prompts(extension.history_file())
        except InputError as error:
            self.report({"ERROR"}, str(error))
            return {"CANCELLED"}
        return {"FINISHED"}


CLASSES = (UsePromptOperator, ExamplePromptOperator, ClearPromptsOperator)
