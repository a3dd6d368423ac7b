"""G-Objaverse (Qiu et al. 2023): renders of Objaverse from 40 cameras, the views that GaussianVerse was fitted to.

It unpacks to CHUNK/OBJECT/campos_512_v4/NNNNN/ with, for every camera, NNNNN.json (origin and the camera's axes x right,
y down, z forward, in a world with Z up), NNNNN.png (colour and alpha, 512 x 512) and NNNNN_nd.exr (normals and, in the
fourth channel, the depth z). All cameras share a focal length of 1422.222 pixels of 1024. Objects fit a box of side 1 at the
origin, so a depth nearer than that box is none. The normals are in the axes of another engine; ours come from the depth.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from generator.errors import InputError
from generator.files import parse_json
from generator.render import Cameras

from ..farm import for_each
from .gaussian_verse import captioned
from .objects import SourceObject

LIBRARY = "G-Objaverse"
FOLDER = "campos_512_v4"
FOCAL = 1422.222 / 1024  # of the image side
_BOX = math.sqrt(3) / 2  # how far a unit box reaches from its centre
_JUMP = 8.0  # depth steps of so many pixel widths lie between two surfaces
_HELD_OUT = 10  # every so many views one is kept from the fit


def g_objaverse(path: str | os.PathLike, captions: str | os.PathLike | None = None) -> tuple[list[SourceObject], list[str]]:
    """The objects whose renders lie below a folder, with their captions; see `gaussian_verse` for what names and captions them.

    Returns:
        The objects, whose `path` is the folder of their cameras, and one line for each that has no caption.

    Raises:
        InputError: no renders, or captions that cannot be read or fit no object.
    """
    path = Path(os.path.abspath(path))
    if not path.is_dir():
        raise InputError(f"{path}: no such folder")
    folders = [path] if path.name == FOLDER else sorted(found for found in path.rglob(FOLDER) if found.is_dir())
    if not folders:
        raise InputError(f"{path}: no {FOLDER} below this folder: unpack G-Objaverse there")
    places = [folder.parent for folder in folders]
    return captioned(folders, places, path, captions, LIBRARY, up="z")


def read_views(folder: Path, identifier: str, size: int = 256):
    """The views of one object.

    Args:
        folder: campos_512_v4.
        size: pixels of an image side, a whole part of the files'. Colours are averaged as linear light.

    Returns:
        `trainer.views.Views`, every tenth of them held out.

    Raises:
        InputError: a file is missing, damaged, or of another size.
    """
    from ..views import Views

    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and (entry / f"{entry.name}.json").is_file())
    if not names:
        raise InputError(f"{folder}: no NNNNN/NNNNN.json inside")
    parts = [_read_view(folder / name / name, size) for name in names]
    viewmats, rgba, depth, normals = (np.stack(part) for part in zip(*parts, strict=True))
    K = torch.tensor([[FOCAL * size, 0, size / 2], [0, FOCAL * size, size / 2], [0, 0, 1]])
    cameras = Cameras(torch.from_numpy(viewmats).float(), K.repeat(len(names), 1, 1), size, size)
    split = np.array(["held_out" if (view + 1) % _HELD_OUT == 0 else "train" for view in range(len(names))])
    return Views(identifier, rgba, depth.astype(np.float16), np.round(127 * normals).astype(np.int8), cameras, split)


def _read_view(stem: Path, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """viewmat [4, 4], rgba [S, S, 4] uint8, depth [S, S] and unit normals [S, S, 3], 0 where nothing is."""
    to_world = _camera(stem.with_suffix(".json"))
    viewmat = np.eye(4)
    viewmat[:3, :3], viewmat[:3, 3] = to_world[:, :3].T, -to_world[:, :3].T @ to_world[:, 3]
    color = _read_png(stem.with_suffix(".png"))
    depth = _read_depth(stem.with_name(f"{stem.name}_nd.exr"))
    side = len(color)
    if color.shape != (side, side, 4) or depth.shape != (side, side) or side % size:
        raise InputError(f"{stem}: colour {color.shape} and depth {depth.shape} must be square and a multiple of {size} pixels")
    depth = np.where((color[..., 3] > 0) & (depth > np.linalg.norm(to_world[:, 3]) - _BOX), depth, 0)
    normals = _normals(depth, FOCAL * side) @ to_world[:, :3].T
    step = side // size
    # A view of fewer pixels takes the sample in the middle of each: depths of two surfaces have no mean.
    middle = slice(step // 2, None, step)
    return viewmat, _smaller(color, step), depth[middle, middle], normals[middle, middle]


def _camera(path: Path) -> np.ndarray:
    """Camera to world [3, 4]: the axes as columns, then the place."""
    try:
        entry = parse_json(path.read_text(encoding="utf-8"))
        matrix = np.array([entry[key] for key in ("x", "y", "z", "origin")], dtype=np.float64).T
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a camera of G-Objaverse, which has x, y, z and origin ({error})") from error
    axes = matrix[:, :3]
    if matrix.shape != (3, 4) or not np.allclose(axes.T @ axes, np.eye(3), atol=1e-3) or np.linalg.det(axes) < 0:
        raise InputError(f"{path}: x, y and z are not the right-handed axes of a camera")
    return matrix


def _read_png(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGBA"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: not a readable picture ({error})") from error
    except MemoryError as error:
        raise InputError(f"{path}: the picture does not fit in this computer's memory") from error


def _read_depth(path: Path) -> np.ndarray:
    import OpenEXR

    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        channels = OpenEXR.File(str(path), separate_channels=True).channels()
        return np.nan_to_num(channels["A"].pixels.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    except (RuntimeError, ValueError, KeyError) as error:
        raise InputError(f"{path}: no depth in it ({error})") from error


def _normals(depth: np.ndarray, focal: float) -> np.ndarray:
    """Unit normals [S, S, 3] in camera axes, turned to the camera, from the depth of each pixel's neighbours; 0 where it has none."""
    side = len(depth)
    steps = np.arange(side) + 0.5 - side / 2
    points = np.stack([steps[None, :] * depth / focal, steps[:, None] * depth / focal, depth], axis=-1)

    def along(axis: int) -> tuple[np.ndarray, np.ndarray]:
        """The step to the next or from the previous pixel, whichever stays on the surface, and whether one does."""
        change = np.diff(points, axis=axis)
        on = np.minimum(np.delete(depth, 0, axis), np.delete(depth, -1, axis)) > 0
        on &= np.abs(change[..., 2]) < _JUMP * np.maximum(np.delete(depth, 0, axis), 1e-6) / focal
        shape = list(points.shape)
        shape[axis] = 1
        nothing, never = np.zeros(shape), np.zeros(shape[:2], dtype=bool)
        after, before = (np.concatenate(pair, axis) for pair in ((change, nothing), (nothing, change)))
        has_after, has_before = (np.concatenate(pair, axis) for pair in ((on, never), (never, on)))
        nearer = has_after & (~has_before | (np.abs(after[..., 2]) <= np.abs(before[..., 2])))
        return np.where(nearer[..., None], after, before), has_after | has_before

    (across, has_across), (down, has_down) = along(1), along(0)
    normals = np.cross(down, across)
    normals *= np.where((normals * points).sum(-1, keepdims=True) > 0, -1, 1)
    length = np.linalg.norm(normals, axis=-1, keepdims=True)
    return np.where((has_across & has_down)[..., None], normals / np.maximum(length, 1e-12), 0)


