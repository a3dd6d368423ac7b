"""The splat object: Gaussians as a point cloud that Cycles and EEVEE render."""

from __future__ import annotations

from .camera import camera_from, framing, pixel
from .layout import is_splats, native
from .morph import current
from .object import read, to_values, transformed, write

__all__ = ["camera_from", "current", "framing", "is_splats", "native", "pixel", "read", "to_values", "transformed", "write"]
