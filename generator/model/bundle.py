"""A model on disk: a diffusers folder (model_index.json, unet/, scheduler/) with text_encoder/, atlas/ and bundle.json.

bundle.json says what the model is and holds the size and SHA-256 of every other file, so its own SHA-256 names the model.
The UNet is a plain diffusers one: `UNet2DConditionModel.from_pretrained(folder, subfolder="unet")` reads it.
Weights are safetensors only; nothing in a bundle is ever executed or unpickled.
"""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..atlas import CHANNELS, AtlasLayout, ChannelSpec, Normalization
from ..errors import InputError
from ..files import parse_json, replacing_folder
from .prior import AtlasPrior
from .regression import TextRegression
from .text import TextEncoder, sha256

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

FORMAT = "gaussian-atlas-bundle-1"
# What a maker must say about a model.
REQUIRED_INFO = ("name", "version", "licence", "trained_on")
# What a bundle with a regression must say of its use, see `save_bundle`.
REGRESSION_SHARES = ("variance", "network", "above", "variety", "choice")
MAX_STEPS = 1000  # of the solver
# Of the schedule that a network was trained with, which is a table.
_TIMESTEPS_MAX = 100_000
# Written by `save_bundle`, not by the caller.
_OWN_INFO = ("format", "atlas", "files")

