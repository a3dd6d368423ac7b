"""Transport of real objects to the sphere: seconds, memory and cost beside POT, SciPy and lap, each in its own process."""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from _report import report

from generator.atlas.layout import fibonacci_sphere
from trainer.transport import QUALITIES, assign

# A thin chair, a plant, a car, a bowl, a chandelier and a horse.
OBJECTS = (
    "blend-swap-cc-0-antiquechair",
    "blend-swap-cc-0-augalas",
    "kator-legaz-concept-sedan-02",
    "kator-legaz-bowl",
    "scopia-chandelier-lamp",
    "blend-swap-cc-0-horse2",
)
SIZES = (1024, 4096, 16384)
LARGE = (65536, 262144)  # for "fast" alone: how it grows
PEERS = ("ot.emd", "scipy", "lap")
CACHE = Path("build/benchmarks/transport")


def surfaces() -> dict[str, Path]:
    """Points on the visible surface of every object, as a fit starts from them; rendered once."""
    from trainer.fit.initialize import surface_points
    from trainer.sources import SWEET_HOME_3D, open_source
    from trainer.views import Views, ViewSettings, render_objects

    paths = {name: CACHE / f"{name}.npy" for name in OBJECTS}
    if not all(path.is_file() for path in paths.values()):
        objects = [source for source in open_source(SWEET_HOME_3D, "runs/sources") if source.id in OBJECTS]
        render_objects(objects, CACHE / "views", ViewSettings(train=24, held_out=0, size=256, samples=1), workers=1)
        for name, path in paths.items():
            np.save(path, surface_points(Views.load(CACHE / "views" / f"{name}.npz"))[0])
    return paths


def solve(solver: str, points: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, float]:
    """The target of each point, and the certified gap where the solver gives one."""
    if solver in QUALITIES:
        result = assign(points, targets, solver)
        return result.indices, result.gap
    import ot

    costs = ot.dist(points, targets)
    if solver == "ot.emd":
        return ot.emd([], [], costs, numItermax=100_000_000).argmax(1), np.nan
    if solver == "scipy":
        from scipy.optimize import linear_sum_assignment

        return linear_sum_assignment(costs)[1], np.nan
    import lap

    return lap.lapjv(costs)[1], np.nan


def measure(solver: str, path: Path, count: int) -> dict:
    """One solver on one object, in this process: seconds after a small warm-up, added memory, cost, gap."""
    points = np.load(path).astype(np.float64)
    points = points[np.random.default_rng(0).choice(len(points), count, replace=len(points) < count)]
    targets = fibonacci_sphere(count).double().numpy()
    solve(solver, points[:600], fibonacci_sphere(600).double().numpy())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    indices, gap = solve(solver, points, targets)
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "MB": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
        "cost": float(((points - targets[indices]) ** 2).sum(1).mean()),
        "gap": gap,
    }


def apart(solver: str, path: Path, count: int, limit: float) -> dict | None:
    """`measure` in a process of its own; None if it did not end within `limit` seconds."""
    command = [sys.executable, __file__, "--solve", solver, str(path), str(count)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=True)
    except subprocess.TimeoutExpired:
        return None
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=float, default=900, help="seconds after which a solver is stopped (default: 900)")
    parser.add_argument("--all", action="store_true", help=f"the peers at N = {SIZES[-1]} on every object, not on the first alone (hours)")
    parser.add_argument("--solve", nargs=3, metavar=("SOLVER", "POINTS", "N"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.solve:
        solver, path, count = options.solve
        print(json.dumps(measure(solver, Path(path), int(count))))
        return
    rows = []
    for place, (name, path) in enumerate(surfaces().items()):
        for count in SIZES + LARGE:
            solvers = tuple(QUALITIES) if count in SIZES else ("fast",)
            if count < SIZES[-1] or (count == SIZES[-1] and (place == 0 or options.all)):
                solvers += PEERS
            elif count in LARGE and place:
                continue
            found = {solver: apart(solver, path, count, options.limit) for solver in solvers}
            best = (found.get("exact") or found["fast"])["cost"]
            reference = found.get("ot.emd")
            for solver, result in found.items():
                row = {"object": name, "N": count, "solver": solver}
                if result is None:
                    row |= {"seconds": f"> {options.limit:.0f}", "of ot.emd": "", "above exact %": "", "gap %": "", "MB": ""}
                else:
                    row |= {
                        "seconds": result["seconds"],
                        "of ot.emd": result["seconds"] / reference["seconds"] if reference else "",
                        "above exact %": 100 * (result["cost"] / best - 1) if "exact" in found else "",
                        "gap %": "" if np.isnan(result["gap"]) else 100 * result["gap"],
                        "MB": result["MB"],
                    }
                rows.append(row)
                print(*row.values(), flush=True)
    report("transport", rows, "Points on the surface of six objects to the Fibonacci sphere; one process and one core each")


if __name__ == "__main__":
    main()
