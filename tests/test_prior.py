"""A Gaussian's estimate of clean atlases, against dense linear algebra; sampling and training with a network that corrects it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.fft
import torch

from generator.atlas import CHANNELS
from generator.errors import InputError
from generator.model.bundle import load_bundle
from generator.model.folding import fold
from generator.model.pipeline import GaussianAtlasPipeline
from generator.model.prior import AtlasPrior, PriorAccumulator, cosine_transform, damping, quieter
from generator.tensors import save_tensors
from tests.test_finetune import CONFIG, data
from tests.test_pipeline import ExactUNet, exact_pipeline
from tests.tiny_bundle import SCHEDULER, layout, normalization, write_tiny_bundle
from trainer.finetune import FinetuneConfig, Trainer, build_unet, going_on
from trainer.schedule import scheduler_config

SAMPLE = scheduler_config("sample", 1.0, True)


def random_prior(size: int, layout_id: str = "some") -> AtlasPrior:
    roots = torch.randn(size, size // 2 + 1, CHANNELS, CHANNELS, generator=torch.Generator().manual_seed(0))
    # Smooth atlases: less of the higher frequencies.
    roots = roots * torch.linspace(1.5, 0.1, size)[:, None, None, None] * torch.linspace(1.5, 0.1, size // 2 + 1)[:, None, None]
    return AtlasPrior(roots @ roots.mT / CHANNELS + 0.01 * torch.eye(CHANNELS), layout_id)


def dense(prior: AtlasPrior) -> np.ndarray:
    """The covariance of the [16 H W] values that a prior means, by SciPy's transforms of every unit vector."""
    size, count = prior.size, CHANNELS * prior.size**2
    unit = np.eye(count).reshape(count, CHANNELS, size, size)
    spectrum = np.fft.fft(scipy.fft.dct(unit, axis=2, norm="ortho"), axis=3, norm="ortho")
    half = prior.covariance.double().numpy()
    whole = np.stack([half[:, min(f, size - f)] for f in range(size)], axis=1)
    return np.einsum("ichw,hwcd,jdhw->ij", spectrum.conj(), whole, spectrum, optimize=True).real


def channel_means(covariance: np.ndarray) -> torch.Tensor:
    return torch.tensor(np.diag(covariance).reshape(CHANNELS, -1).mean(1)).float()


@pytest.mark.parametrize("size", [4, 5])
@pytest.mark.parametrize("alpha", [0.02, 0.6, 0.99])
def test_the_filter_is_the_posterior_mean(size: int, alpha: float):
    prior = random_prior(size)
    sigma = (1 - alpha**2) ** 0.5
    x = torch.randn(3, CHANNELS, size, size, generator=torch.Generator().manual_seed(1))
    found = prior.filter(x, torch.tensor(alpha), torch.full((3,), sigma))
    covariance = dense(prior)
    gain = alpha * covariance @ np.linalg.inv(alpha**2 * covariance + sigma**2 * np.eye(len(covariance)))
    mean = torch.tensor(x.reshape(3, -1).double().numpy() @ gain.T).float().reshape(x.shape)
    torch.testing.assert_close(found.mean, mean, atol=2e-5, rtol=1e-4)
    left = channel_means(covariance - alpha * gain @ covariance)
    torch.testing.assert_close(found.error.expand(3, -1, 1, 1)[1, :, 0, 0], left.sqrt(), atol=1e-5, rtol=1e-3)
    spread = channel_means(alpha * gain @ covariance).sqrt()
    torch.testing.assert_close(found.image, mean / spread[:, None, None], atol=1e-4, rtol=1e-3)
    assert torch.equal(found.corrected(torch.zeros_like(x)), found.mean)
    torch.testing.assert_close(found.corrected(torch.ones_like(x)) - found.mean, found.error.expand_as(x), atol=1e-5, rtol=1e-4)


