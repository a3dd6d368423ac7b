"""Gaussians laid evenly over the surface: where a fit starts. The surface comes from the views' depth, or is carved from their outlines."""

from __future__ import annotations

import numba
import numpy as np
import torch
from scipy.ndimage import binary_erosion, gaussian_filter
from scipy.spatial import cKDTree

from generator.errors import InputError
from generator.gaussians import Gaussians
from trainer.views import Views

# Depth jumps by more than this many pixel widths across one pixel at a silhouette: such a sample floats between surfaces.
_SILHOUETTE = 4.0
_NEIGHBOURS = 6
_SHARED = 16  # Gaussians that may start from one sample, somewhere in its pixel
_OPAQUE, _FAINT = 251, 51  # least alphas of 255: of opaque surfaces, and of any that has a depth
_TOUCHED = 25  # of 255: alpha from which a pixel belongs to the outline; thin things cover no pixel half
_GLASS = 0.05  # share of opaque pixels below which an object counts as transparent all over
_LEAF = 128  # points in a leaf of the tree of candidates
_VOXELS = 144  # of the carved box, a side
_BOX = 1.04  # object lengths, its side: the object's own and a little air


def surface_points(views: Views) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Back-project every opaque pixel: points [P, 3], unit normals [P, 3] (object frame), colours [P, 3] in 0..1.

    Of objects that are transparent all over it is every pixel that has a depth. (Taking such pixels of other objects too,
    wherever nothing near is opaque, was tried: the rims of leaves then lie in the way of what is behind them.)
    """
    least = _FAINT if _is_glass(views) else _OPAQUE
    points, normals, colors = [], [], []
    columns, rows = np.meshgrid(np.arange(views.cameras.width) + 0.5, np.arange(views.cameras.height) + 0.5)
    for view in range(len(views.cameras)):
        K = views.cameras.Ks[view].numpy()
        viewmat = views.cameras.viewmats[view].numpy()
        rgba = views.rgba[view]
        depth = np.asarray(views.depth[view], np.float32)
        around = np.pad(depth, 1)
        left, right, up, down = (
            np.where(near > 0, near, depth) for near in (around[1:-1, :-2], around[1:-1, 2:], around[:-2, 1:-1], around[2:, 1:-1])
        )
        jump = np.maximum(np.abs(right - left), np.abs(down - up))
        # Grazing surfaces have steep depth too: only a jump of many pixel widths lies between two surfaces.
        seen = (rgba[..., 3] >= least) & np.isfinite(depth) & (depth > 0) & (jump < 2 * _SILHOUETTE * depth / K[0, 0])
        z = depth[seen]
        camera = np.stack([(columns[seen] - K[0, 2]) / K[0, 0] * z, (rows[seen] - K[1, 2]) / K[1, 1] * z, z], axis=1)
        points.append((camera - viewmat[:3, 3]) @ viewmat[:3, :3])
        normals.append(np.asarray(views.normals[view], np.float32)[seen])
        colors.append(rgba[seen][:, :3].astype(np.float32) / 255)
    normals = np.concatenate(normals)
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-6)
    return np.concatenate(points).astype(np.float32), normals, np.concatenate(colors)


def _is_glass(views: Views) -> bool:
    alpha = views.rgba[..., 3]
    return bool((alpha >= _OPAQUE).sum() < _GLASS * (alpha >= _FAINT).sum())


def carved_points(views: Views) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The surface of the visual hull (Laurentini 1994), the largest object with these outlines: as `surface_points`, without depth.

    Hollows that no outline shows are filled. A colour is the pixel of the view that a point faces most, hidden or not.
    """
    viewmats, Ks = views.cameras.viewmats.numpy(), views.cameras.Ks.numpy()
    inside = _carve(np.ascontiguousarray(views.rgba[..., 3] >= _TOUCHED), viewmats, Ks, _VOXELS, _BOX)
    # One voxel of air round the box: what touches its walls has a surface there.
    padded = np.pad(inside, 1)
    surface = inside & ~binary_erosion(padded)[1:-1, 1:-1, 1:-1]
    smooth = gaussian_filter(padded.astype(np.float32), 1.5)
    gradient = np.stack(np.gradient(smooth), axis=-1)[1:-1, 1:-1, 1:-1][surface]
    normals = -gradient / np.maximum(np.linalg.norm(gradient, axis=1, keepdims=True), 1e-6)
    points = ((np.argwhere(surface) + 0.5) / _VOXELS - 0.5) * _BOX
    view = (normals @ views.cameras.positions.numpy().T).argmax(1)
    camera = np.einsum("nij,nj->ni", viewmats[view, :3, :3], points) + viewmats[view, :3, 3]
    pixels = np.einsum("nij,nj->ni", Ks[view], camera / camera[:, 2:])[:, :2]
    column, row = (np.clip(pixels[:, axis].astype(np.int64), 0, views.rgba.shape[2 - axis] - 1) for axis in (0, 1))
    colors = views.rgba[view, row, column, :3].astype(np.float32) / 255
    return points.astype(np.float32), normals.astype(np.float32), colors


