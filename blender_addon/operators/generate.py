"""Generate from text: in a worker thread from the user interface, in one go from scripts and in background."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import bpy
from bpy.props import FloatProperty, IntProperty, StringProperty

from ...generator.errors import Cancelled, InputError
from .. import extension, generation, problems, properties, splat_object
from ..generation import SEED_MAX, Request
from ..job import Job, State

if TYPE_CHECKING:
    from ..generation import Generated
    from ..job import Progress

# At most one generation runs in a session; the Cancel operator and the panel look here.
_current: Job | None = None

# Generated objects stand side by side along X, a little more than their longest side (1) apart.
SPACING = 1.25


def running() -> bool:
    """Whether a generation is under way."""
    return _current is not None


def new_job(request: Request) -> Job:
    """The work of a request, to be started or run."""
    return Job(lambda report, cancel: generation.generate(request, report, cancel), name="generation")


def place(context: bpy.types.Context, results: list[Generated], origin: tuple[float, float, float] | None = None) -> list[bpy.types.Object]:
    """Make the objects at the 3D cursor (or at `origin`), with their provenance, and select them."""
    origin = context.scene.cursor.location if origin is None else origin
    objects = []
    for index, result in enumerate(results):
        # Blender cuts names at 63 bytes (255 from 5.0); the prompt is kept whole in the provenance.
        object = splat_object.write(result.gaussians, result.provenance.prompt[:50], context.collection)
        object.location = (origin[0] + index * SPACING, origin[1], origin[2])
        properties.store_provenance(object, result.provenance)
        objects.append(object)
    select(context, objects)
    return objects


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


class GenerateOperator(bpy.types.Operator):
    """Generate 3D Gaussians from a prompt. What is not given is taken from the scene's settings"""

    bl_idname = "gaussian_atlas.generate"
    bl_label = "Generate from Text"
    # Without REGISTER: the redo panel would run the whole generation again, blocking, at every change of a value.
    bl_options = {"UNDO"}

    prompt: StringProperty(name="Prompt")
    negative_prompt: StringProperty(name="Negative Prompt")
    seed: IntProperty(name="Seed", min=0, max=SEED_MAX)
    steps: IntProperty(name="Steps", default=20, min=1, max=1000)
    guidance: FloatProperty(name="Guidance", default=3.5, min=0.0, max=30.0)
    count: IntProperty(name="Count", default=1, min=1, max=1000)

    _timer: bpy.types.Timer | None = None
    _job: Job | None = None

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        if running():
            cls.poll_message_set("A generation is running")
            return False
        return True

    def execute(self, context: bpy.types.Context) -> set[str]:
        """Generate and wait for it: for scripts and background mode."""
        clear_error(context)
        try:
            self._fill_in(context)
            results = new_job(self._request(context)).run()
        except Cancelled as cancelled:
            self.report({"INFO"}, str(cancelled))
            return {"CANCELLED"}
        except Exception as error:  # reported to the user in one line; Job has logged the traceback
            return self._fail(context, error)
        return self._finish(context, results)

    def invoke(self, context: bpy.types.Context, event: bpy.types.Event) -> set[str]:
        """Generate in a worker thread; the user interface stays free."""
        global _current
        clear_error(context)
        settings = context.scene.gaussian_atlas
        if settings.randomize_seed and not self.properties.is_property_set("seed"):
            settings.seed = random.randint(0, SEED_MAX)
        try:
            self._fill_in(context)
            self._job = _current = new_job(self._request(context)).start()
        except InputError as error:
            return self._fail(context, error)
        show_progress(context, "Starting", 0.0)
        manager = context.window_manager
        self._timer = manager.event_timer_add(0.1, window=context.window)
        manager.modal_handler_add(self)
        return {"RUNNING_MODAL"}

    def modal(self, context: bpy.types.Context, event: bpy.types.Event) -> set[str]:
        if event.type == "ESC" and event.value == "PRESS":
            cancel_running()
            return {"RUNNING_MODAL"}
        if event.type != "TIMER":
            return {"PASS_THROUGH"}
        progress = self._job.poll()
        if progress:
            self._show(context, progress[-1])
        elif self._job.cancelling:
            show_progress(context, "Cancelling", context.window_manager.gaussian_atlas.fraction)
        if not self._job.ended:
            return {"PASS_THROUGH"}
        job = self._job
        self._end(context)
        if job.state is State.DONE:
            return self._finish(context, job.result)
        if job.state is State.FAILED:
            return self._fail(context, job.error)
        self.report({"INFO"}, "Generation cancelled")
        return {"CANCELLED"}

    def cancel(self, context: bpy.types.Context) -> None:
        """Blender ends the operator: another file is opened, or the window closes."""
        if self._job:
            self._job.cancel()
        self._end(context)

    def _fill_in(self, context: bpy.types.Context) -> None:
        settings = context.scene.gaussian_atlas
        for name in ("prompt", "negative_prompt", "seed", "steps", "guidance", "count"):
            if not self.properties.is_property_set(name):
                setattr(self, name, getattr(settings, name))

    def _request(self, context: bpy.types.Context) -> Request:
        return Request(
            prompt=self.prompt,
            negative_prompt=self.negative_prompt,
            seed=self.seed,
            steps=self.steps,
            # Blender keeps single precision: 3.7 would come back as 3.700000047683716.
            guidance=float(f"{self.guidance:.7g}"),
            count=self.count,
            model=extension.model_folder(context),
        )

    def _finish(self, context: bpy.types.Context, results: list[Generated]) -> set[str]:
        try:
            objects = place(context, results)
        except InputError as error:
            return self._fail(context, error)
        count = sum(len(result.gaussians) for result in results)
        seconds = sum(sum(result.seconds.values()) for result in results)
        names = ", ".join(object.name for object in objects)
        self.report({"INFO"}, f"Generated {names}: {count:,} Gaussians in {seconds:.1f} s")
        return {"FINISHED"}

    def _fail(self, context: bpy.types.Context, error: BaseException) -> set[str]:
        problem = problems.explain(error)
        status = context.window_manager.gaussian_atlas
        status.error, status.fix_operator, status.fix_label = problem.message, problem.operator, problem.label
        self.report({"ERROR"}, problem.message)
        return {"CANCELLED"}

    def _show(self, context: bpy.types.Context, progress: Progress) -> None:
        show_progress(context, "Cancelling" if self._job.cancelling else progress.stage, progress.fraction)

    def _end(self, context: bpy.types.Context) -> None:
        global _current
        if self._timer:
            context.window_manager.event_timer_remove(self._timer)
        self._timer = None
        if _current is self._job:
            _current = None
        status = context.window_manager.gaussian_atlas
        status.running, status.stage, status.fraction = False, "", 0.0
        redraw(context)


