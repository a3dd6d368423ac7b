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
from scipy.sparse import coo_matrix, diags
from scipy.sparse.linalg import cg
from scipy.spatial import cKDTree

from generator.errors import InputError

QUALITIES = ("fast", "high", "exact")

_CLUSTER = 8  # points per cluster of the coarse start
_MAX_CLUSTERS = 1024  # the assignment between clusters is dense and cubic
_BLOCKS = {"fast": (128, 6), "high": (128, 16)}  # points per block that a sweep solves exactly, sweeps
_NEIGHBOURS = 16  # targets around each target that 2-opt tries
_DUAL_NEIGHBOURS = 8  # targets around each target that its potential is fitted to
_TIGHT = 1e-10  # standardised units; a pair whose reduced cost is larger is taken apart by the exact solver


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
        quality: "fast" matches median-split clusters coarse to fine, then improves by 2-opt and by re-solving random
            blocks exactly; "high" re-solves more and larger blocks; "exact" continues from "fast" by shortest augmenting
            paths to the proven optimum, in memory linear in N.
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

    block, sweeps = _BLOCKS["high" if quality == "high" else "fast"]
    indices = _improved(points, targets, _coarse_to_fine(points, targets), block, sweeps, np.random.default_rng(seed))
    target_duals = _potentials(points, targets, indices)
    if quality == "exact":
        point_duals = _point_potentials(points, targets, target_duals)
        _shortest_augmenting_paths(points, targets, indices, point_duals, target_duals)
    bound = _point_potentials(points, targets, target_duals).sum() + target_duals.sum()
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


def _improved(
    points: np.ndarray, targets: np.ndarray, indices: np.ndarray, block: int, sweeps: int, rng: np.random.Generator
) -> np.ndarray:
    """The assignment after 2-opt and sweeps that re-solve random blocks exactly; never worse than the one given."""
    count = len(points)
    if count == 1:
        return indices
    neighbours = _nearest(targets, _NEIGHBOURS)
    _two_opt(points, targets, indices, neighbours, 50)
    for sweep in range(sweeps):
        # Long-range flow needs blocks of near targets, crossings of near points blocks of those: take turns.
        space = points if sweep % 2 else targets[indices]
        rotation = np.linalg.qr(rng.normal(size=(space.shape[1],) * 2))[0]
        for members in _median_split(space @ rotation, max(1, round(count / block)), rng):
            goals = indices[members]
            rows, columns = linear_sum_assignment(-points[members] @ targets[goals].T)
            indices[members[rows]] = goals[columns]
        _two_opt(points, targets, indices, neighbours, 10)
    return indices


def _nearest(values: np.ndarray, count: int) -> np.ndarray:
    """[N, up to count] rows nearest to each row, itself excluded unless rows coincide."""
    return np.ascontiguousarray(cKDTree(values).query(values, k=range(2, min(count + 1, len(values)) + 1))[1])


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


def _potentials(points: np.ndarray, targets: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Dual potentials [N] of the targets for costs -p.t, nearly optimal where the assignment is.

    Optimality bounds the difference of two potentials from both sides: the owner p_j of target j must not prefer target
    k, nor the owner of k target j, so v_k - v_j lies between p_k.(t_j - t_k) and p_j.(t_j - t_k). The potentials are the
    least-squares fit to the middle of these bounds over neighbouring targets, which averages out what is not optimal
    yet (relaxing the bounds one by one would spread it).
    """
    count = len(points)
    if count == 1:
        return np.zeros(1)
    neighbours = _nearest(targets, _DUAL_NEIGHBOURS)
    owners = points[np.argsort(indices)]
    j, k = np.repeat(np.arange(count), neighbours.shape[1]), neighbours.ravel()
    middle = 0.5 * ((owners[j] + owners[k]) * (targets[j] - targets[k])).sum(1)
    edges = coo_matrix((np.ones(len(j)), (j, k)), shape=(count, count))
    links = (edges + edges.T).tocsr()
    system = diags(np.asarray(links.sum(1)).ravel()) - links
    flow = np.bincount(k, middle, count) - np.bincount(j, middle, count)
    return cg(system, flow, rtol=1e-4, maxiter=500)[0]


def _point_potentials(points: np.ndarray, targets: np.ndarray, potentials: np.ndarray) -> np.ndarray:
    """The largest u [N] with u_i + v_k <= -p_i.t_k for every pair: a nearest-neighbour search.

    -p.t_k - v_k is, up to what does not depend on k, half the squared distance from (p, 0) to t_k lifted by the height h_k
    with h_k^2 = const - |t_k|^2 - 2 v_k (the power diagram of the targets), so no matrix of costs is needed.
    """
    heights = -(targets**2).sum(1) - 2 * potentials
    lifted = np.column_stack([targets, np.sqrt(np.maximum(heights - heights.min(), 0))])
    best = cKDTree(lifted).query(np.column_stack([points, np.zeros(len(points))]))[1]
    return -(points * targets[best]).sum(1) - potentials[best]


@njit(cache=True)
def _shortest_augmenting_paths(points, targets, indices, duals, potentials):  # pragma: no cover - compiled
    """Make an assignment optimal, and the potentials prove it (Jonker and Volgenant 1987, with dense Dijkstra).

    Pairs that are not tight under the potentials are taken apart, and each free point finds the cheapest chain of
    reassignments to a free target. Costs are recomputed, not stored. `indices`, `duals` (of the points) and `potentials`
    (of the targets) are changed in place.
    """
    count, dim = points.shape
    owner = np.full(count, -1, np.int64)
    for i in range(count):
        reduced = -duals[i] - potentials[indices[i]]
        for d in range(dim):
            reduced -= points[i, d] * targets[indices[i], d]
        if reduced > _TIGHT:
            indices[i] = -1
        else:
            owner[indices[i]] = i
    distance = np.empty(count)
    previous = np.empty(count, np.int64)
    remaining = np.empty(count, np.int64)
    settled = np.empty(count, np.int64)
    for start in range(count):
        if indices[start] >= 0:
            continue
        for k in range(count):
            distance[k] = np.inf
            remaining[k] = k
        left = count
        done = 0
        reach = 0.0
        i = start
        while True:
            best = np.inf
            at = -1
            for q in range(left):
                k = remaining[q]
                way = reach - duals[i] - potentials[k]
                for d in range(dim):
                    way -= points[i, d] * targets[k, d]
                if way < distance[k]:
                    distance[k] = way
                    previous[k] = i
                if distance[k] < best or (distance[k] == best and owner[k] < 0):
                    best = distance[k]
                    at = q
            j = remaining[at]
            left -= 1
            remaining[at] = remaining[left]
            reach = max(reach, best)
            if owner[j] < 0:
                break
            settled[done] = j
            done += 1
            i = owner[j]
        for q in range(done):
            k = settled[q]
            potentials[k] -= reach - distance[k]
            duals[owner[k]] += reach - distance[k]
        duals[start] += reach
        while True:
            i = previous[j]
            owner[j] = i
            j, indices[i] = indices[i], j
            if i == start:
                break
