"""What a prompt alone says of an atlas: against the plain formulas of a Gaussian process, and in the pipeline that samples about it."""

from __future__ import annotations

import lzma
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from generator.atlas import CHANNELS
from generator.errors import InputError
from generator.model import regression
from generator.model.bundle import load_bundle
from generator.model.folding import fold, unfold
from generator.model.pipeline import GaussianAtlasPipeline
from generator.model.prior import PriorAccumulator, cosine_transform
from generator.model.regression import RegressionBuilder, TextRegression, _packed, _unpacked, _waves, variances_of
from generator.tensors import load_tensors, save_tensors
from tests.test_prior import SAMPLE, Clean, correcting, random_prior
from tests.tiny_bundle import layout, normalization, text_encoder, write_tiny_bundle

SHARES = {"variance": 0.1, "network": 0.2, "above": 600, "variety": 1.0, "choice": 1.0}
COLOURS = [4, 5, 6]


def smooth_atlases(count: int, size: int) -> torch.Tensor:
    """Atlases [count, 16, size, size] of a few low frequencies, the three copies of the opacity alike."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(count, CHANNELS, 4, 4, generator=generator)
    values = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic")
    values[:, [7, 11]] = values[:, [3]]
    return values


def sentences(captions: list[str]) -> torch.Tensor:
    """Unit vectors that depend on the captions alone."""
    made = [torch.randn(12, generator=torch.Generator().manual_seed(sum(map(ord, caption)))) for caption in captions]
    return torch.nn.functional.normalize(torch.stack(made), dim=1)


def regression_on(values: torch.Tensor, captions: list[str], builds: list[str], embed=sentences) -> TextRegression:
    builder = RegressionBuilder(torch.full(values.shape[1:], 1e9), "some")
    builder.steps = torch.full((CHANNELS,), 1e-3)
    for each in zip(values, captions, builds, strict=True):
        builder.add(*each)
    return builder.result(embed)


def test_it_is_the_posterior_mean_of_a_gaussian_process():
    size, captions = 8, ["a chair", "a red chair", "a lamp", "a car", "a lamp"]
    values = smooth_atlases(len(captions), size)
    found = regression_on(values, captions, list("abcde"))
    asked = sentences(["a chair", "a tree"])
    # The same in NumPy, by the definition: one target a caption, the mean of its atlases, with noise over their number.
    names = list(dict.fromkeys(captions))
    keys = sentences(names).double().numpy()
    targets = np.stack([values[[c == name for c in captions]].mean(0).double().numpy().ravel() for name in names])
    centre = targets.mean(0)
    kernel = lambda a, b: np.exp(-((a[:, None] - b[None]) ** 2).sum(-1) / (2 * 0.5**2))  # noqa: E731
    noisy = kernel(keys, keys) + 0.2 * np.diag([1 / captions.count(name) for name in names])

    def mean(query: np.ndarray) -> np.ndarray:
        return centre + kernel(query, keys) @ np.linalg.solve(noisy, targets - centre)

    query = asked.double().numpy()
    similar = np.exp(query @ keys.T / 0.02 - (query @ keys.T / 0.02).max(1, keepdims=True))
    near = similar / similar.sum(1, keepdims=True) @ keys
    near = near / np.linalg.norm(near, axis=1, keepdims=True) + 0.5 * query
    near /= np.linalg.norm(near, axis=1, keepdims=True)
    shape = (2, CHANNELS, size, size)
    build, colour = mean(near).reshape(shape), mean(query).reshape(shape)
    expected = torch.tensor(np.where(np.isin(range(CHANNELS), COLOURS)[None, :, None, None], colour, build)).float()
    torch.testing.assert_close(found.mean(asked, contrast=0.0), expected, atol=2e-3, rtol=1e-3)


def test_contrast_strengthens_colours_alone():
    captions = ["a chair", "a lamp", "a car"]
    values = smooth_atlases(3, 8)
    found = regression_on(values, captions, captions)
    pale, strong = (found.mean(sentences(["a tree"]), contrast) for contrast in (0.0, 2.0))
    kept = [channel for channel in range(CHANNELS) if channel not in COLOURS]
    assert torch.equal(pale[:, kept], strong[:, kept])
    centre = values[:, COLOURS].mean(0)
    ratio = ((strong[:, COLOURS] - centre) * (pale[:, COLOURS] - centre)).sum() / (pale[:, COLOURS] - centre).square().sum()
    assert 1.2 < ratio < 3.01
    torch.testing.assert_close(strong[:, COLOURS] - centre, ratio * (pale[:, COLOURS] - centre), atol=1e-2, rtol=1e-2)


def test_chance_draws_a_sentence_towards_one_caption_or_another():
    captions = [f"a chair {index}" for index in range(6)]
    keys = torch.nn.functional.normalize(torch.eye(12)[:6] * 0.02 + torch.eye(12)[6], dim=1)
    found = regression_on(smooth_atlases(6, 8), captions, captions, lambda _: keys)
    asked = torch.eye(12)[[6, 6]]
    drawn = found.mean(asked, 0.0, 50 * torch.eye(6)[[0, 5]])
    same = found.mean(asked, 0.0)
    assert torch.equal(same[0], same[1]) and not torch.allclose(drawn[0], drawn[1], atol=1e-4)


def test_of_the_objects_of_one_caption_one_may_be_chosen():
    captions, values = ["a chair", "a chair", "a lamp"], smooth_atlases(3, 8)
    found = regression_on(values, captions, list("abc"))
    asked = sentences(["a chair"]).expand(3, -1)
    even = found.mean(asked, 0.0, chosen=torch.zeros(3, 3))
    torch.testing.assert_close(even, found.mean(asked, 0.0))
    one, other, unlike = found.mean(asked, 0.0, chosen=50 * torch.eye(3))
    # The chosen object takes the place of the mean of both, by the same weight; one of another caption changes nothing.
    torch.testing.assert_close((one + other) / 2, even[0], atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(unlike, even[0], atol=1e-4, rtol=1e-3)
    difference = (values[0] - values[1]).flatten()
    assert torch.corrcoef(torch.stack([(one - other).flatten(), difference]))[0, 1] > 0.99


def test_repainted_copies_share_their_build_and_keep_their_colours(tmp_path: Path):
    values = smooth_atlases(1, 8).repeat(3, 1, 1, 1)
    values[:, COLOURS] += torch.tensor([-1.0, 0.0, 1.0])[:, None, None, None]
    captions = ["a red chair", "a green chair", "a blue chair"]
    found = regression_on(values, captions, ["chair"] * 3)
    assert len(found.builds) == 1 and len(found.colours) == 3
    means = [found.mean(sentences([caption]), 0.0)[0, COLOURS].mean() for caption in captions]
    assert means[0] < means[1] < means[2]
    found.save(tmp_path / "one.safetensors")
    again = TextRegression.load(tmp_path / "one.safetensors")
    again.save(tmp_path / "two.safetensors")
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    assert torch.equal(again.builds, found.builds) and torch.equal(again.colours, found.colours)
    torch.testing.assert_close(again.mean(sentences(captions)), found.mean(sentences(captions)), atol=1e-2, rtol=1e-2)


def test_the_zone_keeps_what_atlases_are_made_of():
    size = 32
    values = smooth_atlases(40, size)
    accumulator = PriorAccumulator("some")
    accumulator.update(values)
    variances = variances_of(accumulator.result().covariance)
    transform = torch.einsum("kh,bchw,lw->bckl", *(each for each in (cosine_transform(size), values, _waves(size))))
    torch.testing.assert_close(variances.sum((1, 2)), transform.square().sum((2, 3)).mean(0), atol=1e-2, rtol=1e-3)
    builder = RegressionBuilder(variances, "some")
    assert builder.zone.float().mean() < 0.2
    for index, value in enumerate(values):
        builder.add(value, f"a thing {index}", str(index))
    kept = torch.zeros(40, CHANNELS, size, size)
    kept[:, builder.zone] = (transform / builder.steps[:, None, None]).round()[:, builder.zone]
    back = torch.einsum("kh,bckl,lw->bchw", cosine_transform(size), kept * builder.steps[:, None, None], _waves(size))
    places = slice(0, 3)
    assert (back[:, places] - values[:, places]).square().mean() < 0.02 * values[:, places].square().mean()


@pytest.mark.parametrize("size", [4, 5, 8])
def test_waves_are_an_orthonormal_basis(size: int):
    torch.testing.assert_close(_waves(size) @ _waves(size).T, torch.eye(size), atol=1e-6, rtol=0)


@pytest.mark.parametrize("values", [[[0]], [[-1, 1, 32767], [-32768, 127, -128]], [[255, 256]] * 5])
def test_packing_loses_nothing(values: list):
    values = torch.tensor(values, dtype=torch.int16)
    assert torch.equal(_unpacked(_packed(values), *values.shape), values)


def test_a_damaged_file_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    captions = ["a chair", "a lamp"]
    regression_on(smooth_atlases(2, 8), captions, captions).save(tmp_path / "right.safetensors")
    tensors, record = load_tensors(tmp_path / "right.safetensors")
    bomb = torch.frombuffer(bytearray(lzma.compress(bytes(2**26))), dtype=torch.uint8)
    for changes, stated in (
        ({"keys": torch.full_like(tensors["keys"], float("nan"))}, record),
        ({"rows": tensors["rows"] + 1}, record),
        ({"rows": tensors["rows"] - 1}, record),
        ({"rows": tensors["rows"][:0]}, record),
        ({"rows": tensors["rows"] * 0}, record),
        ({"rows": tensors["rows"][0]}, record),
        ({"keys": tensors["keys"][0, 0]}, record),
        ({"steps": tensors["steps"][0]}, record),
        ({"objects": tensors["objects"] + 2}, record),
        ({"objects": tensors["objects"][:1]}, record),
        ({"zone": tensors["zone"][:3]}, record),
        ({"zone": tensors["zone"] * 0}, record),
        ({"steps": tensors["steps"][:2]}, record),
        ({"builds": tensors["builds"][:-9]}, record),
        ({"builds": bomb}, record),
        ({"colours": torch.zeros(40, dtype=torch.uint8)}, record),
        ({"colours": tensors["colours"].float()}, record),
        ({}, record | {"objects": 3}),
        ({}, record | {"objects": 2**40}),
        ({}, record | {"objects": "many"}),
        ({}, {"format": "other"}),
    ):
        save_tensors(tmp_path / "wrong.safetensors", tensors | changes, stated)
        with pytest.raises(InputError, match="wrong.safetensors: .*regression"):
            TextRegression.load(tmp_path / "wrong.safetensors")
    # Counting up to a row of 2^31 takes 17 GB: it is compared with the captions first.
    save_tensors(tmp_path / "wrong.safetensors", tensors | {"rows": torch.tensor([0, 2**31 - 1], dtype=torch.int32)}, record)
    with monkeypatch.context() as patched, pytest.raises(InputError, match="do not fit"):
        patched.setattr(torch, "bincount", lambda *_, **__: pytest.fail("counted"))
        TextRegression.load(tmp_path / "wrong.safetensors")
    monkeypatch.setattr(regression, "MAX_CAPTIONS", 1)
    with pytest.raises(InputError, match="2 captions are more than 1"):
        TextRegression.load(tmp_path / "right.safetensors")
    with pytest.raises(InputError, match="no atlases"):
        RegressionBuilder(torch.ones(CHANNELS, 8, 8), "some").result(sentences)


# Sampling -------------------------------------------------------------------------------------------------------------


class Counting(Clean):
    """Gives one correction always, and counts how often it is asked."""

    asked = 0

    def forward(self, x, timestep, encoder_hidden_states, return_dict):
        self.asked += 1
        return super().forward(x, timestep, encoder_hidden_states, return_dict)


def pipeline_about(captions: list[str], values: torch.Tensor | None = None, **changes) -> GaussianAtlasPipeline:
    """A pipeline whose regression is on some atlases, beside a network that gives one correction always."""
    values = smooth_atlases(len(captions), 32) if values is None else values
    regression = regression_on(values, captions, captions, text_encoder().sentences)
    exact = correcting(Counting)
    parts = (exact.unet, exact.scheduler, text_encoder(), exact.layout, exact.normalization, exact.channels)
    return GaussianAtlasPipeline(*parts, exact.info | {"regression": SHARES | changes}, prior=exact.prior, regression=regression)


def test_with_nothing_left_about_the_mean_a_sample_is_the_mean():
    pipeline = pipeline_about(["a chair", "a lamp", "a car"], variance=0.0, network=0.0, variety=0.0)
    made = pipeline(["a chair", "a lamp"], seed=3, num_inference_steps=5, guidance_scale=1.0)
    expected = pipeline.regression.mean(text_encoder().sentences(["a chair", "a lamp"]), 0.0)
    for atlas, mean in zip(made.atlases, expected, strict=True):
        raw = normalization().denormalize(mean)
        torch.testing.assert_close(atlas.values, raw, atol=2e-3, rtol=1e-3)
    assert not pipeline.unet.asked


def test_without_a_network_samples_have_the_deviation_that_is_left():
    pipeline = pipeline_about(["a chair"], torch.zeros(1, CHANNELS, 32, 32), variance=0.25, network=0.0)
    raw = normalization()
    pipeline.normalization = replace(raw, minimum=raw.minimum - 99, maximum=raw.maximum + 99)
    made = pipeline(["a chair"] * 24, num_inference_steps=40, guidance_scale=1.0, batch_size=24)
    accumulator = PriorAccumulator("some")
    accumulator.update(torch.stack([raw.normalize(atlas.values) for atlas in made.atlases]))
    ratio = accumulator.result().covariance[:8, :8].mean((0, 1)).diag() / pipeline.prior.covariance[:8, :8].mean((0, 1)).diag()
    assert ((ratio - 0.25).abs() < 0.06).all(), ratio


def test_the_network_is_asked_at_high_noise_and_mixed_in():
    pipeline = pipeline_about(["a chair", "a lamp"], network=0.3, above=500)
    text = torch.ones(1, 4, 8)
    expected = torch.randn(1, CHANNELS, 32, 32, generator=torch.Generator().manual_seed(1))
    alone, about = pipeline._predictor(text, None, 1.0, None), pipeline._predictor(text, None, 1.0, None, expected)
    latents = fold(torch.randn(1, CHANNELS, 32, 32, generator=torch.Generator().manual_seed(2)), 2)
    for timestep in (800, 100):
        timestep = torch.tensor(timestep)
        alpha = pipeline.scheduler.alphas_cumprod[timestep].sqrt()
        left = torch.full((32, 17), 0.1)
        deviation = unfold(latents, 2) - alpha * expected
        likely = expected + pipeline.prior.filter(deviation, alpha, (1 - alpha**2).sqrt(), left).mean
        share = 0.3 if timestep >= 500 else 0.0
        wanted = (1 - share) * fold(likely, 2) + share * alone(latents, timestep)
        torch.testing.assert_close(about(latents, timestep), wanted, atol=1e-4, rtol=1e-4)


def test_guidance_seeds_and_a_second_prompt_reach_the_mean():
    captions = ["a red chair", "a blue chair", "a lamp", "a car"]
    pipeline = pipeline_about(captions, variance=0.0, network=0.0, variety=0.0)

    def values(**arguments) -> torch.Tensor:
        return pipeline("a red chair", num_inference_steps=4, **({"guidance_scale": 2.0} | arguments)).atlases[0].values

    torch.testing.assert_close(values(seed=1), values(seed=2), atol=1e-3, rtol=1e-3)
    # Sampling comes to its mean from noise: what is left of the noise is no difference.
    assert (values() - values(guidance_scale=1.0)).abs().max() > 0.01
    ends = values(), values(mix_prompt="a car", mix_weight=1.0)
    middle = values(mix_prompt="a car", mix_weight=0.5)
    torch.testing.assert_close(middle, (ends[0] + ends[1]) / 2, atol=2e-2, rtol=1e-2)
    varied = pipeline_about(captions, variance=0.0, network=0.0, variety=30.0)
    made = varied(["a chair"] * 2, num_inference_steps=4, guidance_scale=2.0)
    again = varied("a chair", seed=1, num_inference_steps=4, guidance_scale=2.0)
    assert (made.atlases[0].values - made.atlases[1].values).abs().max() > 0.01
    torch.testing.assert_close(made.atlases[1].values, again.atlases[0].values, atol=1e-4, rtol=1e-4)


# Bundles --------------------------------------------------------------------------------------------------------------


def bundled(folder: Path, regression: TextRegression | None = None, **changes) -> Path:
    captions = ["a chair", "a lamp"]
    if regression is None:
        regression = regression_on(smooth_atlases(2, 32), captions, captions, text_encoder().sentences)
        regression.layout_id = layout().id
    parts = {"prior": random_prior(32, layout_id=layout().id), "scheduler_config": SAMPLE, "regression": regression}
    return write_tiny_bundle(folder, **(parts | changes))


def test_a_bundle_brings_its_regression(tmp_path: Path):
    folder = bundled(tmp_path / "bundle", shares=SHARES)
    ours = GaussianAtlasPipeline.from_pretrained(folder, dtype=torch.float32)
    made = ours("a chair", num_inference_steps=3).atlases[0].values
    again = GaussianAtlasPipeline.from_pretrained(ours.save_pretrained(tmp_path / "again"), dtype=torch.float32)
    torch.testing.assert_close(again("a chair", num_inference_steps=3).atlases[0].values, made, atol=1e-3, rtol=1e-3)
    plain = write_tiny_bundle(tmp_path / "plain", scheduler_config=SAMPLE)
    assert load_bundle(plain).regression is None


def test_a_regression_that_does_not_belong_is_refused(tmp_path: Path):
    captions = ["a chair", "a lamp"]
    other = regression_on(smooth_atlases(2, 32), captions, captions)
    with pytest.raises(InputError, match="regression was computed for layout some"):
        bundled(tmp_path / "bundle", other, shares=SHARES)
    other.layout_id = layout().id
    with pytest.raises(InputError, match="sentences of width 12"):
        bundled(tmp_path / "bundle", other, shares=SHARES)
    for wrong in ({}, SHARES | {"variance": 2}, SHARES | {"above": -1}, SHARES | {"network": "much"}, None):
        with pytest.raises(InputError, match="a regression needs a prior, variance"):
            bundled(tmp_path / "bundle", **({} if wrong is None else {"shares": wrong}))
    with pytest.raises(InputError, match="a regression needs a prior"):
        bundled(tmp_path / "bundle", prior=None, shares=SHARES)
    with pytest.raises(InputError, match="but there is none"):
        write_tiny_bundle(tmp_path / "bundle", scheduler_config=SAMPLE, shares=SHARES)
