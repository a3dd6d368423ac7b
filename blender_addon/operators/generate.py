"""Generate from text: in a worker thread from the user interface, in one go from scripts and in background."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from math import ceil, sqrt
from typing import TYPE_CHECKING

import bpy
from bpy.props import FloatProperty, IntProperty, StringProperty

from ...generator import records
from ...generator.errors import InputError
from .. import edits, extension, generation, history, overlay, properties, splat_object
from ..generation import SEED_MAX, Request
from ..splat_object import cells
from .base import JobOperator

if TYPE_CHECKING:
    from ..generation import Generated
    from ..job import Progress, Work

log = logging.getLogger(__name__)

# Generated objects stand in a grid, a little more than their longest side (1) apart.
SPACING = 1.25


def grid_offsets(count: int) -> list[tuple[float, float, float]]:
    """Where the objects of a run stand from its origin, in Blender units: rows along X, as many as columns or one fewer,
    each further back (+Y), so that from the front the first object is at the left of the nearest row."""
    columns = ceil(sqrt(count))
    return [(SPACING * (index % columns), SPACING * (index // columns), 0.0) for index in range(count)]


def place(
    context: bpy.types.Context, results: Sequence[Generated], offsets: Sequence[Sequence[float]], origin: Sequence[float]
) -> Iterator[bpy.types.Object]:
    """Make one object after another, each at its offset from `origin`, with its provenance."""
    for result, offset in zip(results, offsets, strict=False):
        # Blender cuts names at 63 bytes (255 from 5.0); the prompt is kept whole in the provenance.
        object = splat_object.write(result.gaussians, result.provenance.prompt[:50], context.collection)
        object.location = [a + b for a, b in zip(origin, offset, strict=True)]
        properties.store_provenance(object, result.provenance)
        cells.number(object)
        yield object


def select(context: bpy.types.Context, objects: list[bpy.types.Object]) -> None:
    """Select just these objects, the last one active; leaves everything alone while another object is being edited."""
    if context.mode != "OBJECT" or not objects:
        return
    layer = context.view_layer
    for other in layer.objects.selected:
        other.select_set(False, view_layer=layer)
    # A new object is no part of the layer yet where its collection is excluded from it.
    shown = [object for object in objects if object.name in layer.objects]
    for object in shown:
        object.select_set(True, view_layer=layer)
    if shown:
        layer.objects.active = shown[-1]


def tell(operator: bpy.types.Operator, results: Sequence[Generated]) -> None:
    """Report what a person should know of these results, each thing once."""
    for note in dict.fromkeys(note for result in results for note in result.notes):
        operator.report({"WARNING"}, note)


class NewObjects(JobOperator):
    """Mixin for operators that make objects: seen while they are sampled, then placed and selected."""

    # Blender evaluates every annotation of an operator: what they name is imported at run time.
    _done: Sequence[generation.Generated] = ()  # the run's objects so far
    _origin: Sequence[float] = (0.0, 0.0, 0.0)  # where the run stands, Blender units
    _offsets: Sequence[Sequence[float]] = ()  # of each object from there
    _request: Request | None = None  # what runs, where it runs in a thread: what it teaches is kept

    def place_at(self, origin: Sequence[float], offsets: list[tuple[float, float, float]]) -> None:
        """Begin a run; `work` calls it."""
        self._done, self._origin, self._offsets = (), tuple(origin), offsets

    def show(self, context: bpy.types.Context, progress: list[Progress]) -> None:
        # Of each object only the last look that has arrived.
        for preview in {news.preview.index: news.preview for news in progress if news.preview}.values():
            overlay.show(context.scene, preview, [a + b for a, b in zip(self._origin, self._offsets[preview.index], strict=True)])
            if preview.result:
                self._done = [*self._done, preview.result]

    def drop(self, context: bpy.types.Context) -> None:
        overlay.clear()

    def salvage(self, context: bpy.types.Context) -> Sequence[Generated] | None:
        """Objects of a run that were complete before it was stopped: they took their time and stay."""
        return self._done or None

    def finish(self, context: bpy.types.Context, results: Sequence[Generated]) -> Generator[set[str], None, None]:
        names = []
        for object in place(context, results, self._offsets, self._origin):
            names.append(object.name)
            yield {"PASS_THROUGH"}
        if self._request:
            for result in results:
                key = history.speed_key(result.provenance.model_hash, self._request.device)
                _remember(history.add_speed, key, self._request.steps, self._request.guidance > 1, result.seconds)
        # By name: between two of them the user may have undone or deleted the first.
        select(context, [bpy.data.objects[name] for name in names if name in bpy.data.objects])
        count = sum(len(result.gaussians) for result in results)
        seconds = sum(sum(result.seconds.values()) for result in results)
        tell(self, results)
        self.report({"INFO"}, f"Generated {', '.join(names)}: {count:,} Gaussians in {seconds:.1f} s")
        yield {"FINISHED"}


class GenerateOperator(NewObjects, bpy.types.Operator):
    """Generate 3D Gaussians from a prompt. What is not given is taken from the scene's settings"""

    bl_idname = "gaussian_atlas.generate"
    bl_label = "Generate from Text"
    # Without REGISTER: the redo panel would run the whole generation again, blocking, at every change of a value.
    bl_options = {"UNDO"}

    prompt: StringProperty(name="Prompt")
    negative_prompt: StringProperty(name="Negative Prompt")
    seed: IntProperty(name="Seed", min=0, max=SEED_MAX)
    steps: IntProperty(name="Steps", default=20, min=1, max=1000)
    guidance: FloatProperty(name="Guidance", default=2.0, min=0.0, max=30.0)
    count: IntProperty(name="Count", default=1, min=1, max=1000)
    mix_prompt: StringProperty(name="Mix With")
    mix_weight: FloatProperty(name="Weight", default=0.5, min=0.0, max=1.0)
    edit: StringProperty(name="Edit", options={"HIDDEN", "SKIP_SAVE"}, description="The edit to make again, as an object remembers it")

    def work(self, context: bpy.types.Context, interactive: bool) -> Work:
        settings = context.scene.gaussian_atlas
        if interactive and settings.randomize_seed and not self.properties.is_property_set("seed"):
            settings.seed = random.randint(0, SEED_MAX)
        for name in ("prompt", "negative_prompt", "seed", "steps", "guidance", "count", "mix_prompt", "mix_weight"):
            if not self.properties.is_property_set(name):
                setattr(self, name, getattr(settings, name))
        request = Request(
            prompt=self.prompt,
            negative_prompt=self.negative_prompt,
            seed=self.seed,
            steps=self.steps,
            # Blender keeps single precision: 3.7 would come back as 3.700000047683716.
            guidance=float(f"{self.guidance:.7g}"),
            count=self.count,
            model=extension.model_folder(context),
            device=extension.device(context),
            mix_prompt=self.mix_prompt,
            mix_weight=float(f"{self.mix_weight:.7g}"),
            edit=edits.Edit.from_json(self.edit) if self.edit else None,
        )
        self.place_at(context.scene.cursor.location, grid_offsets(self.count))
        # A mix or an edit takes another time.
        self._request = request if interactive and not (request.mix_prompt or request.edit) else None
        if interactive and context.preferences.addons[extension.PACKAGE].preferences.remember_prompts:
            _remember(history.add_prompt, request.prompt)
        return partial(generation.generate, request, look=interactive)


