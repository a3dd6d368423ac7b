"""Where objects and captions come from."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from generator.errors import InputError

from .captions import captions, clean_name, with_article, with_colour
from .download import download_sweet_home_3d
from .folder import CAPTION_FILES, folder
from .objects import MESH_SUFFIXES, SourceObject, extract
from .sweet_home_3d import sweet_home_3d

__all__ = [
    "MESH_SUFFIXES",
    "SourceObject",
    "captions",
    "clean_name",
    "credits",
    "download_sweet_home_3d",
    "extract",
    "folder",
    "open_source",
    "sweet_home_3d",
    "with_article",
    "with_colour",
]

# The name that stands for "fetch the libraries if they are not here yet".
SWEET_HOME_3D = "sweet-home-3d"


def open_source(spec: str | Path, cache: str | Path = "build/sources") -> list[SourceObject]:
    """The objects of a source, read by what `spec` is.

    Args:
        spec: a .sh3f library, a folder of such libraries, a folder of meshes with a captions file, a captions file beside
            its meshes, or "sweet-home-3d" to fetch Sweet Home 3D's libraries into `cache`.

    Raises:
        InputError: `spec` is none of these, or what it names cannot be read.
        WorkError: the libraries could not be fetched.
    """
    path = Path(spec)
    if str(spec) == SWEET_HOME_3D and not path.exists():
        path = download_sweet_home_3d(cache)
    if path.is_dir():
        libraries = sorted(path.glob("*.sh3f"))
        if libraries:
            return [source for library in libraries for source in sweet_home_3d(library)]
        return folder(path)
    if not path.exists():
        raise InputError(f"{spec}: no such source: give a .sh3f file, a folder of meshes with captions.csv, or {SWEET_HOME_3D!r}")
    if path.suffix.lower() in {Path(name).suffix for name in CAPTION_FILES}:
        return folder(path.parent, path)
    # A library by any other suffix still says what it is inside.
    return sweet_home_3d(path)


def credits(objects: Iterable[SourceObject]) -> str:
    """A Markdown table of whom to thank: one row a library, with its licence, how many objects, and their creators."""
    libraries: dict[tuple[str, str], list[SourceObject]] = {}
    for source in objects:
        libraries.setdefault((source.library or "unknown", source.licence or "unknown"), []).append(source)
    lines = ["| Library | Licence | Objects | Creators |", "|---|---|---|---|"]
    for (library, licence), members in sorted(libraries.items()):
        creators = sorted({member.creator for member in members if member.creator}, key=str.casefold)
        cells = [library, licence, str(len(members)), ", ".join(creators) or "not named"]
        lines.append("| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |")
    return "\n".join(lines) + "\n"
