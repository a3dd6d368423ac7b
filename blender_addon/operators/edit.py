"""What only an atlas can do with a generated object: vary it, make some of its splats anew, morph it into another."""

from __future__ import annotations

import random
from collections.abc import Generator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import bpy
import numpy as np
from bpy.props import FloatProperty, IntProperty, StringProperty

from ...generator import records
from ...generator.errors import InputError
from .. import edits, extension, generation, properties, splat_object
from ..generation import SEED_MAX, Provenance, Request
from ..splat_object import cells, layout, morph
from .base import JobOperator, Mixin
from .generate import SPACING, NewObjects, select, tell

if TYPE_CHECKING:
    from ...generator.atlas import AtlasLayout
    from ..generation import Generated
    from ..job import Work


def problem_of(object: bpy.types.Object | None) -> str:
    """Why an object cannot be edited as an atlas; "" where it can."""
    if object is None or properties.stored_provenance(object) is None:
        return "The active object was not generated from text"
    if cells.stored(object) is None or not object.gaussian_atlas.layout_id:
        return "The active object does not know its cells: generate it again"
    return ""


def source_of(object: bpy.types.Object) -> tuple[Provenance, edits.Current]:
    """Where an object came from and what it is now.

    Raises:
        InputError: it was not generated, or its splats lost their cells.
    """
    if problem := problem_of(object):
        raise InputError(f"{object.name if object else 'nothing'!r}: {problem[0].lower()}{problem[1:]}")
    provenance, own = properties.stored_provenance(object), cells.stored(object)
    assert provenance is not None and own is not None  # which would be a problem
    return provenance, edits.Current(morph.current(object), own, provenance.low_pass)


class EditOperator(Mixin):
    """Mixin: the settings of an edit, which are those that made the object unless others are given."""

    def request(self, context: bpy.types.Context, provenance: Provenance, edit: edits.Edit, seed: int, count: int) -> Request:
        settings = context.scene.gaussian_atlas
        prompt = self.prompt if self.properties.is_property_set("prompt") else settings.edit_prompt
        own = not prompt.strip()  # a new prompt is not mixed with the old one's second
        return Request(
            prompt=provenance.prompt if own else prompt,
            model=extension.model_folder(context),
            device=extension.device(context),
            negative_prompt=provenance.negative_prompt,
            seed=seed,
            steps=provenance.steps,
            guidance=provenance.guidance,
            count=count,
            mix_prompt=provenance.mix_prompt if own else "",
            mix_weight=provenance.mix_weight if own else 0.5,
            edit=edit,
        )

    def next_seed(self, context: bpy.types.Context, provenance: Provenance, interactive: bool) -> int:
        """The seed given, a random one where the settings ask for it, else the one after the object's: its own would lead back to it."""
        if self.properties.is_property_set("seed"):
            return self.seed
        if interactive and context.scene.gaussian_atlas.randomize_seed:
            return random.randint(0, SEED_MAX)
        return (provenance.seed + 1) % (SEED_MAX + 1)


class VaryOperator(EditOperator, NewObjects, bpy.types.Operator):
    """Make variations of the active object: the noise is put back in part and taken away again"""

    bl_idname = "gaussian_atlas.vary"
    bl_label = "Make Variations"
    bl_options = {"UNDO"}
    job_name = "Variation"

    strength: FloatProperty(name="Strength", default=0.5, min=0.0, max=1.0, subtype="FACTOR")
    seed: IntProperty(name="Seed", min=0, max=SEED_MAX)
    count: IntProperty(name="Variations", default=3, min=1, max=1000)
    prompt: StringProperty(name="Prompt")

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        if problem := problem_of(context.active_object):
            cls.poll_message_set(problem)
            return False
        return super().poll(context)

    def work(self, context: bpy.types.Context, interactive: bool) -> Work:
        settings = context.scene.gaussian_atlas
        object = context.active_object
        provenance, current = source_of(object)
        strength = self.strength if self.properties.is_property_set("strength") else settings.edit_strength
        count = self.count if self.properties.is_property_set("count") else settings.edit_count
        edit = edits.Edit(provenance.as_metadata(), float(f"{strength:.7g}"), current=current)
        request = self.request(context, provenance, edit, self.next_seed(context, provenance, interactive), count)
        self.place_at(object.matrix_world.translation, [(SPACING * (index + 1), 0.0, 0.0) for index in range(count)])
        return partial(generation.generate, request, look=interactive)


