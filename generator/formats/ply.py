"""PLY as 3D Gaussian splatting programs write it (Kerbl et al. 2023): logit opacity, log scale, SH colour, (w, x, y, z).

Axes: the object frame of `Gaussians` as it is, right-handed with Z up and the front towards -Y. A PLY says nothing about
its axes; a viewer that takes Y for up or down shows an object of this project lying on its back until it is turned.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
from plyfile import PlyData, PlyElement, PlyParseError

from ..errors import InputError
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

    Needed are x, y, z, scale_0.. and rot_0..; colour comes from f_dc_0.. or red, green, blue (bytes, or floats in 0..1),
    else is mid-grey; without opacity every Gaussian is opaque. Two scales (flat 2D Gaussians) get a thin third. Normals,
    f_rest_* and everything else are ignored. Rows with numbers that are not finite are dropped with a warning; infinite
    opacity logits are 0 and 1.

    Raises:
        InputError: not a PLY, truncated, absurd, compressed or without Gaussians.
    """
    vertices = read_vertices(path)
    names = set(vertices.dtype.names or ())

    def stack(*wanted: str) -> np.ndarray:
        return np.stack([np.asarray(vertices[name], dtype=np.float64) for name in wanted], axis=1)

    if "packed_position" in names:
        raise InputError(f"{path} is a compressed PLY; convert it to a plain PLY or .spz first")
    missing = [name for name in ("x", "y", "z", "scale_0", "scale_1", "rot_0", "rot_1", "rot_2", "rot_3") if name not in names]
    if missing:
        raise InputError(f"{path} is not a Gaussian splat file: it lacks the vertex properties {', '.join(missing)}")
    if any(vertices.dtype[name].hasobject for name in names & set(_FIELDS)):
        raise InputError(f"{path} is not a Gaussian splat file: a vertex property is a list")

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
    return raw.assemble(path, means, quaternions, scales, opacities, colors)


def read_metadata(path: Path) -> dict | None:
    """The provenance that `write` stored, or None where there is none."""
    for line in _header(path).splitlines():
        if line.startswith(f"comment {METADATA_PREFIX}"):
            try:
                value = json.loads(line.removeprefix(f"comment {METADATA_PREFIX}"))
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
    return np.array(data["vertex"].data)

