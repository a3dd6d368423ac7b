"""Packing, the transforms of the channels and the two descriptions of an ellipsoid."""

from __future__ import annotations

import json

import pytest
import torch

from generator.atlas import Atlas, ChannelSpec, from_atlas, pack
from generator.atlas.transforms import OPACITIES, SHAPES, _cube_rotations, _multiply, canonical
from generator.errors import InputError
from generator.gaussians import Gaussians, quaternions_to_matrices
from generator.tensors import encode_tensors
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


# The specification of the first models.
FIRST = ChannelSpec(opacity="identity", rotation="canonical")
SPECS = [ChannelSpec(opacity=opacity, rotation=rotation) for opacity in OPACITIES for rotation in SHAPES]


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


def shapes(count: int, seed: int = 0) -> Gaussians:
    """Ellipsoids of every kind, in float64: general, discs, needles, balls, and each of these nearly; some turned to the axes."""
    gaussians = random_gaussians(count, seed).to(torch.float64)
    scales = gaussians.scales.clone()
    for kind in range(1, 7):
        own = slice(kind * count // 8, (kind + 1) * count // 8)
        close = 1e-7 if kind > 3 else 0
        scales[own, 1] = scales[own, 0] * (1 + close)
        if kind % 3 == 0:
            scales[own, 2] = scales[own, 0] * (1 - close)
    scales[: count // 4] = scales[: count // 4].roll(1, 1)
    quaternions = gaussians.quaternions.clone()
    cube, _ = _cube_rotations()
    quaternions[::5] = cube[torch.arange(len(quaternions[::5])) % 24]
    return gaussians.replace(scales=scales, quaternions=quaternions)


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_are_read_as_written(name):
    gaussians = shapes(4000)
    values = SHAPES[name].write(gaussians.quaternions, gaussians.scales)
    assert values.shape == (4000, 7) and values.dtype == torch.float64
    quaternions, logs = SHAPES[name].read(values)
    assert torch.allclose(quaternions.norm(dim=1), torch.ones(4000, dtype=torch.float64))
    back = gaussians.replace(quaternions=quaternions, scales=logs.exp())
    assert relative_covariance_error(gaussians, back) < 1e-5
    assert torch.allclose(logs.sort(1).values, gaussians.scales.log().sort(1).values, atol=1e-5)
    again = SHAPES[name].write(back.quaternions, back.scales)
    general = slice(7 * 500, None)  # where axes are equal up to rounding, the turn of the canonical rotation hangs on it
    assert torch.allclose(again[general], values[general], atol=1e-7)


def test_one_ellipsoid_has_one_log_covariance():
    gaussians = shapes(400, seed=1)
    write = SHAPES["log_covariance"].write
    want = write(gaussians.quaternions, gaussians.scales)
    for rotation, order in zip(*_cube_rotations(), strict=True):
        for sign in (1, -2):
            equal = sign * _multiply(gaussians.quaternions, rotation[None])
            assert torch.allclose(write(equal, gaussians.scales[:, order]), want, atol=1e-12)
    disc = torch.tensor([[0.1, 0.1, 0.02]], dtype=torch.float64).expand(400, 3)
    angle = torch.linspace(0, 3, 400, dtype=torch.float64)
    spin = torch.stack([angle.cos(), 0 * angle, 0 * angle, angle.sin()], dim=1)
    assert torch.allclose(write(_multiply(gaussians.quaternions, spin), disc), write(gaussians.quaternions, disc), atol=1e-12)


def test_log_covariance_is_continuous():
    """A shape that turns and swells steadily never jumps; the nearest of 24 rotations does."""
    steps = 20000
    time = torch.linspace(0, 1, steps, dtype=torch.float64)
    axis = torch.tensor([0.36, 0.48, 0.8], dtype=torch.float64)
    turned = torch.cat([torch.cos(4 * time)[:, None], torch.sin(4 * time)[:, None] * axis], dim=1)
    phases = torch.tensor([0.0, 2.0, 4.0], dtype=torch.float64)
    scales = torch.exp(torch.sin(9 * time[:, None] + phases) - 4)  # every axis is the thinnest for a while
    largest = {name: shape.write(turned, scales).diff(dim=0).abs().max() for name, shape in SHAPES.items()}
    assert largest["log_covariance"] < 20 / steps and largest["canonical"] > 0.3


def test_log_covariance_of_a_disc_has_the_known_values():
    quaternion = torch.tensor([[0.5**0.5, 0.0, 0.5**0.5, 0.0]], dtype=torch.float64)  # z to x
    scales = torch.tensor([[0.1, 0.1, 0.001]], dtype=torch.float64)
    wide, zz, thin, across, *off = SHAPES["log_covariance"].write(quaternion, scales)[0].tolist()
    gap = torch.tensor(100.0).log().item()
    assert wide == pytest.approx(-2.302585) and thin == pytest.approx(-6.907755)
    # gap times (identity / 3 minus the square of the normal x): xx is -2/3, yy and zz are 1/3.
    assert zz == pytest.approx(gap / 3) and across == pytest.approx(-gap / 2) and off == pytest.approx([0, 0, 0])


def test_uncertain_shapes_stay_as_large_and_grow_thicker():
    """Halving the tensor, as the mean of unlike normals does, keeps the volume and leaves the disc half as flat between both."""
    values = SHAPES["log_covariance"].write(torch.tensor([[1.0, 0, 0, 0]]), torch.tensor([[0.1, 0.1, 0.001]])).double()
    values[:, [1, 3, 4, 5, 6]] /= 2
    _, logs = SHAPES["log_covariance"].read(values)
    assert logs.sum().item() == pytest.approx(torch.tensor([0.1, 0.1, 0.001]).log().sum().item())
    gap = torch.tensor(100.0).log().item()
    assert logs[0, 0].item() == pytest.approx(torch.tensor(0.001).log().item() + gap / 3 / 2)


@pytest.mark.parametrize("name", SHAPES)
def test_reading_shapes_has_finite_gradients(name):
    gaussians = shapes(800, seed=3)
    values = SHAPES[name].write(gaussians.quaternions, gaussians.scales)
    values = torch.cat([values, torch.zeros(4, 7, dtype=torch.float64)]).requires_grad_()
    quaternions, logs = SHAPES[name].read(values)
    half = quaternions_to_matrices(quaternions) * logs.exp()[:, None]
    (half @ half.mT).square().sum().backward()
    assert torch.isfinite(values.grad).all() and values.grad[:800].abs().amax(1).min() > 0


def test_gradient_of_the_log_covariance_is_the_derivative():
    gaussians = random_gaussians(6, seed=4).to(torch.float64)
    values = SHAPES["log_covariance"].write(gaussians.quaternions, gaussians.scales).requires_grad_()

    def covariances(values: torch.Tensor) -> torch.Tensor:
        quaternions, logs = SHAPES["log_covariance"].read(values)
        half = quaternions_to_matrices(quaternions) * (logs + 4).exp()[:, None]
        return half @ half.mT

    assert torch.autograd.gradcheck(covariances, values, atol=1e-4)


@pytest.mark.parametrize("name", OPACITIES)
def test_opacities_are_read_as_written(name):
    opacities = torch.linspace(0, 1, 2001, dtype=torch.float64)
    for margin in (1e-3, 0.02):
        values = OPACITIES[name].write(opacities, margin)
        back = OPACITIES[name].read(values, margin)
        kept = opacities if name == "identity" else opacities.clamp(margin, 1 - margin)
        assert torch.isfinite(values).all() and (values.diff() >= 0).all() and torch.allclose(back, kept)
    wild = OPACITIES[name].read(torch.tensor([-1e30, 0.5, 1e30]), 1e-3)
    assert wild.min() >= 0 and wild.max() <= 1


def test_pack_layout_of_the_channels(layout):
    gaussians = random_gaussians(layout.count)
    atlas = pack(gaussians, layout, FIRST)
    assert atlas.values.shape == (16, 12, 12) and atlas.values.dtype == torch.float32 and atlas.layout_id == layout.id
    row, column = 3, 7
    cell = row * 12 + column
    values = atlas.values[:, row, column]
    assert torch.equal(values[:3], gaussians.means[cell] - layout.cell_sphere[cell])
    assert torch.equal(values[4:7], gaussians.colors[cell])
    assert torch.equal(values[[3, 7, 11]], gaussians.opacities[cell].expand(3))
    assert torch.allclose(values[8:11].sort().values, gaussians.scales[cell].log().sort().values)
    assert values[12] > 0


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.opacity}-{spec.rotation}")
def test_round_trip_in_cell_order(layout, spec):
    gaussians = random_gaussians(layout.count)
    atlas = pack(gaussians, layout, spec)
    assert atlas.values.dtype == torch.float32 and atlas.spec == spec
    back = from_atlas(atlas, layout)
    assert torch.allclose(back.means, gaussians.means, atol=1e-6)
    assert torch.allclose(back.colors, gaussians.colors) and torch.allclose(back.opacities, gaussians.opacities, atol=1.001e-3)
    assert relative_covariance_error(gaussians, back) < 1e-5
    again = pack(back, layout, spec)
    assert torch.allclose(again.values, atlas.values, atol=1e-4)


def test_opacity_copies_are_averaged(layout):
    atlas = pack(random_gaussians(layout.count), layout, FIRST)
    values = atlas.values.clone()
    values[3], values[7], values[11] = 0.2, 0.4, 0.9
    assert torch.allclose(from_atlas(Atlas(values, layout.id, FIRST), layout).opacities, torch.tensor(0.5))
    assert torch.allclose(from_atlas(Atlas(values, layout.id), layout).opacities, torch.sigmoid(torch.tensor(0.5)))


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.opacity}-{spec.rotation}")
@pytest.mark.parametrize("size", [1, 100, 1e12, 1e38, 1e-30])
def test_any_values_read_as_valid_gaussians(layout, spec, size):
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(16, 12, 12, generator=generator) * size
    values[:, 0, 0], values[:, 0, 1], values[:, 0, 2], values[:, 0, 3] = torch.nan, torch.inf, -torch.inf, 0
    values[8:, 1] = values[8:, 1, :1]
    values[12:, 2] = 0
    gaussians = from_atlas(Atlas(values, layout.id, spec), layout)
    assert bool(gaussians.finite().all())
    assert gaussians.scales.min() >= 0.999e-5 and gaussians.scales.max() <= 1.001
    for field in (gaussians.opacities, gaussians.colors):
        assert field.min() >= 0 and field.max() <= 1
    assert torch.allclose(gaussians.quaternions.norm(dim=1), torch.ones(layout.count), atol=1e-6)


