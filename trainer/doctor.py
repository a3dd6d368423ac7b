"""Is an atlas fit to be trained on? What transport, layout, channels and storage made of an object, in figures and one picture.

Sphere and plane indices can be composed in many ways that all read back perfectly and only one of which keeps
neighbours together; so the verdict comes from the stored cells alone, beside a fresh transport of the same Gaussians.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from scipy.spatial import cKDTree
from torch import Tensor
from tqdm import tqdm

from generator.atlas import Atlas, AtlasLayout, ChannelSpec, from_atlas, pack
from generator.atlas.layout import PROJECTIONS, default_path
from generator.errors import InputError
from generator.files import replacing
from generator.formats import SUFFIXES, load
from generator.gaussians import Gaussians
from generator.render import Cameras, render
from generator.render.cameras import RADIUS
from generator.render.ewa import ALPHA_CUT

from .atlas import arrange, filling_order, resize, to_atlas
from .dataset import read_shards
from .fit.scores import held_out_psnr, psnr
from .sources.gaussian_verse import STRAY
from .views import Views, views_path

NEAREST = 8  # touching cells should be among each other's so many nearest in space
# A wrong composition keeps at most 0.56 of the locality of a right one and 0.59 of its saving (real fits at 32, 64 and 128 cells a
# side); a right one keeps all of both.
_LEAST_LOCALITY = 0.8
_LEAST_SAVING = 0.9
_MOST_DEAD = 0.1  # share of transparent or duplicate cells that a model may learn from
_CLIPPED = 0.02  # raw units by which reading may change a stored value; float16 stays below
_ALIKE = 2e-3  # object units, display values: Gaussians nearer than this in everything are one and the same in float16
_PICTURED = 8  # objects in one picture, and in full on the terminal; of more there is a summary


# --- locality and neighbours ------------------------------------------------------------------------------------------


def neighbour_steps(means: Tensor, size: int) -> float:
    """Mean distance in space between cells that touch on the image; `means` [size^2, 3] are in the order of the cells."""
    image = means.reshape(size, size, 3)
    across, down = image[:, 1:] - image[:, :-1], image[1:] - image[:-1]
    return float(torch.cat([across.norm(dim=2).flatten(), down.norm(dim=2).flatten()]).mean())


def locality(means: Tensor, size: int, seed: int = 0) -> float:
    """How much of a shuffled atlas' step between touching cells is saved: 0 for noise, towards 1 for a smooth image."""
    shuffled = neighbour_steps(means[_shuffle(len(means), seed)], size)
    return 1 - neighbour_steps(means, size) / shuffled if shuffled > 0 else 0.0


@dataclass(frozen=True)
class Neighbours:
    """Shares of pairs of touching cells whose Gaussians are among each other's `NEAREST` nearest in space."""

    everywhere: float  # all pairs that touch on the image
    interior: float  # without the pole rows
    poles: float  # pairs with a cell in the top or the bottom row
    seam: float  # pairs of the first and the last column of a row, which touch on the sphere only


