"""Colour words for captions, from what a fit looks like."""

from __future__ import annotations

from collections.abc import Sequence

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
_DOMINANT = 0.45  # share of the visible surface


_RGB_TO_LMS = torch.tensor(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ],
    dtype=torch.float64,
)
_LMS_TO_LAB = torch.tensor(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ],
    dtype=torch.float64,
)


def to_oklab(colors: Tensor) -> Tensor:
    """Display sRGB [..., 3] in 0..1 to Oklab [..., 3] (Ottosson 2020)."""
    linear = torch.where(colors <= 0.04045, colors / 12.92, ((colors.clamp_min(0) + 0.055) / 1.055) ** 2.4)
    lms = linear @ _RGB_TO_LMS.T.to(colors)
    return (lms.sign() * lms.abs() ** (1 / 3)) @ _LMS_TO_LAB.T.to(colors)


def from_oklab(lab: Tensor) -> Tensor:
    """Oklab [..., 3] to display sRGB [..., 3], cut to 0..1."""
    lms = lab @ torch.linalg.inv(_LMS_TO_LAB).T.to(lab)
    linear = (lms**3 @ torch.linalg.inv(_RGB_TO_LMS).T.to(lab)).clamp(0, 1)
    return torch.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)


def colour_words(colors: Tensor) -> tuple[Tensor, Tensor]:
    """Oklab [..., 3] of display sRGB [..., 3], and the index into `COLOURS` [...] of each one's word: that of the nearest prototype."""
    words = torch.tensor([index for index, prototypes in enumerate(_PROTOTYPES.values()) for _ in prototypes])
    prototypes = to_oklab(torch.tensor([p for prototypes in _PROTOTYPES.values() for p in prototypes]))
    lab = to_oklab(colors.float())
    return lab, words[torch.cdist(lab, prototypes).argmin(-1)]


def colour_word(color: Sequence[float]) -> str:
    """What one display colour in 0..1 is called."""
    return COLOURS[int(colour_words(torch.tensor([list(color)]))[1])]


def visible_areas(gaussians: Gaussians) -> Tensor:
    """Opacity times the largest cross-section of each Gaussian [N]: its share of the visible surface, up to a constant."""
    return gaussians.opacities.float() * gaussians.scales.float().sort(1).values[:, 1:].prod(1)


def dominant_colour(gaussians: Gaussians) -> str | None:
    """The colour word that at least `_DOMINANT` of the visible surface bears, or None where no colour dominates."""
    totals = torch.bincount(colour_words(gaussians.colors)[1], visible_areas(gaussians), minlength=len(COLOURS))
    index = int(totals.argmax())
    return COLOURS[index] if totals[index] >= _DOMINANT * totals.sum().clamp_min(1e-12) else None


def recolour(gaussians: Gaussians, colour: str, target: str) -> Gaussians:
    """The object with its part of one colour painted in another; shading and the other parts stay.

    Args:
        colour, target: words of `COLOURS`. What bears `colour` moves in Oklab so that its mean is the target's first
            prototype; half of the variation in lightness is kept, which is the shading.
    """
    part = colour_words(gaussians.colors)[1] == COLOURS.index(colour)
    if not part.any():
        return gaussians
    lab = to_oklab(gaussians.colors.float())
    goal = to_oklab(torch.tensor(_PROTOTYPES[target][0]))
    weights = visible_areas(gaussians)[part, None]
    mean = (lab[part] * weights).sum(0) / weights.sum().clamp_min(1e-12)
    painted = goal + (lab[part] - mean) * torch.tensor([0.6, 0.3, 0.3])
    colors = gaussians.colors.clone()
    colors[part] = from_oklab(painted).to(colors)
    return gaussians.replace(colors=colors)
