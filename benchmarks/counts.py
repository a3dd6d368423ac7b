"""Objects with another number of Gaussians than the atlas has cells: what each way of bringing them to it loses.

More than cells: merging neighbours against dropping the least visible. Fewer: leaving cells empty against splitting the most
visible. dB on object pixels against the object before, through the whole atlas; every figure is a mean over the objects.
"""

from __future__ import annotations

import torch
from _atlases import arguments, foreground_psnr, objects, source
from _report import report

from generator.atlas import AtlasLayout, from_atlas
from generator.gaussians import Gaussians, concatenate, quaternions_to_matrices
from trainer.atlas import resize, to_atlas, visibility
from trainer.doctor import channel_statistics

SHARES = (4.0, 2.0, 1.25, 0.9, 0.64, 0.25)  # Gaussians over cells; GaussianVerse's mean of 10,435 on 128 x 128 cells is 0.64


def drop(gaussians: Gaussians, count: int) -> Gaussians:
    """The most visible."""
    return gaussians[torch.argsort(visibility(gaussians), descending=True)[:count].sort().values]


def split(gaussians: Gaussians, count: int) -> Gaussians:
    """The most visible halved along their longest axis, a quarter of all at a time, until there are enough.

    Two Gaussians half a scale to either side come closest to the one they are made of (least squares along the axis, fitted
    over the opacity) with these shares of its opacity and its scale.
    """
    while missing := count - len(gaussians):
        share = min(missing, max(1, len(gaussians) // 4))
        order = torch.argsort(visibility(gaussians), descending=True)
        chosen, rest = gaussians[order[:share]], gaussians[order[share:]]
        axis, opacity = chosen.scales.argmax(1, keepdim=True), chosen.opacities
        longest = chosen.scales.gather(1, axis)
        direction = quaternions_to_matrices(chosen.quaternions).gather(2, axis[:, None].expand(-1, 3, 1)).squeeze(2)
        halves = chosen.replace(
            scales=chosen.scales.scatter(1, axis, longest * (0.843 - 0.107 * opacity[:, None])),
            opacities=opacity * (0.590 + 0.143 * opacity + 0.070 * opacity**2),
        )
        step = 0.5 * longest * direction
        gaussians = concatenate([rest, halves.replace(means=chosen.means + step), halves.replace(means=chosen.means - step)])
    return gaussians


@torch.no_grad()
def main() -> None:
    options = arguments(__doc__, size=64).parse_args()
    layout = AtlasLayout.load_default(options.size)
    found = objects(options.fits, options.limit)
    rows = []
    for share in SHARES:
        count = round(share * layout.count)
        objects_now = [resize(gaussians, count) for gaussians in found if len(gaussians) >= count]
        if not objects_now:
            continue
        # `resize` leaves fewer Gaussians than there are cells as they are.
        ways = {"merge": resize, "drop": drop} if share > 1 else {"empty": resize, "split": split}
        for name, way in ways.items():
            atlases = [to_atlas(way(gaussians, layout.count), layout) for gaussians in objects_now]
            scores = [foreground_psnr(from_atlas(atlas, layout), was) for atlas, was in zip(atlases, objects_now, strict=True)]
            rough = [
                channel.roughness for atlas in atlases for channel in channel_statistics(atlas) if not channel.name.startswith("opacity")
            ]
            rows.append({
                "Gaussians / cells": share,
                "way": name,
                "objects": len(objects_now),
                "dB": sum(scores) / len(scores),
                "worst dB": min(scores),
                "roughness without opacity": sum(rough) / len(rough),
            })  # fmt: skip
    if not rows:
        raise SystemExit(f"no object has {min(SHARES):g} Gaussians a cell: give another --size")
    report("counts", rows, f"{len(found)} {source(options.fits)} at {options.size} x {options.size} cells")


if __name__ == "__main__":
    main()
