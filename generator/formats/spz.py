""".spz, Niantic's compressed splats: version 2 written (the most widely read), versions 2 and 3 read.

A gzip stream of a 16-byte header (magic "NGSP", version, count, SH degree, fractional bits, flags, reserved) and then one
array after another: positions (24-bit fixed point), opacities, colours, log scales (8 bits each), rotations, SH.
Sizes are kept to 3 %, colours to 0.4 %, rotations to about a degree.

Axes: the format defines its own (right, up, back) and takes those of a PLY to be (right, down, front). So an .spz holds the
object of the .ply turned by half a turn about X, and Niantic's library and splat-transform convert one into the other.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from ..errors import InputError
from ..gaussians import Gaussians
from . import raw

_HEADER = struct.Struct("<4sIIBBBB")
_MAGIC = b"NGSP"
_COLOR_SCALE = 0.15  # SH coefficients within +-3.33 fit in a byte
# 16 bits behind the point resolve 1.5e-5 of a unit object; readers' default is 12.
_MAX_FRACTIONAL_BITS = 16
_SH_COEFFICIENTS = {0: 0, 1: 3, 2: 8, 3: 15, 4: 24}
# Between the axes of Gaussians and of the file, for points and for the vector part of quaternions: F R F, F = diag(1, -1, -1).
_HALF_TURN = np.array([1.0, -1.0, -1.0])
# No gzip stream shrinks its content more than about this.
_DEFLATE_LIMIT = 1040


def write(gaussians: Gaussians, path: Path) -> None:
    """Write version 2 with SH degree 0 and as many fractional bits as the coordinates leave room for.

    The ellipsoids are kept, their quaternions only up to half turns about the Gaussian's own axes.

    Raises:
        InputError: nothing to write, numbers that are not finite, or coordinates beyond 24 bits.
    """
    source = raw.columns(gaussians)
    count = len(gaussians)
    reach = float(np.abs(source["means"]).max())
    bits = _MAX_FRACTIONAL_BITS if reach == 0 else min(_MAX_FRACTIONAL_BITS, math.floor(math.log2(((1 << 23) - 1) / reach)))
    if bits < 0:
        raise InputError(f"a coordinate of {reach:.3g} does not fit in .spz; save as .ply or scale the object down")
    fixed = np.rint(source["means"] * _HALF_TURN * (1 << bits)).astype("<i4")
    positions = np.ascontiguousarray(fixed).view(np.uint8).reshape(count, 3, 4)[:, :, :3]
    # Only x, y, z are stored; w follows from the unit length, exactly enough where it is large.
    vectors = _largest_first(source["quaternions"])[:, 1:] * _HALF_TURN
    body = (
        positions,
        _byte(source["opacities"] * 255),
        _byte(raw.dc_from_colors(source["colors"]) * (_COLOR_SCALE * 255) + 127.5),
        _byte((raw.logs_from_scales(source["scales"]) + 10) * 16),
        _byte(vectors * 127.5 + 127.5),
    )
    header = _HEADER.pack(_MAGIC, 2, count, 0, bits, 0, 0)
    # Without a time stamp equal Gaussians give equal files.
    path.write_bytes(gzip.compress(header + b"".join(part.tobytes() for part in body), mtime=0))


def read(path: Path) -> Gaussians:
    """Read version 2 or 3 with any SH degree, of which only degree 0 is kept.

    Raises:
        InputError: not an .spz file, truncated, absurd, or of a version other than 2 and 3.
    """
    size = path.stat().st_size
    if size == 0:
        raise InputError(f"{path} is empty")
    try:
        with gzip.open(path) as stream:
            header = stream.read(_HEADER.size)
            if len(header) < _HEADER.size or header[:4] != _MAGIC:
                raise InputError(f'{path} is not an .spz file: it lacks the mark "NGSP"')
            _, version, count, degree, bits, _, _ = _HEADER.unpack(header)
            if version not in (2, 3):
                raise InputError(f"{path} is .spz version {version}; versions 2 and 3 can be read")
            if degree not in _SH_COEFFICIENTS or bits > 24:
                raise InputError(f"{path} is damaged: SH degree {degree} and {bits} fractional bits are out of range")
            rotation_size = 3 if version == 2 else 4
            widths = (9, 1, 3, 3, rotation_size)
            expected = count * (sum(widths) + 3 * _SH_COEFFICIENTS[degree])
            if expected > size * _DEFLATE_LIMIT:
                raise InputError(f"{path} is truncated or damaged: its header promises {count} Gaussians, which {size} bytes cannot hold")
            content = stream.read(expected)
    except (OSError, EOFError, zlib.error) as error:
        if path.read_bytes()[:4] == _MAGIC:
            raise InputError(f"{path} is .spz version 4 or later; versions 2 and 3 can be read") from error
        raise InputError(f"{path} is truncated or not an .spz file: {error}") from error
    if len(content) < expected:
        raise InputError(f"{path} is truncated: {len(content)} of {expected} bytes for {count} Gaussians")
    ends = np.cumsum([width * count for width in widths])
    parts = np.split(np.frombuffer(content, dtype=np.uint8, count=int(ends[-1])), ends[:-1])
    positions, alphas, colors, scales, rotations = (part.reshape(count, width) for part, width in zip(parts, widths, strict=True))
    quaternions = _unpack_vector(rotations) if version == 2 else _unpack_smallest_three(rotations)
    quaternions[:, 1:] *= _HALF_TURN
    return raw.assemble(
        path,
        means=_fixed_to_float(positions.reshape(count, 3, 3), bits) * _HALF_TURN,
        quaternions=quaternions,
        scales=raw.scales_from_logs(scales / 16.0 - 10.0),
        opacities=alphas[:, 0] / 255.0,
        colors=raw.colors_from_dc((colors - 127.5) / (_COLOR_SCALE * 255)),
    )


def _byte(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def _largest_first(quaternions: np.ndarray) -> np.ndarray:
    """Unit quaternions [N, 4] (w, x, y, z) of the same ellipsoids with w >= 1/2.

    Half a turn about one of its own axes leaves an ellipsoid as it is: q, q i, q j and q k are the same rotation to it, and
    each has another component of q as its w.
    """
    quaternions = quaternions / np.linalg.norm(quaternions, axis=1, keepdims=True)
    w, x, y, z = quaternions.T
    turned = np.stack([[w, x, y, z], [-x, w, z, -y], [-y, -z, w, x], [-z, y, -x, w]])  # [4 turns, 4 components, N]
    index = np.arange(len(quaternions))
    best = turned[np.abs(quaternions).argmax(axis=1), :, index]
    return np.where(best[:, :1] < 0, -best, best)


def _fixed_to_float(positions: np.ndarray, bits: int) -> np.ndarray:
    """Coordinates [N, 3] of 24-bit little-endian two's complement bytes [N, 3, 3]."""
    low, middle, high = (positions[..., i].astype(np.int64) for i in range(3))
    unsigned = low | (middle << 8) | (high << 16)
    return np.where(unsigned >= 1 << 23, unsigned - (1 << 24), unsigned) / float(1 << bits)


