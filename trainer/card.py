"""The card of a data set: what is in a run's shards, how good it is, what failed and why, and whom to thank. From its records."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from generator.errors import InputError

from . import dataset
from .farm import RECORDS, read_records
from .markdown import table
from .sources import SourceObject, credit_lines, credits
from .views import RECORDS as VIEWS_RECORDS
from .views import SETTINGS
from .views import read_records as read_views

# Ma et al. 2025 (GaussianVerse): Gaussians of an object, mean and standard deviation over 205,737 objects.
PAPER_GAUSSIANS = (10_435, 4_453)
# Scores that are numbers, with the unit and digits they are shown with. A perceptual score brings its own name.
_SCORES = {"psnr": ("PSNR", "dB", 2), "psnr_foreground": ("PSNR on the object's pixels", "dB", 2), "ssim": ("SSIM", "", 4)}
_PERCEPTUAL = {"lpips": "LPIPS", "st_lpips": "ST-LPIPS"}
_STEPS = ("views", "fit", "atlas")
_BAR = 40  # characters of the longest bar of a histogram


@dataclass
class Entry:
    """What is known about one object."""

    id: str
    about: dict = field(default_factory=dict)  # name, creator, licence, library and scores, as far as the records have them
    seconds: dict[str, float] = field(default_factory=dict)  # by step
    failures: dict[str, str] = field(default_factory=dict)  # stage: reason, where its last word was a failure
    atlases: int = 0  # in the shards, repainted ones included
    left_out: bool = False  # the fit was not good enough

    @property
    def state(self) -> str:
        if self.atlases:
            return "in the shards"
        if self.failures:
            return "failed"
        return "left out: the fit is not good enough" if self.left_out else "not finished"


def card(run: Path) -> str:
    """The card of a run's folder, as Markdown.

    Raises:
        InputError: the folder knows of no object, or its shards are damaged.
    """
    entries, layouts = read_entries(run)
    held = [entry for entry in entries if entry.atlases]
    states = Counter(entry.state for entry in entries)
    rows = [("objects", f"{len(entries):,}"), *((state, f"{count:,}") for state, count in states.most_common())]
    if held:
        cells = " and ".join(f"{side} x {side} cells, `{layout}`" for layout, side in sorted(layouts.items()))
        size = sum(path.stat().st_size for path in (run / "shards").glob("atlases-*.tar"))
        rows += [("atlases, repainted ones included", f"{sum(e.atlases for e in held):,}"), ("layout", cells)]
        rows += [("size of the shards", f"{size / 1e6:,.1f} MB")]
    rows += [("views", text) for text in [_views(run / "views" / SETTINGS)] if text]
    parts = [
        f"# Data set card: {plain(run.name)}\n\nWritten by `python -m trainer card` from the records and shards of the run.",
        table(("what", "value"), rows),
        _gaussians(held or entries),
        _quality(held or entries, bool(held)),
        _seconds(entries),
        _failures(entries),
        _credits(held or entries),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def read_entries(run: Path) -> tuple[list[Entry], dict[str, int]]:
    """Every object that a run's views, records or shards name, by id; and the layouts of the shards with their cells a side.

    Raises:
        InputError: there is none, or the shards are damaged.
    """
    entries: dict[str, Entry] = {}

    def entry(identifier: object) -> Entry:
        return entries.setdefault(str(identifier), Entry(str(identifier)))

    for record in read_views(run / "views"):
        known = entry(record["id"])
        known.about |= {key: value for key, value in record.items() if key not in ("seconds", "status", "reason")}
        _add_seconds(known, {"views": record.get("seconds")})
        if record.get("status") == "failed":
            known.failures["views"] = str(record.get("reason") or "no reason recorded")
    layouts: dict[str, int] = {}
    if any((run / "shards").glob("atlases-*.tar")):
        for sample, layout in dataset.read_shards(run / "shards"):
            known = entry(sample.record.get("object") or sample.id)
            known.atlases += 1
            known.about |= sample.record
            layouts[layout] = sample.values.shape[-1]
    for record in read_records(run / RECORDS):
        known = entry(record["id"])
        stage = str(record.get("stage") or "work")
        # A later success wipes out an earlier failure of the same work by another command.
        if record.get("status") == "ok":
            for done in (*_STEPS, "farm") if stage == "farm" else (stage,):
                known.failures.pop(done, None)
        else:
            known.failures[stage] = str(record.get("reason") or "no reason recorded")
        _add_seconds(known, record.get("seconds"))
        scores = record.get("scores")
        if isinstance(scores, dict):
            known.about |= {key: value for key, value in scores.items() if value is not None}
            known.left_out = scores.get("kept", True) is False
    if not entries:
        raise InputError(
            f"{run}: no records of objects there ({RECORDS}, views/{VIEWS_RECORDS} or shards): run `python -m trainer farm` first"
        )
    return [entries[identifier] for identifier in sorted(entries)], layouts


def _add_seconds(entry: Entry, seconds: object) -> None:
    for step, value in seconds.items() if isinstance(seconds, dict) else ():
        # Views that were found finished have been recorded with 0 seconds.
        if (number := _number(value)) is not None and number > 0:
            entry.seconds[str(step)] = number


def plain(text: object, keep: str = "") -> str:
    """Text on one line that Markdown shows as it is; the characters in `keep` are left to whoever puts it in its place."""
    line = " ".join(str(text).split())
    return re.sub(r"[\\`*_{}\[\]<>#|~!&$]", lambda match: match[0] if match[0] in keep else "\\" + match[0], line)


def histogram(values: Sequence[float], digits: int = 0, bins: int = 12) -> str:
    """Lines of text: bounds, a bar and a count for each of at most `bins` equal ranges of round width.

    Raises:
        ValueError: no values.
    """
    low, high = min(values), max(values)
    # The smallest of 1, 2, 5 x 10^k that does not give more ranges than wanted.
    least = max((high - low) / bins, 10.0**-digits)
    power = 10.0 ** math.floor(math.log10(least))
    width = next(step * power for step in (1, 2, 5, 10, 20) if step * power >= least * (1 - 1e-9))
    first = math.floor(low / width + 1e-9)
    counts = Counter(math.floor(value / width + 1e-9) - first for value in values)
    rows = [(f"{(first + i) * width:,.{digits}f}", f"{(first + i + 1) * width:,.{digits}f}", counts[i]) for i in range(max(counts) + 1)]
    wide = max(len(text) for row in rows for text in row[:2])
    most = max(counts.values())
    lines = [f"{a:>{wide}} to {b:>{wide}} | {'#' * math.ceil(_BAR * count / most):{_BAR}} {count:,}" for a, b, count in rows]
    return "\n".join(lines)


def _number(value: object) -> float | None:
    """A finite number, else None: records are written by many hands."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        return None
    return float(value)


