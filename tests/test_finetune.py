"""The noise schedule, the loop's exactness under resume, its checkpoints, and that it learns."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from diffusers import DPMSolverMultistepScheduler

from generator.atlas import AtlasLayout, ChannelSpec, NormalizationAccumulator
from generator.errors import InputError, WorkError
from generator.model.editing import clean_estimate
from trainer.finetune import PREDICTIONS, FinetuneConfig, Trainer, build_unet, checkpoints, trained_unet
from trainer.render_loss import RenderLoss
from trainer.schedule import alphas_cumprod, scheduler_config
from trainer.training_data import Decoding, TrainingData

ROOT = Path(__file__).resolve().parent.parent
UNET = {
    "sample_size": 8,
    "block_out_channels": (32, 32),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 8,
}
CONFIG = FinetuneConfig(
    unet=UNET,
    batch_size=4,
    learning_rate=2e-3,
    warmup_steps=2,
    max_steps=6,
    checkpoint_every=3,
    log_every=2,
    validation_share=0.25,
    mixed_precision="no",
)


def data(count: int = 8) -> TrainingData:
    generator = torch.Generator().manual_seed(0)
    atlases = torch.randn(count, 16, 1, 1, generator=generator).expand(-1, -1, 8, 8).half().contiguous()
    features = torch.randn(count, 4, 12, generator=generator)
    return TrainingData(atlases, [[i] for i in range(count)], features, [f"object-{i}" for i in range(count)], torch.zeros(4, 12))


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


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_all_predictions_have_the_same_loss(prediction_type):
    """A network may err in v, in the atlas or in the noise: it is the same error, counted in v."""
    zero_terminal_snr = prediction_type != "epsilon"
    trainer = Trainer(FinetuneConfig(unet=UNET, prediction_type=prediction_type, zero_terminal_snr=zero_terminal_snr), data(), "unused")
    batch = trainer.batch(0, trainer.train_rows, 4)
    clean, noise, timesteps = batch.clean, batch.noise, batch.timesteps
    alpha, sigma = (part.sqrt().view(-1, 1, 1, 1) for part in (trainer.alphas[timesteps], 1 - trainer.alphas[timesteps]))
    wrong = torch.full_like(clean, 0.3)
    output = {
        "v_prediction": alpha * noise - sigma * clean + wrong,
        "sample": clean - sigma.clamp_min(0.1**0.5) * wrong,
        "epsilon": noise + alpha.clamp_min(0.1**0.5) * wrong,
    }[prediction_type]
    trainer.unet.forward = lambda *args, **kwargs: (output,)
    assert trainer.loss(batch).item() == pytest.approx(0.09, rel=1e-4)
    # What it says of the clean atlas is right where the output is, at a noise that leaves something to be seen.
    right = {"v_prediction": alpha * noise - sigma * clean, "sample": clean, "epsilon": noise}[prediction_type]
    seen = alpha.flatten() > 0.05
    denoised = clean_estimate(right, alpha * clean + sigma * noise, alpha, sigma, prediction_type)
    torch.testing.assert_close(denoised[seen], clean[seen], atol=1e-4, rtol=1e-3)


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
    dropped = torch.cat([(trainer.batch(step, trainer.train_rows, 64).text == 0).all((1, 2)) for step in range(20)])
    assert 0.16 < dropped.float().mean() < 0.24


def test_plain_captions_and_own_colours_come_more_often():
    """12 objects of 4 rows, the first in its own colours; caption k of row r is text 4 r + k."""
    atlases = torch.zeros(48, 16, 8, 8)
    atlases[:, 0] = torch.arange(48)[:, None, None]
    features = torch.arange(4 * 48).reshape(-1, 1, 1).expand(-1, 4, 12) + 1.0
    captions = [[4 * row + k for k in range(4)] for row in range(48)]
    many = TrainingData(atlases, captions, features, [f"object-{row // 4}" for row in range(48)], torch.zeros(4, 12))

    def drawn(**changes) -> tuple[torch.Tensor, torch.Tensor]:
        trainer = Trainer(replace(CONFIG, text_dropout=0.0, validation_share=0.0, **changes), many, "unused")
        batches = [trainer.batch(step, trainer.train_rows, 64) for step in range(40)]
        rows = torch.cat([batch.clean[:, 0, 0, 0] for batch in batches]).long()
        text = torch.cat([batch.text[:, 0, 0] for batch in batches]).long() - 1
        assert torch.equal(text // 4, rows), "every atlas under its own captions"
        return rows, text % 4

    rows, picks = drawn()
    assert (rows % 4 == 0).float().mean() == pytest.approx(0.25, abs=0.03) and (picks == 0).float().mean() == pytest.approx(0.25, abs=0.03)
    rows, picks = drawn(plain_first=2.0, own_colours=0.4)
    assert (rows % 4 == 0).float().mean() == pytest.approx(0.4 + 0.6 / 4, abs=0.03)
    assert (picks == 0).float().mean() == pytest.approx(0.5, abs=0.03)
    assert torch.bincount(rows // 4, minlength=12).float().div(len(rows)).sub(1 / 12).abs().max() < 0.02, "objects stay equally often"


def test_noise_first_draws_more_of_high_noise_in_training_alone():
    trainer = Trainer(replace(CONFIG, noise_first=2.0), data(), "unused")
    timesteps = torch.cat([trainer.batch(step, trainer.train_rows, 64).timesteps for step in range(20)])
    # The share below t is 1 - sqrt(1 - t) for the square.
    for share in (0.25, 0.5, 0.75, 0.9):
        assert (timesteps < 1000 * share).float().mean() == pytest.approx(1 - (1 - share) ** 0.5, abs=0.02)
    assert timesteps.max() <= 999
    held = torch.cat([trainer.batch(-1 - i, trainer.validation_rows, 64).timesteps for i in range(20)])
    assert (held < 500).float().mean() == pytest.approx(0.5, abs=0.02)
    with pytest.raises(InputError, match="noise_first"):
        replace(CONFIG, noise_first=0.5)


def test_damaged_and_foreign_checkpoints_are_named(tmp_path):
    trainer = Trainer(CONFIG, data(), tmp_path)
    list(trainer.run(progress=False))
    newest = checkpoints(tmp_path)[-1]
    with pytest.raises(InputError, match="batch_size"):
        Trainer(FinetuneConfig(**{**vars(CONFIG), "batch_size": 5}), data(), tmp_path).resume()
    for state in ("", "[1]", "{}", '{"step": 1, "config": 3}', "[" * 100_000):
        (tmp_path / "bad" / "checkpoint-1").mkdir(parents=True, exist_ok=True)
        (tmp_path / "bad" / "checkpoint-1" / "state.json").write_text(state)
        with pytest.raises(InputError, match="checkpoint-1 is damaged"):
            Trainer(CONFIG, data(), tmp_path / "bad").resume()
    # Files that can be read and are of another network.
    for name, change in (
        ("unet", lambda key, value: {key[:-1] + "?": value}),
        ("ema", lambda key, value: {key: value[:1]}),
        ("optimizer", lambda key, value: {key.replace("/", "!"): value}),
        ("optimizer", lambda key, value: {f"exp_avq/{key.split('/')[1]}": value}),
        ("optimizer", lambda key, value: {key: torch.zeros(3)}),
    ):
        whole = (newest / f"{name}.safetensors").read_bytes()
        tensors = safetensors.torch.load(whole)
        key = next(key for key, value in tensors.items() if value.ndim)
        safetensors.torch.save_file(tensors | change(key, tensors.pop(key)), newest / f"{name}.safetensors")
        with pytest.raises(InputError, match="is damaged .*: delete it"):
            Trainer(CONFIG, data(), tmp_path).resume()
        (newest / f"{name}.safetensors").write_bytes(whole)
    assert Trainer(CONFIG, data(), tmp_path).resume()
    (newest / "ema.safetensors").write_bytes(b"half")
    with pytest.raises(InputError, match="damaged"):
        trained_unet(CONFIG, newest, 12)
    with pytest.raises(InputError, match="damaged"):
        Trainer(CONFIG, data(), tmp_path).resume()


@pytest.mark.parametrize(
    "changes,difference",
    [
        ({"prediction_type": "sample"}, "with prediction_type 'v_prediction', not 'sample'"),
        ({"shift": 3.0}, "with shift 1.0, not 3.0"),
        ({"fold": 2}, "with fold 1, not 2"),
        ({"unet": {**UNET, "attention_head_dim": 16}}, "with unet.attention_head_dim 8, not 16:"),
    ],
)
def test_a_network_is_read_with_the_settings_that_it_was_trained_with(tmp_path, changes, difference):
    trainer = Trainer(CONFIG, data(), tmp_path)
    trainer.train_step()
    checkpoint = trainer.save()
    for read in (
        lambda: trained_unet(replace(CONFIG, **changes), checkpoint, 12),
        Trainer(replace(CONFIG, **changes), data(), tmp_path).resume,
    ):
        with pytest.raises(InputError, match=difference) as caught:
            read()
        assert "\n" not in str(caught.value)
    # How it was trained may be left unsaid.
    trained_unet(replace(CONFIG, max_steps=1, learning_rate=1.0, batch_size=8), checkpoint, 12)


def test_a_network_goes_on_only_with_the_statistics_that_it_was_trained_with(tmp_path):
    from tests.test_prior import random_prior  # which imports this module

    held = decoded_data()
    held = replace(held, prior=random_prior(32, held.decoding.layout.id))
    trainer = Trainer(CONFIG, held, tmp_path)
    trainer.train_step()
    checkpoint = trainer.save()
    assert Trainer(CONFIG, held, tmp_path).resume()
    decoding = held.decoding
    shifted = replace(decoding.normalization, mean=decoding.normalization.mean + 1e-3)
    for other, name in (
        (replace(held, decoding=replace(decoding, normalization=shifted)), "normalization"),
        (replace(held, decoding=replace(decoding, layout=AtlasLayout.load_default(32, "equal_area"))), "layout"),
        (replace(held, decoding=replace(decoding, channels=replace(ChannelSpec(), min_scale=3e-5))), "specification of channels"),
        (replace(held, prior=random_prior(32, "another")), "prior"),
    ):
        for read in (
            Trainer(CONFIG, other, tmp_path).resume,
            lambda other=other: trained_unet(CONFIG, checkpoint, 12, statistics=other.statistics),
        ):
            with pytest.raises(InputError, match=f"was trained with another {name}: train anew .* or restore"):
                read()
    # A checkpoint from before they were kept.
    state = json.loads((checkpoint / "state.json").read_text())
    del state["statistics"]
    (checkpoint / "state.json").write_text(json.dumps(state))
    assert Trainer(CONFIG, replace(held, prior=None), tmp_path).resume()


@pytest.mark.parametrize("limit", [100, 2000, 20_000])
def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, limit):
    """Files that cannot grow beyond some bytes, as on a disk that fills up at that moment; the config's JSON is the smallest."""
    trainer = Trainer(CONFIG, data(), tmp_path)
    trainer.train_step()
    good = trainer.save()
    trainer.train_step()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(WorkError, match=f"cannot write .*make room and run the same command again; {good.name} is whole"):
            trainer.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert checkpoints(tmp_path) == [good] and not list(tmp_path.glob(".*"))
    again = Trainer(CONFIG, data(), tmp_path)
    assert again.resume() and again.step == 1


