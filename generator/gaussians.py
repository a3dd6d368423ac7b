"""The container at the centre of the project: N activated 3D Gaussians."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from .errors import InputError

# Widths of each field's last axis; None means a plain [N] vector.
_WIDTHS = {"means": 3, "quaternions": 4, "scales": 3, "opacities": None, "colors": 3}


@dataclass(frozen=True)
class Gaussians:
    """N Gaussians, always activated: raw logits and logs exist only in files and networks.

    Frame: right-handed, Z up, front towards -Y (Blender's). An object of this project is centred and the longest
    side of its bounding box is 1, so lengths are in units of that side. All tensors share one floating dtype and
    one device.

    Raises:
        InputError: a field has the wrong shape, dtype or device.
    """

    means: Tensor  # [N, 3] centres, object frame
    quaternions: Tensor  # [N, 4] unit, (w, x, y, z), Gaussian axes to object frame
    scales: Tensor  # [N, 3] standard deviations along the Gaussian's axes, linear, > 0
    opacities: Tensor  # [N] in 0..1
    colors: Tensor  # [N, 3] display sRGB in 0..1 (spherical harmonics of degree 0)

    def __post_init__(self) -> None:
        means = self.means
        if not isinstance(means, Tensor) or means.ndim != 2:
            raise InputError(f"Gaussians.means must be a tensor [N, 3], got {_describe(means)}")
        count = means.shape[0]
        for name, width in _WIDTHS.items():
            value = getattr(self, name)
            shape = (count,) if width is None else (count, width)
            if not isinstance(value, Tensor) or tuple(value.shape) != shape:
                raise InputError(f"Gaussians.{name} must be a tensor {list(shape)}, got {_describe(value)}")
            if not value.is_floating_point() or value.dtype != means.dtype or value.device != means.device:
                raise InputError(f"Gaussians.{name} is {value.dtype} on {value.device}, means are {means.dtype} on {means.device}")

    def __len__(self) -> int:
        return self.means.shape[0]

    def __getitem__(self, index: Tensor | slice) -> Gaussians:
        """The Gaussians selected by a boolean mask [N], indices [M] or a slice."""
        return Gaussians(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def to(self, *args, **kwargs) -> Gaussians:
        """Move or cast every field, as `torch.Tensor.to`."""
        return Gaussians(**{f.name: getattr(self, f.name).to(*args, **kwargs) for f in fields(self)})

    def detach(self) -> Gaussians:
        """The same Gaussians without their history."""
        return Gaussians(**{f.name: getattr(self, f.name).detach() for f in fields(self)})

    def replace(self, **changes: Tensor) -> Gaussians:
        """A copy with the named fields replaced."""
        return replace(self, **changes)

    def finite(self) -> Tensor:
        """Mask [N] of the Gaussians in which every number is finite."""
        numbers = torch.cat([getattr(self, f.name).reshape(len(self), _WIDTHS[f.name] or 1) for f in fields(self)], dim=1)
        return torch.isfinite(numbers).all(1)

    def covariances(self) -> Tensor:
        """Covariance matrices [N, 3, 3] = R S S^T R^T in squared length units (Kerbl et al. 2023, eq. 6)."""
        half = quaternions_to_matrices(self.quaternions) * self.scales[:, None, :]
        return half @ half.transpose(1, 2)


def concatenate(parts: list[Gaussians]) -> Gaussians:
    """One set of all Gaussians of the parts, in their order; there must be one part at least, all of one dtype and device."""
    return Gaussians(**{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Gaussians)})


def quaternions_to_matrices(quaternions: Tensor) -> Tensor:
    """Rotation matrices [..., 3, 3] of quaternions [..., 4] (w, x, y, z); normalised first."""
    w, x, y, z = torch.nn.functional.normalize(quaternions, dim=-1).unbind(-1)
    rows = (
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    )  # fmt: skip
    return torch.stack(rows, dim=-1).reshape(*quaternions.shape[:-1], 3, 3)


def matrices_to_quaternions(matrices: Tensor) -> Tensor:
    """Unit quaternions [N, 4] (w, x, y, z) of rotation matrices [N, 3, 3] (Shepperd 1978: the largest component first)."""
    m = matrices.flatten(1)
    xx, yy, zz = m[:, 0], m[:, 4], m[:, 8]
    x, y, z = m[:, 7] - m[:, 5], m[:, 2] - m[:, 6], m[:, 3] - m[:, 1]
    xy, xz, yz = m[:, 3] + m[:, 1], m[:, 2] + m[:, 6], m[:, 7] + m[:, 5]
    # Four times the outer product of the quaternion with itself; each row is the quaternion, times one of its components.
    outer = torch.stack([
        1 + xx + yy + zz, x, y, z,
        x, 1 + xx - yy - zz, xy, xz,
        y, xy, 1 - xx + yy - zz, yz,
        z, xz, yz, 1 - xx - yy + zz,
    ], dim=1).reshape(-1, 4, 4)  # fmt: skip
    largest = outer.diagonal(dim1=1, dim2=2).argmax(1)
    return torch.nn.functional.normalize(outer[torch.arange(len(m), device=m.device), largest], dim=1)


def _describe(value: object) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
