"""Sixteen channels a cell: how a Gaussian becomes image values and how it is read back.

Channel groups, four each (Gaussian Atlas, section 3.2): (x - s, o), (color, o), (log scale, o), rotation; x is the
centre, s the cell's sphere point, o the opacity, whose three copies are averaged when read. A `ChannelSpec` names the
transform of each; `transforms` holds them.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields

import torch
from torch import Tensor

from ..errors import InputError
from ..files import parse_json
from ..gaussians import Gaussians
from ..tensors import decode_tensors, encode_tensors
from .layout import AtlasLayout
from .transforms import OPACITIES, SHAPES

CHANNELS = 16
# The names that each attribute's transform may have.
_KNOWN = {
    "position": ("offset",),
    "color": ("identity",),
    "opacity": tuple(OPACITIES),
    "scale": ("log",),
    "rotation": tuple(SHAPES),
}


@dataclass(frozen=True)
class ChannelSpec:
    """The transform of each attribute, recorded in bundles so that a reader knows what it reads.

    Raises:
        InputError: a transform this version does not know, an empty range of scales, or a margin outside 0..0.5.
    """

    position: str = "offset"  # x - s: centre minus the cell's sphere point, in object units
    color: str = "identity"  # display sRGB, 0..1
    opacity: str = "logit"  # three copies of "identity": 0..1, or "logit": log(o / (1 - o))
    scale: str = "log"  # natural logarithm of the standard deviations
    rotation: str = "log_covariance"  # or "canonical": (w, x, y, z) nearest the world frame, see `transforms.canonical`
    min_scale: float = 1e-5  # object units; thinner Gaussians are stored with this scale
    max_scale: float = 1.0  # object units, the object's longest side
    opacity_margin: float = 1e-3  # "logit" stores opacities within margin..1 - margin

    def __post_init__(self) -> None:
        for name, known in _KNOWN.items():
            if getattr(self, name) not in known:
                names = " or ".join(map(repr, known))
                raise InputError(f"channels: {name} must be {names}, got {getattr(self, name)!r}; a newer version may read it")
        if not (isinstance(self.min_scale, float) and isinstance(self.max_scale, float) and 0 < self.min_scale < self.max_scale):
            raise InputError(f"channels: need 0 < min_scale < max_scale, got {self.min_scale!r} and {self.max_scale!r}")
        if not (isinstance(self.opacity_margin, float) and 0 < self.opacity_margin < 0.5):
            raise InputError(f"channels: opacity_margin must lie between 0 and 0.5, got {self.opacity_margin!r}")

    @property
    def names(self) -> tuple[str, ...]:
        """What each of the 16 channels holds."""
        shape = SHAPES[self.rotation].names
        opacities = [f"opacity_{copy}" for copy in range(3)]
        groups = ("offset_x", "offset_y", "offset_z"), ("color_r", "color_g", "color_b"), shape[:3]
        return (*(name for group, copy in zip(groups, opacities, strict=True) for name in (*group, copy)), *shape[3:])

    @property
    def ranges(self) -> tuple[tuple[float, float], ...]:
        """Least and largest value of each of the 16 channels; only the offsets of objects that are too large leave theirs."""
        shape = SHAPES[self.rotation].ranges(math.log(self.min_scale), math.log(self.max_scale))
        ends = OPACITIES[self.opacity].write(torch.tensor([0.0, 1.0], dtype=torch.float64), self.opacity_margin).tolist()
        groups = ((-2.0, 2.0),) * 3, ((0.0, 1.0),) * 3, shape[:3]
        return (*(pair for group in groups for pair in (*group, tuple(ends))), *shape[3:])

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> ChannelSpec:
        """The inverse of `to_json`; raises InputError on anything else."""
        try:
            values = parse_json(text)
        except ValueError as error:
            raise InputError(f"channels: not JSON ({error})") from error
        names = {entry.name for entry in fields(cls)}
        # Written since opacities may be logits; before, it had no meaning.
        if not isinstance(values, dict) or values.keys() | {"opacity_margin"} != names:
            raise InputError(f"channels: expected the keys {', '.join(sorted(names))}")
        return cls(**values)


# Atlases were written so before they said how.
_UNNAMED_SPEC = ChannelSpec(opacity="identity", rotation="canonical")


@dataclass(frozen=True)
class Atlas:
    """One object as an image of cells, raw values (not normalised).

    Raises:
        InputError: values are not [16, size, size] of a floating dtype.
    """

    values: Tensor  # [16, size, size], rows from the north, see AtlasLayout
    layout_id: str  # AtlasLayout.id of the layout it was made with
    spec: ChannelSpec = field(default_factory=ChannelSpec)

    def __post_init__(self) -> None:
        values = self.values
        if values.ndim != 3 or values.shape[0] != CHANNELS or values.shape[1] != values.shape[2] or not values.is_floating_point():
            raise InputError(f"Atlas.values must be floating [{CHANNELS}, size, size], got {values.dtype} {list(values.shape)}")

    def encode(self, dtype: torch.dtype = torch.float32) -> bytes:
        """A safetensors file: values as `dtype`, and the layout's id and the specification as its record."""
        record = {"layout_id": self.layout_id, "channels": asdict(self.spec)}
        return encode_tensors({"values": self.values.detach().to("cpu", dtype)}, record)

    @classmethod
    def decode(cls, payload: bytes) -> Atlas:
        """What `encode` wrote, its values as float32.

        Raises:
            ValueError: not an atlas of this or an earlier version.
        """
        tensors, record = decode_tensors(payload)
        if "values" not in tensors or not isinstance(record.get("layout_id"), str):
            raise InputError("not an atlas: it lacks values or the id of its layout")
        spec = ChannelSpec.from_json(json.dumps(record["channels"])) if "channels" in record else _UNNAMED_SPEC
        return cls(tensors["values"].float(), record["layout_id"], spec)