class CancelOperator(bpy.types.Operator):
    """Stop the running generation at its next step"""

    bl_idname = "gaussian_atlas.cancel"
    bl_label = "Cancel"
    bl_options = {"INTERNAL"}

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        if not running():
            cls.poll_message_set("No generation is running")
            return False
        return True

    def execute(self, context: bpy.types.Context) -> set[str]:
        cancel_running()
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
        return GenerateOperator.poll(context)

    def execute(self, context: bpy.types.Context) -> set[str]:
        return bpy.ops.gaussian_atlas.generate("EXEC_DEFAULT", True, **self._arguments(context))

    def invoke(self, context: bpy.types.Context, event: bpy.types.Event) -> set[str]:
        bpy.ops.gaussian_atlas.generate("INVOKE_DEFAULT", True, **self._arguments(context))
        return {"FINISHED"}

    def _arguments(self, context: bpy.types.Context) -> dict:
        provenance = properties.stored_provenance(context.active_object)
        arguments = {name: getattr(provenance, name) for name in ("prompt", "negative_prompt", "seed", "steps", "guidance")}
        settings = context.scene.gaussian_atlas
        settings.randomize_seed = False
        for name, value in arguments.items():
            setattr(settings, name, value)
        return arguments | {"count": 1}


def cancel_running() -> None:
    """Ask the running generation to stop; nothing where none runs."""
    if _current:
        _current.cancel()


def show_progress(context: bpy.types.Context, stage: str, fraction: float) -> None:
    status = context.window_manager.gaussian_atlas
    status.running, status.stage, status.fraction = True, stage, fraction
    redraw(context)


def clear_error(context: bpy.types.Context) -> None:
    status = context.window_manager.gaussian_atlas
    status.error = status.fix_operator = status.fix_label = ""


def redraw(context: bpy.types.Context) -> None:
    """Draw every 3D view again: the panel shows the progress."""
    for window in context.window_manager.windows:
        for area in window.screen.areas:
            if area.type == "VIEW_3D":
                area.tag_redraw()


CLASSES = (GenerateOperator, CancelOperator, RegenerateOperator)
