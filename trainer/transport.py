"""Balanced optimal transport between two point sets of equal size: who goes where at the least squared distance.

The atlas needs it twice: Gaussian centres to the sphere (once per object) and the projected sphere to the pixel grid
(once per layout). Both are linear assignments under the squared Euclidean cost, which, for fixed sets, is a constant
minus twice the sum of dot products; so moving or uniformly scaling either set changes the cost but not the assignment.

Everything here runs on one core: preparing a data set is parallel over objects.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit
from scipy.optimize import linear_sum_assignment
from scipy.spatial import cKDTree

from generator.errors import InputError

QUALITIES = ("fast", "high", "exact")

_CLUSTER = 8  # points per cluster of the coarse start
_MAX_CLUSTERS = 1024  # the assignment between clusters is dense and cubic
_BLOCK = 256  # points per block that a sweep solves exactly
_SWEEPS = 6
_NEIGHBOURS = 16  # targets around each target that 2-opt tries
_DUAL_NEIGHBOURS = 32  # targets around each target that the potentials see
_DUAL_SWEEPS = 60


@dataclass(frozen=True)
class Assignment:
    """A one-to-one assignment of points to targets.

    `lower_bound` is the value of a feasible dual solution, so the exact minimum lies between it and `cost`.
    """

    indices: np.ndarray  # [N] int64, the target of each point; a permutation
    cost: float  # mean squared distance between the points and their targets
    lower_bound: float  # certified: no assignment costs less

    @property
    def gap(self) -> float:
        """Relative distance from the certified bound, 0 when proven optimal."""
        return (self.cost - self.lower_bound) / self.cost if self.cost > 0 else 0.0


def assign(points: np.ndarray, targets: np.ndarray, quality: str = "fast", seed: int = 0) -> Assignment:
    """Assign every point its own target so that the mean squared distance is small.

    Args:
        points: [N, D] finite numbers (D = 3 for objects, 2 for the plane).
        targets: [N, D], in the same units.
        quality: "fast" matches median-split clusters coarse to fine, then improves by 2-opt and exact re-solving of
            random blocks; "high" and "exact" finish that start by shortest augmenting paths, "high" to within 0.01 % of
            the optimum, "exact" to the optimum.
        seed: of the random block directions; the result is a function of the arguments alone.

    Raises:
        InputError: shapes differ, a number is not finite, there are no points, or the quality is unknown.
    """
    points, targets = _validated(points, "points"), _validated(targets, "targets")
    if points.shape != targets.shape:
        raise InputError(f"points {list(points.shape)} and targets {list(targets.shape)} must have the same shape")
    if quality not in QUALITIES:
        raise InputError(f"quality must be one of {', '.join(QUALITIES)}, got {quality!r}")
    offset = points.mean(0) - targets.mean(0)
    points, point_scale = _standardised(points)
    targets, target_scale = _standardised(targets)

    if quality == "exact":
        indices, value, bound = _exact(points, targets)
    else:
        indices = _fast(points, targets, np.random.default_rng(seed))
        bound = _dual_bound(points, targets, indices)
        value = -np.einsum("nd,nd->", points, targets[indices])
    constant = offset @ offset + point_scale**2 * (points**2).sum(1).mean() + target_scale**2 * (targets**2).sum(1).mean()
    factor = 2 * point_scale * target_scale / len(points)
    cost = max(0.0, float(constant + factor * value))
    return Assignment(indices, cost, float(np.clip(constant + factor * bound, 0.0, cost)))


def _validated(values: np.ndarray, name: str) -> np.ndarray:
    try:
        values = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} must be an array [N, D] of numbers") from error
    if values.ndim != 2 or values.shape[0] < 1 or values.shape[1] < 1:
        raise InputError(f"{name} must be an array [N, D] with at least one row, got {list(values.shape)}")
    if not np.isfinite(values).all():
        raise InputError(f"{name} contain NaN or infinity; drop those rows first")
    return values


def _standardised(values: np.ndarray) -> tuple[np.ndarray, float]:
    """Centred values of unit mean square, and the scale taken out; the assignment does not depend on either."""
    values = values - values.mean(0)
    scale = float(np.sqrt((values**2).sum(1).mean())) or 1.0
    return np.ascontiguousarray(values / scale), scale


def _exact(points: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, float, float]:
    costs = -points @ targets.T
    _, indices = linear_sum_assignment(costs)
    value = float(costs[np.arange(len(points)), indices].sum())
    return indices.astype(np.int64), value, value


def _fast(points: np.ndarray, targets: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Coarse-to-fine start, 2-opt, then sweeps of exactly solved random blocks."""
    indices = _coarse_to_fine(points, targets)
    count = len(points)
    if count <= _CLUSTER:
        return indices
    neighbours = cKDTree(targets).query(targets, k=min(_NEIGHBOURS + 1, count))[1][:, 1:]
    _two_opt(points, targets, indices, np.ascontiguousarray(neighbours), 50)
    for sweep in range(_SWEEPS):
        space = targets[indices] if sweep % 2 == 0 else points
        rotation = np.linalg.qr(rng.normal(size=(space.shape[1],) * 2))[0]
        for block in _median_split(space @ rotation, max(1, round(count / _BLOCK)), rng):
            goals = indices[block]
            rows, columns = linear_sum_assignment(-points[block] @ targets[goals].T)
            indices[block[rows]] = goals[columns]
        _two_opt(points, targets, indices, np.ascontiguousarray(neighbours), 10)
    return indices