def pack(gaussians: Gaussians, layout: AtlasLayout, spec: ChannelSpec | None = None) -> Atlas:
    """Write N Gaussians, already in the order of the layout's cells, as an atlas; `trainer.atlas.to_atlas` finds the order.

    Raises:
        InputError: the count is not the layout's, or a number is not finite.
    """
    spec = spec or ChannelSpec()
    if len(gaussians) != layout.count:
        raise InputError(f"the layout has {layout.count} cells, got {len(gaussians)} Gaussians")
    if not bool(gaussians.finite().all()):
        raise InputError("gaussians contain NaN or infinity; keep those of Gaussians.finite()")
    offsets = gaussians.means - layout.cell_sphere.to(gaussians.means)
    opacity = OPACITIES[spec.opacity].write(gaussians.opacities, spec.opacity_margin)[:, None]
    shape = SHAPES[spec.rotation].write(gaussians.quaternions, gaussians.scales.clamp(spec.min_scale, spec.max_scale))
    cells = torch.cat([offsets, opacity, gaussians.colors, opacity, shape[:, :3], opacity, shape[:, 3:]], dim=1)
    return Atlas(cells.T.reshape(CHANNELS, layout.size, layout.size).contiguous(), layout.id, spec)


def from_atlas(atlas: Atlas, layout: AtlasLayout) -> Gaussians:
    """Read the N Gaussians of an atlas, in the order of the cells.

    Whatever the values are (a network may have written them), the result is valid: non-finite values read as 0, scales
    stay in the range of the specification, colors and opacities in 0..1, quaternions have unit length.

    Raises:
        InputError: the atlas was made with another layout.
    """
    if atlas.layout_id != layout.id:
        raise InputError(f"the atlas was made with layout {atlas.layout_id}, this is layout {layout.id}")
    if atlas.values.shape[1] != layout.size:
        raise InputError(f"the atlas has {atlas.values.shape[1]} cells a side, its layout {layout.size}")
    spec = atlas.spec
    cells = torch.nan_to_num(atlas.values, 0.0, 0.0, 0.0).flatten(1).T
    quaternions, logs = SHAPES[spec.rotation].read(cells[:, [8, 9, 10, 12, 13, 14, 15]])
    low, high = math.log(spec.min_scale), math.log(spec.max_scale)
    return Gaussians(
        means=cells[:, 0:3] + layout.cell_sphere.to(cells),
        quaternions=quaternions,
        scales=logs.clamp(low, high).exp(),
        opacities=OPACITIES[spec.opacity].read(cells[:, [3, 7, 11]].mean(1), spec.opacity_margin),
        colors=cells[:, 4:7].clamp(0, 1),
    )
