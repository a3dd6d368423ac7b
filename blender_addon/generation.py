"""From a request to Gaussians with their provenance: what the operator and the batch share. Knows nothing of Blender."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..generator.errors import Cancelled, InputError
from ..generator.version import program_version
from . import edits, service
from .job import Report

if TYPE_CHECKING:
    from ..generator.gaussians import Gaussians

SEED_MAX = 2**31 - 1  # Blender's integer properties are 32 bits wide
STEPS_MAX = 1000  # as the pipeline takes
# An object that is being made is decoded at most this often, and for at most this share of the time.
PREVIEW_SECONDS = 0.3
PREVIEW_SHARE = 0.15


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
    steps: int = 20  # solver steps, 1 .. STEPS_MAX
    guidance: float = 2.0  # classifier-free guidance, at least 0; 1 is without
    count: int = 1
    device: str = "auto"  # "auto", "cpu" or "cuda"
    mix_prompt: str = ""  # a second prompt to mix in
    mix_weight: float = 0.5  # of the second prompt, 0..1
    edit: edits.Edit | None = None  # start from an object instead of noise alone

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise InputError('the prompt is empty: describe an object, for example "a red armchair"')
        if not 0 <= self.seed <= SEED_MAX:
            raise InputError(f"seed must be between 0 and {SEED_MAX}, got {self.seed}")
        if not 1 <= self.steps <= STEPS_MAX:
            raise InputError(f"steps must be between 1 and {STEPS_MAX}, got {self.steps}")
        if not 0 <= self.guidance < float("inf"):
            raise InputError(f"guidance must be a number of at least 0, got {self.guidance}")
        if self.count < 1:
            raise InputError(f"count must be at least 1, got {self.count}")
        if not 0 <= self.mix_weight <= 1:
            raise InputError(f"mix_weight must be between 0 and 1, got {self.mix_weight}")

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
    mix_prompt: str = ""
    mix_weight: float = 0.5
    layout_id: str = ""  # of the atlas that the object's cells belong to; empty where they are not known
    low_pass: float = 0.0  # standard deviation that its Gaussians were widened by, object units
    edit: str = ""  # the edit that made it, as JSON (edits.Edit)

    def as_metadata(self) -> dict:
        """As the generator's files carry it."""
        return asdict(self)


@dataclass(frozen=True)
class Generated:
    gaussians: Gaussians
    provenance: Provenance
    seconds: dict[str, float] = field(default_factory=dict)  # of each stage: "load", "sample"
    notes: tuple[str, ...] = ()  # what a person should know, a line each


@dataclass(frozen=True)
class Preview:
    """An object as it looks so far, as coloured dots: what the overlay draws."""

    index: int  # which object of the run
    positions: np.ndarray  # [N, 3] float32, object frame
    colors: np.ndarray  # [N, 4] float32, display sRGB and opacity, 0..1
    radii: np.ndarray  # [N] float32, one standard deviation: the geometric mean of the three axes
    result: Generated | None = None  # set once the object is done

    @classmethod
    def of(cls, gaussians: Gaussians, index: int = 0, result: Generated | None = None) -> Preview:
        host = gaussians.to("cpu")
        finite = host.finite().numpy()
        colors = np.concatenate([host.colors.numpy(), host.opacities.numpy()[:, None]], axis=1).clip(0, 1)
        radii = np.exp(np.log(np.maximum(host.scales.numpy(), 1e-6)).mean(axis=1))
        arrays = (host.means.numpy(), colors, radii)
        positions, colors, radii = (np.ascontiguousarray(values[finite], np.float32) for values in arrays)
        return cls(index, positions, colors, radii, result)


class Watcher:
    """A pipeline's callback: every step becomes progress, and where `look` is set now and then a `Preview`.

    Decoding happens here, in the thread that samples, so that the window pays nothing for it.
    """

    def __init__(self, report: Report, stage: str, index: int = 0, look: bool = False) -> None:
        self._report, self._stage, self._index, self._look = report, stage, index, look
        self._next = 0.0

    def __call__(self, step: int, total: int, decode: Callable[[], list[Gaussians]]) -> None:
        preview = None
        now = time.monotonic()
        if self._look and now >= self._next and step < total:
            so_far = decode()
            preview = Preview.of(so_far[0], self._index) if so_far else None
            cost = time.monotonic() - now
            self._next = now + max(PREVIEW_SECONDS, cost / PREVIEW_SHARE)
        self._report(self._stage, step, total, preview)


def generate(request: Request, report: Report, cancel: threading.Event, look: bool = False) -> list[Generated]:
    """Sample every object of a request; loads the model where it is not loaded yet.

    Args:
        look: report the objects as they come to be, and each that is done with its result, as `Preview`.

    Raises:
        InputError: the request or the model is not usable.
        Cancelled: `cancel` was set.
    """
    started = time.perf_counter()
    info = service.describe(request.model)
    if not service.is_loaded(request.model, request.device):
        if not service.libraries_loaded():
            report("Starting torch")
            service.load_libraries()
        report("Loading the model")
    pipe = service.pipeline(request.model, request.device)
    load_seconds = time.perf_counter() - started
    results = []
    requests = request.each()
    extra = {"mix_prompt": request.mix_prompt, "mix_weight": request.mix_weight} if request.mix_prompt.strip() else {}
    if request.edit:

        def again(source: dict) -> Gaussians:
            return generate(_request_of(source, request), report, cancel)[0].gaussians

        extra |= request.edit.arguments(pipe, again)
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
            callback=Watcher(report, stage, index, look),
            cancel=cancel,
            **extra,
        )
        provenance = Provenance(
            prompt=one.prompt,
            negative_prompt=one.negative_prompt,
            seed=one.seed,
            steps=one.steps,
            guidance=one.guidance,
            model_name=info.name,
            model_hash=info.sha256,
            program_version=program_version(),
            mix_prompt=one.mix_prompt,
            mix_weight=one.mix_weight,
            layout_id=pipe.layout.id,
            low_pass=pipe.low_pass,
            edit=one.edit.to_json() if one.edit else "",
        )
        seconds = {"load": load_seconds if index == 0 else 0.0, "sample": time.perf_counter() - started}
        results.append(Generated(out.gaussians[0], provenance, seconds, tuple(out.notes)))
        if look:
            report(stage, one.steps, one.steps, Preview.of(out.gaussians[0], index, results[-1]))
    return results


def _request_of(source: dict, edited: Request) -> Request:
    """The request that makes the object of a provenance again, with the model and device of the request that edits it.

    Raises:
        InputError: the provenance is not complete.
    """
    try:
        return Request(
            prompt=str(source["prompt"]),
            model=edited.model,
            device=edited.device,
            negative_prompt=str(source["negative_prompt"]),
            seed=int(source["seed"]),
            steps=int(source["steps"]),
            guidance=float(source["guidance"]),
            mix_prompt=str(source.get("mix_prompt", "")),
            mix_weight=float(source.get("mix_weight", 0.5)),
            edit=edits.Edit.from_json(source["edit"]) if source.get("edit") else None,
        )
    except InputError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"the record of the object that was edited is not complete ({type(error).__name__})") from error