class InpaintOperator(EditOperator, JobOperator, bpy.types.Operator):
    """Make the chosen splats of the active object anew; the others stay as they are.
    Chosen are those inside another selected object (an empty or a mesh), else those selected in Edit Mode"""

    bl_idname = "gaussian_atlas.inpaint"
    bl_label = "Regenerate Chosen Splats"
    bl_options = {"UNDO"}
    job_name = "Regeneration"

    strength: FloatProperty(name="Strength", default=1.0, min=0.0, max=1.0, subtype="FACTOR")
    seed: IntProperty(name="Seed", min=0, max=SEED_MAX)
    prompt: StringProperty(name="Prompt")
    volume: StringProperty(name="Volume", description="Name of the object whose box chooses; by default another selected one")

    # Blender evaluates every annotation of an operator: what they name is imported at run time.
    _object = ""
    _provenance: Provenance | None = None

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        object = context.active_object
        problem = problem_of(object)
        # What is changed in a linked object is lost with the session.
        if not problem and (object.library is not None or object.data.library is not None):
            problem = "The active object is linked from another file: make it local to regenerate its splats"
        if not problem and morph.modifier_of(object):
            problem = "A morph has no splats of its own: choose one of its objects"
        if problem:
            cls.poll_message_set(problem)
            return False
        return super().poll(context)

    def work(self, context: bpy.types.Context, interactive: bool) -> Work:
        object = context.active_object
        provenance, current = source_of(object)
        chosen = current.cells[self._chosen(context, object)]
        edit = edits.Edit(provenance.as_metadata(), float(f"{self.strength:.7g}"), np.unique(chosen[chosen >= 0]), current)
        request = self.request(context, provenance, edit, self.next_seed(context, provenance, interactive), 1)
        self._object, self._provenance = object.name, provenance
        return partial(generation.generate, request)

    def finish(self, context: bpy.types.Context, results: list[Generated]) -> Generator[set[str], None, None]:
        (result,) = results
        object = bpy.data.objects.get(self._object)
        of_row = None if object is None else cells.stored(object)
        if of_row is None or properties.stored_provenance(object) != self._provenance:
            raise InputError(f"{self._object!r} was deleted or changed while its splats were made")
        edited = np.zeros(len(result.gaussians), bool)
        edited[edits.Edit.from_json(result.provenance.edit).cells] = True
        rows = np.nonzero((of_row >= 0) & edited[of_row])[0]
        new = splat_object.to_values(result.gaussians, object.name)
        values = layout.extract(object.data)
        for name, column in values.items():
            column[rows] = new[name][of_row[rows]]
        layout.fill(object.data, values)
        properties.store_provenance(object, result.provenance)
        object.update_tag()
        tell(self, results)
        self.report({"INFO"}, f"Made {len(rows):,} of {len(of_row):,} splats of {object.name} anew in {sum(result.seconds.values()):.1f} s")
        yield {"FINISHED"}

    def _chosen(self, context: bpy.types.Context, object: bpy.types.Object) -> np.ndarray:
        """Mask [N] of the splats to make anew."""
        if self.volume:
            volume = bpy.data.objects.get(self.volume)
            if volume is None or volume == object:
                raise InputError(f"there is no other object {self.volume!r} whose box could choose splats")
        else:
            kinds = ("EMPTY", "MESH", "CURVE", "META", "LATTICE")
            volume = next((other for other in context.selected_objects if other != object and other.type in kinds), None)
        if volume is None:
            return cells.selected(object)
        context.view_layer.update()
        return cells.inside(object, volume)


class MorphOperator(bpy.types.Operator):
    """Make an object that turns the other selected object into the active one, by a factor that can be animated"""

    bl_idname = "gaussian_atlas.morph"
    bl_label = "Morph Two Objects"
    bl_options = {"REGISTER", "UNDO"}

    factor: FloatProperty(
        name="Factor",
        description="0 is the other selected object, 1 the active one",
        default=0.5,
        min=0.0,
        max=1.0,
        subtype="FACTOR",
    )

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        if len(_pair(context)) != 2:
            cls.poll_message_set("Select two generated objects; the active one is the end of the morph")
            return False
        return True

    def execute(self, context: bpy.types.Context) -> set[str]:
        from ...generator.atlas import in_cells

        pair = _pair(context)
        try:
            ends, sources = [], []
            for object in pair:
                provenance, current = source_of(object)
                sources.append(provenance)
                ends.append(current)
            if sources[0].layout_id != sources[1].layout_id:
                raise InputError("the two objects were made by models of different layouts: their splats do not correspond")
            table = _layout_of(sources[0].layout_id)
            import torch

            first, second = (in_cells(end.gaussians, torch.from_numpy(end.cells), table) for end in ends)
            name = f"{sources[0].prompt[:25]} to {sources[1].prompt[:25]}"
            object = morph.make(first, second, name, self.factor, context.collection)
        except InputError as error:
            self.report({"ERROR"}, str(error))
            return {"CANCELLED"}
        object.location = context.scene.cursor.location
        record = records.of_morph(*(source.as_metadata() for source in sources))
        properties.store_provenance(object, replace(sources[0], edit=record))
        select(context, [object])
        self.report({"INFO"}, f"Made {object.name}: move its factor to morph, or keyframe it")
        return {"FINISHED"}


def _pair(context: bpy.types.Context) -> list[bpy.types.Object]:
    """The two selected generated objects, the active one last; fewer where there are not two."""
    active = context.active_object
    found = [object for object in context.selected_objects if not problem_of(object)]
    others = [object for object in found if object != active]
    return [others[0], active] if len(found) == 2 and len(others) == 1 else []


def _layout_of(layout_id: str) -> AtlasLayout:
    """The stored layout of an id.

    Raises:
        InputError: none has it: the object belongs to a model with a layout of its own.
    """
    from ...generator.atlas import PROJECTIONS, AtlasLayout

    for projection in PROJECTIONS:
        for size in (32, 64, 128):
            found = AtlasLayout.load_default(size, projection)
            if found.id == layout_id:
                return found
    raise InputError(f"no stored layout has the id {layout_id}: the objects were made by a model with a layout of its own")


CLASSES = (VaryOperator, InpaintOperator, MorphOperator)
