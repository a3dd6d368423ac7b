"""How opacities and shapes become channel values and are read back: one table of named, invertible transforms.

A shape is an ellipsoid: a rotation and three scales. Both groups of its channels are written together, because the one
description of an ellipsoid that is unique and changes smoothly mixes them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import permutations, product
from typing import NamedTuple

import torch
from torch import Tensor

from ..gaussians import matrices_to_quaternions, quaternions_to_matrices

_EQUAL_SCALES = 1e-5  # relative difference below which two axes count as equal, so that the spin in their plane is free
_EQUAL_LOGS = 1e-4  # difference of log scales below which the turn between two axes counts as undetermined


class OpacityTransform(NamedTuple):
    """Opacities in 0..1 to channel values of the same shape and back; the second argument is `ChannelSpec.opacity_margin`."""

    write: Callable[[Tensor, float], Tensor]
    read: Callable[[Tensor, float], Tensor]


class ShapeTransform(NamedTuple):
    """Quaternions [N, 4] and positive scales [N, 3] to channel values [N, 7]: three of the scale group, four of the rotation group.

    `read` returns unit quaternions and the natural logarithms of the scales, for any finite values.
    """

    names: tuple[str, ...]  # of the seven channels
    ranges: Callable[[float, float], tuple[tuple[float, float], ...]]  # of the seven, for logarithms of scales from low to high
    write: Callable[[Tensor, Tensor], Tensor]
    read: Callable[[Tensor], tuple[Tensor, Tensor]]


def _write_canonical(quaternions: Tensor, scales: Tensor) -> Tensor:
    quaternions, scales = canonical(quaternions, scales)
    return torch.cat([scales.log(), quaternions], dim=1)


def _read_canonical(values: Tensor) -> tuple[Tensor, Tensor]:
    quaternions = values[:, 3:].clamp(-1e18, 1e18)  # whose squares are finite
    length = quaternions.norm(dim=1, keepdim=True)
    identity = torch.tensor([1.0, 0.0, 0.0, 0.0]).to(values)
    return torch.where(length > 1e-8, quaternions / length.clamp_min(1e-8), identity), values[:, :3]


def _write_log_covariance(quaternions: Tensor, scales: Tensor) -> Tensor:
    """The logarithm of an ellipsoid's covariance, halved (Arsigny et al. 2006, "Log-Euclidean metrics"), without its mean.

    It has no axes to order, no signs and no free spin, so equal ellipsoids have equal values and similar ones similar
    values. Mixing such tensors of different directions makes thin axes thick, hence the thin scale has a channel of its own.
    """
    rotations = quaternions_to_matrices(quaternions.double())
    logs = scales.double().log()
    thin, middle, long = logs.sort(1).values.unbind(1)
    tensors = (rotations * (logs - logs.mean(1, keepdim=True))[:, None]) @ rotations.mT
    xx, yy, zz = tensors.diagonal(dim1=1, dim2=2).unbind(1)
    off = tensors[:, 1, 2], tensors[:, 0, 2], tensors[:, 0, 1]
    return torch.stack([(middle + long) / 2, zz, thin, (xx - yy) / 2, *off], dim=1).to(scales.dtype)


def _read_log_covariance(values: Tensor) -> tuple[Tensor, Tensor]:
    wide, zz, thin, across, yz, xz, xy = values.double().unbind(1)
    tensors = torch.stack([across - zz / 2, xy, xz, xy, -across - zz / 2, yz, xz, yz, zz], dim=1).reshape(-1, 3, 3)
    with torch.no_grad():
        axes = torch.linalg.eigh(tensors).eigenvectors  # columns, the thin axis first
        axes = axes * torch.where(torch.linalg.det(axes) < 0, -1.0, 1.0)[:, None, None]
    # First-order perturbation round the axes found: the derivative of the logs and the turn, finite for discs and balls too.
    inside = axes.mT @ tensors @ axes
    low, middle, high = inside.diagonal(dim1=1, dim2=2).unbind(1)
    turn = [_divide(inside[:, i, j], first - second) for i, j, first, second in (
        (1, 2, middle, high), (0, 2, high, low), (0, 1, low, middle),
    )]  # fmt: skip
    quaternions = _multiply(matrices_to_quaternions(axes), torch.stack([torch.ones_like(low), *(angle / 2 for angle in turn)], dim=1))
    # The thin scale is told twice, alike by every real shape. Of a blurred one the tensor is too thick, for unlike directions mixed in
    # it, and the channel too thin for a direction that unsure; halfway between lost least. The volume stays.
    mean = (2 * wide + thin) / 3
    thin = (thin + mean + low) / 2
    wide, stretch = (3 * mean - thin) / 2, (high - middle) / 2
    logs = torch.stack([thin, wide - stretch, wide + stretch], dim=1)
    return torch.nn.functional.normalize(quaternions, dim=1).to(values.dtype), logs.to(values.dtype)


OPACITIES = {
    "identity": OpacityTransform(lambda opacities, margin: opacities, lambda values, margin: values.clamp(0, 1)),
    "logit": OpacityTransform(lambda opacities, margin: torch.logit(opacities, margin), lambda values, margin: torch.sigmoid(values)),
}
SHAPES = {
    "canonical": ShapeTransform(
        ("scale_0", "scale_1", "scale_2", "rotation_w", "rotation_x", "rotation_y", "rotation_z"),
        lambda low, high: ((low, high),) * 3 + ((0.0, 1.0),) + ((-1.0, 1.0),) * 3,
        _write_canonical,
        _read_canonical,
    ),
    "log_covariance": ShapeTransform(
        ("scale_wide", "shape_zz", "scale_thin", "shape_xx_yy", "shape_yz", "shape_xz", "shape_xy"),
        lambda low, high: ((low, high), (low - high, high - low), (low, high)) + ((low - high, high - low),) * 4,
        _write_log_covariance,
        _read_log_covariance,
    ),
}


def canonical(quaternions: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """The description of each ellipsoid whose axes lie nearest the world's; the covariance stays the same.

    Permuting the axes of an ellipsoid, and their scales along, and flipping signs gives 24 rotations that describe it
    equally, each as two quaternions. Of these the smallest rotation is chosen, with w >= 0. Where two scales are equal
    the ellipsoid may also spin freely in their plane, which is removed; where all are, the rotation is the identity.

    Args:
        quaternions: [N, 4] (w, x, y, z), any length but zero.
        scales: [N, 3].

    Returns:
        quaternions [N, 4] of unit length and scales [N, 3].
    """
    dtype = quaternions.dtype
    rotations, orders = (table.to(quaternions.device) for table in _cube_rotations())
    quaternions = torch.nn.functional.normalize(quaternions.double(), dim=1)
    candidates = _multiply(quaternions[:, None], rotations[None])  # [N, 24, 4]
    sizes = scales[:, orders]  # [N, 24, 3]

    # A free spin about one axis is the twist part of the rotation about it; the swing that is left has the larger w.
    following = sizes.roll(-1, 2)
    equal = (sizes - following).abs() <= _EQUAL_SCALES * torch.maximum(sizes, following)  # axes (0, 1), (1, 2), (2, 0)
    for axis, pair in ((0, 1), (1, 2), (2, 0)):
        spin = torch.zeros_like(candidates)
        spin[..., 0], spin[..., 1 + axis] = candidates[..., 0], -candidates[..., 1 + axis]
        length = spin.norm(dim=2, keepdim=True)
        swing = _multiply(candidates, spin / length.clamp_min(1e-12))
        candidates = torch.where(equal[..., pair, None] & (length > 1e-12), swing, candidates)
    identity = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64, device=quaternions.device)
    candidates = torch.where(equal.all(2)[..., None], identity, candidates)

    # The first of the nearly best, not the best: the choice must not hang on rounding when it is made again.
    nearness = candidates[..., 0].abs()
    best = (nearness >= nearness.amax(1, keepdim=True) - 1e-6).int().argmax(1)
    rows = torch.arange(len(quaternions), device=quaternions.device)
    chosen, chosen_scales = candidates[rows, best], sizes[rows, best]
    return torch.where(chosen[:, :1] < 0, -chosen, chosen).to(dtype), chosen_scales


@cache
def _cube_rotations() -> tuple[Tensor, Tensor]:
    """The 24 rotations of a cube: quaternions [24, 4], the identity first, and the axis [24, 3] that each new axis was."""
    quaternions, orders = [], []
    values = sorted({tuple(q) for q in _cube_quaternions()}, reverse=True)
    for w, x, y, z in values:
        matrix = torch.tensor([
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ])  # fmt: skip
        quaternions.append((w, x, y, z))
        orders.append(matrix.abs().argmax(0))
    return torch.tensor(quaternions, dtype=torch.float64), torch.stack(orders)


def _cube_quaternions():
    """One of each pair q, -q of unit quaternions with 1, 2 or 4 equal non-zero entries."""
    half, root = 0.5, 0.5**0.5
    for signs in product((1.0, -1.0), repeat=3):
        yield (half, *(half * sign for sign in signs))
    for position in range(4):
        yield tuple(1.0 if index == position else 0.0 for index in range(4))
    for first, second in permutations(range(4), 2):
        if first < second:
            for sign in (1.0, -1.0):
                yield tuple(root if i == first else root * sign if i == second else 0.0 for i in range(4))


def _multiply(left: Tensor, right: Tensor) -> Tensor:
    """Hamilton product of quaternions [..., 4] (w, x, y, z)."""
    a, b, c, d = left.unbind(-1)
    e, f, g, h = right.unbind(-1)
    return torch.stack(torch.broadcast_tensors(
        a * e - b * f - c * g - d * h,
        a * f + b * e + c * h - d * g,
        a * g - b * h + c * e + d * f,
        a * h + b * g - c * f + d * e,
    ), dim=-1)  # fmt: skip


def _divide(value: Tensor, gap: Tensor) -> Tensor:
    """value / gap, and 0 instead of infinity where the gap is 0."""
    return value * gap / (gap.square() + _EQUAL_LOGS**2)
