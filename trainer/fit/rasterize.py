"""A differentiable rasteriser for fitting on a CPU: one view, one thread, compiled with numba.

Objects are fitted side by side, so parallelism lies over objects and a fit keeps to one thread. That makes the simplest
scheme also the fastest: splats are laid over the whole picture front to back, each pixel carries its transmittance, and
the backward pass replays the same order, so no gradient is ever written from two places. Projection is `generator.render.ewa`
under autograd; only compositing is compiled here.
"""

from __future__ import annotations

import math

import numba
import numpy as np
import torch
from torch import Tensor

from generator.gaussians import Gaussians
from generator.render.ewa import ALPHA_CUT, ALPHA_MAX, pixel_boxes, project

# A pixel that lets through less than this is finished (Kerbl et al. 2023, appendix C).
TRANSMITTANCE_END = 1e-4


@numba.njit(cache=True, fastmath={"contract"}, error_model="numpy")
def _composite(order, boxes, means, conics, opacities, colors, height, width):
    rgb = np.zeros((height, width, 3), np.float32)
    transmittance = np.ones((height, width), np.float32)
    for i in order:
        a, b, c = conics[i, 0], conics[i, 1], conics[i, 2]
        opacity = opacities[i]
        red, green, blue = colors[i, 0], colors[i, 1], colors[i, 2]
        for row in range(boxes[i, 1], boxes[i, 3]):
            dy = np.float32(row + 0.5) - means[i, 1]
            for column in range(boxes[i, 0], boxes[i, 2]):
                through = transmittance[row, column]
                if through < TRANSMITTANCE_END:
                    continue
                dx = np.float32(column + 0.5) - means[i, 0]
                power = np.float32(-0.5) * (a * dx * dx + c * dy * dy) - b * dx * dy
                alpha = min(opacity * np.float32(math.exp(power)), np.float32(ALPHA_MAX))
                if alpha < np.float32(ALPHA_CUT):
                    continue
                weight = alpha * through
                rgb[row, column, 0] += weight * red
                rgb[row, column, 1] += weight * green
                rgb[row, column, 2] += weight * blue
                transmittance[row, column] = through - weight
    return rgb, transmittance


@numba.njit(cache=True, fastmath={"contract"}, error_model="numpy")
def _composite_backward(order, boxes, means, conics, opacities, colors, final_rgb, final_transmittance, grad_rgb, grad_alpha):
    """Gradients by replaying front to back.

    With T the transmittance in front of splat i and R the colour of all that lies behind it, the pixel is
    C = front + T alpha_i c_i + R, and R is proportional to (1 - alpha_i); so dC/dalpha_i = T c_i - R / (1 - alpha_i).
    """
    count = means.shape[0]
    grad_means = np.zeros((count, 2), np.float32)
    grad_conics = np.zeros((count, 3), np.float32)
    grad_opacities = np.zeros(count, np.float32)
    grad_colors = np.zeros((count, 3), np.float32)
    height, width = final_transmittance.shape
    transmittance = np.ones((height, width), np.float32)
    front = np.zeros((height, width, 3), np.float32)
    one = np.float32(1)
    for i in order:
        a, b, c = conics[i, 0], conics[i, 1], conics[i, 2]
        opacity = opacities[i]
        red, green, blue = colors[i, 0], colors[i, 1], colors[i, 2]
        sum_x = sum_y = sum_a = sum_b = sum_c = sum_o = sum_r = sum_g = sum_bl = np.float32(0)
        for row in range(boxes[i, 1], boxes[i, 3]):
            dy = np.float32(row + 0.5) - means[i, 1]
            for column in range(boxes[i, 0], boxes[i, 2]):
                through = transmittance[row, column]
                if through < TRANSMITTANCE_END:
                    continue
                dx = np.float32(column + 0.5) - means[i, 0]
                falloff = np.float32(math.exp(np.float32(-0.5) * (a * dx * dx + c * dy * dy) - b * dx * dy))
                raw = opacity * falloff
                alpha = min(raw, np.float32(ALPHA_MAX))
                if alpha < np.float32(ALPHA_CUT):
                    continue
                weight = alpha * through
                g0, g1, g2 = grad_rgb[row, column, 0], grad_rgb[row, column, 1], grad_rgb[row, column, 2]
                front[row, column, 0] += weight * red
                front[row, column, 1] += weight * green
                front[row, column, 2] += weight * blue
                transmittance[row, column] = through - weight
                sum_r += weight * g0
                sum_g += weight * g1
                sum_bl += weight * g2
                if raw > np.float32(ALPHA_MAX):
                    continue
                behind = (
                    (final_rgb[row, column, 0] - front[row, column, 0]) * g0
                    + (final_rgb[row, column, 1] - front[row, column, 1]) * g1
                    + (final_rgb[row, column, 2] - front[row, column, 2]) * g2
                )
                grad = through * (red * g0 + green * g1 + blue * g2)
                grad += (final_transmittance[row, column] * grad_alpha[row, column] - behind) / (one - alpha)
                sum_o += grad * falloff
                grad_power = grad * alpha
                sum_x += grad_power * (a * dx + b * dy)
                sum_y += grad_power * (c * dy + b * dx)
                sum_a -= np.float32(0.5) * grad_power * dx * dx
                sum_b -= grad_power * dx * dy
                sum_c -= np.float32(0.5) * grad_power * dy * dy
        grad_means[i, 0], grad_means[i, 1] = sum_x, sum_y
        grad_conics[i, 0], grad_conics[i, 1], grad_conics[i, 2] = sum_a, sum_b, sum_c
        grad_opacities[i] = sum_o
        grad_colors[i, 0], grad_colors[i, 1], grad_colors[i, 2] = sum_r, sum_g, sum_bl
    return grad_means, grad_conics, grad_opacities, grad_colors


class _Composite(torch.autograd.Function):
    @staticmethod
    def forward(ctx, means, conics, opacities, colors, order, boxes, height, width):
        arrays = [tensor.detach().contiguous().numpy() for tensor in (order, boxes, means, conics, opacities, colors)]
        rgb, transmittance = _composite(*arrays, height, width)
        ctx.arrays, ctx.results = arrays, (rgb, transmittance)
        return torch.from_numpy(rgb), torch.from_numpy(1 - transmittance)

    @staticmethod
    def backward(ctx, grad_rgb, grad_alpha):
        grads = _composite_backward(*ctx.arrays, *ctx.results, grad_rgb.contiguous().numpy(), grad_alpha.contiguous().numpy())
        return *(torch.from_numpy(grad) for grad in grads), None, None, None, None


def rasterize(gaussians: Gaussians, viewmat: Tensor, K: Tensor, width: int, height: int) -> tuple[Tensor, Tensor]:
    """Premultiplied rgb [H, W, 3] and alpha [H, W] of one view, differentiable in every field of the Gaussians.

    Same semantics as `generator.render.render` but for pixels already covered to 1 - 1e-4, which end there.

    Args:
        gaussians: float32, on the CPU.
        viewmat, K: [4, 4] and [3, 3], as one entry of `Cameras`.
    """
    size = (width, height)
    projected = project(gaussians.means, gaussians.quaternions, gaussians.scales, gaussians.opacities, viewmat, K, size)
    with torch.no_grad():
        boxes = pixel_boxes(projected, size)
        order = torch.argsort(projected.depths, stable=True)
        order = order[boxes[order, 2] > boxes[order, 0]]
    return _Composite.apply(projected.means, projected.conics, gaussians.opacities, gaussians.colors, order, boxes, height, width)
