"""Work on many objects side by side, on one machine or on a Ray cluster, with a record of every object.

One failed object never stops the others. A worker that dies takes down no more than the object in its hand, which is tried
again. Items are drawn one by one as workers become free, so that millions of them need no memory. Without an address the
workers are processes of this machine; with one they are Ray's. What is recorded and retried is the same.
"""

from __future__ import annotations

import faulthandler
import functools
import json
import multiprocessing
import multiprocessing.connection
import os
import pickle
import platform
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from generator.errors import InputError, WorkError
from generator.files import parse_json

# The journal of a run's folder: one line for every object that a stage has finished or given up.
RECORDS = "records.jsonl"
# How often an object may take its worker down before it is given up.
ATTEMPTS = 3
# Seconds after which an object that has not ended is taken for hung and its worker for dead.
LIMIT = 3600.0

# Read before torch and numba start their threads: each worker owns one core.
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "NUMBA_NUM_THREADS": "1"}
# A fresh process after so many objects, whatever Blender or a leak has piled up.
OBJECTS_PER_PROCESS = 200


def for_each(
    work: Callable[..., dict | None],
    items: Iterable[tuple],
    workers: int,
    description: str,
    progress: bool = True,
    *,
    records: Path | None = None,
    observe: Callable[[dict], None] | None = None,
    address: str = "",
    gpus: float = 0.0,
    attempts: int = ATTEMPTS,
    limit: float = LIMIT,
) -> dict[str, str]:
    """Call `work(*item)` for every item in worker processes; the item's first member is its id.

    `work` keeps its own results (a file, written whole), so a stopped run goes on where it was. It may return a dict for the
    record: "seconds" and "cpu" {step: seconds by the clock, by the processor}, "bytes" {kind: bytes}, and scores under any
    other name.

    Args:
        work: a function of an importable module, and items that can be pickled.
        workers: how many items are worked on at the same time; 0 for every core of the machine, or of the cluster, nodes
            that join later included.
        description: names the stage, on the progress bar and in the records.
        records: journal that every item's record is appended to; None keeps none.
        observe: called with every record, after it is in the journal.
        address: "" for processes of this machine, "local" for Ray on this machine, "auto" or HOST:PORT for a Ray cluster.
        gpus: share of a GPU that each item takes on a Ray cluster, which shows a worker no GPU without; processes of this machine
            see all of them.
        attempts: how often an item is tried whose worker dies; one that raises is not tried again.
        limit: seconds that one item may take before its worker is ended.

    Returns:
        The reason of failure of each item that failed, by id.

    Raises:
        InputError: no Ray cluster at `address`, no GPU in it although items take one, or `workers` or `gpus` is negative.
        WorkError: the worker processes cannot start.
    """
    if workers < 0:
        raise InputError(f"workers must be at least 0, got {workers}")
    if gpus < 0 or (gpus > 1 and gpus != int(gpus)):
        raise InputError(f"gpus must be a share of 0 to 1 or a whole number, got {gpus}")
    failures: dict[str, str] = {}
    source = iter(items)
    again: deque[_Task] = deque()

    def following() -> _Task | None:
        if again:
            return again.popleft()
        item = next(source, None)
        return None if item is None else _Task(work, tuple(item), description, limit)

    task = following()
    if task is None:
        return failures
    total = len(items) if isinstance(items, Sized) else None
    with _journal(records) as append, _pool(address, workers, gpus) as pool, _bar(description, total, progress) as bar:
        while True:
            while task is not None and pool.room() > 0:
                pool.start(task)
                task = following()
            if not pool.busy():
                return failures
            for finished, outcome in pool.wait():
                finished.attempts += 1
                if outcome is None and finished.attempts < attempts:
                    again.append(finished)
                    continue
                record = outcome or _given_up(finished)
                record = {"id": finished.id, "stage": description, **record, "attempts": finished.attempts}
                append(record)
                if observe:
                    observe(record)
                if record["status"] != "ok":
                    failures[finished.id] = record["reason"]
                    bar.set_postfix(failed=len(failures))
                bar.update()
            if task is None:
                task = following()


def read_records(path: str | os.PathLike) -> list[dict]:
    """The records of a journal: of each stage and id the last, in the order of their first; a line cut short is left out."""
    found: dict[tuple[str, str], dict] = {}
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    record = parse_json(line)
                    found[str(record.get("stage", "")), str(record["id"])] = record
                except (ValueError, KeyError, TypeError, AttributeError):
                    continue
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    return list(found.values())


def append_records(path: Path, records: Iterable[dict]) -> None:
    """Append records that were not made by `for_each`, such as those of objects whose files an earlier run left."""
    with _journal(path) as append:
        for record in records:
            append(record)


@dataclass
class _Task:
    work: Callable
    item: tuple
    stage: str
    limit: float  # seconds
    attempts: int = 0  # that have ended

    @property
    def id(self) -> str:
        return self.item[0]

    def call(self) -> tuple:
        """The arguments of `_call`."""
        return self.work, self.item, self.stage, self.limit


