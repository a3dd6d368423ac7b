"""Objects to atlases and back: the same Gaussians, near in space where near on the image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree

from generator.atlas import PROJECTIONS, AtlasLayout, from_atlas
from generator.errors import InputError
from generator.gaussians import Gaussians
from trainer.atlas import order_by_cell, resize, to_atlas, visibility
from trainer.transport import assign


def chair(count: int, seed: int = 0) -> Gaussians:
    """Gaussians on the surface of a seat, a back and four legs."""
    rng = np.random.default_rng(seed)
    boxes = [((-0.25, -0.25, 0.0), (0.25, 0.25, 0.05)), ((-0.25, 0.2, 0.05), (0.25, 0.25, 0.5))]
    boxes += [((x, y, -0.5), (x + 0.04, y + 0.04, 0.0)) for x in (-0.25, 0.21) for y in (-0.25, 0.21)]
    points = []
    for number, (low, high) in enumerate(boxes):
        share = count // len(boxes) + (number < count % len(boxes))
        inside = rng.uniform(low, high, (share, 3))
        side, face = rng.integers(0, 2, share), rng.integers(0, 3, share)
        inside[np.arange(share), face] = np.where(side, np.array(high)[face], np.array(low)[face])
        points.append(inside)
    means = torch.from_numpy(np.concatenate(points)).float()
    generator = torch.Generator().manual_seed(seed)
    return Gaussians(
        means=means[torch.randperm(count, generator=generator)],
        quaternions=torch.nn.functional.normalize(torch.randn(count, 4, generator=generator), dim=1),
        scales=torch.exp(torch.rand(count, 3, generator=generator) * 2 - 6),
        opacities=torch.rand(count, generator=generator) * 0.9 + 0.1,
        colors=torch.rand(count, 3, generator=generator),
    )


def neighbour_steps(means: torch.Tensor, size: int) -> float:
    """Mean distance in space between cells that touch on the image."""
    image = means.reshape(size, size, 3)
    across, down = image[:, 1:] - image[:, :-1], image[1:] - image[:-1]
    return float(torch.cat([across.norm(dim=2).flatten(), down.norm(dim=2).flatten()]).mean())


def locality(means: torch.Tensor, size: int, seed: int = 0) -> float:
    """How much of a shuffled atlas' step between neighbouring cells is saved: 0 for noise, towards 1 for a smooth image."""
    shuffled = means[torch.randperm(len(means), generator=torch.Generator().manual_seed(seed))]
    return 1 - neighbour_steps(means, size) / neighbour_steps(shuffled, size)


def nearest_neighbour_share(means: torch.Tensor, size: int, nearest: int = 8) -> float:
    """Share of touching cells (the right and the lower one) that are among each other's 8 nearest in space."""
    near = cKDTree(means.numpy()).query(means.numpy(), k=nearest + 1)[1][:, 1:]
    cells = np.arange(size * size).reshape(size, size)
    across, down = np.stack([cells[:, :-1], cells[:, 1:]], -1), np.stack([cells[:-1], cells[1:]], -1)
    pairs = np.concatenate([across.reshape(-1, 2), down.reshape(-1, 2)])
    return float((near[pairs[:, 0]] == pairs[:, 1:]).any(1).mean())


def matched(gaussians: Gaussians, others: Gaussians) -> Gaussians:
    """`others` in the order of `gaussians`, by nearest centre; fails unless it is one to one."""
    order = cKDTree(others.means.numpy()).query(gaussians.means.numpy())[1]
    assert np.array_equal(np.sort(order), np.arange(len(gaussians)))
    return others[torch.from_numpy(order)]


@pytest.mark.parametrize(("size", "projection"), [(32, "equirectangular"), (32, "equal_area"), (64, "equirectangular")])
def test_round_trip_returns_the_same_gaussians(size, projection):
    layout = AtlasLayout.load_default(size, projection)
    gaussians = chair(layout.count)
    atlas = to_atlas(gaussians, layout)
    assert atlas.layout_id == layout.id and torch.isfinite(atlas.values).all() and atlas.values.dtype == torch.float32
    back = matched(gaussians, from_atlas(atlas, layout))
    assert torch.allclose(back.means, gaussians.means, atol=1e-6)
    assert torch.allclose(back.colors, gaussians.colors, atol=1e-6)
    margin = atlas.spec.opacity_margin
    assert torch.allclose(back.opacities, gaussians.opacities.clamp(margin, 1 - margin), atol=1e-5)
    relative = (back.covariances() - gaussians.covariances()) / gaussians.scales.amax(1).square()[:, None, None]
    assert relative.abs().max() < 1e-5


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_neighbouring_cells_are_near_in_space_and_only_the_right_composition_makes_them_so(projection):
    """Sphere and plane indices can be composed in several ways that all read back perfectly; only one is smooth."""
    layout = AtlasLayout.load_default(32, projection)
    gaussians = chair(layout.count)
    sphere_points = torch.from_numpy(assign(gaussians.means.numpy(), layout.sphere.numpy()).indices)
    atlas = to_atlas(gaussians, layout)
    means = from_atlas(atlas, layout).means
    assert torch.allclose(gaussians.means[order_by_cell(sphere_points, layout)], means, atol=1e-6)
    assert locality(means, 32) > 0.6
    assert nearest_neighbour_share(means, 32) > 0.2

    inverse = torch.argsort(sphere_points)
    wrong = {
        "the order of the sphere": inverse,
        "the order of the input": torch.arange(layout.count),
        "no inverse": layout.cell_of_point[sphere_points],
        "plane inverted": torch.argsort(layout.point_of_cell[sphere_points]),
        "sphere inverted": torch.argsort(layout.cell_of_point[inverse]),
        "both inverted": torch.argsort(layout.point_of_cell[inverse]),
        "plane first": torch.argsort(sphere_points[layout.cell_of_point]),
        "plane first, inverted": torch.argsort(sphere_points[layout.point_of_cell]),
    }
    for name, order in wrong.items():
        assert torch.equal(order.sort().values, torch.arange(layout.count)), name
        assert locality(gaussians.means[order], 32) < 0.45, name
        assert nearest_neighbour_share(gaussians.means[order], 32) < 0.15, name


