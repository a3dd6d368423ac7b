"""Strategies of fitting against each other: held-out scores, Gaussians and seconds, with and without a perceptual loss."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from _report import report
from transport import OBJECTS

from generator.gaussians import Gaussians
from generator.render import render, save_png
from trainer.fit import FitConfig, FitResult, fit, score
from trainer.views import Views

CACHE = Path("build/benchmarks/fit")
GOALS = (30, 33)  # dB on held-out views
LOOK_EVERY = 20  # steps between two looks whether a goal is reached


def views(folder: Path | None, limit: int) -> list[Path]:
    """Files of views: some of a folder's, spread over it, or those of six objects, rendered once."""
    if folder:
        paths = sorted(folder.glob("*.npz"))
        if not paths:
            sys.exit(f"{folder}: no .npz in this folder")
        return paths[:: max(1, len(paths) // limit)][:limit]
    from trainer.sources import SWEET_HOME_3D, open_source
    from trainer.views import ViewSettings, render_objects, views_path

    paths = [views_path(CACHE, name) for name in OBJECTS]
    if not all(path.is_file() for path in paths):
        objects = [source for source in open_source(SWEET_HOME_3D, "runs/sources") if source.id in OBJECTS]
        render_objects(objects, CACHE, ViewSettings(train=24, held_out=4, size=256, samples=64), workers=1)
    return paths


def configurations(counts: list[int], steps: int) -> list[tuple[str, FitConfig]]:
    """Named configurations: each strategy at every count, at the first one also with a perceptual loss, which takes the longest."""
    found = []
    for count in counts:
        fixed = FitConfig(count=count, bound=count, steps=steps)
        # So near the bound, and so easily steep, that growth presses against it for most of the changes.
        growing = replace(fixed, count=3 * count // 4, grow_gradient=1e-4)
        found += [("surface, not optimised", replace(fixed, steps=0)), ("fixed", fixed)]
        found += [(name, replace(growing, strategy=name)) for name in ("opacity", "visibility", "contribution", "mcmc")]
    first = counts[0]
    blind = FitConfig(count=first, bound=first, steps=steps, start="outline")
    found.append(("from outlines, fixed", blind))
    found.append(("from outlines, mcmc", replace(blind, count=3 * first // 4, strategy="mcmc")))
    seen = FitConfig(count=first, bound=first, steps=steps, perceptual_weight=0.05)
    found.append(("fixed, perceptual", seen))
    found.append(("visibility, perceptual", replace(seen, count=3 * first // 4, grow_gradient=1e-4, strategy="visibility")))
    return found


def measure(object_views: Views, config: FitConfig) -> tuple[FitResult, dict]:
    """One fit: its result, and processor seconds in all and to each goal (looking whether it is reached not counted)."""
    looking = seconds = 0.0
    goals = dict.fromkeys(GOALS)
    start = time.process_time()

    def look(step: int, gaussians: Gaussians) -> None:
        nonlocal looking, seconds
        if step % LOOK_EVERY and step != config.steps:
            return
        before = time.process_time()
        seconds = before - start - looking
        reached = score(gaussians, object_views, with_perceptual=False).psnr
        goals.update({goal: seconds for goal, earlier in goals.items() if earlier is None and reached >= goal})
        looking += time.process_time() - before

    result = fit(object_views, config, look)
    return result, {"seconds": seconds, **goals}


def row(count: int, name: str, found: list[tuple[FitResult, dict]]) -> dict:
    def mean(values: list[float]) -> float:
        return statistics.fmean(values)

    results, times = zip(*found, strict=True)
    line = {
        "bound": count,
        "strategy": name,
        "Gaussians": round(mean([len(result.gaussians) for result in results])),
        "PSNR": round(mean([result.psnr for result in results]), 2),
        "on object": round(mean([result.psnr_foreground for result in results]), 2),
        "SSIM": round(mean([result.ssim for result in results]), 4),
        results[0].perceptual_name or "perceptual": round(mean([result.perceptual or 0.0 for result in results]), 4),
        "seconds": round(mean([each["seconds"] for each in times]), 1),
    }
    for goal in GOALS:
        reached = [each[goal] for each in times if each[goal] is not None]
        line[f"s to {goal} dB"] = f"{statistics.median(reached):.1f} ({len(reached)})" if reached else "- (0)"
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("views", nargs="?", type=Path, help="folder of views; without it, six objects are rendered at 256 pixels first")
    parser.add_argument("--limit", type=int, default=6, help="objects, spread over the folder (default: 6)")
    parser.add_argument("--steps", type=int, default=150, help="steps of every fit (default: 150)")
    parser.add_argument("--counts", type=int, nargs="+", default=[16384, 36864], help="bounds (default: 16384 36864)")
    parser.add_argument("--pictures", type=Path, help="folder for a picture of each object and bound: the target, then every configuration")
    options = parser.parse_args()
    torch.set_num_threads(1)
    paths = views(options.views, options.limit)
    fit(Views.load(paths[0]), FitConfig(count=256, steps=2))  # compiles
    chosen = configurations(options.counts, options.steps)
    found = [[] for _ in chosen]
    # Object by object, written down after each: a run that is stopped has compared everything on those it got to.
    for done, path in enumerate(paths, 1):
        object_views = Views.load(path)
        held_out = object_views.select("held_out")
        strips = {config.bound: [torch.from_numpy(held_out.composite()[0])] for _, config in chosen}
        for of_one, (name, config) in zip(found, chosen, strict=True):
            of_one.append(measure(object_views, config))
            strips[config.bound].append(render(of_one[-1][0].gaussians, held_out.cameras[:1]).rgb[0])
            print(path.stem, *row(config.bound, name, of_one[-1:]).values(), flush=True)
        for count, strip in strips.items() if options.pictures else ():
            options.pictures.mkdir(parents=True, exist_ok=True)
            save_png(torch.cat(strip, 1), options.pictures / f"{path.stem}-{count}.png")
        size = object_views.cameras.width
        note = f"{done} objects at {size} pixels, {options.steps} steps, one thread: means over held-out views; (n): objects that get there"
        report("fit", [row(config.bound, name, of_one) for of_one, (name, config) in zip(found, chosen, strict=True)], note)


if __name__ == "__main__":
    main()
