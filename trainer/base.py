"""What an atlas model starts from: a pretrained 2D latent-diffusion model (a diffusers folder, one file, a hub id) or another bundle."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from generator.errors import InputError
from generator.model.bundle import Bundle, find_bundle, load_bundle
from generator.model.text import TextEncoder, sha256

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

# What of a hub's model is fetched: neither its autoencoder nor pickles, nor the same weights in half precision.
_WANTED = ["unet/config.json", "unet/diffusion_pytorch_model.safetensors", "scheduler/*.json", "README.md"]
_WANTED += ["text_encoder/config.json", "text_encoder/model.safetensors", "tokenizer/*"]
_WEIGHTS = "diffusion_pytorch_model.safetensors"
# Where Stable Diffusion's own files keep the UNet.
_LDM = "model.diffusion_model."


@dataclass(frozen=True)
class Base:
    """A 2D model to be widened, or an atlas model to go on from; its weights are not read yet."""

    name: str  # as it was asked for
    config: dict  # UNet2DConditionModel arguments; a 2D model has 4 channels in and out
    weights: Path  # safetensors, in diffusers' layout or in Stable Diffusion's own
    text: tuple[Path, Path] | None  # folders of its text encoder and tokenizer, where it has them
    prediction_type: str  # epsilon, v_prediction or sample; "" where nothing says
    licence: str  # as its card names it; "" where nothing says
    bundle: Bundle | None = None  # of an atlas model, which also brings layout, statistics, text encoder and schedule

    @property
    def text_width(self) -> int:
        """Length of the text features that it attends to."""
        return int(self.config["cross_attention_dim"])

    @property
    def sha256(self) -> str:
        """Of the file with the weights."""
        return sha256(self.weights)

    def load_unet(self) -> UNet2DConditionModel:
        """The network in float32 on the CPU, ready to be trained.

        Raises:
            InputError: the weights are damaged or do not fit the configuration.
        """
        from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

        if self.bundle:
            return self.bundle.load_unet().train().requires_grad_(True)
        try:
            state = load_file(self.weights)
            own = {name: value for name, value in state.items() if name.startswith(_LDM)}
            state = convert_ldm_unet_checkpoint(own, self.config) if own else state
            # Made without memory: every weight is assigned from the file.
            with torch.device("meta"):
                unet = UNet2DConditionModel.from_config(self.config)
            unet.load_state_dict({name: value.float() for name, value in state.items()}, strict=True, assign=True)
        except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise InputError(f"cannot read a UNet from base {self.name!r}: {' '.join(str(error).split())[:200]}") from error
        return unet.train()


def load_base(source: str | os.PathLike, allow_download: bool = True) -> Base:
    """What a base consists of.

    Args:
        source: a diffusers folder, a .safetensors file in Stable Diffusion's own layout (1.x or 2.x), a hub id, or the folder of
            one of our bundles.

    Raises:
        InputError: there is no such model, or it is no text-conditioned UNet of 4 channels.
    """
    name, path = str(source), Path(source)
    if path.suffix == ".safetensors":
        return _checked(Base(name, _config_of_file(path), path, None, "", ""))
    folder = find_bundle(source, allow_download, _WANTED)
    if (folder / "bundle.json").is_file():
        bundle = load_bundle(folder)
        weights = folder / "unet" / _WEIGHTS
        return Base(
            name, bundle.unet_config, weights, None, bundle.scheduler_config["prediction_type"], str(bundle.info["licence"]), bundle
        )
    if not (folder / "unet" / "config.json").is_file():
        raise InputError(f"base {name!r} has no unet/config.json: name a diffusers folder, a .safetensors file or a hub id")
    if not (folder / "unet" / _WEIGHTS).is_file():
        raise InputError(f"base {name!r} has no unet/{_WEIGHTS}: save it as safetensors first")
    try:
        config, scheduler = _json(folder / "unet" / "config.json"), _json(folder / "scheduler" / "scheduler_config.json")
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the configuration of base {name!r}: {' '.join(str(error).split())[:200]}") from error
    text = (folder / "text_encoder", folder / "tokenizer")
    return _checked(
        Base(
            name,
            {key: value for key, value in config.items() if not key.startswith("_")},
            folder / "unet" / _WEIGHTS,
            text if (text[0] / "model.safetensors").is_file() and text[1].is_dir() else None,
            # diffusers' own default where the file does not say.
            scheduler.get("prediction_type", "epsilon") if scheduler else "",
            _licence(folder / "README.md"),
        )
    )


def text_encoder(source: str, base: Base | None, unconditional: str) -> TextEncoder:
    """The text encoder to train with.

    Args:
        source: "" for the base's own where it has one, else MiniLM; "minilm"; or a folder with text_encoder/ and tokenizer/.
        unconditional: what stands for no prompt, "zeros" or "empty".

    Raises:
        InputError: there is no such encoder, or its features have another width than the base attends to.
    """
    folders = (Path(source) / "text_encoder", Path(source) / "tokenizer") if source not in ("", "minilm") else None
    if not source and base and base.bundle:
        return base.bundle.text_encoder
    if not source and base:
        folders = base.text
    if folders:
        # As Stable Diffusion was trained: with all that comes out, also at padding.
        encoder = TextEncoder.from_folder(*folders, max_length=_length(folders[1]), unconditional=unconditional, padding="kept")
    else:
        encoder = TextEncoder.default(unconditional=unconditional)
    if base and encoder.width != base.text_width:
        raise InputError(
            f"the base attends to text of width {base.text_width}, the text encoder gives {encoder.width}: "
            "name the folder with its text_encoder and tokenizer as text_encoder"
        )
    return encoder


def _config_of_file(path: Path) -> dict:
    try:
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if name.startswith(_LDM)]  # noqa: SIM118 - no mapping
            shapes = {name.removeprefix(_LDM): tuple(file.get_slice(name).get_shape()) for name in names}
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read base {path}: {' '.join(str(error).split())[:200]}") from error
    try:
        return _config_of(shapes)
    except (KeyError, IndexError, ValueError, StopIteration) as error:
        raise InputError(
            f"base {path} is not laid out as Stable Diffusion 1.x or 2.x: {' '.join(str(error).split())[:120]} is missing"
        ) from error


def _config_of(shapes: dict[str, tuple[int, ...]]) -> dict:
    """UNet2DConditionModel arguments, from the shapes in Stable Diffusion's own layout (its UNetModel)."""
    first = shapes["input_blocks.0.0.weight"]
    inputs = 1 + max(int(found[1]) for name in shapes if (found := re.match(r"input_blocks\.(\d+)\.", name)))
    stops = [i for i in range(inputs) if f"input_blocks.{i}.0.op.weight" in shapes]
    starts, ends = [1, *(stop + 1 for stop in stops)], [*stops, inputs]
    widths = [shapes[f"input_blocks.{end - 1}.0.out_layers.3.weight"][0] for end in ends]
    attends = [f"input_blocks.{start}.1.proj_in.weight" in shapes for start in starts]
    attention = next(f"input_blocks.{start}.1." for start, does in zip(starts, attends, strict=True) if does)
    # 2.x has linear projections and heads 64 wide, 1.x convolutions and 8 heads everywhere.
    linear = len(shapes[attention + "proj_in.weight"]) == 2
    return {
        "sample_size": 96 if linear else 64,
        "in_channels": first[1],
        "out_channels": shapes["out.2.weight"][0],
        "block_out_channels": widths,
        "layers_per_block": ends[0] - starts[0],
        "down_block_types": ["CrossAttnDownBlock2D" if does else "DownBlock2D" for does in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if does else "UpBlock2D" for does in reversed(attends)],
        "cross_attention_dim": shapes[attention + "transformer_blocks.0.attn2.to_k.weight"][1],
        # Named by mistake in diffusers: the number of heads.
        "attention_head_dim": [max(1, width // 64) for width in widths] if linear else 8,
        "use_linear_projection": linear,
    }


def _checked(base: Base) -> Base:
    channels = (base.config.get("in_channels", 4), base.config.get("out_channels", 4))
    if channels != (4, 4):
        raise InputError(f"base {base.name!r} has {channels[0]} channels in and {channels[1]} out: a latent-diffusion UNet of 4 is needed")
    if not isinstance(base.config.get("cross_attention_dim"), int):
        raise InputError(f"base {base.name!r} does not attend to text of one width: a text-conditioned UNet is needed")
    return base


def _length(tokenizer: Path) -> int:
    return min(int(_json(tokenizer / "tokenizer_config.json").get("model_max_length", 77)), 77)


def _licence(card: Path) -> str:
    """The licence in the header of a model card, as hubs write it."""
    if not card.is_file():
        return ""
    header = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    found = re.search(r"^license(?:_name)?:\s*[\"']?([^\s\"']+)", header[1], re.MULTILINE) if header else None
    return found[1] if found else ""


def _json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