@numba.njit(cache=True)
def _carve(masks: np.ndarray, viewmats: np.ndarray, Ks: np.ndarray, voxels: int, box: float) -> np.ndarray:
    """Which voxels [n, n, n] lie within the outline of every view; what a view does not frame it says nothing of."""
    count, height, width = masks.shape
    inside = np.ones((voxels, voxels, voxels), np.bool_)
    for i in range(voxels):
        for j in range(voxels):
            for k in range(voxels):
                x, y, z = ((i + 0.5) / voxels - 0.5) * box, ((j + 0.5) / voxels - 0.5) * box, ((k + 0.5) / voxels - 0.5) * box
                for v in range(count):
                    m = viewmats[v]
                    depth = m[2, 0] * x + m[2, 1] * y + m[2, 2] * z + m[2, 3]
                    column = Ks[v, 0, 0] * (m[0, 0] * x + m[0, 1] * y + m[0, 2] * z + m[0, 3]) / depth + Ks[v, 0, 2]
                    row = Ks[v, 1, 1] * (m[1, 0] * x + m[1, 1] * y + m[1, 2] * z + m[1, 3]) / depth + Ks[v, 1, 2]
                    if depth > 0 and 0 <= column < width and 0 <= row < height and not masks[v, int(row), int(column)]:
                        inside[i, j, k] = False
                        break
    return inside


def farthest_points(points: np.ndarray, count: int) -> np.ndarray:
    """Indices [count] of points [P, 3] chosen greedily, each the farthest from those before (Gonzalez 1985).

    Exact, but a new choice only looks at the leaves of a k-d tree that it can be nearer to than what they have.
    """
    tree = cKDTree(points, leafsize=_LEAF)
    leaves, pending = [], [tree.tree]
    while pending:
        node = pending.pop()
        if node.lesser is None:
            leaves.append(node.start_idx)
        else:
            pending += [node.greater, node.lesser]
    order = tree.indices
    starts = np.array(leaves, np.int64)
    placed = np.ascontiguousarray(points[order], np.float32)
    lowest, highest = np.minimum.reduceat(placed, starts), np.maximum.reduceat(placed, starts)
    first = int(np.flatnonzero(order == 0)[0])
    return order[_farthest(placed, np.append(starts, len(points)), lowest, highest, first, count)]


@numba.njit(cache=True)
def _farthest(points, starts, lowest, highest, first, count):
    chosen = np.empty(count, np.int64)
    leaves = len(lowest)
    nearest = np.full(len(points), np.inf, np.float32)
    farthest = np.full(leaves, np.inf, np.float32)  # of each leaf: the largest `nearest` and which point has it
    holder = starts[:-1].copy()
    current = first
    for k in range(count):
        chosen[k] = current
        x, y, z = points[current]
        best, following = np.float32(-1), 0
        for leaf in range(leaves):
            dx = max(lowest[leaf, 0] - x, x - highest[leaf, 0], np.float32(0))
            dy = max(lowest[leaf, 1] - y, y - highest[leaf, 1], np.float32(0))
            dz = max(lowest[leaf, 2] - z, z - highest[leaf, 2], np.float32(0))
            if dx * dx + dy * dy + dz * dz < farthest[leaf]:
                largest, where = np.float32(-1), starts[leaf]
                for i in range(starts[leaf], starts[leaf + 1]):
                    dx, dy, dz = points[i, 0] - x, points[i, 1] - y, points[i, 2] - z
                    nearest[i] = min(nearest[i], dx * dx + dy * dy + dz * dz)
                    if nearest[i] > largest:
                        largest, where = nearest[i], i
                farthest[leaf], holder[leaf] = largest, where
            if farthest[leaf] > best:
                best, following = farthest[leaf], holder[leaf]
        current = following
    return chosen


