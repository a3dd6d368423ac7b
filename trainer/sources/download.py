"""Fetches the Sweet Home 3D furniture libraries with the system's package tools; no administrator rights are needed."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from generator.errors import InputError, WorkError

from .objects import CACHE
from .sweet_home_3d import sweet_home_3d

PACKAGE = "sweethome3d-furniture"
_BY_HAND = (
    f"get the .deb file of {PACKAGE} from packages.debian.org, unpack it with `dpkg -x FILE FOLDER` (or `ar x` and `tar x`) "
    "and give the folder that holds the .sh3f files"
)


def download_sweet_home_3d(cache: str | Path = CACHE) -> Path:
    """The folder of .sh3f libraries under `cache`, fetched by `apt-get download` and `dpkg -x` where it is not there yet.

    The folder appears only after every library in it has been read.

    Raises:
        WorkError: the package could not be fetched or unpacked; the message says how to do it by hand.
    """
    cache = Path(cache)
    target = cache / "sweet-home-3d"
    if target.is_dir() and any(target.glob("*.sh3f")):
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".download-") as name:
        work = Path(name)
        _run(["apt-get", "download", PACKAGE], work)
        packages = sorted(work.glob(f"{PACKAGE}_*.deb"))
        if not packages:
            raise WorkError(f"apt-get download left no {PACKAGE} package: {_BY_HAND}")
        _run(["dpkg", "-x", packages[0].name, "unpacked"], work)
        libraries = sorted((work / "unpacked").rglob("*.sh3f"))
        if not libraries:
            raise WorkError(f"{packages[0].name} holds no .sh3f library: {_BY_HAND}")
        ready = work / "ready"
        ready.mkdir()
        try:
            for library in libraries:
                sweet_home_3d(library)
                os.replace(library, ready / library.name)
        except InputError as error:
            raise WorkError(f"{PACKAGE} is damaged ({error}): try again, or {_BY_HAND}") from error
        if target.exists():
            shutil.rmtree(target)
        os.replace(ready, target)
    return target


def _run(command: list[str], directory: Path) -> None:
    try:
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True, errors="replace", timeout=1800)
    except FileNotFoundError as error:
        raise WorkError(f"{command[0]} is not on this system: {_BY_HAND}") from error
    except subprocess.TimeoutExpired as error:
        raise WorkError(f"{' '.join(command)} took longer than 30 minutes: {_BY_HAND}") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit status {done.returncode}"]
        raise WorkError(f"{' '.join(command)} failed ({lines[-1].strip()}): run `apt-get update`, or {_BY_HAND}")
