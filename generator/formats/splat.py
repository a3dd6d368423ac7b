""".splat: 32 bytes a Gaussian, no header (the web viewers' format, read by nearly all of them).

A record is position 3 x float32, scale 3 x float32 (linear), colour and opacity 4 x uint8 (display sRGB, 0..255), rotation
4 x uint8 ((w, x, y, z) * 128 + 128). Colour and opacity keep 8 bits, a rotation is off by up to half a degree.
Axes: as in PLY, whatever the writer's were; viewers take Y for down.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..errors import InputError
from ..gaussians import Gaussians
from . import raw

_RECORD = np.dtype([("position", "<f4", 3), ("scale", "<f4", 3), ("rgba", "u1", 4), ("rotation", "u1", 4)])
# The format has no magic number: a file whose numbers mostly exceed this holds something else.
_PLAUSIBLE = 1e8


def write(gaussians: Gaussians, path: Path) -> None:
    """Write the records in the order of the Gaussians.

    Raises:
        InputError: nothing to write or numbers that are not finite.
    """
    source = raw.columns(gaussians)
    records = np.zeros(len(gaussians), dtype=_RECORD)
    records["position"] = source["means"]
    records["scale"] = source["scales"]
    records["rgba"][:, :3] = np.rint(np.clip(source["colors"], 0, 1) * 255)
    records["rgba"][:, 3] = np.rint(np.clip(source["opacities"], 0, 1) * 255)
    records["rotation"] = np.clip(np.rint(source["quaternions"] * 128 + 128), 0, 255)
    path.write_bytes(records.tobytes())


def read(path: Path) -> Gaussians:
    """Read the records; those with numbers that are not finite, absurd or negative sizes are dropped with a warning.

    Raises:
        InputError: empty, not a whole number of records, or mostly implausible numbers.
    """
    content = path.read_bytes()
    if not content:
        raise InputError(f"{path} is empty")
    if len(content) % _RECORD.itemsize:
        raise InputError(f"{path} is truncated or not a .splat file: {len(content)} bytes are not a multiple of {_RECORD.itemsize}")
    records = np.frombuffer(content, dtype=_RECORD)
    position, scale = records["position"].astype(np.float64), records["scale"].astype(np.float64)
    plausible = (np.abs(position) < _PLAUSIBLE).all(axis=1) & (scale >= 0).all(axis=1) & (scale < _PLAUSIBLE).all(axis=1)
    if 2 * plausible.sum() < len(records):
        raise InputError(f"{path} is not a .splat file: most of its numbers are implausible")
    position[~plausible] = np.nan
    return raw.assemble(
        path,
        means=position,
        quaternions=(records["rotation"].astype(np.float64) - 128) / 128,
        scales=np.maximum(scale, np.exp(raw.LOG_SCALE_LIMITS[0])),
        opacities=records["rgba"][:, 3] / 255.0,
        colors=records["rgba"][:, :3] / 255.0,
    )