def neighbour_preservation(means: Tensor, size: int) -> Neighbours:
    """Of cells that touch, how many are also nearest neighbours in space; `means` [size^2, 3] in the order of the cells."""
    nearest = min(NEAREST, len(means) - 1)
    tree = cKDTree(means.detach().cpu().numpy())
    near = tree.query(tree.data, k=range(2, nearest + 2))[1]
    cells = np.arange(size * size).reshape(size, size)
    touching = [np.stack([cells[:, :-1], cells[:, 1:]], -1), np.stack([cells[:-1], cells[1:]], -1)]
    pairs = np.concatenate([part.reshape(-1, 2) for part in touching])
    seam = np.stack([cells[:, -1], cells[:, 0]], -1)
    polar = (np.isin(pairs // size, (0, size - 1))).any(1)

    def share(chosen: np.ndarray) -> float:
        return float((near[chosen[:, 0]] == chosen[:, 1:]).any(1).mean()) if len(chosen) else 0.0

    return Neighbours(share(pairs), share(pairs[~polar]), share(pairs[polar]), share(seam))


# --- transport --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Transport:
    """What the order of the cells costs, beside what no order can beat."""

    cost: float  # mean squared distance between the centres and the cells' sphere points
    lower_bound: float  # certified by a fresh transport: no order costs less
    gap: float  # (cost - lower_bound) / cost
    saving: float  # share of what the best order saves over a random one: 1 for the best, 0 for a random order


def transport_of_cells(means: Tensor, layout: AtlasLayout, count: int | None = None) -> tuple[Transport, Tensor]:
    """What the stored order [N, 3] of `count` Gaussians (by default N) costs, and the cell of each cell's Gaussian in a fresh one [N]."""
    filled = filling_order(layout.size)[:count].sort().values
    points, sphere = means[filled].detach().cpu().double(), layout.cell_sphere[filled].double()
    cost = float((points - sphere).square().sum(1).mean())
    random = float(points.square().sum(1).mean() + sphere.square().sum(1).mean() - 2 * points.mean(0) @ sphere.mean(0))
    # The result of transport may depend on the input's order a little; an order that is right already must gain nothing by that.
    shuffle = _shuffle(len(points))
    fresh = arrange(points[shuffle], layout)
    bound = min(fresh.assignment.lower_bound, cost)
    saving = (random - cost) / (random - bound) if random > bound else 1.0
    return Transport(cost, bound, (cost - bound) / cost if cost > 0 else 0.0, saving), filled[shuffle[fresh.source]]


# --- channels and cells -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Channel:
    """One channel's values, raw, over all cells."""

    name: str
    minimum: float
    mean: float
    maximum: float
    std: float
    skewness: float  # 0 where the values are constant
    at_ends: float  # share of cells that share exactly the lowest or the highest value: where a clamp holds them
    roughness: float  # total variation of the standardised channel over that of the same cells shuffled: 0 smooth, 1 noise


def channel_statistics(atlas: Atlas) -> list[Channel]:
    """Statistics of an atlas' raw values; values that are not finite are left out."""
    order = _shuffle(atlas.values[0].numel())
    return [_channel(name, channel.double(), order) for name, channel in zip(atlas.spec.names, atlas.values, strict=True)]


def _channel(name: str, image: Tensor, order: Tensor) -> Channel:
    finite = image[torch.isfinite(image)]
    if not len(finite):
        return Channel(name, *([0.0] * 7))
    low, high, mean, std = finite.min(), finite.max(), finite.mean(), finite.std(correction=0)
    # A deviation of rounding errors is none.
    constant = bool(std <= 1e-6 * max(1.0, float(mean.abs())))
    standard = torch.nan_to_num((image - mean) / (1.0 if constant else std), 0.0, 0.0, 0.0)
    skewness = 0.0 if constant else float(((finite - mean) / std).pow(3).mean())
    held = [int((finite == end).sum()) for end in ((low,) if constant else (low, high))]
    shuffled = _variation(standard.flatten()[order].reshape(image.shape))
    rough = 0.0 if constant else float(_variation(standard) / shuffled)
    ends = sum(count for count in held if count > 1) / len(finite)
    return Channel(name, float(low), float(mean), float(high), float(std), skewness, ends, rough)


def _variation(image: Tensor) -> Tensor:
    """Mean absolute difference of touching cells."""
    return torch.cat([(image[:, 1:] - image[:, :-1]).flatten(), (image[1:] - image[:-1]).flatten()]).abs().mean()


@dataclass(frozen=True)
class Cells:
    """Numbers of cells that show nothing, or nothing of their own, or lie where no object is."""

    empty: int  # left transparent because the object has fewer Gaussians than there are cells: the last in `filling_order`
    transparent: int  # opacity below 1/255, beside these
    points: int  # all three scales at the smallest that is stored
    stray: int  # beyond `STRAY` object lengths from the centre, in any coordinate
    duplicates: int  # as another cell in everything, within float16
    clipped: int  # hold a value outside its channel's range, or copies of the opacity that differ
    not_finite: int  # hold NaN or infinity


def filled_count(cells: Gaussians) -> int:
    """How many Gaussians an atlas was made of, given those of its cells [N]: the cells after the last visible one are empty."""
    visible = cells.opacities[filling_order(math.isqrt(len(cells)))] >= ALPHA_CUT
    return int(visible.nonzero().amax()) + 1 if visible.any() else len(cells)


def cell_defects(atlas: Atlas, layout: AtlasLayout) -> Cells:
    """Count the cells of an atlas that a model should not learn from."""
    gaussians = from_atlas(atlas, layout)
    finite = torch.isfinite(atlas.values).all(0).flatten()
    stored = torch.nan_to_num(atlas.values, 0.0, 0.0, 0.0)
    invisible = gaussians.opacities < ALPHA_CUT
    filled = filling_order(layout.size)[: filled_count(gaussians)]
    # Offsets differ between equal Gaussians, everything else is stored alike.
    contents = torch.cat([gaussians.means, stored[3:].flatten(1).T], dim=1)[filled].numpy()
    twin = cKDTree(contents).query(contents, k=[2], p=np.inf, distance_upper_bound=_ALIKE)[0][:, 0]
    change = (_unique(stored, atlas.spec) - _unique(pack(gaussians, layout, atlas.spec).values, atlas.spec)).abs()
    return Cells(
        empty=layout.count - len(filled),
        transparent=int(invisible[filled].sum()),
        points=int((gaussians.scales.amax(1) <= atlas.spec.min_scale * 1.05).sum()),
        stray=int((gaussians.means.abs() > STRAY).any(1).sum()),
        duplicates=int(np.isfinite(twin).sum()),
        clipped=int(((change.amax(0).flatten() > _CLIPPED) & finite).sum()),
        not_finite=int((~finite).sum()),
    )


def _unique(values: Tensor, spec: ChannelSpec) -> Tensor:
    """The values that reading and writing again returns unless they are out of range; a canonical rotation may choose anew."""
    return torch.cat([values[:8], values[8:11].sort(0).values, values[11:12]]) if spec.rotation == "canonical" else values


# --- what each stage loses --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """How well the object shows after one stage, in dB; None where it is the reference of the others."""

    name: str
    psnr: float | None  # whole picture on white
    psnr_foreground: float | None  # covered pixels only


def stage_losses(stages: list[tuple[str, Gaussians]], views: Views | None) -> list[Stage]:
    """Every stage against the held-out views; without views, against renders of the first stage from four sides."""
    if views is not None:
        return [Stage(name, *held_out_psnr(gaussians, views)) for name, gaussians in stages]
    cameras = Cameras.orbit(4)
    reference = render(stages[0][1], cameras)
    covered = reference.alpha > 0
    losses = [Stage(stages[0][0], None, None)]
    for name, gaussians in stages[1:]:
        error = (render(gaussians, cameras).rgb - reference.rgb).square()
        losses.append(Stage(name, psnr(error.mean()), psnr(error[covered].mean()) if covered.any() else psnr(error.mean())))
    return losses


# --- one object -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """An atlas to examine."""

    name: str
    atlas: Atlas
    layout: AtlasLayout | None  # None: no layout of its id is known
    original: Gaussians | None = None  # what the atlas was made from, where that is known
    views: Views | None = None


@dataclass(frozen=True)
class AtlasReport:
    """Everything found about one atlas; what needs the layout is None where the layout is unknown or another one, else it is a
    `PlacedReport`."""

    name: str
    size: int  # cells a side
    projection: str | None
    layout_id: str
    reasons: list[str]  # why it must not be trained on, a line each; empty: healthy
    transport: Transport | None
    locality: float | None  # see `locality`
    possible_locality: float | None  # the same of a fresh transport
    neighbours: Neighbours | None
    cells: Cells | None
    channels: list[Channel]
    stages: list[Stage]

    @property
    def healthy(self) -> bool:
        return not self.reasons


@dataclass(frozen=True)
class PlacedReport(AtlasReport):
    """Everything found about an atlas whose layout is known."""

    projection: str
    transport: Transport
    locality: float
    possible_locality: float
    neighbours: Neighbours
    cells: Cells


def examine(case: Case) -> AtlasReport:
    """Examine one atlas."""
    atlas, layout = case.atlas, case.layout
    unplaced = AtlasReport(
        name=case.name,
        size=atlas.values.shape[1],
        projection=None,
        layout_id=atlas.layout_id,
        reasons=[],
        transport=None,
        locality=None,
        possible_locality=None,
        neighbours=None,
        cells=None,
        channels=channel_statistics(atlas),
        stages=[],
    )
    if layout is None:
        reason = f"its layout {atlas.layout_id or '(none named)'} is none of the stored ones: give it with --layout, or make the atlas anew"
        return replace(unplaced, reasons=[reason])
    if (layout.id, layout.size) != (atlas.layout_id, unplaced.size):
        made = f"made with layout {atlas.layout_id} at {unplaced.size} cells a side"
        return replace(unplaced, reasons=[f"{made}, not with {layout.id} at {layout.size}: atlases of two layouts must not be mixed"])
    gaussians = from_atlas(atlas, layout)
    transport, fresh = transport_of_cells(gaussians.means, layout, filled_count(gaussians))
    report = PlacedReport(
        name=unplaced.name,
        size=unplaced.size,
        projection=layout.projection,
        layout_id=unplaced.layout_id,
        reasons=[],
        transport=transport,
        locality=locality(gaussians.means, layout.size),
        possible_locality=locality(gaussians.means[fresh], layout.size),
        neighbours=neighbour_preservation(gaussians.means, layout.size),
        cells=cell_defects(atlas, layout),
        channels=unplaced.channels,
        stages=_stages(case, gaussians, layout),
    )
    return replace(report, reasons=_reasons(report))


def _stages(case: Case, gaussians: Gaussians, layout: AtlasLayout) -> list[Stage]:
    stages = []
    if case.original is not None:
        stages = [("fit", case.original)]
        if len(case.original) > len(gaussians):
            stages.append((f"merged to {len(gaussians)}", resize(case.original, len(gaussians))))
    stored = case.atlas.values.half().float()
    stages.append(("atlas", gaussians))
    if not torch.equal(stored, case.atlas.values):
        stages.append(("atlas in float16", from_atlas(replace(case.atlas, values=stored), layout)))
    return stage_losses(stages, case.views) if len(stages) > 1 or case.views is not None else []


def _reasons(report: PlacedReport) -> list[str]:
    cells, count = report.cells, report.size**2
    reasons = []
    if cells.not_finite:
        reasons.append(f"NaN or infinity in {cells.not_finite} of {count} cells")
    if cells.clipped:
        reasons.append(f"values out of their channel's range, or copies of the opacity that differ, in {cells.clipped} of {count} cells")
    if report.locality < _LEAST_LOCALITY * report.possible_locality:
        reasons.append(
            "cells are not neighbours in space: sphere and plane indices are composed wrongly "
            f"(locality {report.locality:.2f}, a right order has {report.possible_locality:.2f})"
        )
    elif report.transport.saving < _LEAST_SAVING:
        reasons.append(
            f"cells are not at their places on the sphere: the order saves {report.transport.saving:.0%} of what transport can "
            "(it was made for another sphere, or the image is turned or mirrored)"
        )
    if cells.stray:
        reasons.append(f"Gaussians beyond {STRAY:g} object lengths in {cells.stray} of {count} cells: drop them and transport again")
    for number, what in ((cells.transparent, "show nothing (opacity below 1/255)"), (cells.duplicates, "repeat another cell")):
        if number > _MOST_DEAD * count:
            reasons.append(f"{number} of {count} cells {what}: drop such Gaussians and make the atlas anew")
    return reasons


def _shuffle(count: int, seed: int = 0) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


# --- where atlases come from ------------------------------------------------------------------------------------------


def open_layout(spec: str) -> AtlasLayout:
    """The layout in a file, or the stored one of a name such as equirectangular_64.

    Raises:
        InputError: neither a file nor a stored layout.
    """
    if Path(spec).is_file():
        return AtlasLayout.load(spec)
    path = default_path(1, PROJECTIONS[0]).with_name(f"{spec}.safetensors")
    if not path.is_file():
        raise InputError(f"--layout {spec}: no such file or stored layout; stored are {', '.join(p.stem for p in _stored())}")
    return AtlasLayout.load(path)


def _stored() -> list[Path]:
    return sorted(default_path(1, PROJECTIONS[0]).parent.glob("*.safetensors"))


def _layout_of(atlas: Atlas) -> AtlasLayout | None:
    """The stored layout that the atlas names."""
    for path in _stored():
        if path.stem.endswith(f"_{atlas.values.shape[1]}") and (layout := AtlasLayout.load(path)).id == atlas.layout_id:
            return layout
    return None


def cases(path: Path, layout: AtlasLayout | None = None, views: Path | None = None) -> Iterator[Case]:
    """The atlases of a Gaussian file (transported first), an atlas file, a shard or a folder of shards.

    Args:
        layout: of all of them; else each atlas' own among the stored ones, and for Gaussians the smallest that holds them all.
        views: a file of views, or a folder of ID.npz, which need not hold every object.

    Raises:
        InputError: the file is missing, damaged or of another kind.
    """
    if path.is_dir() or path.suffix == ".tar":
        for sample, layout_id in tqdm(read_shards(path), desc=path.name, unit="atlas", leave=False, disable=None):
            atlas = Atlas(sample.values, layout_id, sample.spec)
            # A repainted variant has no views of its own.
            own = sample.record.get("object", sample.id) == sample.id
            yield Case(sample.id, atlas, layout or _layout_of(atlas), None, _views_of(sample.id, views) if own else None)
    elif path.suffix.lower() in SUFFIXES:
        original = load(path)
        chosen = layout or _smallest_that_holds(len(original))
        yield Case(path.stem, to_atlas(original, chosen), chosen, original, _views_of(path.stem, views))
    else:
        atlas = load_atlas(path)
        yield Case(path.stem, atlas, layout or _layout_of(atlas), None, _views_of(path.stem, views))


def load_atlas(path: Path) -> Atlas:
    """An atlas file of the atlas stage.

    Raises:
        InputError: missing, damaged, or something else.
    """
    try:
        return Atlas.decode(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(f"{path}: not an atlas ({error}); give {', '.join(SUFFIXES)}, an atlas, a shard or a folder of shards") from error


def _smallest_that_holds(count: int) -> AtlasLayout:
    sizes = sorted({int(path.stem.split("_")[-1]) for path in _stored()})
    return AtlasLayout.load_default(min([size for size in sizes if size**2 >= count], default=sizes[-1]))


def _views_of(name: str, views: Path | None) -> Views | None:
    if views is None:
        return None
    if not views.is_dir():
        return Views.load(views)
    path = views_path(views, name)
    return Views.load(path) if path.is_file() else None


# --- the examination of many ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Examination:
    """What was found in every path."""

    reports: list[AtlasReport]
    unreadable: list[str]  # one line for each path that could not be read
    pictured: list[tuple[AtlasReport, Case]]  # at most `_PICTURED`, the sick and the least local first

    @property
    def status(self) -> int:
        """Exit status: 2 something could not be read, 1 something must not be trained on, 0 all is well."""
        return 2 if self.unreadable else int(any(not report.healthy for report in self.reports))

    def to_json(self) -> str:
        objects = [{**asdict(report), "healthy": report.healthy} for report in self.reports]
        summary = summarise(self.reports) if self.reports else []
        data = {"objects": objects, "summary": [asdict(line) for line in summary], "unreadable": self.unreadable}
        return json.dumps(data, indent=1, allow_nan=False) + "\n"


def examine_paths(paths: Iterable[Path], layout: AtlasLayout | None = None, views: Path | None = None) -> Examination:
    """Examine everything in some files and folders; one that cannot be read does not stop the others."""
    reports: list[AtlasReport] = []
    unreadable: list[str] = []
    pictured: list[tuple[AtlasReport, Case]] = []
    for path in paths:
        try:
            for case in cases(path, layout, views):
                report = examine(case)
                reports.append(report)
                pictured = sorted([*pictured, (report, case)], key=lambda pair: _health(pair[0]))[:_PICTURED]
        except InputError as error:
            unreadable.append(str(error))
    return Examination(reports, unreadable, pictured)


def _locality_kept(report: PlacedReport) -> float:
    return report.locality / max(report.possible_locality, 1e-9)


def _health(report: AtlasReport) -> tuple[bool, float]:
    """The sick before the healthy, the least local first."""
    return report.healthy, _locality_kept(report) if isinstance(report, PlacedReport) else 0.0


@dataclass(frozen=True)
class Line:
    """One measure over many atlases."""

    measure: str
    median: float
    worst: float
    name: str  # the atlas with the worst value


_MEASURES: list[tuple[str, Callable[[PlacedReport], float], Callable]] = [
    ("transport gap", lambda report: report.transport.gap, max),
    ("transport saving", lambda report: report.transport.saving, min),
    ("locality", lambda report: report.locality, min),
    ("locality over a fresh transport's", _locality_kept, min),
    ("neighbours kept, interior", lambda report: report.neighbours.interior, min),
    ("neighbours kept, poles", lambda report: report.neighbours.poles, min),
    ("neighbours kept, seam", lambda report: report.neighbours.seam, min),
    ("empty cells", lambda report: report.cells.empty, max),
    ("transparent cells", lambda report: report.cells.transparent, max),
    ("point cells", lambda report: report.cells.points, max),
    ("stray cells", lambda report: report.cells.stray, max),
    ("duplicate cells", lambda report: report.cells.duplicates, max),
    ("largest skewness", lambda report: max(abs(channel.skewness) for channel in report.channels), max),
    ("largest roughness", lambda report: max(channel.roughness for channel in report.channels), max),
]


def summarise(reports: list[AtlasReport]) -> list[Line]:
    """Median and worst of every measure over the atlases whose layout is known."""
    known = [report for report in reports if isinstance(report, PlacedReport)]
    lines = []
    for measure, value, worst in _MEASURES if known else ():
        values = [float(value(report)) for report in known]
        extreme = values.index(worst(values))
        lines.append(Line(measure, float(np.median(values)), values[extreme], known[extreme].name))
    scored: dict[str, list[tuple[float, str]]] = {}
    for report in known:
        for stage in report.stages:
            if stage.psnr is not None:
                scored.setdefault(stage.name, []).append((stage.psnr, report.name))
    for stage_name, scores in scored.items():
        lines.append(Line(f"PSNR, {stage_name} (dB)", float(np.median([score for score, _ in scores])), *min(scores)))
    return lines


# --- as text ----------------------------------------------------------------------------------------------------------


def text(found: Examination) -> str:
    """Every report, or for more than `_PICTURED` of them the summary."""
    if len(found.reports) > _PICTURED:
        return summary_table(found.reports)
    return "\n\n".join(table(report) for report in found.reports)


def table(report: AtlasReport) -> str:
    """The report on one atlas, for a terminal."""
    layout = f"{report.size} x {report.size} cells, {report.projection or 'unknown projection'}, layout {report.layout_id[:8] or 'none'}"
    lines = [f"{report.name}: {'healthy' if report.healthy else 'SICK'} ({layout})", *(f"  ! {reason}" for reason in report.reasons)]
    if isinstance(report, PlacedReport):
        t, n, c = report.transport, report.neighbours, report.cells
        lines += [
            f"  transport   cost {t.cost:.5f}, certified bound {t.lower_bound:.5f}, gap {t.gap:.3%}; saves {t.saving:.1%} of the possible",
            f"  locality    {report.locality:.3f}, a fresh transport {report.possible_locality:.3f}",
            f"  neighbours  {n.everywhere:.0%} of touching cells are among the {NEAREST} nearest in space: "
            f"interior {n.interior:.0%}, poles {n.poles:.0%}, seam {n.seam:.0%}",
            f"  cells       {c.empty} empty, {c.transparent} transparent, {c.points} points, {c.stray} stray, {c.duplicates} duplicates, "
            f"{c.clipped} out of range, {c.not_finite} not finite",
        ]
    lines += ["", *_indented(_channel_rows(report.channels))]
    if report.stages:
        lines += ["", *_indented(_stage_rows(report.stages))]
    return "\n".join(lines)


def summary_table(reports: list[AtlasReport]) -> str:
    """Many atlases: the measures with their worst atlas, the channels together, and every sick atlas."""
    sick = [report for report in reports if not report.healthy]
    lines = [f"{len(reports)} atlases, {len(sick)} must not be trained on"]
    lines += [f"  {report.name}: {reason}" for report in sick for reason in report.reasons]
    rows = [["measure", "median", "worst", "of"]]
    for line in summarise(reports):
        rows.append([line.measure, _number(line.median), _number(line.worst), line.name if line.worst != line.median else ""])
    lines += ["", *_indented(rows, left=(0, 3)), "", *_indented(_channel_rows(pooled(reports)))]
    return "\n".join(lines)


def pooled(reports: list[AtlasReport]) -> list[Channel]:
    """The channels over all atlases: extremes, mean and deviation of all cells; skewness and the shares are means over atlases."""
    channels = []
    for same in zip(*(report.channels for report in reports), strict=True):
        columns = {key: np.array([getattr(channel, key) for channel in same]) for key in asdict(same[0]) if key != "name"}
        mean = columns["mean"].mean()
        std = math.sqrt((columns["std"] ** 2 + (columns["mean"] - mean) ** 2).mean())
        rest = [float(columns[key].mean()) for key in ("skewness", "at_ends", "roughness")]
        channels.append(Channel(same[0].name, float(columns["minimum"].min()), float(mean), float(columns["maximum"].max()), std, *rest))
    return channels


def _channel_rows(channels: list[Channel]) -> list[list[str]]:
    rows = [["channel", "min", "mean", "max", "std", "skewness", "at ends", "roughness"]]
    for c in channels:
        values = [f"{value:.3f}" for value in (c.minimum, c.mean, c.maximum, c.std, c.skewness)]
        rows.append([c.name, *values, f"{c.at_ends:.1%}", f"{c.roughness:.3f}"])
    return rows


def _stage_rows(stages: list[Stage]) -> list[list[str]]:
    if stages[0].psnr is None:
        rows = [["stage", f"PSNR dB to the {stages[0].name}", "foreground dB"]]
        return rows + [[stage.name, f"{stage.psnr:.2f}", f"{stage.psnr_foreground:.2f}"] for stage in stages[1:]]
    rows = [["stage", "PSNR dB", "loss", "foreground dB", "loss"]]
    rows += [[stage.name, f"{stage.psnr:.2f}", "", f"{stage.psnr_foreground:.2f}", ""] for stage in stages]
    for row, stage, before in zip(rows[2:], stages[1:], stages, strict=False):
        row[2], row[4] = _loss(before.psnr, stage.psnr), _loss(before.psnr_foreground, stage.psnr_foreground)
    return rows


def _loss(before: float | None, after: float | None) -> str:
    # Adding 0 turns -0 into 0.
    return "" if before is None or after is None else f"{round(before - after, 2) + 0.0:.2f}"


def _indented(rows: list[list[str]], left: tuple[int, ...] = (0,)) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) if i in left else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True))]
        lines.append(("  " + "  ".join(cells)).rstrip())
    return lines