_BUNDLE = "bundle.json"
_UNET_CONFIG = "unet/config.json"
_UNET_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
_SCHEDULER = "scheduler/scheduler_config.json"
_TEXT_ENCODER = "text_encoder"
_LAYOUT = "atlas/layout.safetensors"
_NORMALIZATION = "atlas/normalization.safetensors"
_CHANNELS = "atlas/channels.json"
_PRIOR = "atlas/prior.safetensors"
_REGRESSION = "atlas/regression.safetensors"
# Plain data: nothing else is downloaded, and a bundle may list nothing else, such as pickles or Python.
_PLAIN = (".safetensors", ".json", ".txt", ".md", ".csv")
_NEEDED = (_UNET_CONFIG, _UNET_WEIGHTS, _SCHEDULER, f"{_TEXT_ENCODER}/config.json", _LAYOUT, _NORMALIZATION, _CHANNELS)


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: all but the network, which `load_unet` reads."""

    directory: Path
    info: dict  # bundle.json
    hash: str  # SHA-256 of bundle.json, and through it of every file
    layout: AtlasLayout
    normalization: Normalization
    channels: ChannelSpec
    text_encoder: TextEncoder
    unet_config: dict  # arguments of UNet2DConditionModel
    scheduler_config: dict  # arguments of DPMSolverMultistepScheduler
    prior: AtlasPrior | None = None  # whose estimate the network corrects; None where it sees and paints atlases themselves
    regression: TextRegression | None = None  # what a prompt alone says of its atlas: the mean of the prior

    @property
    def name(self) -> str:
        """Name and version, as in provenance and progress."""
        return f"{self.info['name']} {self.info['version']}"

    @property
    def fold(self) -> int:
        """Cells a side that are folded into channels before the UNet; 1 is the paper's plain input."""
        return int(self.info.get("fold", 1))

    @property
    def wrap(self) -> int:
        """Columns of the folded image that the network sees again beyond the left and the right border; 0 is the paper's plain image."""
        return int(self.info.get("wrap", 0))

    def load_unet(self, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
        """The network for inference.

        Raises:
            InputError: the weights are damaged or do not fit the configuration.
        """
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

        path = self.directory / _UNET_WEIGHTS
        try:
            state = {name: value.to(dtype) for name, value in load_file(path).items()}
            # Made without memory or random numbers: every weight is assigned from the file.
            with torch.device("meta"):
                unet = UNet2DConditionModel.from_config(self.unet_config)
            unet.load_state_dict(state, strict=True, assign=True)
        except (OSError, SafetensorError, RuntimeError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
            raise InputError(f"{path}: the weights cannot be loaded: {' '.join(str(error).split())[:200]}") from error
        return unet.eval().requires_grad_(False).to(device)


def save_bundle(
    directory: str | os.PathLike,
    unet: UNet2DConditionModel,
    scheduler_config: dict,
    text_encoder: TextEncoder,
    layout: AtlasLayout,
    normalization: Normalization,
    channels: ChannelSpec,
    info: dict,
    files: dict[str, bytes] | None = None,
    dtype: torch.dtype = torch.float16,
    prior: AtlasPrior | None = None,
    regression: TextRegression | None = None,
) -> Path:
    """Write a bundle, replacing one that was there; a failure leaves the old one.

    Args:
        unet: network of 16 fold^2 channels in and out.
        scheduler_config: arguments of DPMSolverMultistepScheduler.
        info: JSON values: name, version, licence, trained_on (required), and for instance fold, wrap, vocabulary, metrics,
            defaults ({"num_inference_steps": 20, "guidance_scale": 3.5}), inference ({"dtype": "auto"}),
            low_pass (object units by which generated Gaussians are wider), coverage (what gaps are closed to, see `generator.coverage`),
            distilled_guidance (of a network that takes guidance of 1 to this as an input),
            damping (of what its prior expects of fine structure, {"above": 2.0, "variance": 0.3}, see `prior.damping`),
            regression (how the regression and the network share, needed with one: {"variance": 0.1, "network": 0.2, "above": 600,
            "variety": 1.0, "choice": 2.0}, the share of the prior's variance that is left about its mean, the network's weight from that
            timestep up, and how much seeds vary the captions that a prompt is drawn towards and the objects of one caption).
        files: more files of the bundle by relative name, such as credits.
        dtype: of the stored weights.
        prior: whose estimate the network corrects, where it was trained so.
        regression: the mean of that prior for a prompt.

    Raises:
        InputError: the parts do not fit each other, something required is missing, or the folder cannot be written.
    """
    missing = [key for key in REQUIRED_INFO if not info.get(key)]
    if missing:
        raise InputError(f"bundle info lacks {', '.join(missing)}")
    taken = [key for key in _OWN_INFO if key in info]
    if taken:
        raise InputError(f"bundle info must not set {', '.join(taken)}")
    unet_config = {key: value for key, value in unet.config.items() if not key.startswith("_")}
    _check_parts(Path(directory), unet_config, layout, normalization, info)
    _check_scheduler(Path(directory), scheduler_config)
    _check_prior(Path(directory), prior, layout, scheduler_config, info)
    _check_regression(Path(directory), regression, prior, layout, text_encoder, info)
    with replacing_folder(directory) as folder:
        for name in (_UNET_CONFIG, _SCHEDULER, _LAYOUT):
            (folder / name).parent.mkdir()
        versions = {"_class_name": "UNet2DConditionModel", "_diffusers_version": _diffusers_version()}
        _write_json(folder / _UNET_CONFIG, versions | unet_config)
        state = {name: value.detach().to("cpu", dtype).contiguous() for name, value in unet.state_dict().items()}
        bad = [name for name, value in state.items() if not bool(torch.isfinite(value).all())]
        if bad:
            raise InputError(f"the weights {bad[0]} are not finite as {dtype}; the training diverged, or choose another dtype")
        save_file(state, folder / _UNET_WEIGHTS, metadata={"format": "pt"})
        _write_json(folder / _SCHEDULER, versions | {"_class_name": "DPMSolverMultistepScheduler"} | scheduler_config)
        text_encoder.save(folder / _TEXT_ENCODER)
        layout.save(folder / _LAYOUT)
        normalization.save(folder / _NORMALIZATION)
        (folder / _CHANNELS).write_text(channels.to_json(), encoding="utf-8")
        if prior is not None:
            prior.save(folder / _PRIOR)
        if regression is not None:
            regression.save(folder / _REGRESSION)
        _write_json(
            folder / "model_index.json",
            {
                "_class_name": "GaussianAtlasPipeline",
                "_diffusers_version": _diffusers_version(),
                "unet": ["diffusers", "UNet2DConditionModel"],
                "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
            },
        )
        for name, content in (files or {}).items():
            path = folder / _relative(name, folder)
            if path.exists():
                raise InputError(f"the bundle has a file {name} of its own")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        listed = sorted(path for path in folder.rglob("*") if path.is_file())
        own = {
            "format": FORMAT,
            "atlas": {"size": layout.size, "projection": layout.projection, "gaussians": layout.count, "layout_id": layout.id},
        }
        entries = {path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": sha256(path)} for path in listed}
        _write_json(folder / _BUNDLE, own | info | {"files": entries})
    return Path(directory)


def load_bundle(directory: str | os.PathLike, verify: bool = True) -> Bundle:
    """Open a bundle and check that its parts belong together.

    Args:
        verify: compare every file with its SHA-256; without it only presence and size are checked.

    Raises:
        InputError: a file is missing, truncated, altered or unreadable, or the parts do not fit each other.
    """
    directory = Path(directory)
    if not os.path.isdir(directory):  # unlike Path.is_dir, also for names that no file system takes
        raise InputError(f"there is no model bundle at {directory}: no such folder")
    if not (directory / _BUNDLE).is_file():
        raise InputError(f"{directory} is not a model bundle: it has no {_BUNDLE}")
    info = _read_json(directory / _BUNDLE)
    if info.get("format") != FORMAT:
        raise InputError(f"{directory / _BUNDLE}: format {info.get('format')!r} is not {FORMAT!r}; a newer version may read it")
    lacking = [key for key in REQUIRED_INFO if not info.get(key)]
    if lacking or not isinstance(info.get("files"), dict):
        raise InputError(f"{directory / _BUNDLE} lacks {', '.join(lacking) or 'its list of files'}")
    unlisted = [name for name in _NEEDED if name not in info["files"]]
    if unlisted:
        raise InputError(f"{directory / _BUNDLE} does not list {unlisted[0]}; the bundle is incomplete")
    for name, entry in info["files"].items():
        _check_file(directory, name, entry, verify)

    layout = AtlasLayout.load(directory / _LAYOUT)
    normalization = Normalization.load(directory / _NORMALIZATION)
    channels = ChannelSpec.from_json(_read_text(directory / _CHANNELS))
    prior = AtlasPrior.load(directory / _PRIOR) if _PRIOR in info["files"] else None
    regression = TextRegression.load(directory / _REGRESSION) if _REGRESSION in info["files"] else None
    unet_config = {key: value for key, value in _read_json(directory / _UNET_CONFIG).items() if not key.startswith("_")}
    scheduler_config = _read_json(directory / _SCHEDULER)
    if scheduler_config.get("_class_name", "DPMSolverMultistepScheduler") != "DPMSolverMultistepScheduler":
        raise InputError(f"{directory / _SCHEDULER}: the scheduler must be DPMSolverMultistepScheduler")
    scheduler_config = {key: value for key, value in scheduler_config.items() if not key.startswith("_")}
    _check_parts(directory, unet_config, layout, normalization, info)
    _check_scheduler(directory, scheduler_config)
    _check_prior(directory, prior, layout, scheduler_config, info)
    stated = info["atlas"].get("layout_id") if isinstance(info.get("atlas"), dict) else None
    if stated != layout.id:
        raise InputError(f"{directory}: bundle.json names the layout {stated}, its atlas has {layout.id}")
    text_encoder = TextEncoder.load(directory / _TEXT_ENCODER, verify)
    width = unet_config.get("cross_attention_dim")
    if width != text_encoder.width:
        raise InputError(f"{directory}: the network attends to text of width {width}, the encoder gives {text_encoder.width}")
    _check_regression(directory, regression, prior, layout, text_encoder, info)
    named = sha256(directory / _BUNDLE)
    return Bundle(directory, info, named, layout, normalization, channels, text_encoder, unet_config, scheduler_config, prior, regression)


def find_bundle(source: str | os.PathLike, allow_download: bool = True, wanted: list[str] | None = None) -> Path:
    """The folder of a bundle: `source` itself, or a snapshot of the hub model that it names.

    Args:
        allow_download: without it only a snapshot that is already in the local cache is found.
        wanted: patterns of the files to fetch, of which only plain data are; None fetches all of these.

    Raises:
        InputError: it is neither a folder here nor a hub model that can be had.
    """
    path = Path(source)
    text = os.fspath(source)
    # "owner/name", unless its first part is a folder here: then a folder of that name was meant.
    looks_like_hub = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", text) is not None and not os.path.isdir(path.parent)
    if os.path.exists(path) or not looks_like_hub:
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        # "tokenizer/*" is "tokenizer/*.json" and so on.
        plain = [pattern + suffix if pattern.endswith("*") else pattern for pattern in wanted or ["*"] for suffix in _PLAIN]
        return Path(snapshot_download(text, allow_patterns=plain, local_files_only=not allow_download))
    except LocalEntryNotFoundError as error:
        reason = "the hub could not be reached" if allow_download else "it has not been downloaded, and downloads are not allowed here"
        raise InputError(f"the model {text} is not a folder here, and {reason}") from error
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise InputError(f"the model {text} is neither a folder here nor on the hub: {' '.join(str(error).split())[:200]}") from error


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value, of JSON for instance, is a number that a float can be, not NaN or infinity; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _check_parts(directory: Path, unet_config: dict, layout: AtlasLayout, normalization: Normalization, info: dict) -> None:
    fold = info.get("fold", 1)
    if not isinstance(fold, int) or fold < 1 or layout.size % fold:
        raise InputError(f"{directory}: fold must divide the {layout.size} cells of the atlas, got {fold!r}")
    wrap = info.get("wrap", 0)
    if isinstance(wrap, bool) or not isinstance(wrap, int) or not 0 <= wrap <= layout.size // fold:
        raise InputError(f"{directory}: wrap must be a number of columns, 0 to {layout.size // fold}, got {wrap!r}")
    expected = CHANNELS * fold**2
    for key in ("in_channels", "out_channels"):
        if unet_config.get(key) != expected:
            raise InputError(f"{directory}: the network must have {expected} {key} for fold {fold}, it has {unet_config.get(key)}")
    if normalization.layout_id != layout.id:
        raise InputError(f"{directory}: the normalization was computed for layout {normalization.layout_id}, the atlas has {layout.id}")
    if normalization.mean.shape[-1] not in (1, layout.size):
        raise InputError(f"{directory}: the normalization has {normalization.mean.shape[-1]} cells a side, the atlas {layout.size}")
    distilled = info.get("distilled_guidance", 0)
    takes = unet_config.get("time_cond_proj_dim") is not None
    if not is_number(distilled) or not (distilled > 1 if takes else distilled == 0):
        knows = "a network that takes guidance as an input needs distilled_guidance above 1, any other none"
        raise InputError(f"{directory}: {knows}; this one {'takes' if takes else 'does not take'} it, and got {distilled!r}")
    defaults = info.get("defaults", {})
    if not isinstance(defaults, dict) or not all(map(is_number, defaults.values())):
        raise InputError(f"{directory}: defaults must be numbers by their names, got {defaults!r:.100}")
    steps = defaults.get("num_inference_steps", 1)
    if not isinstance(steps, int) or not 1 <= steps <= MAX_STEPS:
        raise InputError(f"{directory}: defaults.num_inference_steps must be a whole number from 1 to {MAX_STEPS}, got {steps!r}")
    for name in ("low_pass", "coverage"):
        if not is_number(value := info.get(name, 0.0)) or value < 0:
            raise InputError(f"{directory}: {name} must be a number of at least 0, got {value!r}")
    vocabulary = info.get("vocabulary") or ()
    if not isinstance(vocabulary, list | tuple) or not all(isinstance(entry, str) for entry in vocabulary):
        raise InputError(f"{directory}: vocabulary must be a list of texts")
    inference = info.get("inference", {})
    if not isinstance(inference, dict) or inference.get("dtype", "auto") not in ("auto", "float32", "bfloat16", "float16"):
        raise InputError(f"{directory}: inference.dtype must be auto, float32, bfloat16 or float16")


def _check_scheduler(directory: Path, scheduler_config: dict) -> None:
    trained = scheduler_config.get("num_train_timesteps", 1000)
    if isinstance(trained, bool) or not isinstance(trained, int) or not 1 <= trained <= _TIMESTEPS_MAX:
        raise InputError(f"{directory}: the scheduler's num_train_timesteps must be from 1 to {_TIMESTEPS_MAX}, got {trained!r}")
    kind = scheduler_config.get("prediction_type", "epsilon")
    if kind not in ("epsilon", "sample", "v_prediction"):
        raise InputError(f"{directory}: the scheduler's prediction_type must be epsilon, sample or v_prediction, got {kind!r}")


def _check_prior(directory: Path, prior: AtlasPrior | None, layout: AtlasLayout, scheduler_config: dict, info: dict) -> None:
    damped = info.get("damping")
    if damped is not None:
        values: list[Any] = [damped.get("above"), damped.get("variance"), damped.get("noise", 1.0)] if isinstance(damped, dict) else [None]
        numbers = all(is_number(value) and value >= 0 for value in values)
        if prior is None or not numbers or max(values[1:]) > 1:
            raise InputError(f"{directory}: damping needs a prior, above (at least 0), variance and noise (0 to 1), got {damped!r}")
    if prior is None:
        return
    if (prior.layout_id, prior.size) != (layout.id, layout.size):
        theirs = f"layout {prior.layout_id} of {prior.size} cells a side"
        raise InputError(f"{directory}: the prior was computed for {theirs}, the atlas has {layout.id} of {layout.size}")
    if scheduler_config.get("prediction_type") != "sample":
        raise InputError(f"{directory}: a network that corrects a prior gives the clean atlas: prediction_type must be sample")


def _check_regression(
    directory: Path, regression: TextRegression | None, prior: AtlasPrior | None, layout: AtlasLayout, text_encoder: TextEncoder, info: dict
) -> None:
    shares = info.get("regression")
    if regression is None:
        if shares is not None:
            raise InputError(f"{directory}: bundle.json says how a regression is used, but there is none")
        return
    values: list[Any] = [shares.get(key) for key in REGRESSION_SHARES] if isinstance(shares, dict) else [None]
    numbers = all(is_number(value) and value >= 0 for value in values)
    if prior is None or not numbers or max(values[:2]) > 1:
        needed = "a prior, variance and network (0 to 1), above, variety and choice (at least 0)"
        raise InputError(f"{directory}: a regression needs {needed}, got {shares!r}")
    if (regression.layout_id, regression.size) != (layout.id, layout.size):
        theirs = f"layout {regression.layout_id} of {regression.size} cells a side"
        raise InputError(f"{directory}: the regression was computed for {theirs}, the atlas has {layout.id} of {layout.size}")
    if regression.keys.shape[1] != text_encoder.width:
        width = regression.keys.shape[1]
        raise InputError(f"{directory}: the regression knows sentences of width {width}, the encoder gives {text_encoder.width}")


def _check_file(directory: Path, name: str, entry: object, verify: bool) -> None:
    path = directory / _relative(name, directory)
    if not isinstance(entry, dict) or not isinstance(entry.get("size"), int) or not isinstance(entry.get("sha256"), str):
        raise InputError(f"{directory / _BUNDLE}: the entry of {name} needs size and sha256")
    if not os.path.isfile(path):
        raise InputError(f"the model bundle {directory} is incomplete: {name} is missing")
    size = path.stat().st_size
    if size != entry["size"]:
        hint = "; a Git LFS pointer was not replaced by its file" if size < 200 and b"git-lfs" in path.read_bytes() else ""
        raise InputError(f"{path} has {size} bytes instead of {entry['size']}: it is truncated or was altered{hint}; get the model again")
    if verify and sha256(path) != entry["sha256"]:
        raise InputError(f"{path} was altered or is damaged: its SHA-256 is not the recorded one; get the model again")


def _relative(name: str, directory: Path) -> Path:
    path = Path(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\\" in name:
        raise InputError(f"{directory}: {name!r} is not a name of a file inside a bundle")
    if path.suffix.lower() not in _PLAIN:
        raise InputError(f"{directory}: {name!r:.100} is no plain data, which all of a bundle is ({', '.join(_PLAIN)})")
    return path


def _diffusers_version() -> str:
    from importlib.metadata import version

    return version("diffusers")


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error


def _read_json(path: Path) -> dict:
    try:
        value = parse_json(_read_text(path))
    except ValueError as error:
        raise InputError(f"{path} is damaged: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} is damaged: not a JSON object")
    return value
