"""Models on this machine: the bundled one and those that the user installed. Knows nothing of Blender.

A model is installed from a folder, a zip or the hub. Only the files that its bundle.json lists are taken, each compared with
the size and SHA-256 recorded there, into a folder beside the place, which is then renamed: what is there is whole.
Nothing is ever unpickled or executed; other kinds of files are refused.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import stat
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from ..generator.errors import Cancelled, InputError, WorkError
from ..generator.files import parse_json, replacing_folder
from . import extension, service
from .job import Report
from .service import ModelInfo

BUNDLE = "bundle.json"
FORMAT = "gaussian-atlas-bundle-1"  # as generator/model/bundle.py writes it; importing that would import torch
SUFFIXES = (".safetensors", ".json", ".txt", ".md")
DESCRIPTION_MAX = 16 * 2**20  # bytes of bundle.json
FILES_MAX = 2000
SIZE_MAX = 64 * 2**30  # bytes in all
_CHUNK = 2**20
_STALE_SECONDS = 24 * 3600  # a staging folder this old belongs to no running installation
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*")
_HUB_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*/[A-Za-z0-9_-][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Installed:
    """A model that can be chosen."""

    name: str  # its folder's name; STARTER for the bundled one
    folder: Path
    info: ModelInfo


STARTER = "starter"


def installed(place: Path) -> list[Installed]:
    """The bundled model and every readable one below `place`, by name."""
    found = []
    try:
        found.append(Installed(STARTER, extension.STARTER_MODEL, service.describe(extension.STARTER_MODEL)))
    except InputError:  # a checkout without it
        pass
    folders = sorted(path for path in place.iterdir() if not path.name.startswith(".")) if place.is_dir() else []
    for folder in folders:
        try:
            found.append(Installed(folder.name, folder, service.describe(folder)))
        except InputError:
            continue
    return found


def install(source: str, place: Path, report: Report, cancel: threading.Event, online: bool = False) -> Installed:
    """Install a model from a folder, a zip or, where `online`, the hub ("owner/name"); one that is there is replaced.

    Raises:
        InputError: it is no model, damaged, hostile or too large, or the network may not be used.
        WorkError: the download failed.
        Cancelled: `cancel` was set; nothing of it is left.
    """
    source = source.strip()
    path = Path(source).expanduser()
    if not source:
        raise InputError("name the folder, the zip or the hub id of a model")
    if path.is_dir():
        with _folder(path) as files:
            return _take(files, place, source, report, cancel)
    if path.is_file():
        with _zip(path) as files:
            return _take(files, place, source, report, cancel)
    if _HUB_ID.fullmatch(source):
        if not online:
            raise InputError(
                f"{source} is no folder or zip here, and Blender may not go online: allow it in Preferences > System > Network"
            )
        with _hub(source, report, cancel) as files:
            return _take(files, place, source, report, cancel)
    raise InputError(f"there is no model at {source}: name a folder, a zip, or a hub id such as owner/name")


def remove(name: str, place: Path) -> Path:
    """Delete an installed model; returns the folder that is gone.

    Raises:
        InputError: there is no such model here, or it is the bundled one.
    """
    if name == STARTER:
        raise InputError("the starter model is part of the extension and cannot be removed")
    folder = place / name
    if not name or name.startswith(".") or "/" in name or "\\" in name or not folder.is_dir():
        known = ", ".join(model.name for model in installed(place) if model.name != STARTER)
        raise InputError(f"no model {name!r} is installed; there are: {known or 'none'}")
    # Renamed first: a deletion that is cut short leaves no half model in the list.
    gone = place / f".removed-{name}-{time.time_ns():x}"
    try:
        folder.rename(gone)
    except OSError as error:
        raise InputError(f"cannot remove {folder}: {error.strerror}") from error
    shutil.rmtree(gone, ignore_errors=True)
    return folder


class _Files:
    """Where the files of a model come from."""

    def description(self) -> bytes:
        """bundle.json."""
        raise NotImplementedError

    def open(self, name: str) -> IO[bytes] | _Download:
        """One of the listed files. Raises InputError where it is not there or not a plain file."""
        raise NotImplementedError


def _take(files: _Files, place: Path, source: str, report: Report, cancel: threading.Event) -> Installed:
    data = files.description()
    entries, bundle = _entries(data, source)
    name = f"{_slug(bundle['name'])}-{_slug(bundle.get('version', ''))}-{hashlib.sha256(data).hexdigest()[:8]}"
    total = sum(entry["size"] for entry in entries.values())
    place.mkdir(parents=True, exist_ok=True)
    _sweep(place)
    free = shutil.disk_usage(place).free
    if total > free:
        raise InputError(f"{source} needs {total / 1e9:.1f} GB and {place} has {free / 1e9:.1f} GB free")
    done = 0
    with replacing_folder(place / name) as folder:
        for relative, entry in entries.items():
            target = folder / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            digest = hashlib.sha256()
            left = entry["size"]
            with files.open(relative) as stream, open(target, "wb") as copy:
                # One byte more than recorded is asked for: a stream that is longer is refused without being unpacked.
                while chunk := stream.read(min(_CHUNK, left + 1)):
                    if cancel.is_set():
                        raise Cancelled("the installation was cancelled")
                    left -= len(chunk)
                    if left < 0:
                        break
                    digest.update(chunk)
                    copy.write(chunk)
                    done += len(chunk)
                    report("Installing", done // _CHUNK, max(1, total // _CHUNK))
            if left != 0:
                raise InputError(f"{source}: {relative} has not the recorded {entry['size']} bytes: it is damaged; get the model again")
            if digest.hexdigest() != entry["sha256"]:
                raise InputError(
                    f"{source}: {relative} is damaged or was altered: its SHA-256 is not the recorded one; get the model again"
                )
        (folder / BUNDLE).write_bytes(data)
        info = service.describe(folder)
    return Installed(name, place / name, info)


def _entries(data: bytes, source: str) -> tuple[dict[str, dict], dict]:
    """The listed files of a bundle.json and all of it, checked. Raises InputError."""
    try:
        bundle = parse_json(data)
        entries = dict(bundle["files"])
        str(bundle["name"])
        known = bundle["format"] == FORMAT
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{source}: {BUNDLE} is not a readable model description") from None
    if not known:
        raise InputError(f"{source}: this model has another format than {FORMAT}; a newer version of the extension may read it")
    if not entries or len(entries) > FILES_MAX:
        raise InputError(f"{source}: {BUNDLE} lists {len(entries)} files; a model has 1 to {FILES_MAX}")
    seen = {BUNDLE}
    for name, entry in entries.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name) or len(name) > 200:
            raise InputError(f"{source}: {name!r} is not a name of a file inside a model; it is not installed")
        if PurePosixPath(name).suffix.lower() not in SUFFIXES:
            raise InputError(f"{source}: {name} is no plain data (only {', '.join(SUFFIXES)}); it is not installed")
        if name.lower() in seen:
            raise InputError(f"{source}: {BUNDLE} lists {name} twice")
        seen.add(name.lower())
        if (
            not isinstance(entry, dict)
            or type(entry.get("size")) is not int
            or entry["size"] < 0
            or not isinstance(entry.get("sha256"), str)
        ):
            raise InputError(f"{source}: the entry of {name} in {BUNDLE} needs size and sha256")
    if sum(entry["size"] for entry in entries.values()) > SIZE_MAX:
        raise InputError(f"{source}: {BUNDLE} lists more than {SIZE_MAX / 2**30:.0f} GB; it is not installed")
    return entries, bundle


@contextmanager
def _folder(root: Path) -> Iterator[_Files]:
    class Folder(_Files):
        def description(self) -> bytes:
            if not (root / BUNDLE).is_file():
                raise InputError(f"{root} is no model: it has no {BUNDLE}")
            if (root / BUNDLE).stat().st_size > DESCRIPTION_MAX:
                raise InputError(f"{root / BUNDLE} is too large to be a model description")
            return (root / BUNDLE).read_bytes()

        def open(self, name: str) -> IO[bytes]:
            path = root / name
            # A link may lead anywhere, to a file of the user's that is then copied into a model.
            inside = path.resolve().is_relative_to(root.resolve())
            if not inside or not path.is_file():
                raise InputError(
                    f"{root}: {name} is {'missing: the model is incomplete' if inside else 'a link that leads out of the model'}"
                )
            return open(path, "rb")

    yield Folder()


@contextmanager
def _zip(path: Path) -> Iterator[_Files]:
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile, NotImplementedError) as error:
        raise InputError(f"{path} is not a readable zip ({error}); get the model again") from error
    with archive:
        members = {}
        for member in archive.infolist():
            parts = PurePosixPath(member.filename.replace("\\", "/")).parts
            if member.filename.startswith("/") or ".." in parts or ":" in member.filename:
                raise InputError(f"{path}: {member.filename!r} leads out of the archive; it is not installed")
            if stat.S_ISLNK(member.external_attr >> 16):
                raise InputError(f"{path}: {member.filename!r} is a link; it is not installed")
            if member.flag_bits & 1:
                raise InputError(f"{path}: it is encrypted; unpack it and install the folder")
            members[member.filename] = member
        # At the top, or in the one folder that packing a folder makes.
        found = [name for name in members if name == BUNDLE or (name.endswith("/" + BUNDLE) and name.count("/") == 1)]
        if len(found) != 1:
            raise InputError(f"{path} is no model: {BUNDLE} is {'missing' if not found else 'in it more than once'}")
        prefix = found[0].removesuffix(BUNDLE)

        class Zip(_Files):
            def description(self) -> bytes:
                if members[found[0]].file_size > DESCRIPTION_MAX:
                    raise InputError(f"{path}: {BUNDLE} is too large to be a model description")
                with self.open(BUNDLE) as stream:
                    return stream.read(DESCRIPTION_MAX)

            def open(self, name: str) -> IO[bytes]:
                if prefix + name not in members:
                    raise InputError(f"{path}: {name} is missing: the model is incomplete")
                try:
                    return archive.open(members[prefix + name])
                except OSError as error:  # it is said to begin before the archive does
                    raise zipfile.BadZipFile(str(error)) from error

        try:
            yield Zip()
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
            if isinstance(error, (InputError, WorkError, Cancelled)):
                raise
            raise InputError(f"{path} is damaged ({error}); get the model again") from error


class _Download:
    """A file of the hub as it comes: no more of it than is read."""

    def __init__(self, what: str, stream: Callable[[], IO[bytes]]) -> None:
        self._what = what
        self._stream = self._asked(stream)

    def read(self, size: int) -> bytes:
        return self._asked(lambda: self._stream.read(size))

    def __enter__(self) -> _Download:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def _asked(self, ask: Callable[[], Any]) -> Any:
        try:
            return ask()
        except ImportError:
            raise
        except Exception as error:  # of the network, the hub's library, the file system: all mean the same here
            raise WorkError(f"{self._what} cannot be downloaded: {' '.join(str(error).split())[:200]}") from error


@contextmanager
def _hub(source: str, report: Report, cancel: threading.Event) -> Iterator[_Files]:
    """Reads the description first, then only what it lists, no further than it says."""

    class Hub(_Files):
        def description(self) -> bytes:
            report("Asking the hub")
            with self.open(BUNDLE) as stream:
                data = stream.read(DESCRIPTION_MAX + 1)
            if len(data) > DESCRIPTION_MAX:
                raise InputError(f"{source}: {BUNDLE} is too large to be a model description")
            return data

        def open(self, name: str) -> _Download:
            if cancel.is_set():
                raise Cancelled("the installation was cancelled")
            return _Download(f"{name} of {source}", lambda: found(name))

    found = hub_files(source)
    yield Hub()


def hub_files(source: str) -> Callable[[str], IO[bytes]]:
    """What opens the files of a hub model, which are read as they come. The only place of the extension that uses the network."""
    from huggingface_hub import HfFileSystem

    # Of its own, or it would remember what the hub said of the model an hour ago.
    files = HfFileSystem(skip_instance_cache=True)
    return lambda name: files.open(f"{source}/{name}", "rb", block_size=0)


def _sweep(place: Path) -> None:
    """Remove what installations that were killed have left behind."""
    for path in place.glob(".*"):
        if path.is_dir() and time.time() - path.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(path, ignore_errors=True)


def _slug(text: object) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", str(text).lower()).strip("-.")[:40] or "model"
