"""Generated objects beside their nearest training objects: is it an object, is it the one asked for, is it a copy?"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from generator.atlas import Atlas, Normalization, from_atlas
from generator.errors import InputError
from generator.gaussians import Gaussians
from generator.model.pipeline import GaussianAtlasPipeline
from generator.render import Cameras, render, save_png
from trainer.dataset import Sample, read_shards

# Channels that say what an object is: offsets and colours, without the opacity copies, scales and rotations.
_SHAPE, _COLOR = slice(0, 3), slice(4, 7)
# An object that covers less of every picture than this has failed.
_LEAST_COVERAGE = 0.005


def nearest_report(
    bundle: str | Path, shards: str | Path, prompts: Sequence[str], output: str | Path, seeds: Sequence[int] = (0, 1), size: int = 192
) -> str:
    """Draw every prompt with every seed and write `evaluation.png` and `evaluation.json` into `output`.

    The picture has a row for each prompt: for each seed two views of the generated object, then one view of the training
    object nearest to it. The JSON has, for each object, its distance to that one beside the distance which training
    objects have to their own nearest neighbours (a generated object far below it is a copy), whether the nearest bears
    the prompt's noun, and how much of the picture it covers.

    Args:
        size: side of one picture in pixels.

    Returns:
        One line that sums up.

    Raises:
        InputError: there are no prompts, or the shards belong to another layout.
    """
    if not prompts:
        raise InputError("there are no prompts to draw: give at least one with --prompts")
    pipeline = GaussianAtlasPipeline.from_pretrained(bundle, allow_download=False)
    samples: list[Sample] = []
    for sample, layout_id in read_shards(shards):
        if layout_id != pipeline.layout.id:
            raise InputError(f"{shards} has layout {layout_id}, the bundle {pipeline.layout.id}: they do not belong together")
        samples.append(sample)
    known = torch.stack([_signature(sample.values, pipeline.normalization) for sample in samples])
    cameras = Cameras.orbit(2, size, start=30.0)
    rows, records = [], []
    for prompt in prompts:
        cells = []
        for seed in seeds:
            result = pipeline(prompt, seed=seed)
            distances = (known - _signature(result.atlases[0].values, pipeline.normalization)).square().mean(1).sqrt()
            nearest = int(distances.argmin())
            drawn = render(result.gaussians[0], cameras)
            cells += [drawn.rgb[0], drawn.rgb[1], render(_gaussians(samples[nearest], pipeline), cameras[:1]).rgb[0]]
            coverage = drawn.alpha.mean((1, 2)).max().item()
            records.append(
                {
                    "prompt": prompt,
                    "seed": seed,
                    "nearest": samples[nearest].id,
                    "nearest_caption": samples[nearest].record["captions"][0],
                    "distance": round(distances[nearest].item(), 4),
                    "agrees": _noun(prompt) in samples[nearest].record["captions"][0].split(),
                    "coverage": round(coverage, 4),
                    "failed": coverage < _LEAST_COVERAGE,
                    "seconds": {stage: round(value, 2) for stage, value in result.seconds.items()},
                }
            )
        rows.append(torch.cat(cells, dim=1))
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    save_png(torch.cat(rows, dim=0), output / "evaluation.png")
    between = torch.cdist(known, known) / known.shape[1] ** 0.5
    between.fill_diagonal_(float("inf"))
    summary = {
        "model": pipeline.name,
        "model_hash": pipeline.model_hash,
        "training_objects": len({sample.record["object"] for sample in samples}),
        "training_atlases": len(samples),
        "training_nearest_distance_median": round(between.amin(1).median().item(), 4) if len(samples) > 1 else None,
        "agreement": round(sum(record["agrees"] for record in records) / len(records), 3),
        "failed": sum(record["failed"] for record in records),
        "objects": records,
    }
    partial = output / ".evaluation.json.partial"
    partial.write_text(json.dumps(summary, indent=1), encoding="utf-8")
    os.replace(partial, output / "evaluation.json")
    return (
        f"{len(records)} objects, {summary['failed']} failed, the nearest training object bears the prompt's noun in "
        f"{summary['agreement']:.0%}; see {output / 'evaluation.png'}"
    )


def _signature(values: Tensor, normalization: Normalization) -> Tensor:
    """Normalised shape and colour of raw atlas values [16, H, W], flat."""
    normalized = normalization.normalize(values)
    return torch.cat([normalized[_SHAPE], normalized[_COLOR]]).flatten()


def _gaussians(sample: Sample, pipeline: GaussianAtlasPipeline) -> Gaussians:
    return from_atlas(Atlas(sample.values, pipeline.layout.id, sample.spec), pipeline.layout)


def _noun(prompt: str) -> str:
    """The last word of a prompt, which in this vocabulary is the thing asked for."""
    return prompt.split()[-1].lower()
