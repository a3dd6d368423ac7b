"""One protocol for every method, and one report: numbers as JSON, numbers and pictures as a page of HTML."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from generator.errors import InputError
from generator.files import make_folder, replacing
from generator.model.pipeline import GaussianAtlasPipeline

from .clip import Clip
from .failures import failure
from .judge import NAME, SIZE, Judge, describe, diversity, kernel_distance, protocol_cameras, stack, summary
from .made import Made, made_by_bundle, made_by_files
from .page import PAPER, TILE, Shown, page
from .prompts import Prompt
from .references import References


@dataclass(frozen=True)
class Protocol:
    """How everything is drawn and counted."""

    views: int = 10  # random sides of each object, as in the paper
    size: int = SIZE  # pixels, image side; the judge was trained on 128
    seeds: int = 2  # objects of each prompt, where a bundle makes them
    steps: int | None = None  # sampling steps; by default the bundle's

    def __post_init__(self) -> None:
        for name, least in (("views", 2), ("size", 32), ("seeds", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, got {getattr(self, name)}")


def evaluate(
    source: str | Path,
    output: str | Path,
    prompts: Sequence[Prompt] | None,
    shards: str | Path | None = None,
    protocol: Protocol | None = None,
    clip: str = "",
    up: str | None = None,
    judge: Judge | None = None,
) -> dict:
    """Score a bundle, or a folder of files named by prompt, and write `report.json` and `report.html` into `output`.

    Args:
        prompts: None takes the names of the files, for a folder.
        shards: training objects. They give the ceiling, the baseline, the kernel distance, the check for copies, and which prompts are
            training captions.
        clip: folder or hub id of a CLIP model; empty leaves CLIP out.
        up: axes of a folder's splats, see `made_by_files`.
        judge: by default the one that comes with this package.

    Returns:
        What `report.json` holds.

    Raises:
        InputError: there is nothing to score, something cannot be read, or the output cannot be written.
        WorkError: a package is missing.
    """
    output = make_folder(output)
    protocol = protocol or Protocol()
    scorer = Clip(clip) if clip else None
    judge = judge or Judge.default()
    made, method, missing = open_source(source, prompts, protocol, up)
    references = References(shards, judge.encoder, protocol.views, protocol.size) if shards else None
    shown = [_show(thing, index, protocol, scorer) for index, thing in enumerate(made)]
    distinct = list(dict.fromkeys(one.prompt for one in shown))
    nearest, distances = None, None
    if references:
        # What looks like an object is judged by the head that does not remember that object, as the object itself is.
        nearest, apart = references.nearest(stack([one.looks for one in shown]))
        distances = references.distances()
        for one, identifier, distance in zip(shown, nearest, apart.tolist(), strict=True):
            one.row.update(nearest=identifier, distance=round(distance, 4), copy=distance < distances["copy"])
    sets = {"made": _judged(judge, shown, nearest)}
    if references:
        for name, chosen in (("fits", [references.fit(prompt) for prompt in distinct]), ("retrieval", references.retrieve(distinct))):
            pairs = [(prompt, reference) for prompt, reference in zip(distinct, chosen, strict=True) if reference]
            several = [_show(Made(prompt, 0, found.gaussians), i, protocol, scorer) for i, (prompt, found) in enumerate(pairs)]
            for one, (_, found) in zip(several, pairs, strict=True):
                one.row.update(object=found.object, caption=found.caption)
            sets[name] = _judged(judge, several, [found.object for _, found in pairs])
    rows = [one.row for one in shown]
    failures = Counter(row["failed"] for row in rows if row["failed"])
    scores = {name: _by_kind(several) for name, several in sets.items()}
    looks = {name: stack([one.looks for one in several]) for name, several in sets.items()}
    for name, several in sets.items():
        scores[name]["all"]["diversity"] = diversity(looks[name], [one.prompt.text for one in several])
        scores[name]["all"]["kernel_distance"] = round(kernel_distance(looks[name], references.looks), 4) if references else None
    report = {
        "method": method,
        "protocol": asdict(protocol),
        "judge": {"name": NAME, **judge.record},
        "clip": scorer.name if scorer else None,
        "prompts": len(distinct),
        "missing": missing,
        "training_captions": [prompt.text for prompt in distinct if prompt.text in references.captions] if references else None,
        "training_objects": len(references.originals) if references else None,
        "scores": scores,
        "failures": dict(failures),
        "failed_share": round(failures.total() / len(rows), 4),
        "distances": distances,
        "copies": sum(row["copy"] for row in rows) if references else None,
        "paper": {name: dict(zip(("clip", "vqa", "thousand_gaussians"), values, strict=True)) for name, values in PAPER.items()},
        "objects": rows,
        "references": {name: [one.row for one in several] for name, several in sets.items() if name != "made"},
    }
    for name, text in (("report.json", json.dumps(report, indent=1) + "\n"), ("report.html", page(report, sets))):
        with replacing(output / name) as partial:
            partial.write_text(text, encoding="utf-8")
    return report


def summary_line(report: dict) -> str:
    """The report in one line."""
    scores = {name: kinds["all"] for name, kinds in report["scores"].items()}
    made = scores["made"]
    shuffled = "one prompt alone" if made["shuffled"] is None else f"shuffled {made['shuffled']:.2f}"
    beside = "".join(f", {name} {scores[name]['score']:.2f}" for name in ("fits", "retrieval") if name in scores)
    return (
        f"{len(report['objects'])} objects of {report['prompts']} prompts, {report['failed_share']:.1%} failed; offline judge "
        f"{made['score']:.2f} ({shuffled}{beside}), R-precision {made['r_precision']:.0%}"
    )


def open_source(
    source: str | Path, prompts: Sequence[Prompt] | None, protocol: Protocol, up: str | None = None
) -> tuple[Iterable[Made], dict, list[str]]:
    """The objects of a bundle or folder, what made them, and the prompts for which there is none.

    Raises:
        InputError: there is nothing, or it cannot be read.
    """
    folder = Path(source)
    if folder.is_dir() and not (folder / "bundle.json").is_file():
        found, missing = made_by_files(folder, prompts, up)
        kind = sorted({(one.mesh or Path("splats")).suffix or "splats" for one in found})
        return found, {"name": folder.resolve().name, "kind": "files: " + ", ".join(kind)}, missing
    pipeline = GaussianAtlasPipeline.from_pretrained(source, allow_download=not folder.exists())
    if prompts is None:
        raise InputError("a bundle needs prompts")
    defaults = pipeline.info.get("defaults", {})
    steps = protocol.steps or defaults.get("num_inference_steps", 20)
    method = {
        "name": pipeline.name,
        "kind": "bundle",
        "hash": pipeline.model_hash,
        "steps": steps,
        "guidance_scale": defaults.get("guidance_scale", 3.5),
    }
    return made_by_bundle(pipeline, prompts, protocol.seeds, steps), method, []


def _show(thing: Made, index: int, protocol: Protocol, scorer: Clip | None) -> Shown:
    rgb, alpha = thing.pictures(protocol_cameras(protocol.views, protocol.size, index))
    # A fourth part of a turn apart, roughly: the first two of many views are neighbours.
    tiles = [_small(rgb[view]) for view in (0, max(1, protocol.views // 4))]
    covered = (alpha >= 0.5).float().mean((1, 2))
    row = {
        "prompt": thing.prompt.text,
        "kind": thing.prompt.kind,
        "seed": thing.seed,
        "gaussians": None if thing.gaussians is None else len(thing.gaussians),
        "failed": failure(thing.gaussians, covered),
        "covered": round(covered.max().item(), 4),
    }
    if scorer:
        row["clip"] = round(scorer.score(rgb, thing.prompt.text), 2)
    return Shown(thing.prompt, describe(rgb, alpha), tiles, row)


def _judged(judge: Judge, shown: list[Shown], objects: Sequence[str] | None) -> list[Shown]:
    """The same, each row with what the judge says."""
    found = judge.rows(stack([one.looks for one in shown]), [one.prompt.text for one in shown], objects)
    for one, row in zip(shown, found, strict=True):
        row.pop("caption")
        one.row.update(row)
    return shown


def _by_kind(shown: Sequence[Shown]) -> dict[str, dict]:
    """Averages over all prompts and over those of each kind."""
    kinds = {"all": [one.row for one in shown]}
    for one in shown:
        kinds.setdefault(one.prompt.kind, []).append(one.row)
    found = {}
    for kind, rows in kinds.items():
        found[kind] = {"prompts": len({row["prompt"] for row in rows}), **summary([row | {"caption": row["prompt"]} for row in rows])}
        if "clip" in rows[0]:
            found[kind]["clip"] = round(sum(row["clip"] for row in rows) / len(rows), 2)
    return found


def _small(picture: Tensor) -> Tensor:
    return torch.nn.functional.interpolate(picture[None], size=(TILE, TILE), mode="area")[0]
