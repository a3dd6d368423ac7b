"""Text to 3D Gaussians: sampling of Gaussian atlases, their files and their rendering. Imports neither bpy nor the trainer."""

from __future__ import annotations

__all__ = ["GaussianAtlasPipeline"]


def __getattr__(name: str):
    # Lazily: the pipeline needs torch, and `import generator` happens whenever Blender starts the add-on.
    if name == "GaussianAtlasPipeline":
        from .model.pipeline import GaussianAtlasPipeline

        return GaussianAtlasPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