def test_the_atlas_has_one_orientation():
    """The object's top lies on the upper rows, its front (-Y) in the middle columns, +X to the right."""
    layout = AtlasLayout.load_default(32)
    image = from_atlas(to_atlas(chair(layout.count), layout), layout).means.reshape(32, 32, 3)
    assert image[:8, :, 2].mean() > image[-8:, :, 2].mean() + 0.3
    middle = image[12:20]
    assert middle[:, 12:20, 1].mean() < middle[:, [0, 1, 2, 3, -4, -3, -2, -1], 1].mean() - 0.1
    assert middle[:, 20:28, 0].mean() > middle[:, 4:12, 0].mean() + 0.1


def test_similar_objects_have_similar_atlases():
    """Two samples of one shape agree cell by cell far better than an atlas agrees with its shuffled self."""
    layout = AtlasLayout.load_default(32)
    first, second = (from_atlas(to_atlas(chair(layout.count, seed), layout), layout).means for seed in (1, 2))
    apart = (first - second).norm(dim=1).mean()
    shuffled = (first - first[torch.randperm(layout.count, generator=torch.Generator().manual_seed(0))]).norm(dim=1).mean()
    assert apart < 0.2 * shuffled


def test_moving_and_scaling_keep_the_cells():
    layout = AtlasLayout.load_default(32)
    gaussians = chair(layout.count)
    plain = from_atlas(to_atlas(gaussians, layout, quality="exact"), layout)
    moved = gaussians.replace(means=gaussians.means * 0.5 + 0.1, scales=gaussians.scales * 0.5)
    again = from_atlas(to_atlas(moved, layout, quality="exact"), layout)
    assert ((again.means - 0.1) / 0.5 - plain.means).norm(dim=1).lt(1e-4).float().mean() > 0.99


def test_seed_decides():
    layout = AtlasLayout.load_default(32)
    gaussians = chair(layout.count)
    assert torch.equal(to_atlas(gaussians, layout, seed=3).values, to_atlas(gaussians, layout, seed=3).values)


def test_too_many_lose_the_least_visible():
    gaussians = chair(1500)
    kept = resize(gaussians, 1024)
    seen = visibility(gaussians).sort(descending=True).values
    assert len(kept) == 1024
    assert torch.allclose(visibility(kept).sort(descending=True).values, seen[:1024])


@pytest.mark.parametrize("count", [1, 7, 600, 1023])
def test_too_few_are_split(count):
    gaussians = chair(count)
    grown = resize(gaussians, 1024)
    assert len(grown) == 1024 and bool(grown.finite().all())
    assert grown.opacities.min() > 0 and grown.opacities.max() <= 1
    reach = 3 * gaussians.scales.max()
    assert (grown.means.amax(0) <= gaussians.means.amax(0) + reach).all() and (grown.means.amin(0) >= gaussians.means.amin(0) - reach).all()
    # The largest is no longer as visible as it was.
    assert visibility(grown).max() < visibility(gaussians).max()


@pytest.mark.parametrize("opacity", [0.05, 0.5, 0.9, 1.0])
def test_a_split_gaussian_looks_the_same(opacity):
    """Blended transmittance along the long axis, seen from the side, against the one Gaussian."""
    whole = Gaussians(
        means=torch.zeros(1, 3),
        quaternions=torch.tensor([[0.5**0.5, 0, 0, 0.5**0.5]]),  # a quarter turn about Z: the Gaussian's x axis is the world's y
        scales=torch.tensor([[0.1, 0.02, 0.01]]),
        opacities=torch.tensor([opacity]),
        colors=torch.ones(1, 3),
    )
    halves = resize(whole, 2)
    assert halves.means[:, 1].abs().min() > 0.03 and halves.means[:, [0, 2]].abs().max() < 1e-6
    axis = torch.linspace(-0.4, 0.4, 801)

    def alpha(gaussians):
        deviation = gaussians.covariances()[:, 1, 1].sqrt()
        each = gaussians.opacities[:, None] * torch.exp(-0.5 * ((axis - gaussians.means[:, 1:2]) / deviation[:, None]) ** 2)
        return 1 - (1 - each).prod(0)

    want, got = alpha(whole), alpha(halves)
    assert (got - want).norm() / want.norm() < 0.1
    assert got.sum() == pytest.approx(want.sum().item(), rel=0.05)


def test_fewer_gaussians_than_cells_fill_the_atlas():
    layout = AtlasLayout.load_default(32)
    back = from_atlas(to_atlas(chair(700), layout), layout)
    assert len(back) == 1024 and back.opacities.min() > 0


def test_bad_input():
    layout = AtlasLayout.load_default(32)
    gaussians = chair(100)
    colors = gaussians.colors.clone()
    colors[3] = torch.nan
    with pytest.raises(InputError, match="1 Gaussians contain NaN"):
        to_atlas(gaussians.replace(colors=colors), layout)
    with pytest.raises(InputError, match="no Gaussians"):
        to_atlas(gaussians[:0], layout)
    with pytest.raises(InputError, match="count"):
        resize(gaussians, 0)
