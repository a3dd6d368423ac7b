"""Nothing half-written: files and folders are made beside their place and then renamed into it. And JSON of unknown origin."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import InputError


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary sibling of `path` to write to; it becomes `path` when the block ends without an error.

    Raises:
        InputError: the folder is missing or the file cannot be written there.
    """
    path = Path(path)
    check_writable(path)
    temporary = _sibling(path)
    try:
        yield temporary
        # On the disk before its name is: a power cut must not leave an empty file in the place of a good one.
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary sibling folder to fill; it takes the place of the folder `path` when the block ends without an error.

    Raises:
        InputError: the place cannot be written or is taken by a file.
    """
    path = Path(os.path.abspath(path))
    if path.exists() and not path.is_dir():
        raise InputError(f"cannot write {path}: it is a file; name a folder")
    temporary = _sibling(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        if path.exists():
            # A folder with content cannot be replaced in one step: the old one steps aside and comes back on failure.
            old = _sibling(path)
            os.replace(path, old)
            try:
                os.replace(temporary, path)
            except OSError:
                os.replace(old, path)
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_writable(path: str | os.PathLike) -> None:
    """Check that a file can be made at `path`; for before the work whose result goes there.

    Raises:
        InputError: `path` is a folder, or its own folder is missing or cannot be written.
    """
    path = Path(path)
    folder = path.parent
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a folder; name a file")
    if not folder.is_dir():
        raise InputError(f"cannot write {path}: the folder {folder} does not exist; make it first")
    if not os.access(folder, os.W_OK):
        raise InputError(f"cannot write {path}: no permission to write in the folder {folder}")


def parse_json(text: str | bytes) -> Any:
    """`json.loads` for text of any origin.

    Raises:
        ValueError: it is not JSON, not UTF-8, or nested so deeply that Python's own parser ends in a RecursionError.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def make_folder(path: str | os.PathLike) -> Path:
    """Make a folder that files can be written to; for before the work whose results go there.

    Raises:
        InputError: it cannot be made or written to, or a file has its name.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write in {path}: {error.strerror or error}; choose another folder") from error
    if not os.access(path, os.W_OK):
        raise InputError(f"cannot write in {path}: no permission to write in that folder; choose another")
    return path


def _sibling(path: Path) -> Path:
    return path.with_name(f".{path.stem}-{secrets.token_hex(4)}{path.suffix}")
