"""The noise schedule, the loop's exactness under resume, its checkpoints, and that it learns."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from generator.errors import InputError, WorkError
from trainer.finetune import FinetuneConfig, Trainer, TrainingData, build_unet, checkpoints
from trainer.schedule import alphas_cumprod, scheduler_config

UNET = {
    "sample_size": 8,
    "block_out_channels": (32, 32),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 8,
}
CONFIG = FinetuneConfig(
    unet=UNET, batch_size=4, learning_rate=2e-3, warmup_steps=2, max_steps=6, checkpoint_every=3, log_every=2, validation_share=0.25
)


def data(count: int = 8) -> TrainingData:
    generator = torch.Generator().manual_seed(0)
    atlases = torch.randn(count, 16, 1, 1, generator=generator).expand(-1, -1, 8, 8).half().contiguous()
    features = torch.randn(count, 4, 12, generator=generator)
    return TrainingData(atlases, [[i] for i in range(count)], features, [f"object-{i}" for i in range(count)])


def test_schedule_is_shifted_and_ends_in_pure_noise():
    plain, shifted = alphas_cumprod(shift=1, zero_terminal_snr=False), alphas_cumprod(shift=2, zero_terminal_snr=False)
    snr = lambda a: a / (1 - a)  # noqa: E731
    torch.testing.assert_close(snr(plain) / snr(shifted), torch.full_like(plain, 4.0))
    assert alphas_cumprod()[-1] == 0 and (alphas_cumprod().diff() < 0).all()


def test_the_solver_samples_what_the_schedule_trained():
    solver = DPMSolverMultistepScheduler.from_config(scheduler_config("v_prediction", 3.0, True))
    expected = alphas_cumprod(shift=3.0).float()
    assert all(beta > 0 for beta in solver.config.trained_betas) and (solver.alphas_cumprod.diff() < 0).all()
    torch.testing.assert_close(solver.alphas_cumprod[:-1], expected[:-1], atol=1e-5, rtol=1e-3)
    solver.set_timesteps(10)
    assert solver.timesteps[0] == 999, "sampling must begin at the noise that training ended with"


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_both_predictions_have_the_same_loss(prediction_type):
    """A network that outputs zero errs by v, or by x: the sample loss is the same error counted in v."""
    trainer = Trainer(FinetuneConfig(unet=UNET, prediction_type=prediction_type), data(), "unused")
    clean, noise, timesteps, text = trainer.batch(0, trainer.train_rows, 4)
    alpha, sigma = trainer.alphas[timesteps].sqrt(), (1 - trainer.alphas[timesteps]).sqrt()
    view = (-1, 1, 1, 1)
    target_v = alpha.view(view) * noise - sigma.view(view) * clean
    wrong = torch.full_like(clean, 0.3)
    output = target_v + wrong if prediction_type == "v_prediction" else clean - sigma.clamp_min(0.1**0.5).view(view) * wrong
    trainer.unet.forward = lambda *args, **kwargs: (output,)
    assert trainer.loss(clean, noise, timesteps, text).item() == pytest.approx(0.09, rel=1e-4)


def test_resumed_run_equals_an_uninterrupted_one(tmp_path):
    whole = Trainer(CONFIG, data(), tmp_path / "whole")
    losses = [loss for _, loss in whole.run(progress=False)]
    first = Trainer(replace(CONFIG, max_steps=3), data(), tmp_path / "parts")
    parts = [loss for _, loss in first.run(progress=False)]
    second = Trainer(CONFIG, data(), tmp_path / "parts")
    assert second.resume() and second.step == 3
    parts += [loss for _, loss in second.run(progress=False)]
    assert parts == losses
    for name, value in whole.ema.items():
        assert torch.equal(value, second.ema[name]), name


def test_it_learns(tmp_path):
    config = FinetuneConfig(**{**vars(CONFIG), "max_steps": 150, "checkpoint_every": 1000, "batch_size": 8, "validation_share": 0.0})
    losses = [loss for _, loss in Trainer(config, data(), tmp_path).run(progress=False)]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_objects_held_out_are_never_trained_on():
    trainer = Trainer(CONFIG, data(40), "unused")
    assert len(trainer.validation_rows) and not set(trainer.train_rows.tolist()) & set(trainer.validation_rows.tolist())
    assert data(40).split(0.25)[1].tolist() == data(40).split(0.25)[1].tolist()


def test_text_dropout_share():
    trainer = Trainer(FinetuneConfig(unet=UNET, text_dropout=0.2), data(), "unused")
    dropped = torch.cat([(trainer.batch(step, trainer.train_rows, 64)[3] == 0).all((1, 2)) for step in range(20)])
    assert 0.16 < dropped.float().mean() < 0.24


def test_damaged_and_foreign_checkpoints_are_named(tmp_path):
    trainer = Trainer(CONFIG, data(), tmp_path)
    list(trainer.run(progress=False))
    newest = checkpoints(tmp_path)[-1]
    with pytest.raises(InputError, match="batch_size"):
        Trainer(FinetuneConfig(**{**vars(CONFIG), "batch_size": 5}), data(), tmp_path).resume()
    (newest / "ema.safetensors").write_bytes(b"half")
    with pytest.raises(InputError, match="damaged"):
        Trainer(CONFIG, data(), tmp_path).resume()


def test_a_killed_save_leaves_the_last_good_checkpoint(tmp_path, monkeypatch):
    trainer = Trainer(CONFIG, data(), tmp_path)
    trainer.train_step()
    good = trainer.save()
    trainer.train_step()
    monkeypatch.setattr(json, "dumps", lambda *args, **kwargs: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError):
        trainer.save()
    monkeypatch.undo()
    assert checkpoints(tmp_path) == [good] and Trainer(CONFIG, data(), tmp_path).resume()


def test_divergence_stops_with_a_reason(tmp_path):
    trainer = Trainer(CONFIG, data(), tmp_path)
    with torch.no_grad():
        trainer.unet.conv_in.weight.fill_(float("nan"))
    with pytest.raises(WorkError, match="resume from the last checkpoint"):
        trainer.train_step()


def test_bad_settings_are_named(tmp_path):
    with pytest.raises(InputError, match="prediction_type"):
        FinetuneConfig(prediction_type="epsilon")
    with pytest.raises(InputError, match="mixed_precision"):
        FinetuneConfig(mixed_precision="fp8")
    with pytest.raises(InputError, match="text_dropout"):
        FinetuneConfig(text_dropout=1.0)
    with pytest.raises(InputError, match="cannot read a UNet"):
        build_unet(FinetuneConfig(base=str(tmp_path)), 12)
