"""Objects to atlases and back: the same Gaussians, near in space where near on the image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree

from generator.atlas import PROJECTIONS, AtlasLayout, from_atlas
from generator.errors import InputError
from generator.gaussians import Gaussians
from generator.render import Cameras, render
from generator.render.ewa import ALPHA_CUT, ALPHA_MAX
from trainer.atlas import filling_order, order_by_cell, resize, to_atlas, visibility
from trainer.fit import psnr
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


def moments(gaussians: Gaussians) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What is seen of the whole object: its amount, centre, spread and colour."""
    gaussians = gaussians.to(torch.float64)
    weights = visibility(gaussians)
    share = weights / weights.sum()
    centre = share @ gaussians.means
    apart = gaussians.means - centre
    spread = (share[:, None, None] * (gaussians.covariances() + apart[:, :, None] * apart[:, None, :])).sum(0)
    return weights.sum(), centre, spread, share @ gaussians.colors


def sheet(side: int) -> Gaussians:
    """side^2 discs on a chequered square that faces the front, as wide as their distance, nearly opaque."""
    steps = (torch.arange(side) + 0.5) / side - 0.5
    z, x = (grid.flatten() for grid in torch.meshgrid(steps, steps, indexing="ij"))
    count = side**2
    dark = ((4 * x).floor() + (4 * z).floor()) % 2
    return Gaussians(
        means=torch.stack([x, torch.zeros(count), z], dim=1),
        quaternions=torch.tensor([[0.5**0.5, 0.5**0.5, 0.0, 0.0]]).repeat(count, 1),
        scales=torch.tensor([[0.6, 0.6, 0.1]]).repeat(count, 1) / side,
        opacities=torch.full((count,), 0.9),
        colors=torch.stack([0.2 + 0.6 * dark, 0.3 + 0 * dark, 0.8 - 0.5 * dark], dim=1),
    )


def psnr_between(gaussians: Gaussians, reference: Gaussians) -> float:
    """dB between the pictures of both from two sides, on white."""
    cameras = Cameras.orbit(2, 96, elevation=10, start=-30)
    return psnr((render(gaussians, cameras).rgb - render(reference, cameras).rgb).square().mean())


