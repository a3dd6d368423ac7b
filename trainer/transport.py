"""Balanced optimal transport between two point sets of equal size: who goes where at the least squared distance.

The atlas needs it twice: Gaussian centres to the sphere (once per object) and the projected sphere to the pixel grid
(once per layout). Both are linear assignments under the squared Euclidean cost, which, for fixed sets, is a constant
minus twice the sum of dot products; so moving or uniformly scaling either set changes the cost but not the assignment.

How it is solved, with memory and time close to linear in N:

1. Coarse to fine. Median splits cut both sets into clusters of eight. The cluster centres are assigned in the same way,
   clusters that belong together are assigned inside, and swaps between neighbours straighten the borders.
2. Prices. The potentials of the dual problem are fitted to that assignment: they certify how good it is already.
3. Auction (Bertsekas 1988), only if that is not good enough. Points outbid each other until none would save more than
   epsilon elsewhere; the cost is then certified to lie within N epsilon of the optimum. Epsilon falls in steps.
4. "exact" goes on by shortest augmenting paths (Jonker and Volgenant 1987) until the prices prove the optimum.

Steps 3 and 4 look at a short list of each point's cheapest targets. Beside it stands a limit that no other target
undercuts; prices make targets dearer only, so the limit stays true, and a list is renewed when it no longer suffices.
Cheapest targets are found by branch and bound in a tree whose nodes bound the prices by linear functions, which are
tight because the gradient of the prices over the targets is minus the assigned point (Brenier's map).

Everything here runs on one core: preparing a data set is parallel over objects.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_matrix, diags
from scipy.sparse.linalg import cg
from scipy.spatial import cKDTree

from generator.errors import InputError

from .assignment import augment, bid, free, median_split, price_tree, shortlists, swap

# The relative gap, certified, at which each quality is content; 0 is proven optimal, to rounding. It is relative to the cost
# between the sets brought to one centre and size: that makes the result independent of where an object lies and how
# large it is, and no other place or size has a smaller cost. For objects in their frame the gap is two to four times smaller.
QUALITIES = {"fast": 8e-3, "high": 1e-3, "exact": 0.0}
MAX_POINTS = 2**20  # an atlas of 1,024 x 1,024 cells

_COARSE_GAP = 3e-3  # of the assignments between clusters, whose errors the finer levels cannot undo
_PATHS_GAP = 3e-4  # where augmenting paths take over from the auction
_ROUNDING_GAP = 1e-9  # what an exact assignment of coinciding points is content with
_DIRECT = 256  # so many points are assigned by the dense solver
_CLUSTER = 8  # points per cluster of the level above
_SHORTLIST = 64  # targets in the list of a point: reading it costs far less than searching anew
_SWAP_NEIGHBOURS = 16  # targets around each target that swaps try
_PRICE_NEIGHBOURS = 8  # targets around each target that its price is fitted to
_STEP = 5.0  # epsilon falls by this factor from one auction to the next
_TIGHT = 1e-10  # standardised units; a smaller saving is rounding


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
        quality: "fast", "high" or "exact": which gap ends the work, see `QUALITIES`. Where most points coincide, "exact" means 1e-9.
        seed: of the directions in which the sets are cut: 0 along the given axes, which suits furniture, any other turned.
            The result is a function of the arguments alone.

    Raises:
        InputError: shapes differ, a number is not finite, there are no points or more than `MAX_POINTS`, or the quality
            is unknown.
    """
    points, targets = _validated(points, "points"), _validated(targets, "targets")
    if points.shape != targets.shape:
        raise InputError(f"points {list(points.shape)} and targets {list(targets.shape)} must have the same shape")
    if quality not in QUALITIES:
        raise InputError(f"quality must be one of {', '.join(QUALITIES)}, got {quality!r}")
    offset = points.mean(0) - targets.mean(0)
    points, point_scale = _standardised(points)
    targets, target_scale = _standardised(targets)
    # Mean squared distance = constant + factor * (sum of -p.t), for every assignment and, by duality, for every bound on it.
    constant = offset @ offset + point_scale**2 * (points**2).sum(1).mean() + target_scale**2 * (targets**2).sum(1).mean()
    factor = 2 * point_scale * target_scale / len(points)
    if not points.any() or not targets.any():  # one of the sets is a single place: every assignment costs the same
        return Assignment(np.arange(len(points)), float(constant), float(constant))
    if seed:  # turning both sets alike changes nothing but the directions of the cuts
        rotation = np.linalg.qr(np.random.default_rng(seed).normal(size=(points.shape[1],) * 2))[0]
        points, targets = np.ascontiguousarray(points @ rotation), np.ascontiguousarray(targets @ rotation)
    indices, bound = _solve(points, targets, QUALITIES[quality])
    cost = max(0.0, float(constant + factor * _value(points, targets, indices)))
    return Assignment(indices, cost, float(np.clip(constant + factor * bound, 0.0, cost)))


