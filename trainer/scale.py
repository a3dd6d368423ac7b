"""What a large data set takes: core-hours, bytes and days, from the records of a small one, with a simulation of the schedule."""

from __future__ import annotations

import heapq
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from generator.errors import InputError

from .farm import ATTEMPTS, OBJECTS_PER_PROCESS, RECORDS, read_records
from .markdown import table
from .views import read_records as read_views

# Ma et al. 2025: GaussianVerse took more than 3.8 years of A100 for 205,737 objects.
PAPER_OBJECTS = 205_737
PAPER_GPU_YEARS = 3.8
YEAR = 365.25 * 86_400  # seconds
_STEPS = ("views", "fit", "atlas")


@dataclass(frozen=True)
class Measured:
    """What records say about the objects of a small run. Seconds are of one core."""

    steps: dict[str, list[float]]  # of every step, by object; without the first object of each process
    objects: list[float]  # whole objects
    startup: float  # what the first object of a process takes longer: compiled code and Blender load
    bytes: dict[str, float]  # an object, by kind of file
    failed: int
    clock: bool  # some seconds are by the clock, since the record has no others

    @property
    def seconds(self) -> float:
        """An object, mean."""
        return statistics.fmean(self.objects)

    def mean(self, step: str) -> float:
        """Seconds of a step by object, those counted that do not need it."""
        return sum(self.steps[step]) / len(self.objects)


def measure(paths: Sequence[Path]) -> Measured:
    """Read the records of farms: journals, or the folders of runs, whose shards are then measured too.

    Raises:
        InputError: a path is not there, or no object has gone through every step.
    """
    steps: dict[str, dict[str, float]] = {}
    sizes: dict[str, dict[str, float]] = {}
    shards = 0
    first: set[str] = set()
    left_out: set[str] = set()
    failed: set[str] = set()
    clock = False
    for number, path in enumerate(paths):
        if not path.exists():
            raise InputError(f"{path}: no such file or folder: give the {RECORDS} of a farm, or the folder of a run")
        records = read_records(path / RECORDS if path.is_dir() else path)
        for record in records:
            name = f"{number}/{record['id']}"
            if record.get("status") != "ok":
                failed.add(name)
                continue
            failed.discard(name)
            cpu = _numbers(record.get("cpu"))
            clock |= not cpu and bool(_numbers(record.get("seconds")))
            steps.setdefault(name, {}).update(cpu or _numbers(record.get("seconds")))
            if record.get("nth") == 1:
                first.add(name)
            if isinstance(record.get("scores"), dict) and record["scores"].get("kept") is False:
                left_out.add(name)
            if found := _numbers(record.get("bytes")):
                sizes.setdefault(name, {}).update(found)
        if path.is_dir():
            for record in read_views(path / "views"):
                known = steps.get(f"{number}/{record['id']}")
                if known is not None and "views" not in known and (seconds := _numbers({"views": record.get("seconds")})):
                    known |= seconds
                    clock = True
            shards += sum(file.stat().st_size for file in (path / "shards").glob("atlases-*.tar"))
    wanted = {step for found in steps.values() for step in found}
    whole = {name: sum(found.values()) for name, found in steps.items() if found and (set(found) == wanted or name in left_out)}
    if not whole:
        named = ", ".join(map(str, paths))
        raise InputError(f"{named}: no record of a finished object with its seconds: run `python -m trainer farm` first")
    warm = {name: seconds for name, seconds in whole.items() if name not in first} or whole
    cold = [whole[name] for name in whole if name not in warm]
    startup = max(0.0, statistics.fmean(cold) - statistics.median(warm.values())) if cold else 0.0
    order = [step for step in _STEPS if step in wanted] + sorted(wanted - set(_STEPS))
    by_step = {step: [steps[name][step] for name in warm if step in steps[name]] for step in order}
    kinds = dict.fromkeys(kind for found in sizes.values() for kind in found)
    means = {kind: sum(found.get(kind, 0.0) for found in sizes.values()) / len(sizes) for kind in kinds}
    if shards and sizes:
        means["shards"] = shards / len(sizes)
    elif "atlases" in means:
        means["shards, no repainted copies"] = means["atlases"] / 2  # float16 instead of float32
    return Measured({step: values for step, values in by_step.items() if values}, list(warm.values()), startup, means, len(failed), clock)


def _numbers(found: object) -> dict[str, float]:
    """The positive numbers of a dict; records are written by many hands."""
    if not isinstance(found, dict):
        return {}
    good = {str(key): value for key, value in found.items() if isinstance(value, int | float) and not isinstance(value, bool)}
    return {key: float(value) for key, value in good.items() if 0 < value < float("inf")}


