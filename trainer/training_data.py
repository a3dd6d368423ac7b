"""What the loop draws from: atlases out of shards by position, and the features of their captions."""

from __future__ import annotations

import hashlib
import io
import os
import zlib
from collections import OrderedDict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from generator.atlas import CHANNELS, Atlas, AtlasLayout, ChannelSpec, Normalization
from generator.errors import InputError
from generator.model.prior import AtlasPrior
from generator.model.text import TextEncoder

from .dataset import Entry, decode, find_shards, index_shard

# Features of all captions are made at once while they fit; beyond, those of each batch.
_FEATURE_BYTES = 2 * 2**30


class Atlases(Protocol):
    """Normalised atlases by row."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: list[int]) -> Tensor:
        """[B, 16, H, W] float32."""


class Features(Protocol):
    """Text features of captions by row."""

    def __getitem__(self, rows: list[int]) -> Tensor:
        """[B, L, D] float32."""


@dataclass(frozen=True)
class Decoding:
    """What turns normalised values back into Gaussians."""

    layout: AtlasLayout
    normalization: Normalization
    channels: ChannelSpec


@dataclass(frozen=True)
class TrainingData:
    """Objects with their captions.

    Raises:
        InputError: there is no atlas, or an object has no caption.
    """

    atlases: Atlases | Tensor  # M rows
    captions: list[list[int]]  # for each atlas, the rows of `features` that describe it
    features: Features | Tensor
    ids: list[str]
    unconditional: Tensor  # [L, D] float32, what stands for no prompt
    decoding: Decoding | None = None  # needed by losses on renders
    encoder: TextEncoder | None = field(default=None, compare=False)
    prior: AtlasPrior | None = field(default=None, compare=False)  # needed where the network corrects its estimate
    channels: int = CHANNELS  # of an atlas; a 2D base has 4

    def __post_init__(self) -> None:
        if not len(self.atlases):
            raise InputError("there are no atlases to train on: run `python -m trainer atlas` first")
        silent = [identifier for identifier, rows in zip(self.ids, self.captions, strict=True) if not rows]
        if silent:
            raise InputError(f"{silent[0]} has no caption: give every object at least one")

    @property
    def text_width(self) -> int:
        return self.unconditional.shape[-1]

    @property
    def statistics(self) -> dict[str, str]:
        """See `statistics_of`; nothing where the values are not those of atlases."""
        if self.decoding is None:
            return {}
        return statistics_of(self.decoding.layout, self.decoding.normalization, self.decoding.channels, self.prior)

    def split(self, share: float) -> tuple[Tensor, Tensor]:
        """Indices of training and validation objects; an object's side depends on its id alone."""
        held_out = torch.tensor([zlib.crc32(i.encode()) % 10_000 < share * 10_000 for i in self.ids])
        if held_out.all():
            held_out[:] = False
        return torch.nonzero(~held_out)[:, 0], torch.nonzero(held_out)[:, 0]


def statistics_of(layout: AtlasLayout, normalization: Normalization, channels: ChannelSpec, prior: AtlasPrior | None) -> dict[str, str]:
    """Hashes of what gives a network's values their meaning: a network that was trained with one is noise with another."""

    def digest(*parts: object) -> str:
        found = hashlib.sha256()
        for part in parts:
            found.update(part.detach().cpu().contiguous().numpy().tobytes() if isinstance(part, Tensor) else repr(part).encode())
        return found.hexdigest()

    scores = normalization.normal_scores
    curves = () if scores is None else (scores.knots, scores.scores, scores.counts)
    # What is as usual is left out, so that a setting that does not exist yet changes no hash.
    usual = asdict(ChannelSpec())
    chosen = sorted((name, value) for name, value in asdict(channels).items() if value != usual[name])
    bounds = (normalization.minimum, normalization.maximum)
    found = {
        "layout": layout.id,
        "normalization": digest(normalization.layout_id, normalization.mean, normalization.std, *bounds, *curves),
        "specification of channels": digest(chosen),
    }
    return found | ({} if prior is None else {"prior": digest(prior.layout_id, prior.covariance)})


