"""The pretrained 2D latent-diffusion model that an atlas model starts from: a diffusers folder, one file, or a hub id."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from generator.errors import InputError
from generator.model.bundle import find_bundle
from generator.model.text import TextEncoder, sha256

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

# What of a hub's model is fetched: neither its autoencoder nor pickles, nor the same weights in half precision.
_WANTED = ["unet/config.json", "unet/diffusion_pytorch_model.safetensors", "scheduler/*.json", "README.md"]
_WANTED += ["text_encoder/config.json", "text_encoder/model.safetensors", "tokenizer/*"]
# Where Stable Diffusion's own files keep the UNet.
_LDM = "model.diffusion_model."


@dataclass(frozen=True)
class Base:
    """A 2D model, ready to be widened."""

    unet: UNet2DConditionModel  # 4 channels in and out, float32 on the CPU
    text: tuple[Path, Path] | None  # folders of its text encoder and tokenizer, where it has them
    prediction_type: str  # epsilon, v_prediction or sample; "" where nothing says
    licence: str  # as its card names it; "" where nothing says
    sha256: str  # of the UNet's weights

    @property
    def text_width(self) -> int:
        """Length of the text features that it attends to."""
        return int(self.unet.config.cross_attention_dim)


def load_base(source: str | os.PathLike, allow_download: bool = True) -> Base:
    """A 2D model's UNet and where its text encoder lies.

    Args:
        source: a diffusers folder, a .safetensors file in Stable Diffusion's own layout (1.x or 2.x), or a hub id.

    Raises:
        InputError: there is no such model, or it is no text-conditioned UNet of 4 channels.
    """
    path = Path(source)
    if path.suffix == ".safetensors":
        return _from_file(path)
    folder = find_bundle(source, allow_download, _WANTED)
    if not (folder / "unet" / "config.json").is_file():
        raise InputError(f"base {str(source)!r} has no unet/config.json: name a diffusers folder, a .safetensors file or a hub id")
    from diffusers import UNet2DConditionModel

    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    if not weights.is_file():
        raise InputError(f"base {str(source)!r} has no unet/{weights.name}: save it as safetensors first")
    try:
        unet = UNet2DConditionModel.from_pretrained(str(folder), subfolder="unet", use_safetensors=True, torch_dtype=torch.float32)
        scheduler = _json(folder / "scheduler" / "scheduler_config.json")
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"cannot read a UNet from base {str(source)!r}: {' '.join(str(error).split())[:200]}") from error
    text = (folder / "text_encoder", folder / "tokenizer")
    return Base(
        _checked(unet, source),
        text if (text[0] / "model.safetensors").is_file() and text[1].is_dir() else None,
        # diffusers' own default where the file does not say.
        scheduler.get("prediction_type", "epsilon") if scheduler else "",
        _licence(folder / "README.md"),
        sha256(weights),
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


def _from_file(path: Path) -> Base:
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    try:
        state = {name: value for name, value in load_file(path).items() if name.startswith(_LDM)}
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read base {path}: {' '.join(str(error).split())[:200]}") from error
    try:
        config = _config_of({name.removeprefix(_LDM): value for name, value in state.items()})
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(config)
        converted = convert_ldm_unet_checkpoint(state, config)
        unet.load_state_dict({name: value.float() for name, value in converted.items()}, strict=True, assign=True)
    except (KeyError, IndexError, ValueError, RuntimeError) as error:
        raise InputError(f"base {path} is not laid out as Stable Diffusion 1.x or 2.x ({' '.join(str(error).split())[:120]})") from error
    return Base(_checked(unet, path), None, "", "", sha256(path))


def _config_of(state: dict[str, torch.Tensor]) -> dict:
    """UNet2DConditionModel arguments, from the shapes in Stable Diffusion's own layout (its UNetModel)."""
    first = state["input_blocks.0.0.weight"]
    inputs = 1 + max(int(found[1]) for name in state if (found := re.match(r"input_blocks\.(\d+)\.", name)))
    stops = [i for i in range(inputs) if f"input_blocks.{i}.0.op.weight" in state]
    starts, ends = [1, *(stop + 1 for stop in stops)], [*stops, inputs]
    widths = [state[f"input_blocks.{end - 1}.0.out_layers.3.weight"].shape[0] for end in ends]
    attends = [f"input_blocks.{start}.1.proj_in.weight" in state for start in starts]
    attention = next(f"input_blocks.{start}.1." for start, does in zip(starts, attends, strict=True) if does)
    # 2.x has linear projections and heads 64 wide, 1.x convolutions and 8 heads everywhere.
    linear = state[attention + "proj_in.weight"].ndim == 2
    return {
        "sample_size": 96 if linear else 64,
        "in_channels": first.shape[1],
        "out_channels": state["out.2.weight"].shape[0],
        "block_out_channels": widths,
        "layers_per_block": ends[0] - starts[0],
        "down_block_types": ["CrossAttnDownBlock2D" if does else "DownBlock2D" for does in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if does else "UpBlock2D" for does in reversed(attends)],
        "cross_attention_dim": state[attention + "transformer_blocks.0.attn2.to_k.weight"].shape[1],
        # Named by mistake in diffusers: the number of heads.
        "attention_head_dim": [max(1, width // 64) for width in widths] if linear else 8,
        "use_linear_projection": linear,
    }


def _checked(unet: UNet2DConditionModel, source: str | os.PathLike) -> UNet2DConditionModel:
    channels = (unet.config.in_channels, unet.config.out_channels)
    if channels != (4, 4):
        raise InputError(
            f"base {str(source)!r} has {channels[0]} channels in and {channels[1]} out: a latent-diffusion UNet of 4 is needed"
        )
    if not isinstance(unet.config.cross_attention_dim, int):
        raise InputError(f"base {str(source)!r} attends to text of several widths, which is not supported")
    return unet


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