@pytest.mark.parametrize("count", [1499, 1024, 750, 749, 100, 1])
def test_merging_keeps_the_moments_of_what_is_seen(count):
    gaussians = chair(1500)
    gaussians = gaussians.replace(opacities=gaussians.opacities * 1e-3)  # so low that no merged opacity ends at 1
    merged = resize(gaussians, count)
    assert len(merged) == count and merged.means.dtype == torch.float32
    assert torch.allclose(merged.quaternions.norm(dim=1), torch.ones(count), atol=1e-5)
    for before, after in zip(moments(gaussians), moments(merged), strict=True):
        assert torch.allclose(after, before, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("count", [200, 150, 101, 100])
def test_the_nearest_are_merged_and_the_others_left_alone(count):
    """A hundred pairs, each wider apart than the one before."""
    gaussians, generator = chair(200), torch.Generator().manual_seed(1)
    centres = torch.rand(100, 3, generator=generator).repeat_interleave(2, 0)
    step = torch.arange(1, 101).repeat_interleave(2)[:, None] * torch.tensor([1e-6, -1e-6]).repeat(100)[:, None]
    gaussians = gaussians.replace(means=centres + step)
    merged = resize(gaussians, count)
    assert len(merged) == count
    kept = {tuple(row) for row in merged.means.tolist()}
    alone = [tuple(row) in kept for row in gaussians.means.tolist()]
    assert alone == [False] * 2 * (200 - count) + [True] * 2 * (count - 100)


def test_merging_beats_dropping_the_least_visible():
    gaussians = sheet(48)
    merged = resize(gaussians, 48 * 24)
    dropped = gaussians[visibility(gaussians).argsort(descending=True)[: 48 * 24]]
    assert psnr_between(merged, gaussians) > 26 > psnr_between(dropped, gaussians) + 6


def test_merging_equal_gaussians_changes_nothing_but_their_opacity():
    one = chair(1)
    merged = resize(one[torch.zeros(7, dtype=torch.int64)], 1)
    assert torch.allclose(merged.means, one.means) and torch.allclose(merged.colors, one.colors)
    assert torch.allclose(merged.covariances(), one.covariances(), rtol=1e-4, atol=1e-9)
    assert merged.opacities.item() == pytest.approx(min(ALPHA_MAX, 7 * one.opacities.item()))


def test_merged_gaussians_are_valid_where_nothing_is_seen_or_has_extent():
    gaussians = chair(300)
    for nothing in (gaussians.replace(opacities=torch.zeros(300)), gaussians.replace(scales=torch.zeros(300, 3))):
        merged = resize(nothing, 100)
        assert len(merged) == 100 and bool(merged.finite().all())
        assert merged.opacities.min() >= 0 and merged.opacities.max() <= 1


@pytest.mark.parametrize("size", [1, 2, 8, 64])
def test_filling_order_spreads_any_number_evenly(size):
    order = filling_order(size)
    assert torch.equal(order.sort().values, torch.arange(size**2))
    block = min(size, 4)
    for count in range(0, size**2 + 1, max(1, size**2 // 37)):
        filled = torch.zeros(size**2).index_fill(0, order[:count], 1)
        held = filled.reshape(size // block, block, size // block, block).sum((1, 3))
        assert held.max() - held.min() <= 1


def test_filling_order_of_other_sizes_is_an_order():
    assert torch.equal(filling_order(5).sort().values, torch.arange(25))


@pytest.mark.parametrize("count", [1, 2, 3, 600, 1023, 1024])
def test_fewer_gaussians_than_cells_come_back_unchanged(count):
    """Beside them are transparent ones in the cells that are filled last, like what is next to them."""
    layout = AtlasLayout.load_default(32)
    gaussians = chair(count)
    atlas = to_atlas(gaussians, layout)
    back = from_atlas(atlas, layout)
    seen = back.opacities >= ALPHA_CUT
    assert torch.equal(seen.nonzero().squeeze(1), filling_order(32)[:count].sort().values)
    same = matched(gaussians, back[seen])
    assert torch.allclose(same.means, gaussians.means, atol=1e-6) and torch.allclose(same.colors, gaussians.colors, atol=1e-6)
    assert torch.allclose(same.opacities, gaussians.opacities, atol=2e-3)
    apart, like = cKDTree(gaussians.means.numpy()).query(back.means[~seen].numpy())
    assert (apart < 1e-6).all() and torch.allclose(back.colors[~seen], gaussians.colors[torch.from_numpy(like)], atol=1e-6)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75, 0.95])
def test_the_round_trip_of_fewer_gaussians_loses_nothing(share):
    layout = AtlasLayout.load_default(32)
    gaussians = sheet(round(32 * share**0.5))
    assert len(gaussians) < 1024
    assert psnr_between(from_atlas(to_atlas(gaussians, layout), layout), gaussians) > 55


def test_fewer_gaussians_than_cells_are_as_smooth():
    layout = AtlasLayout.load_default(32)
    means = from_atlas(to_atlas(chair(700), layout), layout).means
    assert locality(means, 32) > 0.6


@pytest.mark.parametrize("count", [1, 2, 3, 1000, 1024, 5000])
def test_gaussians_at_one_point_make_an_atlas(count):
    layout = AtlasLayout.load_default(32)
    gaussians = chair(count)
    back = from_atlas(to_atlas(gaussians.replace(means=torch.full((count, 3), 0.1)), layout), layout)
    assert len(back) == 1024 and bool(back.finite().all())
    assert (back.means - 0.1).abs().max() < 1e-6


def test_a_million_gaussians_make_an_atlas():
    layout = AtlasLayout.load_default(32)
    gaussians = chair(1_000_000)
    back = from_atlas(to_atlas(gaussians, layout), layout)
    assert len(back) == 1024 and bool(back.finite().all())
    assert (back.means.amax(0) - gaussians.means.amax(0)).abs().max() < 0.05
    assert locality(back.means, 32) > 0.6


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