class ShardedAtlases:
    """Atlases read from shards when they are asked for, at their place in the file.

    A shard is an uncompressed tar, so an atlas can be read without what lies before it. Any order costs the same then, and a
    run that resumes at a step reads just what that step needs, which a stream through a shuffling buffer cannot.

    Args:
        normalization: applied to what is read.

    Raises:
        InputError: there are no shards, one is damaged, or it has another layout than the statistics; when an atlas is read, that one
            has another than the first.
    """

    def __init__(self, directory: str | Path, normalization: Normalization) -> None:
        self.normalization = normalization
        self.paths = find_shards(directory)
        self.places: list[tuple[int, Entry]] = []  # the shard of each atlas, and its place in it
        for shard, path in enumerate(self.paths):
            self.places += [(shard, entry) for entry in index_shard(path)]
        self.records = [entry.record for _, entry in self.places]
        self._files: dict[tuple[int, int], io.FileIO] = {}
        self._first: Atlas | None = None
        self._first = self._atlas(0)
        if self._first.layout_id != normalization.layout_id:
            raise InputError(
                f"the shards have layout {self._first.layout_id}, the statistics {normalization.layout_id}: "
                "run `python -m trainer stats` again"
            )
        self.spec = self._first.spec

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, rows: list[int]) -> Tensor:
        return torch.stack([self.normalization.normalize(self._atlas(row).values) for row in rows])

    def _atlas(self, row: int) -> Atlas:
        shard, entry = self.places[row]
        return decode(self.paths[shard], entry.id, self._bytes(row), self._first)

    def _bytes(self, row: int) -> bytes:
        shard, (_, start, size, _) = self.places[row]
        # A file of its own for each process: one that was forked would share the position.
        key = (os.getpid(), shard)
        if key not in self._files:
            self._files[key] = io.FileIO(self.paths[shard])
        payload = os.pread(self._files[key].fileno(), size, start)
        if len(payload) != size:
            raise InputError(f"{self.paths[shard]} ends early: it was changed while it was read")
        return payload


class CaptionFeatures:
    """Text features of captions, each made when it is first needed; the last ones are kept.

    Args:
        keep: bytes of features to keep.
    """

    def __init__(self, encoder: TextEncoder, captions: list[str], keep: int = _FEATURE_BYTES) -> None:
        self.encoder, self.captions = encoder, captions
        self.most = max(1, keep // (2 * encoder.config.max_length * encoder.width))
        self._kept: OrderedDict[int, Tensor] = OrderedDict()

    def __getitem__(self, rows: list[int]) -> Tensor:
        missing = [row for row in dict.fromkeys(rows) if row not in self._kept]
        fresh: dict[int, Tensor] = {}
        for start in range(0, len(missing), 64):
            part = missing[start : start + 64]
            fresh |= dict(zip(part, self.encoder.encode([self.captions[row] for row in part]).hidden.half(), strict=True))
        found = torch.stack([fresh[row] if row in fresh else self._kept[row] for row in rows]).float()
        for row in rows:
            self._kept[row] = fresh.pop(row) if row in fresh else self._kept[row]
            self._kept.move_to_end(row)
        while len(self._kept) > self.most:
            self._kept.popitem(last=False)
        return found


def from_shards(
    directory: str | Path, normalization: Normalization, encoder: TextEncoder, layout: AtlasLayout, prior: AtlasPrior | None = None
) -> TrainingData:
    """The training data of a folder of shards.

    Raises:
        InputError: the shards are missing, damaged, or of another layout than the statistics.
    """
    atlases = ShardedAtlases(directory, normalization)
    texts: dict[str, int] = {}
    rows = [[texts.setdefault(caption, len(texts)) for caption in record["captions"]] for record in atlases.records]
    return TrainingData(
        atlases,
        rows,
        CaptionFeatures(encoder, list(texts)),
        [record["object"] for record in atlases.records],
        encoder.unconditional(1).hidden[0],
        Decoding(layout, normalization, atlases.spec),
        encoder,
        prior,
    )
