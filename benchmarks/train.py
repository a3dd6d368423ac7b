"""The fine-tuning loop: samples a second, memory, the share of a step that waits for its batch, in turns with a plain loop.

The plain loop stands for diffusers' text-to-image training script, written anew from what it does: accelerate, a DataLoader, the
scheduler's noise and velocity, one mean square error, AdamW, diffusers' EMAModel. It finds its latents and text features in memory; the
fine-tuning loop reads atlases from shards on the disk. Every measurement has a process of its own.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from _report import alone, report
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from generator.atlas import Atlas, AtlasLayout, ChannelSpec, NormalizationAccumulator
from generator.model.folding import fold
from generator.model.pipeline import fast_dtype, resolve_device
from generator.model.text import TextEncoder
from trainer.dataset import write_shards
from trainer.finetune import FinetuneConfig, Trainer, build_unet
from trainer.presets import PRESETS
from trainer.schedule import scheduler_config
from trainer.training_data import TrainingData, from_shards

OBJECTS = 128
# Stable Diffusion 2.1's UNet, as diffusers' configuration has it but for the channels, which are an atlas's.
SD_2_1 = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280, 1280),
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
SD_2_1_TEXT = (77, 1024)
LOOPS = ("plain", "plain, channels last", "ours")


def settings(name: str) -> FinetuneConfig:
    """The preset's loop without an end, without losses on renders; at full size the network has random weights."""
    config = replace(PRESETS[name].finetune, rgb_weight=0.0, mask_weight=0.0, lpips_weight=0.0, warmup_steps=0, decay_steps=0)
    return replace(config, base="", unet=SD_2_1) if config.base else config


def training_set(name: str, folder: Path) -> TrainingData:
    """Random atlases of the preset's size, in shards, with captions; at full size random text features of that width."""
    preset, generator = PRESETS[name], torch.Generator().manual_seed(0)
    layout, spec = AtlasLayout.load_default(preset.size, preset.projection), ChannelSpec()
    accumulator, samples = NormalizationAccumulator(layout.id), []
    for index in range(OBJECTS):
        values = torch.rand(16, preset.size, preset.size, generator=generator)
        accumulator.update(values)
        record = {"object": f"object-{index}", "captions": [f"object number {index}"]}
        samples.append((record["object"], Atlas(values, layout.id, spec), record))
    write_shards(samples, folder)
    data = from_shards(folder, accumulator.result(preset.normalization), TextEncoder.default(), layout)
    if not preset.finetune.base:
        return data
    features = torch.randn(OBJECTS, *SD_2_1_TEXT, generator=generator).half()
    return replace(data, features=features, unconditional=torch.zeros(SD_2_1_TEXT), encoder=None)


# The two loops ------------------------------------------------------------------------------------------------------------


