"""Pinhole cameras in OpenCV axes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError

# G-Objaverse's field of view, from a little further off so that a unit box stays in the frame from most sides.
FOV_DEGREES = 39.6
RADIUS = 1.9
# To look at an object, further off: no corner of a unit box leaves the frame.
ORBIT_RADIUS = 2.5


@dataclass(frozen=True)
class Cameras:
    """V pinhole cameras that share an image size.

    Raises:
        InputError: a shape is wrong or the image is empty.
    """

    viewmats: Tensor  # [V, 4, 4] world to camera, OpenCV axes: +X right, +Y down, +Z forward
    Ks: Tensor  # [V, 3, 3] intrinsics in pixels; the centre of the first pixel is at 0.5
    width: int  # pixels
    height: int  # pixels

    def __post_init__(self) -> None:
        views = self.viewmats.shape[0]
        if tuple(self.viewmats.shape) != (views, 4, 4):
            raise InputError(f"Cameras.viewmats must be [V, 4, 4], got {list(self.viewmats.shape)}")
        if tuple(self.Ks.shape) != (views, 3, 3):
            raise InputError(f"Cameras.Ks must be [{views}, 3, 3], got {list(self.Ks.shape)}")
        if self.width < 1 or self.height < 1:
            raise InputError(f"Cameras need at least one pixel, got {self.width} x {self.height}")

    def __len__(self) -> int:
        return self.viewmats.shape[0]

    def __getitem__(self, index: Tensor | slice) -> Cameras:
        """The cameras selected by a mask, indices or a slice."""
        return Cameras(self.viewmats[index], self.Ks[index], self.width, self.height)

    @property
    def positions(self) -> Tensor:
        """Camera centres [V, 3] in the world frame."""
        rotations = self.viewmats[:, :3, :3]
        return -(rotations.transpose(1, 2) @ self.viewmats[:, :3, 3:])[..., 0]

    @staticmethod
    def look_at(positions: Tensor, size: int, fov: float = FOV_DEGREES, target: Tensor | None = None) -> Cameras:
        """Square cameras at positions [V, 3] that look at target [3] (the origin) with Z up.

        Args:
            size: image side in pixels.
            fov: horizontal field of view in degrees.
        """
        if size < 1:
            raise InputError(f"size must be at least 1 pixel, got {size}")
        positions = positions.to(torch.float32)
        target = torch.zeros(3) if target is None else target.to(torch.float32)
        forward = torch.nn.functional.normalize(target - positions, dim=-1)
        up = torch.tensor([0.0, 0.0, 1.0]).expand_as(forward)
        # Looking straight up or down leaves "up" undefined: +Y takes its place.
        vertical = (forward * up).sum(-1).abs() > 1 - 1e-6
        up = torch.where(vertical[:, None], torch.tensor([0.0, 1.0, 0.0]), up)
        right = torch.nn.functional.normalize(torch.linalg.cross(forward, up), dim=-1)
        rotations = torch.stack([right, torch.linalg.cross(forward, right), forward], dim=1)
        viewmats = torch.eye(4).repeat(len(positions), 1, 1)
        viewmats[:, :3, :3] = rotations
        viewmats[:, :3, 3] = -(rotations @ positions[..., None])[..., 0]
        focal = 0.5 * size / math.tan(math.radians(fov) / 2)
        K = torch.tensor([[focal, 0, size / 2], [0, focal, size / 2], [0, 0, 1.0]])
        return Cameras(viewmats, K.repeat(len(positions), 1, 1), size, size)

    @staticmethod
    def orbit(
        count: int = 8,
        size: int = 256,
        elevation: float = 20.0,
        radius: float = ORBIT_RADIUS,
        fov: float = FOV_DEGREES,
        start: float = 30.0,
    ) -> Cameras:
        """A ring of cameras round the Z axis; angles in degrees, azimuth 0 is the object's front (-Y)."""
        azimuths = torch.deg2rad(start + 360.0 * torch.arange(count) / count)
        height = math.radians(elevation)
        directions = torch.stack(
            [torch.sin(azimuths) * math.cos(height), -torch.cos(azimuths) * math.cos(height), torch.full((count,), math.sin(height))], dim=1
        )
        return Cameras.look_at(radius * directions, size, fov)

    @staticmethod
    def around(count: int, size: int, radius: float = RADIUS, fov: float = FOV_DEGREES) -> Cameras:
        """Cameras on a Fibonacci spiral over the whole sphere, from above to below, to fit an object from."""
        index = torch.arange(count) + 0.5
        z = 1 - 2 * index / count
        azimuth = math.pi * (1 + math.sqrt(5)) * index
        ring = torch.sqrt(1 - z * z)
        return Cameras.look_at(radius * torch.stack([ring * torch.cos(azimuth), ring * torch.sin(azimuth), z], dim=1), size, fov)
