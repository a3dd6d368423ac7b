"""One object of a source: a mesh, its names and where it comes from."""

from __future__ import annotations

import hashlib
import os
import posixpath
import re
import unicodedata
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from generator.errors import InputError

# Where libraries and objects that are fetched or made are kept; `make clean` leaves it alone.
CACHE = "runs/sources"
# What zipfile raises on archives that are damaged, encrypted or packed in ways it does not know.
ARCHIVE_ERRORS = (OSError, zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError)
# The formats Blender imports for us; each with the axis that points up in its files.
MESH_SUFFIXES = {".obj": "y", ".glb": "y", ".gltf": "y", ".ply": "z"}
# What one object may unpack to; far above any real catalogue entry, far below what fills a disk.
MAX_OBJECT_BYTES = 512 * 2**20
# Words before the file name of a texture: all options that MTL knows take fewer.
_MAP_OPTIONS = 32
# Zip keeps the length of a name in two bytes.
_MAX_NAME = 2**16


@dataclass(frozen=True)
class SourceObject:
    """A named mesh that can be rendered and learned.

    The mesh is either a file of its own (`member` is None) or the entry `member` of the zip archive `path`.
    """

    id: str  # stable slug, unique within its source: letters, digits, "-" and "_"
    name: str  # as the source gives it
    path: Path  # the mesh file, or the archive that holds it
    captions: list[str] = field(default_factory=list)  # lower case, the plainest first
    member: str | None = None  # mesh entry inside the archive, "/" separated
    category: str = ""
    tags: tuple[str, ...] = ()
    creator: str = ""
    licence: str = ""  # SPDX identifier where one is known, else the source's own words
    library: str = ""
    size: tuple[float, float, float] | None = None  # metres: width (X), depth (Y), height (Z) in the object frame
    rotation: tuple[tuple[float, float, float], ...] | None = None  # 3 x 3, turns the mesh in its own axes before anything else
    up: str = "y"  # the mesh's own up axis, "y" or "z"

    def record(self) -> dict:
        """What a dataset keeps beside the pixels, ready for JSON; holds no path of this machine."""
        keys = ("id", "name", "captions", "category", "tags", "creator", "licence", "library", "size")
        return {key: list(value) if isinstance(value := getattr(self, key), tuple) else value for key in keys}


