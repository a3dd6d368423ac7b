"""Sampling that starts from an object, as a request carries it. Knows nothing of Blender."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..generator import records
from ..generator.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..generator.gaussians import Gaussians


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
        return records.of_edit(self.source, self.strength, self.cells)

    @classmethod
    def from_json(cls, text: str) -> Edit:
        """The inverse of `to_json`, without the object as it was.

        Raises:
            InputError: the text is not what `to_json` writes.
        """
        return cls(*records.parse_edit(text))