def _validated(values: np.ndarray, name: str) -> np.ndarray:
    try:
        values = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} must be an array [N, D] of numbers") from error
    if values.ndim != 2 or values.shape[0] < 1 or values.shape[1] < 1:
        raise InputError(f"{name} must be an array [N, D] with at least one row, got {list(values.shape)}")
    if len(values) > MAX_POINTS:
        raise InputError(f"{name}: {len(values):,} are more than the {MAX_POINTS:,} that can be assigned; drop the least visible first")
    if not np.isfinite(values).all():
        raise InputError(f"{name} contain NaN or infinity; drop those rows first")
    return values


def _standardised(values: np.ndarray) -> tuple[np.ndarray, float]:
    """Centred values of unit mean square, and the scale taken out; the assignment does not depend on either."""
    values = values - values.mean(0)
    scale = float(np.sqrt((values**2).sum(1).mean())) or 1.0
    return np.ascontiguousarray(values / scale), scale


def _solve(points: np.ndarray, targets: np.ndarray, wanted: float) -> tuple[np.ndarray, float]:
    """Indices [N] whose certified gap is at most `wanted`, and the bound on the sum of -p.t that certifies it."""
    if len(points) <= _DIRECT:
        indices = linear_sum_assignment(-points @ targets.T)[1]
        return indices, _value(points, targets, indices)
    indices = _coarse_to_fine(points, targets)
    neighbours = _nearest(targets, _SWAP_NEIGHBOURS)
    swap(points, targets, indices, neighbours)
    prices = _fitted_prices(points, targets, indices, neighbours[:, :_PRICE_NEIGHBOURS])
    # Where most points coincide, paths would wander among equals: there the auction alone goes on until only rounding is left.
    paths = not wanted and len(np.unique(points, axis=0)) > len(points) / 2
    aim = wanted or (_PATHS_GAP if paths else _ROUNDING_GAP)
    step = np.inf
    while True:
        owner = np.argsort(indices)
        tree = price_tree(targets, points[owner], prices)
        nearest, limits, least = shortlists(points, targets, prices, indices, tree, _SHORTLIST)
        value, bound = _value(points, targets, indices), float(least.sum() + prices.sum())
        # The sets have unit mean square, so half the sum of squared distances is N plus the sum of -p.t.
        cost = max(len(points) + value, _TIGHT)
        gap = (value - bound) / cost
        if gap <= aim:
            break
        step = max(aim, min(gap / 2, step / _STEP))
        epsilon = step * cost / len(points)
        free(points, targets, prices, indices, owner, nearest, limits, epsilon)
        bid(points, targets, prices, indices, owner, tree, nearest, limits, epsilon)
    if paths:
        free(points, targets, prices, indices, owner, nearest, limits, _TIGHT)
        duals = augment(points, targets, prices, indices, owner, tree, nearest, limits)
        bound = float(duals.sum() + prices.sum())
    return indices, bound


def _value(points: np.ndarray, targets: np.ndarray, indices: np.ndarray) -> float:
    return float(-np.einsum("nd,nd->", points, targets[indices]))


def _coarse_to_fine(points: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Assign clusters of both sets to each other, then their members."""
    count = len(points)
    whole = count - count % _CLUSTER  # a few of the last are left to the swaps and prices
    sources, goals = (median_split(values[:whole], whole // _CLUSTER)[0].reshape(-1, _CLUSTER) for values in (points, targets))
    goals = goals[_solve(points[sources].mean(1), targets[goals].mean(1), _COARSE_GAP)[0]]
    indices = np.arange(count)
    for members, aims, costs in zip(sources, goals, -points[sources] @ targets[goals].transpose(0, 2, 1), strict=True):
        indices[members] = aims[linear_sum_assignment(costs)[1]]
    return indices


def _nearest(values: np.ndarray, count: int) -> np.ndarray:
    """[N, up to count] rows nearest to each row, itself excluded unless rows coincide."""
    return np.ascontiguousarray(cKDTree(values).query(values, k=range(2, min(count + 1, len(values)) + 1))[1])


def _fitted_prices(points: np.ndarray, targets: np.ndarray, indices: np.ndarray, neighbours: np.ndarray) -> np.ndarray:
    """Prices [N] of the targets, nearly optimal where the assignment is.

    Optimality bounds the difference of two prices from both sides: the owner p_j of target j must not prefer target k,
    nor the owner of k target j, so v_k - v_j lies between p_k.(t_j - t_k) and p_j.(t_j - t_k). The prices are the
    least-squares fit to the middle of these bounds over neighbouring targets, which averages out what is not optimal
    yet (relaxing the bounds one by one would spread it).
    """
    count = len(points)
    owners = points[np.argsort(indices)]
    j, k = np.repeat(np.arange(count), neighbours.shape[1]), neighbours.ravel()
    middle = 0.5 * ((owners[j] + owners[k]) * (targets[j] - targets[k])).sum(1)
    edges = coo_matrix((np.ones(len(j)), (j, k)), shape=(count, count))
    links = (edges + edges.T).tocsr()
    degrees = np.asarray(links.sum(1)).ravel()
    flow = np.bincount(k, middle, count) - np.bincount(j, middle, count)
    return cg((diags(degrees) - links).tocsr(), flow, rtol=1e-3, maxiter=500, M=diags(1 / degrees))[0]
