"""The fine-tuning loop: a 2D diffusion UNet learns to denoise atlases (section 5 of the paper).

Everything random in a step - which objects, which captions, noise, timesteps, dropout - is drawn from a generator seeded by
(seed, step). A run resumed at step k therefore sees exactly what an uninterrupted run would have seen from step k on.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from generator.errors import InputError, WorkError
from generator.model.folding import fold
from generator.model.pipeline import fast_dtype
from generator.model.widen import widen_unet

from .schedule import alphas_cumprod

ATTRIBUTES = ("position", "color", "scale", "rotation")  # the four groups of four channels


@dataclass(frozen=True)
class FinetuneConfig:
    """How the network is trained. The defaults are the paper's where the paper says."""

    base: str = ""  # folder or hub id of a 4-channel latent-diffusion UNet to widen; empty: `unet` from random weights
    unet: dict = field(default_factory=dict)  # UNet2DConditionModel arguments, used without a base
    fold: int = 1  # cells per side folded into channels: 1 is the paper's plain input, more is cheaper
    prediction_type: str = "v_prediction"  # or "sample": the network predicts the clean atlas; the loss is the same
    shift: float = 1.0  # divides the signal-to-noise ratio by its square; above 1 trains more on the coarse shape
    zero_terminal_snr: bool = True  # the last timestep is pure noise, as at sampling
    min_snr_gamma: float = 0.0  # Hang et al. 2023; 0 turns it off
    channel_weights: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)  # loss weight of each of `ATTRIBUTES`
    text_dropout: float = 0.2  # share of samples trained without a prompt, for classifier-free guidance
    batch_size: int = 64
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
    seed: int = 0

    def __post_init__(self) -> None:
        if self.prediction_type not in ("v_prediction", "sample"):
            raise InputError(f"prediction_type must be v_prediction or sample, got {self.prediction_type!r}")
        if self.mixed_precision not in ("auto", "bf16", "no"):
            raise InputError(f"mixed_precision must be auto, bf16 or no, got {self.mixed_precision!r}")
        if len(self.channel_weights) != len(ATTRIBUTES):
            raise InputError(f"channel_weights needs one number for each of {', '.join(ATTRIBUTES)}")
        if not 0 <= self.text_dropout < 1:
            raise InputError(f"text_dropout must be in [0, 1), got {self.text_dropout}")


@dataclass(frozen=True)
class TrainingData:
    """What the loop draws from, in memory: normalised atlases and the features of every caption."""

    atlases: Tensor  # [M, 16, H, W] float16, normalised
    captions: list[list[int]]  # for each atlas, the rows of `features` that describe it
    features: Tensor  # [C, L, D] text features, zero where the mask is
    ids: list[str]

    def __post_init__(self) -> None:
        if not len(self.atlases):
            raise InputError("there are no atlases to train on: run `python -m trainer atlas` first")
        silent = [identifier for identifier, rows in zip(self.ids, self.captions, strict=True) if not rows]
        if silent:
            raise InputError(f"{silent[0]} has no caption: give every object at least one")

    def split(self, share: float) -> tuple[Tensor, Tensor]:
        """Indices of training and validation objects; an object's side depends on its id alone."""
        import zlib

        held_out = torch.tensor([zlib.crc32(i.encode()) % 10_000 < share * 10_000 for i in self.ids])
        if held_out.all():
            held_out[:] = False
        return torch.nonzero(~held_out)[:, 0], torch.nonzero(held_out)[:, 0]


