"""Image losses of the fit."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def ssim(image: Tensor, target: Tensor, window: int = 11, sigma: float = 1.5) -> Tensor:
    """Mean structural similarity of two pictures [H, W, C] in 0..1 (Wang et al. 2004: Gaussian window, K = 0.01, 0.03)."""
    rows, columns = _blur(image.shape[0], window, sigma), _blur(image.shape[1], window, sigma)
    x, y = image.permute(2, 0, 1), target.permute(2, 0, 1)
    # All five moments share one pass of the separable window, as two matrix products: on a CPU far quicker than convolution.
    moments = rows @ torch.cat([x, y, x * x, y * y, x * y]) @ columns.T
    mean_x, mean_y, xx, yy, xy = moments.chunk(5)
    variance_x, variance_y, covariance = xx - mean_x**2, yy - mean_y**2, xy - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return (similarity / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2))).mean()


@cache
def _blur(size: int, window: int, sigma: float) -> Tensor:
    """The matrix [size, size] that slides a Gaussian window over a line, zero outside it."""
    offsets = torch.arange(size)[None, :] - torch.arange(size)[:, None]
    weights = torch.exp(-0.5 * (torch.arange(window) - window // 2).float().div(sigma).square())
    return torch.where(offsets.abs() <= window // 2, torch.exp(-0.5 * (offsets / sigma).square()) / weights.sum(), 0.0)
