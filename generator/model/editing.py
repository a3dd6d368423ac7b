"""What a sampler needs to start from an object instead of noise alone: where its schedule begins, which cells it keeps.

Variations are partial re-noising (SDEdit, Meng et al. 2022), in-painting pastes the kept cells at every noise level (RePaint,
Lugmayr et al. 2022, without its jumps back in time, which lost the prompt here).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..atlas import CHANNELS, Atlas, AtlasLayout, ChannelSpec, Normalization
from ..errors import InputError
from .folding import fold

if TYPE_CHECKING:
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler


@dataclass(frozen=True)
class Source:
    """An object that sampling starts from.

    Raises:
        InputError: the atlas is of another layout or other channels, or the mask does not fit it or selects nothing.
    """

    atlas: Atlas
    strength: float  # 0..1, share of the noise schedule that is gone through again
    mask: Tensor | None  # [size, size] bool, the cells to make anew; None is all

    @classmethod
    def of(cls, atlas: object, strength: float | None, mask: object, layout: AtlasLayout, channels: ChannelSpec) -> Source:
        """Check what a caller gave; the strength is by default 1 with a mask and 0.5 without."""
        if not isinstance(atlas, Atlas):
            raise InputError(f"init_atlas must be an Atlas, got {type(atlas).__name__}; the pipeline's encode makes one")
        if atlas.layout_id != layout.id:
            raise InputError(f"init_atlas was made with layout {atlas.layout_id}, this model has {layout.id}: use the model that made it")
        if atlas.spec != channels:
            raise InputError("init_atlas holds other channels than this model: encode its Gaussians with this model")
        if not bool(torch.isfinite(atlas.values).all()):
            raise InputError("init_atlas contains NaN or infinity")
        if mask is not None:
            mask = torch.as_tensor(mask)
            if tuple(mask.shape) != (layout.size, layout.size) or mask.dtype != torch.bool:
                raise InputError(f"mask must be bool [{layout.size}, {layout.size}], got {mask.dtype} {list(mask.shape)}")
            if not bool(mask.any()):
                raise InputError("mask selects no cell to make anew")
        return cls(atlas, (0.5 if mask is None else 1.0) if strength is None else float(strength), mask)

    def normalized(self, normalization: Normalization, factor: int) -> Tensor:
        """Network values [1, 16 factor^2, size / factor, size / factor], within what the model's data set held."""
        low, high = normalization.minimum[:, None, None], normalization.maximum[:, None, None]
        values = self.atlas.values.detach().float().cpu()
        return fold(normalization.normalize(torch.minimum(torch.maximum(values, low), high))[None], factor)

    def folded_mask(self, factor: int) -> Tensor | None:
        """The mask in the shape of `normalized`."""
        return None if self.mask is None else fold(self.mask[None, None].expand(1, CHANNELS, -1, -1).float(), factor) > 0

    def paste(self, values: Tensor) -> Tensor:
        """Raw values [..., 16, size, size] with the kept cells put in, bit for bit."""
        return values if self.mask is None else torch.where(self.mask, values, self.atlas.values.to(values))


def set_start(scheduler: DPMSolverMultistepScheduler, steps: int, strength: float, device: torch.device) -> None:
    """Set the timesteps of a run that begins at `strength` of the noise schedule.

    diffusers leaves steps out; here all of them go through the part that is left, so that any strength can be had and a small one
    is solved as finely. The solver begins with its first-order step wherever it begins.

    Raises:
        InputError: the scheduler's own spacing of noise levels cannot be cut.
    """
    if strength == 1:
        scheduler.set_timesteps(steps, device=device)
        return
    levels = max(1, round(strength * scheduler.config["num_train_timesteps"]))
    count = min(steps, levels)
    try:
        scheduler.set_timesteps(timesteps=[round(levels * (count - index) / count) - 1 for index in range(count)], device=device)
    except ValueError as error:
        raise InputError(f"this model can only start from noise: {error}") from error


def clean_estimate(prediction: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor, kind: str) -> Tensor:
    """The clean values that a prediction means at x = alpha clean + sigma noise."""
    if kind == "sample":
        return prediction
    return alpha * x - sigma * prediction if kind == "v_prediction" else (x - sigma * prediction) / alpha


def shift_estimate(prediction: Tensor, shift: Tensor, alpha: Tensor, sigma: Tensor, kind: str) -> Tensor:
    """The prediction whose clean estimate is larger by `shift`."""
    if kind == "sample":
        return prediction + shift
    return prediction - shift * (1 / sigma if kind == "v_prediction" else alpha / sigma)
