"""Sixteen channels a cell: how a Gaussian becomes image values and how it is read back.

Channel groups, four each (Gaussian Atlas, section 3.2): (x - s, o), (color, o), (log scale, o), rotation; x is the
centre, s the cell's sphere point, o the opacity, whose three copies are averaged when read.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from itertools import permutations, product

import torch
from torch import Tensor

from ..errors import InputError
from ..gaussians import Gaussians
from .layout import AtlasLayout

CHANNELS = 16
CHANNEL_NAMES = (
    "offset_x", "offset_y", "offset_z", "opacity_0",
    "color_r", "color_g", "color_b", "opacity_1",
    "scale_0", "scale_1", "scale_2", "opacity_2",
    "rotation_w", "rotation_x", "rotation_y", "rotation_z",
)  # fmt: skip

_TRANSFORMS = {"position": "offset", "color": "identity", "opacity": "identity", "scale": "log", "rotation": "canonical"}
_EQUAL_SCALES = 1e-5  # relative difference below which two axes count as equal, so that the spin in their plane is free


@dataclass(frozen=True)
class ChannelSpec:
    """The transform of each attribute, recorded in bundles so that a reader knows what it reads.

    Raises:
        InputError: a transform this version does not know, or an empty range of scales.
    """

    position: str = "offset"  # x - s: centre minus the cell's sphere point, in object units
    color: str = "identity"  # display sRGB, 0..1
    opacity: str = "identity"  # 0..1, in three copies
    scale: str = "log"  # natural logarithm of the standard deviations
    rotation: str = "canonical"  # (w, x, y, z) nearest the world frame among the equal descriptions, see `canonical`
    min_scale: float = 1e-5  # object units; thinner Gaussians are stored with this scale
    max_scale: float = 1.0  # object units, the object's longest side

    def __post_init__(self) -> None:
        for name, known in _TRANSFORMS.items():
            if getattr(self, name) != known:
                raise InputError(f"channels: {name} must be {known!r}, got {getattr(self, name)!r}; a newer version may read it")
        if not (isinstance(self.min_scale, float) and isinstance(self.max_scale, float) and 0 < self.min_scale < self.max_scale):
            raise InputError(f"channels: need 0 < min_scale < max_scale, got {self.min_scale!r} and {self.max_scale!r}")

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> ChannelSpec:
        """The inverse of `to_json`; raises InputError on anything else."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"channels: not JSON ({error})") from error
        names = {entry.name for entry in fields(cls)}
        if not isinstance(values, dict) or values.keys() != names:
            raise InputError(f"channels: expected the keys {', '.join(sorted(names))}")
        return cls(**values)


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
    quaternions, scales = canonical(gaussians.quaternions, gaussians.scales.clamp(spec.min_scale, spec.max_scale))
    offsets = gaussians.means - layout.cell_sphere.to(gaussians.means)
    opacity = gaussians.opacities[:, None]
    cells = torch.cat([offsets, opacity, gaussians.colors, opacity, scales.log(), opacity, quaternions], dim=1)
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
    offsets, colors, logs, quaternions = cells[:, 0:3], cells[:, 4:7], cells[:, 8:11], cells[:, 12:16]
    length = quaternions.norm(dim=1, keepdim=True)
    identity = torch.tensor([1.0, 0.0, 0.0, 0.0]).to(cells)
    low, high = torch.tensor([spec.min_scale, spec.max_scale]).log().tolist()
    return Gaussians(
        means=offsets + layout.cell_sphere.to(cells),
        quaternions=torch.where(length > 1e-8, quaternions / length.clamp_min(1e-8), identity),
        scales=logs.clamp(low, high).exp(),
        opacities=cells[:, [3, 7, 11]].mean(1).clamp(0, 1),
        colors=colors.clamp(0, 1),
    )


