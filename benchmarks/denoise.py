"""What the network knows of noisy atlases, beside a linear filter with their covariance: errors at the levels that sampling visits.

    python benchmarks/denoise.py RUN/shards [BUNDLE] [--limit 192]

Both clean the same noisy atlases of a data set, given their captions and no guidance. The filter's covariance is that of every other
object; errors are mean squares over normalised values (1 is knowing nothing) of objects that it was not taken from. Where a network
corrects a prior, that is part of what it knows.
"""

from __future__ import annotations

import argparse
import zlib
from pathlib import Path

import torch
from _report import report

from generator.atlas import Atlas, from_atlas, pack
from generator.model.editing import clean_estimate
from generator.model.folding import fold, unfold
from generator.model.pipeline import GaussianAtlasPipeline
from generator.model.prior import PriorAccumulator
from trainer.dataset import read_shards
from trainer.finetune import ATTRIBUTES

BATCH = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", nargs="?", type=Path, help="folder of atlases-*.tar")
    parser.add_argument("bundle", nargs="?", default="models/starter")
    parser.add_argument("--limit", type=int, default=192, help="atlases that are cleaned (default: 192)")
    options = parser.parse_args()
    if options.shards is None:
        print("denoise: name the shards of a run, such as runs/everyday/shards; nothing measured")
        return
    pipeline = GaussianAtlasPipeline.from_pretrained(options.bundle)
    accumulator, atlases, captions = PriorAccumulator(pipeline.layout.id), [], []
    for sample, layout_id in read_shards(options.shards):
        values = sample.values
        if sample.spec != pipeline.channels:
            values = pack(from_atlas(Atlas(values, layout_id, sample.spec), pipeline.layout), pipeline.layout, pipeline.channels).values
        values = pipeline.normalization.normalize(values)
        if zlib.crc32(sample.record["object"].encode()) % 2:
            accumulator.update(values[None])
        else:
            atlases.append(values)
            captions.append(sample.record["captions"][0])
    chosen = range(0, len(atlases), max(1, len(atlases) // options.limit))
    clean = torch.stack([atlases[index] for index in chosen])
    text = pipeline._encode([captions[index] for index in chosen])
    prior, generator, rows = accumulator.result(), torch.Generator().manual_seed(0), []
    scheduler = pipeline._scheduler(10, 1.0)
    factor = int(pipeline.info.get("fold", 1))
    for timestep in scheduler.timesteps:
        rate = scheduler.alphas_cumprod[int(timestep)]
        alpha, sigma = rate.sqrt(), (1 - rate).sqrt()
        noisy = alpha * clean + sigma * torch.randn(clean.shape, generator=generator)
        found = []
        for start in range(0, len(clean), BATCH):
            predict = pipeline._predictor(text[start : start + BATCH], None, 1.0, None)
            with torch.no_grad():
                found.append(unfold(predict(fold(noisy[start : start + BATCH], factor), timestep), factor))
        network = clean_estimate(torch.cat(found), noisy, alpha, sigma, scheduler.config.prediction_type)
        row = {"signal / noise": float(rate / (1 - rate))}
        for name, estimate in (("network", network), ("filter", prior.filter(noisy, alpha, sigma).mean)):
            errors = (estimate - clean).square().mean((0, 2, 3)).reshape(len(ATTRIBUTES), -1).mean(1)
            row |= {f"{name}: {attribute}": float(error) for attribute, error in zip(ATTRIBUTES, errors, strict=True)}
        rows.append(row)
    report("denoise", rows, f"{pipeline.name}, {len(clean)} atlases of {options.shards.name}, given their captions; mean squared errors")


if __name__ == "__main__":
    main()
