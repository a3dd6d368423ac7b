"""Cameras and renderers of Gaussians."""

from .cameras import Cameras

__all__ = ["Cameras"]
