"""Widening of a pretrained latent-diffusion UNet to the channels of an atlas."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel


def widen_unet(unet: UNet2DConditionModel, copies: int = 4) -> UNet2DConditionModel:
    """A new UNet that takes and gives `copies` times the channels, with the weights of `unet` inside (Gaussian Atlas, section 4).

    The weight of conv_in is repeated along its input and divided by `copies`, that of conv_out (and its bias) repeated along
    its output. Four copies of a latent therefore give four copies of the old output: training starts where the 2D model ended.
    """
    # Among the private entries is a list of those left at their defaults, which from_config would put back there.
    config = {key: value for key, value in unet.config.items() if not key.startswith("_")}
    config["in_channels"] = copies * config["in_channels"]
    config["out_channels"] = copies * config["out_channels"]
    # Made without memory: every weight is assigned below. (from_config gives a pair only where unused arguments are asked for.)
    with torch.device("meta"):
        wide = cast("UNet2DConditionModel", type(unet).from_config(config))
    state = {name: value.detach().clone() for name, value in unet.state_dict().items()}
    state["conv_in.weight"] = state["conv_in.weight"].repeat(1, copies, 1, 1) / copies
    state["conv_out.weight"] = state["conv_out.weight"].repeat(copies, 1, 1, 1)
    state["conv_out.bias"] = state["conv_out.bias"].repeat(copies)
    wide.load_state_dict(state, strict=True, assign=True)
    return wide.train(unet.training)
