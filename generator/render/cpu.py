"""The CPU renderer on torch alone: what Blender has, and what a single preview takes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..gaussians import Gaussians
from .cameras import Cameras
from .ewa import ALPHA_CUT, ALPHA_MAX, Projected, pixel_boxes, project

# Bounds the working memory: about 100 bytes a pair of splat and pixel.
PAIRS_AT_ONCE = 2_000_000


def render_views(gaussians: Gaussians, cameras: Cameras) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """All views of float32 Gaussians: premultiplied rgb [V, H, W, 3], alpha [V, H, W], alpha-weighted depth [V, H, W], means2d
    [V, N, 2] and radii [V, N], the last without gradients."""
    size, g = (cameras.width, cameras.height), gaussians
    each_view = zip(cameras.viewmats, cameras.Ks, strict=True)
    projected = [project(g.means, g.quaternions, g.scales, g.opacities, viewmat, K, size) for viewmat, K in each_view]
    means2d = torch.stack([each.means for each in projected])
    composited = [_composite(g, each._replace(means=means), size) for each, means in zip(projected, means2d, strict=True)]
    image, radii = (torch.stack(parts) for parts in zip(*composited, strict=True))
    return image[..., :3], image[..., 3], image[..., 4], means2d, radii


def _composite(gaussians: Gaussians, projected: Projected, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """rgb, alpha and alpha-weighted depth [H, W, 5], and radii [N].

    Every splat is listed once for every pixel that it may touch, the list is sorted by pixel and depth, and the
    transmittance in front of each entry is a running product along its pixel's stretch of the list.
    """
    width, height = size
    everyone = pixel_boxes(projected, size)
    order = torch.argsort(projected.depths, stable=True)
    boxes = everyone[order]
    means, conics, depths = projected.means[order], projected.conics[order], projected.depths[order]
    opacities = gaussians.opacities[order]
    features = torch.cat([gaussians.colors[order], torch.ones_like(depths)[:, None], depths[:, None]], dim=1)
    image = torch.zeros(height, width, 5, dtype=means.dtype)
    for top, bottom in _bands(boxes, height):
        rows = boxes[:, 1].clamp(top, bottom), boxes[:, 3].clamp(top, bottom)
        widths = boxes[:, 2] - boxes[:, 0]
        counts = widths * (rows[1] - rows[0])
        splat = torch.repeat_interleave(torch.arange(len(counts)), counts)
        if not len(splat):
            continue
        within = torch.arange(len(splat)) - torch.repeat_interleave(torch.cumsum(counts, 0) - counts, counts)
        columns = boxes[splat, 0] + within % widths[splat]
        lines = rows[0][splat] + torch.div(within, widths[splat], rounding_mode="floor")
        dx = columns + 0.5 - means[splat, 0]
        dy = lines + 0.5 - means[splat, 1]
        conic = conics[splat]
        power = -0.5 * (conic[:, 0] * dx * dx + conic[:, 2] * dy * dy) - conic[:, 1] * dx * dy
        alpha = (opacities[splat] * torch.exp(power)).clamp_max(ALPHA_MAX)
        keep = alpha >= ALPHA_CUT
        splat, alpha = splat[keep], alpha[keep]
        pixel = (lines[keep] - top) * width + columns[keep]
        # Pairs are already in depth order, so a stable sort by pixel keeps front to back.
        pixel, by_pixel = torch.sort(pixel, stable=True)
        splat, alpha = splat[by_pixel], alpha[by_pixel]
        log_transmittance = torch.log1p(-alpha.double())
        before = torch.cumsum(log_transmittance, 0) - log_transmittance
        start = torch.searchsorted(pixel, pixel)
        weights = alpha * torch.exp(before - before[start]).to(alpha.dtype)
        band = torch.zeros((bottom - top) * width, 5, dtype=means.dtype)
        band.index_add_(0, pixel, weights[:, None] * features[splat])
        image[top:bottom] = band.reshape(bottom - top, width, 5)
    return image, projected.extents.amax(1) * (everyone[:, 2] > everyone[:, 0])


def _bands(boxes: Tensor, height: int) -> list[tuple[int, int]]:
    """Bands of rows that hold at most `PAIRS_AT_ONCE` pairs each (a single row may hold more)."""
    changes = torch.zeros(height + 1, dtype=torch.int64)
    widths = boxes[:, 2] - boxes[:, 0]
    occupied = boxes[:, 3] > boxes[:, 1]
    changes.index_add_(0, boxes[occupied, 1], widths[occupied])
    changes.index_add_(0, boxes[occupied, 3], -widths[occupied])
    bands, top, pairs = [], 0, 0
    for row, count in enumerate(torch.cumsum(changes, 0)[:height].tolist()):
        if row > top and pairs + count > PAIRS_AT_ONCE:
            bands.append((top, row))
            top, pairs = row, 0
        pairs += count
    bands.append((top, height))
    return bands
