"""Objects as images: the layout of the cells, the channels of a cell, the statistics that normalise them."""

from .cells import in_cells, morph
from .channels import CHANNELS, Atlas, ChannelSpec, from_atlas, pack
from .layout import PROJECTIONS, AtlasLayout
from .normalization import Normalization, NormalizationAccumulator, NormalScores, NormalScoresAccumulator

__all__ = [
    "CHANNELS",
    "PROJECTIONS",
    "Atlas",
    "AtlasLayout",
    "ChannelSpec",
    "NormalScores",
    "NormalScoresAccumulator",
    "Normalization",
    "NormalizationAccumulator",
    "from_atlas",
    "in_cells",
    "morph",
    "pack",
]
