"""Atlases on disk: shards of float16 atlases with their captions and credits, tars as webdataset writes and streams them."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import webdataset
from torch import Tensor

from generator.atlas import Atlas, ChannelSpec
from generator.errors import InputError
from generator.files import parse_json

ATLASES_PER_SHARD = 256
# There while shards take the place of others: a folder with both old and new ones is not read.
_UNFINISHED = "atlases.unfinished"


@dataclass(frozen=True)
class Sample:
    """One object as the model sees it."""

    id: str
    values: Tensor  # [16, H, W] float32, raw channels (not normalised)
    spec: ChannelSpec  # what the channels hold
    record: dict  # captions, name, category, creator, licence, library, scores of the fit


def write_shards(samples: Iterable[tuple[str, Atlas, dict]], directory: str | Path) -> list[Path]:
    """Write (id, atlas, record) triples as `atlases-000000.tar`...; replaces the shards that were there.

    All are written beside their places before the first is renamed. A run that is killed before that leaves the old shards, one
    that is killed while they are renamed a folder that is refused when it is read.

    Raises:
        InputError: the atlases do not share one layout and one specification of their channels.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    first = None
    writer, held = None, 0

    def partial(path: Path) -> Path:
        return path.with_suffix(".partial")

    def close() -> None:
        nonlocal writer
        if writer is not None:
            writer.close()
            writer = None

    try:
        for key, atlas, record in samples:
            first = first or atlas
            if atlas.layout_id != first.layout_id:
                raise InputError(f"{key} has layout {atlas.layout_id}, the shard {first.layout_id}: rebuild all atlases with one layout")
            if atlas.spec != first.spec:
                raise InputError(f"{key} has other channels than the shard: rebuild all atlases with one specification")
            if writer is None or held == ATLASES_PER_SHARD:
                close()
                paths.append(directory / f"atlases-{len(paths):06d}.tar")
                writer, held = webdataset.TarWriter(str(partial(paths[-1])), compress=False), 0
            writer.write({"__key__": key, "safetensors": atlas.encode(torch.float16), "json": record})
            held += 1
        close()
    except BaseException:
        # Closing writes too, and may fail as what brought us here did.
        with suppress(OSError):
            close()
        for path in paths:
            partial(path).unlink(missing_ok=True)
        raise
    (directory / _UNFINISHED).touch()
    for path in paths:
        partial(path).replace(path)
    for stale in {*directory.glob("atlases-*.tar"), *directory.glob("atlases-*.partial")} - set(paths):
        stale.unlink()
    (directory / _UNFINISHED).unlink()
    return paths


def find_shards(directory: str | Path) -> list[Path]:
    """The shards of a folder, in order.

    Raises:
        InputError: there are none, or a run was stopped while it replaced them.
    """
    directory = Path(directory)
    paths = sorted(directory.glob("atlases-*.tar"))
    if (directory / _UNFINISHED).exists():
        raise InputError(f"{directory} holds old and new shards, since replacing them was stopped: run `python -m trainer atlas` again")
    if not paths:
        raise InputError(f"no atlases-*.tar in {directory}: run `python -m trainer atlas` first")
    return paths


class Entry(NamedTuple):
    """Where the atlas of a sample lies in its shard, and what is known of it."""

    id: str
    start: int  # first byte in the shard
    size: int  # bytes
    record: dict  # has at least "object", an id, and "captions", one string or more


def index_shard(path: Path) -> list[Entry]:
    """The samples of a shard in order, their records read and checked, their atlases not read yet.

    The path is a file and nothing else, an uncompressed tar; whatever its headers say, no more is read than the file holds.

    Raises:
        InputError: it cannot be read, is damaged, holds no sample, or the record of one has another shape.
    """
    places: dict[str, tuple[int, int]] = {}
    records: dict[str, object] = {}
    try:
        with _Bounded(path) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            whole = os.fstat(file.fileno()).st_size
            for member in archive:
                if member.size < 0 or member.offset_data + member.size > whole:
                    raise tarfile.TarError(f"{member.name!r} is said to be larger than the file")
                key, _, kind = member.name.rpartition(".")
                if not member.isreg() or member.sparse is not None or kind not in ("safetensors", "json"):
                    continue
                if kind == "safetensors":
                    places[key] = (member.offset_data, member.size)
                else:
                    file.seek(member.offset_data)
                    records[key] = parse_json(file.read(member.size))
            # Tarfile takes any header that it cannot read for the end, which a whole archive marks by empty blocks.
            file.seek(archive.offset)
            if file.read(2 * tarfile.BLOCKSIZE) != bytes(2 * tarfile.BLOCKSIZE):
                raise tarfile.TarError("it ends early")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise damaged(path, error) from error
    alone = sorted(places.keys() ^ records.keys())
    if alone:
        raise damaged(path, f"{alone[0]} has no {'record' if alone[0] in places else 'atlas'}")
    if not places:
        raise damaged(path, "it holds no atlas")
    return [Entry(key, *place, _checked(path, key, records[key])) for key, place in places.items()]


def damaged(path: Path, reason: object) -> InputError:
    """The error that names a damaged shard."""
    return InputError(f"{path} is damaged ({reason}): delete it and run `python -m trainer atlas` again")


class _Bounded(io.FileIO):
    """A file that allocates no more than it holds, however much is asked for."""

    def read(self, size: int | None = -1) -> bytes:
        rest = max(0, os.fstat(self.fileno()).st_size - self.tell())
        return super().read(rest if size is None or size < 0 else min(size, rest))


def _checked(path: Path, key: str, record: object) -> dict:
    lacking = damaged(path, f"the record of {key} has no captions")
    if not isinstance(record, dict):
        raise lacking
    captions = record.get("captions")
    if not isinstance(captions, list) or not captions or not all(isinstance(caption, str) for caption in captions):
        raise lacking
    # A sample that is not said to be a copy of another object's is its own.
    if not isinstance(record.setdefault("object", key), str):
        raise damaged(path, f"the record of {key} names no object")
    return record


def decode(path: Path, key: str, payload: bytes, first: Atlas | None) -> Atlas:
    """The atlas of a sample, which must be of the same layout, channels and size as the `first` one.

    Raises:
        InputError: it is damaged or differs.
    """
    try:
        atlas = Atlas.decode(payload)
    except (ValueError, KeyError, TypeError) as error:
        raise damaged(path, f"{key}: {error}") from error
    if first is not None and (atlas.layout_id, atlas.spec, atlas.values.shape) != (first.layout_id, first.spec, first.values.shape):
        raise InputError(f"{path}: {key} has another layout or other channels than the first atlas: rebuild all atlases with one of each")
    return atlas


def read_shards(directory: str | Path) -> Iterator[tuple[Sample, str]]:
    """Every (sample, layout id) of a folder of shards, or of one shard, in order.

    Raises:
        InputError: there are no shards, one is damaged, or a sample has another layout or other channels than the first.
    """
    paths = [Path(directory)] if Path(directory).is_file() else find_shards(directory)
    first = None
    for path in paths:
        entries = index_shard(path)
        with open(path, "rb", buffering=0) as file:
            for entry in entries:
                file.seek(entry.start)
                atlas = decode(path, entry.id, file.read(entry.size), first)
                first = first or atlas
                yield Sample(entry.id, atlas.values, atlas.spec, entry.record), atlas.layout_id
