"""Statistics against direct formulas, merging, files, normal scores, and the bound on what a network may return."""

from __future__ import annotations

import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from generator.atlas import ChannelSpec, Normalization, NormalizationAccumulator, NormalScores, NormalScoresAccumulator
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


SPEC = ChannelSpec(opacity="identity")


@pytest.fixture(scope="module")
def skewed() -> torch.Tensor:
    """[30, 16, 12, 12] in the ranges of the channels, and far from normal: atoms, tails, gaps, strays and constants."""
    generator = torch.Generator().manual_seed(5)
    uniform = torch.rand(30, 16, 12, 12, generator=generator)
    low, high = torch.tensor(SPEC.ranges).T[..., None, None]
    values = low + (high - low) * uniform**2
    values[:, 3] = torch.where(uniform[:, 3] < 0.6, 1.0, uniform[:, 3] ** 0.2)  # opaque is most common
    values[:, 4] = torch.where(uniform[:, 4] < 0.3, 0.0, torch.where(uniform[:, 4] < 0.8, 0.5, uniform[:, 4]))  # few colours
    values[:, 5] = torch.where(uniform[:, 5] < 0.5, 0.01 * uniform[:, 5], 1 - 0.01 * uniform[:, 5])  # two apart
    values[:, 6] = 0.25
    values[:, 0, 0, 0] = 70.0  # beyond the known range
    return values


def scored(batches, spec: ChannelSpec = SPEC) -> NormalScoresAccumulator:
    accumulator = NormalScoresAccumulator(spec)
    for batch in batches:
        accumulator.update(batch)
    return accumulator


def assert_same_curves(a: NormalScores, b: NormalScores) -> None:
    assert torch.equal(a.counts, b.counts)
    assert torch.allclose(a.knots, b.knots, atol=1e-6) and torch.allclose(a.scores, b.scores, atol=1e-6)


def test_scores_are_normal(skewed):
    scores = scored(skewed).result()
    result = scores.apply(skewed.double())
    for channel in (0, 1, 2, 7, *range(8, 16)):
        sample = result[:, channel].flatten()
        assert abs(scipy.stats.skew(sample)) < 0.1 and abs(scipy.stats.kurtosis(sample)) < 0.3
        assert abs(sample.mean()) < 0.01 and abs(sample.std() - 1) < 0.02
        assert scipy.stats.kstest(sample, "norm").statistic < 0.005
        assert abs(scipy.stats.skew(skewed[:, channel].flatten())) > 0.5
    # Atoms sit at the middle of their rank: the 60 % at the top from 0.4 to 1, the 50 % at one half from 0.3 to 0.8.
    opaque, half = result[:, 3][skewed[:, 3] == 1], result[:, 4][skewed[:, 4] == 0.5]
    assert torch.equal(opaque, opaque[:1].expand_as(opaque)) and opaque[0] == pytest.approx(scipy.stats.norm.ppf(0.7), abs=0.05)
    assert half[0] == pytest.approx(scipy.stats.norm.ppf(0.55), abs=0.05)
    assert (result[:, 6] == result[0, 6, 0, 0]).all()


def test_scores_match_the_ranks(skewed):
    result = scored(skewed).result().apply(skewed.double())
    for channel in range(16):
        values = skewed[:, channel].flatten().numpy()
        want = scipy.stats.norm.ppf((scipy.stats.rankdata(values) - 0.5) / len(values))
        inner = abs(want) < 2
        # Beside an atom, a bin of the range is a visible share of the ranks.
        assert abs(result[:, channel].flatten().numpy() - want)[inner].max() < 0.15


