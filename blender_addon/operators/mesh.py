"""A coloured mesh of the active splat object."""

from __future__ import annotations

from collections.abc import Generator

import bpy
from bpy.props import FloatProperty, IntProperty

from ...generator.errors import Cancelled
from .. import mesh, splat_object
from ..job import Work
from .base import JobOperator
from .generate import select


class ToMeshOperator(JobOperator, bpy.types.Operator):
    """Make a coloured mesh of the active splat object, in its place"""

    bl_idname = "gaussian_atlas.to_mesh"
    bl_label = "Convert to Mesh"
    bl_options = {"REGISTER", "UNDO"}
    job_name = "Conversion"

    resolution: IntProperty(
        name="Resolution",
        description="Cells along the longest side: more is finer, slower, and rougher where splats are sparse",
        default=mesh.DEFAULTS.resolution,
        min=8,
        max=512,
    )
    threshold: FloatProperty(
        name="Threshold",
        description="Opacity at the surface: lower is fatter and has fewer holes",
        default=mesh.DEFAULTS.threshold,
        min=0.01,
        max=0.99,
        subtype="FACTOR",
    )
    fill: IntProperty(
        name="Fill",
        description="The inside is filled; gaps in its walls up to twice as many cells wide count as shut. 0 fills nothing",
        default=mesh.DEFAULTS.fill,
        min=0,
        max=16,
    )
    smooth: IntProperty(name="Smooth", description="Passes of smoothing", default=mesh.DEFAULTS.smooth, min=0, max=100)
    faces: IntProperty(name="Faces", description="Triangles, about, at most; 0 for all", default=mesh.DEFAULTS.faces, min=0)
    keep: FloatProperty(
        name="Smallest Part",
        description="Separate parts with a smaller share of the surface are dropped",
        default=mesh.DEFAULTS.keep,
        min=0.0,
        max=1.0,
        subtype="FACTOR",
    )

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        if not splat_object.is_splats(context.active_object):
            cls.poll_message_set("Select a splat object to convert")
            return False
        return super().poll(context)

    def work(self, context: bpy.types.Context, interactive: bool) -> Work:
        object = context.active_object
        gaussians = splat_object.current(object)
        # By name: the collection may be removed, or undo may replace it, while the work runs.
        self._source = (object.name, object.matrix_world.copy(), context.collection.name)
        self._options = mesh.Options(self.resolution, self.threshold, self.fill, self.smooth, self.faces, self.keep)

        def work(report, cancel):
            def check() -> None:
                if cancel.is_set():
                    raise Cancelled("the conversion was cancelled")

            report("Sampling density")
            return mesh.prepare(gaussians, self._options, check)

        return work

    def finish(self, context: bpy.types.Context, result: mesh.Solid) -> Generator[set[str], None, None]:
        name, matrix, collection = self._source
        made = bpy.data.objects.new(f"{name} mesh", mesh.build(result, name, self._options))
        made.matrix_world = matrix
        # The active collection is none until Blender has noticed that the one before was removed.
        home = bpy.data.collections.get(collection) or context.collection or context.scene.collection
        home.objects.link(made)
        select(context, [made])
        self.report({"INFO"}, f"{made.name}: {len(made.data.polygons):,} faces")
        yield {"FINISHED"}


CLASSES = (ToMeshOperator,)
