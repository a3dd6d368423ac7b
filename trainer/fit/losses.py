"""Image losses of the fit."""

from __future__ import annotations

import torch
from torch import Tensor


def ssim(image: Tensor, target: Tensor, window: int = 11, sigma: float = 1.5) -> Tensor:
    """Mean structural similarity of two pictures [H, W, C] in 0..1 (Wang et al. 2004: Gaussian window, K = 0.01, 0.03)."""
    offsets = torch.arange(window, dtype=image.dtype) - window // 2
    weights = torch.exp(-0.5 * (offsets / sigma) ** 2)
    weights = weights / weights.sum()
    x, y = image.permute(2, 0, 1)[:, None], target.permute(2, 0, 1)[:, None]
    # All five moments share one pass of the separable window.
    moments = torch.cat([x, y, x * x, y * y, x * y])
    moments = torch.nn.functional.conv2d(moments, weights.reshape(1, 1, 1, -1), padding=(0, window // 2))
    moments = torch.nn.functional.conv2d(moments, weights.reshape(1, 1, -1, 1), padding=(window // 2, 0))
    mean_x, mean_y, xx, yy, xy = moments.chunk(5)
    variance_x, variance_y, covariance = xx - mean_x**2, yy - mean_y**2, xy - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return (similarity / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2))).mean()
