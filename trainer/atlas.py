"""Fitted Gaussians to an atlas: exactly N of them, each transported to its cell."""

from __future__ import annotations

import torch
from torch import Tensor

from generator.atlas.channels import Atlas, ChannelSpec, pack
from generator.atlas.layout import AtlasLayout, cell_centres, fibonacci_sphere, project
from generator.errors import InputError
from generator.gaussians import Gaussians, quaternions_to_matrices

from .transport import assign


def to_atlas(gaussians: Gaussians, layout: AtlasLayout, quality: str = "fast", seed: int = 0, spec: ChannelSpec | None = None) -> Atlas:
    """Store an object's Gaussians in the cells of the layout, neighbours in space beside each other.

    The centres are assigned to the points of the unit sphere at the least squared distance (Gaussian Atlas, section
    3.2), and each sphere point has its cell. Too many or too few Gaussians are first brought to N by `resize`.

    Args:
        gaussians: in the object frame.
        quality: of the transport, see `trainer.transport.assign`.
        seed: of the transport.

    Raises:
        InputError: no Gaussians, or a number that is not finite.
    """
    gaussians = resize(gaussians, layout.count)
    assignment = assign(gaussians.means.detach().cpu().numpy(), layout.sphere.numpy(), quality, seed)
    return pack(gaussians[order_by_cell(torch.from_numpy(assignment.indices), layout)], layout, spec)


def order_by_cell(sphere_points: Tensor, layout: AtlasLayout) -> Tensor:
    """The Gaussian of each cell [N], given the sphere point of each Gaussian [N].

    Gaussian i lives in cell `cell_of_point[sphere_points[i]]`; the order wanted is the inverse of that map. Any other
    composition of the two permutations yields an atlas that reads back perfectly and is spatial noise.
    """
    return torch.argsort(layout.cell_of_point[sphere_points])


def compute_layout(size: int, projection: str, quality: str = "exact") -> AtlasLayout:
    """Compute the layout of this size anew: the optimal transport of the flattened sphere to the cell centres.

    Args:
        size: cells a side.
        projection: "equirectangular" or "equal_area".
        quality: of the transport; the stored layouts are "exact".
    """
    sphere = fibonacci_sphere(size**2)
    assignment = assign(project(sphere, size, projection).numpy(), cell_centres(size).numpy(), quality)
    return AtlasLayout(size, projection, sphere, torch.from_numpy(assignment.indices))


def resize(gaussians: Gaussians, count: int) -> Gaussians:
    """Exactly `count` Gaussians that look as much like the given ones as possible.

    Of too many, the least visible go (opacity times mean projected area). Of too few, the most visible are split along
    their longest axis until there are enough: every cell of an atlas then holds something that is seen.

    Raises:
        InputError: there are no Gaussians, a number is not finite, or count is not positive.
    """
    if len(gaussians) == 0:
        raise InputError("there are no Gaussians; at least one is needed")
    if not bool(gaussians.finite().all()):
        raise InputError(f"{int((~gaussians.finite()).sum())} Gaussians contain NaN or infinity; keep those of Gaussians.finite()")
    if count < 1:
        raise InputError(f"count must be at least 1, got {count}")
    if len(gaussians) > count:
        keep = torch.argsort(visibility(gaussians), descending=True, stable=True)[:count]
        return gaussians[keep.sort().values]
    while (missing := count - len(gaussians)) > 0:
        # A quarter at a time: a big Gaussian may be split again before a small one is split at all.
        share = min(missing, max(1, len(gaussians) // 4))
        order = torch.argsort(visibility(gaussians), descending=True, stable=True)
        halves = _split(gaussians[order[:share]])
        gaussians = _concatenate([gaussians[order[share:].sort().values], *halves])
    return gaussians


def visibility(gaussians: Gaussians) -> Tensor:
    """[N] opacity times the mean projected area of the ellipsoid, up to a constant, in squared object units."""
    a, b, c = gaussians.scales.unbind(1)
    return gaussians.opacities * (a * b + b * c + c * a)


# Two Gaussians half a scale to either side, blended over each other, come closest to the one of which they are made (least
# squares along the axis) with these shares of its opacity o and its scale; fitted over o, within 0.2 % of the best values.
_SPLIT_OFFSET = 0.5
_SPLIT_OPACITY = (0.590, 0.143, 0.070)  # 1, o, o^2
_SPLIT_SCALE = (0.843, -0.107)  # 1, o


def _split(gaussians: Gaussians) -> tuple[Gaussians, Gaussians]:
    """Two Gaussians for each, along its longest axis, that together look like it."""
    axis = gaussians.scales.argmax(1, keepdim=True)
    longest = gaussians.scales.gather(1, axis)
    direction = quaternions_to_matrices(gaussians.quaternions).gather(2, axis[:, None].expand(-1, 3, 1)).squeeze(2)
    opacity = gaussians.opacities
    share = _SPLIT_OPACITY[0] + _SPLIT_OPACITY[1] * opacity + _SPLIT_OPACITY[2] * opacity**2
    width = _SPLIT_SCALE[0] + _SPLIT_SCALE[1] * opacity
    scales = gaussians.scales.scatter(1, axis, longest * width[:, None])
    halves = gaussians.replace(scales=scales, opacities=opacity * share)
    step = _SPLIT_OFFSET * longest * direction
    return halves.replace(means=gaussians.means + step), halves.replace(means=gaussians.means - step)


def _concatenate(parts: list[Gaussians]) -> Gaussians:
    names = ("means", "quaternions", "scales", "opacities", "colors")
    return Gaussians(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})