def slug(text: str) -> str:
    """Lower-case letters and digits joined by single dashes; "object" where nothing is left."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "object"


def unique_slugs(texts: Iterable[str]) -> list[str]:
    """Slugs in order; the second and later of equal ones get -2, -3 and so on.

    Where a slug loses letters or digits of other scripts than Latin, a piece of the text's hash stands for them: two such
    texts are told apart by what they say, not by their order.
    """
    taken: set[str] = set()
    numbers: dict[str, int] = {}  # the last one that was given to each slug
    slugs = []
    for text in texts:
        base = slug(text)
        if any(_is_lost(letter) for letter in text):
            # The same name in one file system is composed, in another decomposed.
            composed = unicodedata.normalize("NFC", text).encode("utf-8", "surrogatepass")
            base = f"{base}-{hashlib.sha256(composed).hexdigest()[:6]}"
        number = numbers.get(base, 1)
        candidate = base if number == 1 else f"{base}-{number}"
        while candidate in taken:
            number += 1
            candidate = f"{base}-{number}"
        numbers[base] = number
        taken.add(candidate)
        slugs.append(candidate)
    return slugs


def _is_lost(letter: str) -> bool:
    """Whether a slug says nothing of a letter or digit. Latin letters with accents are not spelled either, but their words are."""
    return letter.isalnum() and not letter.isascii() and not unicodedata.name(letter, "").startswith("LATIN ")


def texture_names(value: str) -> Iterator[tuple[list[str], str]]:
    """What the value of a map_Kd or map_d may mean, as (options, file name).

    Options come before the file name, and file names hold blanks: words are dropped from the left.
    """
    words = value.split() if len(value) < _MAX_NAME else []
    for first in range(min(len(words), _MAP_OPTIONS)):
        yield words[:first], " ".join(words[first:])


def extract(source: SourceObject, directory: Path) -> Path:
    """The mesh file of an object, unpacked into `directory` when it lives in an archive.

    An OBJ is written with a cleaned MTL (Kd, d, map_Kd, map_d) and its textures under plain names, so that nothing in
    the archive decides where a file goes or what else is read. A texture that is missing is left out; Kd remains.

    Raises:
        InputError: the archive or the mesh in it cannot be read, is unsafe, too large or of an unknown format.
    """
    if source.member is None:
        if not source.path.is_file():
            raise InputError(f"{source.path}: the mesh of {source.id} is not there")
        return source.path
    suffix = posixpath.splitext(source.member)[1].lower()
    if suffix not in MESH_SUFFIXES:
        raise InputError(f"{source.path}: {source.member} is not a mesh this program reads ({', '.join(MESH_SUFFIXES)})")
    try:
        with zipfile.ZipFile(source.path) as archive:
            reader = _Reader(source.path, archive)
            directory.mkdir(parents=True, exist_ok=True)
            target = directory / f"model{suffix}"
            if suffix == ".obj":
                _write_obj(reader, source.member, target)
            else:
                target.write_bytes(reader.read(source.member))
            return target
    except ARCHIVE_ERRORS as error:
        raise InputError(f"{source.path}: cannot unpack {source.member} ({error}): download the file again") from error


def safe_member(path: Path, name: str) -> str:
    """An archive entry name in normal form.

    Raises:
        InputError: the name leaves the archive (an absolute path, a drive or "..").
    """
    name = name.replace("\\", "/").lstrip("/")
    parts = name.split("/")
    if not name or ".." in parts or ":" in parts[0]:
        raise InputError(f"{path}: unsafe entry name {name!r}: do not use this archive")
    return posixpath.normpath(name)


def read_entry(archive: zipfile.ZipFile, info: zipfile.ZipInfo, most: int) -> bytes:
    """An archive's entry, of which no more is allocated than the archive can hold and `most` allows.

    Raises:
        BadZipFile: the entry is said to be larger.
    """
    # zipfile reads what the directory declares, packed and unpacked, in one piece: so the declarations are what has to be checked.
    if info.file_size > most:
        raise zipfile.BadZipFile(f"{info.filename} unpacks to more than {most // 2**20} MiB")
    assert archive.filename is not None  # it was opened by its path
    if info.compress_size > Path(archive.filename).stat().st_size:
        raise zipfile.BadZipFile(f"{info.filename} is said to be larger than the archive")
    with archive.open(info) as stream:
        # Asked for everything, zipfile unpacks all that is packed before it looks at the declared size.
        return stream.read(info.file_size)


class _Reader:
    """Reads entries of one archive until one object's byte budget is used up."""

    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        self.path, self.archive, self.left = path, archive, MAX_OBJECT_BYTES
        self.names = {
            info.filename.replace("\\", "/").lstrip("/"): info for info in archive.infolist() if info.filename and not info.is_dir()
        }
        self.folded = {name.lower(): name for name in sorted(self.names, reverse=True)}

    def read(self, name: str) -> bytes:
        info = self.names.get(name)
        if info is None:
            raise InputError(f"{self.path}: the archive has no entry {name}")
        self.left -= info.file_size
        if self.left < 0:
            raise InputError(f"{self.path}: {name} unpacks to more than {MAX_OBJECT_BYTES // 2**20} MiB: not a furniture model")
        return read_entry(self.archive, info, MAX_OBJECT_BYTES)

    def find(self, folder: str, reference: str) -> str | None:
        """The entry a file in `folder` means by `reference`: by relative path, else by its base name, whatever the case."""
        reference = reference.strip().strip('"').replace("\\", "/")
        for candidate in (posixpath.join(folder, reference), posixpath.join(folder, posixpath.basename(reference))):
            found = self.folded.get(posixpath.normpath(candidate).lower())
            if reference and found:
                return found
        return None


def _write_obj(reader: _Reader, member: str, target: Path) -> None:
    folder = posixpath.dirname(member)
    libraries: list[str] = []
    lines = []
    for line in reader.read(member).decode("latin-1").splitlines():
        if line.lstrip().startswith("mtllib"):
            libraries.append(line.split(None, 1)[1] if len(line.split(None, 1)) > 1 else "")
        else:
            lines.append(line)
    materials: list[str] = []
    textures: dict[str, str] = {}
    for library in dict.fromkeys(libraries):
        entry = reader.find(folder, library)
        if entry is not None:
            materials += _clean_materials(reader, posixpath.dirname(entry), reader.read(entry).decode("latin-1"), textures)
    for entry, name in textures.items():
        (target.parent / name).write_bytes(reader.read(entry))
    target.with_suffix(".mtl").write_text("\n".join(materials) + "\n", encoding="latin-1")
    target.write_text("\n".join([f"mtllib {target.stem}.mtl", *lines]) + "\n", encoding="latin-1")


def _clean_materials(reader: _Reader, folder: str, text: str, textures: dict[str, str]) -> list[str]:
    """The lines of an MTL that decide an object's colour; `textures` collects entry -> written file name."""
    kept = []
    for line in text.splitlines():
        words = line.split(None, 1)
        if len(words) != 2:
            continue
        key, value = words
        if key in ("newmtl", "Kd", "d", "Tr"):
            kept.append(f"{key} {value.strip()}")
        elif key in ("map_Kd", "map_d"):
            for options, reference in texture_names(value):
                entry = reader.find(folder, reference)
                if entry is not None:
                    suffix = os.path.splitext(entry)[1].lower()
                    suffix = suffix if re.fullmatch(r"\.[a-z0-9]{1,5}", suffix) else ""
                    name = textures.setdefault(entry, f"texture_{len(textures)}{suffix}")
                    kept.append(" ".join([key, *options, name]))
                    break
    return kept
