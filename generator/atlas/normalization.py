"""Statistics of a data set of atlases, so that a network sees values of zero mean and unit deviation."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError
from ..tensors import load_tensors, save_tensors
from .channels import CHANNELS, ChannelSpec

KINDS = ("cell", "channel")

_FORMAT = "gaussian-atlas-normalization-1"
_TENSORS = ("mean", "std", "minimum", "maximum")
_SCORE_TENSORS = ("knots", "scores", "counts")
_BINS = 16384  # of the known range of a channel
_KNOTS = 1024  # groups of like rank that a curve is drawn through


@dataclass(frozen=True)
class NormalScores:
    """A rising curve for each channel that makes its values normally distributed: piecewise linear, and so is its inverse.

    A value's score is the number below which a standard normal variable falls as often as the data set falls below the
    value (van der Waerden scores). Between knots both are linear; beyond the ends, which no value of the data set was,
    they stay constant.

    Raises:
        InputError: a channel has less than two knots, or its knots or scores do not rise strictly.
    """

    knots: Tensor  # [K] float32 raw values, channel after channel
    scores: Tensor  # [K] float32, of the knots
    counts: Tensor  # [16] int64 knots of each channel

    def __post_init__(self) -> None:
        total = int(self.counts.sum())
        if tuple(self.counts.shape) != (CHANNELS,) or tuple(self.knots.shape) != (total,) or tuple(self.scores.shape) != (total,):
            raise InputError("normal scores: knots, scores and counts do not fit each other")
        for curve in (self.knots, self.scores):
            if not bool(torch.isfinite(curve).all()):
                raise InputError("normal scores contain NaN or infinity")
            if any(len(part) < 2 or not bool((part.diff() > 0).all()) for part in curve.split(self.counts.tolist())):
                raise InputError("normal scores: each channel needs two knots or more, rising strictly")

    def apply(self, values: Tensor) -> Tensor:
        """Scores of raw values [..., 16, size, size], of the same shape."""
        return self._interpolate(values, self.knots, self.scores)

    def invert(self, scores: Tensor) -> Tensor:
        """Raw values of scores [..., 16, size, size], of the same shape."""
        return self._interpolate(scores, self.scores, self.knots)

    def _interpolate(self, values: Tensor, start: Tensor, end: Tensor) -> Tensor:
        counts = self.counts.tolist()
        channels = values.movedim(-3, 0)
        found = []
        for channel, x, y in zip(channels, start.to(values).split(counts), end.to(values).split(counts), strict=True):
            index = torch.searchsorted(x, channel.contiguous()).clamp(1, len(x) - 1)
            share = (channel - x[index - 1]) / (x[index] - x[index - 1])
            found.append(torch.lerp(y[index - 1], y[index], share.clamp(0, 1)))
        return torch.stack(found).movedim(0, -3)


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
    normal_scores: NormalScores | None = None  # applied to raw values first; mean and std are then of the scores

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
        values = values if self.normal_scores is None else self.normal_scores.apply(values)
        return (values - self.mean.to(values)) / self.std.to(values)

    def denormalize(self, values: Tensor) -> Tensor:
        """Network values [..., 16, size, size] to raw values, kept within what the data set held in each channel.

        The bound matters for the logarithmic scales: an outlier of a network would become a spike through exp.
        """
        raw = values * self.std.to(values) + self.mean.to(values)
        raw = raw if self.normal_scores is None else self.normal_scores.invert(raw)
        return torch.minimum(torch.maximum(raw, self.minimum.to(values)[:, None, None]), self.maximum.to(values)[:, None, None])

    def save(self, path: str | os.PathLike) -> None:
        """Write a safetensors file with kind and layout id as its record."""
        tensors = {name: getattr(self, name).float() for name in _TENSORS}
        if self.normal_scores is not None:
            tensors |= {name: getattr(self.normal_scores, name) for name in _SCORE_TENSORS}
        save_tensors(path, tensors, {"format": _FORMAT, "kind": self.kind, "layout_id": self.layout_id})

    @classmethod
    def load(cls, path: str | os.PathLike) -> Normalization:
        """Read what `save` wrote; raises InputError on anything else."""
        tensors, record = load_tensors(path)
        scored = tensors.keys() == {*_TENSORS, *_SCORE_TENSORS}
        if record.get("format") != _FORMAT or not (scored or tensors.keys() == set(_TENSORS)):
            raise InputError(f"{path}: not a normalization of format {_FORMAT}")
        try:
            scores = NormalScores(*(tensors.pop(name) for name in _SCORE_TENSORS)) if scored else None
            return cls(**tensors, kind=record.get("kind", ""), layout_id=record.get("layout_id", ""), normal_scores=scores)
        except (InputError, RuntimeError) as error:  # torch, of numbers that are not real
            raise InputError(f"{path}: {error}") from error


class NormalizationAccumulator:
    """Running mean and sum of squared deviations of every cell (Welford 1962), in float64; mergeable over workers
    (Chan, Golub and LeVeque 1979).

    Args:
        layout_id: of the atlases to come.
        normal_scores: applied to every value first, and part of the result.
    """

    def __init__(self, layout_id: str, normal_scores: NormalScores | None = None) -> None:
        self.layout_id = layout_id
        self.normal_scores = normal_scores
        self._seen: _Moments | None = None

    @property
    def count(self) -> int:
        """Atlases so far."""
        return 0 if self._seen is None else self._seen.count

    def update(self, values: Tensor) -> None:
        """Add raw values [16, size, size], or a batch of them [B, 16, size, size].

        Raises:
            InputError: the shape is not that of the atlases before, or a number is not finite.
        """
        batch = _batch(values)
        ends = batch.amin((0, 2, 3)), batch.amax((0, 2, 3))
        batch = batch if self.normal_scores is None else self.normal_scores.apply(batch)
        mean = batch.mean(0)
        self._add(_Moments(len(batch), mean, (batch - mean).square().sum(0), *ends))

    def merge(self, other: NormalizationAccumulator) -> None:
        """Add everything that another accumulator of the same layout has seen."""
        if other.layout_id != self.layout_id:
            raise InputError(f"cannot merge statistics of layout {other.layout_id} into those of {self.layout_id}")
        if not _equal(other.normal_scores, self.normal_scores):
            raise InputError("cannot merge statistics that were computed with other normal scores")
        if other._seen is not None:
            self._add(other._seen)

    def _add(self, more: _Moments) -> None:
        self._seen = more if self._seen is None else self._seen.merged(more)

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
        seen = self._seen
        if seen is None:
            raise InputError("no atlases to compute statistics of")
        mean = seen.mean.mean((1, 2), keepdim=True)
        variance = (seen.squares / seen.count + (seen.mean - mean).square()).mean((1, 2), keepdim=True)
        std = variance.sqrt().clamp_min(floor)
        if kind == "cell":
            mean, std = seen.mean, torch.maximum((seen.squares / seen.count).sqrt(), relative_floor * std).clamp_min(floor)
        ends = seen.minimum.float(), seen.maximum.float()
        return Normalization(mean.float(), std.float(), *ends, kind, self.layout_id, self.normal_scores)


@dataclass(frozen=True)
class _Moments:
    """Of one atlas or more, float64."""

    count: int
    mean: Tensor  # [16, size, size]
    squares: Tensor  # [16, size, size], summed squared deviations
    minimum: Tensor  # [16]
    maximum: Tensor  # [16]

    def merged(self, other: _Moments) -> _Moments:
        """Of the atlases of both.

        Raises:
            InputError: the shapes differ.
        """
        if other.mean.shape != self.mean.shape:
            raise InputError(f"values are {list(other.mean.shape)}, those before were {list(self.mean.shape)}")
        total = self.count + other.count
        delta = other.mean - self.mean
        return _Moments(
            total,
            self.mean + delta * (other.count / total),
            self.squares + other.squares + delta.square() * (self.count * other.count / total),
            torch.minimum(self.minimum, other.minimum),
            torch.maximum(self.maximum, other.maximum),
        )


class NormalScoresAccumulator:
    """Running histogram of every channel, for `NormalScores`; exact in its counts, mergeable over workers.

    The statistics of the scores need a second pass, by a `NormalizationAccumulator` that is given them.

    Args:
        spec: of the atlases to come; it knows the range of each channel.
    """

    def __init__(self, spec: ChannelSpec) -> None:
        self.spec = spec
        self._counts = torch.zeros(CHANNELS, _BINS, dtype=torch.int64)
        self._sums = torch.zeros(CHANNELS, _BINS, dtype=torch.float64)  # of the values in each bin
        self._ends = [_Ends() for _ in range(CHANNELS)]

    def update(self, values: Tensor) -> None:
        """Add raw values [16, size, size], or a batch of them [B, 16, size, size].

        Raises:
            InputError: the shape is another, or a number is not finite.
        """
        for channel, (part, (low, high)) in enumerate(zip(_batch(values).transpose(0, 1).flatten(1), self.spec.ranges, strict=True)):
            place = ((part - low) * (_BINS / (high - low))).floor().clamp(0, _BINS - 1).long()
            self._counts[channel] += torch.bincount(place, minlength=_BINS)
            self._sums[channel] += torch.bincount(place, part, minlength=_BINS)
            low, high = part.min(), part.max()
            self._ends[channel].add(_Ends(low.item(), int((part == low).sum()), high.item(), int((part == high).sum())))

    def merge(self, other: NormalScoresAccumulator) -> None:
        """Add everything that another accumulator of the same specification has seen."""
        if other.spec != self.spec:
            raise InputError("cannot merge histograms of other channels")
        self._counts += other._counts
        self._sums += other._sums
        for ours, theirs in zip(self._ends, other._ends, strict=True):
            ours.add(theirs)

    def result(self) -> NormalScores:
        """The curves so far.

        Raises:
            InputError: nothing was added.
        """
        if not int(self._counts.sum()):
            raise InputError("no atlases to compute normal scores of")
        curves = [self._curve(channel) for channel in range(CHANNELS)]
        counts = torch.tensor([len(knots) for knots, _ in curves])
        return NormalScores(torch.cat([knots for knots, _ in curves]), torch.cat([scores for _, scores in curves]), counts)

    def _curve(self, channel: int) -> tuple[Tensor, Tensor]:
        """Knots and scores of a channel, float32.

        Many objects share the value at an end (opaque, black), so both ends are knots of their own, at the middle of their rank.
        """
        ends, total = self._ends[channel], int(self._counts[channel].sum())
        if ends.low == ends.high:
            return torch.tensor([ends.low, ends.low + max(1.0, abs(ends.low))]), torch.tensor([0.0, 1.0])
        counts, sums = self._counts[channel].clone(), self._sums[channel].clone()
        first, last = counts.nonzero().flatten()[[0, -1]].tolist()
        for place, value, count in ((first, ends.low, ends.low_count), (last, ends.high, ends.high_count)):
            counts[place] -= count
            sums[place] -= value * count
        held = counts > 0
        # Bins are joined to `_KNOTS` groups of like rank; a bin that holds more is one by itself.
        middle = ends.low_count + counts.cumsum(0) - counts / 2
        group = (middle[held] / total * _KNOTS).long()
        counts = torch.zeros(_KNOTS, dtype=torch.float64).index_add_(0, group, counts[held].double())
        sums = torch.zeros(_KNOTS, dtype=torch.float64).index_add_(0, group, sums[held])
        ranks = ends.low_count + counts.cumsum(0) - counts / 2
        held = counts > 0
        inner = (sums[held] / counts[held]).clamp(ends.low, ends.high)
        knots = torch.tensor([ends.low, *inner.tolist(), ends.high])
        ranks = torch.tensor([ends.low_count / 2, *ranks[held].tolist(), total - ends.high_count / 2], dtype=torch.float64)
        scores = torch.special.ndtri(ranks / total).float()
        # What float32 does not tell apart is one knot.
        rises = (knots[1:] > knots[:-1].cummax(0).values) & (scores[1:] > scores[:-1].cummax(0).values)
        rises = torch.cat([torch.ones(1, dtype=torch.bool), rises])
        return knots[rises], scores[rises]


@dataclass
class _Ends:
    """The least and the largest value so far, and how often each was seen."""

    low: float = math.inf
    low_count: int = 0
    high: float = -math.inf
    high_count: int = 0

    def add(self, other: _Ends) -> None:
        self.low_count = self.low_count * (self.low <= other.low) + other.low_count * (other.low <= self.low)
        self.high_count = self.high_count * (self.high >= other.high) + other.high_count * (other.high >= self.high)
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)


def _equal(a: NormalScores | None, b: NormalScores | None) -> bool:
    if a is None or b is None:
        return a is b
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in _SCORE_TENSORS)


def _batch(values: Tensor) -> Tensor:
    """Atlases [B, 16, size, size] in float64, checked."""
    batch = values.detach().double()
    batch = batch[None] if batch.ndim == 3 else batch
    if batch.ndim != 4 or batch.shape[1] != CHANNELS or batch.shape[2] != batch.shape[3] or not len(batch):
        raise InputError(f"values must be [16, size, size] or a batch of these, got {list(values.shape)}")
    if not bool(torch.isfinite(batch).all()):
        raise InputError("values contain NaN or infinity")
    return batch


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise InputError(f"normalization kind must be one of {', '.join(KINDS)}, got {kind!r}")