def test_scales_are_stored_within_their_range(layout):
    gaussians = random_gaussians(layout.count)
    scales = gaussians.scales.clone()
    scales[0], scales[1] = torch.tensor([0.0, 1e-30, 1e-3]), 50.0
    for rotation in SHAPES:
        atlas = pack(gaussians.replace(scales=scales), layout, ChannelSpec(rotation=rotation, min_scale=1e-4, max_scale=0.5))
        assert torch.isfinite(atlas.values).all()
        back = from_atlas(atlas, layout).scales
        assert back.min() >= 0.999e-4 and back.max() <= 0.5001
        assert torch.allclose(back[0].sort().values, torch.tensor([1e-4, 1e-4, 1e-3]), rtol=1e-4)


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
    spec = ChannelSpec(min_scale=1e-4, opacity="identity")
    assert ChannelSpec.from_json(spec.to_json()) == spec
    values = json.loads(spec.to_json())
    bad = [
        "{", "[]", "{}", "[" * 100_000, json.dumps(values | {"extra": 1}), json.dumps(values | {"scale": "cube root"}),
        json.dumps(values | {"min_scale": 2.0}), json.dumps(values | {"min_scale": "small"}), json.dumps(values | {"rotation": ["x"]}),
        json.dumps(values | {"opacity_margin": 0.5}), json.dumps(values | {"opacity_margin": None}),
        json.dumps({key: values[key] for key in values if key != "rotation"}),
    ]  # fmt: skip
    for text in bad:
        with pytest.raises(InputError, match="channels"):
            ChannelSpec.from_json(text)


