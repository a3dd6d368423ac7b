"""Image losses of the fit."""

from __future__ import annotations

import math
from functools import cache

import numba
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import conv2d

WINDOW, SIGMA = 11, 1.5  # of the structural similarity, pixels
C1, C2 = 0.01**2, 0.03**2
_REACH = WINDOW // 2
_REORDERED = {"contract", "reassoc"}


def ssim(image: Tensor, target: Tensor) -> Tensor:
    """Structural similarity of two pictures [H, W, C] in 0..1, mean over pixels (Wang et al. 2004: Gaussian window, K = 0.01, 0.03).

    Pixels outside the picture count as zero.
    """
    line = torch.from_numpy(_line()).to(image)
    window, x, y = (line[:, None] * line)[None, None], image.permute(2, 0, 1)[:, None], target.permute(2, 0, 1)[:, None]
    mean_x, mean_y, xx, yy, xy = (conv2d(each, window, padding=_REACH) for each in (x, y, x * x, y * y, x * y))
    variances, covariance = xx - mean_x**2 + yy - mean_y**2, xy - mean_x * mean_y
    return ((2 * mean_x * mean_y + C1) * (2 * covariance + C2) / ((mean_x**2 + mean_y**2 + C1) * (variances + C2))).mean()


def photometric(
    rgb: Tensor, alpha: Tensor, target_rgb: Tensor, target_alpha: Tensor, background: Tensor, ssim_weight: float, alpha_weight: float
) -> Tensor:
    """Distance of a rendered view to its target, both over a background (Kerbl et al. 2023, eq. 7, and L1 on the coverage).

    (1 - ssim_weight) L1 + ssim_weight (1 - SSIM) + alpha_weight L1(alpha), means over pixels. Differentiable in `rgb` and `alpha`.

    Args:
        rgb, target_rgb: premultiplied by alpha, [H, W, 3] in 0..1.
        alpha, target_alpha: [H, W].
        background: [3].
    """
    function = _plain_photometric if rgb.is_cuda else _Photometric.apply
    return function(rgb, alpha, target_rgb, target_alpha, background, ssim_weight, alpha_weight)


def _plain_photometric(
    rgb: Tensor, alpha: Tensor, target_rgb: Tensor, target_alpha: Tensor, background: Tensor, ssim_weight: float, alpha_weight: float
) -> Tensor:
    picture, target = (color + (1 - cover[..., None]) * background for color, cover in ((rgb, alpha), (target_rgb, target_alpha)))
    loss = (1 - ssim_weight) * (picture - target).abs().mean() + alpha_weight * (alpha - target_alpha).abs().mean()
    return loss + ssim_weight * (1 - ssim(picture, target)) if ssim_weight else loss


class _Photometric(torch.autograd.Function):
    """The compiled twin: value and slopes in one go, and only where one of the pictures is not background.

    A pixel further from the object than the window reaches has similarity 1 and no slope, whatever the background.
    """

    @staticmethod
    def forward(ctx, rgb, alpha, target_rgb, target_alpha, background, ssim_weight, alpha_weight):
        tensors = (rgb, alpha, target_rgb, target_alpha, background)
        rgb, alpha, target_rgb, target_alpha, background = (tensor.detach().to(torch.float32).contiguous().numpy() for tensor in tensors)
        box = _box(alpha, target_alpha, 2 * _REACH)
        loss, grad_rgb, grad_alpha = _photometric(rgb, alpha, target_rgb, target_alpha, background, ssim_weight, alpha_weight, box, _line())
        ctx.save_for_backward(torch.from_numpy(grad_rgb), torch.from_numpy(grad_alpha))
        return torch.tensor(loss, dtype=torch.float32)

    @staticmethod
    def backward(ctx, grad):
        grad_rgb, grad_alpha = ctx.saved_tensors
        return grad * grad_rgb, grad * grad_alpha, None, None, None, None, None


@numba.njit(cache=True)
def _box(alpha, other, margin):
    """First row and column, last ones + 1, of all that either of two pictures [H, W] covers, and a margin; clipped."""
    height, width = alpha.shape
    top, left, bottom, right = height, width, 0, 0
    for row in range(height):
        first, last = width, 0
        for column in range(width):
            if alpha[row, column] != 0 or other[row, column] != 0:
                first = min(first, column)
                last = column + 1
        if last:
            top, bottom = min(top, row), row + 1
            left, right = min(left, first), max(right, last)
    if bottom == 0:
        return 0, 0, 0, 0
    return max(top - margin, 0), max(left - margin, 0), min(bottom + margin, height), min(right + margin, width)