class RandomSeedOperator(bpy.types.Operator):
    """Draw a new seed"""

    bl_idname = "gaussian_atlas.random_seed"
    bl_label = "New Seed"
    bl_options = {"INTERNAL", "UNDO"}

    def execute(self, context: bpy.types.Context) -> set[str]:
        context.scene.gaussian_atlas.seed = random.randint(0, SEED_MAX)
        return {"FINISHED"}


class RegenerateOperator(bpy.types.Operator):
    """Take the active object's prompt, seed, steps and guidance into the settings and generate it again"""

    bl_idname = "gaussian_atlas.regenerate"
    bl_label = "Regenerate"
    bl_options = {"INTERNAL"}

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        object = context.active_object
        if object is None or properties.stored_provenance(object) is None:
            cls.poll_message_set("The active object was not generated from text")
            return False
        if records.parse(object.gaussian_atlas.edit).get("kind") == records.MORPH:
            cls.poll_message_set("A morph is made of two objects: generate those again")
            return False
        return GenerateOperator.poll(context)

    def execute(self, context: bpy.types.Context) -> set[str]:
        return bpy.ops.gaussian_atlas.generate("EXEC_DEFAULT", True, **self._arguments(context))

    def invoke(self, context: bpy.types.Context, event: bpy.types.Event) -> set[str]:
        bpy.ops.gaussian_atlas.generate("INVOKE_DEFAULT", True, **self._arguments(context))
        return {"FINISHED"}

    def _arguments(self, context: bpy.types.Context) -> dict:
        provenance = properties.stored_provenance(context.active_object)
        assert provenance is not None  # says poll
        arguments = {name: getattr(provenance, name) for name in ("prompt", "negative_prompt", "seed", "steps", "guidance")}
        settings = context.scene.gaussian_atlas
        settings.randomize_seed = False
        for name, value in arguments.items():
            setattr(settings, name, value)
        settings.mix_prompt, settings.mix_weight = provenance.mix_prompt, provenance.mix_weight
        return arguments | {"count": 1, "mix_prompt": provenance.mix_prompt, "mix_weight": provenance.mix_weight, "edit": provenance.edit}


def _remember(change: Callable[..., None], *arguments: object) -> None:
    """Write to the history; that it cannot be written is no reason not to generate."""
    try:
        change(extension.history_file(), *arguments)
    except InputError as error:
        log.warning("%s", error)


CLASSES = (GenerateOperator, RandomSeedOperator, RegenerateOperator)
