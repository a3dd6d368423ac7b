"""Transport against exact solvers, its invariances and its certificate."""

from __future__ import annotations

import numpy as np
import ot
import pytest
from scipy.optimize import linear_sum_assignment

from generator.atlas.layout import fibonacci_sphere
from generator.errors import InputError
from trainer.transport import MAX_POINTS, QUALITIES, assign


def sphere(count: int) -> np.ndarray:
    return fibonacci_sphere(count).double().numpy()


def clusters(count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(7, 3))[rng.integers(0, 7, count)] + rng.normal(size=(count, 3)) * 0.05


def table(count: int, seed: int = 0) -> np.ndarray:
    """Surface samples of a flat top on four thin legs: the kind of shape that transport finds hard."""
    rng = np.random.default_rng(seed)
    top = rng.uniform((-0.5, -0.3, 0.2), (0.5, 0.3, 0.22), (count - 4 * (count // 8), 3))
    legs = [
        rng.uniform((x - 0.02, y - 0.02, -0.3), (x + 0.02, y + 0.02, 0.2), (count // 8, 3)) for x in (-0.45, 0.45) for y in (-0.25, 0.25)
    ]
    return np.concatenate([top, *legs])


def two_far_blobs(count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(count, 3)) * 0.01
    points[: count // 2, 0] += 1
    return points


SHAPES = {"clusters": clusters, "table": table, "blobs": two_far_blobs}


def exact_cost(points: np.ndarray, targets: np.ndarray) -> float:
    costs = ((points[:, None] - targets[None]) ** 2).sum(2)
    return float(costs[linear_sum_assignment(costs)].mean())


@pytest.mark.parametrize("shape", SHAPES)
def test_quality_against_the_exact_optimum(shape):
    points, targets = SHAPES[shape](1024), sphere(1024)
    optimum = exact_cost(points, targets)
    for quality, slack in (("fast", 0.005), ("high", 0.002), ("exact", 1e-9)):
        result = assign(points, targets, quality)
        assert np.array_equal(np.sort(result.indices), np.arange(1024))
        assert result.cost == pytest.approx(((points - targets[result.indices]) ** 2).sum(1).mean(), rel=1e-9)
        assert optimum * (1 - 1e-12) <= result.cost <= optimum * (1 + slack)
        assert result.lower_bound <= optimum * (1 + 1e-12)
        assert result.lower_bound >= optimum * (1 - 0.02)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 9, 16, 17, 100, 257, 1000])
@pytest.mark.parametrize("quality", QUALITIES)
def test_any_count(count, quality):
    points, targets = clusters(count), sphere(count)
    result = assign(points, targets, quality)
    assert result.indices.dtype == np.int64
    assert np.array_equal(np.sort(result.indices), np.arange(count))
    optimum = exact_cost(points, targets)
    assert result.lower_bound <= optimum * (1 + 1e-9) and result.cost <= optimum * 1.01
    if quality == "exact":
        assert result.cost == pytest.approx(optimum, rel=1e-9) and result.gap < 1e-7


@pytest.mark.parametrize("count", [8193, 10007])
def test_counts_that_clusters_do_not_divide(count):
    result = assign(table(count), sphere(count))
    assert np.array_equal(np.sort(result.indices), np.arange(count))
    assert result.gap < 0.01


@pytest.mark.parametrize("quality", QUALITIES)
def test_moving_and_scaling_change_nothing(quality):
    points, targets = table(600), sphere(600)
    plain = assign(points, targets, quality)
    for moved in (points + [3.0, -2.0, 0.5], points * 7.5, points * 1e-3 + 0.25):
        result = assign(moved, targets, quality)
        reached = assign(points, targets, quality).cost if result is None else ((points - targets[result.indices]) ** 2).sum(1).mean()
        assert reached == pytest.approx(plain.cost, rel=1e-3 if quality != "exact" else 1e-9)
    assert np.mean(assign(points * 2 + 1, targets, quality).indices == plain.indices) > 0.99


def test_same_arguments_same_result():
    points, targets = clusters(2000), sphere(2000)
    first, second, other = assign(points, targets, seed=5), assign(points, targets, seed=5), assign(points, targets, seed=6)
    assert np.array_equal(first.indices, second.indices) and first.cost == second.cost and first.lower_bound == second.lower_bound
    assert other.cost == pytest.approx(first.cost, rel=0.005)


def test_input_is_left_alone():
    points, targets = clusters(300), sphere(300)
    before = points.copy(), targets.copy()
    assign(points, targets, "exact")
    assert np.array_equal(points, before[0]) and np.array_equal(targets, before[1])


def test_known_answer():
    targets = sphere(500)
    shuffle = np.random.default_rng(0).permutation(500)
    for quality in QUALITIES:
        result = assign(targets[shuffle] * 0.4 + 1, targets, quality)
        assert np.array_equal(result.indices, shuffle)


@pytest.mark.parametrize("quality", QUALITIES)
def test_coinciding_and_planar_points(quality):
    targets = sphere(256)
    result = assign(np.zeros((256, 3)), targets, quality)
    assert np.array_equal(np.sort(result.indices), np.arange(256)) and result.cost == pytest.approx(1, abs=1e-6)
    points = np.repeat(clusters(64), 4, axis=0)
    points[:, 2] = 0
    result = assign(points, targets, quality)
    assert np.array_equal(np.sort(result.indices), np.arange(256))
    assert result.cost <= exact_cost(points, targets) * 1.005


def test_plane():
    rng = np.random.default_rng(1)
    points, targets = rng.random((400, 2)), rng.random((400, 2))
    assert assign(points, targets, "exact").cost == pytest.approx(exact_cost(points, targets), rel=1e-9)


def test_bad_input():
    good = sphere(10)
    broken = good.copy()
    broken[3, 1] = np.nan
    cases = [
        ((broken, good), "points contain NaN"),
        ((good, np.full((10, 3), np.inf)), "targets contain NaN"),
        ((good[:9], good), "same shape"),
        ((good[:, :2], good), "same shape"),
        ((good[:0], good[:0]), "at least one row"),
        ((good[0], good[0]), r"\[N, D\]"),
        (([["a", "b", "c"]], good), "numbers"),
    ]
    for arguments, message in cases:
        with pytest.raises(InputError, match=message):
            assign(*arguments)
    with pytest.raises(InputError, match="fast, high, exact"):
        assign(good, good, "best")


def test_exact_agrees_with_pots_network_simplex():
    points, targets = table(600), sphere(600)
    plan = ot.emd([], [], ot.dist(points, targets))
    theirs = ((points - targets[plan.argmax(1)]) ** 2).sum(1).mean()
    assert assign(points, targets, "exact").cost == pytest.approx(theirs, rel=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("quality", QUALITIES)
def test_every_quality_keeps_what_it_promises(shape, quality):
    points, targets = SHAPES[shape](3000), sphere(3000)
    optimum = assign(points, targets, "exact")
    result = assign(points, targets, quality)
    assert 0 <= result.gap <= max(QUALITIES[quality], 1e-12)
    assert result.lower_bound <= optimum.cost * (1 + 1e-12) <= result.cost * (1 + 2e-12)
    assert optimum.gap < 1e-12


def test_fast_and_high_at_the_size_of_an_atlas():
    """128 x 128, the paper's size: what the certificate leaves open, and how far from the proven optimum it is."""
    points, targets = table(16384), sphere(16384)
    optimum = assign(points, targets, "exact")
    assert optimum.gap < 1e-12
    for quality, slack in (("fast", 0.002), ("high", 0.0005)):
        result = assign(points, targets, quality)
        assert np.array_equal(np.sort(result.indices), np.arange(16384))
        assert optimum.cost * (1 - 1e-12) <= result.cost <= optimum.cost * (1 + slack)
        assert result.gap < slack


@pytest.mark.parametrize("quality", QUALITIES)
def test_the_order_of_the_input_does_not_matter(quality):
    points, targets = table(2000), sphere(2000)
    shuffle = np.random.default_rng(3).permutation(2000)
    plain, shuffled = assign(points, targets, quality), assign(points[shuffle], targets, quality)
    if quality == "exact":
        assert np.array_equal(shuffled.indices, plain.indices[shuffle])
    assert shuffled.cost == pytest.approx(plain.cost, rel=2 * QUALITIES[quality] + 1e-12)


def test_bounds_hold_against_a_dense_dual():
    """The certificate against the best one that its own prices allow, computed from the full matrix of costs."""
    points, targets = clusters(700), sphere(700)
    result = assign(points, targets, "high")
    costs = ((points[:, None] - targets[None]) ** 2).sum(2)
    rows, columns = linear_sum_assignment(costs)
    assert result.lower_bound <= costs[rows, columns].mean() * (1 + 1e-12)
    assert costs[np.arange(700), result.indices].mean() == pytest.approx(result.cost, rel=1e-12)


@pytest.mark.parametrize("places", [1, 2, 8])
def test_few_places_many_points(places):
    """Whole groups of targets cost the same; searches and chains of ties must end."""
    points = np.random.default_rng(0).normal(size=(places, 3))[np.arange(2048) % places]
    for quality in QUALITIES:
        result = assign(points, sphere(2048), quality)
        assert np.array_equal(np.sort(result.indices), np.arange(2048))
        assert result.gap <= QUALITIES[quality] + 1e-9


def test_points_on_a_line():
    points = np.zeros((2500, 3))
    points[:, 0] = np.random.default_rng(0).random(2500)
    result = assign(points, sphere(2500), "exact")
    assert np.array_equal(np.sort(result.indices), np.arange(2500)) and result.gap < 1e-9


def test_more_points_than_can_be_assigned():
    many = np.zeros((MAX_POINTS + 1, 3), np.float32)
    with pytest.raises(InputError, match="1,048,577 are more than the 1,048,576"):
        assign(many, many)
