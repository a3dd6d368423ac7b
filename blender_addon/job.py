"""One piece of work in a thread: progress in a queue, cancel by an event. Knows nothing of Blender.

The thread only puts messages into a queue. `poll` (or `run`) on the caller's thread takes them out and is the only
place where the job's state changes, so a caller never sees a finished job with unread progress.
"""

from __future__ import annotations

import logging
import os
import queue
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from typing import Any

from ..generator.errors import Cancelled, InputError, WorkError

log = logging.getLogger(__name__)

NICENESS = 5  # of the working thread on Linux, -20 .. 19; Blender's own is 0


class State(Enum):
    WAITING = "waiting"  # not started
    RUNNING = "running"
    DONE = "done"  # `result` is set
    FAILED = "failed"  # `error` is set
    CANCELLED = "cancelled"


@dataclass(frozen=True)
class Progress:
    """How far the work is: step of total within a stage; total 0 means unknown."""

    stage: str
    step: int = 0
    total: int = 0
    preview: Any = None  # whatever the work offers to look at, or None

    @property
    def fraction(self) -> float:
        """Share of the stage that is done, 0..1; 0 where the total is unknown."""
        return min(1.0, self.step / self.total) if self.total > 0 else 0.0


@dataclass(frozen=True)
class _Ended:
    state: State
    result: Any = None
    error: BaseException | None = None


Report = Callable[..., None]  # report(stage, step=0, total=0, preview=None)
Work = Callable[[Report, threading.Event], Any]


class Job:
    """Runs `work(report, cancel)` once, in a thread (`start`) or in the caller's (`run`).

    The work calls report(stage, step, total, preview) as it goes, looks at `cancel` at every step and raises
    `Cancelled` when it is set. Any other exception ends the job as FAILED; its traceback goes to the log unless it
    is one of the errors that a user can mend.
    """

    def __init__(self, work: Work, name: str = "job") -> None:
        self.name = name
        self.state = State.WAITING
        self.result: Any = None
        self.error: BaseException | None = None
        self._work = work
        self._cancel = threading.Event()
        self._messages: queue.Queue[Progress | _Ended] = queue.Queue()
        self._thread: threading.Thread | None = None

    @property
    def ended(self) -> bool:
        return self.state in (State.DONE, State.FAILED, State.CANCELLED)

    @property
    def message(self) -> str:
        """The error in one line; empty where there is none."""
        return one_line(self.error) if self.error else ""

    def start(self) -> Job:
        """Run in a daemon thread: a cancelled job never keeps the program from ending."""
        self._begin()
        self._thread = threading.Thread(target=self._run_modestly, name=self.name, daemon=True)
        self._thread.start()
        return self

    def run(self, on_progress: Callable[[Progress], None] | None = None) -> Any:
        """Run in this thread and return the result.

        Raises:
            Cancelled: `cancel` was called.
            BaseException: whatever the work raised.
        """
        self._begin()
        self._run(on_progress)
        self.poll()
        if self.error:
            raise self.error
        if self.state is State.CANCELLED:
            raise Cancelled(f"{self.name} was cancelled")
        return self.result

    def cancel(self) -> None:
        """Ask the work to stop; it does so at its next step."""
        self._cancel.set()

    @property
    def cancelling(self) -> bool:
        return self._cancel.is_set() and not self.ended

    def poll(self) -> list[Progress]:
        """Take every message that has arrived, oldest first, and bring `state` up to date. Never waits."""
        progress: list[Progress] = []
        while True:
            try:
                message = self._messages.get_nowait()
            except queue.Empty:
                return progress
            if isinstance(message, Progress):
                progress.append(message)
            else:
                self.state, self.result, self.error = message.state, message.result, message.error

    def join(self, timeout: float | None = None) -> None:
        """Wait until the thread has ended; `poll` afterwards."""
        if self._thread:
            self._thread.join(timeout)

    def _begin(self) -> None:
        if self.state is not State.WAITING:
            raise RuntimeError(f"{self.name} was started before; make a new Job")
        self.state = State.RUNNING

    def _run_modestly(self) -> None:
        """Below the window's thread: where all cores are busy, the window goes first. torch's own threads inherit it."""
        if sys.platform == "linux":  # elsewhere a process has one priority, not each thread
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        self._run()

    def _run(self, on_progress: Callable[[Progress], None] | None = None) -> None:
        def report(stage: str, step: int = 0, total: int = 0, preview: Any = None) -> None:
            progress = Progress(stage, step, total, preview)
            self._messages.put(progress)
            if on_progress:
                on_progress(progress)

        try:
            result = self._work(report, self._cancel)
        except Cancelled:
            ended = _Ended(State.CANCELLED)
        except BaseException as error:  # a thread's exception has no one else to catch it
            if not isinstance(error, (InputError, WorkError)):
                log.exception("%s failed", self.name)
            ended = _Ended(State.FAILED, error=error)
        else:
            # Work that finished in spite of a cancel is thrown away: the user asked for nothing.
            ended = _Ended(State.CANCELLED) if self._cancel.is_set() else _Ended(State.DONE, result=result)
        self._messages.put(ended)


def one_line(error: BaseException) -> str:
    """An error as one line for a user: the message alone where it was written for users, else with its type."""
    text = " ".join(str(error).split())
    if isinstance(error, (InputError, WorkError, Cancelled)) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
