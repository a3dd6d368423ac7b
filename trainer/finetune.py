"""The fine-tuning loop: a 2D diffusion UNet learns to denoise atlases (section 5 of the paper).

Everything random in a step - which objects, which captions, noise, timesteps, dropout - is drawn from a generator seeded by
(seed, step). A run resumed at step k therefore sees exactly what an uninterrupted run would have seen from step k on.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from generator.atlas import CHANNELS
from generator.errors import InputError, WorkError
from generator.files import parse_json
from generator.model.bundle import Bundle
from generator.model.editing import clean_estimate
from generator.model.folding import fold, unfold, unwrap, wrap
from generator.model.guidance import embed_guidance, with_guidance_input
from generator.model.pipeline import fast_dtype, fast_layout
from generator.model.widen import widen_unet

from .base import load_base
from .render_loss import RenderLoss
from .schedule import alphas_cumprod, schedule_of
from .training_data import TrainingData

ATTRIBUTES = ("position", "color", "scale", "rotation")  # the four groups of four channels
PREDICTIONS = ("v_prediction", "sample", "epsilon")
_ALL = slice(None)
# Steps that a mean loss is taken over to tell divergence from noise.
_MEAN_OVER = 100


@dataclass(frozen=True)
class FinetuneConfig:
    """How the network is trained. The defaults are the paper's where the paper says.

    Raises:
        InputError: a field is out of range, or two contradict each other.
    """

    # A 4-channel latent-diffusion model to widen (diffusers folder, .safetensors file, hub id), or a bundle to go on from; empty: `unet`
    base: str = ""
    base_licence: str = ""  # of the base, where its card does not say
    unet: dict = field(default_factory=dict)  # UNet2DConditionModel arguments, used without a base, from random weights
    text_encoder: str = ""  # empty: the base's own, else MiniLM; or minilm; or a folder with text_encoder/ and tokenizer/
    unconditional: str = "zeros"  # what stands for no prompt: zeros, or the "empty" prompt as Stable Diffusion has it
    lora_rank: int = 0  # above 0 only low-rank additions to the attention are trained (Hu et al. 2021)
    fold: int = 1  # cells per side folded into channels: 1 is the paper's plain input, more is cheaper
    wrap: int = 0  # columns of the folded image seen again beyond the left and the right border, where an atlas comes round
    prior: bool = False  # the network corrects the estimate of a Gaussian with the atlases' covariance (`generator.model.prior`)
    prediction_type: str = "v_prediction"  # or what the network gives: the clean atlas ("sample") or the noise ("epsilon"); one loss
    shift: float = 1.0  # divides the signal-to-noise ratio by its square; above 1 trains more on the coarse shape
    zero_terminal_snr: bool = True  # the last timestep is pure noise, as at sampling
    min_snr_gamma: float = 0.0  # Hang et al. 2023; 0 turns it off
    channel_weights: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)  # loss weight of each of `ATTRIBUTES`
    rgb_weight: float = 0.0  # on L1 of renders of the denoised atlas; 0 renders nothing
    mask_weight: float = 0.0  # on L1 of their coverage
    lpips_weight: float = 0.0  # on their perceptual distance
    render_from: float = 0.0  # share of the run before losses on renders begin
    render_ramp: float = 0.1  # share of the run over which they grow to their weights
    render_below: int = 300  # timesteps below which an atlas is clear enough to be rendered
    render_most: int = 8  # samples of a step that are rendered in each process
    render_size: int = 64  # pixels
    distill_guidance: float = 0.0  # above 1: learn what `base`, a bundle, predicts under guidance of up to this, in one prediction
    text_dropout: float = 0.2  # share of samples trained without a prompt, for classifier-free guidance
    plain_first: float = 1.0  # above 1 an object's first captions, its plainest, are learned more often: 2 gives the first quarter half
    own_colours: float = 0.0  # share of samples that are put back into their objects' own colours, where these are repainted copies
    noise_first: float = 1.0  # above 1 more samples are of high noise, where what an object is gets decided: 2 doubles the noisiest quarter
    batch_size: int = 64  # samples a step, over all processes
    micro_batch: int = 0  # samples at once in a process, gradients add up over the rest; 0 takes all: more needs more memory
    gradient_checkpointing: bool = False  # activations are made again in the backward pass: less memory, a third slower
    learning_rate: float = 5e-5
    weight_decay: float = 1e-2  # AdamW
    warmup_steps: int = 100  # linear from zero
    decay_steps: int = 0  # linear to zero over the last steps; the rate is constant between
    gradient_clip: float = 1.0  # norm
    ema_decay: float = 0.9999  # reached by warm-up; match its window, 1 / (1 - decay), to the run's length
    max_steps: int = 1_000_000
    mixed_precision: str = "auto"  # "no", "bf16", or "auto": bf16 where the device multiplies it itself (elsewhere it is many times slower)
    validation_share: float = 0.05  # objects kept out of training, chosen by their id
    checkpoint_every: int = 1000  # steps
    log_every: int = 20  # steps
    prefetch: int = 2  # batches that are read ahead
    divergence: float = 5.0  # the run stops where its mean loss is so many times the lowest before
    seed: int = 0

    def __post_init__(self) -> None:
        if self.prediction_type not in PREDICTIONS:
            raise InputError(f"prediction_type must be one of {', '.join(PREDICTIONS)}, got {self.prediction_type!r}")
        if self.prediction_type == "epsilon" and self.zero_terminal_snr:
            raise InputError("prediction_type epsilon says nothing of the atlas where all is noise: set zero_terminal_snr to False")
        if self.prior and self.prediction_type != "sample":
            raise InputError(f"with prior the network gives the clean atlas: prediction_type must be sample, got {self.prediction_type!r}")
        if self.mixed_precision not in ("auto", "bf16", "no"):
            raise InputError(f"mixed_precision must be auto, bf16 or no, got {self.mixed_precision!r}")
        if self.distill_guidance and not (self.distill_guidance > 1 and self.base and not self.lora_rank):
            raise InputError("distill_guidance must be above 1 and needs a bundle as base and lora_rank 0: the whole network learns")
        if len(self.channel_weights) != len(ATTRIBUTES):
            raise InputError(f"channel_weights needs one number for each of {', '.join(ATTRIBUTES)}")
        if self.own_colours >= 1:
            raise InputError(f"own_colours must be in [0, 1), got {self.own_colours}: repainted copies are learned from too")
        if not 0 <= self.text_dropout < 1:
            raise InputError(f"text_dropout must be in [0, 1), got {self.text_dropout}")
        leasts = {"batch_size": 1, "noise_first": 1, "plain_first": 1, "own_colours": 0, "wrap": 0, "micro_batch": 0, "lora_rank": 0}
        leasts |= {"prefetch": 0, "render_most": 1, "render_size": 8, "fold": 1, "checkpoint_every": 1, "log_every": 1}
        for name, least in leasts.items():
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, got {getattr(self, name)}")

    @property
    def renders(self) -> bool:
        """Whether there are losses on renders."""
        return self.rgb_weight > 0 or self.mask_weight > 0 or self.lpips_weight > 0


class Batch(NamedTuple):
    """What one process trains on in one step, on its device."""

    clean: Tensor  # [B, 16, H, W] normalised atlases
    noise: Tensor  # [B, 16, H, W]
    timesteps: Tensor  # [B]
    text: Tensor  # [B, L, D]
    views: Tensor  # [B, 5] in 0..1: direction and background of a render, see RenderLoss
    guidance: Tensor  # [B] scale that is distilled; 1 where none is


class Trainer:
    """Owns the network, its averaged copy and the optimiser; `run` trains, `save` and `resume` keep the state.

    Under `accelerate launch` or `torchrun` every process takes its share of each batch, drawn as one process would draw it.

    Args:
        data: the training set.
        directory: receives checkpoints and tensorboard logs.
        device: "cpu", or "auto" for CUDA where there is one.
        picture: drawn at every checkpoint and put into the logs: gets the trainer, returns [H, W, 3] in 0..1.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        data: TrainingData,
        directory: str | Path,
        device: str = "cpu",
        picture: Callable[[Trainer], Tensor] | None = None,
    ) -> None:
        self.config, self.data, self.picture = config, data, picture
        self.directory = Path(directory)
        self.accelerator = Accelerator(cpu=device == "cpu", mixed_precision="no")
        self.device = self.accelerator.device
        processes = self.accelerator.num_processes
        if config.batch_size % processes:
            raise InputError(f"batch_size {config.batch_size} cannot be shared by {processes} processes: make it a multiple")
        wanted = config.mixed_precision
        self.bf16 = wanted == "bf16" or (wanted == "auto" and fast_dtype(self.device) == torch.bfloat16)
        self.memory_format = fast_layout(self.device, torch.bfloat16 if self.bf16 else torch.float32)
        self.unet = build_unet(config, data.text_width, data.channels).to(self.device, memory_format=self.memory_format)
        # Whose guided predictions are learned.
        self.teacher = None
        if config.distill_guidance:
            bundle = load_base(config.base).bundle
            assert bundle is not None  # build_unet has refused any other base
            self.teacher = bundle.load_unet(self.device)
        if config.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        self.trainable = {name: p for name, p in self.unet.named_parameters() if p.requires_grad}
        self.ema = {name: value.detach().clone() for name, value in self.trainable.items()}
        decayed = [p for p in self.trainable.values() if p.ndim > 1]
        plain = [p for p in self.trainable.values() if p.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}],
            lr=config.learning_rate,
            betas=(0.9, 0.99),
            fused=True,
        )
        # The same network, which adds up gradients over the processes where there are several.
        self.model = self.accelerator.prepare_model(self.unet)
        self.step = 0
        self.mean_loss, self.lowest = 0.0, float("inf")
        self.alphas = alphas_cumprod(shift=config.shift, zero_terminal_snr=config.zero_terminal_snr).float().to(self.device)
        self.train_rows, self.validation_rows = data.split(config.validation_share)
        # Of each object the row that comes before its repainted copies.
        self._first = {name: row for row, name in reversed(list(enumerate(data.ids)))}
        weights = torch.tensor(config.channel_weights).repeat_interleave(4) if data.channels == CHANNELS else torch.ones(data.channels)
        self.channel_weights = (weights / weights.mean()).reshape(1, -1, 1, 1).to(self.device)
        self.prior = None
        if config.prior:
            if data.prior is None:
                raise InputError("a network that corrects a prior needs that of the atlases")
            self.prior = data.prior.to(self.device)
        self.render_loss = None
        if config.renders:
            if data.decoding is None:
                raise InputError("losses on renders need the layout and the statistics of the atlases")
            on_renders = (config.rgb_weight, config.mask_weight, config.lpips_weight)
            self.render_loss = RenderLoss(data.decoding, on_renders, config.render_size, self.device)
        self._ahead: dict[int, Future[Batch]] = {}
        self._reader = ThreadPoolExecutor(1, "atlases")

    def batch(self, step: int, rows: Tensor, size: int, share: slice = _ALL) -> Batch:
        """What step `step` trains on; a process may take a share of it, which is drawn like the whole and read alone.

        Below 0 it is for validation: everything equally often.
        """
        config = self.config
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        chosen = rows[torch.randint(len(rows), (size,), generator=generator)]
        if config.own_colours and step >= 0:
            chosen = self._with_own_colours(chosen, generator)
        seeds = torch.randint(2**62, (size,), generator=generator)
        # One timestep in each of B equal strata: the same mean, less spread between steps (Kingma et al. 2021, appendix I).
        strata = (torch.arange(size) + torch.rand(size, generator=generator)) / size
        if step >= 0 and config.noise_first > 1:
            strata = (1 - (1 - strata) ** config.noise_first).clamp_max(1 - 1e-6)
        timesteps = (strata * len(self.alphas)).long()[torch.randperm(size, generator=generator)]
        picks = torch.rand(size, generator=generator)[share]
        picks = picks if step < 0 else picks**config.plain_first
        dropped = (torch.rand(size, generator=generator) < config.text_dropout)[share]
        views = torch.rand(size, 5, generator=generator)[share]
        # A tenth at 1 exactly: of these predictions negative prompts are made.
        spread = torch.rand(size, generator=generator)[share] if self.teacher is not None else torch.zeros(len(picks))
        guidance = 1 + (config.distill_guidance - 1) * (spread / 0.9 - 0.1 / 0.9).clamp_min(0)
        own = chosen[share].tolist()
        clean = self.data.atlases[own].float()
        noise = torch.stack([torch.randn(clean.shape[1:], generator=torch.Generator().manual_seed(int(s))) for s in seeds[share]])
        captions = [self.data.captions[row] for row in own]
        text = self.data.features[[of_one[int(pick * len(of_one))] for of_one, pick in zip(captions, picks.tolist(), strict=True)]].float()
        text = torch.where(dropped[:, None, None], self.data.unconditional.to(text), text)
        return Batch(*(tensor.to(self.device) for tensor in (clean, noise, timesteps[share], text, views, guidance)))

    def _with_own_colours(self, chosen: Tensor, generator: torch.Generator) -> Tensor:
        """Rows [B], that share of them replaced by the first row of the same objects: what comes after it is repainted."""
        originals = torch.tensor([self._first[self.data.ids[row]] for row in chosen.tolist()])
        return torch.where(torch.rand(len(chosen), generator=generator) < self.config.own_colours, originals, chosen)

    def loss(self, batch: Batch, model: torch.nn.Module | None = None, render_factor: float = 0.0) -> Tensor:
        """Weighted v-prediction loss (equation 3 of the paper; Salimans and Ho 2022) and losses on renders: a scalar.

        Where guidance is distilled the right prediction is not that of the data but the teacher's.

        Args:
            model: the network by default.
            render_factor: on the losses on renders.
        """
        clean, noise, timesteps, text, views, guidance = batch
        config = self.config
        alpha = self.alphas[timesteps].sqrt().reshape(-1, 1, 1, 1)
        sigma = (1 - self.alphas[timesteps]).sqrt().reshape(-1, 1, 1, 1)
        noisy = alpha * clean + sigma * noise
        known = None if self.prior is None else self.prior.filter(noisy, alpha, sigma)
        image = wrap(fold(noisy if known is None else known.image, config.fold), config.wrap).contiguous(memory_format=self.memory_format)
        inputs = {"encoder_hidden_states": text, "return_dict": False}
        if self.teacher is not None:
            inputs["timestep_cond"] = embed_guidance(guidance, self.unet.config.time_cond_proj_dim)
        with self._autocast():
            output = (model or self.unet)(image, timesteps, **inputs)[0]
        output = unfold(unwrap(output.float(), config.wrap), config.fold)
        output = output if known is None else known.corrected(output)
        if config.prediction_type == "v_prediction":
            target, weight = alpha * noise - sigma * clean, torch.ones_like(sigma)
        elif config.prediction_type == "sample":
            # v = (alpha z - x) / sigma, so an error in x counts 1 / sigma^2 in v; bounded where sigma vanishes.
            target, weight = clean, 1 / sigma.square().clamp_min(0.1)
        else:
            # v = (e - sigma z) / alpha, likewise.
            target, weight = noise, 1 / alpha.square().clamp_min(0.1)
        if self.teacher is not None:
            target = self._taught(image, timesteps, text, guidance)
            target = target if known is None else known.corrected(target)
            clean = clean_estimate(target, noisy, alpha, sigma, config.prediction_type)
        if config.min_snr_gamma:
            snr = alpha.square() / sigma.square().clamp_min(1e-8)
            weight = weight * snr.clamp_max(config.min_snr_gamma) / (snr + 1)
        loss = (weight * self.channel_weights * (output - target).square()).mean()
        if self.render_loss is not None and render_factor > 0:
            clear = (timesteps < config.render_below).nonzero()[: config.render_most, 0]
            if len(clear):
                denoised = clean_estimate(output[clear], noisy[clear], alpha[clear], sigma[clear], config.prediction_type)
                renders = self.render_loss(denoised, clean[clear], views[clear, :2], views[clear, 2:])
                loss = loss + render_factor * renders.sum() / len(clean)
        return loss

    @torch.no_grad()
    def _taught(self, image: Tensor, timesteps: Tensor, text: Tensor, guidance: Tensor) -> Tensor:
        """What the teacher predicts, guided by [B]: [B, 16, H, W]."""
        assert self.teacher is not None  # or there is nothing to be taught
        texts = torch.cat([text, self.data.unconditional.to(text).expand_as(text)])
        with self._autocast():
            both = self.teacher(torch.cat([image] * 2), timesteps.repeat(2), encoder_hidden_states=texts, return_dict=False)[0]
        found, without = unfold(unwrap(both.float(), self.config.wrap), self.config.fold).chunk(2)
        return torch.lerp(without, found, guidance.reshape(-1, 1, 1, 1))

    def _autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext()

    def _attention(self):
        # On a CPU the fused attention's gradients take several times as long as plain matrix products, at the sizes that a CPU can train.
        return sdpa_kernel(SDPBackend.MATH) if self.device.type == "cpu" else nullcontext()

    def rate(self, step: int) -> float:
        """Learning rate at a step: linear warm-up, constant, linear decay at the end."""
        config = self.config
        factor = min(1.0, (step + 1) / max(config.warmup_steps, 1))
        if config.decay_steps:
            factor = min(factor, (config.max_steps - step) / config.decay_steps)
        return config.learning_rate * max(factor, 0.0)

    def render_factor(self, step: int) -> float:
        """Factor on the losses on renders at a step: 0, then a ramp, then 1."""
        if not self.config.renders:
            return 0.0
        since = step / self.config.max_steps - self.config.render_from
        return 0.0 if since < 0 else min(1.0, since / self.config.render_ramp) if self.config.render_ramp else 1.0

    def train_step(self) -> float:
        """One optimiser step over all processes; the loss before it.

        Raises:
            WorkError: the loss is not finite, or has grown far above the lowest.
        """
        config = self.config
        self.unet.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(self.step)
        batch = self._next()
        count = len(batch.clean)
        size = config.micro_batch or count
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for start in range(0, count, size):
            part = Batch(*(tensor[start : start + size] for tensor in batch))
            # Gradients are exchanged once, with the last part.
            last = start + size >= count
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                with self._attention():
                    loss = self.loss(part, self.model, self.render_factor(self.step)) * (len(part.clean) / count)
                    self.accelerator.backward(loss)
            total += loss.detach()
        value = self.accelerator.reduce(total, "mean").item()
        self._check(value)
        torch.nn.utils.clip_grad_norm_(self.trainable.values(), config.gradient_clip)
        self.optimizer.step()
        self.step += 1
        decay = min(config.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.values()), list(self.trainable.values()), 1 - decay)
        return value

    def _next(self) -> Batch:
        """This step's batch, while the following ones are being read."""
        config = self.config
        share = config.batch_size // self.accelerator.num_processes
        mine = slice(self.accelerator.process_index * share, (self.accelerator.process_index + 1) * share)
        for step in range(self.step, min(self.step + config.prefetch + 1, max(config.max_steps, self.step + 1))):
            if step not in self._ahead:
                self._ahead[step] = self._reader.submit(self.batch, step, self.train_rows, config.batch_size, mine)
        return self._ahead.pop(self.step).result()

    def _check(self, loss: float) -> None:
        """Stops a run that is lost, before the loss has reached the weights."""
        advice = "lower learning_rate, or raise warmup_steps, and go on from the last checkpoint"
        if not math.isfinite(loss):
            raise WorkError(f"the loss is {loss} at step {self.step}: {advice}")
        self.mean_loss = loss if self.step == 0 else self.mean_loss + (loss - self.mean_loss) / min(self.step + 1, _MEAN_OVER)
        if self.step >= _MEAN_OVER:
            self.lowest = min(self.lowest, self.mean_loss)
            if self.mean_loss > self.config.divergence * self.lowest:
                grown = f"its mean loss at step {self.step} is {self.mean_loss:.3g}, the lowest was {self.lowest:.3g}"
                raise WorkError(f"the run diverges, {grown}: {advice}")

    @torch.no_grad()
    def validate(self, batches: int = 4) -> float | None:
        """Mean loss on held-out objects, always with the same noise; None where none are held out."""
        if not len(self.validation_rows):
            return None
        self.unet.eval()
        return sum(self.loss(self.batch(-1 - i, self.validation_rows, 16)).item() for i in range(batches)) / batches

    def run(self, progress: bool = True) -> Iterator[tuple[int, float]]:
        """Train up to `max_steps`, yielding (step, loss); checkpoints on the way and at the end.

        Raises:
            WorkError: the run is lost (see `train_step`), or a checkpoint cannot be written.
        """
        config, main = self.config, self.accelerator.is_main_process
        self.directory.mkdir(parents=True, exist_ok=True)
        with SummaryWriter(str(self.directory / "logs"), purge_step=self.step) if main else nullcontext() as writer:
            bar = tqdm(
                total=config.max_steps, initial=self.step, desc="fine-tune", unit="step", disable=not (progress and main), mininterval=2
            )
            recent: list[float] = []
            started, first = time.perf_counter(), self.step
            while self.step < config.max_steps:
                loss = self.train_step()
                recent.append(loss)
                bar.update()
                if writer is not None and (self.step % config.log_every == 0 or self.step == config.max_steps):
                    mean = sum(recent) / len(recent)
                    recent.clear()
                    rate = (self.step - first) * config.batch_size / (time.perf_counter() - started)
                    writer.add_scalar("loss/train", mean, self.step)
                    writer.add_scalar("learning_rate", self.rate(self.step), self.step)
                    writer.add_scalar("samples_per_second", rate, self.step)
                    bar.set_postfix(loss=f"{mean:.4f}", samples_s=f"{rate:.2f}")
                if self.step % config.checkpoint_every == 0 or self.step == config.max_steps:
                    if writer is not None:
                        self._report(writer)
                        self.save()
                    self.accelerator.wait_for_everyone()
                yield self.step, loss
            bar.close()

    @contextmanager
    @torch.no_grad()
    def averaged(self) -> Iterator[None]:
        """For as long as it lasts the network has its averaged weights."""
        current = {name: value.detach().clone() for name, value in self.trainable.items()}
        try:
            for name, value in self.trainable.items():
                value.copy_(self.ema[name])
            yield
        finally:
            for name, value in self.trainable.items():
                value.copy_(current[name])

    def _report(self, writer: SummaryWriter) -> None:
        validation = self.validate()
        if validation is not None:
            writer.add_scalar("loss/validation", validation, self.step)
            tqdm.write(f"step {self.step}: validation loss {validation:.4f}")
        if self.picture is not None:
            writer.add_image("samples", self.picture(self).clamp(0, 1), self.step, dataformats="HWC")

    # State ---------------------------------------------------------------------------------------------------------

    def save(self, keep: int = 2) -> Path:
        """Write `checkpoint-STEP/` and drop all but the newest `keep`; a failed or killed save leaves the last good one.

        Raises:
            WorkError: it cannot be written.
        """
        final = self.directory / f"checkpoint-{self.step:08d}"
        partial = self.directory / f".{final.name}.partial"
        names = {id(p): name for name, p in self.trainable.items()}
        moments = {
            f"{key}/{names[id(p)]}": value.contiguous()
            for p, state in self.optimizer.state.items()
            for key, value in state.items()
            if isinstance(value, Tensor)
        }
        state = {"step": self.step, "mean_loss": self.mean_loss, "lowest": self.lowest, "config": asdict(self.config)}
        state["statistics"] = self.data.statistics
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            for name, tensors in (("unet", _contiguous(self.trainable)), ("ema", _contiguous(self.ema)), ("optimizer", moments)):
                safetensors.torch.save_file(tensors, partial / f"{name}.safetensors")
            (partial / "state.json").write_text(json.dumps(state, indent=1))
            shutil.rmtree(final, ignore_errors=True)
            partial.replace(final)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            good = checkpoints(self.directory)
            left = f"; {good[-1].name} is whole" if good else ""
            raise WorkError(f"cannot write {final} ({error}): make room and run the same command again{left}") from error
        for stale in checkpoints(self.directory)[:-keep]:
            shutil.rmtree(stale)
        return final

    def resume(self) -> bool:
        """Load the newest checkpoint of the directory; False where there is none.

        Raises:
            InputError: the checkpoint is damaged, or belongs to another configuration or other statistics.
        """
        found = checkpoints(self.directory)
        if not found:
            return False
        path = found[-1]
        state = check_settings(path, self.config, self.data.statistics, resumed=True)
        try:
            unet, ema, moments = (safetensors.torch.load_file(path / f"{name}.safetensors") for name in ("unet", "ema", "optimizer"))
            # Before any of it takes its place. A parameter that no loss has reached has no moments, any other all of them.
            shapes = {name: parameter.shape for name, parameter in self.trainable.items()}
            kept: dict[str, dict[str, Tensor]] = {}
            for key, value in moments.items():
                kind, name = key.split("/", 1)
                kept.setdefault(name, {})[kind] = value
            wanted = {name: {"step": torch.Size(), "exp_avg": shapes[name], "exp_avg_sq": shapes[name]} for name in kept}
            found_shapes = {name: {kind: value.shape for kind, value in each.items()} for name, each in kept.items()}
            if found_shapes != wanted or any({name: each[name].shape for name in shapes} != shapes for each in (unet, ema)):
                raise ValueError("its tensors are not the network's")
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise _damaged(path, error) from error
        with torch.no_grad():
            for name, parameter in self.trainable.items():
                parameter.copy_(unet[name])
        self.ema = {name: ema[name].to(self.device) for name in self.ema}
        for name, state_of_one in kept.items():
            parameter = self.trainable[name]
            for kind, value in state_of_one.items():
                # The fused AdamW reads moments in the memory order of their parameter; its step counter is a scalar beside it.
                value = value.to(self.device) if kind == "step" else torch.empty_like(parameter).copy_(value)
                self.optimizer.state[parameter][kind] = value
        self.step, self.mean_loss, self.lowest = state["step"], state.get("mean_loss", 0.0), state.get("lowest", float("inf"))
        return True


