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


@numba.njit(parallel=True, cache=True, fastmath={"contract", "reassoc"}, error_model="numpy")
def _blur(images, line):
    """Every picture [K, H, W] under the separable window, zero outside the picture."""
    count, height, width = images.shape
    result = np.empty_like(images)
    # The window written out: the compiler keeps the sum in a register and makes vectors of the columns.
    a, b, c, d, e, f = line[0], line[1], line[2], line[3], line[4], line[5]
    for k in numba.prange(count):
        rows, across = np.zeros((height + 10, width), np.float32), np.zeros(width + 10, np.float32)
        rows[5 : height + 5] = images[k]
        for row in range(height):
            r0, r1, r2, r3, r4, r5 = rows[row], rows[row + 1], rows[row + 2], rows[row + 3], rows[row + 4], rows[row + 5]
            r6, r7, r8, r9, r10 = rows[row + 6], rows[row + 7], rows[row + 8], rows[row + 9], rows[row + 10]
            inner = across[5 : width + 5]
            for i in range(width):
                outer = a * (r0[i] + r10[i]) + b * (r1[i] + r9[i]) + c * (r2[i] + r8[i])
                inner[i] = outer + d * (r3[i] + r7[i]) + e * (r4[i] + r6[i]) + f * r5[i]
            s0, s1, s2, s3, s4, s5 = across[0:], across[1:], across[2:], across[3:], across[4:], across[5:]
            s6, s7, s8, s9, s10 = across[6:], across[7:], across[8:], across[9:], across[10:]
            into = result[k, row]
            for i in range(width):
                outer = a * (s0[i] + s10[i]) + b * (s1[i] + s9[i]) + c * (s2[i] + s8[i])
                into[i] = outer + d * (s3[i] + s7[i]) + e * (s4[i] + s6[i]) + f * s5[i]
    return result


@cache
def _line() -> np.ndarray:
    weights = np.array([math.exp(-0.5 * ((i - WINDOW // 2) / SIGMA) ** 2) for i in range(WINDOW)])
    return (weights / weights.sum()).astype(np.float32)


def volume(scales: Tensor) -> Tensor:
    """Mean product of the scales [N, 3]: the regulariser of Scaffold-GS (Lu et al. 2024), cubic length units."""
    return scales.prod(dim=1).mean()
