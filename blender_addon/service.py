"""The loaded model: one pipeline is kept in memory, shared by everything that samples. Knows nothing of Blender."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import importlib.util
import os
import re
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from ..generator.errors import InputError
from ..generator.files import parse_json


@dataclass(frozen=True)
class ModelInfo:
    """What a bundle says of itself, read without loading it."""

    name: str
    version: str
    sha256: str  # of bundle.json, which in turn lists the sha256 of every other file
    defaults: dict[str, float] = field(default_factory=dict)
    licence: str = ""
    size: int = 0  # bytes of its files
    gaussians: int = 0  # in each object
    vocabulary: tuple[str, ...] = ()  # the objects that it was trained on
    metrics: dict[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return f"{self.name} {self.version}".strip()


# factory(folder, device) -> pipeline; device is "auto", "cpu" or "cuda".
PipelineFactory = Callable[[Path, str], Any]

_lock = threading.RLock()
_loaded: tuple[Path, str, Any] | None = None


def from_bundle(folder: Path, device: str) -> Any:
    """The real factory: imports the generator (and with it torch and diffusers) only now."""
    from ..generator import GaussianAtlasPipeline

    return GaussianAtlasPipeline.from_pretrained(folder, device=device, allow_download=False)


_factory: PipelineFactory = from_bundle


def set_pipeline_factory(factory: PipelineFactory | None = None) -> None:
    """Make pipelines by `factory(folder, device)` from now on; None brings the real one back. Drops the loaded pipeline."""
    global _factory
    unload()
    _factory = factory or from_bundle


def libraries_loaded() -> bool:
    """Whether what `pipeline` imports is imported already; the first time takes seconds."""
    return _factory is not from_bundle or "diffusers.models.unets.unet_2d_condition" in sys.modules


def load_libraries() -> None:
    """Import what `pipeline` would import, in a way that lets other threads run (benchmarks/responsiveness.py).

    Two things would hold Python for up to half a second: the linker, opening torch's libraries within the import, and full
    garbage collections, of which importing a million objects sets off a dozen. So the libraries are opened ahead without
    Python, collections wait, and what was imported is then left out of them, which makes all later ones short too.
    """
    _open_ahead()
    collecting = gc.isenabled()
    gc.disable()
    try:
        from diffusers.models.unets import unet_2d_condition  # noqa: F401
        from diffusers.schedulers import scheduling_dpmsolver_multistep  # noqa: F401
        from transformers import AutoModel, AutoTokenizer  # noqa: F401
        from transformers.models.bert import modeling_bert  # noqa: F401

        from ..generator import GaussianAtlasPipeline  # noqa: F401
    finally:
        gc.freeze()
        if collecting:
            gc.enable()


def _open_ahead() -> None:
    """Have the linker load torch's libraries by a call that ctypes makes without Python's lock; the import finds them there."""
    if sys.platform != "linux" or "torch" in sys.modules:
        return
    try:
        spec = importlib.util.find_spec("torch")
        if spec is None or spec.origin is None:
            return
        library = Path(spec.origin).with_name("lib") / "libtorch_python.so"
        if library.is_file():
            open_library = ctypes.CDLL(None).dlopen
            open_library.argtypes, open_library.restype = [ctypes.c_char_p, ctypes.c_int], ctypes.c_void_p
            open_library(str(library).encode(), os.RTLD_NOW)
    except (AttributeError, OSError, ValueError, ImportError):  # then the import itself does it, or says what is wrong
        pass


def pipeline(folder: Path, device: str = "auto") -> Any:
    """The pipeline of a bundle on a device: loaded on first use, kept until another is asked for or `unload`.

    Raises:
        InputError: the bundle is missing or damaged, or the device is not there.
    """
    global _loaded
    folder = folder.resolve()
    with _lock:
        if _loaded is None or _loaded[:2] != (folder, device):
            unload()
            describe(folder)
            _loaded = (folder, device, _factory(folder, device))
        return _loaded[2]


def is_loaded(folder: Path | None = None, device: str | None = None) -> bool:
    """Whether a pipeline (of this bundle, on this device) is in memory."""
    loaded = _loaded
    if loaded is None:
        return False
    return (folder is None or loaded[0] == folder.resolve()) and (device is None or loaded[1] == device)


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
    """What the bundle in a folder says of itself. Read once: panels ask at every redraw.

    Raises:
        InputError: there is no readable bundle.json.
    """
    path = folder / "bundle.json"
    try:
        stat = path.stat()
        return _describe(path, stat.st_mtime_ns, stat.st_size)
    except FileNotFoundError:
        raise InputError(f"no model in {folder}: bundle.json is missing; choose a model folder in the preferences") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise InputError(f"{path} is not a readable model description ({type(error).__name__}); install the model again") from error


@lru_cache(maxsize=32)
def _describe(path: Path, changed: int, size: int) -> ModelInfo:
    data = path.read_bytes()
    bundle = parse_json(data)
    return ModelInfo(
        name=str(bundle["name"]),
        version=str(bundle.get("version", "")),
        sha256=hashlib.sha256(data).hexdigest(),
        defaults={name: float(value) for name, value in dict(bundle.get("defaults") or {}).items()},
        licence=str(bundle.get("licence", "")),
        size=sum(int(entry["size"]) for entry in dict(bundle.get("files") or {}).values()),
        gaussians=int(dict(bundle.get("atlas") or {}).get("gaussians", 0)),
        vocabulary=tuple(str(entry) for entry in bundle.get("vocabulary") or ()),
        metrics=dict(bundle.get("metrics") or {}),
    )


@cache
def cuda_reason() -> str:
    """Why CUDA cannot be used here; empty where it may. Looks at files only: importing torch takes seconds."""
    try:
        spec = importlib.util.find_spec("torch")
        version = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8") if spec and spec.origin else ""
    except (OSError, ValueError, ImportError):
        version = ""
    if not version:
        return "torch is not installed"
    if re.search(r"^cuda\b.*= None$", version, re.MULTILINE):
        return "the extension's torch is built for the CPU"
    if sys.platform == "win32":
        driver = Path("C:/Windows/System32/nvcuda.dll").exists()
    else:
        driver = Path("/proc/driver/nvidia/version").exists() or Path("/dev/dxg").exists()  # the latter under WSL
    return "" if driver else "there is no NVIDIA driver"