def _coarse_to_fine(points: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Match balanced clusters of both sets exactly, then exactly within each pair, then what cluster sizes left over."""
    count = len(points)
    clusters = min(_MAX_CLUSTERS, max(1, count // _CLUSTER))
    sources, goals = _median_split(points, clusters), _median_split(targets, clusters)
    centres = np.stack([points[members].mean(0) for members in sources])
    aims = np.stack([targets[members].mean(0) for members in goals])
    indices = np.full(count, -1, np.int64)
    for source, goal in zip(*linear_sum_assignment(-centres @ aims.T), strict=True):
        rows, columns = linear_sum_assignment(-points[sources[source]] @ targets[goals[goal]].T)
        indices[sources[source][rows]] = goals[goal][columns]
    left = np.flatnonzero(indices < 0)
    if len(left):
        free = np.setdiff1d(np.arange(count), indices)
        rows, columns = linear_sum_assignment(-points[left] @ targets[free].T)
        indices[left[rows]] = free[columns]
    return indices


def _median_split(values: np.ndarray, parts: int, rng: np.random.Generator | None = None) -> list[np.ndarray]:
    """Row indices in `parts` groups of equal size (to within one), by splits across the widest axis.

    With a generator, the first cut is moved by up to half a group, so that repeated calls draw other borders.
    """
    order = np.arange(len(values))
    groups = []
    stack = [(order, parts)]
    while stack:
        members, share = stack.pop()
        if share == 1:
            groups.append(members)
            continue
        low = share // 2
        cut = len(members) * low // share
        if rng is not None:
            spread = len(members) // (2 * share)
            cut += int(rng.integers(-spread, spread + 1))
        local = values[members]
        axis = int(np.argmax(local.max(0) - local.min(0)))
        members = members[np.argpartition(local[:, axis], cut)] if 0 < cut < len(members) else members
        stack.append((members[cut:], share - low))
        stack.append((members[:cut], low))
    return [group for group in groups if len(group)]


@njit(cache=True)
def _two_opt(points, targets, indices, neighbours, sweeps):  # pragma: no cover - compiled
    """Swap the targets of two points while that shortens the way, trying each target's neighbours."""
    count, dim = points.shape
    owner = np.empty(count, np.int64)
    for i in range(count):
        owner[indices[i]] = i
    for _ in range(sweeps):
        swaps = 0
        for j in range(count):
            for n in range(neighbours.shape[1]):
                k = neighbours[j, n]
                a = owner[j]
                b = owner[k]
                gain = 0.0
                for d in range(dim):
                    gain -= (points[a, d] - points[b, d]) * (targets[j, d] - targets[k, d])
                if gain > 1e-12:
                    indices[a] = k
                    indices[b] = j
                    owner[j] = b
                    owner[k] = a
                    swaps += 1
        if swaps == 0:
            break


def _dual_bound(points: np.ndarray, targets: np.ndarray, indices: np.ndarray) -> float:
    """Value of a feasible dual solution of the assignment with costs -p.t, built around a near-optimal assignment."""
    count = len(points)
    neighbours = cKDTree(targets).query(targets, k=min(_DUAL_NEIGHBOURS + 1, count))[1].reshape(count, -1)
    potentials = _relaxed_potentials(points, targets, indices, np.ascontiguousarray(neighbours), _DUAL_SWEEPS)
    return _dual_value(points, targets, potentials)


@njit(cache=True)
def _relaxed_potentials(points, targets, indices, neighbours, sweeps):  # pragma: no cover - compiled
    """Bellman-Ford on the targets: v_k <= v_j + c(i, k) - c(i, j) where i owns j and k lies near j."""
    count, dim = points.shape
    owner = np.empty(count, np.int64)
    for i in range(count):
        owner[indices[i]] = i
    potentials = np.zeros(count)
    for _ in range(sweeps):
        changed = False
        for j in range(count):
            i = owner[j]
            for n in range(neighbours.shape[1]):
                k = neighbours[j, n]
                step = potentials[j]
                for d in range(dim):
                    step += points[i, d] * (targets[j, d] - targets[k, d])
                if step < potentials[k] - 1e-12:
                    potentials[k] = step
                    changed = True
        if not changed:
            break
    return potentials


@njit(cache=True)
def _dual_value(points, targets, potentials):  # pragma: no cover - compiled
    """Sum of u and v where u_i = min_k (c(i, k) - v_k) makes v feasible against every target."""
    count, dim = points.shape
    total = 0.0
    for i in range(count):
        best = np.inf
        for k in range(count):
            reduced = -potentials[k]
            for d in range(dim):
                reduced -= points[i, d] * targets[k, d]
            if reduced < best:
                best = reduced
        total += best + potentials[i]
    return total
