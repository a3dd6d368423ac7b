"""Statistics of a data set of atlases, so that a network sees values of zero mean and unit deviation."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError
from ..tensors import load_tensors, save_tensors
from .channels import CHANNELS

KINDS = ("cell", "channel")

_FORMAT = "gaussian-atlas-normalization-1"


@dataclass(frozen=True)
class Normalization:
    """Mean and standard deviation over a data set, for every cell of every channel (the paper's) or one a channel.

    Raises:
        InputError: a shape is wrong, a deviation is not positive, or a number is not finite.
    """

    mean: Tensor  # [16, size, size] if kind is "cell", [16, 1, 1] if "channel"; float32
    std: Tensor  # as mean, > 0
    minimum: Tensor  # [16] smallest raw value seen, bounds `denormalize`
    maximum: Tensor  # [16] largest raw value seen
    kind: str  # "cell" or "channel"
    layout_id: str  # of the atlases it was computed from

    def __post_init__(self) -> None:
        _check_kind(self.kind)
        shape = tuple(self.mean.shape)
        square = len(shape) == 3 and shape[0] == CHANNELS and shape[1] == shape[2]
        if not square or (self.kind == "channel" and shape[1] != 1) or tuple(self.std.shape) != shape:
            raise InputError(f"normalization: mean {list(shape)} and std {list(self.std.shape)} do not fit kind {self.kind!r}")
        if tuple(self.minimum.shape) != (CHANNELS,) or tuple(self.maximum.shape) != (CHANNELS,):
            raise InputError(f"normalization: minimum and maximum must have shape [{CHANNELS}]")
        for name in ("mean", "std", "minimum", "maximum"):
            if not bool(torch.isfinite(getattr(self, name)).all()):
                raise InputError(f"normalization: {name} contains NaN or infinity")
        if not bool((self.std > 0).all()) or not bool((self.minimum <= self.maximum).all()):
            raise InputError("normalization: std must be positive and minimum at most maximum")

    def normalize(self, values: Tensor) -> Tensor:
        """Raw values [..., 16, size, size] to network values of the same shape."""
        return (values - self.mean.to(values)) / self.std.to(values)

    def denormalize(self, values: Tensor) -> Tensor:
        """Network values [..., 16, size, size] to raw values, kept within what the data set held in each channel.

        The bound matters for the logarithmic scales: an outlier of a network would become a spike through exp.
        """
        raw = values * self.std.to(values) + self.mean.to(values)
        return torch.minimum(torch.maximum(raw, self.minimum.to(values)[:, None, None]), self.maximum.to(values)[:, None, None])

    def save(self, path: str | os.PathLike) -> None:
        """Write a safetensors file with kind and layout id as its record."""
        tensors = {name: getattr(self, name).float() for name in ("mean", "std", "minimum", "maximum")}
        save_tensors(path, tensors, {"format": _FORMAT, "kind": self.kind, "layout_id": self.layout_id})

    @classmethod
    def load(cls, path: str | os.PathLike) -> Normalization:
        """Read what `save` wrote; raises InputError on anything else."""
        tensors, record = load_tensors(path)
        if record.get("format") != _FORMAT or tensors.keys() != {"mean", "std", "minimum", "maximum"}:
            raise InputError(f"{path}: not a normalization of format {_FORMAT}")
        try:
            return cls(**tensors, kind=record.get("kind", ""), layout_id=record.get("layout_id", ""))
        except InputError as error:
            raise InputError(f"{path}: {error}") from error


class NormalizationAccumulator:
    """Running mean and sum of squared deviations of every cell (Welford 1962), in float64; mergeable over workers
    (Chan, Golub and LeVeque 1979).

    Args:
        layout_id: of the atlases to come.
    """

    def __init__(self, layout_id: str) -> None:
        self.layout_id = layout_id
        self.count = 0
        self._mean: Tensor | None = None  # [16, size, size]
        self._squares: Tensor | None = None  # [16, size, size], summed squared deviations
        self._minimum: Tensor | None = None  # [16]
        self._maximum: Tensor | None = None  # [16]

    def update(self, values: Tensor) -> None:
        """Add raw values [16, size, size], or a batch of them [B, 16, size, size].

        Raises:
            InputError: the shape is not that of the atlases before, or a number is not finite.
        """
        batch = values.detach().double()
        batch = batch[None] if batch.ndim == 3 else batch
        if batch.ndim != 4 or batch.shape[1] != CHANNELS or batch.shape[2] != batch.shape[3] or not len(batch):
            raise InputError(f"values must be [16, size, size] or a batch of these, got {list(values.shape)}")
        if not bool(torch.isfinite(batch).all()):
            raise InputError("values contain NaN or infinity")
        other = NormalizationAccumulator(self.layout_id)
        other.count = len(batch)
        other._mean = batch.mean(0)
        other._squares = (batch - other._mean).square().sum(0)
        other._minimum, other._maximum = batch.amin((0, 2, 3)), batch.amax((0, 2, 3))
        self.merge(other)

    def merge(self, other: NormalizationAccumulator) -> None:
        """Add everything that another accumulator of the same layout has seen."""
        if other.layout_id != self.layout_id:
            raise InputError(f"cannot merge statistics of layout {other.layout_id} into those of {self.layout_id}")
        if other.count == 0:
            return
        if self.count == 0:
            self.count = other.count
            self._mean, self._squares = other._mean, other._squares
            self._minimum, self._maximum = other._minimum, other._maximum
            return
        if other._mean.shape != self._mean.shape:
            raise InputError(f"values are {list(other._mean.shape)}, those before were {list(self._mean.shape)}")
        total = self.count + other.count
        delta = other._mean - self._mean
        self._mean = self._mean + delta * (other.count / total)
        self._squares = self._squares + other._squares + delta.square() * (self.count * other.count / total)
        self._minimum = torch.minimum(self._minimum, other._minimum)
        self._maximum = torch.maximum(self._maximum, other._maximum)
        self.count = total

    def result(self, kind: str = "cell", floor: float = 1e-3, relative_floor: float = 0.1) -> Normalization:
        """The statistics so far.

        Args:
            kind: "cell" (the paper's) or "channel".
            floor: smallest deviation, raw units; keeps channels that never change (opacity 1 everywhere) from exploding.
            relative_floor: smallest deviation of a cell as a share of its channel's; keeps cells that happened to agree
                in a small data set from turning a network's small errors into large ones, or the reverse.

        Raises:
            InputError: nothing was added, or the kind is unknown.
        """
        _check_kind(kind)
        if self.count == 0:
            raise InputError("no atlases to compute statistics of")
        mean = self._mean.mean((1, 2), keepdim=True)
        variance = (self._squares / self.count + (self._mean - mean).square()).mean((1, 2), keepdim=True)
        std = variance.sqrt().clamp_min(floor)
        if kind == "cell":
            mean, std = self._mean, torch.maximum((self._squares / self.count).sqrt(), relative_floor * std).clamp_min(floor)
        return Normalization(mean.float(), std.float(), self._minimum.float(), self._maximum.float(), kind, self.layout_id)


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise InputError(f"normalization kind must be one of {', '.join(KINDS)}, got {kind!r}")
