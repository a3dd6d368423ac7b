"""Cameras and renderers of Gaussians: EWA splatting, blended front to back in display space."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InputError
from ..gaussians import Gaussians
from . import cpu, cuda
from .cameras import Cameras

__all__ = ["Cameras", "Rendering", "render", "save_png"]


class Rendering(NamedTuple):
    """V rendered views on the Gaussians' device."""

    rgb: Tensor  # [V, H, W, 3] display sRGB over the background
    alpha: Tensor  # [V, H, W] in 0..1
    depth: Tensor  # [V, H, W] expected camera z of what is seen, length units; 0 where nothing is


@torch.no_grad()
def render(gaussians: Gaussians, cameras: Cameras, background: tuple[float, float, float] | Tensor = (1.0, 1.0, 1.0)) -> Rendering:
    """Render Gaussians from every camera; gsplat where they live on a CUDA device, torch on the CPU.

    Args:
        background: display sRGB in 0..1 behind the object.
    """
    if gaussians.means.is_cuda:
        color, alpha, depth = cuda.render_views(gaussians, cameras)
    else:
        gaussians = gaussians.to(torch.float32)
        views = [cpu.render_view(gaussians, cameras, view) for view in range(len(cameras))]
        color, alpha, depth = (torch.stack(parts) for parts in zip(*views, strict=True))
    background = torch.as_tensor(background, dtype=color.dtype, device=color.device)
    return Rendering(color + (1 - alpha[..., None]) * background, alpha, depth / alpha.clamp_min(1e-6))


def save_png(image: Tensor, path: str | Path) -> None:
    """Write display values [H, W, 3 or 4] in 0..1 as an 8-bit PNG.

    Raises:
        InputError: the image has another shape, or the path cannot be written.
    """
    from PIL import Image

    if image.ndim != 3 or image.shape[2] not in (3, 4):
        raise InputError(f"an image must be [H, W, 3] or [H, W, 4], got {list(image.shape)}")
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        Image.fromarray((image.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()).save(partial, format="PNG")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise InputError(f"cannot write {path}: {error.strerror or error}; choose a writable folder") from error
