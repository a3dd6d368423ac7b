"""Statistics against direct formulas, merging, files, and the bound on what a network may return."""

from __future__ import annotations

import pytest
import torch

from generator.atlas import Normalization, NormalizationAccumulator
from generator.errors import InputError
from generator.tensors import load_tensors, save_tensors

LAYOUT = "0123456789abcdef"


@pytest.fixture(scope="module")
def atlases():
    generator = torch.Generator().manual_seed(0)
    spread = torch.rand(16, 6, 6, generator=generator) + 0.5
    # A large mean beside a small spread is what a sum of squares would lose in float32.
    return 100 + torch.randn(40, 16, 6, 6, generator=generator) * spread


def accumulated(batches) -> NormalizationAccumulator:
    accumulator = NormalizationAccumulator(LAYOUT)
    for batch in batches:
        accumulator.update(batch)
    return accumulator


def test_cells_match_the_direct_formula(atlases):
    result = accumulated(atlases).result("cell")
    assert torch.allclose(result.mean, atlases.double().mean(0).float(), atol=1e-5)
    assert torch.allclose(result.std, atlases.double().std(0, correction=0).float(), atol=1e-5)
    assert torch.equal(result.minimum, atlases.amin((0, 2, 3))) and torch.equal(result.maximum, atlases.amax((0, 2, 3)))
    normalized = result.normalize(atlases)
    assert normalized.mean(0).abs().max() < 1e-4 and (normalized.std(0, correction=0) - 1).abs().max() < 1e-3


def test_channels_match_the_direct_formula(atlases):
    result = accumulated(atlases).result("channel")
    assert result.mean.shape == (16, 1, 1)
    assert torch.allclose(result.mean.flatten(), atlases.double().mean((0, 2, 3)).float(), atol=1e-5)
    assert torch.allclose(result.std.flatten(), atlases.double().transpose(0, 1).flatten(1).std(1, correction=0).float(), atol=1e-5)


@pytest.mark.parametrize("kind", ["cell", "channel"])
def test_any_grouping_gives_the_same(atlases, kind):
    one = accumulated([atlases]).result(kind)
    left, right = accumulated(atlases[:13]), accumulated([atlases[13:20], atlases[20:]])
    empty = NormalizationAccumulator(LAYOUT)
    empty.merge(left)
    empty.merge(NormalizationAccumulator(LAYOUT))
    empty.merge(right)
    merged = empty.result(kind)
    for name in ("mean", "std", "minimum", "maximum"):
        assert torch.allclose(getattr(one, name), getattr(merged, name), atol=1e-6)


def test_merging_leaves_the_other_alone(atlases):
    left, right = accumulated(atlases[:10]), accumulated(atlases[10:])
    before = right.result()
    left.merge(right)
    left.update(atlases[0])
    after = right.result()
    assert right.count == 30 and torch.equal(before.mean, after.mean) and torch.equal(before.std, after.std)


@pytest.mark.parametrize("kind", ["cell", "channel"])
def test_denormalize_inverts_normalize(atlases, kind):
    result = accumulated(atlases).result(kind)
    assert torch.allclose(result.denormalize(result.normalize(atlases)), atlases, atol=1e-3)
    assert torch.allclose(result.denormalize(result.normalize(atlases[0])), atlases[0], atol=1e-3)


def test_dead_channels_do_not_explode(atlases):
    values = atlases.clone()
    values[:, 3] = 1.0
    values[:, 5, 2, 2] = 0.25
    for kind in ("cell", "channel"):
        result = accumulated(values).result(kind, floor=1e-3)
        normalized = result.normalize(values)
        assert torch.isfinite(normalized).all() and normalized[:, 3].abs().max() < 1e-3
    cells = accumulated(values).result("cell", relative_floor=0.1)
    channel = accumulated(values).result("channel").std
    assert cells.std[5, 2, 2] == pytest.approx(0.1 * channel[5].item(), rel=1e-5)
    single = accumulated(atlases[:1]).result("cell")
    assert (single.std > 0).all()


def test_outliers_are_clamped(atlases):
    result = accumulated(atlases).result()
    wild = result.denormalize(torch.full((2, 16, 6, 6), 50.0))
    assert torch.equal(wild, result.maximum[None, :, None, None].expand(2, 16, 6, 6))
    assert torch.equal(result.denormalize(-wild), result.minimum[None, :, None, None].expand(2, 16, 6, 6))


def test_file_round_trip(atlases, tmp_path):
    for kind in ("cell", "channel"):
        result = accumulated(atlases).result(kind)
        result.save(tmp_path / "normalization.safetensors")
        loaded = Normalization.load(tmp_path / "normalization.safetensors")
        assert loaded.kind == kind and loaded.layout_id == LAYOUT
        for name in ("mean", "std", "minimum", "maximum"):
            assert torch.equal(getattr(loaded, name), getattr(result, name))
        before = (tmp_path / "normalization.safetensors").read_bytes()
        loaded.save(tmp_path / "normalization.safetensors")
        assert (tmp_path / "normalization.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["normalization.safetensors"]


@pytest.mark.parametrize("damage", ["truncated", "kind", "format", "missing", "zero std", "nan", "shape", "order"])
def test_damaged_files_do_not_load(atlases, tmp_path, damage):
    path = tmp_path / "normalization.safetensors"
    accumulated(atlases).result().save(path)
    tensors, record = load_tensors(path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        if damage in record:
            record[damage] = "other"
        elif damage == "missing":
            del tensors["maximum"]
        elif damage == "zero std":
            tensors["std"][0, 0, 0] = 0
        elif damage == "nan":
            tensors["mean"][0, 0, 0] = torch.nan
        elif damage == "shape":
            tensors["mean"] = tensors["mean"][:, :3]
        elif damage == "order":
            tensors["minimum"], tensors["maximum"] = tensors["maximum"], tensors["minimum"]
        save_tensors(path, tensors, record)
    with pytest.raises(InputError, match="normalization.safetensors"):
        Normalization.load(path)


def test_bad_input(atlases):
    accumulator = NormalizationAccumulator(LAYOUT)
    with pytest.raises(InputError, match="no atlases"):
        accumulator.result()
    accumulator.update(atlases[0])
    with pytest.raises(InputError, match="kind"):
        accumulator.result("pixel")
    broken = atlases[0].clone()
    broken[0, 0, 0] = torch.inf
    for bad, message in ((broken, "NaN"), (atlases[0, :8], "16"), (torch.zeros(16, 5, 5), "before"), (atlases[:0], "16")):
        with pytest.raises(InputError, match=message):
            accumulator.update(bad)
    with pytest.raises(InputError, match="layout"):
        accumulator.merge(NormalizationAccumulator("fedcba9876543210"))
    assert accumulator.count == 1
