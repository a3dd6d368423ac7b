"""docs/ablations.md: tables with intervals over seeds, curves and pictures of what `trainer.ablations` trained."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from generator.atlas import AtlasLayout
from generator.errors import InputError
from generator.files import replacing
from generator.render import Cameras, render, save_png

from .ablations import BASELINE, VARIANTS, ceiling, curve_of, finished, made, scores_of
from .markdown import table
from .presets import Preset

CONFIDENCE = 0.95
PICTURED = 8  # prompts
PIXELS = 128  # side of one picture


@dataclass(frozen=True)
class Metric:
    """One column."""

    key: str  # in scores.json
    title: str
    better: int  # 1 where more is better, -1 where less is, 0 for a control
    digits: int


METRICS = (
    Metric("held_out_loss", "held-out loss", -1, 3),
    Metric("score", "judge's score", 1, 3),
    Metric("shuffled", "with other captions", 0, 3),
    Metric("r_precision", "R-precision", 1, 3),
    Metric("category_accuracy", "category accuracy", 1, 3),
    Metric("kernel_distance", "kernel distance", -1, 4),
)


@dataclass(frozen=True)
class Interval:
    """Mean over seeds with the half width of its confidence interval (Student's t); infinite for a single seed."""

    mean: float
    half: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        from scipy.stats import t

        if len(values) < 2:
            return cls(statistics.fmean(values), float("inf"))
        spread = statistics.stdev(values) / len(values) ** 0.5
        return cls(statistics.fmean(values), float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * spread)

    def text(self, digits: int, sign: bool = False) -> str:
        mean = f"{self.mean:+.{digits}f}" if sign else f"{self.mean:.{digits}f}"
        return mean if self.half == float("inf") else f"{mean} ± {self.half:.{digits}f}"

    @property
    def clear(self) -> bool:
        """Whether zero lies outside."""
        return abs(self.mean) > self.half


def write(preset: Preset, run: Path, output: Path) -> None:
    """Write the page and its pictures, into `images/` beside it.

    Raises:
        InputError: no variant has finished beside the baseline.
    """
    seeds = {name: finished(run, name) for name in VARIANTS}
    if not seeds[BASELINE] or sum(bool(found) for found in seeds.values()) < 2:
        raise InputError(f"{run}: the baseline and one variant at least must have finished: run `python -m trainer ablations` first")
    seeds = {name: found for name, found in seeds.items() if found}
    scores = {name: {seed: scores_of(run, name, seed) for seed in found} for name, found in seeds.items()}
    images = output.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    curves(run, seeds, images / "ablation-curves.png")
    save_png(pictures(preset, run, seeds), images / "ablation-samples.png")
    with replacing(output) as partial:
        partial.write_text(_page(preset, run, seeds, scores), encoding="utf-8")


def results(scores: dict[str, dict[int, dict]], top: dict) -> str:
    """Every variant's metrics, mean and interval over its seeds; below them what the fits themselves get."""
    rows = []
    for name, of_seeds in scores.items():
        cells = [Interval.of([s[m.key] for s in of_seeds.values()]).text(m.digits) if _has(name, m) else "" for m in METRICS]
        rows.append([VARIANTS[name].title, str(len(of_seeds)), *cells])
    rows.append(["the fits themselves (ceiling)", "", *(f"{top[m.key]:.{m.digits}f}" if m.key in top else "" for m in METRICS)])
    return table(["", "seeds", *(m.title for m in METRICS)], rows)


def differences(scores: dict[str, dict[int, dict]]) -> str:
    """Variant minus baseline, seed by seed: the same batches and noise went into both. Bold where the interval leaves out zero."""
    rows = []
    judged = [metric for metric in METRICS if metric.better]
    for name, of_seeds in scores.items():
        common = sorted(set(of_seeds) & set(scores[BASELINE]))
        if name == BASELINE or not common:
            continue
        cells = []
        for metric in judged:
            if not _has(name, metric):
                cells.append("")
                continue
            interval = Interval.of([of_seeds[seed][metric.key] - scores[BASELINE][seed][metric.key] for seed in common])
            text = interval.text(metric.digits, sign=True)
            verdict = "better" if interval.mean * metric.better > 0 else "worse"
            cells.append(f"**{text}** ({verdict})" if interval.clear else text)
        rows.append([VARIANTS[name].title, *cells])
    return table(["minus the baseline", *(m.title for m in judged)], rows)


def _has(name: str, metric: Metric) -> bool:
    """Losses of other values cannot be compared."""
    return metric.key != "held_out_loss" or VARIANTS[name].comparable


def head_start(run: Path, name: str, seeds: Sequence[int]) -> list[int | None]:
    """For each seed the step at which the baseline's held-out loss is as low as the variant's at its end; None where it never is."""
    steps = []
    for seed in seeds:
        goal = curve_of(run, name, seed)[-1]["held_out"]
        reached = (point["step"] for point in curve_of(run, BASELINE, seed) if point["held_out"] <= goal)
        steps.append(next(reached, None))
    return steps


def curves(run: Path, seeds: dict[str, list[int]], path: Path) -> None:
    """Held-out loss against steps, mean of the seeds with their range."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, found in seeds.items():
        if not VARIANTS[name].comparable:
            continue
        runs = [curve_of(run, name, seed) for seed in found]
        values = torch.tensor([[point["held_out"] for point in points] for points in runs])
        steps = [point["step"] for point in runs[0]]
        axes.plot(steps, values.mean(0), label=VARIANTS[name].title)
        axes.fill_between(steps, values.amin(0), values.amax(0), alpha=0.2)
    axes.set_xlabel("steps")
    axes.set_ylabel("loss on held-out objects")
    axes.set_yscale("log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)


def pictures(preset: Preset, run: Path, seeds: dict[str, list[int]]) -> Tensor:
    """[H, W, 3]: a row for each variant's first seed, a column for each of some prompts."""
    rows = []
    for name, found in seeds.items():
        objects = made(run / f"{name}-{found[0]}", preset)
        chosen = objects[:: max(1, len(objects) // PICTURED)][:PICTURED]
        rows.append(torch.cat([render(gaussians, Cameras.orbit(1, PIXELS, start=30.0)).rgb[0] for _, gaussians in chosen], dim=1))
    return torch.cat(rows)


def layouts() -> str:
    """How many cells hold the same sphere point under both projections."""
    rows = []
    for size in (32, 64, 128):
        first, second = (AtlasLayout.load_default(size, projection).point_of_cell for projection in ("equirectangular", "equal_area"))
        rows.append([f"{size} x {size}", f"{(first == second).double().mean():.1%}"])
    return table(["cells", "with the same sphere point"], rows)


def _page(preset: Preset, run: Path, seeds: dict[str, list[int]], scores: dict[str, dict[int, dict]]) -> str:
    config, base = preset.finetune, preset.pretrain
    objects = made(run / f"{BASELINE}-{seeds[BASELINE][0]}", preset)
    prompts = [prompt for prompt, _ in objects]
    shown = ", ".join(prompts[:: max(1, len(prompts) // PICTURED)][:PICTURED])
    head = ""
    if "scratch" in seeds:
        common = sorted(set(seeds["scratch"]) & set(seeds[BASELINE]))
        steps = head_start(run, "scratch", common)
        words = ", ".join("never" if step is None else str(step) for step in steps)
        head = (
            f"The transferred network's held-out loss is as low as that of random weights after {config.max_steps} steps at step {words} "
            f"(seeds {', '.join(map(str, common))}).\n\n"
        )
    return f"""# Ablations

Written by `python -m trainer ablations`; nothing here is edited by hand. What follows from it is in [decisions](decisions.md).

{preset.limit} objects of Sweet Home 3D, fits of {preset.fit.count:,} Gaussians, atlases of {preset.size} x {preset.size} cells, the plain
path of the paper (no folding, 16 channels): a UNet of 4 channels trained on the objects' renders for
{base.max_steps:,} steps of {base.batch_size}, widened, and fine-tuned on those of eight kinds
for {config.max_steps:,} steps of {config.batch_size}.
A tenth of the objects was held out of both. Each variant changes one thing and sees the same batches and noise.
Every network draws the captions of all {len(prompts)} objects, with their colours, in {preset.steps} steps at guidance
{preset.guidance_scale}; the offline judge (`trainer/evaluate/judge.py`, a stand-in for CLIP) looks at renders.
± is the {CONFIDENCE:.0%} interval of the mean over seeds (Student's t).

This is a small model after a short training: it says what helps here, not what would after a million steps on eight GPUs.

{results(scores, ceiling(run))}

{differences(scores)}

The difference is taken seed by seed; bold where its interval leaves out zero. Losses of other values (another normalisation or
flattening) cannot be compared and are left out.

## Held-out loss

{head}![Held-out loss against steps](images/ablation-curves.png)

## What they draw

Rows: {"; ".join(VARIANTS[name].title for name in seeds)}. Columns: {shown}. The first seed of each, nothing selected.

![A row of objects for each variant](images/ablation-samples.png)

## Equirectangular against equal-area

The transport of the plane to the grid undoes what the projections do differently. At the size trained here both give the same cells,
so training them against each other would compare a run with itself:

{layouts()}

What differs at larger sizes is measured in [decisions](decisions.md).
"""