def test_noise_alone_says_nothing_and_no_noise_everything():
    prior = random_prior(16)
    x = torch.randn(64, CHANNELS, 16, 16, generator=torch.Generator().manual_seed(1))
    zero, one = torch.zeros(1), torch.ones(1)
    blind = prior.filter(x, zero, one)
    assert not blind.mean.any() and bool(blind.image.isfinite().all())
    torch.testing.assert_close(blind.image.square().mean((0, 2, 3)), torch.ones(CHANNELS), atol=0.1, rtol=0)
    clear = prior.filter(x, one, zero)
    torch.testing.assert_close(clear.mean, x, atol=1e-3, rtol=1e-3)
    assert clear.error.max() < 1e-3


def test_a_prior_without_some_directions_takes_them_out():
    prior = AtlasPrior(torch.diag(torch.arange(CHANNELS) < 3).float().expand(8, 5, -1, -1), "some")
    x = torch.randn(2, CHANNELS, 8, 8, generator=torch.Generator().manual_seed(1))
    found = prior.filter(x, torch.ones(1), torch.zeros(1))
    assert bool(found.image.isfinite().all()) and not found.mean[:, 3:].any()
    torch.testing.assert_close(found.mean[:, :3], x[:, :3], atol=1e-3, rtol=1e-3)


def test_the_covariance_of_atlases_is_taken_from_them():
    size, generator = 8, torch.Generator().manual_seed(0)
    mixing = torch.randn(CHANNELS, CHANNELS, generator=generator)
    values = torch.einsum("cd,bdhw->bchw", mixing, torch.randn(4096, CHANNELS, size, size, generator=generator))
    accumulator = PriorAccumulator("some")
    for part in values.split(1000):
        accumulator.update(part)
    prior = accumulator.result()
    assert accumulator.count == 4096 and prior.layout_id == "some"
    white = (mixing @ mixing.T).expand_as(prior.covariance)
    assert (prior.covariance - white).abs().max() < 0.15 * white.max()
    # Parseval: the mean square of the values is that of the frequencies.
    total = prior.filter(values[:1], torch.zeros(1), torch.ones(1)).error[0, :, 0, 0].square()
    torch.testing.assert_close(total, values.square().mean((0, 2, 3)), atol=0, rtol=1e-3)
    with pytest.raises(InputError, match="no atlases"):
        PriorAccumulator("some").result()


def test_a_file_gives_the_same_prior_and_others_are_refused(tmp_path: Path):
    prior = random_prior(8)
    prior.save(tmp_path / "prior.safetensors")
    found = AtlasPrior.load(tmp_path / "prior.safetensors")
    assert torch.equal(found.covariance, prior.covariance) and found.layout_id == "some"
    record = {"format": "gaussian-atlas-prior-1", "layout_id": "some"}
    for tensor, stated, reason in (
        (torch.zeros(8, 5, 16, 15), record, r"\[8, 5, 16, 15\]"),
        (torch.zeros(8, 8, 16, 16), record, "size / 2"),
        (torch.full((8, 5, 16, 16), float("nan")), record, "NaN"),
        (torch.zeros(0, 1, 16, 16), record, r"\[0, 1, 16, 16\]"),
        (torch.zeros(8, 5, 16, 16, dtype=torch.float8_e8m0fnu), record, "other.safetensors"),
        (prior.covariance, {"format": "other"}, "not a prior"),
    ):
        save_tensors(tmp_path / "other.safetensors", {"covariance": tensor}, stated)
        with pytest.raises(InputError, match=reason):
            AtlasPrior.load(tmp_path / "other.safetensors")


# Sampling -------------------------------------------------------------------------------------------------------------


class Silent(ExactUNet):
    """A network that has nothing to correct."""

    def forward(self, x, timestep, encoder_hidden_states, return_dict):
        return (torch.zeros_like(x),)


class Clean(ExactUNet):
    """Knows the clean atlas and the prior, and of the noisy one what it is shown."""

    prior: AtlasPrior

    def forward(self, x, timestep, encoder_hidden_states, return_dict):
        assert x.isfinite().all() and x.square().mean() < 30, "the image is of unit variance"
        return ((self.clean * (1 + encoder_hidden_states[:, :1, :1, None])).expand_as(x),)


