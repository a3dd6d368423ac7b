"""Image losses of the fit."""

from __future__ import annotations

import math
from functools import cache

import numba
import numpy as np
import torch
from torch import Tensor

WINDOW, SIGMA = 11, 1.5  # of the structural similarity, pixels
C1, C2 = 0.01**2, 0.03**2


def ssim(image: Tensor, target: Tensor) -> Tensor:
    """Mean structural similarity of two pictures [H, W, C] in 0..1 (Wang et al. 2004: Gaussian window, K = 0.01, 0.03).

    Differentiable in `image` alone. Pixels outside the picture count as zero. Float32, on the CPU.
    """
    return _Ssim.apply(image, target)


class _Ssim(torch.autograd.Function):
    @staticmethod
    def forward(ctx, image, target):
        x, y = (tensor.detach().to(torch.float32).permute(2, 0, 1).contiguous().numpy() for tensor in (image, target))
        total, slopes = _similarity(x, y, _blur(np.concatenate([x, y, x * x, y * y, x * y]), _line()), ctx.needs_input_grad[0])
        ctx.pictures, ctx.slopes = (x, y), slopes
        return torch.tensor(total / x.size, dtype=image.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, y = ctx.pictures
        # The blur is its own transpose: the window is symmetric and what it reaches outside is zero both ways.
        of_mean, of_square, of_product = np.split(_blur(ctx.slopes, _line()), 3)
        slope = of_mean + 2 * x * of_square + y * of_product
        return grad * torch.from_numpy(slope).permute(1, 2, 0) / x.size, None


@numba.njit(cache=True, fastmath={"contract", "reassoc"}, error_model="numpy")
def _similarity(x, y, moments, wants_slopes):
    """The sum of the similarity over all pixels, and its slopes in mean(x), mean(x^2) and mean(x y): [3 C, H, W]."""
    channels, height, width = x.shape
    slopes = np.empty((3 * channels, height, width) if wants_slopes else (3, 0, 0), np.float32)
    two, c1, c2 = np.float32(2), np.float32(C1), np.float32(C2)
    total = 0.0
    for k in range(channels):
        for row in range(height):
            along = np.float32(0)
            for column in range(width):
                mean_x, mean_y = moments[k, row, column], moments[channels + k, row, column]
                variances = moments[2 * channels + k, row, column] - mean_x * mean_x
                variances += moments[3 * channels + k, row, column] - mean_y * mean_y
                covariance = moments[4 * channels + k, row, column] - mean_x * mean_y
                a, b = two * mean_x * mean_y + c1, two * covariance + c2
                c, d = mean_x * mean_x + mean_y * mean_y + c1, variances + c2
                similarity = a * b / (c * d)
                along += similarity
                if wants_slopes:
                    slopes[k, row, column] = two * ((mean_y * (b - a) - similarity * mean_x * (d - c)) / (c * d))
                    slopes[channels + k, row, column] = -similarity / d
                    slopes[2 * channels + k, row, column] = two * a / (c * d)
            total += along
    return total, slopes


@numba.njit(cache=True, fastmath={"contract"})
def _blur(images, line):
    """Every picture [K, H, W] under the separable window, zero outside the picture."""
    count, height, width = images.shape
    reach = len(line) // 2
    result = np.empty_like(images)
    padded = np.zeros(width + 2 * reach, np.float32)
    for k in range(count):
        for row in range(height):
            inner = padded[reach : reach + width]
            inner[:] = 0
            for offset in range(max(-reach, -row), min(reach, height - 1 - row) + 1):
                weight = line[offset + reach]
                source = images[k, row + offset]
                for column in range(width):
                    inner[column] += weight * source[column]
            into = result[k, row]
            into[:] = 0
            for offset in range(2 * reach + 1):
                weight = line[offset]
                for column in range(width):
                    into[column] += weight * padded[column + offset]
    return result


@cache
def _line() -> np.ndarray:
    weights = np.array([math.exp(-0.5 * ((i - WINDOW // 2) / SIGMA) ** 2) for i in range(WINDOW)])
    return (weights / weights.sum()).astype(np.float32)


def volume(scales: Tensor) -> Tensor:
    """Mean product of the scales [N, 3]: the regulariser of Scaffold-GS (Lu et al. 2024), cubic length units."""
    return scales.prod(dim=1).mean()
