"""What an object that was edited remembers of it: JSON in its provenance, in files and in Blender alike."""

from __future__ import annotations

import base64
import json
import zlib
from typing import Any

import numpy as np

from .errors import InputError
from .files import parse_json

# Of an atlas, 1024 a side: what a record says of more is refused before it is unpacked.
_CELLS_MAX = 1 << 20

VARIATION, INPAINTING, MORPH = "variation", "inpainting", "morph"


def of_edit(source: dict[str, Any], strength: float, cells: np.ndarray | None = None) -> str:
    """The record of sampling that started from an object.

    Args:
        source: provenance of that object.
        cells: [M] int, those that were made anew; None for a variation of all.
    """
    record: dict[str, Any] = {"kind": VARIATION if cells is None else INPAINTING, "strength": strength, "source": source}
    if cells is not None:
        # Bits, compressed: neighbouring splats are neighbouring cells.
        bits = np.zeros(int(cells.max()) + 1, np.uint8)
        bits[cells] = 1
        record["cells"] = base64.b64encode(zlib.compress(np.packbits(bits).tobytes(), 9)).decode()
    return json.dumps(record, sort_keys=True)


def of_morph(first: dict[str, Any], second: dict[str, Any]) -> str:
    """The record of a morph between the objects of two provenances."""
    return json.dumps({"kind": MORPH, "first": first, "second": second}, sort_keys=True)


def parse(text: str) -> dict[str, Any]:
    """A record; {} where there is none or it is not readable."""
    try:
        record = parse_json(text) if text else {}
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def parse_edit(text: str) -> tuple[dict[str, Any], float, np.ndarray | None]:
    """The arguments that `of_edit` got, its cells ascending.

    Raises:
        InputError: the record is of something else, or damaged.
    """
    record = parse(text)
    if record.get("kind") not in (VARIATION, INPAINTING):
        raise InputError(f"an object made by {record.get('kind') or 'an unknown edit'} cannot be made again by sampling")
    try:
        cells = None
        if "cells" in record:
            unzip = zlib.decompressobj()
            packed = unzip.decompress(base64.b64decode(record["cells"]), _CELLS_MAX // 8 + 1)
            if len(packed) > _CELLS_MAX // 8 or not unzip.eof:
                raise ValueError("more cells than an atlas has, or fewer than were written")
            cells = np.nonzero(np.unpackbits(np.frombuffer(packed, np.uint8)))[0].astype(np.int64)
        return dict(record["source"]), float(record["strength"]), cells
    except (KeyError, TypeError, ValueError, OverflowError, zlib.error) as error:
        raise InputError(f"the object's record of its edit is damaged ({type(error).__name__})") from error


def describe(text: str) -> str:
    """A record in a few words; "" for none, or for one that is damaged."""
    record = parse(text)
    try:
        match record.get("kind"):
            case "variation":
                return f"Variation, strength {record['strength']:g}, of {_origin(record['source'])}"
            case "inpainting":
                return f"Some cells anew, strength {record['strength']:g}, in {_origin(record['source'])}"
            case "morph":
                ends = (f"\u201c{dict(record[end]).get('prompt', '')}\u201d" for end in ("first", "second"))
                return f"Morph of {' and '.join(ends)}"
    except (KeyError, TypeError, ValueError, OverflowError):  # what comes with a file can hold anything
        pass
    return ""


def _origin(source: Any) -> str:
    source = dict(source)
    return f"\u201c{source.get('prompt', '')}\u201d, seed {source.get('seed', 0)}"