def checkpoints(directory: str | Path) -> list[Path]:
    """Finished checkpoints of a run, oldest first."""
    return sorted(path for path in Path(directory).glob("checkpoint-*") if (path / "state.json").is_file())


def check_settings(checkpoint: Path, config: FinetuneConfig, statistics: dict[str, str], resumed: bool = False) -> dict:
    """The state of a checkpoint, after a check that it was trained with these settings on values normalised like these.

    Args:
        resumed: all settings must be the same, else those alone that say what the network is and what its values mean.
        statistics: as `training_data.statistics_of` gives them; a checkpoint from before they were kept says nothing of them.

    Raises:
        InputError: it is damaged, or was trained otherwise.
    """
    try:
        state = parse_json((checkpoint / "state.json").read_text())
        step, theirs, known = state["step"], _identity(state["config"]), state.get("statistics", {})
        if not isinstance(step, int) or not isinstance(known, dict):
            raise ValueError("its state.json has another shape")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(checkpoint, error) from error
    ours = _identity(asdict(config))
    if not resumed:
        ours, theirs = ({key: each[key] for key in _OF_THE_NETWORK if key in each} for each in (ours, theirs))
    changed = _differences(theirs, ours)
    if changed:
        raise InputError(f"{checkpoint} was trained with {'; '.join(changed)}: use another folder, or the old settings")
    other = sorted(name for name in known.keys() & statistics.keys() if known[name] != statistics[name])
    if other:
        raise InputError(f"{checkpoint} was trained with another {', '.join(other)}: train anew elsewhere, or restore what was there")
    return state