def _number(value: float) -> str:
    return f"{value:.0f}" if value == int(value) else f"{value:.4f}"


# --- as a picture -----------------------------------------------------------------------------------------------------

# Dark to bright, so that opacity reads in grey as well.
_OPACITY_COLORS = torch.tensor([(0.27, 0.00, 0.33), (0.23, 0.32, 0.55), (0.13, 0.57, 0.55), (0.37, 0.79, 0.38), (0.99, 0.91, 0.14)])
_PANEL = 256  # pixels, least side of a panel
_MARGIN, _GAP, _TITLE = 24, 14, 74  # pixels
_INK, _FAINT, _PAPER, _ALARM = (32, 34, 38), (118, 122, 130), (255, 255, 255), (190, 32, 38)


def panels(atlas: Atlas, layout: AtlasLayout) -> dict[str, tuple[str, Tensor]]:
    """The attributes of an atlas as pictures [size, size, 3] in 0..1, each with a line that says how to read it.

    The panels of the paper's figure 6: position, colour, opacity, scale, and the last three channels of the rotation.
    """
    gaussians = from_atlas(atlas, layout)
    place = gaussians.opacities[:, None] * (len(_OPACITY_COLORS) - 1)
    below = place.floor().long().clamp(0, len(_OPACITY_COLORS) - 2)
    opacity = torch.lerp(_OPACITY_COLORS[below[:, 0]], _OPACITY_COLORS[below[:, 0] + 1], place - below)
    found = {
        "position": ("x y z as red green blue, -0.5 to 0.5", gaussians.means + 0.5),
        "colour": ("as it is", gaussians.colors),
        "opacity": ("0 dark to 1 bright", opacity),
        "scale": _stretched(atlas, slice(8, 11)),
        "rotation": _stretched(atlas, slice(13, 16)),
    }
    return {name: (note, image.clamp(0, 1).reshape(layout.size, layout.size, 3)) for name, (note, image) in found.items()}


