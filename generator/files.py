"""Nothing half-written: files and folders are made beside their place and then renamed into it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import InputError


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary sibling of `path` to write to; it becomes `path` when the block ends without an error.

    Raises:
        InputError: the folder is missing, is not a folder or cannot be written.
    """
    path = Path(path)
    check_writable(path)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes private files; a result has the permissions of any other new file.
        temporary.chmod(0o666 & ~_umask())
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
        raise InputError(f"{path} is a file; name a folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    check_writable(path)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        # A folder with content cannot be replaced in one step: the old one steps aside first and goes last.
        old = path.with_name(f"{temporary.name}-old")
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_writable(path: str | os.PathLike) -> None:
    """Check that a file could be made at `path`, before the work whose result goes there.

    Raises:
        InputError: the folder is missing, is not a folder or cannot be written.
    """
    folder = Path(path).parent
    if not folder.is_dir():
        raise InputError(f"cannot write {path}: the folder {folder} does not exist; make it first")
    if not os.access(folder, os.W_OK):
        raise InputError(f"cannot write {path}: no permission to write in the folder {folder}")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
