"""Distilled guidance: the network's input, the pipeline's choice of one prediction or two, and the training towards the teacher."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers.pipelines.latent_consistency_models.pipeline_latent_consistency_text2img import LatentConsistencyModelPipeline

from generator.errors import InputError
from generator.model.bundle import load_bundle
from generator.model.guidance import WIDTH, embed_guidance, with_guidance_input
from generator.model.pipeline import GaussianAtlasPipeline
from tests.test_pipeline import ExactUNet, exact_pipeline
from tests.tiny_bundle import FOLD, tiny_unet, write_tiny_bundle
from trainer.finetune import FinetuneConfig, Trainer
from trainer.training_data import TrainingData

SCALES = torch.arange(10, 81) / 10


# The input ----------------------------------------------------------------------------------------------------------


def test_scales_are_embedded_as_diffusers_embeds_them():
    theirs = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, SCALES - 1, embedding_dim=WIDTH)
    torch.testing.assert_close(embed_guidance(SCALES, WIDTH), theirs, atol=1e-3, rtol=0)


def test_an_added_input_changes_nothing_yet():
    teacher = tiny_unet(16, width=32)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    student = with_guidance_input(teacher)
    x, text, step = torch.randn(2, 16, 8, 8), torch.randn(2, 5, 32), torch.tensor([3, 700])
    with torch.no_grad():
        scales = embed_guidance(torch.tensor([1.0, 6.0]), WIDTH)
        assert torch.equal(student(x, step, text, timestep_cond=scales).sample, teacher(x, step, text).sample)
        for value in student.parameters():
            value.add_(1)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items()), "no memory is shared"


# Sampling -----------------------------------------------------------------------------------------------------------


class ExactStudent(ExactUNet):
    """What `ExactUNet` predicts with guidance, in one prediction; it reads the scale from its input."""

    def __init__(self, clean, scheduler, kind):
        super().__init__(clean, scheduler, kind)
        self.config = type("Config", (), {"time_cond_proj_dim": WIDTH})
        self.scales: list[float] = []

    def forward(self, x, timestep, encoder_hidden_states, return_dict, timestep_cond):
        nearest = (embed_guidance(SCALES, WIDTH)[:, None] - timestep_cond).square().sum(-1).argmin(0)
        guidance = SCALES[nearest]
        self.scales += guidance.tolist()
        nothing = torch.zeros_like(encoder_hidden_states)
        found, without = (super(ExactStudent, self).forward(x, timestep, text, False)[0] for text in (encoder_hidden_states, nothing))
        self.batches = self.batches[:-1]  # two of one kind are one prediction
        return (torch.lerp(without, found, guidance.view(-1, 1, 1, 1)),)


def pair() -> tuple[GaussianAtlasPipeline, GaussianAtlasPipeline]:
    """A pipeline, and one with guidance of up to 8 distilled."""
    teacher, student = exact_pipeline("v_prediction"), exact_pipeline("v_prediction")
    student.unet = ExactStudent(teacher.unet.clean, student.scheduler, "v_prediction")
    student.info = student.info | {"distilled_guidance": 8.0}
    return teacher, student


@pytest.mark.parametrize(
    ("arguments", "predictions", "scale"),
    [
        ({"guidance_scale": 3.5}, 1, 3.5),
        ({"guidance_scale": 8}, 1, 8.0),
        ({"guidance_scale": 3.5, "mix_prompt": "other", "mix_weight": 0.3}, 2, 3.5),
        ({"guidance_scale": 3.5, "negative_prompt": "  "}, 1, 3.5),
        ({"guidance_scale": 0}, 1, 1.0),
        # What the network has not learned is made of two predictions without guidance.
        ({"guidance_scale": 9.5}, 2, 1.0),
        ({"guidance_scale": 3.5, "negative_prompt": "other"}, 2, 1.0),
        ({"guidance_scale": 3.5, "negative_prompt": "other", "mix_prompt": "other", "mix_weight": 0.3}, 3, 1.0),
        ({"guidance_scale": 1, "negative_prompt": "other"}, 1, 1.0),
    ],
)
def test_a_distilled_model_gives_what_two_predictions_give(arguments: dict, predictions: int, scale: float):
    teacher, student = pair()
    expected, got = (pipeline("any", num_inference_steps=3, **arguments).atlases[0].values for pipeline in (teacher, student))
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=0)
    assert student.unet.batches == [predictions] * 3 and set(student.unet.scales) == {scale}


# Bundles ------------------------------------------------------------------------------------------------------------


def distilled_bundle(directory: Path) -> Path:
    return write_tiny_bundle(directory, unet=with_guidance_input(tiny_unet(16 * FOLD**2)), distilled_guidance=8.0)


def test_a_distilled_bundle_keeps_its_input(tmp_path):
    pipeline = GaussianAtlasPipeline.from_pretrained(distilled_bundle(tmp_path / "a"), device="cpu")
    assert pipeline.distilled_guidance == 8 and pipeline.unet.config.time_cond_proj_dim == WIDTH
    pipeline.save_pretrained(tmp_path / "b")
    again = GaussianAtlasPipeline.from_pretrained(tmp_path / "b", device="cpu")
    assert torch.equal(again("a lamp").atlases[0].values, pipeline("a lamp").atlases[0].values)


def test_a_bundle_whose_network_and_record_differ_is_refused(tmp_path):
    with pytest.raises(InputError, match="this one does not take it, and got 8"):
        write_tiny_bundle(tmp_path / "a", distilled_guidance=8.0)
    with pytest.raises(InputError, match="this one takes it, and got 0"):
        write_tiny_bundle(tmp_path / "b", unet=with_guidance_input(tiny_unet(16 * FOLD**2)))


# Training -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("distil") / "teacher")


def data(count: int = 8) -> TrainingData:
    generator = torch.Generator().manual_seed(0)
    atlases = torch.randn(count, 16, 32, 32, generator=generator)
    features = torch.randn(count, 4, 384, generator=generator)
    return TrainingData(atlases, [[i] for i in range(count)], features, [f"object-{i}" for i in range(count)], torch.zeros(4, 384))


def config(teacher: Path, **changes) -> FinetuneConfig:
    settings = {"batch_size": 4, "learning_rate": 2e-3, "warmup_steps": 2, "validation_share": 0.0, "mixed_precision": "no"}
    settings |= {"base": str(teacher), "fold": FOLD, "distill_guidance": 8.0, "max_steps": 6, "checkpoint_every": 3}
    return FinetuneConfig(**settings | changes)


def test_what_is_taught_is_what_the_pipeline_would_predict(teacher, tmp_path):
    trainer = Trainer(config(teacher), data(), tmp_path)
    pipeline = GaussianAtlasPipeline.from_pretrained(teacher, device="cpu")
    folded = torch.randn(3, 16 * FOLD**2, 8, 8)
    text, steps, scales = torch.randn(3, 4, 384), torch.tensor([10, 500, 999]), torch.tensor([1.0, 3.5, 8.0])
    taught = trainer._taught(folded, steps, text, scales)
    for i in range(3):
        predict = pipeline._predictor(text[i : i + 1], torch.zeros(1, 4, 384), scales[i].item(), None)
        expected = torch.nn.functional.pixel_shuffle(predict(folded[i : i + 1], steps[i]), FOLD)
        torch.testing.assert_close(taught[i : i + 1], expected, atol=1e-4, rtol=1e-4)
    # A student that says the same has no loss; data does not enter it.
    batch = trainer.batch(0, trainer.train_rows, 4)
    trainer.unet.forward = lambda folded, timesteps, encoder_hidden_states, return_dict, timestep_cond: (
        torch.nn.functional.pixel_unshuffle(trainer._taught(folded, timesteps, encoder_hidden_states, batch.guidance), FOLD),
    )
    assert trainer.loss(batch).item() < 1e-10


def test_scales_cover_the_range_and_hold_a_share_without_guidance(teacher, tmp_path):
    trainer = Trainer(config(teacher), data(), tmp_path)
    scales = torch.cat([trainer.batch(step, trainer.train_rows, 64).guidance for step in range(20)])
    assert scales.min() == 1 and 7.8 < scales.max() <= 8 and 0.07 < (scales == 1).float().mean() < 0.13
    plain = Trainer(FinetuneConfig(base=str(teacher), fold=FOLD), data(), tmp_path).batch(5, trainer.train_rows, 8)
    ours = trainer.batch(5, trainer.train_rows, 8)
    assert (plain.guidance == 1).all() and torch.equal(plain.noise, ours.noise), "all else is drawn as without"


def test_a_student_comes_nearer_to_guidance(teacher, tmp_path):
    trainer = Trainer(config(teacher, max_steps=100, checkpoint_every=1000, batch_size=8, decay_steps=50), data(2), tmp_path)
    held = trainer.batch(-1, trainer.train_rows, 64)
    before = trainer.loss(held).item()
    for _ in trainer.run(progress=False):
        pass
    after = trainer.loss(held).item()
    assert after < 0.8 * before
    assert not any(value.requires_grad for value in trainer.teacher.parameters())


def test_a_resumed_distillation_equals_an_uninterrupted_one(teacher, tmp_path):
    whole = [loss for _, loss in Trainer(config(teacher), data(), tmp_path / "whole").run(progress=False)]
    parts = [loss for _, loss in Trainer(config(teacher, max_steps=3), data(), tmp_path / "parts").run(progress=False)]
    second = Trainer(config(teacher), data(), tmp_path / "parts")
    assert second.resume() and second.step == 3
    assert parts + [loss for _, loss in second.run(progress=False)] == whole
    with pytest.raises(InputError, match="was trained with distill_guidance 8.0, not 6.0"):
        Trainer(config(teacher, distill_guidance=6.0), data(), tmp_path / "parts").resume()


def test_bad_settings_are_named(teacher, tmp_path):
    for changes in ({"distill_guidance": 0.5}, {"base": ""}, {"lora_rank": 2}):
        with pytest.raises(InputError, match="distill_guidance must be above 1 and needs a bundle as base and lora_rank 0"):
            config(teacher, **changes)
    student = distilled_bundle(tmp_path / "student")
    assert load_bundle(student).info["distilled_guidance"] == 8
    with pytest.raises(InputError, match="is distilled: go on from the model"):
        Trainer(replace(config(student), distill_guidance=0.0), data(), tmp_path)
