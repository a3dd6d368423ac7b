"""Import and export of splat files, and their entries in the File menu."""

from __future__ import annotations

from math import radians
from pathlib import Path

import bpy
from bpy.props import BoolProperty, EnumProperty, StringProperty
from bpy_extras.io_utils import ExportHelper, ImportHelper

from ...generator.errors import InputError, WorkError
from .. import properties, splat_object
from .generate import select

_GLOB = "*.ply;*.splat;*.spz"
# Splat programs that reconstruct from photographs mostly keep the first camera's axes: Y down, Z forward.
_UP_AXES = [
    ("Z", "Z Up", "The file uses Blender's axes, as files of this extension do"),
    ("-Y", "Y Down", "The file uses a camera's axes, as most reconstructions from photographs do"),
    ("Y", "Y Up", "The file uses glTF's axes"),
]
_TURNS = {"Z": 0.0, "-Y": radians(-90), "Y": radians(90)}


class ImportSplatsOperator(bpy.types.Operator, ImportHelper):
    """Import 3D Gaussians from a .ply, .splat or .spz file"""

    bl_idname = "gaussian_atlas.import_splats"
    bl_label = "Import Gaussian Splats"
    bl_options = {"REGISTER", "UNDO"}

    filename_ext = ".ply"
    filter_glob: StringProperty(default=_GLOB, options={"HIDDEN"})
    up_axis: EnumProperty(
        name="Up Axis", description="The axes of the file; the object is turned, its data stay as they are", items=_UP_AXES
    )

    def execute(self, context: bpy.types.Context) -> set[str]:
        from ...generator import formats

        path = Path(bpy.path.abspath(self.filepath))
        try:
            gaussians = formats.load(path)
            object = splat_object.write(gaussians, path.stem, context.collection)
            provenance = properties.provenance_from_metadata(formats.load_metadata(path))
        except (InputError, WorkError) as error:
            self.report({"ERROR"}, str(error))
            return {"CANCELLED"}
        object.rotation_euler.x = _TURNS[self.up_axis]
        object.gaussian_atlas.file = str(path)
        if provenance:
            properties.store_provenance(object, provenance)
        select(context, [object])
        self.report({"INFO"}, f"Imported {object.name}: {len(gaussians):,} Gaussians")
        return {"FINISHED"}


class ExportSplatsOperator(bpy.types.Operator, ExportHelper):
    """Export the active splat object as a .ply, .splat or .spz file"""

    bl_idname = "gaussian_atlas.export_splats"
    bl_label = "Export Gaussian Splats"

    filename_ext = ".ply"
    check_extension = None  # the suffix chooses the format
    filter_glob: StringProperty(default=_GLOB, options={"HIDDEN"})
    apply_transform: BoolProperty(
        name="Apply Transform",
        description="Write the splats where they stand in the world instead of in the object's own frame",
        default=False,
    )

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        if not splat_object.is_splats(context.active_object):
            cls.poll_message_set("Select a splat object to export")
            return False
        return True

    def invoke(self, context: bpy.types.Context, event: bpy.types.Event) -> set[str]:
        if not self.filepath:
            self.filepath = bpy.path.clean_name(context.active_object.name) + self.filename_ext
        return ExportHelper.invoke(self, context, event)

    def execute(self, context: bpy.types.Context) -> set[str]:
        from ...generator import formats

        object = context.active_object
        path = Path(bpy.path.abspath(self.filepath))
        provenance = properties.stored_provenance(object)
        try:
            gaussians = splat_object.read(object, world=self.apply_transform)
            formats.save(gaussians, path, metadata=provenance.as_metadata() if provenance else None)
        except (InputError, WorkError) as error:
            self.report({"ERROR"}, str(error))
            return {"CANCELLED"}
        self.report({"INFO"}, f"Exported {len(gaussians):,} Gaussians to {path}")
        return {"FINISHED"}


def _draw_import(self: bpy.types.Menu, context: bpy.types.Context) -> None:
    self.layout.operator(ImportSplatsOperator.bl_idname, text="Gaussian Splats (.ply/.splat/.spz)")


def _draw_export(self: bpy.types.Menu, context: bpy.types.Context) -> None:
    self.layout.operator(ExportSplatsOperator.bl_idname, text="Gaussian Splats (.ply/.splat/.spz)")


def add_to_menus() -> None:
    """Put both operators into the File menu."""
    bpy.types.TOPBAR_MT_file_import.append(_draw_import)
    bpy.types.TOPBAR_MT_file_export.append(_draw_export)


def remove_from_menus() -> None:
    """Take both operators out of the File menu."""
    bpy.types.TOPBAR_MT_file_import.remove(_draw_import)
    bpy.types.TOPBAR_MT_file_export.remove(_draw_export)


CLASSES = (ImportSplatsOperator, ExportSplatsOperator)
