"""Import and export of splat files, and their entries in the File menu."""

from __future__ import annotations

import logging
import warnings
from math import isqrt
from pathlib import Path

import bpy
from bpy.props import BoolProperty, CollectionProperty, EnumProperty, StringProperty
from bpy_extras.io_utils import ExportHelper, ImportHelper

from ...generator.errors import InputError, WorkError
from .. import properties, splat_object
from ..job import one_line
from ..splat_object import cells
from .generate import select

log = logging.getLogger(__name__)

_SUFFIXES = (".ply", ".splat", ".spz")
_GLOB = ";".join(f"*{suffix}" for suffix in _SUFFIXES)
_UP_AXES = [
    ("Z", "Z Up", "Blender's axes, as files of this extension have unless others are chosen"),
    ("-Y", "Y Down", "A camera's axes, as most reconstructions from photographs have and most splat viewers show upright"),
    ("Y", "Y Up", "glTF's axes"),
]
_STATED = ("STATED", "As Stated", "What the file states, as a .ply of this extension does; else Blender's axes")


class ImportSplatsOperator(bpy.types.Operator, ImportHelper):
    """Import 3D Gaussians from .ply, .splat or .spz files"""

    bl_idname = "gaussian_atlas.import_splats"
    bl_label = "Import Gaussian Splats"
    bl_options = {"REGISTER", "UNDO"}

    filename_ext = ".ply"
    filter_glob: StringProperty(default=_GLOB, options={"HIDDEN"})
    files: CollectionProperty(type=bpy.types.OperatorFileListElement, options={"HIDDEN", "SKIP_SAVE"})
    directory: StringProperty(subtype="DIR_PATH", options={"HIDDEN", "SKIP_SAVE"})
    up_axis: EnumProperty(
        name="Up Axis", description="The axes of the file; the object is turned, its data stay as they are", items=[_STATED, *_UP_AXES]
    )

    def invoke(self, context: bpy.types.Context, event: bpy.types.Event) -> set[str]:
        # Files dropped into a window come with their names: ask for the axes alone.
        return self.invoke_popup(context)

    def execute(self, context: bpy.types.Context) -> set[str]:
        paths = [Path(bpy.path.abspath(self.directory)) / file.name for file in self.files if file.name]
        paths = paths or [Path(bpy.path.abspath(self.filepath))]
        objects, errors, total = [], [], 0
        for path in paths:
            try:
                object, notes = self._read(context, path)
            except Exception as error:  # the next file may well be read
                if not isinstance(error, (InputError, WorkError)):
                    log.exception("%s failed", path)
                errors.append(str(error) if isinstance(error, (InputError, WorkError)) else f"{path}: {one_line(error)}")
                continue
            objects.append(object)
            total += len(object.data.points)
            for note in notes:
                self.report({"WARNING"}, _text(note))
        # An error is raised in scripts: it stands for nothing having been imported.
        for line in errors:
            self.report({"WARNING"} if objects else {"ERROR"}, _text(line))
        if not objects:
            return {"CANCELLED"}
        select(context, objects)
        what = objects[0].name if len(objects) == 1 else f"{len(objects)} of {len(paths)} files"
        self.report({"INFO"}, f"Imported {what}: {total:,} Gaussians")
        return {"FINISHED"}

    def _read(self, context: bpy.types.Context, path: Path) -> tuple[bpy.types.Object, list[str]]:
        """The object of a file, and what was left out of it."""
        from ...generator import formats
        from ...generator.formats.raw import RowsDropped

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            gaussians = formats.load(path, up="Z")
        notes = [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]
        # All is read before anything is made: a file that fails leaves no object.
        up = formats.stated_up(path) if self.up_axis == "STATED" else self.up_axis
        try:
            provenance = properties.provenance_from_metadata(formats.load_metadata(path))
        except InputError as error:
            provenance = None
            notes.append(f"{path}: {error}")
        object = splat_object.write(gaussians, _text(path.stem), context.collection)
        object.rotation_euler.x = formats.axes.angle(up)
        object.gaussian_atlas.file = _text(path)
        if provenance:
            properties.store_provenance(object, provenance)
            # Row i is cell i only of a whole atlas, which is square.
            whole = isqrt(len(gaussians)) ** 2 == len(gaussians) and not any(issubclass(w.category, RowsDropped) for w in caught)
            if provenance.layout_id and up == "Z" and whole:
                cells.number(object)
        return object, notes


def _text(value: object) -> str:
    """What Blender takes as text: the name of a file need not be any."""
    return str(value).encode(errors="replace").decode()


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
    up_axis: EnumProperty(name="Up Axis", description="The axes of the file; the splats are turned to them", items=_UP_AXES)
    spz_version: EnumProperty(
        name="SPZ Version",
        description="Of a .spz file",
        items=[
            ("2", "2", "Read by the most programs; rotations are kept to about a degree"),
            ("3", "3", "Rotations are kept to a quarter of a degree"),
            ("4", "4", "As 3, smaller; read by programs of 2026 and later"),
        ],
    )

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        if not splat_object.is_splats(context.active_object):
            cls.poll_message_set("Select a splat object to export")
            return False
        return True

    def invoke(self, context: bpy.types.Context, event: bpy.types.Event) -> set[str]:
        if not self.filepath:
            self.filepath: str = bpy.path.clean_name(context.active_object.name) + self.filename_ext
        return ExportHelper.invoke(self, context, event)

    def execute(self, context: bpy.types.Context) -> set[str]:
        from ...generator import formats

        object = context.active_object
        path = Path(bpy.path.abspath(self.filepath))
        try:
            gaussians = splat_object.current(object, world=self.apply_transform)
            metadata = properties.metadata(object, moved=self.apply_transform)
            formats.save(gaussians, path, metadata=metadata, up=self.up_axis, spz_version=int(self.spz_version))
        except (InputError, WorkError) as error:
            self.report({"ERROR"}, str(error))
            return {"CANCELLED"}
        self.report({"INFO"}, f"Exported {len(gaussians):,} Gaussians to {path}")
        return {"FINISHED"}


class SplatFileHandler(bpy.types.FileHandler):
    """Splat files dropped into a 3D view or the outliner"""

    bl_idname = "GAUSSIAN_ATLAS_FH_splats"
    bl_label = "Gaussian Splats"
    bl_import_operator = ImportSplatsOperator.bl_idname
    bl_export_operator = ExportSplatsOperator.bl_idname
    bl_file_extensions = ";".join(_SUFFIXES)

    @classmethod
    def poll_drop(cls, context: bpy.types.Context) -> bool:
        return context.area is not None and context.area.type in {"VIEW_3D", "OUTLINER"}


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


CLASSES = (ImportSplatsOperator, ExportSplatsOperator, SplatFileHandler)
