"""The gsplat backend (Ye et al. 2024), for Gaussians that live on a CUDA device."""

from __future__ import annotations

from torch import Tensor

from ..errors import WorkError
from ..gaussians import Gaussians
from .cameras import Cameras
from .ewa import LOW_PASS, NEAR


def render_views(gaussians: Gaussians, cameras: Cameras) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """All views: premultiplied rgb [V, H, W, 3], alpha [V, H, W], alpha-weighted depth [V, H, W], means2d [V, N, 2], radii [V, N]."""
    try:
        from gsplat import rasterization
    except ImportError as error:
        raise WorkError("rendering on a GPU needs gsplat: pip install gsplat packaging, or move the Gaussians to the CPU") from error
    device = gaussians.means.device
    image, alpha, info = rasterization(
        gaussians.means,
        gaussians.quaternions,
        gaussians.scales,
        gaussians.opacities,
        gaussians.colors,
        cameras.viewmats.to(device),
        cameras.Ks.to(device),
        cameras.width,
        cameras.height,
        near_plane=NEAR,
        eps2d=LOW_PASS,
        render_mode="RGB+D",
        packed=False,
    )
    radii = info["radii"]
    radii = radii.amax(-1) if radii.ndim == 3 else radii
    return image[..., :3], alpha[..., 0], image[..., 3], info["means2d"], radii.to(image.dtype)
