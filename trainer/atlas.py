"""Fitted Gaussians to an atlas: at most N of them, each transported to its cell, and transparent ones where cells are left."""

from __future__ import annotations

from typing import NamedTuple

import torch
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation
from torch import Tensor

from generator.atlas.channels import Atlas, ChannelSpec, pack
from generator.atlas.layout import AtlasLayout, cell_centres, fibonacci_sphere, project
from generator.errors import InputError
from generator.gaussians import Gaussians, concatenate
from generator.render.ewa import ALPHA_MAX

from .assignment import median_split
from .transport import Assignment, assign

_AT_ONCE = 2**19  # Gaussians merged at once: bounds the working memory


def to_atlas(gaussians: Gaussians, layout: AtlasLayout, quality: str = "fast", seed: int = 0, spec: ChannelSpec | None = None) -> Atlas:
    """Store an object's Gaussians in the cells of the layout, neighbours in space beside each other.

    The centres are assigned to the points of the unit sphere at the least squared distance (Gaussian Atlas, section
    3.2), and each sphere point has its cell. More than N Gaussians are first merged by `resize`. Fewer leave cells
    empty, always the same ones for the same number (see `filling_order`); those repeat what is nearest on the sphere,
    transparent, so that the object looks as it did.

    Args:
        gaussians: in the object frame.
        quality: of the transport, see `trainer.transport.assign`.
        seed: of the transport.

    Raises:
        InputError: no Gaussians, or a number that is not finite.
    """
    gaussians = resize(gaussians, layout.count)
    source, empty, _ = arrange(gaussians.means, layout, quality, seed)
    cells = gaussians[source]
    return pack(cells.replace(opacities=cells.opacities.masked_fill(empty, 0)), layout, spec)


class Arrangement(NamedTuple):
    """Which of n <= N Gaussians is in each of the N cells of a layout."""

    source: Tensor  # [N] int64, the Gaussian in each cell; in an empty cell the one that is nearest on the sphere
    empty: Tensor  # [N] bool
    assignment: Assignment  # of the Gaussians to the sphere points of the cells that are not empty


def arrange(means: Tensor, layout: AtlasLayout, quality: str = "fast", seed: int = 0) -> Arrangement:
    """Find the cell of each Gaussian centre [n, 3], n <= N, by transport; see `to_atlas`."""
    filled = filling_order(layout.size)[: len(means)].sort().values
    points = layout.point_of_cell[filled].sort().values
    assignment = assign(means.detach().cpu().numpy(), layout.sphere[points].numpy(), quality, seed)
    source = torch.full((layout.count,), -1)
    source[filled] = order_by_cell(points[torch.from_numpy(assignment.indices)], layout)
    empty = source < 0
    if empty.any():
        nearest = cKDTree(layout.cell_sphere[filled].numpy()).query(layout.cell_sphere[empty].numpy())[1]
        source[empty] = source[filled[torch.from_numpy(nearest)]]
    return Arrangement(source, empty, assignment)


def order_by_cell(sphere_points: Tensor, layout: AtlasLayout) -> Tensor:
    """The Gaussian of each cell [N], given the sphere point of each Gaussian [N]; of n < N Gaussians, of each cell that has one.

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


def filling_order(size: int) -> Tensor:
    """All cells [size^2] in the order in which they are filled: any first n of them are spread evenly over the image.

    It is the order of a Bayer matrix (Bayer 1973, ordered dithering): the last quarter holds one cell of each square of two
    by two. Empty cells depend on their number alone, so a model need not guess from noise where they are.
    """
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    rank = torch.zeros(size, size, dtype=torch.int64)
    for bit in range(max(1, size - 1).bit_length()):
        row, column = rows >> bit & 1, columns >> bit & 1
        rank = 4 * rank + 2 * (row ^ column) + row
    return torch.argsort(rank.flatten(), stable=True)


def resize(gaussians: Gaussians, count: int) -> Gaussians:
    """At most `count` Gaussians that look as much like the given ones as possible; if there are no more, they themselves.

    Median splits pair each Gaussian with a near one, and the nearest pairs become one Gaussian each. Of more than twice
    as many, `count` groups of neighbours do. Nothing is dropped: a surface that loses Gaussians gets holes.

    Raises:
        InputError: there are no Gaussians, a number is not finite, or count is not positive.
    """
    total = len(gaussians)
    if total == 0:
        raise InputError("there are no Gaussians; at least one is needed")
    if not bool(gaussians.finite().all()):
        raise InputError(f"{int((~gaussians.finite()).sum())} Gaussians contain NaN or infinity; keep those of Gaussians.finite()")
    if count < 1:
        raise InputError(f"count must be at least 1, got {count}")
    if total <= count:
        return gaussians
    means = gaussians.means.detach().cpu().double()
    order, starts = (torch.from_numpy(part) for part in median_split(means.numpy(), min(count, (total + 1) // 2)))
    alone = torch.zeros(total, dtype=torch.bool)
    if total < 2 * count:
        pairs = order[starts[:-1][starts.diff() == 2, None] + torch.arange(2)]
        apart = (means[pairs[:, 0]] - means[pairs[:, 1]]).square().sum(1)
        order = pairs[torch.argsort(apart, stable=True)[: total - count]].flatten()
        starts = torch.arange(0, len(order) + 1, 2)
        alone = alone.logical_not().index_fill(0, order, False)
    # Whole groups at a time: bounded working memory however many Gaussians there are.
    step = max(1, _AT_ONCE // int(starts.diff().max()))
    merged = [
        _merged(gaussians[order[starts[first] : starts[min(first + step, len(starts) - 1)]]], starts[first : first + step + 1].diff())
        for first in range(0, len(starts) - 1, step)
    ]
    return concatenate([gaussians[alone], *merged])


def visibility(gaussians: Gaussians) -> Tensor:
    """[N] opacity times the mean projected area of the ellipsoid, up to a constant, in squared object units."""
    return gaussians.opacities * _area(gaussians.scales)


def _area(scales: Tensor) -> Tensor:
    a, b, c = scales.unbind(1)
    return a * b + b * c + c * a


def _merged(gaussians: Gaussians, sizes: Tensor) -> Gaussians:
    """One Gaussian for each run of `sizes` [G] Gaussians, with the mean, covariance and colour of what is seen of the run.

    Its opacity keeps opacity times area, as far as renderers let it.
    """
    members = gaussians.detach().to("cpu", torch.float64)
    group = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    weights = visibility(members).clamp_min(1e-30)  # a group in which nothing is seen has a mean too
    totals = torch.zeros(len(sizes), dtype=weights.dtype).index_add_(0, group, weights)
    weights = weights / totals[group]

    def mean(values: Tensor) -> Tensor:
        weighted = weights.reshape(-1, *[1] * (values.ndim - 1)) * values
        return torch.zeros(len(sizes), *values.shape[1:], dtype=values.dtype).index_add_(0, group, weighted)

    means = mean(members.means)
    apart = members.means - means[group]
    squares, axes = torch.linalg.eigh(mean(members.covariances() + apart[:, :, None] * apart[:, None, :]))
    axes = axes * torch.where(torch.linalg.det(axes) < 0, -1.0, 1.0)[:, None, None]
    scales = squares.clamp_min(1e-20).sqrt()
    merged = Gaussians(
        means=means,
        quaternions=torch.from_numpy(Rotation.from_matrix(axes.numpy()).as_quat(scalar_first=True)),
        scales=scales,
        opacities=(totals / _area(scales)).clamp_max(ALPHA_MAX),
        colors=mean(members.colors),
    )
    return merged.to(gaussians.means)
