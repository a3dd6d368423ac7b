"""How far splats reach towards their neighbours, and generated ones made to reach as far as those that a model learned from.

A network that is unsure of a splat's size or place makes it a mean of many, and a surface of unevenly spaced splats shows the background
through. Fits do not: there a splat's width keeps to the distance of its neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .gaussians import Gaussians

# On an evenly laid out surface the third neighbour belongs to the nearest ring, at its edge too.
NEIGHBOUR = 3
# Fainter ones close no gap.
_VISIBLE = 0.05
# Splats further apart than so many typical distances are no surface: to reach each other they would become blots.
_FAR = 2.0
_CHUNK = 1024


def coverage(gaussians: Gaussians) -> float:
    """Median of a visible splat's middle scale over the distance of its third neighbour; 0 where there are too few."""
    seen = gaussians.opacities > _VISIBLE
    if int(seen.sum()) <= NEIGHBOUR:
        return 0.0
    middle = gaussians.scales[seen].median(-1).values
    return float((middle / spacing(gaussians.means[seen]).clamp_min(1e-9)).median())


def close_gaps(gaussians: Gaussians, share: float, chosen: Tensor | None = None) -> Gaussians:
    """Widen splats until their two longer scales are at least `share` of the distance of their third neighbour.

    The shortest scale stays, and nothing becomes narrower, so what is closed already is given back as it was.

    Args:
        share: what `coverage` says of objects without gaps; 0 changes nothing.
        chosen: [N] bool, the splats that may be widened; all by default.
    """
    seen = gaussians.opacities > _VISIBLE
    if not share or int(seen.sum()) <= NEIGHBOUR:
        return gaussians
    distances = spacing(gaussians.means[seen])
    wanted = share * distances.clamp_max(_FAR * distances.median())
    if chosen is not None:
        wanted = torch.where(chosen[seen], wanted, 0)
    scales = gaussians.scales.clone()
    ordered, order = scales[seen].sort(-1)
    ordered[:, 1:] = torch.maximum(ordered[:, 1:], wanted[:, None])
    scales[seen] = torch.empty_like(ordered).scatter_(-1, order, ordered)
    return gaussians.replace(scales=scales)


def spacing(means: Tensor) -> Tensor:
    """Distance [N] of each point's third neighbour, from points [N, 3]; in time N squared, in memory N."""
    nearest = [torch.cdist(some, means).topk(NEIGHBOUR + 1, largest=False).values[:, -1] for some in means.split(_CHUNK)]
    return torch.cat(nearest)
