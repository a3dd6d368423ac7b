"""What the benchmarks of atlases share: their arguments, real objects, and how much of an object is left."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

from generator.atlas import CHANNELS, Atlas
from generator.formats import load
from generator.gaussians import Gaussians
from generator.model.pipeline import GaussianAtlasPipeline
from generator.render import Cameras, render
from trainer.fit import psnr

PROMPTS = ("an armchair", "a lamp", "a car", "a plant", "a table", "a bed", "a sofa", "a wardrobe")
CAMERAS = Cameras.orbit(4, 256)


def arguments(description: str, size: int) -> argparse.ArgumentParser:
    """The arguments that all of them take."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("fits", nargs="?", type=Path, help="folder of fitted .ply files; without it, objects that the starter model draws")
    parser.add_argument("--size", type=int, default=size, help=f"cells a side (default: {size})")
    parser.add_argument("--limit", type=int, default=12, help="objects, spread over the folder; 0 takes all (default: 12)")
    return parser


def source(folder: Path | None) -> str:
    """What `objects` gives, in words."""
    return f"fits of {folder}" if folder else "objects drawn by the starter model"


def objects(folder: Path | None, limit: int) -> list[Gaussians]:
    """Real fits, or what the bundled model draws where there are none."""
    if folder is None:
        pipeline = GaussianAtlasPipeline.from_pretrained("models/starter")
        return [pipeline(prompt, seed=0).gaussians[0] for prompt in PROMPTS[: limit or None]]
    paths = sorted(folder.glob("*.ply"))
    if not paths:
        sys.exit(f"{folder}: no .ply in this folder")
    return [load(path) for path in paths[:: max(1, len(paths) // limit) if limit else 1]]


def blurred(atlas: Atlas, width: int, channels: list[int] | None = None) -> Atlas:
    """The atlas with these channels (by default all) averaged over squares of `width` cells: what a network that is unsure paints."""
    channels = list(range(CHANNELS)) if channels is None else channels
    padded = torch.nn.functional.pad(atlas.values[None], (width // 2,) * 4, mode="replicate")
    values = atlas.values.clone()
    values[channels] = torch.nn.functional.avg_pool2d(padded, width, 1)[0, channels]
    return replace(atlas, values=values)


def foreground_psnr(gaussians: Gaussians, reference: Gaussians) -> float:
    """dB over the pixels that the reference covers, in four views on white."""
    got, want = (render(each, CAMERAS, background=(1, 1, 1)) for each in (gaussians, reference))
    covered = want.alpha > 1 / 255
    return psnr((got.rgb - want.rgb).square()[covered].mean())
