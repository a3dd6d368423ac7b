"""Colour words for captions, from what a fit looks like."""

from __future__ import annotations

import torch
from torch import Tensor

from generator.gaussians import Gaussians

# Prototypes in display sRGB, several where a word covers a wide range.
_PROTOTYPES = {
    "red": [(0.75, 0.10, 0.10), (0.50, 0.08, 0.10), (0.85, 0.25, 0.22)],
    "orange": [(0.95, 0.55, 0.10), (0.85, 0.45, 0.15)],
    "yellow": [(0.95, 0.85, 0.20), (0.85, 0.75, 0.25)],
    "green": [(0.20, 0.55, 0.20), (0.35, 0.50, 0.20), (0.10, 0.35, 0.15), (0.50, 0.75, 0.40)],
    "blue": [(0.15, 0.30, 0.70), (0.10, 0.15, 0.40), (0.40, 0.60, 0.85), (0.30, 0.50, 0.65)],
    "purple": [(0.45, 0.20, 0.55), (0.35, 0.25, 0.50)],
    "pink": [(0.95, 0.60, 0.70), (0.85, 0.45, 0.60)],
    "brown": [(0.45, 0.28, 0.15), (0.30, 0.18, 0.10), (0.60, 0.40, 0.25), (0.50, 0.35, 0.28)],
    "beige": [(0.85, 0.75, 0.60), (0.75, 0.65, 0.52)],
    "black": [(0.05, 0.05, 0.05), (0.15, 0.15, 0.16)],
    "grey": [(0.35, 0.35, 0.36), (0.50, 0.50, 0.50), (0.65, 0.65, 0.66)],
    "white": [(0.95, 0.95, 0.95), (0.85, 0.85, 0.84)],
}
COLOURS = tuple(_PROTOTYPES)


def oklab(colors: Tensor) -> Tensor:
    """Display sRGB [..., 3] in 0..1 to Oklab [..., 3] (Ottosson 2020)."""
    linear = torch.where(colors <= 0.04045, colors / 12.92, ((colors.clamp_min(0) + 0.055) / 1.055) ** 2.4)
    to_lms = colors.new_tensor(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ]
    )
    to_lab = colors.new_tensor(
        [
            [0.2104542553, 0.7936177850, -0.0040720468],
            [1.9779984951, -2.4285922050, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.8086757660],
        ]
    )
    lms = linear @ to_lms.T
    return (lms.sign() * lms.abs() ** (1 / 3)) @ to_lab.T


def dominant_colour(gaussians: Gaussians, share: float = 0.45) -> str | None:
    """The colour word that at least `share` of the visible surface bears, or None where no colour dominates."""
    names = [name for name, prototypes in _PROTOTYPES.items() for _ in prototypes]
    prototypes = oklab(torch.tensor([p for prototypes in _PROTOTYPES.values() for p in prototypes]))
    nearest = torch.cdist(oklab(gaussians.colors.float()), prototypes).argmin(1)
    two_largest = gaussians.scales.float().sort(1).values[:, 1:]
    weights = gaussians.opacities.float() * two_largest.prod(1)
    shares = {name: 0.0 for name in COLOURS}
    for index, weight in enumerate(torch.bincount(nearest, weights, minlength=len(names)).tolist()):
        shares[names[index]] += weight
    name = max(shares, key=shares.__getitem__)
    return name if shares[name] >= share * max(sum(shares.values()), 1e-12) else None
