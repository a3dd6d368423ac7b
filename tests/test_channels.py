"""Packing and the canonical rotation."""

from __future__ import annotations

import json

import pytest
import torch

from generator.atlas import Atlas, ChannelSpec, from_atlas, pack
from generator.atlas.channels import _cube_rotations, _multiply, canonical
from generator.errors import InputError
from generator.gaussians import Gaussians, quaternions_to_matrices
from trainer.atlas import compute_layout


def random_gaussians(count: int, seed: int = 0) -> Gaussians:
    generator = torch.Generator().manual_seed(seed)
    return Gaussians(
        means=torch.rand(count, 3, generator=generator) - 0.5,
        quaternions=torch.nn.functional.normalize(torch.randn(count, 4, generator=generator), dim=1),
        scales=torch.exp(torch.rand(count, 3, generator=generator) * 4 - 6),
        opacities=torch.rand(count, generator=generator),
        colors=torch.rand(count, 3, generator=generator),
    )


def relative_covariance_error(a: Gaussians, b: Gaussians) -> float:
    size = a.scales.amax(1).square()[:, None, None]
    return float(((a.covariances() - b.covariances()) / size).abs().max())


@pytest.fixture(scope="module")
def layout():
    return compute_layout(12, "equal_area")


def test_cube_rotations_form_a_group():
    quaternions, orders = _cube_rotations()
    assert quaternions.shape == (24, 4) and quaternions[0].tolist() == [1, 0, 0, 0]
    products = _multiply(quaternions[:, None], quaternions[None]).reshape(-1, 4)
    assert torch.allclose((products @ quaternions.T).abs().amax(1), torch.ones(576, dtype=torch.float64))
    matrices = quaternions_to_matrices(quaternions)
    assert torch.allclose(matrices, matrices.round(), atol=1e-12)
    assert len({tuple(matrix.flatten().tolist()) for matrix in matrices.round()}) == 24
    picked = torch.nn.functional.one_hot(orders, 3).transpose(1, 2).double()
    assert torch.equal(matrices.round().abs(), picked)


def test_canonical_keeps_the_ellipsoid_and_is_idempotent():
    gaussians = random_gaussians(4000).to(torch.float64)
    quaternions, scales = canonical(gaussians.quaternions, gaussians.scales)
    again = gaussians.replace(quaternions=quaternions, scales=scales)
    assert relative_covariance_error(gaussians, again) < 1e-9
    assert torch.allclose(quaternions.norm(dim=1), torch.ones(4000, dtype=torch.float64))
    # The largest angle to the nearest of 24 cube rotations is 62.8 degrees.
    assert quaternions[:, 0].min() >= 0.853
    twice, scales_twice = canonical(quaternions, scales)
    assert torch.allclose(twice, quaternions, atol=1e-9) and torch.equal(scales_twice, scales)


def test_all_equal_descriptions_have_one_canonical_form():
    gaussians = random_gaussians(300, seed=1).to(torch.float64)
    want, want_scales = canonical(gaussians.quaternions, gaussians.scales)
    for rotation, order in zip(*_cube_rotations(), strict=True):
        for sign in (1, -1):
            equal = sign * _multiply(gaussians.quaternions, rotation[None])
            got, got_scales = canonical(equal, gaussians.scales[:, order])
            assert torch.allclose(got, want, atol=1e-9) and torch.allclose(got_scales, want_scales)


def test_discs_do_not_spin_and_balls_do_not_turn():
    count = 200
    generator = torch.Generator().manual_seed(2)
    tilt = torch.nn.functional.normalize(torch.randn(count, 4, generator=generator, dtype=torch.float64), dim=1)
    angle = torch.rand(count, generator=generator, dtype=torch.float64) * 6
    for axis in range(3):
        scales = torch.full((count, 3), 0.1, dtype=torch.float64)
        scales[:, axis] = 0.02
        spin = torch.zeros(count, 4, dtype=torch.float64)
        spin[:, 0], spin[:, 1 + axis] = angle.cos(), angle.sin()
        want, want_scales = canonical(tilt, scales)
        got, got_scales = canonical(_multiply(tilt, spin), scales)
        assert torch.allclose(got, want, atol=1e-9) and torch.equal(got_scales, want_scales)
        disc = Gaussians(torch.zeros(count, 3).double(), tilt, scales, torch.ones(count).double(), torch.zeros(count, 3).double())
        assert relative_covariance_error(disc, disc.replace(quaternions=got, scales=got_scales)) < 1e-9
    balls, _ = canonical(tilt, torch.full((count, 3), 0.1, dtype=torch.float64))
    assert torch.allclose(balls, torch.tensor([1.0, 0, 0, 0], dtype=torch.float64).expand(count, 4))