def test_scores_are_inverted_inside_the_range(skewed):
    scores = scored(skewed).result()
    back = scores.invert(scores.apply(skewed.double()))
    span = skewed.amax((0, 2, 3)) - skewed.amin((0, 2, 3))
    assert ((back - skewed).abs().amax((0, 2, 3)) <= 1e-6 * span + 1e-6).all()
    grid = torch.linspace(0, 1, 500, dtype=torch.float64)[:, None, None, None]
    between = skewed.amin((0, 2, 3))[:, None, None] + grid * span[:, None, None]
    assert ((scores.invert(scores.apply(between)) - between).abs().amax((0, 2, 3)) <= 1e-6 * span + 1e-6).all()
    outside = scores.invert(torch.full((16, 1, 1), 50.0))
    assert torch.allclose(outside[:6].flatten(), skewed.amax((0, 2, 3))[:6])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_scores_rise_whatever_the_data(data):
    """Two values keep their order, and different ones stay different, for any mixture of atoms and odd numbers."""
    numbers = st.one_of(st.sampled_from([0.0, 1.0, 0.5, 1e-6, 1 - 1e-6]), st.floats(-3, 3, width=32))
    drawn = data.draw(st.lists(numbers, min_size=9, max_size=9))
    weights = data.draw(st.lists(st.integers(1, 400), min_size=9, max_size=9))
    sample = torch.tensor(drawn).repeat_interleave(torch.tensor(weights))
    sample = sample[torch.arange(-(-len(sample) // 16) * 16) % len(sample)]  # a multiple of 16
    values = sample.reshape(-1, 1, 4, 4).expand(-1, 16, 4, 4)
    scores = scored([values]).result()
    distinct = sample.unique().double()
    result = scores.apply(distinct[:, None, None, None].expand(-1, 16, 1, 1))[:, :, 0, 0]
    assert torch.isfinite(result).all() and (result.diff(dim=0) >= 0).all()
    back = scores.invert(result[:, :, None, None])[:, :, 0, 0]
    assert torch.allclose(back, distinct[:, None].expand_as(back), atol=1e-4)


def test_scores_merge(skewed):
    one = scored([skewed]).result()
    left, right = scored(skewed[:11]), scored([skewed[11:12], skewed[12:]])
    before = right.result()
    merged = NormalScoresAccumulator(SPEC)
    merged.merge(left)
    merged.merge(NormalScoresAccumulator(SPEC))
    merged.merge(right)
    assert_same_curves(one, merged.result())
    merged.update(skewed)
    assert_same_curves(before, right.result())
    with pytest.raises(InputError, match="channels"):
        merged.merge(NormalScoresAccumulator(ChannelSpec()))


@pytest.mark.parametrize("kind", ["cell", "channel"])
def test_statistics_are_of_the_scores(skewed, tmp_path, kind):
    scores = scored(skewed).result()
    accumulator = NormalizationAccumulator(LAYOUT, scores)
    for batch in skewed.split(7):
        other = NormalizationAccumulator(LAYOUT, NormalScores(scores.knots.clone(), scores.scores, scores.counts))
        other.update(batch)
        accumulator.merge(other)
    result = accumulator.result(kind)
    applied, axes = scores.apply(skewed.double()), 0 if kind == "cell" else (0, 2, 3)
    assert torch.allclose(result.mean.squeeze(), applied.mean(axes).float(), atol=1e-5)
    assert torch.equal(result.minimum, skewed.amin((0, 2, 3))) and torch.equal(result.maximum, skewed.amax((0, 2, 3)))
    normalized = result.normalize(skewed)
    assert normalized.dtype == torch.float32
    span = (result.maximum - result.minimum)[:, None, None]
    assert ((result.denormalize(normalized) - skewed).abs() <= 2e-3 * span + 1e-6).all()
    wild = result.denormalize(torch.full((16, 12, 12), 50.0))
    assert torch.equal(wild[:6], result.maximum[:6, None, None].expand(6, 12, 12))
    result.save(tmp_path / "normalization.safetensors")
    loaded = Normalization.load(tmp_path / "normalization.safetensors")
    assert torch.equal(loaded.normalize(skewed), normalized)
    with pytest.raises(InputError, match="normal scores"):
        accumulator.merge(NormalizationAccumulator(LAYOUT))


@pytest.mark.parametrize("damage", ["flat", "falling", "count", "missing", "nan", "one"])
def test_damaged_scores_do_not_load(skewed, tmp_path, damage):
    path = tmp_path / "normalization.safetensors"
    accumulator = NormalizationAccumulator(LAYOUT, scored(skewed).result())
    accumulator.update(skewed)
    accumulator.result().save(path)
    tensors, record = load_tensors(path)
    if damage == "flat":
        tensors["scores"][3] = tensors["scores"][4]
    elif damage == "falling":
        tensors["knots"] = tensors["knots"].flip(0)
    elif damage == "count":
        tensors["counts"][0] += 1
    elif damage == "missing":
        del tensors["scores"]
    elif damage == "nan":
        tensors["knots"][0] = torch.nan
    elif damage == "one":
        tensors["counts"][0], tensors["counts"][1] = 1, tensors["counts"][:2].sum() - 1
    save_tensors(path, tensors, record)
    with pytest.raises(InputError, match="normalization.safetensors"):
        Normalization.load(path)


def test_scores_of_bad_input(skewed):
    accumulator = NormalScoresAccumulator(SPEC)
    with pytest.raises(InputError, match="no atlases"):
        accumulator.result()
    with pytest.raises(InputError, match="16"):
        accumulator.update(skewed[:, :8])
    with pytest.raises(InputError, match="NaN"):
        accumulator.update(skewed / 0)
