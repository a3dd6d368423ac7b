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
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ..atlas import CHANNELS, Atlas, AtlasLayout, ChannelSpec, Normalization, from_atlas, in_cells, pack
from ..coverage import close_gaps
from ..errors import Cancelled, InputError, WorkError
from ..gaussians import Gaussians
from .bundle import MAX_STEPS, find_bundle, is_number, load_bundle, save_bundle
from .editing import Source, clean_estimate, set_start, shift_estimate
from .folding import fold, unfold, unwrap, wrap
from .guidance import embed_guidance
from .prior import AtlasPrior, damping, quieter
from .regression import TextRegression
from .text import TextEncoder

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

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
    notes: list[str] = field(default_factory=list)  # what a person should know, a line each: that a prompt was cut


class GaussianAtlasPipeline:
    """Text to 3D Gaussians.

    Args:
        unet: UNet2DConditionModel of 16 fold^2 channels, on the device and in the dtype to compute with.
        scheduler: DPMSolverMultistepScheduler; its configuration says what the network predicts.
        info: what bundle.json says: name, version, fold, defaults, ...
        model_hash: SHA-256 that names the model, for provenance.
        prior: whose estimate of the clean atlas the network corrects; None where it sees and predicts what the solver works with.
        regression: what the prompt alone says of the atlas, the mean of the prior; info["regression"] says how it and the network share.
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
        prior: AtlasPrior | None = None,
        regression: TextRegression | None = None,
    ) -> None:
        self.memory_format = fast_layout(unet.device, unet.dtype)
        self.unet: Any = unet.to(memory_format=self.memory_format)  # type: ignore[call-arg]  # diffusers types `to` as if not bound
        self.scheduler = scheduler
        self.text_encoder = text_encoder
        self.layout = layout
        self.normalization = normalization
        self.channels = channels
        self.info = info
        self.model_hash = model_hash
        self.prior = None if prior is None else prior.to(unet.device)
        damped = info.get("damping")
        self._damping = damping(layout.size, damped["above"], damped["variance"]).to(unet.device) if damped else None
        self._noise = (damped["above"], damped.get("noise", 1.0)) if damped else (0.0, 1.0)
        self.regression = regression
        self._shares = info.get("regression", {})
        if regression is not None:
            left = self._damping if self._damping is not None else torch.ones(layout.size, layout.size // 2 + 1, device=unet.device)
            self._left = left * self._shares["variance"]
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
        except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RuntimeError) as error:
            raise InputError(f"{bundle.directory}: the scheduler configuration is not usable: {error}") from error
        parts = (bundle.text_encoder, bundle.layout, bundle.normalization, bundle.channels, bundle.info, bundle.hash)
        pipeline = cls(unet, scheduler, *parts, bundle.prior, bundle.regression)
        pipeline.load_seconds = time.perf_counter() - started
        return pipeline

    def save_pretrained(self, directory: str | os.PathLike) -> Path:
        """Write the pipeline as a bundle, its weights as float16; raises what `save_bundle` raises."""
        config = {key: value for key, value in self.scheduler.config.items() if not key.startswith("_")}
        info = {key: value for key, value in self.info.items() if key not in ("format", "atlas", "files")}
        parts = (self.text_encoder, self.layout, self.normalization, self.channels, info)
        return save_bundle(directory, self.unet, config, *parts, prior=self.prior, regression=self.regression)

    @property
    def name(self) -> str:
        """Name and version of the model."""
        return f"{self.info.get('name', 'unnamed')} {self.info.get('version', '')}".strip()

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def distilled_guidance(self) -> float:
        """The most guidance that the network takes as an input, which it then needs one prediction for; 0 where it takes none."""
        return float(self.info.get("distilled_guidance", 0.0))

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
        mix_prompt: str | None = None,
        mix_weight: float = 0.5,
        init_atlas: Atlas | None = None,
        strength: float | None = None,
        mask: Tensor | None = None,
    ) -> GenerationOutput:
        """Sample objects. Object i of the call gets the seed `seed + i` and does not depend on the others.

        Args:
            negative_prompt: what guidance leads away from; by default nothing in particular.
            seed: 0 to 2^63 - 1; the same seed gives the same object, bit for bit on one machine with the same batch size.
            num_inference_steps: solver steps, 1 to 1000; by default the model's, else 20.
            guidance_scale: weight of classifier-free guidance (Ho and Salimans 2022); 1 and below turns it off, halving the
                work; by default the model's, else 3.5. A distilled model takes it as an input, at the work of none; above what it
                has learned, or with a negative prompt, guidance is made of two predictions as with any other model.
            num_samples_per_prompt: objects for each prompt.
            batch_size: objects that are sampled at once; more needs more memory.
            callback: called after every step, see StepCallback.
            cancel: looked at before every step.
            mix_prompt: a second prompt; what the network predicts for both is averaged in every step (composable diffusion, Liu et
                al. 2022), at the cost of one prediction more.
            mix_weight: of the second prompt; 0 is the first alone, 1 the second.
            init_atlas: start from this object, see `encode`: a variation of it, or with a mask other cells in it.
            strength: how much of the noise schedule is gone through again, 0 (the object itself) to 1 (nothing of it but the cells
                that a mask keeps); by default 0.5, and 1 with a mask.
            mask: [size, size] bool, the cells of `init_atlas` to make anew; the others stay, bit for bit.

        Raises:
            InputError: an argument is out of range, or `init_atlas` does not belong to this model.
            Cancelled: `cancel` was set.
            WorkError: the network gave numbers that are not finite.
        """
        defaults = self.info.get("defaults", {})
        steps = defaults.get("num_inference_steps", 20) if num_inference_steps is None else num_inference_steps
        guidance = defaults.get("guidance_scale", 3.5) if guidance_scale is None else guidance_scale
        check_arguments(
            prompt, negative_prompt, seed, steps, guidance, num_samples_per_prompt, batch_size, mix_prompt, mix_weight, strength
        )
        if init_atlas is None and (strength is not None or mask is not None):
            raise InputError("strength and mask need init_atlas, the object to start from")
        source = None if init_atlas is None else Source.of(init_atlas, strength, mask, self.layout, self.channels)
        trained = self.scheduler.config["num_train_timesteps"]
        if steps > trained:
            raise InputError(f"num_inference_steps must be at most {trained}, the steps this model was trained with, got {steps}")
        prompts = [text for text in ([prompt] if isinstance(prompt, str) else prompt) for _ in range(num_samples_per_prompt)]
        seeds = [seed + index for index in range(len(prompts))]

        started = time.perf_counter()
        _stop_if(cancel)
        if mix_prompt is not None and mix_weight == 1:
            mixed, mix_prompt = [mix_prompt] * len(prompts), None
        else:
            mixed = prompts
        positive, negative = self._encode(mixed), self._leading_away(negative_prompt, guidance)
        mix = None
        if mix_prompt is not None and mix_weight > 0:
            mix = _Mix(mix_prompt, self._encode([mix_prompt]), float(mix_weight))
        read = [*mixed, *([] if mix is None else [mix.prompt]), *([] if negative is None else [negative_prompt or ""])]
        notes = self.text_encoder.left_out(list(dict.fromkeys(read)))
        _stop_if(cancel)
        seconds = {"text": time.perf_counter() - started, "sample": 0.0, "decode": 0.0}
        output = GenerationOutput([], [], seeds, prompts, int(steps), float(guidance), seconds, notes)
        if source is not None and source.strength == 0:
            output.atlases.extend(source.atlas for _ in prompts)
            output.gaussians.extend(self._gaussians(source.atlas) for _ in prompts)
            return output
        strength = 1.0 if source is None else source.strength
        steps = len(self._scheduler(steps, strength).timesteps)
        total = steps * math.ceil(len(prompts) / batch_size)
        for start in range(0, len(prompts), batch_size):
            rows = slice(start, start + batch_size)
            report = None
            if callback is not None:
                before = start // batch_size * steps

                def report(step: int, preview: Callable[[], list[Gaussians]], before: int = before) -> None:
                    callback(before + step, total, preview)

            started = time.perf_counter()
            scheduler = self._scheduler(output.num_inference_steps, strength)
            expected = self._expected(mixed[rows], seeds[rows], guidance, mix)
            predict = self._predictor(positive[rows], negative, guidance, mix, expected)
            latents = self._sample(seeds[rows], scheduler, predict, source, report, cancel)
            seconds["sample"] += time.perf_counter() - started
            started = time.perf_counter()
            atlases = self._decode(latents, source)
            output.atlases.extend(atlases)
            output.gaussians.extend(self._gaussians(atlas, source) for atlas in atlases)
            seconds["decode"] += time.perf_counter() - started
        return output

    @torch.no_grad()
    def estimate(self, noisy: Tensor, prompts: list[str], timestep: int) -> Tensor:
        """The clean atlases that the network sees in noisy ones, without guidance: normalised [B, 16, H, W] float32, both.

        What a model adds at sampling is left out: damping, and the regression, of which the network is only a share.

        Args:
            noisy: alpha clean + sigma noise at `timestep` of the model's schedule.
            prompts: B, one for each.

        Raises:
            InputError: the atlases are not this model's, there is not one prompt for each, or the schedule has no such timestep.
        """
        check_arguments(prompts)
        size = self.layout.size
        if tuple(noisy.shape) != (len(prompts), CHANNELS, size, size):
            raise InputError(f"noisy must be [{len(prompts)}, {CHANNELS}, {size}, {size}] for so many prompts, got {list(noisy.shape)}")
        _check_count("timestep", timestep, 0, self.scheduler.config["num_train_timesteps"] - 1)
        factor = int(self.info.get("fold", 1))
        x, at = fold(noisy.to(self.unet.device, torch.float32), factor), torch.tensor(timestep, device=self.unet.device)
        prediction = self._predictor(self._encode(prompts), None, 1.0, None, damped=False)(x, at)
        clean = clean_estimate(prediction, x, *_level(self.scheduler, at), self.scheduler.config["prediction_type"])
        return unfold(clean, factor).to(noisy.device)

    def _encode(self, prompts: list[str]) -> Tensor:
        """Hidden states of the prompts [B, L, D]."""
        unique = list(dict.fromkeys(prompts))
        hidden = self.text_encoder.encode(unique).hidden[[*map(unique.index, prompts)]]
        return hidden.to(self.unet.device, self.unet.dtype)

    def _expected(self, prompts: list[str], seeds: list[int], guidance: float, mix: _Mix | None) -> Tensor | None:
        """What the regression expects of the prompts' atlases, normalised [B, 16, H, W]; None where there is none."""
        if self.regression is None:
            return None
        # Guidance of 2 gives colours the deviation that atlases have, 1 leaves them as they are.
        contrast = max(float(guidance) - 1, 0.0)
        counts = len(self.regression.keys), len(self.regression.builds)
        varied, chosen = torch.stack([_gumbel(sum(counts), seed) for seed in seeds]).split(counts, 1)
        chance = self._shares["variety"] * varied, self._shares["choice"] * chosen
        expected = self.regression.mean(self.text_encoder.sentences(prompts), contrast, *chance)
        if mix is not None:
            other = self.regression.mean(self.text_encoder.sentences([mix.prompt]).expand(len(seeds), -1), contrast, *chance)
            expected = torch.lerp(expected, other, mix.weight)
        return expected.to(self.unet.device)

    def _leading_away(self, negative_prompt: str | None, guidance: float) -> Tensor | None:
        """Hidden states of what guidance leads away from in a prediction of its own [1, L, D]; None where there is no such prediction."""
        named = negative_prompt if negative_prompt and negative_prompt.strip() else None
        if guidance <= 1 or (guidance <= self.distilled_guidance and named is None):
            return None
        hidden = (self.text_encoder.unconditional(1) if named is None else self.text_encoder.encode([named])).hidden
        return hidden.to(self.unet.device, self.unet.dtype)

    def _scheduler(self, steps: int, strength: float) -> DPMSolverMultistepScheduler:
        """A solver of its own, at the beginning of its timesteps: it keeps state, and another thread may be sampling."""
        # from_config gives a pair only where unused arguments are asked for.
        scheduler = cast("DPMSolverMultistepScheduler", type(self.scheduler).from_config(self.scheduler.config))
        set_start(scheduler, steps, strength, self.unet.device)
        return scheduler

    def _predictor(
        self,
        positive: Tensor,
        negative: Tensor | None,
        guidance: float,
        mix: _Mix | None,
        expected: Tensor | None = None,
        damped: bool = True,
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """What the network predicts for latents [B, C, H, W] at a timestep, guided and mixed, float32 of the same shape.

        Args:
            positive: [B, L, D].
            negative: [1, L, D], predicted for as well; None where there is no guidance, or the network knows it.
            expected: [B, 16, H, W], the mean of the prior. What is predicted is then the posterior mean, into which the network is mixed.
            damped: less is expected of fine structure, where the model says so.
        """
        # Whatever is the same in every step is made here. The network's dtype is one of these: to tell it, it looks through all its parts.
        texts = [positive] + ([] if mix is None else [mix.text]) + ([] if negative is None else [negative])
        text = torch.cat([each.expand_as(positive) for each in texts])
        count, dtype = len(texts), self.unet.dtype
        less = self._damping if damped else None
        columns, factor = int(self.info.get("wrap", 0)), int(self.info.get("fold", 1))
        inputs: dict[str, Any] = {"encoder_hidden_states": text, "return_dict": False}
        if self.distilled_guidance:
            scales = torch.full((len(text),), max(float(guidance), 1.0) if negative is None else 1.0)
            inputs["timestep_cond"] = embed_guidance(scales, self.unet.config.time_cond_proj_dim).to(text)

        def predict(latents: Tensor, timestep: Tensor) -> Tensor:
            if expected is None:
                return corrected(latents, timestep)
            alpha, sigma = _level(self.scheduler, timestep)
            deviation = unfold(latents, factor) - alpha * expected
            assert self.prior is not None  # whose mean is expected
            likely = fold(expected + self.prior.filter(deviation, alpha, sigma, self._left).mean, factor)
            share = self._shares["network"] if int(timestep) >= self._shares["above"] else 0.0
            return torch.lerp(likely, corrected(latents, timestep), share) if share else likely

        def corrected(latents: Tensor, timestep: Tensor) -> Tensor:
            known = None
            if self.prior is not None:
                known = self.prior.filter(unfold(latents, factor), *_level(self.scheduler, timestep), less)
                latents = fold(known.image, factor)
            batch = wrap(torch.cat([latents] * count), columns).to(dtype).contiguous(memory_format=self.memory_format)
            predictions = list(unwrap(self.unet(batch, timestep, **inputs)[0].float(), columns).chunk(count))
            without = None if negative is None else predictions.pop()
            found = predictions[0] if mix is None else torch.lerp(predictions[0], predictions[1], mix.weight)
            found = found if without is None else without + guidance * (found - without)
            # All of them correct the same estimate, so what was done to the corrections was done to the estimates.
            return found if known is None else fold(known.corrected(unfold(found, factor)), factor)

        return predict

    def _sample(
        self,
        seeds: list[int],
        scheduler: DPMSolverMultistepScheduler,
        predict: Callable[[Tensor, Tensor], Tensor],
        source: Source | None,
        report: Callable[[int, Callable[[], list[Gaussians]]], None] | None,
        cancel: threading.Event | None,
    ) -> Tensor:
        """Normalised atlases [B, 16, H, W], float32, by DPM-Solver++ (Lu et al. 2022) from the noise of each seed and the source."""
        factor = int(self.info.get("fold", 1))
        size = self.layout.size
        # On the CPU and one generator each: an object must depend neither on its neighbours nor on the device's generator.
        own = [torch.randn(CHANNELS, size, size, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        if self._noise[1] != 1:
            own = [quieter(one, *self._noise) for one in own]
        noise = fold(torch.stack(own), factor).to(self.unet.device) * scheduler.init_noise_sigma
        latents, kept, error = noise, None, None
        kind = scheduler.config["prediction_type"]
        if source is not None:
            clean = source.normalized(self.normalization, factor).to(noise).expand_as(noise)
            mask = source.folded_mask(factor)
            kept = None if mask is None else (~mask.to(noise.device), clean)
            if source.strength < 1:
                latents = _noised(scheduler, clean, noise, scheduler.timesteps[:1])
                _stop_if(cancel)
                error = (1 - source.strength) * self._error(clean, predict, scheduler)

        def preview(estimate: Tensor) -> list[Gaussians]:
            return [self._gaussians(atlas, source) for atlas in self._decode(unfold(estimate, factor), source)]

        for index, timestep in enumerate(scheduler.timesteps):
            _stop_if(cancel)
            if kept is not None:
                # The kept cells at this level, always by the same noise: the path that the solver takes to them.
                where, values = kept
                latents = torch.where(where, _noised(scheduler, values, noise, timestep[None]), latents)
            prediction = predict(scheduler.scale_model_input(latents, timestep), timestep)
            if error is not None:
                prediction = shift_estimate(prediction, error, *_level(scheduler, timestep), kind)
            latents = scheduler.step(prediction, timestep, latents, return_dict=False)[0]
            if report is not None:
                # DPM-Solver++ keeps its estimate of the clean atlas, in a list that is typed by the Nones it begins with.
                report(index + 1, partial(preview, cast(Tensor, scheduler.model_outputs[-1])))
        _stop_if(cancel)
        if not bool(torch.isfinite(latents).all()):
            raise WorkError(f"the network gave numbers that are not finite in {self.unet.dtype}; load the model with dtype=torch.float32")
        return unfold(latents, factor)

    def _error(self, clean: Tensor, predict: Callable[[Tensor, Tensor], Tensor], scheduler: DPMSolverMultistepScheduler) -> Tensor:
        """What the network lacks to give a clean atlas back at the lowest noise level, of its shape.

        A perfect one lacks nothing. A real one draws every object nearer to what it has learned, even without noise, so that the least
        variation would be another object; added to its estimates, the less the higher the strength, this keeps the source where
        there is no noise.
        """
        lowest = torch.zeros_like(scheduler.timesteps[0])
        alpha, sigma = _level(scheduler, lowest)
        x = alpha * clean
        return clean - clean_estimate(predict(x, lowest), x, alpha, sigma, scheduler.config["prediction_type"])

    def _decode(self, latents: Tensor, source: Source | None = None) -> list[Atlas]:
        raw = self.normalization.denormalize(latents.float().cpu())
        raw = raw if source is None else source.paste(raw)
        return [Atlas(values.contiguous(), self.layout.id, self.channels) for values in raw]

    @property
    def low_pass(self) -> float:
        """Standard deviation in object units by which generated Gaussians are wider than their atlas says; 0 where they are not."""
        return float(self.info.get("low_pass", 0.0))

    def encode(self, gaussians: Gaussians, cells: Tensor | None = None, low_pass: float | None = None) -> Atlas:
        """The atlas of an object that was generated, and changed since perhaps: what `init_atlas` takes.

        Args:
            gaussians: what a call gave, in any order, some of them deleted or altered; object frame.
            cells: [N] int64, the cell of each, -1 for none; by default Gaussian i is cell i. Cells without one become empty.
            low_pass: of the model that made the object, see the property; by default this model's.

        Raises:
            InputError: the cells are not those of this model's layout, or a number is not finite.
        """
        cells = torch.arange(len(gaussians)) if cells is None else cells
        if not bool(gaussians.finite().all()):
            raise InputError("gaussians contain NaN or infinity; keep those of Gaussians.finite()")
        ordered = in_cells(gaussians.detach().to("cpu", torch.float32), cells, self.layout)
        width = self.low_pass if low_pass is None else low_pass
        if width:
            # In double precision: a thin Gaussian is the difference of two nearly equal squares.
            squares = (ordered.scales.double() ** 2 - width**2).clamp_min(0)
            ordered = ordered.replace(scales=squares.sqrt().clamp_min(self.channels.min_scale).float())
        return pack(ordered, self.layout, self.channels)

    def _gaussians(self, atlas: Atlas, source: Source | None = None) -> Gaussians:
        """The Gaussians of a generated atlas, each widened by the low-pass that it was learned under, gaps between new ones closed.

        A fit sees its splats through the renderer's low-pass of 0.3 pixels squared, at the size of its views. Drawn larger, they would
        leave gaps; with that filter as part of them they look at any size as they did at the fit's (Mip-Splatting, Yu et al. 2024).
        """
        gaussians = from_atlas(atlas, self.layout)
        if self.low_pass:
            gaussians = gaussians.replace(scales=torch.sqrt(gaussians.scales**2 + self.low_pass**2))
        mask = None if source is None or source.mask is None else source.mask.flatten()
        return close_gaps(gaussians, float(self.info.get("coverage", 0.0)), mask)


@dataclass(frozen=True)
class _Mix:
    prompt: str
    text: Tensor  # [1, L, D]
    weight: float  # between 0 and 1


def _gumbel(count: int, seed: int) -> Tensor:
    """[count] of a standard Gumbel distribution, not those of the noise that the seed gives as well."""
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(seed ^ 0x9E3779B9)).clamp(1e-7, 1 - 1e-7)
    return -torch.log(-torch.log(uniform))


def _level(scheduler: DPMSolverMultistepScheduler, timestep: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma of x = alpha clean + sigma noise."""
    alpha2 = scheduler.alphas_cumprod[int(timestep)].to(timestep.device)
    return alpha2.sqrt(), (1 - alpha2).sqrt()


def _noised(scheduler: DPMSolverMultistepScheduler, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Clean values [B, ...] at the noise level of a timestep [1]."""
    return scheduler.add_noise(clean, noise, timesteps)  # type: ignore[arg-type]  # asks for IntTensor, but its own timesteps are int64


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
    try:
        # torch knows the names of more devices than it was built for, and of one, "meta", that holds no numbers.
        torch.zeros(1, device=resolved).cpu()
    except Exception as error:
        raise InputError(f"device {resolved} is not available: {' '.join(str(error).split())[:100]}; use auto or cpu") from error
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


def fast_layout(device: torch.device, dtype: torch.dtype) -> torch.memory_format:
    """The memory order in which a network of that dtype runs fastest there."""
    # oneDNN's bfloat16 convolutions reorder by themselves; group norms, and their gradients above all, are slower over channels last.
    slower = device.type == "cpu" and dtype == torch.bfloat16
    return torch.contiguous_format if slower else torch.channels_last


def check_arguments(
    prompt: object,
    negative_prompt: object = None,
    seed: object = 0,
    num_inference_steps: object = None,
    guidance_scale: object = None,
    num_samples_per_prompt: object = 1,
    batch_size: object = 4,
    mix_prompt: object = None,
    mix_weight: object = 0.5,
    strength: object = None,
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
    count = len(prompts) * _check_count("num_samples_per_prompt", num_samples_per_prompt, 1, 10_000)
    _check_count("batch_size", batch_size, 1, 10_000)
    _check_count("seed", seed, 0, MAX_SEED - count + 1)
    if num_inference_steps is not None:
        _check_count("num_inference_steps", num_inference_steps, 1, MAX_STEPS)
    if guidance_scale is not None and not is_number(guidance_scale):
        raise InputError(f"guidance_scale must be a finite number, got {guidance_scale!r}")
    if mix_prompt is not None and (not isinstance(mix_prompt, str) or not mix_prompt.strip()):
        raise InputError(f"mix_prompt must be text that is not empty, got {mix_prompt!r}")
    for name, value in (("mix_weight", mix_weight), ("strength", strength)):
        if not (name == "strength" and value is None) and not (is_number(value) and 0 <= value <= 1):
            raise InputError(f"{name} must be a number from 0 to 1, got {value!r}")


def _check_count(name: str, value: object, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InputError(f"{name} must be a whole number from {low} to {high}, got {value!r}")
    return value


def _stop_if(cancel: threading.Event | None) -> None:
    if cancel is not None and cancel.is_set():
        raise Cancelled("cancelled")