def test_the_first_specification_is_read_as_ever(layout):
    """Bundles of the first version name every transform but the margin that their opacities do not have."""
    text = """{"position": "offset", "color": "identity", "opacity": "identity", "scale": "log", "rotation": "canonical",
        "min_scale": 1e-05, "max_scale": 1.0}"""
    assert ChannelSpec.from_json(text) == FIRST
    gaussians = random_gaussians(layout.count)
    values = pack(gaussians, layout, FIRST).values
    quaternions, scales = canonical(gaussians.quaternions, gaussians.scales)
    assert torch.equal(values[12:].flatten(1).T, quaternions) and torch.equal(values[8:11].flatten(1).T, scales.log())


def test_channel_names():
    assert FIRST.names[3:5] == ("opacity_0", "color_r") and FIRST.names[11:] == ("opacity_2", *(f"rotation_{axis}" for axis in "wxyz"))
    for spec in SPECS:
        assert len(set(spec.names)) == 16


def test_atlas_files(layout):
    atlas = pack(random_gaussians(layout.count), layout, ChannelSpec(min_scale=1e-4))
    assert atlas.encode() == atlas.encode()
    for dtype in (torch.float32, torch.float16):
        back = Atlas.decode(atlas.encode(dtype))
        assert (back.layout_id, back.spec) == (atlas.layout_id, atlas.spec)
        assert back.values.dtype == torch.float32 and torch.equal(back.values, atlas.values.to(dtype).float())
    old = Atlas.decode(encode_tensors({"values": atlas.values}, {"layout_id": layout.id}))
    assert old.spec == FIRST and old.layout_id == layout.id and torch.equal(old.values, atlas.values)
    values = {"values": atlas.values}
    for payload in (b"", atlas.encode()[:-8], encode_tensors(values, {}), encode_tensors({"a": atlas.values}, {"layout_id": layout.id})):
        with pytest.raises(ValueError, match="."):
            Atlas.decode(payload)
    record = {"layout_id": layout.id, "channels": {"rotation": "spiral"}}
    with pytest.raises(ValueError, match="channels"):
        Atlas.decode(encode_tensors(values, record))
