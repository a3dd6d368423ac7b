"""Atlases on disk: webdataset shards of float16 atlases with their captions and credits."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import webdataset
from torch import Tensor

from generator.atlas import Atlas, ChannelSpec
from generator.errors import InputError

ATLASES_PER_SHARD = 256


@dataclass(frozen=True)
class Sample:
    """One object as the model sees it."""

    id: str
    values: Tensor  # [16, H, W] float32, raw channels (not normalised)
    spec: ChannelSpec  # what the channels hold
    record: dict  # captions, name, category, creator, licence, library, scores of the fit


def write_shards(samples: Iterable[tuple[str, Atlas, dict]], directory: str | Path) -> list[Path]:
    """Write (id, atlas, record) triples as `atlases-000000.tar`...; replaces the shards that were there.

    Each shard is written beside its place and renamed, so that a killed run leaves no half shard.

    Raises:
        InputError: the atlases do not share one layout and one specification of their channels.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    first = None
    writer, held = None, 0

    def partial() -> Path:
        return paths[-1].with_suffix(".partial")

    def close() -> None:
        nonlocal writer
        if writer is not None:
            writer.close()
            partial().replace(paths[-1])
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
                writer, held = webdataset.TarWriter(str(partial()), compress=False), 0
            writer.write({"__key__": key, "safetensors": atlas.encode(torch.float16), "json": record})
            held += 1
        close()
    except BaseException:
        if writer is not None:
            writer.close()
            partial().unlink(missing_ok=True)
        raise
    for stale in set(directory.glob("atlases-*.tar")) - set(paths):
        stale.unlink()
    return paths


def read_shards(directory: str | Path) -> Iterator[tuple[Sample, str]]:
    """Every (sample, layout id) of a folder of shards, or of one shard, in order.

    Raises:
        InputError: there are no shards, or one is damaged.
    """
    paths = [Path(directory)] if Path(directory).is_file() else sorted(Path(directory).glob("atlases-*.tar"))
    if not paths:
        raise InputError(f"no atlases-*.tar in {directory}: run `python -m trainer atlas` first")
    for path in paths:
        try:
            for item in webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False):
                atlas = Atlas.decode(item["safetensors"])
                yield Sample(item["__key__"], atlas.values, atlas.spec, json.loads(item["json"])), atlas.layout_id
        except (tarfile.TarError, KeyError, EOFError, ValueError) as error:
            raise InputError(f"{path} is damaged ({error}): delete it and run `python -m trainer atlas` again") from error