@numba.njit(parallel=True, cache=True, fastmath=_REORDERED, error_model="numpy")
def _photometric(rgb, alpha, target_rgb, target_alpha, background, ssim_weight, alpha_weight, box, line):
    """The loss and its gradients in rgb [H, W, 3] and alpha [H, W]."""
    grad_rgb, grad_alpha = np.zeros(rgb.shape, np.float32), np.zeros(alpha.shape, np.float32)
    top, left, bottom, right = box
    height, width, pixels = bottom - top, right - left, alpha.size
    x, y = np.empty((3, height, width), np.float32), np.empty((3, height, width), np.float32)
    for row in numba.prange(height):
        for column in range(width):
            at, to = alpha[top + row, left + column], target_alpha[top + row, left + column]
            for k in range(3):
                x[k, row, column] = rgb[top + row, left + column, k] + (np.float32(1) - at) * background[k]
                y[k, row, column] = target_rgb[top + row, left + column, k] + (np.float32(1) - to) * background[k]
    slopes, similarity = np.zeros((9, height, width), np.float32), np.full(height, 3.0 * width)
    if ssim_weight > 0:
        # Mean x, mean y, x^2, y^2 and x y, of each channel.
        moments = np.empty((15, height, width), np.float32)
        for plane in numba.prange(15):
            k, which = plane // 5, plane % 5
            first = y[k] if which == 1 or which == 3 else x[k]
            second = x[k] if which == 2 else y[k]
            _blur(first, second, which > 1, line, moments[plane])
        unblurred = np.empty((9, height, width), np.float32)
        for row in numba.prange(height):
            similarity[row] = _similarity(moments, unblurred, row)
        # The blur is its own transpose: the window is symmetric, and what it reaches outside is zero both ways.
        for plane in numba.prange(9):
            _blur(unblurred[plane], unblurred[plane], False, line, slopes[plane])
    of_color, of_alpha = np.float32((1 - ssim_weight) / (3 * pixels)), np.float32(alpha_weight / pixels)
    of_similarity = np.float32(-ssim_weight / (3 * pixels))
    parts = np.zeros(height)
    for row in numba.prange(height):
        total = np.float32(0)
        for column in range(width):
            off = alpha[top + row, left + column] - target_alpha[top + row, left + column]
            through = of_alpha * np.sign(off)
            total += of_alpha * abs(off)
            for k in range(3):
                a, b = x[k, row, column], y[k, row, column]
                slope = slopes[3 * k, row, column] + np.float32(2) * a * slopes[3 * k + 1, row, column] + b * slopes[3 * k + 2, row, column]
                slope = of_color * np.sign(a - b) + of_similarity * slope
                total += of_color * abs(a - b)
                grad_rgb[top + row, left + column, k] = slope
                through -= background[k] * slope
            grad_alpha[top + row, left + column] = through
        parts[row] = total - of_similarity * (3 * width - similarity[row])
    return parts.sum(), grad_rgb, grad_alpha


@numba.njit(cache=True, fastmath=_REORDERED, error_model="numpy")
def _similarity(moments, slopes, row):
    """The sum of the similarity along a row, and its slopes in mean(x), mean(x^2) and mean(x y), three planes a channel."""
    two, c1, c2 = np.float32(2), np.float32(C1), np.float32(C2)
    total = np.float32(0)
    for k in range(3):
        means_x, means_y, squares_x = moments[5 * k, row], moments[5 * k + 1, row], moments[5 * k + 2, row]
        squares_y, products = moments[5 * k + 3, row], moments[5 * k + 4, row]
        of_mean, of_square, of_product = slopes[3 * k, row], slopes[3 * k + 1, row], slopes[3 * k + 2, row]
        for column in range(len(means_x)):
            mean_x, mean_y = means_x[column], means_y[column]
            variances = squares_x[column] - mean_x * mean_x + squares_y[column] - mean_y * mean_y
            covariance = products[column] - mean_x * mean_y
            a, b = two * mean_x * mean_y + c1, two * covariance + c2
            c, d = mean_x * mean_x + mean_y * mean_y + c1, variances + c2
            inverse = np.float32(1) / (c * d)
            similarity = a * b * inverse
            total += similarity
            of_mean[column] = two * ((mean_y * (b - a) - similarity * mean_x * (d - c)) * inverse)
            of_square[column] = -similarity * c * inverse
            of_product[column] = two * a * inverse
    return total


@numba.njit(cache=True, fastmath=_REORDERED, error_model="numpy")
def _blur(image, other, product, line, result):
    """A picture [H, W], or its product with another, under the separable window, zero outside the picture, into `result`."""
    height, width = image.shape
    # The window written out: the compiler keeps the sum in a register and makes vectors of the columns.
    a, b, c, d, e, f = line[0], line[1], line[2], line[3], line[4], line[5]
    rows, across = np.zeros((height + 10, width), np.float32), np.zeros(width + 10, np.float32)
    if product:
        for row in range(height):
            for i in range(width):
                rows[row + 5, i] = image[row, i] * other[row, i]
    else:
        rows[5 : height + 5] = image
    for row in range(height):
        r0, r1, r2, r3, r4, r5 = rows[row], rows[row + 1], rows[row + 2], rows[row + 3], rows[row + 4], rows[row + 5]
        r6, r7, r8, r9, r10 = rows[row + 6], rows[row + 7], rows[row + 8], rows[row + 9], rows[row + 10]
        inner = across[5 : width + 5]
        for i in range(width):
            outer = a * (r0[i] + r10[i]) + b * (r1[i] + r9[i]) + c * (r2[i] + r8[i])
            inner[i] = outer + d * (r3[i] + r7[i]) + e * (r4[i] + r6[i]) + f * r5[i]
        s0, s1, s2, s3, s4, s5 = across[0:], across[1:], across[2:], across[3:], across[4:], across[5:]
        s6, s7, s8, s9, s10 = across[6:], across[7:], across[8:], across[9:], across[10:]
        into = result[row]
        for i in range(width):
            outer = a * (s0[i] + s10[i]) + b * (s1[i] + s9[i]) + c * (s2[i] + s8[i])
            into[i] = outer + d * (s3[i] + s7[i]) + e * (s4[i] + s6[i]) + f * s5[i]


@cache
def _line() -> np.ndarray:
    weights = np.array([math.exp(-0.5 * ((i - _REACH) / SIGMA) ** 2) for i in range(WINDOW)])
    return (weights / weights.sum()).astype(np.float32)


def volume(scales: Tensor) -> Tensor:
    """Mean product of the scales [N, 3]: the regulariser of Scaffold-GS (Lu et al. 2024), cubic length units."""
    return scales.prod(dim=1).mean()
