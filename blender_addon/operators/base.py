"""What every operator shares whose work takes long: a worker thread, progress, Cancel, errors with what mends them."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import bpy

from .. import extension, problems
from ..job import Job, State

if TYPE_CHECKING:
    from bpy.types import Operator as Mixin  # what a mixin for operators may take for granted

    from ..job import Progress, Work
else:
    Mixin = object

TIMER_SECONDS = 0.1
# How long the end of Blender or of the extension waits for the thread to see that it was cancelled.
GOODBYE_SECONDS = 3.0

# At most one job runs in a session; the Cancel operator and the panel look here. The timer is kept here and not with the
# operator: Blender frees a running operator without a word when the extension is disabled.
_current: Job | None = None
_timer: bpy.types.Timer | None = None


class JobOperator(Mixin):
    """Mixin, before bpy.types.Operator, for an operator whose work is a `Work(report, cancel)` of job.py.

    A subclass gives `work` and `finish`; `show` and `drop` where it shows something while it works. From the user interface
    the work runs in a thread and the window stays usable: Esc or `gaussian_atlas.cancel` stop it at its next step. From a
    script and in background mode the operator waits. All hooks run in the main thread; the work itself must not touch bpy.
    """

    job_name = "Generation"  # begins messages: "Generation cancelled"

    _job: Job | None = None
    _finishing: Generator[set[str], None, None] | None = None

    def work(self, context: bpy.types.Context, interactive: bool) -> Work:
        """What to do, with everything it needs from Blender already read.

        Args:
            interactive: it will run in a thread, and `show` will be called; else the caller waits.

        Raises:
            InputError: the settings are not usable.
        """
        raise NotImplementedError

    def finish(self, context: bpy.types.Context, result: Any) -> Generator[set[str], None, None]:
        """A generator that brings the result into Blender; one step of it at most is run between two redraws, so that many
        objects do not block the window together. Its last yield is the operator's result, {"FINISHED"} or {"CANCELLED"}.

        Raises:
            InputError: the result is not usable.
        """
        raise NotImplementedError

    def salvage(self, context: bpy.types.Context) -> Any:
        """The result as far as it came when the work was cancelled or failed, for `finish`; None where there is nothing."""
        return None

    def show(self, context: bpy.types.Context, progress: list[Progress]) -> None:
        """News of the running work, oldest first; never empty."""

    def drop(self, context: bpy.types.Context) -> None:
        """Take away what `show` has shown: the work has ended, in whatever way. Must not fail."""

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        if running():
            cls.poll_message_set("A generation is running")
            return False
        return True

    def execute(self, context: bpy.types.Context) -> set[str]:
        """Work and wait for it: for scripts and background mode."""
        clear_error(context)
        ended = {"CANCELLED"}
        try:
            job = Job(self.work(context, interactive=False), name=self.job_name)
            for ended in self.finish(context, job.run()):  # noqa: B007
                pass
        except Exception as error:  # reported to the user in one line; Job has logged the traceback
            return self._fail(context, error)
        return ended

    def invoke(self, context: bpy.types.Context, event: bpy.types.Event) -> set[str]:
        """Work in a thread; the user interface stays free."""
        global _current, _timer
        clear_error(context)
        try:
            self._job = _current = Job(self.work(context, interactive=True), name=self.job_name).start()
        except Exception as error:
            return self._fail(context, error)
        show_progress(context, "Starting", 0.0)
        manager = context.window_manager
        _timer = manager.event_timer_add(TIMER_SECONDS, window=context.window)
        manager.modal_handler_add(self)
        return {"RUNNING_MODAL"}

    def modal(self, context: bpy.types.Context, event: bpy.types.Event) -> set[str]:
        job = self._job
        assert job is not None  # invoke has started it
        if event.type == "ESC" and event.value == "PRESS":
            job.cancel()
            return {"RUNNING_MODAL"}
        if event.type != "TIMER":
            return {"PASS_THROUGH"}
        try:
            return self._step(context, job)
        except Exception as error:
            self._end(context)
            return self._fail(context, error)

    def cancel(self, context: bpy.types.Context) -> None:
        """Blender ends the operator: another file is opened, or its window closes."""
        if self._job:
            self._job.cancel()
        self._end(context)

    def _step(self, context: bpy.types.Context, job: Job) -> set[str]:
        if self._finishing is None:
            progress = job.poll()
            if progress:
                self.show(context, progress)
            if not job.ended:
                if job.cancelling:
                    show_progress(context, "Cancelling", context.window_manager.gaussian_atlas.fraction)
                elif progress:
                    show_progress(context, progress[-1].stage, progress[-1].fraction)
                return {"PASS_THROUGH"}
            result = job.result if job.state is State.DONE else self.salvage(context)
            self.drop(context)
            if job.error is not None:
                self._fail(context, job.error)
            elif job.state is State.CANCELLED:
                self.report({"INFO"}, f"{self.job_name} cancelled")
            if result is None:
                self._end(context)
                return {"CANCELLED"}
            self._finishing = self.finish(context, result)
        ended = next(self._finishing)
        if ended & {"FINISHED", "CANCELLED"}:
            self._finishing.close()
            self._end(context)
        return ended

    def _end(self, context: bpy.types.Context) -> None:
        global _current
        self.drop(context)
        if _current is self._job:
            _current = None
            _remove_timer(context)
        hide_progress(context)

    def _fail(self, context: bpy.types.Context, error: BaseException) -> set[str]:
        problem = problems.explain(error, starter=extension.model_folder(context) == extension.STARTER_MODEL)
        status = context.window_manager.gaussian_atlas
        status.error, status.fix_operator, status.fix_label = problem.message, problem.operator, problem.label
        self.report({"ERROR"}, problem.message)
        return {"CANCELLED"}


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


def running() -> bool:
    """Whether a job is under way."""
    return _current is not None


def cancel_running() -> None:
    """Ask the running job to stop; nothing where none runs."""
    if _current:
        _current.cancel()


def end_running(context: bpy.types.Context) -> None:
    """Stop the running job for good, without its operator, which Blender has freed or will: the extension is disabled."""
    global _current
    job, _current = _current, None
    if job:
        job.cancel()
        _remove_timer(context)
        job.join(GOODBYE_SECONDS)
        hide_progress(context)


@bpy.app.handlers.persistent
def _after_load(*_: object) -> None:
    """The status is Blender's, which saves it with a file: one that was saved in mid-run must not open as running."""
    if not running():
        hide_progress(bpy.context)
        clear_error(bpy.context)


def attach() -> None:
    """Look after the status when files are opened."""
    bpy.app.handlers.load_post.append(_after_load)


def detach() -> None:
    if _after_load in bpy.app.handlers.load_post:
        bpy.app.handlers.load_post.remove(_after_load)


def show_progress(context: bpy.types.Context, stage: str, fraction: float) -> None:
    """Write into the status that the panel draws."""
    status = context.window_manager.gaussian_atlas
    status.running, status.stage, status.fraction = True, stage, fraction
    redraw(context)


def hide_progress(context: bpy.types.Context) -> None:
    status = context.window_manager.gaussian_atlas
    status.running, status.stage, status.fraction = False, "", 0.0
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


def _remove_timer(context: bpy.types.Context) -> None:
    global _timer
    if _timer:
        context.window_manager.event_timer_remove(_timer)
    _timer = None


CLASSES = (CancelOperator,)
