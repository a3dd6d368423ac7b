"""Perceptual distance of pictures: LPIPS where it is installed, else the shift-tolerant ST-LPIPS, under its own name.

LPIPS (Zhang et al. 2018) compares features of a network trained on photographs, each unit-normalised over its channels and
weighted by how much people notice it. ST-LPIPS (Ghildyal and Liu 2022) has the same heads on an AlexNet whose subsampling is
blurred first (Zhang 2019). Its weights come with the package `stlpips-pytorch`; its trunk is written here from the shapes of
those weights, and gives what the package's page says for the example pictures.
"""

from __future__ import annotations

import importlib
import importlib.util
import pickle
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, max_pool2d, pad, relu

from generator.errors import WorkError

WEIGHTS = "weights/vST0.0/alex_shift_tolerant.pth"
# Convolutions of the trunk: name in the file, padding, and whether a blurred halving of the maximum comes before it.
_CONVOLUTIONS = (("slice2.5", 2, "slice2.4"), ("slice3.9", 1, "slice3.8"), ("slice4.11", 1, None), ("slice5.13", 1, None))


class StLpips(nn.Module):
    """The distance of two batches of pictures; frozen."""

    name = "st_lpips"
    # Of the buffers those that are not looked up by a name made up at run time.
    scaling_layer_shift: Tensor
    scaling_layer_scale: Tensor
    net_slice1_1_filt: Tensor

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        for key, value in weights.items():
            self.register_buffer(key.replace(".", "_"), value.float())

    def features(self, pictures: Tensor) -> list[Tensor]:
        """Five maps [B, C, h, w], unit-normalised over C, of pictures [B, 3, H, W] in 0..1."""
        x = (2 * pictures - 1 - self.scaling_layer_shift) / self.scaling_layer_scale
        x = relu(_halve(self._convolve(x, "slice1.0", 2), self.net_slice1_1_filt))
        maps = [x]
        for name, padding, blur in _CONVOLUTIONS:
            if blur:
                x = _halve(max_pool2d(x, 3, 1), getattr(self, f"net_{blur}_filt".replace(".", "_")))
            x = relu(self._convolve(x, name, padding))
            maps.append(x)
        return [x / (x.square().sum(1, keepdim=True) + 1e-20).sqrt() for x in maps]

    def forward(self, pictures: Tensor, targets: Tensor | list[Tensor]) -> Tensor:
        """Distances [B] of pictures [B, 3, H, W] in 0..1 to others, or to their `features`. Sides of 32 pixels at least."""
        targets = targets if isinstance(targets, list) else self.features(targets)
        distance = pictures.new_zeros(len(pictures))
        for i, (x, y) in enumerate(zip(self.features(pictures), targets, strict=True)):
            head = getattr(self, f"lin{i}_model_1_weight")
            distance = distance + conv2d((x - y).square(), head).mean((1, 2, 3))
        return distance

    def _convolve(self, x: Tensor, name: str, padding: int) -> Tensor:
        prefix = f"net_{name}".replace(".", "_")
        return conv2d(x, getattr(self, f"{prefix}_weight"), getattr(self, f"{prefix}_bias"), padding=padding)


class Lpips(nn.Module):
    """The `lpips` package's distance (AlexNet) with the same calls as `StLpips`."""

    name = "lpips"

    def __init__(self) -> None:
        super().__init__()
        self.distance = importlib.import_module("lpips").LPIPS(net="alex", verbose=False).requires_grad_(False)

    def features(self, pictures: Tensor) -> list[Tensor]:
        return [pictures]

    def forward(self, pictures: Tensor, targets: Tensor | list[Tensor]) -> Tensor:
        targets = targets[0] if isinstance(targets, list) else targets
        return self.distance(2 * pictures - 1, 2 * targets - 1).reshape(-1)


def _halve(x: Tensor, kernel: Tensor) -> Tensor:
    """Every second pixel of the blurred maps (Zhang 2019, BlurPool), mirrored at the border."""
    return conv2d(pad(x, (2, 2, 2, 2), mode="reflect"), kernel, stride=2, groups=x.shape[1])


@cache
def perceptual() -> StLpips | Lpips | None:
    """The best distance that this environment has; None without any. Its `name` belongs beside every number."""
    for candidate in (lpips, st_lpips):
        try:
            return candidate()
        except WorkError:
            continue
    return None


@cache
def lpips() -> Lpips:
    """LPIPS itself.

    Raises:
        WorkError: the package or its weights are missing.
    """
    try:
        return Lpips().eval()
    except Exception as error:  # its imports and downloads fail in many ways, and each means the same
        raise WorkError(f"LPIPS cannot be used here ({type(error).__name__}: {error}): st_lpips works offline") from error


@cache
def st_lpips() -> StLpips:
    """ST-LPIPS with its AlexNet.

    Raises:
        WorkError: the package with its weights is missing or holds something else.
    """
    found = importlib.util.find_spec("stlpips_pytorch")
    if found is None or not found.submodule_search_locations:
        raise WorkError("ST-LPIPS needs its weights: pip install --no-deps stlpips-pytorch==0.0.2")
    path = Path(found.submodule_search_locations[0]) / WEIGHTS
    try:
        return StLpips(torch.load(path, map_location="cpu", weights_only=True)).eval()
    except (OSError, RuntimeError, KeyError, EOFError, pickle.UnpicklingError) as error:
        raise WorkError(f"{path}: not readable ({type(error).__name__}): install stlpips-pytorch==0.0.2 again") from error
