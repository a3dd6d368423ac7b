"""A field of density and colour on a grid of voxels, from Gaussians: what a surface is drawn from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .errors import InputError
from .gaussians import Gaussians

# A Gaussian reaches this many standard deviations; beyond it is below 1/90 of its peak.
_REACH = 3.0
# Standard deviation, in voxels, of the filter that keeps thin splats from falling between the voxels' centres.
_LOW_PASS = 0.6
# Splats are widened along their surface to this share of the distance to their fourth neighbour, so that sparse ones touch, ...
_TOUCH = 0.55
# ... but no splat to more than this many times what is usual in the object: stray ones must not become balls.
_WIDEST = 2.5
# Points that distances to neighbours are taken to.
_NEIGHBOURS = 16384
# Numbers that are evaluated at once, which bounds the memory.
_AT_ONCE = 1 << 22
# Empty voxels on every side.
_MARGIN = 3


@dataclass(frozen=True)
class Field:
    """Samples at the points of a grid, indexed [x, y, z]."""

    origin: np.ndarray  # [3] point of the first sample, object frame
    step: float  # between samples
    density: np.ndarray  # [X, Y, Z] float32: 0 far outside; 1 - exp(-density) is the opacity there; infinite where enclosed
    colors: np.ndarray  # [X, Y, Z, 3] float32: display sRGB weighted by density, before division
    weights: np.ndarray  # [X, Y, Z] float32: what to divide by

    @property
    def shape(self) -> tuple[int, int, int]:
        x, y, z = self.density.shape
        return x, y, z

    def colors_at(self, points: np.ndarray) -> np.ndarray:
        """Display sRGB [N, 3] in 0..1 at points [N, 3], trilinear; grey where no splat reaches."""
        place = np.clip((points - self.origin) / self.step, 0, np.array(self.shape) - 1.001)
        low = place.astype(np.int64)
        part = place - low
        total, weight = np.zeros((len(points), 3)), np.zeros(len(points))
        for corner in np.ndindex(2, 2, 2):
            share = np.prod(np.where(corner, part, 1 - part), axis=1)
            index = tuple((low + corner).T)
            total += share[:, None] * self.colors[index]
            weight += share * self.weights[index]
        return np.where(weight[:, None] > 1e-9, total / np.maximum(weight, 1e-9)[:, None], 0.5).clip(0, 1)


def _go_on() -> None:
    pass


def sample(gaussians: Gaussians, resolution: int, check: Callable[[], None] | None = None) -> Field:
    """Density and colour of Gaussians on a grid of `resolution` cells along the longest side of their box.

    Density is minus the logarithm of what passes all splats at that point: sum of -log(1 - opacity exp(-d^2/2)). Splats that
    lie apart are widened along their two long axes until they touch; the short axis, the surface's normal, stays as it is.

    Args:
        check: called at every block of work; what it raises ends it.

    Raises:
        InputError: no Gaussian is visible, all together have no size that can be computed with, or the resolution is below 8.
    """
    check = check or _go_on
    if resolution < 8:
        raise InputError(f"resolution must be at least 8, got {resolution}")
    visible = gaussians.to("cpu", torch.float32)
    visible = visible[visible.opacities > 0.02]
    if len(visible) == 0:
        raise InputError("no Gaussian is visible: there is no surface")
    visible = _touching(visible, check)
    covariances = visible.covariances()
    spread = covariances.diagonal(dim1=1, dim2=2).sqrt()
    low = (visible.means - spread).amin(0)
    high = (visible.means + spread).amax(0)
    step = float((high - low).max()) / resolution
    limits = torch.finfo(torch.float32)
    if not limits.tiny < step**2 < limits.max:
        raise InputError(f"the splats measure {step * resolution:g} across: there is no surface to find, scale the object first")
    origin = low - _MARGIN * step
    shape = tuple(int(n) for n in torch.ceil((high - low) / step).long() + 2 * _MARGIN + 1)
    means = (visible.means - origin) / step  # in voxels from here on
    covariances = covariances / step**2 + _LOW_PASS**2 * torch.eye(3)
    inverse = torch.linalg.inv(covariances)
    reach = torch.ceil(_REACH * covariances.diagonal(dim1=1, dim2=2).sqrt()).long()
    opacities = visible.opacities.clamp(max=0.995)

    density = torch.zeros(shape).flatten()
    weights, colors = torch.zeros_like(density), torch.zeros(len(density), 3)
    strides = torch.tensor([shape[1] * shape[2], shape[2], 1])
    order = reach.prod(1).argsort()
    start = 0
    while start < len(order):
        # Splats of about one size share one block of voxels.
        count = len(order) - start
        while count > 1 and count * int((2 * reach[order[start : start + count]].amax(0) + 1).prod()) > _AT_ONCE:
            count = (count + 1) // 2
        chosen = order[start : start + count]
        start += count
        centres = means[chosen].round().long()
        # As far as the largest reaches, and no further than the grid does.
        extent = reach[chosen].amax(0)
        first = torch.maximum(-extent, -centres.amax(0)).tolist()
        last = torch.minimum(extent, torch.tensor(shape) - 1 - centres.amin(0)).tolist()
        across = [torch.arange(low, high + 1) for low, high in zip(first[1:], last[1:], strict=True)]
        # A splat that alone is too large for one block is taken in slabs.
        thick = max(1, _AT_ONCE // (count * len(across[0]) * len(across[1])))
        for slab in torch.arange(first[0], last[0] + 1).split(thick):
            check()
            block = torch.cartesian_prod(slab, *across)  # [B, 3]
            cells = centres[:, None] + block  # [C, B, 3]
            offset = cells - means[chosen][:, None]
            distance2 = ((offset @ inverse[chosen]) * offset).sum(2)
            inside = ((cells >= 0) & (cells < torch.tensor(shape))).all(2) & (distance2 < _REACH**2)
            alpha = opacities[chosen][:, None] * torch.exp(-0.5 * distance2)
            index = (cells * strides).sum(2)[inside]
            amount = -torch.log1p(-alpha[inside])
            density.index_add_(0, index, amount)
            # Colour follows the strongest splats, so that what lies behind a surface does not shine through.
            strong = alpha[inside] ** 2
            weights.index_add_(0, index, strong)
            colors.index_add_(0, index, strong[:, None] * visible.colors[chosen][:, None].expand(*inside.shape, 3)[inside])
    return Field(
        origin.numpy().astype(np.float64),
        step,
        density.reshape(shape).numpy(),
        colors.reshape(*shape, 3).numpy(),
        weights.reshape(shape).numpy(),
    )


def _touching(gaussians: Gaussians, check: Callable[[], None]) -> Gaussians:
    distances = _spacing(gaussians.means, check)
    least = _TOUCH * distances.clamp(max=_WIDEST * float(distances.median()))
    scales, order = gaussians.scales.sort(dim=1, descending=True)
    wide = torch.cat([torch.maximum(scales[:, :2], least[:, None]), scales[:, 2:]], dim=1)
    return gaussians.replace(scales=torch.empty_like(wide).scatter_(1, order, wide))


def _spacing(means: Tensor, check: Callable[[], None]) -> Tensor:
    """For each point [N, 3] the distance to its fourth neighbour [N]; estimated from a sample where there are many points."""
    count = len(means)
    others = means
    if count > _NEIGHBOURS:
        others = means[torch.randperm(count, generator=torch.Generator().manual_seed(0))[:_NEIGHBOURS]]
    rank = min(5, len(others))
    found = []
    for part in means.split(1024):
        check()
        found.append(torch.cdist(part, others).topk(rank, largest=False).values[:, -1])
    return torch.cat(found) * (len(others) / count) ** 0.5  # points lie on surfaces: their distance falls with the root of their number


def enclosed(solid: np.ndarray, closing: int, check: Callable[[], None] | None = None) -> np.ndarray:
    """Mask of the voxels outside a mask `solid` [X, Y, Z] that no path from the border reaches.

    Args:
        closing: gaps up to twice as many voxels wide count as shut.
        check: called at every part of the work; what it raises ends it.
    """
    check = check or _go_on
    free = ~_dilated(torch.from_numpy(solid), closing, check).numpy()
    outside = np.zeros_like(free)
    for axis in range(3):
        for end in (0, -1):
            border = np.moveaxis(outside, axis, 0)
            border[end] = np.moveaxis(free, axis, 0)[end]
    reached = -1
    while reached != (reached := int(outside.sum())):
        # One sweep along every axis, there and back, until a whole round reaches nothing new.
        for axis in range(3):
            check()
            seen, way = np.moveaxis(outside, axis, 0), np.moveaxis(free, axis, 0)
            for i in range(1, len(seen)):
                seen[i] |= seen[i - 1] & way[i]
            for i in range(len(seen) - 2, -1, -1):
                seen[i] |= seen[i + 1] & way[i]
    return ~_dilated(torch.from_numpy(outside), closing + 1, check).numpy() & ~solid


def softened(mask: np.ndarray) -> np.ndarray:
    """A mask as numbers in 0..1 that fall off over about two voxels, where a surface can pass smoothly."""
    values = torch.from_numpy(mask)[None, None].float()
    for _ in range(2):
        values = torch.nn.functional.avg_pool3d(values, 3, stride=1, padding=1)
    return values[0, 0].numpy()


def _dilated(mask: Tensor, radius: int, check: Callable[[], None]) -> Tensor:
    """A mask grown by a cube of that radius, one axis and one step at a time."""
    for axis in range(3):
        length = mask.shape[axis]
        for _ in range(radius):
            check()
            grown = mask.clone()
            grown.narrow(axis, 1, length - 1).logical_or_(mask.narrow(axis, 0, length - 1))
            grown.narrow(axis, 0, length - 1).logical_or_(mask.narrow(axis, 1, length - 1))
            mask = grown
    return mask
