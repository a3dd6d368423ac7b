"""What a network sees beyond an atlas's left and right border: sampling, training, and going on from a model that saw nothing there."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from generator.atlas import Atlas, ChannelSpec
from generator.errors import InputError
from generator.model.bundle import load_bundle
from generator.model.folding import fold, unfold, unwrap, wrap
from generator.model.pipeline import GaussianAtlasPipeline
from tests.test_finetune import CONFIG, data
from tests.test_pipeline import ExactUNet, exact_pipeline
from tests.tiny_bundle import layout, normalization, write_tiny_bundle
from trainer.dataset import write_shards
from trainer.finetune import FinetuneConfig, Trainer, build_unet, going_on
from trainer.fit import FitConfig
from trainer.presets import PRESETS, following_base
from trainer.stages import stats


@pytest.mark.parametrize("columns", [0, 1, 3, 8])
def test_an_image_goes_on_where_it_comes_round(columns):
    values = torch.randn(2, 5, 4, 8)
    wrapped = wrap(values, columns)
    assert wrapped.shape == (2, 5, 4, 8 + 2 * columns) and torch.equal(unwrap(wrapped, columns), values)
    for column in range(8 + 2 * columns):
        assert torch.equal(wrapped[..., column], values[..., (column - columns) % 8])


def test_more_columns_than_there_are_cannot_be_repeated():
    with pytest.raises(InputError, match="9 columns"):
        wrap(torch.zeros(1, 1, 8, 8), 9)


def left_neighbours(image: torch.Tensor) -> torch.Tensor:
    """Every column gets its left neighbour's values, the first one zeros, as at a convolution's border."""
    return torch.nn.functional.pad(image, (1, 0))[..., :-1]


class LookingLeft(ExactUNet):
    """Knows of every column what its left neighbour should be, and takes that from the clean atlas inside the image that it is given."""

    def forward(self, x, timestep, encoder_hidden_states, return_dict):
        # The clean atlas as far as the image goes: 16 columns, or more where it is wrapped.
        clean = wrap(self.clean, (x.shape[-1] - self.clean.shape[-1]) // 2) * (1 + encoder_hidden_states[:, :1, :1, None])
        return (left_neighbours(clean).expand_as(x),)


@pytest.mark.parametrize("columns", [0, 1, 2])
def test_a_network_looks_beyond_the_border_while_sampling(columns):
    pipeline = exact_pipeline("sample", factor=2)
    pipeline.unet = LookingLeft(pipeline.unet.clean, pipeline.scheduler, "sample")
    pipeline.info = pipeline.info | {"wrap": columns}
    made = pipeline("a chair", num_inference_steps=3, guidance_scale=1.0).atlases[0].values
    expected = normalization().denormalize(unfold(torch.roll(2 * pipeline.unet.clean, 1, -1), 2))[0]
    torch.testing.assert_close(made[..., 2:], expected[..., 2:], atol=1e-4, rtol=1e-4)
    seam = (made[..., :2] - expected[..., :2]).abs().max()
    assert seam < 1e-4 if columns else seam > 0.1


def test_training_sees_beyond_the_border_too_and_learns_from_the_atlas_alone():
    config = replace(CONFIG, prediction_type="sample", fold=2, wrap=1)
    trainer = Trainer(config, data(), "unused")
    batch = trainer.batch(0, trainer.train_rows, 4)
    sizes = []

    def model(image, timesteps, encoder_hidden_states, return_dict):
        sizes.append(image.shape[-1])
        return (left_neighbours(image),)

    found = trainer.loss(batch, model)
    alpha, sigma = (value.sqrt().reshape(-1, 1, 1, 1) for value in (trainer.alphas[batch.timesteps], 1 - trainer.alphas[batch.timesteps]))
    noisy = fold(alpha * batch.clean + sigma * batch.noise, 2)
    error = unfold(torch.roll(noisy, 1, -1), 2) - batch.clean
    torch.testing.assert_close(found, (error.square() / sigma.square().clamp_min(0.1)).mean())
    assert sizes == [4 + 2]


def test_a_bundle_says_how_far_its_network_sees(tmp_path):
    folder = write_tiny_bundle(tmp_path / "bundle", wrap=2)
    assert load_bundle(folder).wrap == 2
    plain = load_bundle(write_tiny_bundle(tmp_path / "plain"))
    assert plain.wrap == 0
    ours, theirs = (GaussianAtlasPipeline.from_pretrained(path) for path in (folder, tmp_path / "plain"))
    assert not torch.equal(ours("a chair").atlases[0].values, theirs("a chair").atlases[0].values), "the same weights see more"
    for wrong in (-1, 9, True, "2"):
        info = json.loads((folder / "bundle.json").read_text()) | {"wrap": wrong}
        (folder / "bundle.json").write_text(json.dumps(info))
        with pytest.raises(InputError, match="wrap must be a number of columns, 0 to 8"):
            load_bundle(folder)


def test_what_a_base_has_learned_to_see_is_kept_and_may_be_added(tmp_path):
    wrapped = load_bundle(write_tiny_bundle(tmp_path / "wrapped", wrap=2))
    plain = load_bundle(write_tiny_bundle(tmp_path / "plain"))
    config = FinetuneConfig(fold=4)
    assert [going_on(replace(config, wrap=own), base).wrap for base in (plain, wrapped) for own in (0, 1)] == [0, 1, 2, 1]
    build_unet(replace(config, base=str(tmp_path / "plain"), wrap=1), 384)
    with pytest.raises(InputError, match="was trained with wrap 0"):
        build_unet(replace(config, base=str(tmp_path / "plain"), wrap=1, distill_guidance=4.0), 384)


def test_a_base_can_relearn_other_channels(tmp_path: Path):
    """The statistics are then those of the new atlases, where otherwise the base's stay."""

    base = write_tiny_bundle(tmp_path / "base", channels=ChannelSpec(opacity="identity", rotation="canonical"))
    preset = replace(PRESETS["tiny"], fit=FitConfig(count=100), finetune=FinetuneConfig(base=str(base)), relearn=True)
    assert following_base(preset).channels == preset.channels != load_bundle(base).channels
    values = torch.rand(16, 32, 32, generator=torch.Generator().manual_seed(0))
    write_shards([("a", Atlas(values, layout().id, preset.channels), {"captions": ["a"]})], tmp_path / "shards")
    stats(following_base(preset), tmp_path)
    assert (tmp_path / "normalization.safetensors").is_file()
    with pytest.raises(InputError, match="other channels than tiny"):
        stats(following_base(replace(preset, relearn=False)), tmp_path)