def initialize(views: Views, count: int, seed: int = 0, start: str = "depth") -> Gaussians:
    """`count` flat Gaussians, spread as evenly as possible over what the views show.

    Each lies in the surface's tangent plane, is as wide as its distance to its neighbours and nearly opaque.

    Args:
        start: "depth", the surface that the views' depth shows, or "outline", the one that their outlines leave. Views without
            any depth have outlines alone.

    Raises:
        InputError: the views show less than a sixteenth of `count` surface samples.
    """
    generator = np.random.default_rng(seed)
    opacity = 0.9
    if start == "outline" or not views.depth.any():
        points, normals, colors = carved_points(views)
        apart = _BOX / _VOXELS
    else:
        points, normals, colors = surface_points(views)
        if _is_glass(views):  # its back shows through
            opacity = 0.2
        apart = float(views.cameras.positions.norm(dim=1).mean() / views.cameras.Ks[:, 0, 0].mean())
    if len(points) * _SHARED < count:
        raise InputError(f"the views show only {len(points)} surface samples, too few for {count} Gaussians; use larger views")
    if len(points) < 2 * count:  # thin things in small views
        points, normals, colors = _several((points, normals, colors), 12 * count, apart, generator)
    # A dozen candidates for each Gaussian are even enough.
    candidates = generator.permutation(len(points))[: 12 * count]
    chosen = candidates[farthest_points(points[candidates], count)]
    # A sample's colour is one noisy pixel: average over the samples round it.
    tree = cKDTree(points)
    spacing, _ = cKDTree(points[chosen]).query(points[chosen], k=_NEIGHBOURS + 1)
    spacing = spacing[:, 1:].mean(1).clip(1e-4, 0.1)
    _, around = tree.query(points[chosen], k=8, distance_upper_bound=float(2 * spacing.max()))
    around = np.where(around < len(points), around, chosen[:, None])
    facing = np.einsum("nkc,nc->nk", normals[around], normals[chosen])[..., None] > 0.5
    color = (colors[around] * facing).sum(1) / np.maximum(facing.sum(1), 1)
    scales = np.stack([0.4 * spacing, 0.4 * spacing, 0.1 * spacing], axis=1)
    return Gaussians(
        means=torch.from_numpy(points[chosen]),
        quaternions=normals_to_quaternions(torch.from_numpy(normals[chosen])),
        scales=torch.from_numpy(scales.astype(np.float32)),
        opacities=torch.full((count,), opacity),
        colors=torch.from_numpy(color.astype(np.float32)),
    )


def _several(surface: tuple[np.ndarray, ...], wanted: int, apart: float, generator: np.random.Generator) -> tuple[np.ndarray, ...]:
    """At least `wanted` points of a surface of samples that are `apart`: each several times, around its place in its tangent plane."""
    points, normals, colors = (np.repeat(part, -(-wanted // len(surface[0])), axis=0) for part in surface)
    aside = generator.uniform(-0.5, 0.5, points.shape) * apart
    aside -= (aside * normals).sum(1, keepdims=True) * normals
    return (points + aside).astype(np.float32), normals, colors


def normals_to_quaternions(normals: torch.Tensor) -> torch.Tensor:
    """The smallest rotations [N, 4] (w, x, y, z) that turn +Z or -Z, whichever is nearer, onto unit normals [N, 3].

    A flat Gaussian has no front, so the sign of its normal is free; the nearer one keeps the rotation below 90 degrees.
    """
    normals = torch.where(normals[:, 2:] < 0, -normals, normals)
    x, y, z = normals.unbind(-1)
    return torch.nn.functional.normalize(torch.stack([1 + z, -y, x, torch.zeros_like(z)], dim=-1), dim=-1)
