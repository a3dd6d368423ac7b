"""A real but tiny model for tests: random weights, 32 x 32 cells, all parts of a bundle."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from generator.atlas import CHANNELS, AtlasLayout, ChannelSpec, Normalization
from generator.model.bundle import save_bundle
from generator.model.text import TextEncoder

FOLD = 4
INFO = {
    "name": "tiny",
    "version": "0.0.1",
    "licence": "CC0-1.0",
    "trained_on": "nothing: random weights for tests",
    "fold": FOLD,
    "inference": {"dtype": "float32"},
    "defaults": {"num_inference_steps": 4, "guidance_scale": 2.0},
}
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
    "timestep_spacing": "trailing",
    "rescale_betas_zero_snr": True,
}


def tiny_unet(channels: int, width: int = 384, seed: int = 0):
    """A two-level UNet2DConditionModel of a few thousand weights."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=width,
        attention_head_dim=4,
    )
    # Cross-attention of a random network barely counts; tests want prompts to matter.
    with torch.no_grad():
        for name, value in unet.named_parameters():
            if "attn2.to_v" in name or "attn2.to_out.0.weight" in name:
                value.mul_(6)
    return unet.eval()


@cache
def layout() -> AtlasLayout:
    return AtlasLayout.load_default(32)


@cache
def text_encoder() -> TextEncoder:
    return TextEncoder.default()


def normalization(layout_id: str | None = None) -> Normalization:
    mean = torch.zeros(CHANNELS, 1, 1)
    mean[[3, 4, 5, 6, 7, 11]] = 0.5
    mean[8:11] = -4.0
    mean[12] = 0.7
    spread = torch.full((CHANNELS, 1, 1), 0.2)
    low, high = (mean - 1)[:, 0, 0].clone(), (mean + 1)[:, 0, 0].clone()
    return Normalization(mean, spread, low, high, "channel", layout_id or layout().id)


def write_tiny_bundle(directory: Path, **changes) -> Path:
    """Save the tiny model; `changes` replace arguments of save_bundle, or keys of its info."""
    info = INFO | {
        key: changes.pop(key)
        for key in list(changes)
        if key in INFO or key in ("metrics", "vocabulary", "distilled_guidance", "wrap", "coverage", "damping")
    }
    if "shares" in changes:  # `regression` is the tensors, and in the info how they are used
        info["regression"] = changes.pop("shares")
    parts = {
        "unet": tiny_unet(CHANNELS * info["fold"] ** 2),
        "scheduler_config": SCHEDULER,
        "text_encoder": text_encoder(),
        "layout": layout(),
        "normalization": normalization(),
        "channels": ChannelSpec(),
    }
    return save_bundle(directory, **(parts | changes), info=info)