def test_pack_layout_of_the_channels(layout):
    gaussians = random_gaussians(layout.count)
    atlas = pack(gaussians, layout)
    assert atlas.values.shape == (16, 12, 12) and atlas.values.dtype == torch.float32 and atlas.layout_id == layout.id
    row, column = 3, 7
    cell = row * 12 + column
    values = atlas.values[:, row, column]
    assert torch.equal(values[:3], gaussians.means[cell] - layout.cell_sphere[cell])
    assert torch.equal(values[4:7], gaussians.colors[cell])
    assert torch.equal(values[[3, 7, 11]], gaussians.opacities[cell].expand(3))
    assert torch.allclose(values[8:11].sort().values, gaussians.scales[cell].log().sort().values)
    assert values[12] > 0


def test_round_trip_in_cell_order(layout):
    gaussians = random_gaussians(layout.count)
    back = from_atlas(pack(gaussians, layout), layout)
    assert torch.allclose(back.means, gaussians.means, atol=1e-6)
    assert torch.allclose(back.colors, gaussians.colors) and torch.allclose(back.opacities, gaussians.opacities)
    assert relative_covariance_error(gaussians, back) < 1e-5
    again = pack(back, layout)
    assert torch.allclose(again.values, pack(gaussians, layout).values, atol=1e-5)


def test_opacity_copies_are_averaged(layout):
    atlas = pack(random_gaussians(layout.count), layout)
    values = atlas.values.clone()
    values[3], values[7], values[11] = 0.2, 0.4, 0.9
    assert torch.allclose(from_atlas(Atlas(values, layout.id), layout).opacities, torch.tensor(0.5))


def test_any_values_read_as_valid_gaussians(layout):
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(16, 12, 12, generator=generator) * 100
    values[:, 0, 0], values[:, 0, 1], values[:, 0, 2], values[:, 0, 3] = torch.nan, torch.inf, -torch.inf, 0
    gaussians = from_atlas(Atlas(values, layout.id), layout)
    assert bool(gaussians.finite().all())
    assert gaussians.scales.min() >= 0.999e-5 and gaussians.scales.max() <= 1.001
    for field in (gaussians.opacities, gaussians.colors):
        assert field.min() >= 0 and field.max() <= 1
    assert torch.allclose(gaussians.quaternions.norm(dim=1), torch.ones(layout.count), atol=1e-6)


def test_scales_are_stored_within_their_range(layout):
    gaussians = random_gaussians(layout.count)
    scales = gaussians.scales.clone()
    scales[0], scales[1] = torch.tensor([0.0, 1e-30, 1e-3]), 50.0
    atlas = pack(gaussians.replace(scales=scales), layout, ChannelSpec(min_scale=1e-4, max_scale=0.5))
    logs = atlas.values[8:11]
    assert torch.isfinite(logs).all() and logs.min() >= -9.2104 and logs.max() <= -0.6931


def test_a_foreign_layout_is_refused(layout):
    atlas = pack(random_gaussians(layout.count), layout)
    with pytest.raises(InputError, match="layout"):
        from_atlas(atlas, compute_layout(12, "equirectangular"))
    with pytest.raises(InputError, match="cells"):
        from_atlas(Atlas(torch.zeros(16, 8, 8), layout.id), layout)


def test_bad_input_is_refused(layout):
    gaussians = random_gaussians(layout.count)
    with pytest.raises(InputError, match="144 cells"):
        pack(gaussians[:-1], layout)
    means = gaussians.means.clone()
    means[5, 1] = torch.nan
    with pytest.raises(InputError, match="NaN"):
        pack(gaussians.replace(means=means), layout)
    for bad in (torch.zeros(15, 4, 4), torch.zeros(16, 4, 5), torch.zeros(1, 16, 4, 4), torch.zeros(16, 4, 4, dtype=torch.int32)):
        with pytest.raises(InputError, match="Atlas.values"):
            Atlas(bad, layout.id)


def test_spec_json():
    spec = ChannelSpec(min_scale=1e-4)
    assert ChannelSpec.from_json(spec.to_json()) == spec
    values = json.loads(spec.to_json())
    bad = [
        "{", "[]", "{}", json.dumps(values | {"extra": 1}), json.dumps(values | {"scale": "cube root"}),
        json.dumps(values | {"min_scale": 2.0}), json.dumps(values | {"min_scale": "small"}),
    ]  # fmt: skip
    for text in bad:
        with pytest.raises(InputError, match="channels"):
            ChannelSpec.from_json(text)
