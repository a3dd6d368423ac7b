"""Gaussians that others have fitted, above all GaussianVerse, the paper's data set: into our frame, then into a run as fits.

GaussianVerse unpacks to CHUNK/OBJECT/point_cloud.ply, named as in G-Objaverse, whose views it was fitted to, and a
captions.json {"CHUNK/OBJECT": caption}. Each file holds 16,384 vertices of 59 features as 3D Gaussian splatting writes them:
x y z, f_dc (3), f_rest (45), opacity (logit), scale (3, log), rot (4, w first, any length). Cameras that were released with an
object ring the Z axis, so Z is up. The authors' indices (gs2sphere.npy) are not read: an atlas comes from our own transport.
"""

from __future__ import annotations

import csv
import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch

from generator.atlas import ChannelSpec
from generator.errors import InputError
from generator.files import parse_json, replacing
from generator.formats import ply, raw, save
from generator.gaussians import Gaussians
from generator.render.ewa import ALPHA_CUT

from ..farm import for_each
from .captions import captions as captions_of
from .objects import SourceObject, unique_slugs

LIBRARY = "GaussianVerse"
LICENCE = "Creative Commons, each object as on Sketchfab"
FILE = "point_cloud.ply"

_NEEDED = ("x", "y", "z", "f_dc_0", "f_dc_1", "f_dc_2", "opacity", "scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3")
STRAY = 3.0  # of the file's units, and of object lengths: what lies further from the centre is no part of the object
_SATURATED = 254.5 / 255  # opacity above which eight bits say opaque
_OUTSIDE = 1e-3  # share of the centres that may lie outside of the object's box at either end of an axis
_DEGENERATE = 1e-6  # length of a quaternion that has no direction


@dataclass(frozen=True)
class Outliers:
    """How many Gaussians of a file were not what they should be; the first three kinds are dropped, the others mended."""

    total: int  # in the file
    not_finite: int  # hold NaN or infinity
    stray: int  # further than `STRAY` from the centre along an axis
    invisible: int  # opacity below 1/255: every renderer passes over them
    degenerate: int  # quaternion of no length: becomes the identity
    thin: int  # a scale below the channels' range: clipped
    thick: int  # a scale above the channels' range: clipped
    saturated: int  # opacity that eight bits cannot tell from 1: kept


def read_fit(path: str | os.PathLike, up: str = "z") -> tuple[Gaussians, Outliers]:
    """The Gaussians of one 3D Gaussian splatting PLY, in the object frame: Z up, front to -Y, centred, longest side 1.

    The box that is centred leaves out the outermost 0.1 % of the centres at both ends of every axis, so that floaters
    do not shrink the object. Logits and logs are activated, quaternions get unit length and w >= 0, scales are clipped
    to the range of the channels, view-dependent colour is left out. The order is the file's.

    Args:
        up: the file's own up axis: "z" (front towards -Y), or "y" (front towards +Z).

    Raises:
        InputError: not such a PLY, damaged, or nothing of it can be seen.
    """
    path = Path(path)
    if up not in ("y", "z"):
        raise InputError(f'up must be "y" or "z", got {up!r}')
    try:
        vertices = ply.read_vertices(path)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    missing = [name for name in _NEEDED if name not in (vertices.dtype.names or ())]
    if missing:
        raise InputError(f"{path} is not a 3D Gaussian splatting fit: it lacks the vertex properties {', '.join(missing)}")
    table = np.stack([np.asarray(vertices[name], dtype=np.float64) for name in _NEEDED], axis=1)
    means, dc, logits, logs, quaternions = np.split(table, (3, 6, 7, 10), axis=1)
    # An infinite logit or log has a meaning: quite opaque or transparent, thinner or thicker than anything.
    finite = np.isfinite(np.concatenate([means, dc, quaternions], axis=1)).all(1) & ~np.isnan(np.concatenate([logits, logs], axis=1)).any(1)
    opacities = raw.opacities_from_logits(logits[:, 0])
    with np.errstate(invalid="ignore"):
        near = (np.abs(means) <= STRAY).all(1)
        visible = opacities >= ALPHA_CUT
    kept = finite & near & visible
    if not kept.any():
        raise InputError(f"{path}: none of its {len(table)} Gaussians can be seen; it is not a usable fit")
    low, high = np.quantile(means[kept], (_OUTSIDE, 1 - _OUTSIDE), axis=0)
    length = float((high - low).max())
    if length <= 0:
        raise InputError(f"{path}: all its Gaussians lie in one point; it is not a usable fit")
    means = (means - (low + high) / 2) / length
    with np.errstate(invalid="ignore"):
        near &= (np.abs(means) <= STRAY).all(1)
    kept &= near
    norms = np.linalg.norm(quaternions, axis=1)
    scales = raw.scales_from_logs(logs) / length
    spec = ChannelSpec()
    outliers = Outliers(
        total=len(table),
        not_finite=int((~finite).sum()),
        stray=int((finite & ~near).sum()),
        invisible=int((finite & near & ~visible).sum()),
        degenerate=int((kept & (norms < _DEGENERATE)).sum()),
        thin=int((kept & (scales < spec.min_scale).any(1)).sum()),
        thick=int((kept & (scales > spec.max_scale).any(1)).sum()),
        saturated=int((kept & (opacities > _SATURATED)).sum()),
    )
    quaternions = np.where(norms[:, None] < _DEGENERATE, (1.0, 0.0, 0.0, 0.0), quaternions)
    if up == "y":
        means, quaternions = _upright(means, quaternions)
    quaternions = np.where(quaternions[:, :1] < 0, -quaternions, quaternions)
    scales = np.clip(scales, spec.min_scale, spec.max_scale)
    columns = (means, quaternions, scales, opacities, raw.colors_from_dc(dc))
    return raw.assemble(path, *(column[kept] for column in columns)), outliers