def _damaged(checkpoint: Path, reason: object) -> InputError:
    return InputError(f"{checkpoint} is damaged ({reason}): delete it to resume from the one before")


def build_unet(config: FinetuneConfig, text_width: int, channels: int = CHANNELS):
    """The UNet to train: a widened base, or `config.unet` from random weights; with a rank, its low-rank additions alone are trainable.

    Args:
        channels: of what it is trained on; a base is widened to those of an atlas.

    Raises:
        InputError: the base cannot be read, or its text width is not that of the text encoder.
    """
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    channels = channels * config.fold**2
    torch.manual_seed(config.seed)
    if not config.base:
        unet = UNet2DConditionModel(in_channels=channels, out_channels=channels, cross_attention_dim=text_width, **config.unet)
    else:
        base = load_base(config.base)
        if base.bundle and config != going_on(config, base.bundle):
            raise InputError(f"base {config.base!r} was trained with another fold, prediction or noise: keep its settings")
        if base.bundle and base.bundle.info.get("distilled_guidance"):
            raise InputError(f"base {config.base!r} is distilled: go on from the model that it was distilled from")
        if base.bundle and config.distill_guidance and config.wrap != base.bundle.wrap:
            raise InputError(f"base {config.base!r} was trained with wrap {base.bundle.wrap}: what is distilled from it needs the same")
        if base.bundle and config.distill_guidance and config.prior != (base.bundle.prior is not None):
            raise InputError(f"base {config.base!r} corrects {'a' if base.bundle.prior else 'no'} prior: so must what is distilled from it")
        if not base.bundle and config.distill_guidance:
            raise InputError(f"base {config.base!r} is a 2D model: only guidance of a bundle can be distilled")
        if not base.bundle and config.fold != 1:
            raise InputError("a 2D base takes plain atlases: set fold to 1")
        if base.text_width != text_width:
            raise InputError(f"base {config.base!r} attends to text of width {base.text_width}, the text encoder gives {text_width}")
        unet = base.load_unet() if base.bundle else widen_unet(base.load_unet())
        unet = with_guidance_input(unet) if config.distill_guidance else unet
    if config.lora_rank:
        from peft import LoraConfig

        unet.requires_grad_(False)
        unet.add_adapter(LoraConfig(r=config.lora_rank, lora_alpha=config.lora_rank, target_modules=list(_ATTENTION)))
    return unet


