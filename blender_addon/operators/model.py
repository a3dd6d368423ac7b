"""The model: install, choose, remove, give its memory back; the device."""

from __future__ import annotations

from collections.abc import Generator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import bpy
from bpy.props import BoolProperty, StringProperty
from bpy_extras.io_utils import ImportHelper

from ...generator.errors import InputError
from .. import extension, models, service
from .base import JobOperator, clear_error, redraw, running

if TYPE_CHECKING:
    from ..job import Work
    from ..models import Installed


class InstallModelOperator(JobOperator, bpy.types.Operator):
    """Install a model from a folder, a zip or, where Blender may go online, the hub, and choose it"""

    bl_idname = "gaussian_atlas.install_model"
    bl_label = "Install Model"

    job_name = "Installation"

    filepath: StringProperty(name="Source", description="A folder, a zip, or the id of a model on the hub: owner/name")
    choose: BoolProperty(name="Choose", description="Generate with it from now on", default=True)

    def work(self, context: bpy.types.Context, interactive: bool) -> Work:
        source = bpy.path.abspath(self.filepath) if self.filepath.startswith("//") else self.filepath
        return partial(models.install, source, extension.models_folder(), online=bpy.app.online_access)

    def finish(self, context: bpy.types.Context, model: Installed) -> Generator[set[str], None, None]:
        if self.choose:
            _choose(context, str(model.folder))
        self.report({"INFO"}, f"Installed {model.info.title}")
        yield {"FINISHED"}


class InstallModelFileOperator(bpy.types.Operator, ImportHelper):
    """Choose a zip, or a folder by its bundle.json, and install the model in it"""

    bl_idname = "gaussian_atlas.install_model_file"
    bl_label = "Install from Disk"
    bl_options = {"INTERNAL"}

    filter_glob: StringProperty(default="*.zip;bundle.json", options={"HIDDEN"})

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        return InstallModelOperator.poll(context)

    def execute(self, context: bpy.types.Context) -> set[str]:
        path = Path(self.filepath)
        bpy.ops.gaussian_atlas.install_model("INVOKE_DEFAULT", filepath=str(path.parent if path.name == models.BUNDLE else path))
        return {"FINISHED"}


class InstallModelHubOperator(bpy.types.Operator):
    """Download a model from the Hugging Face hub and install it"""

    bl_idname = "gaussian_atlas.install_model_hub"
    bl_label = "Install from Hub"
    bl_options = {"INTERNAL"}

    model_id: StringProperty(name="Model", description="owner/name")

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        if not bpy.app.online_access:
            cls.poll_message_set("Blender may not go online: see Preferences, System, Network")
            return False
        return InstallModelOperator.poll(context)

    def invoke(self, context: bpy.types.Context, event: bpy.types.Event) -> set[str]:
        return context.window_manager.invoke_props_dialog(self)

    def execute(self, context: bpy.types.Context) -> set[str]:
        bpy.ops.gaussian_atlas.install_model("INVOKE_DEFAULT", filepath=self.model_id)
        return {"FINISHED"}


class RemoveModelOperator(bpy.types.Operator):
    """Delete an installed model from this computer"""

    bl_idname = "gaussian_atlas.remove_model"
    bl_label = "Remove Model"

    name: StringProperty(name="Name", description="As the list of installed models names it")

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        return InstallModelOperator.poll(context)

    def invoke(self, context: bpy.types.Context, event: bpy.types.Event) -> set[str]:
        return context.window_manager.invoke_confirm(self, event)

    def execute(self, context: bpy.types.Context) -> set[str]:
        folder = extension.models_folder() / self.name
        if service.is_loaded(folder):
            service.unload()
        try:
            models.remove(self.name, extension.models_folder())
        except InputError as error:
            self.report({"ERROR"}, str(error))
            return {"CANCELLED"}
        if extension.model_folder(context) == folder:
            _choose(context, "")
        self.report({"INFO"}, f"Removed {self.name}")
        return {"FINISHED"}


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
        clear_error(context)
        return {"FINISHED"}


class UseStarterModelOperator(bpy.types.Operator):
    """Choose the starter model that comes with the extension"""

    bl_idname = "gaussian_atlas.use_starter_model"
    bl_label = "Use the Starter Model"
    bl_options = {"INTERNAL"}

    def execute(self, context: bpy.types.Context) -> set[str]:
        _choose(context, "")
        clear_error(context)
        return {"FINISHED"}


class UseCpuOperator(bpy.types.Operator):
    """Generate on the processor from now on"""

    bl_idname = "gaussian_atlas.use_cpu"
    bl_label = "Use the CPU"
    bl_options = {"INTERNAL"}

    def execute(self, context: bpy.types.Context) -> set[str]:
        context.preferences.addons[extension.PACKAGE].preferences.device = "cpu"
        context.preferences.is_dirty = True
        clear_error(context)
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


class OpenNetworkPreferencesOperator(bpy.types.Operator):
    """Open Blender's own preferences where online access is allowed"""

    bl_idname = "gaussian_atlas.open_network_preferences"
    bl_label = "Open Network Preferences"
    bl_options = {"INTERNAL"}

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        return not bpy.app.background

    def execute(self, context: bpy.types.Context) -> set[str]:
        return bpy.ops.screen.userpref_show(section="SYSTEM")


def _choose(context: bpy.types.Context, path: str) -> None:
    context.preferences.addons[extension.PACKAGE].preferences.model_path = path
    context.preferences.is_dirty = True  # so that Blender saves it as it saves what is typed
    redraw(context)


CLASSES = (
    InstallModelOperator,
    InstallModelFileOperator,
    InstallModelHubOperator,
    RemoveModelOperator,
    UnloadModelOperator,
    UseStarterModelOperator,
    UseCpuOperator,
    OpenPreferencesOperator,
    OpenNetworkPreferencesOperator,
)
