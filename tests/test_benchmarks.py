"""What benchmarks compare with must do the same work: the plain training loop."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from diffusers import DDPMScheduler

from tests.test_finetune import CONFIG, data
from trainer.finetune import Trainer
from trainer.schedule import scheduler_config

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def train(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("benchmarks_train", FOLDER / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_plain_loop_has_the_loss_of_ours(train, tmp_path):
    trainer = Trainer(CONFIG, data(), tmp_path)
    batch = trainer.batch(0, trainer.train_rows, 4)
    # The last noise level differs: the solver keeps it above zero.
    batch = batch._replace(timesteps=batch.timesteps.clamp_max(998))
    scheduler = DDPMScheduler(trained_betas=scheduler_config("v_prediction", 1.0, True)["trained_betas"], prediction_type="v_prediction")
    theirs = train.plain_loss(trainer.unet, scheduler, batch.clean, batch.noise, batch.timesteps, batch.text)
    assert theirs.item() == pytest.approx(trainer.loss(batch).item(), rel=1e-3)


def test_the_plain_loop_learns(train):
    config, waits = replace(CONFIG, batch_size=8), train.Waits()
    held = data()
    step = train.plain(config, held, True, False, waits)
    unet = next(cell.cell_contents for cell in step.__closure__ if isinstance(cell.cell_contents, torch.nn.Module))
    trainer = Trainer(config, held, "unused")

    def loss() -> float:
        with torch.no_grad():
            return trainer.loss(trainer.batch(-1, trainer.train_rows, 32), unet).item()

    before = loss()
    for _ in range(30):
        step()
    assert loss() < 0.9 * before and waits.seconds > 0
