"""A report of an evaluation as one page of HTML that needs no other file."""

from __future__ import annotations

import base64
import html
import io
from dataclasses import dataclass

import torch
from torch import Tensor

from .judge import Looks
from .prompts import Prompt

# Table 1 of the paper: CLIP score, VQA score, thousands of Gaussians. Its CLIP variant and prompts are not published.
PAPER = {
    "DreamGaussian": (20.52, 0.37, 40),
    "LGM": (20.28, 0.35, 66),
    "TriplaneGaussian": (21.10, 0.46, 16),
    "GaussianCube": (22.31, 0.52, 33),
    "Gaussian Atlas": (23.20, 0.61, 16),
}
TILE = 96  # pixels of a picture on the page
_SHOWN = 2  # objects of each prompt on the page, from two sides each


@dataclass(frozen=True)
class Shown:
    """One object that was drawn."""

    prompt: Prompt
    looks: Looks  # without the axis of objects
    tiles: list[Tensor]  # two pictures [3, TILE, TILE], from opposite sides
    row: dict


_NAMES = {
    "made": "what is evaluated",
    "fits": "ceiling: fits of real objects, painted as asked",
    "retrieval": "baseline: the training object whose caption is nearest",
}
_COLUMNS = {
    "prompts": "prompts",
    "score": "judge",
    "score_interval": "&plusmn;",
    "shuffled": "shuffled captions",
    "r_precision": "R-precision",
    "colour_accuracy": "colour",
    "category_accuracy": "category",
    "clip": "CLIP",
    "kernel_distance": "kernel distance",
    "diversity": "diversity",
}
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #222; background: #fff }
table { border-collapse: collapse; margin: 0.5rem 0 1.5rem }
th, td { padding: 0.25rem 0.7rem; text-align: right; border-bottom: 1px solid #ddd }
th:first-child, td:first-child { text-align: left }
.rows { display: grid; grid-template-columns: repeat(auto-fill, minmax(32rem, 1fr)); gap: 0.8rem }
figure { margin: 0 } figcaption { font-size: 13px } .failed { color: #b00 } p { max-width: 50rem }
"""


def page(report: dict, sets: dict[str, list[Shown]]) -> str:
    """The report as a page of HTML that needs no other file."""
    method, protocol = report["method"], report["protocol"]
    parts = [
        f"<h1>{html.escape(method['name'])}</h1>",
        f"<p>{len(report['objects'])} objects of {report['prompts']} prompts, each from {protocol['views']} random sides at "
        f"{protocol['size']} pixels. "
        + html.escape(", ".join(f"{key} {value}" for key, value in method.items() if key != "name"))
        + "</p>",
    ]
    for kind in report["scores"]["made"]:
        parts += [f"<h2>{'All prompts' if kind == 'all' else f'Prompts of the kind {html.escape(repr(kind))}'}</h2>", _table(report, kind)]
    parts += [f"<p>{text}</p>" for text in _explanations(report)]
    parts.append("<h2>Failed samples</h2>")
    reasons = ", ".join(f"{html.escape(reason)} {count}" for reason, count in report["failures"].items()) or "none"
    parts.append(f"<p>{report['failed_share']:.1%} of {len(report['objects'])}: {reasons}.</p>")
    parts += ["<h2>The paper&rsquo;s own rows</h2>", _paper(report)]
    parts += ["<h2>Pictures</h2>", _gallery(report, sets)]
    head = f'<meta charset="utf-8"><title>{html.escape(method["name"])}: evaluation</title><style>{_STYLE}</style>'
    return f"<!doctype html><html lang=en><head>{head}</head><body>\n" + "\n".join(parts) + "\n</body></html>\n"


def _table(report: dict, kind: str) -> str:
    found = {name: kinds[kind] for name, kinds in report["scores"].items() if kind in kinds}
    columns = {key: title for key, title in _COLUMNS.items() if any(row.get(key) is not None for row in found.values())}
    head = "<tr><th></th>" + "".join(f"<th>{title}</th>" for title in columns.values()) + "</tr>"
    lines = []
    for name, row in found.items():
        lines.append(f"<tr><td>{_NAMES[name]}</td>" + "".join(f"<td>{number(row.get(key))}</td>" for key in columns) + "</tr>")
    return f"<table>{head}{''.join(lines)}</table>"


def _explanations(report: dict) -> list[str]:
    """What the numbers are."""
    unseen = {key: number(value) for key, value in report["judge"].get("unseen", {}).items()}
    found = [
        f"<b>Judge</b>: {html.escape(report['judge']['name'])}, the cosine of an object and its prompt, &plusmn; half of the "
        "95&nbsp;% interval over prompts. It is no CLIP score and cannot be compared with one.",
        "<b>R-precision</b>: share whose own prompt comes before 99 other captions. <b>Colour</b>: of the prompts that name one, "
        "the share in which it covers most pixels. <b>Category</b>: share in which the prompt&rsquo;s noun is the likeliest of all "
        "that the judge knows. <b>Diversity</b>: mean cosine distance, over EfficientNet&rsquo;s features, of the objects of one "
        "prompt. <b>Kernel distance</b>: KID&rsquo;s estimator on these features against the training objects, lower is nearer.",
    ]
    if unseen:
        found.insert(
            1,
            f"On fits of {report['judge']['objects']} real objects and repainted copies, each judged by a head that has not seen it, the "
            f"judge gives {unseen['score']} (shuffled {unseen['shuffled']}), R-precision {unseen['r_precision']}, colour "
            f"{unseen['colour_accuracy']}, category {unseen['category_accuracy']}.",
        )
    if report["distances"]:
        apart = report["distances"]
        distances = torch.tensor([row["distance"] for row in report["objects"]])
        found.append(
            f"<b>Copies</b>: the nearest of {report['training_objects']} training objects is {distances.median():.3f} away (median; "
            f"two training objects {number(apart['between_objects'], 3)}, one object from other sides {apart['same_object']:.3f}). "
            f"{report['copies']} of {len(distances)} are nearer than {apart['copy']:.3f}, as near as an object is to itself."
        )
        seen = report["training_captions"]
        found.append(
            f"{len(seen)} of the prompts are captions of these objects" + (f": {html.escape(', '.join(seen[:20]))}." if seen else ".")
        )
    if report["missing"]:
        found.append(f"{len(report['missing'])} prompts have no file: {html.escape(', '.join(report['missing'][:20]))}.")
    if report["clip"]:
        found.append(f"<b>CLIP</b>: 100 times the cosine, by {html.escape(report['clip'])}.")
    return found


def _paper(report: dict) -> str:
    rows = "".join(
        f"<tr><td>{name}</td><td>{row['clip']:.2f}</td><td>{row['vqa']:.2f}</td><td>{row['thousand_gaussians']}K</td></tr>"
        for name, row in report["paper"].items()
    )
    own = report["scores"]["made"]["all"].get("clip")
    counts = [row["gaussians"] for row in report["objects"] if row["gaussians"]]
    count = f"{sum(counts) / len(counts) / 1000:.0f}K" if counts else "mesh"
    name = f"<b>{html.escape(report['method']['name'])}, measured here</b>"
    rows += f"<tr><td>{name}</td><td>{number(own)}</td><td>&ndash;</td><td>{count}</td></tr>"
    return (
        "<p>Printed from the paper, measured by its authors on their prompts; which CLIP and VQA models they used is not published. "
        "VQA is not measured here: no model that gives it comes with any package.</p>"
        f"<table><tr><th></th><th>CLIP</th><th>VQA</th><th>Gaussians</th></tr>{rows}</table>"
    )


def _gallery(report: dict, sets: dict[str, list[Shown]]) -> str:
    """For each prompt some objects from two sides, then the ceiling and the baseline."""
    tiles: dict[str, list[Tensor]] = {}
    for one in sets["made"]:
        several = tiles.setdefault(one.prompt.text, [])
        if len(several) < 2 * _SHOWN:
            several += one.tiles
    others = {name: {one.prompt.text: one for one in several} for name, several in sets.items() if name != "made"}
    blank = torch.ones(3, TILE, TILE)
    rows: dict[str, list[dict]] = {}
    for row in report["objects"]:
        rows.setdefault(row["prompt"], []).append(row)
    figures = []
    for text, several in tiles.items():
        strip = [*several, *([blank[..., :8]] if others else [])]
        strip += [found[text].tiles[0] if text in found else blank for found in others.values()]
        scores = ", ".join(
            f"{row['score']:.2f}" + (f' <span class="failed">{row["failed"]}</span>' if row["failed"] else "") for row in rows[text]
        )
        figures.append(
            f'<figure><img alt="" src="{jpeg(torch.cat(strip, dim=2))}"><figcaption>{html.escape(text)}: {scores}</figcaption></figure>'
        )
    note = f"Up to {_SHOWN} objects, each from two sides" + (", then the ceiling and the baseline" if others else "")
    return f"<p>{note}; below, the judge&rsquo;s scores. Every prompt is shown.</p><div class=rows>{''.join(figures)}</div>"


def jpeg(picture: Tensor) -> str:
    """A picture [3, H, W] as a data URL."""
    from PIL import Image

    stream = io.BytesIO()
    pixels = (picture.clamp(0, 1).permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    Image.fromarray(pixels).save(stream, format="JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


def number(value: float | int | None, digits: int = 2) -> str:
    """For a table of HTML."""
    if value is None:
        return "&ndash;"
    return str(value) if isinstance(value, int) else f"{value:.{digits}f}"
