"""From a request to Gaussians with their provenance: what the operator and the batch share. Knows nothing of Blender."""

from __future__ import annotations

import threading
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..generator.errors import Cancelled, InputError
from . import extension, service
from .job import Report

if TYPE_CHECKING:
    from ..generator.gaussians import Gaussians

SEED_MAX = 2**31 - 1  # Blender's integer properties are 32 bits wide


@dataclass(frozen=True)
class Request:
    """What to generate. Object i of `count` has the seed `seed + i`, so that each can be made again alone.

    Raises:
        InputError: a value is out of its range.
    """

    prompt: str
    model: Path  # folder of the bundle
    negative_prompt: str = ""
    seed: int = 0  # 0 .. 2^31 - 1
    steps: int = 20  # solver steps, at least 1
    guidance: float = 3.5  # classifier-free guidance, at least 0; 1 is without
    count: int = 1

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise InputError('the prompt is empty: describe an object, for example "a red armchair"')
        if not 0 <= self.seed <= SEED_MAX:
            raise InputError(f"seed must be between 0 and {SEED_MAX}, got {self.seed}")
        if self.steps < 1:
            raise InputError(f"steps must be at least 1, got {self.steps}")
        if not 0 <= self.guidance < float("inf"):
            raise InputError(f"guidance must be a number of at least 0, got {self.guidance}")
        if self.count < 1:
            raise InputError(f"count must be at least 1, got {self.count}")

    def each(self) -> list[Request]:
        """One request of count 1 for every object."""
        return [replace(self, seed=(self.seed + i) % (SEED_MAX + 1), count=1) for i in range(self.count)]


@dataclass(frozen=True)
class Provenance:
    """Everything needed to make an object again."""

    prompt: str
    negative_prompt: str
    seed: int
    steps: int
    guidance: float
    model_name: str
    model_hash: str  # sha256 of the model's bundle.json
    program_version: str

    def as_metadata(self) -> dict:
        """As the generator's files carry it."""
        return asdict(self)


@dataclass(frozen=True)
class Generated:
    gaussians: Gaussians
    provenance: Provenance
    seconds: dict[str, float] = field(default_factory=dict)  # of each stage: "load", "sample"


def generate(request: Request, report: Report, cancel: threading.Event) -> list[Generated]:
    """Sample every object of a request; loads the model where it is not loaded yet.

    Raises:
        InputError: the request or the model is not usable.
        Cancelled: `cancel` was set.
    """
    started = time.perf_counter()
    info = service.describe(request.model)
    if not service.is_loaded(request.model):
        report("Loading the model")
    pipe = service.pipeline(request.model)
    load_seconds = time.perf_counter() - started
    results = []
    requests = request.each()
    for index, one in enumerate(requests):
        if cancel.is_set():
            raise Cancelled("generation was cancelled")
        stage = "Sampling" if len(requests) == 1 else f"Sampling {index + 1} of {len(requests)}"
        report(stage, 0, one.steps)
        started = time.perf_counter()
        out = pipe(
            one.prompt,
            negative_prompt=one.negative_prompt,
            seed=one.seed,
            num_inference_steps=one.steps,
            guidance_scale=one.guidance,
            num_samples_per_prompt=1,
            callback=lambda step, total, preview, stage=stage: report(stage, step, total, preview),
            cancel=cancel,
        )
        provenance = Provenance(
            prompt=one.prompt,
            negative_prompt=one.negative_prompt,
            seed=one.seed,
            steps=one.steps,
            guidance=one.guidance,
            model_name=info.name,
            model_hash=info.sha256,
            program_version=extension.version(),
        )
        seconds = {"load": load_seconds if index == 0 else 0.0, "sample": time.perf_counter() - started}
        results.append(Generated(out.gaussians[0], provenance, seconds))
    return results
