"""How long Blender's main thread waits for Python while an object is made beside it: the longest and the 99th percentile by stage.

The main thread asks for 5 ms of sleep again and again, as Blender's event loop returns to Python for every timer and panel, and
notes how much later than asked it runs on. The first row does so while nothing else works: what the machine itself adds.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
import threading
import time
from pathlib import Path

from _report import report

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
ASKED = 0.005
RUNS = 3


def lateness(until) -> list[tuple[float, float]]:
    """(when, seconds too late) of every sleep of the main thread until the condition holds."""
    late = []
    while not until():
        started = time.perf_counter()
        time.sleep(ASKED)
        late.append((started, time.perf_counter() - started - ASKED))
    return late


def row(stage: str, late: list[float], seconds: float) -> dict:
    late = sorted(late) or [0.0]
    return {
        "stage": stage,
        "s": seconds,
        "longest wait ms": 1000 * late[-1],
        "99 % below ms": 1000 * late[int(0.99 * (len(late) - 1))],
        "waits over 100 ms": sum(value > 0.1 for value in late),
        "samples": len(late),
    }


def watched(module, job) -> tuple[list[tuple[float, float]], list[tuple[float, str]]]:
    """Run a job in its thread; the lateness of this one, and when each stage began."""
    stages: list[tuple[float, str]] = []

    def ended() -> bool:
        for news in job.poll():
            if not stages or stages[-1][1] != news.stage:
                stages.append((time.perf_counter(), news.stage))
        return job.ended

    job.start()
    late = lateness(ended)
    if job.error:
        raise job.error
    return late, stages


def main() -> None:
    import blender

    with tempfile.TemporaryDirectory() as folder:
        blender.start(Path(folder))
        module = {name: importlib.import_module(f"{blender.MODULE}.blender_addon.{name}") for name in ("generation", "job", "service")}
        request = module["generation"].Request("a red armchair", ROOT / "models" / "starter")
        end = time.perf_counter() + 3
        rows = [row("nothing runs", [value for _, value in lateness(lambda: time.perf_counter() > end)], 3.0)]
        found: dict[str, tuple[list[float], float]] = {}
        for _ in range(RUNS):
            job = module["job"].Job(lambda say, cancel: module["generation"].generate(request, say, cancel, look=True))
            late, stages = watched(module, job)
            bounds = [*stages, (time.perf_counter(), "")]
            for (start, stage), (stop, _) in zip(bounds, bounds[1:], strict=False):
                values, seconds = found.get(stage, ([], 0.0))
                found[stage] = (values + [value for when, value in late if start <= when < stop], seconds + stop - start)
            module["service"].unload()
        rows += [row(stage, values, seconds) for stage, (values, seconds) in found.items()]
    note = f"{RUNS} runs of 20 steps, the model unloaded between them; {threading.active_count()} Python threads at the end"
    report("responsiveness", rows, note)


if __name__ == "__main__":
    main()