def test_a_lost_run_stops_with_a_reason(tmp_path):
    trainer = Trainer(CONFIG, data(), tmp_path)
    with torch.no_grad():
        trainer.unet.conv_in.weight.fill_(float("nan"))
    with pytest.raises(WorkError, match="the loss is nan at step 0: .*go on from the last checkpoint"):
        trainer.train_step()
    # A single outlier is noise; a mean that has grown manyfold is not, and it says so before the weights are worse still.
    trainer = Trainer(CONFIG, data(), tmp_path)
    for trainer.step in range(200):
        trainer._check(30.0 if trainer.step == 120 else 1.0)
    with pytest.raises(WorkError, match="the run diverges, its mean loss at step 2.. is 5.*, the lowest was 1.*: lower learning_rate"):
        for trainer.step in range(200, 300):
            trainer._check(20.0)


@pytest.mark.parametrize("changes", [{"micro_batch": 1}, {"micro_batch": 3}, {"prefetch": 0}, {"gradient_checkpointing": True}])
def test_how_a_batch_is_worked_through_does_not_change_the_run(tmp_path, changes):
    plain = [loss for _, loss in Trainer(CONFIG, data(), tmp_path / "a").run(progress=False)]
    other = [loss for _, loss in Trainer(replace(CONFIG, **changes), data(), tmp_path / "b").run(progress=False)]
    assert other == pytest.approx(plain, rel=1e-4)