def _numbers(entries: Iterable[Entry], key: str) -> list[float]:
    found = (_number(entry.about.get(key)) for entry in entries)
    return [value for value in found if value is not None]


def _views(settings: Path) -> str:
    try:
        found = json.loads(settings.read_text(encoding="utf-8"))
        return "{train} to fit from and {held_out} to judge by, {size} pixels, {samples} paths a pixel".format(**found)
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _gaussians(entries: list[Entry]) -> str:
    counts = _numbers(entries, "gaussians")
    if not counts:
        return "## Gaussians per object\n\nNo record says how many."
    mean, spread = statistics.fmean(counts), statistics.pstdev(counts)
    paper = "{:,} ± {:,}".format(*PAPER_GAUSSIANS)
    text = f"{mean:,.0f} ± {spread:,.0f} over {len(counts):,} objects (mean and standard deviation); the paper's GaussianVerse: {paper}."
    return f"## Gaussians per object\n\n{text}\n\n```\n{histogram(counts)}\n```"


def _quality(entries: list[Entry], held: bool) -> str:
    columns = [(label, unit, digits, _numbers(entries, key)) for key, (label, unit, digits) in _SCORES.items()]
    names = {entry.about.get("perceptual_name") for entry in entries if _number(entry.about.get("perceptual")) is not None}
    for name in sorted(str(name or "perceptual distance") for name in names):
        own = [entry for entry in entries if str(entry.about.get("perceptual_name") or "perceptual distance") == name]
        columns.append((_PERCEPTUAL.get(name, plain(name)), "", 4, _numbers(own, "perceptual")))
    columns += [(label, "", 4, _numbers(entries, key)) for key, label in _PERCEPTUAL.items()]
    columns = [column for column in columns if column[3]]
    if not columns:
        return "## Quality\n\nNo object has a score on held-out views: imported fits have none."
    head = ("measure", "objects", "mean ± deviation", "lowest", "median", "highest")
    rows = []
    for label, unit, digits, values in columns:
        numbers = [min(values), statistics.median(values), max(values)]
        spread = f"{statistics.fmean(values):.{digits}f} ± {statistics.pstdev(values):.{digits}f} {unit}".strip()
        rows.append((label, f"{len(values):,}", spread, *(f"{number:.{digits}f}" for number in numbers)))
    pictures = [f"{label}:\n\n```\n{histogram(values, digits=0 if unit else 2)}\n```" for label, unit, _, values in columns]
    whose = "of the objects in the shards" if held else "of all objects, for none is in the shards"
    return "\n\n".join([f"## Quality\n\nOn held-out views, {whose}.", table(head, rows), *pictures])


def _seconds(entries: list[Entry]) -> str:
    steps = list(dict.fromkeys([*_STEPS, *sorted({step for entry in entries for step in entry.seconds})]))
    rows = []
    for step in steps:
        values = [entry.seconds[step] for entry in entries if step in entry.seconds]
        if values:
            total = f"{sum(values) / 3600:,.2f} h"
            rows.append((plain(step), f"{len(values):,}", f"{statistics.fmean(values):.2f} s", f"{max(values):.2f} s", total))
    return "## Time\n\n" + table(("step", "objects", "mean", "longest", "in all"), rows) if rows else ""


def _failures(entries: list[Entry]) -> str:
    failed = [entry for entry in entries if entry.state == "failed"]
    if not failed:
        return "## Failures\n\nNone."
    lines = [f"* {plain(e.id)}, {plain(stage)}: {plain(reason)}" for e in failed for stage, reason in e.failures.items()]
    return f"## Failures\n\n{len(failed):,} of {len(entries):,} objects.\n\n" + "\n".join(lines)


def _credits(entries: list[Entry]) -> str:
    known, listed = [], []
    for entry in entries:
        text = {key: str(entry.about.get(key) or "") for key in ("name", "creator", "licence", "library")}
        # The table of libraries escapes its own column marks.
        known.append(_named(entry.id, {key: plain(value, keep="|") for key, value in text.items()}))
        missing = {"name": "no name", "creator": "maker not named", "licence": "unknown licence", "library": "unknown library"}
        shown = {key: plain(value) or missing[key] for key, value in text.items()}
        listed.append(_named(plain(entry.id), shown))
    return "## Licences\n\n" + credits(known) + "\n## Objects\n\n" + "\n".join(credit_lines(listed))


def _named(identifier: str, words: dict[str, str]) -> SourceObject:
    return SourceObject(identifier, words["name"], Path(), creator=words["creator"], licence=words["licence"], library=words["library"])
