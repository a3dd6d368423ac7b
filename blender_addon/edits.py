"""Edits of generated objects, as a request carries them and an object remembers them. Knows nothing of Blender."""

from __future__ import annotations

import base64
import json
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..generator.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..generator.gaussians import Gaussians

VARIATION, INPAINTING, MORPH = "variation", "inpainting", "morph"


@dataclass(frozen=True)
class Current:
    """An object as it is now, whatever has been done to it by hand."""

    gaussians: Gaussians
    cells: np.ndarray  # [N] int64, the cell of each; -1 is none
    low_pass: float  # of the model that made it


@dataclass(frozen=True)
class Edit:
    """Sampling that starts from an object.

    Raises:
        InputError: the strength is out of range, or no cell is chosen.
    """

    source: dict[str, Any]  # provenance of the object, as files carry it
    strength: float  # 0..1
    cells: np.ndarray | None = None  # int64, ascending: the cells to make anew; None is a variation of all
    current: Current | None = None  # None: make the source again from its provenance first; changes made by hand are lost

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1:
            raise InputError(f"strength must be between 0 and 1, got {self.strength:g}")
        if self.cells is not None and not len(self.cells):
            raise InputError("no splat of an atlas is chosen: select splats in Edit Mode, or an empty or mesh that encloses some")

    def arguments(self, pipe: Any, again: Callable[[dict[str, Any]], Gaussians]) -> dict[str, Any]:
        """What a pipeline's call gets for this edit.

        Args:
            again: makes the object of a provenance.
        """
        import torch

        if self.current is None:
            gaussians = again(self.source)
            atlas = pipe.encode(gaussians)
        else:
            atlas = pipe.encode(self.current.gaussians, torch.from_numpy(self.current.cells), self.current.low_pass)
        mask = None
        if self.cells is not None:
            mask = torch.zeros(pipe.layout.count, dtype=torch.bool)
            if int(self.cells.max()) >= pipe.layout.count:
                raise InputError(f"the object has more cells than the model's {pipe.layout.count}: use the model that made it")
            mask[torch.from_numpy(self.cells)] = True
            mask = mask.reshape(pipe.layout.size, pipe.layout.size)
        return {"init_atlas": atlas, "strength": self.strength, "mask": mask}

    def to_json(self) -> str:
        """What an object remembers of the edit that made it."""
        kind = VARIATION if self.cells is None else INPAINTING
        record: dict[str, Any] = {"kind": kind, "strength": self.strength, "source": self.source}
        if self.cells is not None:
            record["cells"] = _pack(self.cells)
        return json.dumps(record, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Edit:
        """The inverse of `to_json`, without the object as it was.

        Raises:
            InputError: the text is not what `to_json` writes.
        """
        record = parse(text)
        if record.get("kind") not in (VARIATION, INPAINTING):
            raise InputError(f"an object made by {record.get('kind') or 'an unknown edit'} cannot be made again by sampling")
        try:
            cells = _unpack(record["cells"]) if "cells" in record else None
            return cls(dict(record["source"]), float(record["strength"]), cells)
        except InputError:
            raise
        except (KeyError, TypeError, ValueError, zlib.error) as error:
            raise InputError(f"the object's record of its edit is damaged ({type(error).__name__})") from error


def parse(text: str) -> dict[str, Any]:
    """The record of an edit; {} where there is none or it is not readable."""
    try:
        record = json.loads(text) if text else {}
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def describe(text: str) -> str:
    """An edit in a few words; "" for none."""
    record = parse(text)
    match record.get("kind"):
        case "variation":
            return f"Variation, strength {record.get('strength', 0):g}, of {_origin(record)}"
        case "inpainting":
            return f"Some cells anew, strength {record.get('strength', 0):g}, in {_origin(record)}"
        case "morph":
            return "Morph"
    return ""


def _origin(record: dict[str, Any]) -> str:
    source = record.get("source") or {}
    return f"\u201c{source.get('prompt', '')}\u201d, seed {source.get('seed', 0)}"


def _pack(cells: np.ndarray) -> str:
    """Bits of the cells, compressed: neighbouring splats are neighbouring cells."""
    bits = np.zeros(int(cells.max()) + 1, np.uint8)
    bits[cells] = 1
    return base64.b64encode(zlib.compress(np.packbits(bits).tobytes(), 9)).decode()


def _unpack(text: str) -> np.ndarray:
    packed = np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8)
    return np.nonzero(np.unpackbits(packed))[0].astype(np.int64)