def run_elsewhere(folder: Path, processes: int = 1, wait: bool = True) -> subprocess.Popen:
    """The same run in processes of their own; every loss goes to losses.txt as soon as it is there."""
    command = [sys.executable, "-m"] + (["torch.distributed.run", "--nproc-per-node", str(processes), "--module"] if processes > 1 else [])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen([*command, "tests.test_finetune", str(folder)], cwd=ROOT, env=environment)
    if wait:
        assert process.wait(300) == 0
    return process


def elsewhere(folder: str) -> None:
    torch.set_num_threads(1)
    trainer = Trainer(replace(CONFIG, max_steps=12, checkpoint_every=3), data(), folder)
    trainer.resume()
    for step, loss in trainer.run(progress=False):
        if trainer.accelerator.is_main_process:
            with open(f"{folder}/losses.txt", "a") as file:
                file.write(f"{step} {loss!r}\n")
        if trainer.accelerator.num_processes == 1:
            time.sleep(0.02)
    trainer.accelerator.end_training()


def losses_of(folder: Path) -> dict[int, float]:
    """The loss of every step; a line that a kill cut short is left out."""
    lines = (folder / "losses.txt").read_text().splitlines(keepends=True) if (folder / "losses.txt").is_file() else []
    return {int(line.split()[0]): float(line.split()[1]) for line in lines if line.endswith("\n")}


