"""What the extension learns on a machine: earlier prompts, and how long generating takes. Knows nothing of Blender.

One JSON file in the user's folder. It is written beside its name and then renamed, so a crash keeps the old one whole, and
read again before each write, so that two Blenders add to one another. A file that cannot be read counts as empty.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from ..generator.errors import InputError
from ..generator.files import parse_json, replacing

PROMPTS_MAX = 100
SPEEDS_MAX = 50
# Weight of the newest run: the machine may have been busy.
NEWEST = 0.5


@dataclass(frozen=True)
class Speed:
    """Seconds on this machine."""

    load: float = 0.0  # of bringing the model into memory
    step: float = 0.0  # of one solver step of one object, without guidance


@dataclass(frozen=True)
class History:
    prompts: tuple[str, ...] = ()  # the newest first, none twice
    speeds: dict[str, Speed] = field(default_factory=dict)  # by `speed_key`, the newest last


def speed_key(model_hash: str, device: str) -> str:
    return f"{model_hash[:16]} {device}"


def estimate(speed: Speed, steps: int, count: int, guided: bool, loaded: bool) -> float:
    """Seconds that a run will take; guidance runs the network on twice as much."""
    return (0.0 if loaded else speed.load) + speed.step * steps * count * (2 if guided else 1)


def read(path: Path) -> History:
    """The history in a file; empty where there is none. Costs a look at the file's date where it has not changed."""
    try:
        stat = path.stat()
    except OSError:
        return History()
    return _read(path, stat.st_mtime_ns, stat.st_size)


def add_prompt(path: Path, prompt: str) -> None:
    """Put a prompt first. Raises InputError where the file cannot be written."""
    prompt = " ".join(prompt.split())
    if prompt:
        _change(path, lambda old: History((prompt, *(text for text in old.prompts if text != prompt))[:PROMPTS_MAX], old.speeds))


def add_speed(path: Path, key: str, steps: int, guided: bool, seconds: dict[str, float]) -> None:
    """Learn from the seconds {"load", "sample"} of one object. Raises InputError where the file cannot be written."""
    step = seconds["sample"] / steps / (2 if guided else 1)

    def learn(old: History) -> History:
        known = old.speeds.get(key, Speed())
        # A model that was in memory says nothing of loading.
        load = _mean(known.load, seconds["load"]) if seconds["load"] > 0.05 else known.load
        others = {name: speed for name, speed in old.speeds.items() if name != key}
        kept = dict(list(others.items())[-(SPEEDS_MAX - 1) :])
        return History(old.prompts, kept | {key: Speed(load, _mean(known.step, step))})

    _change(path, learn)


def clear_prompts(path: Path) -> None:
    """Forget every prompt. Raises InputError where the file cannot be written."""
    _change(path, lambda old: History((), old.speeds))


def _mean(known: float, new: float) -> float:
    return new if known <= 0 else NEWEST * new + (1 - NEWEST) * known


def _change(path: Path, change: Callable[[History], History]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
    new = change(_read_file(path))
    value = {"prompts": new.prompts, "speeds": {key: {"load": speed.load, "step": speed.step} for key, speed in new.speeds.items()}}
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


@lru_cache(maxsize=4)
def _read(path: Path, changed: int, size: int) -> History:
    return _read_file(path)


def _read_file(path: Path) -> History:
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
        prompts = tuple(text for text in value["prompts"] if isinstance(text, str))[:PROMPTS_MAX]
        speeds = {str(key): Speed(float(speed["load"]), float(speed["step"])) for key, speed in value["speeds"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return History()
    return History(prompts, speeds)