@dataclass(frozen=True)
class Cluster:
    """What the simulation assumes."""

    workers: int = 1000  # cores, one object each
    lifetime: float = 100 * 3600.0  # seconds after which a worker dies, on average; its deaths know nothing of its age
    restart: float = 120.0  # seconds until a new worker stands in its place
    dispatch: float = 0.0022  # seconds that the one driver takes for each object; measured with Ray 2.60
    attempts: int = ATTEMPTS  # of an object whose worker dies


@dataclass(frozen=True)
class Schedule:
    """How a run went. Seconds."""

    makespan: float  # until the last object has ended
    ideal: float  # the work of the finished objects, without gaps on all workers
    lost: float  # core time of objects that were cut off
    deaths: int  # of workers, with an object in hand
    given_up: int  # objects that took down a worker too often
    utilisation: float  # share of the workers' time until the end that went into finished objects


def simulate(seconds: Sequence[float], objects: int, cluster: Cluster, startup: float = 0.0, seed: int = 0) -> Schedule:
    """Discrete events: each free worker takes the next object, first those whose worker died; the driver hands out one at a time.

    Args:
        seconds: measured durations; every object's is drawn from them, so that a straggler is as rare and as long as was measured.
        startup: seconds that the first object of a process takes longer; a process ends after 200 objects, as in the farm.
    """
    draw = np.random.default_rng(seed)
    measured = np.asarray(seconds, dtype=np.float64)
    workers = [(0.0, worker) for worker in range(min(cluster.workers, objects))]
    age = [0] * len(workers)
    again: list[tuple[float, int, float, int]] = []  # known from, number, duration, attempts so far
    driver = end = useful = lost = 0.0
    begun = deaths = given_up = 0
    chunk = 1 << 16
    durations: list[float] = []
    lives: list[float] = []
    spare = 0
    while begun < objects or again:
        time, worker = workers[0]
        if again and (again[0][0] <= time or begun == objects):
            known, number, duration, attempts = heapq.heappop(again)
            time = max(time, known)
        else:
            if begun % chunk == 0:
                durations = draw.choice(measured, chunk).tolist()
            number, duration, attempts = begun, durations[begun % chunk], 0
            begun += 1
        time = driver = max(time, driver + cluster.dispatch)
        if spare == 0:
            lives, spare = draw.exponential(cluster.lifetime, chunk).tolist(), chunk
        spare -= 1
        life, held = lives[spare], duration if age[worker] else duration + startup
        if life < held:
            deaths += 1
            lost += life
            if attempts + 1 < cluster.attempts:
                heapq.heappush(again, (time + life, number, duration, attempts + 1))
            else:
                given_up += 1
            age[worker] = 0
            end = max(end, time + life)
            heapq.heapreplace(workers, (time + life + cluster.restart, worker))
        else:
            useful += duration
            age[worker] = (age[worker] + 1) % OBJECTS_PER_PROCESS
            end = max(end, time + held)
            heapq.heapreplace(workers, (time + held, worker))
    return Schedule(end, useful / cluster.workers, lost, deaths, given_up, useful / (cluster.workers * end) if end else 0.0)


def report(
    measured: Measured,
    objects: Sequence[int],
    workers: Sequence[int],
    cluster: Cluster,
    bandwidth: float,
    gpu: dict[str, float] | None = None,
    seed: int = 0,
) -> str:
    """Everything as Markdown: the same text for the same records and arguments.

    Args:
        objects: sizes of the data sets.
        workers: numbers of workers; `cluster` says the rest.
        bandwidth: bytes a second that the shared file system writes.
        gpu: seconds an object takes of one GPU, by step, where they were measured; such steps take no cores here.
    """
    gpu = gpu or {}
    # What a GPU does is no core's work; the objects keep their proportions.
    moved = sum(sum(values) for step, values in measured.steps.items() if step in gpu)
    share = 1 - moved / sum(map(sum, measured.steps.values()))
    durations = [seconds * share + sum(gpu.values()) for seconds in measured.objects]
    parts = [_measured(measured), _projection(measured, objects, gpu), _bottleneck(measured, durations, workers, cluster, bandwidth, gpu)]
    rows = []
    for count in objects:
        for number in workers:
            setting = Cluster(number, cluster.lifetime, cluster.restart, cluster.dispatch, cluster.attempts)
            found = simulate(durations, count, setting, measured.startup, seed)
            rows.append(
                (f"{count:,}", f"{number:,}", _time(found.ideal), _time(found.makespan), f"{found.utilisation:.1%}",
                 f"{found.lost / 3600:,.1f} h", f"{found.deaths:,}", f"{found.given_up:,}")
            )  # fmt: skip
    head = ("objects", "workers", "ideal", "makespan", "utilisation", "work lost", "workers died", "objects given up")
    text = (
        f"Simulated with seed {seed}. Every object's seconds are drawn from the {len(durations)} measured, the longest of which is "
        f"{max(durations):.1f} s; a worker dies every {cluster.lifetime / 3600:g} h on average, loses the object in hand and is back "
        f"after {cluster.restart:g} s; the first of every {OBJECTS_PER_PROCESS} objects of a process takes {measured.startup:.1f} s more; "
        f"the driver needs {cluster.dispatch * 1000:g} ms an object; an object is tried {cluster.attempts} times. Ideal is the work "
        "without gaps, failures or start-up."
    )
    if gpu:
        text += f" Each worker has a GPU for {', '.join(gpu)}."
    return "\n\n".join([*parts, f"### Schedule\n\n{text}\n\n{table(head, rows)}"]) + "\n"