class _Pool(Protocol):
    """Workers that tasks can be given to."""

    def room(self) -> int:
        """How many more tasks may be started now."""

    def start(self, task: _Task) -> None: ...

    def busy(self) -> bool:
        """Whether a task is under way."""

    def wait(self) -> list[tuple[_Task, dict | None]]:
        """Tasks that have ended, with their records; None where the worker died. May be empty."""

    def close(self) -> None:
        """End the workers, whatever they are doing."""


def _call(work: Callable, item: tuple, stage: str, limit: float) -> dict:
    """Inside a worker: the record of one object, without its id and attempts."""
    global _done
    _done += 1
    start, busy = time.perf_counter(), time.process_time()
    # Its timer needs no lock of Python's, so that it also ends a loop inside Blender or numba.
    faulthandler.dump_traceback_later(limit, exit=True, file=_nowhere())
    try:
        found = json.loads(json.dumps(work(*item) or {}))
        status, reason = "ok", ""
    except Exception as error:  # whatever one object's trouble is, the others go on
        found, status, reason = {}, "failed", _line(error)
    finally:
        faulthandler.cancel_dump_traceback_later()
    wall = round(time.perf_counter() - start, 3)
    return {
        "status": status,
        "reason": reason,
        "seconds": found.pop("seconds", {stage: wall}),
        "cpu": found.pop("cpu", {stage: round(time.process_time() - busy, 3)}),
        "wall": wall,
        "bytes": found.pop("bytes", {}),
        "scores": found,
        "node": platform.node(),
        "nth": _done,
    }


# Objects that this process has begun. The first one pays for what compiled code and Blender take to load.
_done = 0


@functools.cache
def _nowhere():
    return open(os.devnull, "w")


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]


def _given_up(task: _Task) -> dict:
    reason = f"the worker died {task.attempts} times on it: killed, out of memory, or over the limit of {task.limit:.0f} s"
    return {"status": "failed", "reason": reason, "seconds": {}, "bytes": {}, "scores": {}}


def _unread(error: BaseException) -> dict:
    """The record where a worker cannot read the work or its arguments."""
    return {"status": "failed", "reason": _line(error), "seconds": {}, "bytes": {}, "scores": {}}


def _bar(description: str, total: int | None, progress: bool) -> tqdm:
    return tqdm(total=total, desc=description, unit="object", disable=not progress)


@contextmanager
def _journal(path: Path | None) -> Iterator[Callable[[dict], None]]:
    """A function that appends a record, each in one write: killed at any time, at most the last line is cut short."""
    if path is None:
        yield lambda record: None
        return
    with open(path, "ab", buffering=0) as file:
        if file.tell():
            with open(path, "rb") as before:
                before.seek(-1, os.SEEK_END)
                # A line that was cut short must not swallow the next record.
                if before.read(1) != b"\n":
                    file.write(b"\n")

        def append(record: dict) -> None:
            file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")

        yield append


@contextmanager
def _pool(address: str, workers: int, gpus: float) -> Iterator[_Pool]:
    pool = _RayTasks(address, workers, gpus) if address else _Processes(workers or len(os.sched_getaffinity(0)))
    try:
        yield pool
    finally:
        pool.close()


# --- processes of this machine ------------------------------------------------------------------------------------------


@dataclass
class _Worker:
    process: multiprocessing.process.BaseProcess
    pipe: multiprocessing.connection.Connection
    ready: bool = False  # has said that it is up
    task: _Task | None = None
    done: int = 0


class _Processes:
    """Up to `count` processes of this machine, started when needed, each with at most one task in hand."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.workers: list[_Worker] = []

    def room(self) -> int:
        return self.count - len(self._busy())

    def busy(self) -> bool:
        return bool(self._busy())

    def _busy(self) -> list[_Worker]:
        return [worker for worker in self.workers if worker.task is not None]

    def start(self, task: _Task) -> None:
        for worker in [w for w in self.workers if w.task is None and (w.done >= OBJECTS_PER_PROCESS or not w.process.is_alive())]:
            self._end(worker)
        worker = next((w for w in self.workers if w.task is None), None) or self._spawn()
        worker.task = task
        # A pipe that broke here is found by the wait: the process is dead.
        try:
            worker.pipe.send(task.call())
        except OSError:
            pass

    def wait(self) -> list[tuple[_Task, dict | None]]:
        busy = self._busy()
        multiprocessing.connection.wait([w.pipe for w in busy] + [w.process.sentinel for w in busy])
        ended = []
        for worker in busy:
            alive = worker.process.is_alive()
            try:
                while worker.task is not None and worker.pipe.poll():
                    outcome = worker.pipe.recv()
                    if outcome is None:
                        worker.ready = True
                    else:
                        ended.append((worker.task, outcome))
                        worker.task, worker.done = None, worker.done + 1
            except (EOFError, OSError):
                alive = False
            if worker.task is not None and not alive:
                if not worker.ready:
                    worker.process.join()
                    raise WorkError(f"a worker process cannot start (status {worker.process.exitcode}): see its output above")
                ended.append((worker.task, None))
                self._end(worker)
        return ended

    def close(self) -> None:
        for worker in list(self.workers):
            self._end(worker)

    def _spawn(self) -> _Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs,), daemon=True)
        before = {name: os.environ.get(name) for name in _ONE_THREAD}
        os.environ.update(_ONE_THREAD)
        try:
            process.start()
        finally:
            for name, value in before.items():
                os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)
        theirs.close()
        self.workers.append(_Worker(process, ours))
        return self.workers[-1]

    def _end(self, worker: _Worker) -> None:
        self.workers.remove(worker)
        worker.pipe.close()
        worker.process.kill()
        worker.process.join()


def _work(pipe: multiprocessing.connection.Connection) -> None:
    """A process's life: sends None, then takes the arguments of `_call` and sends its record; a closed pipe ends it."""
    # Ctrl-C reaches the whole group: the one who started us decides when to end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pipe.send(None)
    while True:
        try:
            arguments = pipe.recv_bytes()
        except (EOFError, OSError):
            return
        try:
            outcome = _call(*pickle.loads(arguments))
        except Exception as error:
            outcome = _unread(error)
        try:
            pipe.send(outcome)
        except OSError:
            return


