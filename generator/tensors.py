"""Tensors and one JSON record in a safetensors file, byte for byte the same whenever the same is written."""

from __future__ import annotations

import json
import os
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from .errors import InputError
from .files import parse_json, replacing

# The library writes the entries of its metadata in random order; one entry has only one order.
_RECORD = "record"


def encode_tensors(tensors: dict[str, Tensor], record: dict) -> bytes:
    """A safetensors file in memory; `record` holds JSON values."""
    return safetensors.torch.save({name: value.contiguous() for name, value in tensors.items()}, {_RECORD: json.dumps(record)})


def decode_tensors(payload: bytes) -> tuple[dict[str, Tensor], dict]:
    """Tensors by name, and the record: what `encode_tensors` was given, or the metadata of any other safetensors file.

    Raises:
        ValueError: not a safetensors file, or its record is no JSON object.
    """
    try:
        tensors = safetensors.torch.load(payload)
    except (SafetensorError, KeyError) as error:  # the latter of a kind of number that torch does not know
        raise ValueError(str(error)) from error
    length = int.from_bytes(payload[:8], "little")
    metadata = parse_json(payload[8 : 8 + length]).get("__metadata__") or {}
    record = parse_json(metadata[_RECORD]) if _RECORD in metadata else metadata
    if not isinstance(record, dict):
        raise ValueError("its record is no JSON object")
    return tensors, record


def save_tensors(path: str | os.PathLike, tensors: dict[str, Tensor], record: dict) -> None:
    """Write `encode_tensors` to a file; raises InputError where it cannot be written."""
    with replacing(path) as beside:
        beside.write_bytes(encode_tensors(tensors, record))


def load_tensors(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict]:
    """Read `decode_tensors` from a file.

    Raises:
        InputError: no such file, or it is damaged.
    """
    try:
        return decode_tensors(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error})") from error
