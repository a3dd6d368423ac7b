"""Samples that are no objects at all, by rules that no fit of a real object breaks."""

from __future__ import annotations

from torch import Tensor

from generator.gaussians import Gaussians
from trainer.captions import visible_areas

LEAST_COVERED = 0.005  # share of the picture that an object must cover from one side at least
BOX = 0.75  # object lengths from the centre, along an axis; the object itself ends at 0.5
MOST_OUTSIDE = 0.01  # share of the surface that may lie beyond
LONGEST = 0.1  # object lengths, standard deviation of a Gaussian; the longest in 240 fits is 0.07
_VISIBLE = 0.1  # opacity


def failure(gaussians: Gaussians | None, covered: Tensor) -> str | None:
    """Why a sample has failed, None where it has not.

    Args:
        gaussians: in the object frame, unit box; None for a mesh, which can only be empty.
        covered: [V] share of each picture that the object covers.

    Returns:
        "not finite": some number is not; "empty": it covers less than 0.5 % of every picture; "exploded": more than 1 % of its
        surface lies half as far again from the centre as the object may reach; "spikes": a Gaussian that can be seen spans, at two
        deviations to each side, 40 % of the object.
    """
    if gaussians is not None and not gaussians.finite().all():
        return "not finite"
    if covered.max() < LEAST_COVERED:
        return "empty"
    if gaussians is None:
        return None
    areas = visible_areas(gaussians)
    if areas[gaussians.means.abs().amax(1) > BOX].sum() > MOST_OUTSIDE * areas.sum():
        return "exploded"
    if (gaussians.scales.amax(1)[gaussians.opacities >= _VISIBLE] > LONGEST).any():
        return "spikes"
    return None
