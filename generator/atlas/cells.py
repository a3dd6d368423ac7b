"""Objects whose Gaussians know their cells: what an atlas can do and a loose set of Gaussians cannot."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError
from ..gaussians import Gaussians
from .layout import AtlasLayout

_CHUNK = 1024  # empty cells that look for their neighbour at once


def in_cells(gaussians: Gaussians, cells: Tensor, layout: AtlasLayout) -> Gaussians:
    """All cells of a layout in their order, from Gaussians that may have been deleted, shuffled or added to.

    A cell without a Gaussian repeats the present one whose sphere point is nearest, with opacity 0, as empty cells of training do.

    Args:
        gaussians: M Gaussians.
        cells: [M] int64, the cell of each; those of -1 belong to none and are left out.

    Returns:
        N = size^2 Gaussians.

    Raises:
        InputError: no Gaussian has a cell, two have the same, or a cell is not the layout's.
    """
    if tuple(cells.shape) != (len(gaussians),):
        raise InputError(f"cells must be [{len(gaussians)}], one a Gaussian, got {list(cells.shape)}")
    kept = cells >= 0
    gaussians, cells = gaussians[kept], cells[kept].long()
    if not len(cells):
        raise InputError("none of the Gaussians has a cell of an atlas")
    if int(cells.max()) >= layout.count:
        raise InputError(f"cell {int(cells.max())} is not one of the {layout.count} cells of the layout")
    counts = torch.bincount(cells, minlength=layout.count)
    if int(counts.max()) > 1:
        raise InputError(f"{int((counts > 1).sum())} cells have more than one Gaussian: objects that were joined are no atlas any more")
    row = torch.zeros(layout.count, dtype=torch.int64)
    row[cells] = torch.arange(len(cells))
    empty = (counts == 0).nonzero()[:, 0]
    sphere = layout.cell_sphere
    for part in empty.split(_CHUNK):
        row[part] = (sphere[part] @ sphere[cells].T).argmax(1)
    found = gaussians[row]
    opacities = found.opacities.clone()
    opacities[empty] = 0
    return found.replace(opacities=opacities)


def morph(first: Gaussians, second: Gaussians, factor: float) -> Gaussians:
    """Between two objects, Gaussian by Gaussian: i of one is i of the other, as in objects of one layout.

    Means, opacities and colours change linearly, scales in their logarithms, rotations at an even pace along the shorter arc (slerp).

    Args:
        factor: 0 gives the first, 1 the second.

    Raises:
        InputError: they differ in number, or the factor is not in 0..1.
    """
    if len(first) != len(second):
        raise InputError(f"objects of {len(first)} and {len(second)} Gaussians do not correspond")
    if not 0 <= factor <= 1:
        raise InputError(f"factor must lie between 0 and 1, got {factor!r}")
    if factor in (0, 1):
        return second if factor else first
    return Gaussians(
        means=torch.lerp(first.means, second.means, factor),
        quaternions=_slerp(first.quaternions, second.quaternions, factor),
        scales=torch.lerp(first.scales.log(), second.scales.log(), factor).exp(),
        opacities=torch.lerp(first.opacities, second.opacities, factor),
        colors=torch.lerp(first.colors, second.colors, factor),
    )


def _slerp(first: Tensor, second: Tensor, factor: float) -> Tensor:
    """Unit quaternions [N, 4] between others (Shoemake 1985)."""
    cosine = (first * second).sum(1, keepdim=True)
    second = torch.where(cosine < 0, -second, second)
    angle = cosine.abs().clamp(max=1).acos()
    sine = angle.sin()
    turned = (((1 - factor) * angle).sin() * first + (factor * angle).sin() * second) / sine.clamp_min(1e-12)
    # Equal ones have no arc between them.
    return torch.nn.functional.normalize(torch.where(sine > 1e-4, turned, torch.lerp(first, second, factor)), dim=1)
