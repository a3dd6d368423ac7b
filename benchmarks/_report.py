"""What every benchmark shares: repeated timing, the machine, a table on the screen and JSON beside it."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeVar

Result = TypeVar("Result")
RESULTS = Path(__file__).resolve().parent / "results"


def seconds(work: Callable[[], object], repeats: int = 5) -> float:
    """Median wall-clock seconds of `work` after one call to warm up."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def alone(work: Callable[..., Result], *arguments: object) -> Result:
    """What `work`, a function of a module, returns in a process of its own: its memory and what it loads are not another's.

    Raises:
        RuntimeError: the process ended without a result; it has said why.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, work, arguments))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError as error:
        raise RuntimeError(f"{work.__name__} failed in its process") from error
    finally:
        process.join()


def _send(sender: Connection, work: Callable, arguments: tuple) -> None:
    sender.send(work(*arguments))


def machine() -> dict:
    """Processor, cores, system and the versions that matter."""
    versions = {}
    for package in ("torch", "numpy", "diffusers", "bpy", "numba", "POT"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    model = ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        model = next((line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")), "")
    return {"cpu": model or platform.processor(), "cores": os.cpu_count(), "system": platform.platform(), "versions": versions}


def report(name: str, rows: list[dict], note: str) -> None:
    """Print the rows as a table under `note` and write benchmarks/results/NAME.json."""
    print(f"{note}\n")
    columns = list(rows[0])
    cells = [columns] + [[_show(row[column]) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"benchmark": name, "note": note, "machine": machine(), "rows": rows}, indent=1) + "\n", encoding="utf-8")
    print(f"\n{path.relative_to(RESULTS.parent.parent)}\n")


def _show(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