def going_on(config: FinetuneConfig, bundle: Bundle) -> FinetuneConfig:
    """The settings with those of a bundle's network that must stay: the same prediction, at the same noise, of atlases folded alike.

    Raises:
        InputError: the bundle was trained with a noise schedule that this loop does not have.
    """
    from diffusers import DPMSolverMultistepScheduler

    found = schedule_of(DPMSolverMultistepScheduler.from_config(bundle.scheduler_config).alphas_cumprod)
    if found is None:
        raise InputError(f"base {config.base!r} was trained with a noise schedule that cannot be gone on with")
    prediction = bundle.scheduler_config["prediction_type"]
    # A network learns in few steps to see beyond the borders, or to correct a prior, and what it has learned it keeps.
    return replace(
        config,
        fold=bundle.fold,
        wrap=config.wrap or bundle.wrap,
        prior=config.prior or bundle.prior is not None,
        prediction_type=prediction,
        shift=found[0],
        zero_terminal_snr=found[1],
    )


def trained_unet(config: FinetuneConfig, checkpoint: Path, text_width: int, channels: int = CHANNELS, statistics: dict | None = None):
    """The averaged network of a checkpoint, low-rank additions merged into it.

    Args:
        statistics: of what will read the network's values, see `check_settings`.

    Raises:
        InputError: the checkpoint is damaged, or was trained with other settings or statistics.
    """
    check_settings(checkpoint, config, statistics or {})
    unet = build_unet(config, text_width, channels)
    try:
        averaged = safetensors.torch.load_file(checkpoint / "ema.safetensors")
    except (OSError, SafetensorError) as error:
        raise _damaged(checkpoint, error) from error
    unet.load_state_dict(averaged, strict=not config.lora_rank)
    if config.lora_rank:
        unet.fuse_lora()
        unet.unload_lora()
    return unet


