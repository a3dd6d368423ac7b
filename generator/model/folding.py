"""The image that the network sees of an atlas: f x f cells folded into channels, and columns repeated beyond its borders.

Folding puts the same values on a smaller image, which is what makes attention affordable.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError


def fold(values: Tensor, factor: int) -> Tensor:
    """[B, C, H, W] to [B, C f^2, H / f, W / f]; channel c of the cell (i, j) of a block becomes channel c f^2 + i f + j.

    Raises:
        InputError: the sides are not multiples of the factor.
    """
    if factor < 1 or values.shape[-1] % factor or values.shape[-2] % factor:
        raise InputError(f"cannot fold {factor} x {factor} cells of an image of {values.shape[-2]} x {values.shape[-1]}")
    return values if factor == 1 else torch.nn.functional.pixel_unshuffle(values, factor)


def unfold(values: Tensor, factor: int) -> Tensor:
    """The inverse of `fold`: [B, C f^2, H, W] to [B, C, f H, f W].

    Raises:
        InputError: the channels are not a multiple of the factor's square.
    """
    if factor < 1 or values.shape[-3] % factor**2:
        raise InputError(f"cannot unfold {values.shape[-3]} channels into blocks of {factor} x {factor} cells")
    return values if factor == 1 else torch.nn.functional.pixel_shuffle(values, factor)


def wrap(values: Tensor, columns: int) -> Tensor:
    """[..., H, W] to [..., H, W + 2 columns]: goes on beyond the left and the right border, where longitude comes round again.

    Raises:
        InputError: columns are negative or more than there are.
    """
    if not 0 <= columns <= values.shape[-1]:
        raise InputError(f"cannot repeat {columns} columns of an image of {values.shape[-1]}")
    return torch.cat((values[..., -columns:], values, values[..., :columns]), -1) if columns else values


def unwrap(values: Tensor, columns: int) -> Tensor:
    """The inverse of `wrap`: what lies between the repeated columns."""
    return values[..., columns:-columns] if columns else values