def _stretched(atlas: Atlas, channels: slice) -> tuple[str, Tensor]:
    """Three raw channels [N, 3], each brought to 0..1 between its 2nd and 98th percentile."""
    values = torch.nan_to_num(atlas.values[channels], 0.0, 0.0, 0.0).flatten(1).T
    low, high = (torch.quantile(values, share, dim=0) for share in (0.02, 0.98))
    return f"{' '.join(atlas.spec.names[channels])}, stretched", (values - low) / (high - low).clamp_min(1e-6)


def picture(pictured: list[tuple[AtlasReport, Case]]) -> Image.Image:
    """A row for each atlas: the object, then its panels, cells enlarged to whole squares of pixels."""
    shown = [(report, case.atlas, case.layout) for report, case in pictured if isinstance(report, PlacedReport) and case.layout is not None]
    if not shown:
        raise InputError("no atlas with a known layout to draw: give its layout with --layout")
    side = max(_PANEL, *(report.size for report, _, _ in shown))
    width = 2 * _MARGIN + 6 * side + 5 * _GAP
    row = _TITLE + side + 40
    canvas = Image.new("RGB", (width, 2 * _MARGIN + len(shown) * row - 24), _PAPER)
    draw = ImageDraw.Draw(canvas)
    large, normal, small = (ImageFont.load_default(points) for points in (20, 15, 12))
    for index, (report, atlas, layout) in enumerate(shown):
        top = _MARGIN + index * row
        draw.text((_MARGIN, top), report.name, _INK, large)
        verdict = "healthy" if report.healthy else report.reasons[0]
        facts = (
            f"{report.size} x {report.size}, {report.projection}",
            f"gap {report.transport.gap:.2%}",
            f"locality {report.locality:.2f}",
        )
        left = _MARGIN + draw.textlength(report.name, large)
        for words in facts:
            draw.text((left + 24, top + 5), words, _FAINT, normal)
            left += 24 + draw.textlength(words, normal)
        draw.text((left + 24, top + 5), verdict, _INK if report.healthy else _ALARM, normal)
        drawn = render(from_atlas(atlas, layout), Cameras.orbit(1, side, radius=RADIUS)).rgb[0]
        images = {"object": ("30 degrees from its front", drawn), **panels(atlas, layout)}
        for column, (name, (note, image)) in enumerate(images.items()):
            left = _MARGIN + column * (side + _GAP)
            draw.text((left, top + 34), name, _INK, normal)
            draw.text((left, top + 54), note, _FAINT, small)
            canvas.paste(_enlarged(image, side), (left, top + _TITLE))
    return canvas


def _enlarged(image: Tensor, side: int) -> Image.Image:
    """A picture [S, S, 3] as pixels, each cell a whole number of them."""
    pixels = Image.fromarray((image.clamp(0, 1) * 255).round().to(torch.uint8).numpy())
    side -= side % len(image)
    return pixels.resize((side, side), Image.Resampling.NEAREST)


def save_picture(image: Image.Image, path: Path) -> None:
    """Write a PNG whole."""
    with replacing(path) as partial:
        image.save(partial, format="PNG")
