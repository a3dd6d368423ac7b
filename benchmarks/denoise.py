"""What the network knows of noisy atlases, beside a linear filter with their covariance: errors at the levels that sampling visits.

    python benchmarks/denoise.py RUN/shards [BUNDLE] [--limit 192] [--held-out SHARE]

Both clean the same noisy atlases of a data set, given their plainest captions and no guidance. The filter's covariance is that of
every other object; errors are mean squares over normalised values (1 is knowing nothing) of objects that it was not taken from. Where
a network corrects a prior, that is part of what it knows.

With the share that training held out (validation_share), these objects get rows of their own: what is known of them is understood,
what is known of the others alone is remembered. Where all is noise, the text alone is asked too: a ridge regression from a caption's
mean features to atlases, learned from every other object, at the strength of five that does best.
"""

from __future__ import annotations

import argparse
import math
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from _report import report
from torch import Tensor

from generator.atlas import Atlas, from_atlas, pack
from generator.model.editing import set_start
from generator.model.pipeline import GaussianAtlasPipeline
from generator.model.prior import AtlasPrior, PriorAccumulator
from trainer.dataset import read_shards
from trainer.finetune import ATTRIBUTES

BATCH = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", nargs="?", type=Path, help="folder of atlases-*.tar")
    parser.add_argument("bundle", nargs="?", default="models/starter")
    parser.add_argument("--limit", type=int, default=192, help="atlases that are cleaned (default: 192)")
    parser.add_argument("--held-out", type=float, default=0.0, metavar="SHARE", help="of the objects, as in training (default: 0)")
    options = parser.parse_args()
    if options.shards is None:
        print("denoise: name the shards of a run, such as runs/everyday/shards; nothing measured")
        return
    pipeline = GaussianAtlasPipeline.from_pretrained(options.bundle)
    accumulator = PriorAccumulator(pipeline.layout.id)
    others, groups = Group(), {"learned": Group(), "held out": Group()}
    for sample, layout_id in read_shards(options.shards):
        values = sample.values
        if sample.spec != pipeline.channels:
            values = pack(from_atlas(Atlas(values, layout_id, sample.spec), pipeline.layout), pipeline.layout, pipeline.channels).values
        values, number = pipeline.normalization.normalize(values), zlib.crc32(sample.record["object"].encode())
        # As the training loop's split, by the object's id.
        group = groups["held out"] if number % 10_000 < options.held_out * 10_000 else others if number % 2 else groups["learned"]
        if group is others:
            accumulator.update(values[None])
        group.add(values, sample.record["captions"][0])
    prior, rows = accumulator.result(), []
    regression = Regression(pipeline, others) if options.held_out else None
    for name, group in groups.items():
        if group.captions:
            rows += levels(pipeline, prior, group.thinned(options.limit), {"objects": name} if options.held_out else {}, regression)
    report("denoise", rows, f"{pipeline.name}, atlases of {options.shards.name}, given their captions; mean squared errors")


class Group:
    """Normalised atlases and a caption of each."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []
        self.captions: list[str] = []

    def add(self, values: Tensor, caption: str) -> None:
        self.values.append(values.half())
        self.captions.append(caption)

    def thinned(self, limit: int) -> tuple[Tensor, list[str]]:
        """At most about so many of them, evenly: [B, 16, H, W] and captions."""
        chosen = range(0, len(self.captions), max(1, len(self.captions) // limit))
        return torch.stack([self.values[index] for index in chosen]).float(), [self.captions[index] for index in chosen]


class Regression:
    """Ridge regression from the mean features of a caption's tokens to atlases."""

    def __init__(self, pipeline: GaussianAtlasPipeline, learned: Group) -> None:
        self.pipeline = pipeline
        clean, captions = learned.thinned(len(learned.captions))
        features = self.features(captions)
        self.centre, self.mean = features.mean(0), clean.mean(0)
        self.known, self.values = features - self.centre, (clean - self.mean).flatten(1)

    def features(self, captions: list[str]) -> Tensor:
        hidden = torch.cat(
            [self.pipeline.text_encoder.encode(captions[start : start + 64]).hidden for start in range(0, len(captions), 64)]
        )
        tokens = (hidden != 0).any(-1, keepdim=True)
        return hidden.sum(1) / tokens.sum(1)

    def estimates(self, captions: list[str]) -> Iterator[Tensor]:
        """Atlases [B, 16, H, W] that these captions mean, at each of five strengths."""
        products, asked = self.known @ self.known.T, (self.features(captions) - self.centre) @ self.known.T
        for strength in (0.01, 0.03, 0.1, 0.3, 1.0):
            ridge = strength * products.diagonal().sum() / self.known.shape[1] * torch.eye(len(products))
            yield self.mean + (asked @ torch.linalg.solve(products + ridge, self.values)).unflatten(1, self.mean.shape)


def levels(
    pipeline: GaussianAtlasPipeline, prior: AtlasPrior, group: tuple[Tensor, list[str]], row: dict, regression: Regression | None
) -> list[dict]:
    """A row for each of ten levels, beginning with `row`."""
    clean, captions = group
    generator, rows = torch.Generator().manual_seed(0), []
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    set_start(scheduler, 10, 1.0, torch.device("cpu"))
    alone = None if regression is None else min((errors(estimate, clean) for estimate in regression.estimates(captions)), key=sum)
    for timestep in scheduler.timesteps:
        rate = scheduler.alphas_cumprod[int(timestep)]
        alpha, sigma = rate.sqrt(), (1 - rate).sqrt()
        noisy = alpha * clean + sigma * torch.randn(clean.shape, generator=generator)
        parts = [slice(start, start + BATCH) for start in range(0, len(clean), BATCH)]
        network = torch.cat([pipeline.estimate(noisy[part], captions[part], int(timestep)) for part in parts])
        known = {"network": errors(network, clean), "filter": errors(prior.filter(noisy, alpha, sigma).mean, clean), "text alone": alone}
        rows.append(row | {"atlases": len(clean), "signal / noise": float(rate / (1 - rate))})
        for name, found in known.items():
            if found is not None:
                rows[-1] |= {f"{name}: {attribute}": error for attribute, error in zip(ATTRIBUTES, found, strict=True)}
        alone = None if alone is None else [math.nan] * len(ATTRIBUTES)
    return rows


def errors(estimate: Tensor, clean: Tensor) -> list[float]:
    """Mean square of the difference in each of `ATTRIBUTES`."""
    return (estimate - clean).square().mean((0, 2, 3)).reshape(len(ATTRIBUTES), -1).mean(1).tolist()


if __name__ == "__main__":
    main()
