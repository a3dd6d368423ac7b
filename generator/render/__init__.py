"""Cameras and renderers of Gaussians: EWA splatting, blended front to back in display space.

One function, `render`, over three backends of the same semantics: gsplat on CUDA, `compiled` (numba) and `cpu` (torch
alone, which is what Blender has) on the CPU. `reference` writes the equations out and is what they are held against.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InputError
from ..files import replacing
from ..gaussians import Gaussians
from . import cpu, cuda
from .cameras import Cameras

__all__ = ["Cameras", "Rendering", "render", "save_png"]


class Rendering(NamedTuple):
    """V rendered views on the Gaussians' device."""

    rgb: Tensor  # [V, H, W, 3] display sRGB over the background
    alpha: Tensor  # [V, H, W] in 0..1
    depth: Tensor  # [V, H, W] expected camera z of what is seen, length units; 0 where nothing is
    means2d: Tensor  # [V, N, 2] pixels; part of the graph, so that `means2d.retain_grad()` gives what densification looks at
    radii: Tensor  # [V, N] pixels, half the longer side of the splat's box; 0 where it is not seen


def render(gaussians: Gaussians, cameras: Cameras, background: tuple[float, float, float] | Tensor | None = (1.0, 1.0, 1.0)) -> Rendering:
    """Render Gaussians from every camera, differentiably in all their fields.

    gsplat draws where they live on a CUDA device. On the CPU numba does if it is installed, and if it is loaded already or
    gradients are wanted: loading it takes longer than one picture by torch alone.

    Args:
        gaussians: any floating dtype on the CPU, where float32 is computed with.
        background: display sRGB in 0..1 behind the object; None leaves the colours multiplied by alpha, with nothing behind.
    """
    if gaussians.means.is_cuda:
        color, alpha, depth, means2d, radii = cuda.render_views(gaussians, cameras)
    else:
        gaussians = gaussians.to(torch.float32)
        color, alpha, depth, means2d, radii = _cpu_backend(gaussians).render_views(gaussians, cameras)
    if background is not None:
        color = color + (1 - alpha[..., None]) * torch.as_tensor(background, dtype=color.dtype, device=color.device)
    return Rendering(color, alpha, depth / alpha.clamp_min(1e-6), means2d, radii)


def _cpu_backend(gaussians: Gaussians):
    wanted = "numba" in sys.modules or (torch.is_grad_enabled() and any(value.requires_grad for value in vars(gaussians).values()))
    if wanted and importlib.util.find_spec("numba"):
        from . import compiled

        return compiled
    return cpu


def save_png(image: Tensor, path: str | Path) -> None:
    """Write display values [H, W, 3 or 4] in 0..1 as an 8-bit PNG.

    Raises:
        InputError: the image has another shape, or the path cannot be written.
    """
    from PIL import Image

    if image.ndim != 3 or image.shape[2] not in (3, 4):
        raise InputError(f"an image must be [H, W, 3] or [H, W, 4], got {list(image.shape)}")
    with replacing(path) as temporary:
        Image.fromarray((image.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()).save(temporary, format="PNG")