def correcting(kind: type[ExactUNet], info: dict | None = None) -> GaussianAtlasPipeline:
    exact = exact_pipeline("sample", factor=2)
    unet = kind(exact.unet.clean, exact.scheduler, "sample")
    parts = (exact.text_encoder, exact.layout, exact.normalization, exact.channels, exact.info | (info or {}))
    return GaussianAtlasPipeline(unet, exact.scheduler, *parts, prior=random_prior(32))


def test_a_network_that_corrects_nothing_samples_from_the_prior():
    pipeline = correcting(Silent)
    accumulator = PriorAccumulator("some")
    # The bounds of this normalization would cut the tails.
    raw = normalization()
    raw = replace(raw, minimum=raw.minimum - 99, maximum=raw.maximum + 99)
    pipeline.normalization = raw
    made = pipeline(["a chair"] * 48, num_inference_steps=40, guidance_scale=1.0, batch_size=48)
    accumulator.update(torch.stack([raw.normalize(atlas.values) for atlas in made.atlases]))
    found, wanted = accumulator.result().covariance, pipeline.prior.covariance
    for low, high in ((0, 4), (4, 16)):
        ratio = found[low:high, low // 2 : high // 2].mean((0, 1)).diag() / wanted[low:high, low // 2 : high // 2].mean((0, 1)).diag()
        assert ((ratio - 1).abs() < 0.25).all(), (low, ratio)


def test_less_may_be_expected_of_fine_structure():
    prior = random_prior(16)
    factors = damping(16, above=2.0, variance=0.25)
    # Two turns round, or four half turns from pole to pole, and no more.
    assert factors[0, :4].tolist() == [1, 1, 1, 0.25] and factors[:6, 0].tolist() == [1, 1, 1, 1, 1, 0.25] and factors[4, 1] == 0.25
    x = torch.randn(2, CHANNELS, 16, 16, generator=torch.Generator().manual_seed(1))
    alpha, sigma = torch.tensor(0.6), torch.tensor(0.8)
    plain, damped = prior.filter(x, alpha, sigma), prior.filter(x, alpha, sigma, factors)
    other = AtlasPrior(prior.covariance * factors[..., None, None], "some").filter(x, alpha, sigma)
    torch.testing.assert_close(damped.mean, other.mean, atol=1e-5, rtol=1e-4)
    assert torch.equal(damped.image, plain.image) and torch.equal(damped.error, plain.error)
    torch.testing.assert_close(prior.filter(x, alpha, sigma, torch.ones(16, 9)).mean, plain.mean)


def test_an_estimate_is_what_the_prior_and_the_network_know_without_damping():
    pipeline = correcting(Silent, {"damping": {"above": 2.0, "variance": 0.0}})
    noisy = torch.randn(2, CHANNELS, 32, 32, generator=torch.Generator().manual_seed(1))
    alpha2 = pipeline.scheduler.alphas_cumprod[300]
    expected = pipeline.prior.filter(noisy, alpha2.sqrt(), (1 - alpha2).sqrt()).mean
    torch.testing.assert_close(pipeline.estimate(noisy, ["a chair", "a lamp"], 300), expected, atol=1e-5, rtol=1e-4)


def test_damped_samples_are_smooth():
    pipeline = correcting(Silent, {"damping": {"above": 2.0, "variance": 0.0}})
    values = normalization().normalize(pipeline("a chair", num_inference_steps=10, guidance_scale=1.0).atlases[0].values)[None]
    accumulator = PriorAccumulator("some")
    accumulator.update(values)
    power = accumulator.result().covariance.diagonal(dim1=-2, dim2=-1).sum(-1)
    assert power[damping(32, 2.0, 0.0) == 0].sum() < 0.02 * power.sum()


def test_quieter_noise_is_less_at_low_frequencies_alone():
    noise = torch.randn(CHANNELS, 16, 16, generator=torch.Generator().manual_seed(3))
    less = quieter(noise, 2.0, 0.5)
    before, after = (torch.fft.rfft(cosine_transform(16) @ x, norm="ortho").abs() for x in (noise, less))
    low = damping(16, 2.0, 0.0) == 1
    torch.testing.assert_close(after[:, low], 0.5 * before[:, low], atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(after[:, ~low], before[:, ~low], atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(quieter(noise, 2.0, 1.0), noise)


def test_objects_are_more_alike_with_quieter_noise():
    """Where the prior alone draws, what differs between seeds at low frequencies is what the noise differed in."""
    spread = []
    for deviation in (1.0, 0.5):
        pipeline = correcting(Silent, {"damping": {"above": 2.0, "variance": 0.0, "noise": deviation}})
        made = pipeline(["a chair"] * 2, num_inference_steps=20, guidance_scale=1.0).atlases
        first, second = (normalization().normalize(atlas.values) for atlas in made)
        spread.append((first - second).std().item())
    assert spread[1] == pytest.approx(0.5 * spread[0], rel=0.1)


def test_guidance_goes_as_far_with_a_prior_as_without():
    """The correction is `clean` without text and twice that with it: guidance of 3 makes it four times that, in units of the error."""
    pipeline = correcting(Clean)
    predict = pipeline._predictor(torch.ones(2, 4, 8), torch.zeros(1, 4, 8), 3.0, None)
    x = fold(torch.randn(2, CHANNELS, 32, 32, generator=torch.Generator().manual_seed(2)), 2)
    timestep = pipeline._scheduler(10, 1.0).timesteps[5]
    alpha = pipeline.scheduler.alphas_cumprod[int(timestep)].sqrt()
    known = pipeline.prior.filter(torch.nn.functional.pixel_shuffle(x, 2), alpha, (1 - alpha**2).sqrt())
    expected = fold(known.mean + known.error * torch.nn.functional.pixel_shuffle(4 * pipeline.unet.clean, 2), 2)
    torch.testing.assert_close(predict(x, timestep), expected, atol=1e-4, rtol=1e-4)


# Bundles --------------------------------------------------------------------------------------------------------------


def test_a_bundle_brings_its_prior(tmp_path: Path):
    prior = random_prior(32, layout_id=layout().id)
    folder = write_tiny_bundle(tmp_path / "bundle", scheduler_config=SAMPLE, prior=prior)
    assert torch.equal(load_bundle(folder).prior.covariance, prior.covariance)
    assert "atlas/prior.safetensors" in json.loads((folder / "bundle.json").read_text())["files"]
    plain = write_tiny_bundle(tmp_path / "plain", scheduler_config=SAMPLE)
    assert load_bundle(plain).prior is None
    ours, theirs = (GaussianAtlasPipeline.from_pretrained(path) for path in (folder, plain))
    made = ours("a chair").atlases[0].values
    assert not torch.equal(made, theirs("a chair").atlases[0].values)
    again = GaussianAtlasPipeline.from_pretrained(ours.save_pretrained(tmp_path / "again"), dtype=torch.float32)
    torch.testing.assert_close(again("a chair").atlases[0].values, made)


def test_a_prior_that_does_not_belong_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match="prior was computed for layout other"):
        write_tiny_bundle(tmp_path / "bundle", scheduler_config=SAMPLE, prior=random_prior(32, layout_id="other"))
    with pytest.raises(InputError, match="of 16 cells"):
        write_tiny_bundle(tmp_path / "bundle", scheduler_config=SAMPLE, prior=random_prior(16, layout_id=layout().id))
    with pytest.raises(InputError, match="prediction_type must be sample"):
        write_tiny_bundle(tmp_path / "bundle", scheduler_config=SCHEDULER, prior=random_prior(32, layout_id=layout().id))
    for wrong in ({"above": 2.0}, {"above": -1, "variance": 0.5}, {"above": 2.0, "variance": 1.5}, 0.3):
        with pytest.raises(InputError, match="damping needs a prior, above"):
            prior = random_prior(32, layout_id=layout().id)
            write_tiny_bundle(tmp_path / "bundle", scheduler_config=SAMPLE, prior=prior, damping=wrong)
    with pytest.raises(InputError, match="damping needs a prior"):
        write_tiny_bundle(tmp_path / "bundle", scheduler_config=SAMPLE, damping={"above": 2.0, "variance": 0.3})
    assert not (tmp_path / "bundle").exists()


# Training -------------------------------------------------------------------------------------------------------------

LEARNING = replace(CONFIG, prediction_type="sample", prior=True)


def test_training_starts_at_the_loss_of_the_prior():
    prior = random_prior(8)
    trainer = Trainer(LEARNING, replace(data(), prior=prior), "unused")
    batch = trainer.batch(0, trainer.train_rows, 4)
    seen = []

    def silent(image, timesteps, encoder_hidden_states, return_dict):
        seen.append(image)
        return (torch.zeros_like(image),)

    alpha, sigma = (value.sqrt() for value in (trainer.alphas[batch.timesteps], 1 - trainer.alphas[batch.timesteps]))
    noisy = alpha[:, None, None, None] * batch.clean + sigma[:, None, None, None] * batch.noise
    known = prior.filter(noisy, alpha, sigma)
    weight = 1 / sigma.square().clamp_min(0.1)[:, None, None, None]
    torch.testing.assert_close(trainer.loss(batch, silent), (weight * (known.mean - batch.clean).square()).mean())
    torch.testing.assert_close(seen[0], known.image)


def test_settings_that_contradict_a_prior_are_named():
    with pytest.raises(InputError, match="prediction_type must be sample, got 'v_prediction'"):
        FinetuneConfig(prior=True)
    with pytest.raises(InputError, match="needs that of the atlases"):
        Trainer(LEARNING, data(), "unused")


def test_a_base_keeps_its_prior_and_a_student_its_teachers(tmp_path: Path):
    prior = random_prior(32, layout_id=layout().id)
    corrects = write_tiny_bundle(tmp_path / "corrects", scheduler_config=SAMPLE, prior=prior)
    plain = write_tiny_bundle(tmp_path / "plain", scheduler_config=SAMPLE)
    config = FinetuneConfig(fold=4, prediction_type="sample")
    found = [going_on(replace(config, prior=own), load_bundle(base)).prior for base in (plain, corrects) for own in (False, True)]
    assert found == [False, True, True, True]
    build_unet(replace(config, base=str(corrects), prior=True, distill_guidance=4.0), 384)
    with pytest.raises(InputError, match="corrects no prior"):
        build_unet(replace(config, base=str(plain), prior=True, distill_guidance=4.0), 384)


def test_a_student_of_a_network_that_corrects_learns_its_guided_estimates(tmp_path: Path):
    prior = random_prior(32, layout_id=layout().id)
    base = write_tiny_bundle(tmp_path / "base", scheduler_config=SAMPLE, prior=prior)
    config = FinetuneConfig(base=str(base), distill_guidance=4.0, batch_size=2, mixed_precision="no", fold=4)
    config = going_on(config, load_bundle(base))
    atlases = torch.randn(8, 16, 32, 32, generator=torch.Generator().manual_seed(0))
    students = replace(data(), atlases=atlases, features=torch.randn(8, 4, 384), unconditional=torch.zeros(4, 384), prior=prior)
    trainer = Trainer(config, students, "unused")
    batch = trainer.batch(0, trainer.train_rows, 2)._replace(guidance=torch.ones(2))
    # At a guidance of 1 the student's new input does nothing yet, and it is its own teacher.
    assert trainer.loss(batch).item() < 1e-6
    assert trainer.loss(batch._replace(guidance=torch.full((2,), 4.0))).item() > 1e-4
