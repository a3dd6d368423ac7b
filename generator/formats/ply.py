"""PLY as 3D Gaussian splatting programs write it (Kerbl et al. 2023): logit opacity, log scale, SH colour, (w, x, y, z).

The compressed PLY of SuperSplat (elements chunk and vertex, packed_position ...) is read too.

Axes: a PLY says nothing about its axes. Most viewers take Y for down, so an object in this project's axes (Z up) lies on its
back there until it is turned: `formats.save(..., up="-Y")`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from plyfile import PlyData, PlyElement, PlyParseError

from ..errors import InputError
from ..files import parse_json
from ..gaussians import Gaussians
from . import raw

# What stands before the JSON of a provenance comment; other programs skip comments.
METADATA_PREFIX = "gaussian-atlas "
# Some viewers look for the end of the header in the first 10 kB only.
METADATA_LIMIT = 8000
# No header of a splat file comes near this; what has no end by then is not a PLY.
_HEADER_LIMIT = 1 << 18

_FIELDS = (
    "x", "y", "z", "nx", "ny", "nz", "f_dc_0", "f_dc_1", "f_dc_2",
    "opacity", "scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3",
)  # fmt: skip


def write(gaussians: Gaussians, path: Path, metadata: dict | None = None) -> None:
    """Write binary little-endian PLY with SH degree 0 and normals of zero; `metadata` becomes a JSON comment.

    Raises:
        InputError: nothing to write, numbers that are not finite, or metadata that is too long or not JSON.
    """
    source = raw.columns(gaussians)
    table = np.zeros((len(gaussians), len(_FIELDS)), dtype="<f4")
    table[:, 0:3] = source["means"]
    table[:, 6:9] = raw.dc_from_colors(source["colors"])
    table[:, 9] = raw.logits_from_opacities(source["opacities"])
    table[:, 10:13] = raw.logs_from_scales(source["scales"])
    table[:, 13:17] = source["quaternions"]
    vertices = table.view([(name, "<f4") for name in _FIELDS])[:, 0]
    comments = [] if metadata is None else [METADATA_PREFIX + _to_json(metadata)]
    # Opened here: plyfile would leave the file open when it fails.
    with open(path, "wb") as stream:
        PlyData([PlyElement.describe(vertices, "vertex")], byte_order="<", comments=comments).write(stream)


def read(path: Path) -> Gaussians:
    """Read a PLY of any program: ASCII or binary, any order and width of the properties.

    Needed are x, y, z, scale_0.. and rot_0.., or the packed properties of SuperSplat; colour comes from f_dc_0.. or red, green,
    blue (bytes, or floats in 0..1), else is mid-grey; without opacity every Gaussian is opaque. Two scales (flat 2D Gaussians)
    get a thin third. Normals and everything else are ignored, f_rest_* with a warning. Rows with numbers that are not finite
    are dropped with a warning; infinite opacity logits are 0 and 1.

    Raises:
        InputError: not a PLY, truncated, absurd, a mesh or a plain point cloud, or without Gaussians.
    """
    elements = _read_elements(path)
    vertices = elements["vertex"]
    names = set(vertices.dtype.names or ())

    def stack(*wanted: str) -> np.ndarray:
        return np.stack([np.asarray(vertices[name], dtype=np.float64) for name in wanted], axis=1)

    if "packed_position" in names:
        return _read_compressed(path, elements)
    missing = [name for name in ("x", "y", "z", "scale_0", "scale_1", "rot_0", "rot_1", "rot_2", "rot_3") if name not in names]
    if missing and "face" in elements:
        raise InputError(f"{path} is a mesh ({len(elements['face'])} faces), not a Gaussian splat file: import it as Stanford PLY")
    if missing:
        raise InputError(f"{path} is not a Gaussian splat file: it lacks the vertex properties {', '.join(missing)}")
    rest = sorted(name for name in names if name.startswith("f_rest_"))
    _check_numbers(path, vertices, (*_FIELDS, "red", "green", "blue", *rest))

    means = stack("x", "y", "z")
    quaternions = stack("rot_0", "rot_1", "rot_2", "rot_3")
    if "scale_2" in names:
        scales = raw.scales_from_logs(stack("scale_0", "scale_1", "scale_2"))
    else:
        flat = raw.scales_from_logs(stack("scale_0", "scale_1"))
        scales = np.concatenate([flat, 0.01 * flat.min(axis=1, keepdims=True)], axis=1)
    opacities = raw.opacities_from_logits(stack("opacity")[:, 0]) if "opacity" in names else np.ones(len(means))
    if {"f_dc_0", "f_dc_1", "f_dc_2"} <= names:
        colors = raw.colors_from_dc(stack("f_dc_0", "f_dc_1", "f_dc_2"))
    elif {"red", "green", "blue"} <= names:
        kind = vertices.dtype["red"]
        colors = stack("red", "green", "blue") / (np.iinfo(kind).max if kind.kind in "ui" else 1.0)
    else:
        colors = np.full((len(means), 3), 0.5)
    if any(np.any(vertices[name]) for name in rest):
        raw.warn_of_higher_bands(path, round((len(rest) / 3 + 1) ** 0.5) - 1)
    return raw.assemble(path, means, quaternions, scales, opacities, colors)


# SuperSplat's compressed PLY: vertices in groups of 256, each packed between the limits of its chunk.
_GROUP = 256


def _read_compressed(path: Path, elements: dict[str, np.ndarray]) -> Gaussians:
    """Gaussians of packed 32-bit words: position and scale 11-10-11 bits, rotation 2-10-10-10, colour and opacity 8 bits each.

    Positions, log scales and colours (chunks of old files limit no colours) lie between min_* and max_* of the vertex's chunk.
    A rotation leaves out its largest component, named by the first two bits in the order (w, x, y, z).
    """
    vertices, chunks = elements["vertex"], elements.get("chunk", np.empty(0))
    packed = ("packed_position", "packed_rotation", "packed_scale", "packed_color")
    limits = [f"{end}_{name}" for name in ("x", "y", "z", "scale_x", "scale_y", "scale_z") for end in ("min", "max")]
    found = set(chunks.dtype.names or ())
    if missing := [name for name in packed if name not in (vertices.dtype.names or ())] + [name for name in limits if name not in found]:
        raise InputError(f"{path} is not a complete compressed PLY: it lacks {', '.join(missing[:4])}")
    if len(chunks) * _GROUP < len(vertices):
        raise InputError(f"{path} is not a complete compressed PLY: {len(chunks)} chunks for {len(vertices)} vertices")
    if any(vertices.dtype[name].kind not in "ui" for name in packed):
        raise InputError(f"{path} is not a compressed PLY: its packed properties are not integers")
    colours = [f"{end}_{name}" for name in "rgb" for end in ("min", "max")]
    _check_numbers(path, chunks, (*limits, *colours))
    words = {name: vertices[name].astype(np.uint32) for name in packed}
    group = np.arange(len(vertices)) // _GROUP

    def between(names: tuple[str, ...], values: np.ndarray) -> np.ndarray:
        low, high = (np.stack([chunks[f"{end}_{name}"][group] for name in names], axis=1).astype(np.float64) for end in ("min", "max"))
        return low + (high - low) * values

    quaternions = np.zeros((len(vertices), 4))
    stored = (_bits(words["packed_rotation"], 2, 10, 10, 10)[:, 1:] - 0.5) * 2**0.5
    largest = words["packed_rotation"] >> 30
    for component in range(4):
        rows = largest == component
        quaternions[np.ix_(rows, [i for i in range(4) if i != component])] = stored[rows]
        quaternions[rows, component] = np.sqrt(np.maximum(0.0, 1.0 - np.square(stored[rows]).sum(axis=1)))
    rgba = _bits(words["packed_color"], 8, 8, 8, 8)
    colors = rgba[:, :3]
    if set(colours) <= found:
        colors = between(("r", "g", "b"), colors)
    if "sh" in elements:
        raw.warn_of_higher_bands(path, round((len(elements["sh"].dtype.names or ()) / 3 + 1) ** 0.5) - 1)
    return raw.assemble(
        path,
        means=between(("x", "y", "z"), _bits(words["packed_position"], 11, 10, 11)),
        quaternions=quaternions,
        scales=raw.scales_from_logs(between(("scale_x", "scale_y", "scale_z"), _bits(words["packed_scale"], 11, 10, 11))),
        opacities=rgba[:, 3],
        colors=colors,
    )


def _check_numbers(path: Path, table: np.ndarray, names: Sequence[str]) -> None:
    """Raise InputError where one of these properties of an element is there and a list."""
    for name in names:
        if name in (table.dtype.names or ()) and table.dtype[name].hasobject:
            raise InputError(f"{path} is not a Gaussian splat file: the property {name} is a list")


def _bits(words: np.ndarray, *widths: int) -> np.ndarray:
    """The fields of 32-bit words [N], highest first, as numbers in 0..1 [N, fields]."""
    shifts = np.cumsum((0, *widths[::-1]))[-2::-1]
    return np.stack([((words >> int(s)) & ((1 << w) - 1)) / ((1 << w) - 1) for s, w in zip(shifts, widths, strict=True)], axis=1)


def read_metadata(path: Path) -> dict | None:
    """The provenance that `write` stored, or None where there is none."""
    for line in _header(path).splitlines():
        if line.startswith(f"comment {METADATA_PREFIX}"):
            try:
                value = parse_json(line.removeprefix(f"comment {METADATA_PREFIX}"))
            except ValueError:
                return None
            return value if isinstance(value, dict) else None
    return None


def _to_json(metadata: dict) -> str:
    try:
        # ASCII, as the header of a PLY must be; json escapes line ends.
        text = json.dumps(metadata, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"metadata cannot be written as JSON: {error}") from error
    if len(text) > METADATA_LIMIT:
        raise InputError(f"metadata takes {len(text)} characters, a PLY comment has room for {METADATA_LIMIT}")
    return text


def _header(path: Path) -> str:
    with open(path, "rb") as stream:
        start = stream.read(_HEADER_LIMIT)
    if not start:
        raise InputError(f"{path} is empty")
    if start[:4] not in (b"ply\n", b"ply\r"):
        raise InputError(f'{path} is not a PLY file: it does not start with "ply"')
    end = start.find(b"end_header")
    if end < 0:
        raise InputError(f"{path} is not a complete PLY file: its header has no end")
    return start[:end].decode("ascii", errors="replace")


def read_vertices(path: Path) -> np.ndarray:
    """The vertex element as a structured array of raw numbers (logits, logs) that does not keep the file open.

    Raises:
        InputError: not a PLY, truncated, absurd, or without vertices.
    """
    return _read_elements(path)["vertex"]


def _read_elements(path: Path) -> dict[str, np.ndarray]:
    """Every element by name; there is a vertex element."""
    _header(path)
    try:
        data = PlyData.read(os.fspath(path))
    except PlyParseError as error:
        raise InputError(f"{path} is not a readable PLY file: {' '.join(str(error).split())}") from error
    except (ValueError, OverflowError, MemoryError, KeyError, IndexError) as error:
        # Negative or absurd element counts and undecodable headers reach NumPy before plyfile notices.
        raise InputError(f"{path} is not a readable PLY file: its header does not fit its content") from error
    if "vertex" not in data:
        raise InputError(f"{path} is not a Gaussian splat file: it has no vertices")
    # A copy: plyfile maps the file, and on Windows a mapped file can be neither replaced nor removed.
    return {element.name: np.array(element.data) for element in data.elements}