def _measured(measured: Measured) -> str:
    rows = []
    total = sum(map(sum, measured.steps.values()))
    for step, values in measured.steps.items():
        numbers = (statistics.fmean(values), statistics.median(values), max(values))
        rows.append((step, f"{len(values)}", *(f"{number:.2f}" for number in numbers), f"{sum(values) / total:.0%}"))
    whole = measured.objects
    rows.append(("object", f"{len(whole)}", f"{measured.seconds:.2f}", f"{statistics.median(whole):.2f}", f"{max(whole):.2f}", ""))
    kind = "by the clock where the records have no processor seconds" if measured.clock else "of processor time"
    text = f"Seconds of one core, {kind}; {measured.failed} objects failed and are left out."
    head = ("step", "objects", "mean", "median", "longest", "share")
    return f"### Measured\n\n{text}\n\n{table(head, rows)}"


def _projection(measured: Measured, objects: Sequence[int], gpu: dict[str, float]) -> str:
    rows = []
    for step in measured.steps:
        if step not in gpu:
            rows.append((f"core-hours, {step}", *(f"{measured.mean(step) * count / 3600:,.0f}" for count in objects)))
    cores = sum(measured.mean(step) for step in measured.steps if step not in gpu)
    rows.append(("**core-hours**", *(f"**{cores * count / 3600:,.0f}**" for count in objects)))
    rows.append(("core-years", *(f"{cores * count / YEAR:,.2f}" for count in objects)))
    for step, seconds in gpu.items():
        rows.append((f"GPU-hours, {step} ({seconds:g} s an object, given)", *(f"{seconds * count / 3600:,.0f}" for count in objects)))
    if not gpu:
        rows.append(("GPU-hours", *("none: all steps ran on cores" for _ in objects)))
    paper = PAPER_GPU_YEARS * YEAR / PAPER_OBJECTS
    rows.append((f"the paper: A100-hours, {paper:.0f} s an object", *(f"{paper * count / 3600:,.0f}" for count in objects)))
    for kind, size in measured.bytes.items():
        rows.append((f"{kind} ({size / 1000:,.0f} kB an object)", *(_bytes(size * count) for count in objects)))
    rows.append(("**bytes**", *(f"**{_bytes(sum(measured.bytes.values()) * count)}**" for count in objects)))
    text = (
        f"Objects times the means above. The paper's figure is its more than {PAPER_GPU_YEARS} A100-years for {PAPER_OBJECTS:,} objects; "
        "other counts are in proportion. It is for other settings, so the two are no race."
    )
    return f"### Projection\n\n{text}\n\n{table(('', *(f'{count:,} objects' for count in objects)), rows)}"


def _bottleneck(
    measured: Measured, durations: list[float], workers: Sequence[int], cluster: Cluster, bandwidth: float, gpu: dict[str, float]
) -> str:
    size = sum(measured.bytes.values())
    # Start-up is shared by the objects of a process.
    seconds = statistics.fmean(durations) + measured.startup / OBJECTS_PER_PROCESS
    steps = {step: gpu.get(step, measured.mean(step)) for step in measured.steps}
    slowest = max(steps, key=steps.__getitem__)
    rows = []
    for number in workers:
        rates = {f"cores: {slowest}": number / seconds}
        if cluster.dispatch:
            rates["driver"] = 1 / cluster.dispatch
        if size:
            rates["storage"] = bandwidth / size
        narrow = min(rates, key=rates.__getitem__)
        shown = (f"{rates[key]:,.1f}" if key in rates else "" for key in (f"cores: {slowest}", "driver", "storage"))
        rows.append((f"{number:,}", *shown, f"{number / seconds * size / 1e6:,.1f} MB/s", f"**{narrow}**"))
    text = (
        f"Objects a second that each part can take. The file system is assumed to write {bandwidth / 1e6:,.0f} MB/s; reading back is "
        "not counted."
    )
    head = ("workers", "cores", "driver", "storage", "written by busy cores", "bottleneck")
    return f"### Bottleneck\n\n{text}\n\n{table(head, rows)}"


def _bytes(count: float) -> str:
    for unit, size in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count / 1000:,.1f} kB"


def _time(seconds: float) -> str:
    for unit, length in (("days", 86_400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.2f} {unit}"
    return f"{seconds:.1f} s"
