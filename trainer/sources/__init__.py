"""Where objects and captions come from."""

from __future__ import annotations

from .captions import captions
from .objects import MESH_SUFFIXES, SourceObject, extract
from .sweet_home_3d import sweet_home_3d

__all__ = ["MESH_SUFFIXES", "SourceObject", "captions", "extract", "sweet_home_3d"]
