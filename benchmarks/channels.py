"""How ellipsoids are written into cells: as fitted, nearest the world's axes, and as the logarithm of their covariance.

A network that is unsure averages; so each atlas is blurred in its scale and rotation channels alone, read back and drawn.
Every figure is a mean over the objects.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from _report import report
from torch import Tensor

from generator.atlas import Atlas, AtlasLayout, ChannelSpec, from_atlas
from generator.formats import load
from generator.gaussians import Gaussians
from generator.model.pipeline import GaussianAtlasPipeline
from generator.render import Cameras, render
from trainer.atlas import to_atlas

SPECS = {
    "as fitted": ChannelSpec(rotation="canonical"),  # its quaternions and scales are put back as they were
    "canonical": ChannelSpec(rotation="canonical"),
    "log_covariance": ChannelSpec(rotation="log_covariance"),
}
SCALE, ROTATION = [8, 9, 10], [12, 13, 14, 15]
PROMPTS = ("an armchair", "a lamp", "a car", "a plant", "a table", "a bed", "a sofa", "a wardrobe")
CAMERAS = Cameras.orbit(4, 256)


def objects(folder: Path | None, limit: int) -> list[Gaussians]:
    """Real fits, or what the bundled model draws where there are none."""
    if folder is None:
        pipeline = GaussianAtlasPipeline.from_pretrained("models/starter")
        return [pipeline(prompt, seed=0).gaussians[0] for prompt in PROMPTS[: limit or None]]
    paths = sorted(folder.glob("*.ply"))
    return [load(path) for path in paths[:: max(1, len(paths) // limit) if limit else 1]]


def written(gaussians: Gaussians, layout: AtlasLayout, name: str) -> tuple[Atlas, Gaussians]:
    """The atlas of an object under one of `SPECS`, and the object in the order of its cells."""
    atlas = to_atlas(gaussians, layout, spec=SPECS[name])
    ordered = from_atlas(atlas, layout)
    if name == "as fitted":
        nearest = torch.cdist(ordered.means, gaussians.means).argmin(1)
        shape = torch.cat([gaussians.scales[nearest].log(), gaussians.quaternions[nearest]], dim=1)
        values = atlas.values.clone()
        values[SCALE + ROTATION] = shape.T.reshape(7, layout.size, layout.size).to(values)
        atlas = Atlas(values, layout.id, atlas.spec)
    return atlas, ordered


def variation(values: Tensor) -> Tensor:
    """Mean absolute difference of adjacent cells of each channel [..., H, W] -> [...]."""
    return (values[..., 1:, :] - values[..., :-1, :]).abs().mean((-2, -1)) + (values[..., 1:] - values[..., :-1]).abs().mean((-2, -1))


def blurred(atlas: Atlas, width: int) -> Atlas:
    """The atlas with its scale and rotation channels averaged over squares of `width` cells."""
    padded = torch.nn.functional.pad(atlas.values[None], (width // 2,) * 4, mode="replicate")
    smooth = torch.nn.functional.avg_pool2d(padded, width, 1)[0]
    values = atlas.values.clone()
    values[SCALE + ROTATION] = smooth[SCALE + ROTATION]
    return Atlas(values, atlas.layout_id, atlas.spec)


def foreground_psnr(gaussians: Gaussians, reference: Gaussians) -> float:
    """dB over the pixels that the reference covers, in four views on white."""
    got, want = (render(each, CAMERAS, background=(1, 1, 1)) for each in (gaussians, reference))
    covered = want.alpha > 1 / 255
    return -10 * float(torch.log10((got.rgb - want.rgb).square()[covered].mean().clamp_min(1e-10)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("fits", nargs="?", type=Path, help="folder of fitted .ply files; without it, objects that the starter model draws")
    parser.add_argument("--size", type=int, default=64, help="cells a side (default: 64)")
    parser.add_argument("--limit", type=int, default=12, help="objects, spread over the folder; 0 takes all (default: 12)")
    options = parser.parse_args()
    layout = AtlasLayout.load_default(options.size)
    shuffle = torch.randperm(layout.count, generator=torch.Generator().manual_seed(0))
    found = objects(options.fits, options.limit)
    rows = []
    for name in SPECS:
        atlases, ordered = zip(*(written(gaussians, layout, name) for gaussians in found), strict=True)
        values = torch.stack([atlas.values for atlas in atlases]).double()
        values = (values - values.mean((0, 2, 3), keepdim=True)) / values.std((0, 2, 3), keepdim=True).clamp_min(1e-6)
        shuffled = values.flatten(2)[..., shuffle].reshape(values.shape)
        row = {"channels": name}
        for group, channels in (("rotation", ROTATION), ("scale", SCALE)):
            ratio = variation(values[:, channels]).sum() / variation(shuffled[:, channels]).sum()
            row[f"{group} variation / shuffled"] = float(ratio)
        for width in (3, 5):
            scores = [
                foreground_psnr(from_atlas(blurred(atlas, width), layout), want) for atlas, want in zip(atlases, ordered, strict=True)
            ]
            row[f"blurred {width} x {width} dB"] = sum(scores) / len(scores)
        rows.append(row)
    source = options.fits or "objects drawn by the starter model"
    report("channels", rows, f"{len(found)} objects of {source} at {options.size} x {options.size} cells")


if __name__ == "__main__":
    main()