def test_two_processes_train_as_one(tmp_path):
    for name, processes in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        run_elsewhere(tmp_path / name, processes)
    one, two = losses_of(tmp_path / "one"), losses_of(tmp_path / "two")
    assert list(one) == list(two) == list(range(1, 13))
    assert list(two.values()) == pytest.approx(list(one.values()), rel=1e-4)
    assert [path.name for path in checkpoints(tmp_path / "two")] == ["checkpoint-00000009", "checkpoint-00000012"]


def test_killed_again_and_again_the_run_is_the_same_to_the_last_bit(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    run_elsewhere(whole)
    for steps in (2, 5, 8):  # between checkpoints, and after one
        process = run_elsewhere(killed, wait=False)
        while max(losses_of(killed), default=0) < steps:
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
        process.wait()
    run_elsewhere(killed)
    assert losses_of(killed) == losses_of(whole)
    a, b = (checkpoints(folder)[-1] for folder in (whole, killed))
    for name in ("unet", "ema", "optimizer"):
        assert (a / f"{name}.safetensors").read_bytes() == (b / f"{name}.safetensors").read_bytes(), name


# Losses on renders -----------------------------------------------------------------------------------------------------


def decoded_data(count: int = 4) -> TrainingData:
    """Atlases of 32 x 32 cells whose Gaussians lie on the layout's sphere, and what decodes them."""
    layout = AtlasLayout.load_default(32)
    generator = torch.Generator().manual_seed(3)
    values = torch.zeros(count, 16, 32, 32)
    values[:, :3] = -0.6 * layout.cell_sphere.T.reshape(3, 32, 32)
    values[:, [3, 7, 11]] = 3.0
    values[:, 4:7] = torch.rand(count, 3, 32, 32, generator=generator)
    values[:, [8, 10]] = -3.0
    accumulator = NormalizationAccumulator(layout.id)
    accumulator.update(values + 0.1 * torch.randn(values.shape, generator=generator))
    normalization = accumulator.result("channel")
    return replace(data(count), atlases=normalization.normalize(values), decoding=Decoding(layout, normalization, ChannelSpec()))


def test_render_loss_is_zero_for_the_same_atlas_and_leads_to_it():
    held = decoded_data()
    loss = RenderLoss(held.decoding, (1.0, 1.0, 0.0), 32, torch.device("cpu"))
    clean = held.atlases[:2]
    views, backgrounds = torch.tensor([[0.1, 0.5], [0.7, 0.9]]), torch.rand(2, 3)
    assert loss(clean, clean, views, backgrounds).abs().max() < 1e-6
    generator = torch.Generator().manual_seed(0)
    start = (clean + 0.5 * torch.randn(clean.shape, generator=generator)).requires_grad_()
    first = loss(start, clean, views, backgrounds).sum()
    slope = torch.autograd.grad(first, start)[0]
    assert torch.isfinite(slope).all() and slope[:, 4:7].abs().max() > 0, "colours are reached"
    # Down the slope it gets less, by what the slope says.
    step = 1e-3 / slope.norm()
    second = loss(start - step * slope, clean, views, backgrounds).sum()
    assert (first - second).item() == pytest.approx(1e-3 * slope.norm().item(), rel=0.2)


def test_losses_on_renders_join_after_their_start_and_at_low_noise_alone(tmp_path):
    config = replace(CONFIG, rgb_weight=1.0, mask_weight=0.5, render_from=0.5, render_ramp=0.25, render_size=16, max_steps=8, batch_size=8)
    trainer = Trainer(config, decoded_data(), tmp_path)
    assert [trainer.render_factor(step) for step in range(8)] == [0, 0, 0, 0, 0, 0.5, 1, 1]
    batch = trainer.batch(0, trainer.train_rows, 8)
    plain, more = trainer.loss(batch).item(), trainer.loss(batch, render_factor=1.0).item()
    assert more > plain
    noisy = batch._replace(timesteps=batch.timesteps.clamp_min(config.render_below))
    assert trainer.loss(noisy).item() == trainer.loss(noisy, render_factor=1.0).item()
    assert len(list(trainer.run(progress=False))) == 8
    with pytest.raises(InputError, match="renders need the layout"):
        Trainer(config, data(), tmp_path)


# LoRA --------------------------------------------------------------------------------------------------------------------


def test_lora_trains_additions_alone_and_merges_into_a_plain_network(tmp_path):
    config = replace(CONFIG, lora_rank=2)
    trainer = Trainer(config, data(), tmp_path)
    before = {name: value.clone() for name, value in trainer.unet.state_dict().items() if "lora" not in name}
    assert trainer.trainable and all("lora" in name for name in trainer.trainable)
    list(trainer.run(progress=False))
    after = trainer.unet.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    newest = checkpoints(tmp_path)[-1]
    merged = trained_unet(config, newest, 12)
    assert set(merged.state_dict()) == set(build_unet(replace(config, lora_rank=0), 12).state_dict()), "nothing of peft is left"
    now = {name: value.clone() for name, value in trainer.trainable.items()}
    with torch.no_grad(), trainer.averaged():
        batch = trainer.batch(0, trainer.train_rows, 4)
        ours, theirs = (unet.eval()(batch.clean, batch.timesteps, batch.text).sample for unet in (trainer.unet, merged))
        plain = build_unet(replace(config, lora_rank=0), 12).eval()(batch.clean, batch.timesteps, batch.text).sample
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert (ours - plain).abs().max() > 1e-3
    assert all(torch.equal(value, now[name]) for name, value in trainer.trainable.items()), "only for as long as it lasts"


def test_bad_settings_are_named(tmp_path):
    for changes, message in (
        ({"prediction_type": "x"}, "prediction_type must be"),
        ({"prediction_type": "epsilon"}, "zero_terminal_snr"),
        ({"mixed_precision": "fp8"}, "mixed_precision"),
        ({"text_dropout": 1.0}, "text_dropout"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"checkpoint_every": 0}, "checkpoint_every must be at least 1"),
        ({"log_every": 0}, "log_every must be at least 1"),
        ({"fold": 0}, "fold must be at least 1"),
    ):
        with pytest.raises(InputError, match=message):
            FinetuneConfig(**changes)
    with pytest.raises(InputError, match="no unet/config.json"):
        build_unet(FinetuneConfig(base=str(tmp_path)), 12)


if __name__ == "__main__":
    elsewhere(sys.argv[1])
