"""The renderer's equations, written out: every Gaussian at every pixel. Slow; the other backends are held against it.

Differentiable by torch, in any floating dtype; float64 is what the tests compare with.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..gaussians import Gaussians
from .cameras import Cameras
from .ewa import ALPHA_CUT, ALPHA_MAX, LOW_PASS, MARGIN, NEAR


def render_views(gaussians: Gaussians, cameras: Cameras) -> tuple[Tensor, Tensor, Tensor]:
    """All views: premultiplied rgb [V, H, W, 3], alpha [V, H, W] and alpha-weighted depth [V, H, W]."""
    views = [_render_view(gaussians, cameras, view) for view in range(len(cameras))]
    rgb, alpha, depth = (torch.stack(parts) for parts in zip(*views, strict=True))
    return rgb, alpha, depth


def _render_view(gaussians: Gaussians, cameras: Cameras, view: int) -> tuple[Tensor, Tensor, Tensor]:
    viewmat, K = cameras.viewmats[view].to(gaussians.means), cameras.Ks[view].to(gaussians.means)
    points = gaussians.means @ viewmat[:3, :3].T + viewmat[:3, 3]
    covariances = viewmat[:3, :3] @ gaussians.covariances() @ viewmat[:3, :3].T
    columns = torch.arange(cameras.width, dtype=points.dtype)[None, :] + 0.5
    rows = torch.arange(cameras.height, dtype=points.dtype)[:, None] + 0.5
    fx, fy, cx, cy = K[0, 0], K[1, 1], K[0, 2], K[1, 2]

    rgb = torch.zeros(cameras.height, cameras.width, 3, dtype=points.dtype)
    depth, transmittance = torch.zeros_like(rgb[..., 0]), torch.ones_like(rgb[..., 0])
    for i in torch.argsort(points[:, 2], stable=True).tolist():
        x, y, z = points[i]
        if z <= NEAR:
            continue
        # Perspective, linearised at the centre (Zwicker et al. 2001, eq. 29), or at most a little outside of the frame.
        u = (x / z).clamp(-cx / fx - MARGIN * cameras.width / fx, (cameras.width - cx) / fx + MARGIN * cameras.width / fx)
        v = (y / z).clamp(-cy / fy - MARGIN * cameras.height / fy, (cameras.height - cy) / fy + MARGIN * cameras.height / fy)
        zero = torch.zeros_like(z)
        jacobian = torch.stack([torch.stack([fx / z, zero, -fx * u / z]), torch.stack([zero, fy / z, -fy * v / z])])
        covariance = jacobian @ covariances[i] @ jacobian.T + LOW_PASS * torch.eye(2, dtype=points.dtype)
        inverse = torch.linalg.inv(covariance)
        dx, dy = columns - (fx * x / z + cx), rows - (fy * y / z + cy)
        distance = inverse[0, 0] * dx**2 + 2 * inverse[0, 1] * dx * dy + inverse[1, 1] * dy**2
        alpha = (gaussians.opacities[i] * torch.exp(-distance / 2)).clamp_max(ALPHA_MAX)
        alpha = torch.where(alpha < ALPHA_CUT, torch.zeros_like(alpha), alpha)
        # Front to back (Kerbl et al. 2023, eq. 3).
        weight = transmittance * alpha
        rgb = rgb + weight[..., None] * gaussians.colors[i]
        depth = depth + weight * z
        transmittance = transmittance * (1 - alpha)
    return rgb, 1 - transmittance, depth
