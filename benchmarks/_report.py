"""What every benchmark shares: repeated timing, the machine, a table on the screen and JSON beside it."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

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