def _unpack_vector(rotations: np.ndarray) -> np.ndarray:
    """Quaternions [N, 4] (w, x, y, z) of bytes [N, 3]: x, y, z, with w >= 0 from the unit length (version 2)."""
    vector = rotations / 127.5 - 1.0
    w = np.sqrt(np.maximum(0.0, 1.0 - np.square(vector).sum(axis=1, keepdims=True)))
    return np.concatenate([w, vector], axis=1)


def _unpack_smallest_three(rotations: np.ndarray) -> np.ndarray:
    """Quaternions [N, 4] (w, x, y, z) of bytes [N, 4] (version 3).

    The top two bits index the largest of (x, y, z, w), which is left out and positive; the other three follow, the last in
    the lowest bits, each as a sign and a 9-bit magnitude in units of sqrt(1/2) / 511.
    """
    packed = np.ascontiguousarray(rotations).view("<u4")[:, 0].astype(np.int64)
    largest = packed >> 30
    xyzw = np.zeros((len(packed), 4))
    for component in (3, 2, 1, 0):
        stored = largest != component
        magnitude = (packed & 511) * (math.sqrt(0.5) / 511)
        xyzw[:, component] = np.where(stored, np.where(packed & 512, -magnitude, magnitude), 0.0)
        packed = np.where(stored, packed >> 10, packed)
    xyzw[np.arange(len(packed)), largest] = np.sqrt(np.maximum(0.0, 1.0 - np.square(xyzw).sum(axis=1)))
    return np.roll(xyzw, 1, axis=1)
