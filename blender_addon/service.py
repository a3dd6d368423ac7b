"""The loaded model: one pipeline is kept in memory, shared by everything that samples. Knows nothing of Blender."""

from __future__ import annotations

import gc
import hashlib
import json
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..generator.errors import InputError


@dataclass(frozen=True)
class ModelInfo:
    """What a bundle says of itself, read without loading it."""

    name: str
    version: str
    sha256: str  # of bundle.json, which in turn lists the sha256 of every other file
    defaults: dict[str, Any]


PipelineFactory = Callable[[Path], Any]

_lock = threading.RLock()
_loaded: tuple[Path, Any] | None = None


def from_bundle(folder: Path) -> Any:
    """The real factory: imports the generator (and with it torch and diffusers) only now."""
    from ..generator import GaussianAtlasPipeline

    return GaussianAtlasPipeline.from_pretrained(folder, allow_download=False)


_factory: PipelineFactory = from_bundle


def set_pipeline_factory(factory: PipelineFactory | None = None) -> None:
    """Make pipelines by `factory(folder)` from now on; None brings the real one back. Drops the loaded pipeline."""
    global _factory
    unload()
    _factory = factory or from_bundle


def pipeline(folder: Path) -> Any:
    """The pipeline of a bundle: loaded on first use, kept until another is asked for or `unload`.

    Raises:
        InputError: the bundle is missing or damaged.
    """
    global _loaded
    folder = folder.resolve()
    with _lock:
        if _loaded is None or _loaded[0] != folder:
            unload()
            describe(folder)
            _loaded = (folder, _factory(folder))
        return _loaded[1]


def is_loaded(folder: Path | None = None) -> bool:
    """Whether a pipeline (of this bundle) is in memory."""
    loaded = _loaded
    return loaded is not None and (folder is None or loaded[0] == folder.resolve())


def unload() -> bool:
    """Drop the pipeline and give its memory back. False where none was loaded."""
    global _loaded
    with _lock:
        had = _loaded is not None
        _loaded = None
    if had:
        gc.collect()
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_available():
            torch.cuda.empty_cache()
    return had


def describe(folder: Path) -> ModelInfo:
    """Name, version and hash of the bundle in a folder.

    Raises:
        InputError: there is no readable bundle.json.
    """
    path = folder / "bundle.json"
    try:
        data = path.read_bytes()
        bundle = json.loads(data)
        return ModelInfo(
            name=str(bundle["name"]),
            version=str(bundle.get("version", "")),
            sha256=hashlib.sha256(data).hexdigest(),
            defaults=dict(bundle.get("defaults") or {}),
        )
    except FileNotFoundError:
        raise InputError(f"no model in {folder}: bundle.json is missing; choose a model folder in the preferences") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is not a readable model description ({type(error).__name__}); install the model again") from error
