"""From a prompt to Gaussians: guided sampling of an atlas by a 2D diffusion UNet.

The class follows the conventions of diffusers' pipelines (from_pretrained, save_pretrained, the names of the arguments) but
does not derive from DiffusionPipeline: half of its components (layout, normalization, channels) are no diffusers models, and
importing it takes seconds, which a wrong argument or a damaged bundle should not cost. diffusers' network and solver are
imported when a model is loaded.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..atlas import CHANNELS, Atlas, AtlasLayout, ChannelSpec, Normalization, from_atlas
from ..errors import Cancelled, InputError, WorkError
from ..gaussians import Gaussians
from .bundle import find_bundle, load_bundle, save_bundle
from .folding import fold, unfold
from .text import TextEncoder

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

MAX_STEPS = 1000
MAX_SEED = 2**63 - 1

# Called after each step with the steps done, the steps in all, and a function that decodes the objects as they look so far.
StepCallback = Callable[[int, int, Callable[[], list[Gaussians]]], None]


@dataclass(frozen=True)
class GenerationOutput:
    """What one call made, one entry an object: all objects of the first prompt, then of the second."""

    gaussians: list[Gaussians]  # object frame, unit box, float32 on the CPU
    atlases: list[Atlas]  # raw values, float32 on the CPU
    seeds: list[int]  # the seed that makes the object again
    prompts: list[str]
    num_inference_steps: int
    guidance_scale: float
    seconds: dict[str, float] = field(default_factory=dict)  # by stage: text, sample, decode


class GaussianAtlasPipeline:
    """Text to 3D Gaussians.

    Args:
        unet: UNet2DConditionModel of 16 fold^2 channels, on the device and in the dtype to compute with.
        scheduler: DPMSolverMultistepScheduler; its configuration says what the network predicts.
        info: what bundle.json says: name, version, fold, defaults, ...
        model_hash: SHA-256 that names the model, for provenance.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        scheduler: DPMSolverMultistepScheduler,
        text_encoder: TextEncoder,
        layout: AtlasLayout,
        normalization: Normalization,
        channels: ChannelSpec,
        info: dict,
        model_hash: str = "",
    ) -> None:
        self.unet = unet
        self.scheduler = scheduler
        self.text_encoder = text_encoder
        self.layout = layout
        self.normalization = normalization
        self.channels = channels
        self.info = info
        self.model_hash = model_hash
        self.load_seconds = 0.0

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike,
        device: str = "auto",
        dtype: torch.dtype | None = None,
        allow_download: bool = True,
        verify: bool = True,
    ) -> GaussianAtlasPipeline:
        """Load a bundle.

        Args:
            source: a folder, or the id of a model on the hub.
            device: "auto" (CUDA where there is one), "cpu", "cuda" or another torch device.
            dtype: of the network; by default what bundle.json says, and if that is "auto" what the device is fast with.
            allow_download: whether a hub id may be fetched over the network.
            verify: compare every file with its recorded SHA-256.

        Raises:
            InputError: there is no such model, it is damaged, or the device is not there.
        """
        started = time.perf_counter()
        where = resolve_device(device)
        bundle = load_bundle(find_bundle(source, allow_download), verify)
        if dtype is None:
            dtype = _resolve_dtype(bundle.info.get("inference", {}).get("dtype", "auto"), where)
        unet = bundle.load_unet(where, dtype)
        from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

        try:
            scheduler = DPMSolverMultistepScheduler.from_config(bundle.scheduler_config)
        except (TypeError, ValueError, NotImplementedError) as error:
            raise InputError(f"{bundle.directory}: the scheduler configuration is not usable: {error}") from error
        pipeline = cls(
            unet, scheduler, bundle.text_encoder, bundle.layout, bundle.normalization, bundle.channels, bundle.info, bundle.hash
        )
        pipeline.load_seconds = time.perf_counter() - started
        return pipeline

    def save_pretrained(self, directory: str | os.PathLike) -> Path:
        """Write the pipeline as a bundle, its weights as float16; raises what `save_bundle` raises."""
        config = {key: value for key, value in self.scheduler.config.items() if not key.startswith("_")}
        info = {key: value for key, value in self.info.items() if key not in ("format", "atlas", "files")}
        return save_bundle(directory, self.unet, config, self.text_encoder, self.layout, self.normalization, self.channels, info)

    @property
    def name(self) -> str:
        """Name and version of the model."""
        return f"{self.info.get('name', 'unnamed')} {self.info.get('version', '')}".strip()

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        negative_prompt: str | None = None,
        seed: int = 0,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_samples_per_prompt: int = 1,
        batch_size: int = 4,
        callback: StepCallback | None = None,
        cancel: threading.Event | None = None,
    ) -> GenerationOutput:
        """Sample objects. Object i of the call gets the seed `seed + i` and does not depend on the others.

        Args:
            negative_prompt: what guidance leads away from; by default nothing in particular.
            seed: 0 to 2^63 - 1; the same seed gives the same object, bit for bit on one machine with the same batch size.
            num_inference_steps: solver steps, 1 to 1000; by default the model's, else 20.
            guidance_scale: weight of classifier-free guidance (Ho and Salimans 2022); 1 and below turns it off, halving the
                work; by default the model's, else 3.5.
            num_samples_per_prompt: objects for each prompt.
            batch_size: objects that are sampled at once; more needs more memory.
            callback: called after every step, see StepCallback.
            cancel: looked at before every step.

        Raises:
            InputError: an argument is out of range.
            Cancelled: `cancel` was set.
            WorkError: the network gave numbers that are not finite.
        """
        defaults = self.info.get("defaults", {})
        steps = defaults.get("num_inference_steps", 20) if num_inference_steps is None else num_inference_steps
        guidance = defaults.get("guidance_scale", 3.5) if guidance_scale is None else guidance_scale
        check_arguments(prompt, negative_prompt, seed, steps, guidance, num_samples_per_prompt, batch_size)
        trained = self.scheduler.config.num_train_timesteps
        if steps > trained:
            raise InputError(f"num_inference_steps must be at most {trained}, the steps this model was trained with, got {steps}")
        prompts = [text for text in ([prompt] if isinstance(prompt, str) else prompt) for _ in range(num_samples_per_prompt)]
        seeds = [seed + index for index in range(len(prompts))]

        started = time.perf_counter()
        _stop_if(cancel)
        positive, negative = self._encode(prompts, negative_prompt if guidance > 1 else None)
        _stop_if(cancel)
        seconds = {"text": time.perf_counter() - started, "sample": 0.0, "decode": 0.0}
        output = GenerationOutput([], [], seeds, prompts, int(steps), float(guidance), seconds)
        total = steps * math.ceil(len(prompts) / batch_size)
        for start in range(0, len(prompts), batch_size):
            rows = slice(start, start + batch_size)
            report = None
            if callback is not None:
                before = start // batch_size * steps

                def report(step: int, preview: Callable[[], list[Gaussians]], before: int = before) -> None:
                    callback(before + step, total, preview)

            started = time.perf_counter()
            latents = self._sample(seeds[rows], positive[rows], negative, steps, guidance, report, cancel)
            seconds["sample"] += time.perf_counter() - started
            started = time.perf_counter()
            atlases = self._decode(latents)
            output.atlases.extend(atlases)
            output.gaussians.extend(self._gaussians(atlas) for atlas in atlases)
            seconds["decode"] += time.perf_counter() - started
        return output

    def _encode(self, prompts: list[str], negative_prompt: str | None) -> tuple[Tensor, Tensor]:
        """Hidden states of the prompts [B, L, D] and of what guidance leads away from [1, L, D]."""
        unique = list(dict.fromkeys(prompts))
        hidden = self.text_encoder.encode(unique).hidden
        positive = hidden[[unique.index(text) for text in prompts]]
        if negative_prompt and negative_prompt.strip():
            negative = self.text_encoder.encode([negative_prompt]).hidden
        else:
            negative = self.text_encoder.unconditional(1).hidden
        to = {"device": self.unet.device, "dtype": self.unet.dtype}
        return positive.to(**to), negative.to(**to)

    def _sample(
        self,
        seeds: list[int],
        positive: Tensor,
        negative: Tensor,
        steps: int,
        guidance: float,
        report: Callable[[int, Callable[[], list[Gaussians]]], None] | None,
        cancel: threading.Event | None,
    ) -> Tensor:
        """Normalised atlases [B, 16, H, W], float32, by DPM-Solver++ (Lu et al. 2022) from the noise of each seed."""
        factor = int(self.info.get("fold", 1))
        size = self.layout.size
        # On the CPU and one generator each: an object must depend neither on its neighbours nor on the device's generator.
        noise = [torch.randn(CHANNELS, size, size, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        # A solver of its own: it keeps state, and another thread may be sampling.
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        scheduler.set_timesteps(steps, device=self.unet.device)
        latents = fold(torch.stack(noise), factor).to(self.unet.device) * scheduler.init_noise_sigma
        guided = guidance > 1
        text = torch.cat([negative.expand_as(positive), positive]) if guided else positive
        layout = torch.channels_last if self.info.get("inference", {}).get("channels_last", True) else torch.contiguous_format
        for index, timestep in enumerate(scheduler.timesteps):
            _stop_if(cancel)
            batch = scheduler.scale_model_input(torch.cat([latents, latents]) if guided else latents, timestep)
            batch = batch.to(self.unet.dtype).contiguous(memory_format=layout)
            prediction = self.unet(batch, timestep, encoder_hidden_states=text, return_dict=False)[0].float()
            if guided:
                without, with_text = prediction.chunk(2)
                prediction = without + guidance * (with_text - without)
            latents = scheduler.step(prediction, timestep, latents, return_dict=False)[0]
            if report is not None:
                # DPM-Solver++ keeps its estimate of the clean atlas.
                clean = scheduler.model_outputs[-1]
                report(index + 1, lambda clean=clean: [self._gaussians(atlas) for atlas in self._decode(unfold(clean, factor))])
        _stop_if(cancel)
        if not bool(torch.isfinite(latents).all()):
            raise WorkError(f"the network gave numbers that are not finite in {self.unet.dtype}; load the model with dtype=torch.float32")
        return unfold(latents, factor)

    def _decode(self, latents: Tensor) -> list[Atlas]:
        raw = self.normalization.denormalize(latents.float().cpu())
        return [Atlas(values.contiguous(), self.layout.id, self.channels) for values in raw]


    def _gaussians(self, atlas: Atlas) -> Gaussians:
        """The Gaussians of a generated atlas, each widened by the low-pass that it was learned under.

        A fit sees its splats through the renderer's low-pass of 0.3 pixels squared, at the size of its views. Drawn larger, they would
        leave gaps; with that filter as part of them they look at any size as they did at the fit's (Mip-Splatting, Yu et al. 2024).
        """
        gaussians = from_atlas(atlas, self.layout)
        low_pass = float(self.info.get("low_pass", 0.0))
        return gaussians.replace(scales=torch.sqrt(gaussians.scales**2 + low_pass**2)) if low_pass else gaussians


def resolve_device(device: str | torch.device) -> torch.device:
    """The torch device of a name; "auto" is CUDA where there is one, else the CPU.

    Raises:
        InputError: no such device, or it is not there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"device must be auto, cpu or cuda, got {device!r}") from error
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise InputError("device cuda is not available: this torch sees no CUDA device; use auto or cpu")
    return resolved


def _resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    return fast_dtype(device) if name == "auto" else getattr(torch, name)


def fast_dtype(device: torch.device) -> torch.dtype:
    """The dtype in which a network runs fastest there: bfloat16, float16 or float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    # bfloat16 is several times faster where the CPU multiplies it itself, and several times slower where it does not.
    native = any(getattr(torch.cpu, name, lambda: False)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return torch.bfloat16 if device.type == "cpu" and native else torch.float32


def check_arguments(
    prompt: object,
    negative_prompt: object = None,
    seed: object = 0,
    num_inference_steps: object = None,
    guidance_scale: object = None,
    num_samples_per_prompt: object = 1,
    batch_size: object = 4,
) -> None:
    """Check the arguments of a pipeline's call without a pipeline; None is its default.

    Raises:
        InputError: one is out of range; the message names it.
    """
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, list | tuple) or not prompts or not all(isinstance(text, str) for text in prompts):
        raise InputError(f"prompt must be text or a list of texts, got {prompt!r}")
    for index, text in enumerate(prompts):
        if not text.strip():
            which = f"prompt {index}" if len(prompts) > 1 else "prompt"
            raise InputError(f'{which} is empty: describe an object, such as "a red armchair"')
    if negative_prompt is not None and not isinstance(negative_prompt, str):
        raise InputError(f"negative_prompt must be text, got {negative_prompt!r}")
    _check_count("num_samples_per_prompt", num_samples_per_prompt, 1, 10_000)
    _check_count("batch_size", batch_size, 1, 10_000)
    _check_count("seed", seed, 0, MAX_SEED - len(prompts) * num_samples_per_prompt + 1)
    if num_inference_steps is not None:
        _check_count("num_inference_steps", num_inference_steps, 1, MAX_STEPS)
    number = isinstance(guidance_scale, int | float) and not isinstance(guidance_scale, bool)
    if guidance_scale is not None and not (number and math.isfinite(guidance_scale)):
        raise InputError(f"guidance_scale must be a finite number, got {guidance_scale!r}")


def _check_count(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InputError(f"{name} must be a whole number from {low} to {high}, got {value!r}")


def _stop_if(cancel: threading.Event | None) -> None:
    if cancel is not None and cancel.is_set():
        raise Cancelled("cancelled")
