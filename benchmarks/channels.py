"""How ellipsoids are written into cells: as fitted, nearest the world's axes, and as the logarithm of their covariance.

A network that is unsure averages; so each atlas is blurred in its scale and rotation channels alone, read back and drawn.
Every figure is a mean over the objects.
"""

from __future__ import annotations

import torch
from _atlases import arguments, blurred, foreground_psnr, objects, source
from _report import report
from torch import Tensor

from generator.atlas import Atlas, AtlasLayout, ChannelSpec, from_atlas
from generator.gaussians import Gaussians
from trainer.atlas import to_atlas

SPECS = {
    "as fitted": ChannelSpec(rotation="canonical"),  # its quaternions and scales are put back as they were
    "canonical": ChannelSpec(rotation="canonical"),
    "log_covariance": ChannelSpec(rotation="log_covariance"),
}
SCALE, ROTATION = [8, 9, 10], [12, 13, 14, 15]


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


def main() -> None:
    options = arguments(__doc__, size=64).parse_args()
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
                foreground_psnr(from_atlas(blurred(atlas, width, SCALE + ROTATION), layout), want)
                for atlas, want in zip(atlases, ordered, strict=True)
            ]
            row[f"blurred {width} x {width} dB"] = sum(scores) / len(scores)
        rows.append(row)
    report("channels", rows, f"{len(found)} {source(options.fits)} at {options.size} x {options.size} cells")


if __name__ == "__main__":
    main()