# The layers that LoRA adds to: queries, keys, values and outputs of the attention.
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


# The settings without which a trained network cannot be read as what it is.
_OF_THE_NETWORK = (
    *("base", "unet", "text_encoder", "unconditional", "lora_rank", "fold", "wrap", "prior", "prediction_type", "shift"),
    *("zero_terminal_snr", "distill_guidance"),
)


def _identity(config: dict) -> dict:
    """The settings that a resumed run must share; it may be longer or shorter, and save or log at other steps."""
    free = {"max_steps", "decay_steps", "checkpoint_every", "log_every", "prefetch", "divergence", "micro_batch", "base_licence"}
    # A checkpoint from before a setting existed was trained with its default.
    known = {**asdict(FinetuneConfig()), **config}
    return json.loads(json.dumps({key: value for key, value in known.items() if key not in free}))


def _differences(theirs: dict, ours: dict) -> list[str]:
    """Which settings differ, with both values; of the network's arguments those alone."""
    found = []
    for key in sorted(theirs.keys() | ours.keys()):
        one, other = theirs.get(key), ours.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            found += [f"{key}.{line}" for line in _differences(one, other)]
        elif one != other:
            found.append(f"{key} {one!r}, not {other!r}")
    return found


def _contiguous(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().contiguous() for name, value in state.items()}
