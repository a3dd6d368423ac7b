"""Where objects and captions come from."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from generator.errors import InputError

from .captions import Part, captions, clean_name, colours_in, describe, recoloured, with_article, with_colour
from .download import download_sweet_home_3d
from .folder import CAPTION_FILES, folder
from .infinigen import INFINIGEN, infinigen
from .objects import CACHE, MESH_SUFFIXES, SourceObject, extract
from .sweet_home_3d import sweet_home_3d

__all__ = [
    "MESH_SUFFIXES",
    "Part",
    "SourceObject",
    "captions",
    "clean_name",
    "colours_in",
    "credit_lines",
    "credits",
    "describe",
    "download_sweet_home_3d",
    "extract",
    "folder",
    "infinigen",
    "open_source",
    "recoloured",
    "sweet_home_3d",
    "with_article",
    "with_colour",
]

# Objects of one name and one maker that are listed by themselves; more are variants.
_ONE_BY_ONE = 10
# The name that stands for "fetch the libraries if they are not here yet".
SWEET_HOME_3D = "sweet-home-3d"


def open_source(spec: str | Path, cache: str | Path = CACHE, workers: int = 2) -> list[SourceObject]:
    """The objects of a source, read by what `spec` is.

    Args:
        spec: a .sh3f library, a folder of such libraries, a folder of meshes with a captions file, a captions file beside
            its meshes, "sweet-home-3d" to fetch Sweet Home 3D's libraries into `cache`, or "infinigen:1000" to have Infinigen
            make so many objects there; what is there already is used. "infinigen" alone makes 20 of every kind.
        workers: objects made at the same time, where they are made.

    Raises:
        InputError: `spec` is none of these, or what it names cannot be read.
        WorkError: the libraries could not be fetched, or Infinigen could not run.
    """
    path = Path(spec)  # asked through os.path, which takes any name, too long a one too
    name, _, count = str(spec).partition(":")
    if name == INFINIGEN and not os.path.exists(path):
        if count and not count.isdecimal():
            raise InputError(f"{spec}: give the number of objects, such as {INFINIGEN}:1000")
        return infinigen(int(count), cache, workers) if count else infinigen(cache=cache, workers=workers)
    if str(spec) == SWEET_HOME_3D and not path.exists():
        path = download_sweet_home_3d(cache)
    if os.path.isdir(path):
        libraries = sorted(path.glob("*.sh3f"))
        if libraries:
            return [source for library in libraries for source in sweet_home_3d(library)]
        return folder(path)
    if not os.path.exists(path):
        raise InputError(f"{spec}: no such source: give a .sh3f file, a folder of meshes with captions.csv, {SWEET_HOME_3D} or {INFINIGEN}")
    if path.suffix.lower() in {Path(name).suffix for name in CAPTION_FILES}:
        return folder(path.parent, path)
    # A library by any other suffix still says what it is inside.
    return sweet_home_3d(path)


def credit_lines(objects: Iterable[SourceObject]) -> list[str]:
    """A Markdown list of objects with their makers; many of one name and one maker, such as variants, share a line."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for source in objects:
        groups.setdefault((source.name, source.creator, source.library, source.licence), []).append(source.id)
    lines = []
    for (name, creator, library, licence), ids in groups.items():
        shown = ids if len(ids) <= _ONE_BY_ONE else [f"{len(ids)} objects: {ids[0]} to {ids[-1]}"]
        lines += [f"* {name} ({which}): {creator or 'not named'}, {library}, {licence}" for which in shown]
    return lines


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
