"""Furniture libraries of Sweet Home 3D (*.sh3f): a zip of meshes with a Java properties catalogue."""

from __future__ import annotations

import re
import zipfile
from dataclasses import replace
from pathlib import Path

from generator.errors import InputError

from .captions import captions, describe
from .obj_parts import library_surfaces, looks
from .objects import ARCHIVE_ERRORS, SourceObject, read_entry, safe_member, unique_slugs

CATALOGUE = "PluginFurnitureCatalog.properties"
MAX_CATALOGUE_BYTES = 16 * 2**20
MAX_ENTRIES = 200_000

# What they wear and have are no parts of theirs.
_LIVING = re.compile(r"\b(?:man|woman|boy|girl|mannequin|person|people)\b")
_ESCAPES = {"t": "\t", "n": "\n", "r": "\r", "f": "\f"}


def sweet_home_3d(path: str | Path) -> list[SourceObject]:
    """The objects of a Sweet Home 3D library, in catalogue order.

    Meshes are Y up with the front towards +Z, in arbitrary units that the catalogue stretches to width, depth and
    height, as Sweet Home 3D itself does.

    Raises:
        InputError: not a zip, no catalogue, or a catalogue that names what the archive does not hold.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
            if len(infos) > MAX_ENTRIES:
                raise InputError(f"{path}: {len(infos)} entries are too many for a furniture library")
            names = {info.filename.replace("\\", "/").lstrip("/") for info in infos}
            catalogue = next((info for info in infos if info.filename == CATALOGUE), None)
            if catalogue is None:
                raise InputError(f"{path}: no {CATALOGUE} inside: not a Sweet Home 3D furniture library")
            properties = parse_properties(read_entry(archive, catalogue, MAX_CATALOGUE_BYTES).decode("latin-1"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except ARCHIVE_ERRORS as error:
        raise InputError(f"{path}: not a readable zip archive ({error}): download it again") from error
    return _with_looks(path, _objects(path, properties, names))


def parse_properties(text: str) -> dict[str, str]:
    """Key and value pairs of a Java .properties text (already decoded from Latin-1): comments, escapes, continued lines."""
    properties = {}
    pending: list[str] = []
    for raw in re.split(r"\r\n|\r|\n", text):
        line = raw.lstrip(" \t\f")
        if not pending and (not line or line[0] in "#!"):
            continue
        # A line goes on where it ends in an odd number of backslashes.
        if (len(line) - len(line.rstrip("\\"))) % 2:
            pending.append(line[:-1])
            continue
        line = "".join([*pending, line])
        pending.clear()
        split = re.match(r"((?:\\.|[^\\=: \t\f])*)[ \t\f]*[=:]?[ \t\f]*(.*)", line, re.DOTALL)
        assert split is not None  # all its parts may be empty
        properties[_unescape(split[1])] = _unescape(split[2])
    return properties


def _unescape(text: str) -> str:
    def replace(match: re.Match) -> str:
        escape = match[1]
        return chr(int(escape[1:], 16)) if len(escape) == 5 else _ESCAPES.get(escape, escape)

    return re.sub(r"\\(u[0-9a-fA-F]{4}|.)", replace, text)


def _objects(path: Path, properties: dict[str, str], names: set[str]) -> list[SourceObject]:
    numbers = sorted(int(key[5:]) for key in properties if re.fullmatch(r"name#(?:0|[1-9][0-9]{0,8})", key))
    if not numbers:
        raise InputError(f"{path}: the catalogue lists no furniture")
    library = properties.get("name") or path.stem
    licence = _licence(properties.get("license", ""))
    labels = []
    for number in numbers:
        label = properties.get(f"id#{number}") or f"{library}#{properties[f'name#{number}']}"
        labels.append(label.removeprefix("eTeks#"))
    objects = []
    for number, identifier in zip(numbers, unique_slugs(labels), strict=True):

        def value(key: str, number: int = number) -> str:
            return properties.get(f"{key}#{number}", "").strip()

        member = value("model")
        if not member:
            raise InputError(f"{path}: model#{number} ({value('name')}) is missing from the catalogue")
        member = safe_member(path, member)
        if member not in names:
            raise InputError(f"{path}: the catalogue names {member}, which the archive does not hold")
        tags = tuple(tag.strip() for tag in value("tags").split(",") if tag.strip())
        width, depth, height = (_number(path, f"{key}#{number}", value(key)) / 100 for key in ("width", "depth", "height"))
        objects.append(
            SourceObject(
                id=identifier,
                name=value("name"),
                path=path,
                member=member,
                captions=captions(value("name"), value("category"), tags),
                category=value("category"),
                tags=tags,
                creator=value("creator"),
                licence=licence,
                library=library,
                size=(width, depth, height) if width > 0 and depth > 0 and height > 0 else None,
                rotation=_rotation(path, number, value("modelRotation")),
                up="y",
            )
        )
    return objects


def _with_looks(path: Path, objects: list[SourceObject]) -> list[SourceObject]:
    """The objects with captions that also say of what they and their parts are made."""
    surfaces = library_surfaces(path, [source.member for source in objects if source.member and source.member.lower().endswith(".obj")])
    found = []
    for source in objects:
        noun = source.captions[0]
        whole, parts = looks(noun, surfaces.get(source.member or "", []))
        more = describe([noun], whole, () if _LIVING.search(noun) else parts)
        found.append(replace(source, captions=list(dict.fromkeys([*source.captions, *more]))))
    return found


def _number(path: Path, key: str, text: str) -> float:
    """0 where there is none."""
    try:
        return float(text) if text else 0.0
    except ValueError as error:
        raise InputError(f"{path}: {key} is not a number: {text!r}") from error


def _rotation(path: Path, number: int, text: str) -> tuple[tuple[float, float, float], ...] | None:
    if not text:
        return None
    values = [_number(path, f"modelRotation#{number}", word) for word in text.split()]
    if len(values) != 9:
        raise InputError(f"{path}: modelRotation#{number} needs 9 numbers, got {len(values)}")
    return tuple(zip(values[::3], values[1::3], values[2::3], strict=True))


def _licence(text: str) -> str:
    words = text.lower()
    if "public domain" in words or "zero" in words or "cc0" in words:
        return "CC0-1.0"
    if "creative commons" in words and "attribution" in words and "3.0" in words:
        return "CC-BY-3.0-US" if "united states" in words else "CC-BY-3.0"
    return " ".join(text.split()) or "unknown"
