"""Any folder of GLB, OBJ or PLY meshes with a captions file."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path
from typing import Any

from generator.errors import InputError
from generator.files import parse_json

from .objects import MESH_SUFFIXES, SourceObject, unique_slugs

CAPTION_FILES = ("captions.csv", "captions.json", "captions.jsonl")
# Optional columns that go to the object as they are.
_FIELDS = ("name", "category", "creator", "licence")


def folder(path: str | Path, captions_file: str | Path | None = None) -> list[SourceObject]:
    """The meshes of a folder that a captions file names, in the file's order.

    The captions file is CSV with the columns `file` and `caption` (and if you like `name`, `category`, `creator`,
    `licence`), JSON Lines of objects with these keys, or JSON: a list of such objects or {file: caption or captions}.
    Several rows may caption one file. Files are given relative to the folder. OBJ and glTF are Y up, PLY is Z up.

    Args:
        captions_file: default is captions.csv, captions.json or captions.jsonl in the folder.

    Raises:
        InputError: no captions file, a row without file or caption, or a mesh that is missing or of an unknown format.
    """
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"{path}: no such folder")
    if captions_file is None:
        captions_file = next((path / name for name in CAPTION_FILES if (path / name).is_file()), None)
        if captions_file is None:
            raise InputError(f"{path}: no captions: write {CAPTION_FILES[0]} with the columns file,caption")
    captions_file = Path(captions_file)
    rows: dict[str, dict] = {}
    for number, row in enumerate(_rows(captions_file), start=1):
        file, caption = row.get("file"), row.get("caption")
        texts: list[Any] = caption if isinstance(caption, list) else [caption]
        if not isinstance(file, str) or not file.strip() or not all(isinstance(t, str) and t.strip() for t in texts):
            raise InputError(f"{captions_file}: entry {number} needs a file and a caption")
        entry = rows.setdefault(file.strip().replace("\\", "/"), {"captions": []})
        entry["captions"] += [" ".join(text.lower().split()).rstrip(".") for text in texts]
        for name in _FIELDS:
            if isinstance(row.get(name), str):
                entry.setdefault(name, row[name].strip())
    if not rows:
        raise InputError(f"{captions_file}: no captions inside")
    for file in rows:
        if Path(file).suffix.lower() not in MESH_SUFFIXES:
            raise InputError(f"{captions_file}: {file} is not a mesh this program reads ({', '.join(MESH_SUFFIXES)})")
        if not os.path.isfile(path / file):
            raise InputError(f"{captions_file}: {file} is not in {path}")
        if not (path / file).resolve().is_relative_to(path.resolve()):
            raise InputError(f"{captions_file}: {file} lies outside of {path}")
    objects = []
    for identifier, (file, entry) in zip(unique_slugs(str(Path(file).with_suffix("")) for file in rows), rows.items(), strict=True):
        mesh = path / file
        objects.append(
            SourceObject(
                id=identifier,
                name=entry.get("name") or entry["captions"][0],
                path=mesh,
                captions=list(dict.fromkeys(entry["captions"])),
                category=entry.get("category", ""),
                creator=entry.get("creator", ""),
                licence=entry.get("licence", "unknown"),
                library=path.resolve().name,
                up=MESH_SUFFIXES[mesh.suffix.lower()],
            )
        )
    return objects


def _rows(path: Path) -> list[dict]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text") from error
    try:
        if path.suffix.lower() == ".csv":
            rows = list(csv.DictReader(io.StringIO(text, newline="")))
            if rows and not {"file", "caption"} <= set(rows[0]):
                raise InputError(f"{path}: the first line must name the columns file,caption")
        elif path.suffix.lower() == ".jsonl":
            rows = [parse_json(line) for line in text.split("\n") if line.strip()]
        else:
            rows = parse_json(text)
            if isinstance(rows, dict):
                rows = [{"file": file, "caption": caption} for file, caption in rows.items()]
    except (ValueError, csv.Error) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not readable as {path.suffix[1:].upper() or 'JSON'} ({error})") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path}: needs a list of objects with the keys file and caption")
    return rows