class Waits:
    """Seconds spent waiting for batches."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timing(self, work: Callable) -> Callable:
        """`work`, with its seconds counted."""

        def timed():
            start = time.perf_counter()
            try:
                return work()
            finally:
                self.seconds += time.perf_counter() - start

        return timed


def ours(config: FinetuneConfig, data: TrainingData, folder: Path, waits: Waits) -> Callable[[], object]:
    """A step of the fine-tuning loop."""
    trainer = Trainer(config, data, folder, "auto" if torch.cuda.is_available() else "cpu")
    trainer._next = waits.timing(trainer._next)
    # Noise is all that random atlases hold: nothing is to be said of how it is learned.
    trainer._check = lambda loss: None
    return trainer.train_step


def plain_loss(unet: torch.nn.Module, scheduler: object, latents: Tensor, noise: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
    """Mean square error of the velocity at noised latents [B, C, H, W]."""
    noisy = scheduler.add_noise(latents, noise, timesteps)
    predicted = unet(noisy, timesteps, text, return_dict=False)[0]
    return torch.nn.functional.mse_loss(predicted.float(), scheduler.get_velocity(latents, noise, timesteps).float())


def plain(config: FinetuneConfig, data: TrainingData, channels_last: bool, bf16: bool, waits: Waits) -> Callable[[], object]:
    """A step of the plain loop."""
    from accelerate import Accelerator
    from diffusers import DDPMScheduler
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="bf16" if bf16 else "no")
    solver = scheduler_config("v_prediction", config.shift, config.zero_terminal_snr)
    scheduler = DDPMScheduler(trained_betas=solver["trained_betas"], prediction_type="v_prediction")
    unet = build_unet(config, data.text_width).to(accelerator.device)
    unet = unet.to(memory_format=torch.channels_last) if channels_last else unet
    averaged = EMAModel(unet.parameters(), decay=config.ema_decay, model_config=unet.config)
    averaged.to(accelerator.device)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    rows = list(range(len(data.atlases)))
    latents = torch.cat([fold(data.atlases[rows[i : i + 16]].float(), config.fold) for i in range(0, len(rows), 16)])
    text = data.features[[of_one[0] for of_one in data.captions]].float()
    loader = DataLoader(TensorDataset(latents, text), shuffle=True, batch_size=config.batch_size, drop_last=True)
    rate = get_scheduler("constant", optimizer)
    unet, optimizer, loader, rate = accelerator.prepare(unet, optimizer, loader, rate)
    unet.train()

    def endless() -> Iterator[list[Tensor]]:
        while True:
            yield from loader

    batches = endless()
    following = waits.timing(lambda: next(batches))

    def step() -> None:
        clean, features = following()
        noise = torch.randn_like(clean)
        timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (len(clean),), device=clean.device)
        loss = plain_loss(unet, scheduler, clean, noise, timesteps, features)
        accelerator.gather(loss.repeat(len(clean))).mean().item()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(unet.parameters(), config.gradient_clip)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        averaged.step(unet.parameters())

    return step


# Measuring ----------------------------------------------------------------------------------------------------------------


def measure(name: str, loop: str, least: float) -> dict:
    """One loop for at least so many seconds, after two steps to warm up."""
    torch.manual_seed(0)
    config, waits = settings(name), Waits()
    with tempfile.TemporaryDirectory() as folder:
        data = training_set(name, Path(folder) / "shards")
        if loop == "ours":
            step = ours(config, data, Path(folder) / "run", waits)
        else:
            step = plain(config, data, "channels last" in loop, fast_dtype(resolve_device("auto")) == torch.bfloat16, waits)
        cuda = torch.cuda.is_available()
        finished = torch.cuda.synchronize if cuda else lambda: None
        for _ in range(2):
            step()
        finished()
        waits.seconds, steps, start = 0.0, 0, time.perf_counter()
        while (seconds := time.perf_counter() - start) < least or steps < 3:
            step()
            finished()
            steps += 1
        seconds = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated() if cuda else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found = {"samples/s": steps * config.batch_size / seconds, "waiting": waits.seconds / seconds, "peak GB": peak / 1e9}
        return found | {"GPU busy": busy(step) if cuda else None}


def busy(step: Callable[[], object], steps: int = 5) -> float:
    """Share of the time in which the GPU computes, by its kernels' times."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        start = time.perf_counter()
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    return sum(event.self_device_time_total for event in found.key_averages()) / 1e6 / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", default=["tiny", "starter", "paper"], help="(default: tiny starter paper)")
    parser.add_argument("--seconds", type=float, default=10, help="of every measurement, at least (default: 10)")
    parser.add_argument("--rounds", type=int, default=2, help="turns that the loops take (default: 2)")
    options = parser.parse_args()
    rows = []
    for name in options.presets:
        config = settings(name)
        if PRESETS[name].finetune.base and not torch.cuda.is_available():
            print(f"{name}: left out, a network of Stable Diffusion's full size at batch {config.batch_size} needs a CUDA device\n")
            continue
        turns = {loop: [] for loop in LOOPS}
        for _ in range(options.rounds):
            for loop, found in turns.items():
                found.append(alone(measure, name, loop, options.seconds))
                print(name, loop, found[-1], flush=True)
        for loop, found in turns.items():
            row = {"preset": name, "batch": config.batch_size, "loop": loop}
            for key in ("samples/s", "waiting", "peak GB"):
                row[key] = statistics.median(each[key] for each in found)
            shares = [each["GPU busy"] for each in found if each["GPU busy"] is not None]
            row["GPU busy"] = statistics.median(shares) if shares else "-"
            against = [ours["samples/s"] / theirs["samples/s"] for ours, theirs in zip(found, turns["plain"], strict=True)]
            rows.append(row | {"of plain": statistics.median(against)})
    if rows:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
        note = f"{device}; median of {options.rounds} turns; no losses on renders; random atlases, at full size random weights and text"
        report("train", rows, note)


if __name__ == "__main__":
    main()
