"""Sampling: what few steps cost in quality, what precision, memory order and a compiler are worth in seconds, and 16,384 Gaussians.

`steps` compares objects of few steps with those that the same seeds give after many, for several solvers. `settings` times the bundled
model. `large` times networks of random weights: they stand in for models of 16,384 Gaussians that nobody has trained, for their time alone.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from _atlases import PROMPTS, foreground_psnr
from _report import alone, report

from generator.atlas import AtlasLayout, Normalization
from generator.errors import InputError
from generator.gaussians import Gaussians
from generator.model.guidance import with_guidance_input
from generator.model.pipeline import GaussianAtlasPipeline, fast_dtype, resolve_device
from generator.render import Cameras, render, save_png
from trainer.evaluate.judge import Judge, evaluate_set

MODEL = Path("models/starter")
STEPS = (4, 6, 8, 10, 15, 20, 30, 50)
# Changes of the bundle's solver, which is DPM-Solver++ of order 2 with trailing timesteps.
SOLVERS = {
    "order 2": {},
    "order 1": {"solver_order": 1},
    "order 3": {"solver_order": 3},
    "Karras sigmas": {"use_karras_sigmas": True},
    "even log-SNR": {"use_lu_lambdas": True},
    "linspace": {"timestep_spacing": "linspace"},
}
SD_2_1 = {  # Stable Diffusion 2.1's UNet, with the channels of an atlas
    "block_out_channels": (320, 640, 1280, 1280),
    "attention_head_dim": (5, 10, 20, 20),
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}


# Quality against steps --------------------------------------------------------------------------------------------------


class Sampler:
    """Objects of fixed prompts and seeds."""

    def __init__(self, model: Path, prompts: tuple[str, ...], seeds: int) -> None:
        self.pipeline = GaussianAtlasPipeline.from_pretrained(model)
        # Without what diffusers notes of defaults: it would set those back that a solver changes.
        self.config = {key: value for key, value in self.pipeline.scheduler.config.items() if not key.startswith("_")}
        self.prompts, self.seeds = list(prompts), seeds

    def __call__(self, steps: int, solver: dict) -> tuple[torch.Tensor, list[Gaussians]]:
        """Normalised atlases [N, 16, H, W] and their Gaussians."""
        self.pipeline.scheduler = type(self.pipeline.scheduler).from_config(self.config | solver)
        out = self.pipeline(self.prompts, num_inference_steps=steps, num_samples_per_prompt=self.seeds, batch_size=1)
        values = torch.stack([self.pipeline.normalization.normalize(atlas.values) for atlas in out.atlases])
        return values, out.gaussians


def apart(values: torch.Tensor, others: torch.Tensor) -> float:
    """Root mean square difference of atlases, mean over the objects."""
    return (values - others).square().mean((1, 2, 3)).sqrt().mean().item()


def compare(name: str, steps: int, made: tuple, reference: tuple, judged: Callable[[list[Gaussians]], dict]) -> dict:
    """A row of the table."""
    decibels = [foreground_psnr(ours, theirs) for ours, theirs in zip(made[1], reference[1], strict=True)]
    row = {"solver": name, "steps": steps, "distance": round(apart(made[0], reference[0]), 4)}
    return row | {"dB": round(statistics.fmean(decibels), 1), "worst dB": round(min(decibels), 1)} | judged(made[1])


def steps(options: argparse.Namespace) -> None:
    """Rows of every solver and number of steps, and pictures where they are wanted."""
    sampler = Sampler(options.model, PROMPTS[: options.prompts], options.seeds)
    reference = sampler(options.reference, {})
    judge = Judge.load(options.judge) if options.judge else None

    def judged(objects: list[Gaussians]) -> dict:
        """The judge's numbers, where there is one."""
        if judge is None:
            return {}
        found = evaluate_set(judge, [(sampler.prompts[index // options.seeds], each) for index, each in enumerate(objects)])
        return {"judge": round(found["score"], 3), "R-precision": round(found["r_precision"], 2)}

    rows, strips = [compare("order 2", options.reference, reference, reference, judged)], {}
    if options.seeds > 1:
        # What is large: objects of one prompt and different seeds.
        turned = torch.arange(len(reference[1])).view(-1, options.seeds).roll(1, 1).flatten()
        other = (reference[0][turned], [reference[1][i] for i in turned])
        rows.append(compare("another seed", options.reference, other, reference, judged))
    samplers = [("", sampler)]
    if options.student:
        samplers.append((f"{options.student.parent.name}: ", Sampler(options.student, PROMPTS[: options.prompts], options.seeds)))
    for prefix, each in samplers:
        for name, changes in SOLVERS.items():
            if name not in options.solvers:
                continue
            for count in options.steps:
                try:
                    made = each(count, changes)
                except (InputError, ValueError) as error:
                    print(f"{prefix}{name}, {count} steps: {error}")
                    continue
                rows.append(compare(prefix + name, count, made, reference, judged))
                strips.setdefault(prefix + name, []).append(made[1])
                print(*rows[-1].values(), flush=True)
    if options.pictures:
        draw(options.pictures, {**strips, "reference": [reference[1]]}, options.seeds)
    note = (
        f"{sampler.pipeline.name}, {sampler.pipeline.unet.dtype}, {len(reference[1])} objects: against those of the same seeds after "
        f"{options.reference} steps of the bundle's solver. distance: root mean square of normalised values; dB: object pixels, four views"
    )
    report("sample-steps", rows, note)


def draw(folder: Path, strips: dict[str, list[list[Gaussians]]], seeds: int) -> None:
    """A picture a solver: a row for each prompt, a column for each number of steps."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, made in strips.items():
        lines = []
        for index in range(0, len(made[0]), seeds):
            lines.append(torch.cat([render(each[index], Cameras.orbit(2, 160)[:1], background=(1, 1, 1)).rgb[0] for each in made], 1))
        save_png(torch.cat(lines), folder / f"{name.replace(': ', '-').replace(' ', '-')}.png")


# Seconds ----------------------------------------------------------------------------------------------------------------


def timed(pipeline: GaussianAtlasPipeline, count: int, guidance: float, repeats: int) -> dict:
    """Median seconds of each stage of one object, after a first one that is told apart, and this process's peak memory."""
    arguments = {"num_inference_steps": count, "guidance_scale": guidance}
    start = time.perf_counter()
    pipeline("a red armchair", **arguments)
    first = time.perf_counter() - start
    cuda = pipeline.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    runs = [pipeline("a red armchair", seed=seed, **arguments).seconds for seed in range(repeats)]
    stages = {f"{stage} s": statistics.median(run[stage] for run in runs) for stage in runs[0]}
    peak = torch.cuda.max_memory_allocated() if cuda else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return stages | {"total s": statistics.median(sum(run.values()) for run in runs), "first s": first, "peak GB": peak / 1e9}


def bundled(model: str, dtype: str, channels_last: bool, compiled: str, count: int, guidance: float, repeats: int) -> dict:
    """A row for the model of a bundle; `compiled` is "", "inductor" or "inductor, frozen"."""
    pipeline = GaussianAtlasPipeline.from_pretrained(model, dtype=getattr(torch, dtype))
    pipeline.memory_format = torch.channels_last if channels_last else torch.contiguous_format
    pipeline.unet.to(memory_format=pipeline.memory_format)
    # Compiled anew, not found where an earlier run has left it.
    cache = os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="inductor-")
    try:
        if compiled:
            from torch._inductor import config as inductor

            inductor.freezing = "frozen" in compiled
            pipeline.unet.compile()
        return timed(pipeline, count, guidance, repeats)
    finally:
        shutil.rmtree(cache, ignore_errors=True)


def settings(options: argparse.Namespace) -> None:
    """Rows by precision, memory order and compiler, each in a process of its own."""
    rows, fast = [], str(fast_dtype(resolve_device("auto"))).removeprefix("torch.")
    choices = [(dtype, last, "") for dtype in dict.fromkeys(("float32", fast)) for last in (False, True)]
    if shutil.which(os.environ.get("CXX", "g++")):
        choices += [(dtype, True, compiled) for dtype in dict.fromkeys(("float32", fast)) for compiled in ("inductor", "inductor, frozen")]
    else:
        print("no C++ compiler here: torch.compile is left out\n")
    for dtype, last, compiled in choices:
        row = {"dtype": dtype, "channels last": last, "compiled": compiled or "no"}
        rows.append(row | alone(bundled, str(options.model), dtype, last, compiled, 20, 3.5, options.repeats))
        print(*rows[-1].values(), flush=True)
    report("sample-settings", rows, f"{options.model}: one object of 20 steps, guidance 3.5, median of {options.repeats}")


def stand_in(size: int, fold: int, unet: dict, once: bool, device: torch.device) -> GaussianAtlasPipeline:
    """A model of random weights: the starter's text encoder, solver and statistics, another atlas and network.

    Args:
        unet: changes of the starter's UNet.
        once: whether the network takes guidance as an input, and a step one prediction.
    """
    from diffusers import UNet2DConditionModel

    pipeline = GaussianAtlasPipeline.from_pretrained(MODEL, device="cpu", dtype=torch.float32)
    config = {key: value for key, value in pipeline.unet.config.items() if not key.startswith("_")}
    channels = {"in_channels": 16 * fold**2, "out_channels": 16 * fold**2, "sample_size": size // fold}
    torch.manual_seed(0)
    network = UNet2DConditionModel(**(config | channels | unet)).eval().requires_grad_(False)
    network = with_guidance_input(network) if once else network
    dtype = fast_dtype(device)
    layout, old = AtlasLayout.load_default(size), pipeline.normalization
    mean, std = (value.mean((1, 2), keepdim=True).expand(-1, size, size).clone() for value in (old.mean, old.std))
    return GaussianAtlasPipeline(
        network.to(device, dtype),
        pipeline.scheduler,
        pipeline.text_encoder,
        layout,
        Normalization(mean, std, old.minimum, old.maximum, "cell", layout.id),
        pipeline.channels,
        {"name": "stand-in", "fold": fold, "distilled_guidance": 8.0 if once else 0.0, "low_pass": pipeline.low_pass},
    )


def large_one(size: int, fold: int, unet: dict, once: bool, count: int, repeats: int) -> dict:
    """A row for a stand-in."""
    device = resolve_device("auto")
    pipeline = stand_in(size, fold, unet, once, device)
    parameters = sum(value.numel() for value in pipeline.unet.parameters())
    return {"M parameters": round(parameters / 1e6, 1), "dtype": str(pipeline.unet.dtype)[6:]} | timed(pipeline, count, 3.5, repeats)


def large(options: argparse.Namespace) -> None:
    """Rows of networks for 128 x 128 cells, each in a process of its own; at Stable Diffusion's size on a GPU alone."""
    rows = []
    networks = [("starter's channels", 4, {}), ("starter's channels", 2, {})]
    if torch.cuda.is_available():
        four = {"down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), "layers_per_block": 2, "addition_embed_type": None}
        four |= {"up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3, "cross_attention_dim": 384}
        networks.append(("Stable Diffusion 2.1's, text of width 384", 1, SD_2_1 | four))
    else:
        print("no CUDA device here: the network of Stable Diffusion 2.1's size is left out\n")
    for name, fold, unet in networks:
        for count in (20, 10):
            for once in (False, True):
                row = {"network": name, "fold": fold, "steps": count, "predictions a step": 1 if once else 2}
                rows.append(row | alone(large_one, 128, fold, unet, once, count, options.repeats))
                print(*rows[-1].values(), flush=True)
    note = "random weights, for time alone: prompt to 16,384 Gaussians with the model in memory, guidance 3.5"
    report("sample-large", rows, f"{note}, median of {options.repeats}")


PARTS = {"steps": steps, "settings": settings, "large": large}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=(*PARTS, "all"), default="all", help="(default: all)")
    parser.add_argument("--model", type=Path, default=MODEL, help=f"a bundle (default: {MODEL})")
    parser.add_argument("--repeats", type=int, default=5, help="timed objects (default: 5)")
    parser.add_argument("--prompts", type=int, default=4, help=f"steps: prompts, {len(PROMPTS)} at most (default: 4)")
    parser.add_argument("--seeds", type=int, default=2, help="steps: objects of each prompt (default: 2)")
    parser.add_argument("--reference", type=int, default=100, help="steps: steps of what is compared with (default: 100)")
    parser.add_argument(
        "--steps", type=int, nargs="+", default=STEPS, help=f"steps: numbers of steps (default: {' '.join(map(str, STEPS))})"
    )
    parser.add_argument("--solvers", nargs="+", choices=SOLVERS, default=list(SOLVERS), help="steps: solvers (default: all)")
    parser.add_argument("--student", type=Path, help="steps: another bundle of the same layout, such as a distilled one, against the same")
    parser.add_argument("--judge", type=Path, help="steps: a judge's file (trainer.evaluate.judge), whose scores are then told too")
    parser.add_argument("--pictures", type=Path, help="steps: folder for a picture of every solver")
    options = parser.parse_args()
    for name in PARTS if options.part == "all" else (options.part,):
        PARTS[name](options)


if __name__ == "__main__":
    main()
