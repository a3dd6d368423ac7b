"""Splat files: `load` and `save` by suffix (.ply, .splat, .spz)."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import InputError
from ..files import replacing
from ..gaussians import Gaussians
from . import axes, ply, splat, spz

SUFFIXES = (".ply", ".splat", ".spz")

_UP = "up_axis"  # in the metadata of a .ply whose axes are not those of Gaussians
_MODULES = {".ply": ply, ".splat": splat, ".spz": spz}


def load(path: str | os.PathLike, up: str | None = None) -> Gaussians:
    """Read a splat file: N Gaussians, float32 on the CPU, in the file's own units.

    What the file holds beyond a Gaussian with one colour (higher spherical harmonics) is left out with a warning.

    Args:
        up: the axes of the file (axes.UP), which are turned to those of Gaussians; "Z" leaves the data as they are. None is
            what `stated_up` finds.

    Raises:
        InputError: missing, of another type, damaged, or without a usable Gaussian.
    """
    path = Path(path)
    module = _MODULES[check_suffix(path)]
    with _readable(path):
        return axes.turn(module.read(path), up or stated_up(path), "Z")


def save(
    gaussians: Gaussians, path: str | os.PathLike, metadata: dict | None = None, up: str = "Z", spz_version: int = spz.DEFAULT_VERSION
) -> None:
    """Write a splat file in the units of the Gaussians; an existing file is replaced only by a complete one.

    Args:
        metadata: provenance, stored as JSON in a comment of a .ply; the other formats have no place for it.
        up: the axes of the file (axes.UP): "Z" as the Gaussians are, "-Y" for splat viewers, "Y" as glTF. A .ply states
            them in its comment.
        spz_version: of an .spz file, one of spz.VERSIONS.

    Raises:
        InputError: an unknown suffix, a place that cannot be written, no Gaussians, or numbers that are not finite.
    """
    path = Path(path)
    suffix = check_suffix(path)
    turned = axes.turn(gaussians, "Z", up)
    with replacing(path) as temporary:
        match suffix:
            case ".ply":
                ply.write(turned, temporary, metadata if up == "Z" else (metadata or {}) | {_UP: up})
            case ".spz":
                spz.write(turned, temporary, spz_version)
            case _:
                splat.write(turned, temporary)


def load_metadata(path: str | os.PathLike) -> dict | None:
    """The provenance that `save` stored in a .ply, None where there is none or for the other formats.

    Raises:
        InputError: missing, or not a splat file.
    """
    path = Path(path)
    suffix = check_suffix(path)
    with _readable(path):
        metadata = ply.read_metadata(path) if suffix == ".ply" else None
    provenance = {key: value for key, value in (metadata or {}).items() if key != _UP}
    return provenance or None


def stated_up(path: str | os.PathLike) -> str:
    """The axes (axes.UP) that a .ply of `save` states; "Z" for every other file.

    Raises:
        InputError: missing, or not a splat file.
    """
    path = Path(path)
    suffix = check_suffix(path)
    with _readable(path):
        metadata = ply.read_metadata(path) if suffix == ".ply" else None
    stated = (metadata or {}).get(_UP)
    return stated if stated in axes.UP else "Z"


def check_suffix(path: str | os.PathLike) -> str:
    """The lower-case suffix of a splat file.

    Raises:
        InputError: it is none of SUFFIXES.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(f"{path}: splat files end in {', '.join(SUFFIXES)}")
    return suffix


class _readable:
    """Turn the ways in which a file can be missing or unreadable into one clear line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        if not os.path.exists(self.path):  # unlike Path.exists, also for names that no file system takes
            raise InputError(f"{self.path} does not exist")
        if not self.path.is_file():
            raise InputError(f"{self.path} is not a file")

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, OSError):
            raise InputError(f"cannot read {self.path}: {error.strerror or error}") from error
        if isinstance(error, MemoryError):
            raise InputError(f"cannot read {self.path}: it does not fit in this computer's memory") from error
