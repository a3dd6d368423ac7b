"""The program's version, which blender_manifest.toml states and nothing else."""

from __future__ import annotations

import tomllib
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

MANIFEST = Path(__file__).resolve().parent.parent / "blender_manifest.toml"


@cache
def program_version() -> str:
    """What the manifest beside this package says; without one, as where pip installed the packages, the distribution's version."""
    try:
        with open(MANIFEST, "rb") as stream:
            return str(tomllib.load(stream)["version"])
    except (OSError, KeyError, ValueError):
        pass
    try:
        return version("gaussian-atlas")
    except PackageNotFoundError:
        return "unknown"


VERSION = program_version()  # for pyproject.toml, which takes it from here
