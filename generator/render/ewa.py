"""Elliptical weighted average: Gaussians in space to Gaussians in the image (Zwicker et al. 2001; Kerbl et al. 2023, section 4)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..gaussians import quaternions_to_matrices

LOW_PASS = 0.3  # pixels squared, added to both image axes so that no splat falls between pixels
ALPHA_CUT = 1 / 255  # a fainter contribution is skipped
ALPHA_MAX = 0.999  # keeps the transmittance above zero, as gsplat does
NEAR = 0.01  # length units in front of the camera
MARGIN = 0.15  # of the frame: how far outside the linearised projection is trusted


class Projected(NamedTuple):
    """Gaussians on one camera's image plane, in the order of the input."""

    means: Tensor  # [N, 2] pixels, the centre of the first pixel is at 0.5
    covariances: Tensor  # [N, 3] xx, xy, yy in pixels squared, low-pass included
    conics: Tensor  # [N, 3] the inverse's xx, xy, yy
    depths: Tensor  # [N] camera z, length units
    extents: Tensor  # [N, 2] half sides in pixels of the box outside which alpha < 1/255; 0 if never visible


def project(
    means: Tensor, quaternions: Tensor, scales: Tensor, opacities: Tensor, viewmat: Tensor, K: Tensor, size: tuple[int, int]
) -> Projected:
    """Project N Gaussians to one camera; differentiable.

    Args:
        means, quaternions, scales, opacities: [N, 3], [N, 4], [N, 3], [N], as in `Gaussians`.
        viewmat, K: [4, 4] world to camera (OpenCV axes), [3, 3] intrinsics.
        size: width and height in pixels.
    """
    rotation, translation = viewmat[:3, :3], viewmat[:3, 3]
    x, y, z = (means @ rotation.T + translation).unbind(-1)
    in_front = z > NEAR
    depth = torch.where(in_front, z, torch.ones_like(z))
    fx, fy, cx, cy = K[0, 0], K[1, 1], K[0, 2], K[1, 2]

    # The Jacobian is only trusted a little outside the frame: further out it would smear splats across the image.
    width, height = size
    u, v = x / depth, y / depth
    margin_x, margin_y = MARGIN * width / fx, MARGIN * height / fy
    u_safe = u.clamp(min=-cx / fx - margin_x, max=(width - cx) / fx + margin_x)
    v_safe = v.clamp(min=-cy / fy - margin_y, max=(height - cy) / fy + margin_y)
    zero = torch.zeros_like(u)
    jacobian = torch.stack([fx / depth, zero, -fx * u_safe / depth, zero, fy / depth, -fy * v_safe / depth], dim=-1).reshape(-1, 2, 3)

    half = jacobian @ (rotation @ (quaternions_to_matrices(quaternions) * scales[:, None, :]))
    a = (half[:, 0] ** 2).sum(-1) + LOW_PASS
    b = (half[:, 0] * half[:, 1]).sum(-1)
    c = (half[:, 1] ** 2).sum(-1) + LOW_PASS
    determinant = (a * c - b * b).clamp_min(1e-12)
    conics = torch.stack([c, -b, a], dim=-1) / determinant[:, None]

    with torch.no_grad():
        reach = torch.sqrt(2 * torch.log((opacities / ALPHA_CUT).clamp_min(1.0))) * in_front
        extents = reach[:, None] * torch.sqrt(torch.stack([a, c], dim=-1))
    return Projected(torch.stack([fx * u + cx, fy * v + cy], dim=-1), torch.stack([a, b, c], dim=-1), conics, z, extents)


def pixel_boxes(projected: Projected, size: tuple[int, int]) -> Tensor:
    """Pixels that each splat may touch: [N, 4] int64 first column, first row, last column + 1, last row + 1."""
    limit = torch.tensor(size)
    # Pixel i is sampled at i + 0.5.
    first = torch.ceil(projected.means - projected.extents - 0.5).nan_to_num(0.0).clamp(-1e6, 1e6).long()
    last = torch.floor(projected.means + projected.extents - 0.5).nan_to_num(-1.0).clamp(-1e6, 1e6).long() + 1
    first, last = torch.minimum(first.clamp_min(0), limit), torch.minimum(last.clamp_min(0), limit)
    empty = (projected.extents <= 0).any(1) | (last <= first).any(1)
    last = torch.where(empty[:, None], first, last)
    return torch.cat([first, last], dim=1)