def canonical(quaternions: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """The description of each ellipsoid whose axes lie nearest the world's; the covariance stays the same.

    Permuting the axes of an ellipsoid, and their scales along, and flipping signs gives 24 rotations that describe it
    equally, each as two quaternions. Of these the smallest rotation is chosen, with w >= 0. Where two scales are equal
    the ellipsoid may also spin freely in their plane, which is removed; where all are, the rotation is the identity.

    Args:
        quaternions: [N, 4] (w, x, y, z), any length but zero.
        scales: [N, 3].

    Returns:
        quaternions [N, 4] of unit length and scales [N, 3].
    """
    dtype = quaternions.dtype
    rotations, orders = (table.to(quaternions.device) for table in _cube_rotations())
    quaternions = torch.nn.functional.normalize(quaternions.double(), dim=1)
    candidates = _multiply(quaternions[:, None], rotations[None])  # [N, 24, 4]
    sizes = scales[:, orders]  # [N, 24, 3]

    # A free spin about one axis is the twist part of the rotation about it; the swing that is left has the larger w.
    following = sizes.roll(-1, 2)
    equal = (sizes - following).abs() <= _EQUAL_SCALES * torch.maximum(sizes, following)  # axes (0, 1), (1, 2), (2, 0)
    for axis, pair in ((0, 1), (1, 2), (2, 0)):
        spin = torch.zeros_like(candidates)
        spin[..., 0], spin[..., 1 + axis] = candidates[..., 0], -candidates[..., 1 + axis]
        length = spin.norm(dim=2, keepdim=True)
        swing = _multiply(candidates, spin / length.clamp_min(1e-12))
        candidates = torch.where(equal[..., pair, None] & (length > 1e-12), swing, candidates)
    identity = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64, device=quaternions.device)
    candidates = torch.where(equal.all(2)[..., None], identity, candidates)

    # The first of the nearly best, not the best: the choice must not hang on rounding when it is made again.
    nearness = candidates[..., 0].abs()
    best = (nearness >= nearness.amax(1, keepdim=True) - 1e-6).int().argmax(1)
    rows = torch.arange(len(quaternions), device=quaternions.device)
    chosen, chosen_scales = candidates[rows, best], sizes[rows, best]
    return torch.where(chosen[:, :1] < 0, -chosen, chosen).to(dtype), chosen_scales


@cache
def _cube_rotations() -> tuple[Tensor, Tensor]:
    """The 24 rotations of a cube: quaternions [24, 4], the identity first, and the axis [24, 3] that each new axis was."""
    quaternions, orders = [], []
    values = sorted({tuple(q) for q in _cube_quaternions()}, reverse=True)
    for w, x, y, z in values:
        matrix = torch.tensor([
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ])  # fmt: skip
        quaternions.append((w, x, y, z))
        orders.append(matrix.abs().argmax(0))
    return torch.tensor(quaternions, dtype=torch.float64), torch.stack(orders)


def _cube_quaternions():
    """One of each pair q, -q of unit quaternions with 1, 2 or 4 equal non-zero entries."""
    half, root = 0.5, 0.5**0.5
    for signs in product((1.0, -1.0), repeat=3):
        yield (half, *(half * sign for sign in signs))
    for position in range(4):
        yield tuple(1.0 if index == position else 0.0 for index in range(4))
    for first, second in permutations(range(4), 2):
        if first < second:
            for sign in (1.0, -1.0):
                yield tuple(root if i == first else root * sign if i == second else 0.0 for i in range(4))


def _multiply(left: Tensor, right: Tensor) -> Tensor:
    """Hamilton product of quaternions [..., 4] (w, x, y, z)."""
    a, b, c, d = left.unbind(-1)
    e, f, g, h = right.unbind(-1)
    return torch.stack(torch.broadcast_tensors(
        a * e - b * f - c * g - d * h,
        a * f + b * e + c * h - d * g,
        a * g - b * h + c * e + d * f,
        a * h + b * g - c * f + d * e,
    ), dim=-1)  # fmt: skip