def _upright(means: np.ndarray, quaternions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A quarter turn about X: Y becomes up (Z), the front moves from +Z to -Y. The quaternions grow by the root of 2."""
    x, y, z = means.T
    a, b, c, d = quaternions.T
    return np.stack([x, -z, y], axis=1), np.stack([a - b, a + b, c - d, c + d], axis=1)


def gaussian_verse(
    path: str | os.PathLike, captions: str | os.PathLike | None = None, up: str = "z"
) -> tuple[list[SourceObject], list[str]]:
    """The fits in a folder (every point_cloud.ply below it, else every .ply), or the one in a file, with their captions.

    Args:
        captions: CSV with the columns uid,caption (Cap3D's; a header is no matter), or JSON {object: caption or captions}.
            An object goes by CHUNK/OBJECT, CHUNK-OBJECT or OBJECT: the folder of its point_cloud.ply, or its file's name.
            Without captions every object is "an object".
        up: the files' up axis, see `read_fit`.

    Returns:
        The objects, and one line for each that has no caption.

    Raises:
        InputError: no fits, or captions that cannot be read or fit no object.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(path.rglob(FILE)) or sorted(path.rglob("*.ply"))
        if not files:
            raise InputError(f"{path}: no .ply below this folder: unpack GaussianVerse there")
    elif path.is_file():
        files = [path]
    else:
        raise InputError(f"{path}: no such file or folder")
    base = Path(os.path.abspath(path if path.is_dir() else path.parent))
    return captioned(files, [_place(file) for file in files], base, captions, LIBRARY, up)


def captioned(
    files: list[Path], places: list[Path], base: Path, captions: str | os.PathLike | None, library: str, up: str
) -> tuple[list[SourceObject], list[str]]:
    """Objects that are named by where they lie, with their captions; see `gaussian_verse`.

    Args:
        files: what becomes the path of each object.
        places: what names it: its last two parts, CHUNK/OBJECT, and all of it below `base`.
    """
    known = None if captions is None else read_captions(captions)
    objects, without = [], []
    names = ["/".join(place.relative_to(base).parts) or place.name for place in places]
    for file, place, name, identifier in zip(files, places, names, unique_slugs(names), strict=True):
        keys = (f"{place.parent.name}/{place.name}", f"{place.parent.name}-{place.name}", place.name)
        texts = captions_of("") if known is None else next((known[key] for key in keys if key in known), None)
        if texts is None:
            without.append(f"{name}: no caption for {keys[0]} in {captions}")
            continue
        objects.append(SourceObject(identifier, name, file, texts, licence=LICENCE, library=library, up=up))
    if not objects:
        raise InputError(f"{captions}: captions none of the {len(files)} objects in {base}; the first would be {keys[0]}")
    return objects, without


def _place(file: Path) -> Path:
    """What names an object: the folder of its point_cloud.ply, else its file without the suffix."""
    # Not resolved: the cache of a model hub is links to files that are named by their content.
    file = Path(os.path.abspath(file))
    return file.parent if file.name == FILE else file.with_suffix("")


def read_captions(path: str | os.PathLike) -> dict[str, list[str]]:
    """The captions of every object in a file, see `gaussian_verse`, in lower case.

    Raises:
        InputError: missing, or neither such CSV nor such JSON.
    """
    path = Path(path)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            entries = parse_json(file.read()) if path.suffix.lower() == ".json" else [row for row in csv.reader(file) if row]
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, csv.Error) as error:
        raise InputError(f"{path}: not readable as {path.suffix[1:].upper() or 'CSV'} ({error})") from error
    found: dict[str, list[str]] = {}
    needed = f"{path}: needs CSV lines uid,caption or JSON {{object: caption}}"
    if not isinstance(entries, list | dict):
        raise InputError(f"{needed}, got {str(entries)[:80]}")
    for entry in entries.items() if isinstance(entries, dict) else entries:
        name, texts = entry if isinstance(entry, list | tuple) and len(entry) == 2 else (None, None)
        texts = texts if isinstance(texts, list) else [texts]
        if not isinstance(name, str) or not all(isinstance(text, str) for text in texts):
            raise InputError(f"{needed}, got {str(entry)[:80]}")
        # An object whose caption is empty has none.
        if tidy := [" ".join(text.lower().split()).rstrip(".") for text in texts if text.strip()]:
            found.setdefault(name.strip(), []).extend(tidy)
    if not found:
        raise InputError(f"{path}: no captions inside")
    return found


def import_fits(objects: list[SourceObject], directory: Path, workers: int = 2) -> dict[str, str]:
    """Bring fits into the folder of a run: ID.ply and ID.json each, which the atlas stage takes like fits of its own.

    The JSON holds the object's record (captions and credits), its outliers, and a PSNR of null: there are no views to
    score it on. What is there already is kept, with its captions brought up to date.

    Returns:
        The reason of each object that failed, by id; the others are not affected.
    """
    directory.mkdir(parents=True, exist_ok=True)
    todo = []
    for source in objects:
        output = directory / f"{source.id}.ply"
        done = _read_json(output.with_suffix(".json")) if output.is_file() else None
        if done is None:
            todo.append((source.id, source, output))
        elif done != (current := {**done, **source.record()}):
            _write_json(output.with_suffix(".json"), current)
    return for_each(_import_one, todo, workers, "import-fits") if todo else {}


def _import_one(_identifier: str, source: SourceObject, output: Path) -> None:
    torch.set_num_threads(1)
    gaussians, outliers = read_fit(source.path, source.up)
    scores = {"psnr": None, "psnr_foreground": None, "gaussians": len(gaussians), "outliers": asdict(outliers)}
    # The .ply comes last: the stages after this one go by it.
    _write_json(output.with_suffix(".json"), {**source.record(), **scores})
    save(gaussians, output)


def outlier_table(directory: Path, objects: list[SourceObject]) -> str:
    """Of every kind of outlier: how many Gaussians in how many objects, and the object with most."""
    counts = {}
    for source in objects:
        if found := _read_json(directory / f"{source.id}.json"):
            counts[source.id] = found["outliers"]
    total = sum(count["total"] for count in counts.values())
    lines = [f"{len(counts)} objects, {total} Gaussians"]
    for kind in [field.name for field in fields(Outliers)][1:]:
        of_kind = {identifier: count[kind] for identifier, count in counts.items() if count[kind]}
        if of_kind:
            worst = max(of_kind, key=of_kind.__getitem__)
            share = sum(of_kind.values()) / total
            lines.append(f"  {kind:11} {sum(of_kind.values())} ({share:.2%}) in {len(of_kind)} objects, most in {worst}: {of_kind[worst]}")
    return "\n".join(lines)


def _read_json(path: Path) -> dict | None:
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _write_json(path: Path, value: dict) -> None:
    with replacing(path) as partial:
        partial.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