class Trainer:
    """Owns the network, its averaged copy and the optimiser; `run` trains, `save` and `resume` keep the state.

    Args:
        data: the training set.
        directory: receives checkpoints and tensorboard logs.
        device: "cpu" or "cuda".
    """

    def __init__(self, config: FinetuneConfig, data: TrainingData, directory: str | Path, device: str = "cpu") -> None:
        self.config, self.data = config, data
        self.directory, self.device = Path(directory), torch.device(device)
        self.unet = build_unet(config, data.features.shape[-1]).to(self.device, memory_format=torch.channels_last)
        self.ema = {name: value.detach().clone() for name, value in self.unet.state_dict().items()}
        decayed = [p for p in self.unet.parameters() if p.ndim > 1]
        plain = [p for p in self.unet.parameters() if p.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}],
            lr=config.learning_rate,
            betas=(0.9, 0.99),
            foreach=True,
        )
        wanted = config.mixed_precision
        self.bf16 = wanted == "bf16" or (wanted == "auto" and fast_dtype(self.device) == torch.bfloat16)
        self.step = 0
        self.alphas = alphas_cumprod(shift=config.shift, zero_terminal_snr=config.zero_terminal_snr).float().to(self.device)
        self.train_rows, self.validation_rows = data.split(config.validation_share)
        weights = torch.tensor(config.channel_weights).repeat_interleave(4)
        self.channel_weights = (weights / weights.mean()).reshape(1, 16, 1, 1).to(self.device)

    def batch(self, step: int, rows: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What step `step` trains on: clean atlases [B, 16, H, W], noise, timesteps [B], text features [B, L, D]."""
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + step)
        chosen = rows[torch.randint(len(rows), (size,), generator=generator)]
        clean = self.data.atlases[chosen].float()
        noise = torch.randn(clean.shape, generator=generator)
        # One timestep in each of B equal strata: the same mean, less spread between steps (Kingma et al. 2021, appendix I).
        strata = (torch.arange(size) + torch.rand(size, generator=generator)) / size
        timesteps = (strata * len(self.alphas)).long()[torch.randperm(size, generator=generator)]
        picks = torch.rand(size, generator=generator)
        rows_of_text = [
            self.data.captions[i][int(p * len(self.data.captions[i]))] for i, p in zip(chosen.tolist(), picks.tolist(), strict=True)
        ]
        text = self.data.features[rows_of_text].float()
        text = torch.where(torch.rand(size, 1, 1, generator=generator) < self.config.text_dropout, torch.zeros_like(text), text)
        return tuple(tensor.to(self.device) for tensor in (clean, noise, timesteps, text))

    def loss(self, clean: Tensor, noise: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        """Weighted v-prediction loss (equation 3 of the paper; Salimans and Ho 2022), a scalar."""
        alpha = self.alphas[timesteps].sqrt().reshape(-1, 1, 1, 1)
        sigma = (1 - self.alphas[timesteps]).sqrt().reshape(-1, 1, 1, 1)
        noisy = fold(alpha * clean + sigma * noise, self.config.fold).contiguous(memory_format=torch.channels_last)
        autocast = torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext()
        with autocast:
            output = self.unet(noisy, timesteps, encoder_hidden_states=text, return_dict=False)[0]
        if self.config.prediction_type == "v_prediction":
            target, weight = alpha * noise - sigma * clean, torch.ones_like(sigma)
        else:
            # v = (alpha z - x) / sigma, so an error in x counts 1 / sigma^2 in v; bounded where sigma vanishes.
            target, weight = clean, 1 / sigma.square().clamp_min(0.1)
        if self.config.min_snr_gamma:
            snr = alpha.square() / sigma.square().clamp_min(1e-8)
            weight = weight * snr.clamp_max(self.config.min_snr_gamma) / (snr + 1)
        weight = weight * self.channel_weights
        return (fold(weight.expand_as(target), self.config.fold) * (output.float() - fold(target, self.config.fold)).square()).mean()

    def rate(self, step: int) -> float:
        """Learning rate at a step: linear warm-up, constant, linear decay at the end."""
        config = self.config
        factor = min(1.0, (step + 1) / max(config.warmup_steps, 1))
        if config.decay_steps:
            factor = min(factor, (config.max_steps - step) / config.decay_steps)
        return config.learning_rate * max(factor, 0.0)

    def train_step(self) -> float:
        """One optimiser step; the loss before it.

        Raises:
            WorkError: the loss is not finite.
        """
        self.unet.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(self.step)
        loss = self.loss(*self.batch(self.step, self.train_rows, self.config.batch_size))
        if not torch.isfinite(loss):
            raise WorkError(f"the loss is {loss.item()} at step {self.step}: lower learning_rate and resume from the last checkpoint")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.unet.parameters(), self.config.gradient_clip)
        self.optimizer.step()
        self.step += 1
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            averaged, current = list(self.ema.values()), list(self.unet.state_dict().values())
            torch._foreach_lerp_(averaged, current, 1 - decay)
        return loss.item()

    @torch.no_grad()
    def validate(self, batches: int = 4) -> float | None:
        """Mean loss on held-out objects, always with the same noise; None where none are held out."""
        if not len(self.validation_rows):
            return None
        self.unet.eval()
        return sum(self.loss(*self.batch(-1 - i, self.validation_rows, 16)).item() for i in range(batches)) / batches

    def run(self, progress: bool = True) -> Iterator[tuple[int, float]]:
        """Train up to `max_steps`, yielding (step, loss); checkpoints on the way and at the end."""
        config = self.config
        self.directory.mkdir(parents=True, exist_ok=True)
        with SummaryWriter(str(self.directory / "logs"), purge_step=self.step) as writer:
            bar = tqdm(total=config.max_steps, initial=self.step, desc="fine-tune", unit="step", disable=not progress, mininterval=2)
            recent: list[float] = []
            started, first = time.perf_counter(), self.step
            while self.step < config.max_steps:
                loss = self.train_step()
                recent.append(loss)
                bar.update()
                if self.step % config.log_every == 0 or self.step == config.max_steps:
                    mean = sum(recent) / len(recent)
                    recent.clear()
                    writer.add_scalar("loss/train", mean, self.step)
                    writer.add_scalar("learning_rate", self.rate(self.step), self.step)
                    bar.set_postfix(
                        loss=f"{mean:.4f}", sample_s=f"{(time.perf_counter() - started) / ((self.step - first) * config.batch_size):.3f}"
                    )
                if self.step % config.checkpoint_every == 0 or self.step == config.max_steps:
                    validation = self.validate()
                    if validation is not None:
                        writer.add_scalar("loss/validation", validation, self.step)
                        tqdm.write(f"step {self.step}: validation loss {validation:.4f}")
                    self.save()
                yield self.step, loss
            bar.close()

    # State ---------------------------------------------------------------------------------------------------------

    def save(self, keep: int = 2) -> Path:
        """Write `checkpoint-STEP/` and drop all but the newest `keep`; a killed save leaves the last good one."""
        final = self.directory / f"checkpoint-{self.step:08d}"
        partial = self.directory / f".{final.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        names = {id(p): name for name, p in self.unet.named_parameters()}
        moments = {
            f"{key}/{names[id(p)]}": value.contiguous()
            for p, state in self.optimizer.state.items()
            for key, value in state.items()
            if isinstance(value, Tensor)
        }
        safetensors.torch.save_file(_contiguous(self.unet.state_dict()), partial / "unet.safetensors")
        safetensors.torch.save_file(_contiguous(self.ema), partial / "ema.safetensors")
        safetensors.torch.save_file(moments, partial / "optimizer.safetensors")
        (partial / "state.json").write_text(json.dumps({"step": self.step, "config": asdict(self.config)}, indent=1))
        shutil.rmtree(final, ignore_errors=True)
        partial.replace(final)
        for stale in checkpoints(self.directory)[:-keep]:
            shutil.rmtree(stale)
        return final

    def resume(self) -> bool:
        """Load the newest checkpoint of the directory; False where there is none.

        Raises:
            InputError: the checkpoint is damaged or belongs to another configuration.
        """
        found = checkpoints(self.directory)
        if not found:
            return False
        path = found[-1]
        try:
            state = json.loads((path / "state.json").read_text())
            unet, ema, moments = (safetensors.torch.load_file(path / f"{name}.safetensors") for name in ("unet", "ema", "optimizer"))
        except (OSError, ValueError, SafetensorError) as error:
            raise InputError(f"{path} is damaged ({error}): delete it to resume from the one before") from error
        ours, theirs = (_identity(config) for config in (asdict(self.config), state["config"]))
        changed = sorted(key for key in ours if ours[key] != theirs.get(key))
        if changed:
            raise InputError(f"{path} was trained with other {', '.join(changed)}: use another folder, or the old settings")
        self.unet.load_state_dict(unet)
        self.ema = {name: ema[name].to(self.device) for name in self.ema}
        parameters = dict(self.unet.named_parameters())
        for key, value in moments.items():
            kind, name = key.split("/", 1)
            # AdamW keeps its step counter on the CPU.
            self.optimizer.state[parameters[name]][kind] = value if kind == "step" else value.to(self.device)
        self.step = state["step"]
        return True


def checkpoints(directory: str | Path) -> list[Path]:
    """Finished checkpoints of a run, oldest first."""
    return sorted(path for path in Path(directory).glob("checkpoint-*") if (path / "state.json").is_file())


def build_unet(config: FinetuneConfig, text_width: int):
    """The UNet to train: a widened base, or `config.unet` from random weights.

    Raises:
        InputError: the base cannot be read, or its text width is not that of the text encoder.
    """
    from diffusers import UNet2DConditionModel

    channels = 16 * config.fold**2
    if not config.base:
        torch.manual_seed(config.seed)
        return UNet2DConditionModel(in_channels=channels, out_channels=channels, cross_attention_dim=text_width, **config.unet)
    try:
        base = UNet2DConditionModel.from_pretrained(config.base, subfolder="unet", use_safetensors=True)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read a UNet from base {config.base!r}: {str(error).splitlines()[0]}") from error
    if config.fold != 1:
        raise InputError("a base takes plain atlases: set fold to 1")
    if base.config.cross_attention_dim != text_width:
        raise InputError(
            f"base {config.base!r} expects text features of width {base.config.cross_attention_dim}, the text encoder gives {text_width}"
        )
    return widen_unet(base)


def _identity(config: dict) -> dict:
    """The settings that a resumed run must share; it may be longer or shorter, and save or log at other steps."""
    free = {"max_steps", "decay_steps", "checkpoint_every", "log_every"}
    return json.loads(json.dumps({key: value for key, value in config.items() if key not in free}))


def _contiguous(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().contiguous() for name, value in state.items()}
