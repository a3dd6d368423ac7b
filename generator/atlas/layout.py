"""Where on the image each place of the sphere lives: the one correspondence that all atlases of a data set share."""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from torch import Tensor

from ..errors import InputError
from ..tensors import load_tensors, save_tensors

PROJECTIONS = ("equirectangular", "equal_area")

_DATA = Path(__file__).parent / "data"
_FORMAT = "gaussian-atlas-layout-1"


@dataclass(frozen=True, eq=False)
class AtlasLayout:
    """A square image of `size` x `size` cells, one for each of N = size^2 points on the unit sphere.

    Two index spaces meet here, and mixing them up yields atlases that look valid but are noise:

    * sphere points k = 0..N-1 count along the Fibonacci spiral, from the north pole (+Z) to the south pole;
    * cells c = 0..N-1 count row by row; row 0 is north and the middle column faces the front (-Y).

    Transport sends Gaussian i to sphere point k(i), and the Gaussian is stored in cell `cell_of_point[k(i)]`.

    Raises:
        InputError: a field has the wrong shape, or the permutation is none.
    """

    size: int
    projection: str  # "equirectangular" or "equal_area", the flattening that the permutation was computed for
    sphere: Tensor  # [N, 3] float32 unit vectors in the order of the points
    cell_of_point: Tensor  # [N] int64, the cell of each sphere point

    def __post_init__(self) -> None:
        if not isinstance(self.size, int) or self.size < 1:
            raise InputError(f"layout size must be a positive whole number, got {self.size!r}")
        check_projection(self.projection)
        count = self.size**2
        sphere, cells = self.sphere, self.cell_of_point
        if tuple(sphere.shape) != (count, 3) or sphere.dtype != torch.float32:
            raise InputError(f"layout sphere must be float32 [{count}, 3], got {sphere.dtype} {list(sphere.shape)}")
        if not bool(((sphere.norm(dim=1) - 1).abs() < 1e-5).all()):
            raise InputError("layout sphere must hold unit vectors")
        if tuple(cells.shape) != (count,) or cells.dtype != torch.int64:
            raise InputError(f"layout cell_of_point must be int64 [{count}], got {cells.dtype} {list(cells.shape)}")
        if not torch.equal(cells.sort().values, torch.arange(count)):
            raise InputError("layout cell_of_point is not a permutation: some cell is missing or taken twice")

    @property
    def count(self) -> int:
        """N, the number of cells and of sphere points."""
        return self.size**2

    @cached_property
    def point_of_cell(self) -> Tensor:
        """[N] int64, the sphere point of each cell: the inverse of `cell_of_point`."""
        return torch.argsort(self.cell_of_point)

    @cached_property
    def cell_sphere(self) -> Tensor:
        """[N, 3] float32, the sphere points in the order of the cells."""
        return self.sphere[self.point_of_cell]

    @cached_property
    def id(self) -> str:
        """32 hex digits over everything that an atlas depends on; atlases of different ids must not be mixed."""
        digest = hashlib.sha256(f"{_FORMAT}:{self.size}:{self.projection}:".encode())
        digest.update(self.sphere.contiguous().numpy().astype("<f4").tobytes())
        digest.update(self.cell_of_point.contiguous().numpy().astype("<i4").tobytes())
        return digest.hexdigest()[:32]

    def save(self, path: str | os.PathLike) -> None:
        """Write a safetensors file: sphere, cell_of_point as int32, and size, projection and id as its record."""
        record = {"format": _FORMAT, "size": self.size, "projection": self.projection, "id": self.id}
        save_tensors(path, {"sphere": self.sphere, "cell_of_point": self.cell_of_point.to(torch.int32)}, record)

    @classmethod
    def load(cls, path: str | os.PathLike) -> AtlasLayout:
        """Read what `save` wrote.

        Raises:
            InputError: no such file, no layout in it, no permutation, or the contents do not match the id.
        """
        tensors, record = load_tensors(path)
        if record.get("format") != _FORMAT or not tensors.keys() >= {"sphere", "cell_of_point"}:
            raise InputError(f"{path}: not an atlas layout of format {_FORMAT}")
        try:
            size = int(record.get("size", ""))
            layout = cls(size, record.get("projection", ""), tensors["sphere"], tensors["cell_of_point"].long())
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"{path}: {error}") from error
        if layout.id != record.get("id"):
            raise InputError(f"{path}: contents do not match the id {record.get('id')}; restore the file")
        return layout

    @classmethod
    def load_default(cls, size: int = 64, projection: str = "equirectangular") -> AtlasLayout:
        """The stored layout of this size and projection.

        Raises:
            InputError: none is stored.
        """
        return _load_default(size, check_projection(projection))


@lru_cache(maxsize=8)
def _load_default(size: int, projection: str) -> AtlasLayout:
    path = default_path(size, projection)
    if not path.is_file():
        stored = sorted({int(file.stem.split("_")[-1]) for file in _DATA.glob("*.safetensors")})
        raise InputError(f"no stored layout of size {size}; use one of {', '.join(map(str, stored))}")
    return AtlasLayout.load(path)


def default_path(size: int, projection: str) -> Path:
    """Where the layout of this size and projection is stored."""
    return _DATA / f"{projection}_{size}.safetensors"


def check_projection(projection: str) -> str:
    """The projection itself, if it is known; else InputError."""
    if projection not in PROJECTIONS:
        raise InputError(f"projection must be one of {', '.join(PROJECTIONS)}, got {projection!r}")
    return projection


def fibonacci_sphere(count: int) -> Tensor:
    """[count, 3] float32 unit vectors spread evenly along the golden spiral, from the north pole (+Z) to the south pole."""
    if count < 1:
        raise InputError(f"a sphere needs at least one point, got {count}")
    k = torch.arange(count, dtype=torch.float64)
    z = 1 - (2 * k + 1) / count
    radius = (1 - z * z).sqrt()
    angle = math.pi * (3 - math.sqrt(5)) * k
    return torch.stack([radius * angle.cos(), radius * angle.sin(), z], dim=1).float()


def project(sphere: Tensor, size: int, projection: str) -> Tensor:
    """Flatten unit vectors [N, 3] to continuous image positions [N, 2] (column, row) in 0..size, in cells.

    Longitude runs linearly along the columns: the front (-Y) in the middle, +X to the right of it, the back at both
    borders. Rows are linear in latitude ("equirectangular", the paper's) or in its sine ("equal_area"), north on top.
    """
    x, y, z = sphere.double().unbind(1)
    column = 0.5 + torch.atan2(x, -y) / (2 * math.pi)
    z = z.clamp(-1, 1)
    row = 0.5 - torch.asin(z) / math.pi if check_projection(projection) == "equirectangular" else 0.5 - z / 2
    return size * torch.stack([column, row], dim=1)


def cell_centres(size: int) -> Tensor:
    """[size^2, 2] float64 image positions (column, row) of the cell centres, row by row, in cells."""
    steps = torch.arange(size, dtype=torch.float64) + 0.5
    rows, columns = torch.meshgrid(steps, steps, indexing="ij")
    return torch.stack([columns.reshape(-1), rows.reshape(-1)], dim=1)