# --- Ray ----------------------------------------------------------------------------------------------------------------


class _RayTasks:
    """Ray tasks of one core and a share of a GPU each. At most `workers` are in flight, or twice what fits the cluster if that is 0."""

    def __init__(self, address: str, workers: int, gpus: float) -> None:
        self.workers, self.gpus, self.fitting, self.looked = workers, gpus, 0, -float("inf")
        self.tasks: dict[Any, _Task] = {}  # by Ray's reference to its record
        self.ray, self.owned = _connect(address, workers)
        if gpus and not self.ray.cluster_resources().get("GPU"):
            self.close()
            raise InputError(f"--gpus {gpus:g}: the Ray cluster has no GPU: start its nodes with `ray start --num-gpus N`, or leave it out")
        # Retries are ours: they are counted and recorded.
        remote = self.ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0, max_calls=OBJECTS_PER_PROCESS)(_call)
        self.remote = remote.options(runtime_env={"env_vars": _ONE_THREAD})

    def room(self) -> int:
        if self.workers:
            return self.workers - len(self.tasks)
        if time.monotonic() - self.looked > 5:
            there = self.ray.cluster_resources()
            self.fitting, self.looked = int(there.get("CPU", 0)), time.monotonic()
            if self.gpus:
                self.fitting = min(self.fitting, int(there.get("GPU", 0) / self.gpus))
        # Where no node is up yet, one waiting task asks an autoscaling cluster for it.
        return max(1, 2 * self.fitting) - len(self.tasks)

    def busy(self) -> bool:
        return bool(self.tasks)

    def start(self, task: _Task) -> None:
        self.tasks[self.remote.remote(*task.call())] = task

    def wait(self) -> list[tuple[_Task, dict | None]]:
        ended, _ = self.ray.wait(list(self.tasks), num_returns=1, timeout=5)
        return [(self.tasks.pop(reference), self._outcome(reference)) for reference in ended]

    def _outcome(self, reference) -> dict | None:
        try:
            return self.ray.get(reference)
        except self.ray.exceptions.RayTaskError as error:
            return _unread(error.cause or error)
        except self.ray.exceptions.RayError as error:
            if not self.ray.is_initialized():
                raise WorkError(f"the Ray cluster is gone ({_line(error)}): start it and run the same command again") from error
            return None

    def close(self) -> None:
        for reference in self.tasks:
            self.ray.cancel(reference, force=True)
        if self.owned:
            self.ray.shutdown()


def _connect(address: str, workers: int) -> tuple:
    """(the ray module connected to a cluster, whether we connected it).

    Raises:
        InputError: nothing answers there.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if address == "local":
        # Ray's switch for systems with talkative firewalls: everything listens on 127.0.0.1 alone. Read by the import.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    import ray

    if ray.is_initialized():
        return ray, False
    quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    if address == "local":
        cores = workers or len(os.sched_getaffinity(0))
        ray.init("local", num_cpus=cores, include_dashboard=False, object_store_memory=100 * 2**20, **quiet)
        return ray, True
    wanted = f"--address {address}"
    place = _last_started() if address == "auto" else address
    if place:
        host, separator, port = place.rpartition(":")
        if not separator or not host or not port.isdigit() or "/" in host:
            raise InputError(f"{wanted}: give local, auto or HOST:PORT of a Ray head node, and start this command on one of its nodes")
        # Ray itself tries for minutes.
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        except (OSError, OverflowError) as error:
            raise InputError(f"{wanted}: no Ray cluster answers at {place} ({error}): start one with `ray start --head`") from error
    try:
        ray.init(address, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise InputError(f"{wanted}: cannot join a Ray cluster there ({_line(error)}): start one with `ray start --head`") from error
    return ray, True


def _last_started() -> str:
    """HOST:PORT of the cluster that "auto" means, as Ray looks for it; "" where there is none."""
    try:
        return os.environ.get("RAY_ADDRESS") or Path("/tmp/ray/ray_current_cluster").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeError):
        return ""