def _smaller(color: np.ndarray, step: int) -> np.ndarray:
    """Pixels [S, S, 4] uint8, straight alpha, averaged over squares of `step` as the light they stand for."""
    from ..scene import srgb_to_linear, straight_srgb

    if step == 1:
        return np.where(color[..., 3:] > 0, color, 0).astype(np.uint8)
    alpha = color[..., 3:] / 255
    linear = np.concatenate([srgb_to_linear(color[..., :3] / 255) * alpha, alpha], axis=-1)
    side = len(color) // step
    return straight_srgb(linear.reshape(side, step, side, step, 4).mean((1, 3)))


def import_views(objects: list[SourceObject], directory: Path, size: int, workers: int = 2) -> dict[str, str]:
    """Bring renders into the folder of a run: ID.npz each, which the fit stage takes like views of its own, and views.jsonl.

    What is there already is kept.

    Returns:
        The reason of each object that failed, by id; the others are not affected.
    """
    from ..views import add_records, views_path

    directory.mkdir(parents=True, exist_ok=True)
    todo = [(source.id, source.path, views_path(directory, source.id), size) for source in objects]
    failures = for_each(_import_one, [item for item in todo if not item[2].is_file()], workers, "import-views")
    records = [{**source.record(), "status": "ok", "reason": "", "seconds": 0.0} for source in objects if source.id not in failures]
    failed = [{**source.record(), "status": "failed", "reason": failures[source.id]} for source in objects if source.id in failures]
    add_records(directory, records + failed)
    return failures


def _import_one(identifier: str, folder: Path, output: Path, size: int) -> None:
    read_views(folder, identifier, size).save(output)
