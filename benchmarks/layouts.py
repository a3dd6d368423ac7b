"""The two flattenings of the sphere against each other, on real atlases: smoothness, neighbours, seam, poles, what a blur leaves.

The Gaussians are the same and stand on the same sphere points; only the cells of these differ. So transport and storage cost
both alike, and are not shown. Figures of atlases are means over the objects.
"""

from __future__ import annotations

import torch
from _atlases import arguments, blurred, foreground_psnr, objects, source
from _report import report
from torch import Tensor

from generator.atlas import PROJECTIONS, Atlas, AtlasLayout, from_atlas
from generator.atlas.layout import cell_centres, project
from trainer.atlas import to_atlas
from trainer.doctor import channel_statistics, locality, neighbour_preservation


def moved(layout: AtlasLayout) -> Tensor:
    """[N] cells by which each flattened sphere point was moved on its way to the grid."""
    flat = project(layout.sphere, layout.size, layout.projection)
    return (flat - cell_centres(layout.size)[layout.cell_of_point]).norm(dim=1)


def seam_step(atlas: Atlas) -> float:
    """Mean difference of the first and the last column, over that of adjacent columns: 1 if the image wraps without a seam."""
    values = atlas.values
    return float(((values[:, :, 0] - values[:, :, -1]).abs().mean(1) / values.diff(dim=2).abs().mean((1, 2)).clamp_min(1e-9)).mean())


@torch.no_grad()
def main() -> None:
    options = arguments(__doc__, size=128).parse_args()
    layouts = {projection: AtlasLayout.load_default(options.size, projection) for projection in PROJECTIONS}
    first = next(iter(layouts.values()))
    found = objects(options.fits, options.limit)
    rows = []
    for projection, layout in layouts.items():
        atlases = [to_atlas(gaussians, layout) for gaussians in found]
        cells = [from_atlas(atlas, layout) for atlas in atlases]
        neighbours = [neighbour_preservation(each.means, layout.size) for each in cells]

        def mean(values: list[float]) -> float:
            return sum(values) / len(values)

        rough = [[channel.roughness for channel in channel_statistics(atlas)] for atlas in atlases]
        rows.append({
            "projection": projection,
            "cells as the first's": float((layout.cell_of_point == first.cell_of_point).float().mean()),
            "moved, cells": float(moved(layout).mean()),
            "at most": float(moved(layout).max()),
            "locality": mean([locality(each.means, layout.size) for each in cells]),
            "roughness": mean([mean(each) for each in rough]),
            "neighbours": mean([each.everywhere for each in neighbours]),
            "at poles": mean([each.poles for each in neighbours]),
            "at seam": mean([each.seam for each in neighbours]),
            "seam step": mean([seam_step(atlas) for atlas in atlases]),
            "blurred 3 x 3 dB": mean([
                foreground_psnr(from_atlas(blurred(atlas, 3), layout), each) for atlas, each in zip(atlases, cells, strict=True)
            ]),
        })  # fmt: skip
    report("layouts", rows, f"{len(found)} {source(options.fits)} at {options.size} x {options.size} cells")


if __name__ == "__main__":
    main()
