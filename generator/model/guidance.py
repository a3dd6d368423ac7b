"""Guidance as an input of the network: one prediction instead of two (Meng et al. 2023, section 3.1, its first stage)."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

WIDTH = 256


def embed_guidance(scales: Tensor, width: int) -> Tensor:
    """Guidance scales [B], 1 and more, as the features [B, width] that a UNet's `time_cond_proj_dim` takes.

    The sines and cosines that diffusers feeds to its own distilled models (latent consistency models, Luo et al. 2023).
    """
    from diffusers.models.embeddings import get_timestep_embedding

    return get_timestep_embedding(1000 * (scales - 1), width, downscale_freq_shift=1)


def with_guidance_input(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A new UNet that takes `timestep_cond` too, with the weights of `unet` inside; until it is trained the input changes nothing."""
    config = {key: value for key, value in unet.config.items() if not key.startswith("_")}
    # Made without memory: every weight is assigned below. (from_config gives a pair only where unused arguments are asked for.)
    with torch.device("meta"):
        student = cast("UNet2DConditionModel", type(unet).from_config(config | {"time_cond_proj_dim": WIDTH}))
    state = {name: value.detach().clone() for name, value in unet.state_dict().items()}
    added = "time_embedding.cond_proj.weight"
    shape = student.get_parameter(added).shape
    student.load_state_dict(state | {added: torch.zeros(shape, device=unet.device, dtype=unet.dtype)}, strict=True, assign=True)
    return student.train(unet.training)
