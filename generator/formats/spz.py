""".spz, Niantic's compressed splats: versions 2, 3 and 4; 2 is written unless asked, since the most programs read it.

Versions 2 and 3 are a gzip stream of a 16-byte header (magic "NGSP", version, count, SH degree, fractional bits, flags,
reserved) and then one array after another: positions (24-bit fixed point), opacities, colours, log scales (8 bits each),
rotations, SH. Version 4 has a plain header of 32 bytes, extension records (type, length, value), a table of sizes, and a zstd
stream for each array. Version 2 keeps x, y, z of a rotation (about a degree), 3 and 4 the three smallest components (a quarter).
Sizes are kept to 3 %, colours to 0.4 %.

Axes: the format defines its own (right, up, back) and takes those of a PLY to be (right, down, front). So an .spz holds the
object of the .ply turned by half a turn about X. Niantic's library turns it too when it is told the axes; many programs copy the
numbers as they are (docs/formats.md). A record behind the arrays, or before them in version 4, may state other axes.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from types import ModuleType

import numpy as np

from ..errors import InputError, WorkError
from ..gaussians import Gaussians
from . import raw

_HEADER = struct.Struct("<4sIIBBBB")
_HEADER_4 = struct.Struct("<4sIIBBBBI12x")  # ... flags, number of streams, offset of the table
_MAGIC = b"NGSP"
VERSIONS = (2, 3, 4)
DEFAULT_VERSION = 2
# Flag and type of the extension that names the axes of the data; absent, they are right, up, back.
_HAS_EXTENSIONS, _AXES_RECORD = 0x2, 0xADBE0003
# Its values 1 to 8: what the signs of the format's own (right, up, back) become. Those of 9 to 16 are the same, and then Y and Z swap.
_RIGHT_UP_BACK = 4
_AXES = {1: (-1, -1, 1), 2: (1, -1, 1), 3: (-1, 1, 1), 4: (1, 1, 1), 5: (-1, -1, -1), 6: (1, -1, -1), 7: (-1, 1, -1), 8: (1, 1, -1)}
_COLOR_SCALE = 0.15  # SH coefficients within +-3.33 fit in a byte
# 16 bits behind the point resolve 1.5e-5 of a unit object; readers' default is 12.
_MAX_FRACTIONAL_BITS = 16
_SH_COEFFICIENTS = {0: 0, 1: 3, 2: 8, 3: 15, 4: 24}
# Between the axes of Gaussians and of the file, for points and for the vector part of quaternions: F R F, F = diag(1, -1, -1).
_HALF_TURN = np.array([1.0, -1.0, -1.0])
# No gzip stream shrinks its content more than about this.
_DEFLATE_LIMIT = 1040
# zstd has no such limit: many Gaussians that are all alike shrink to nothing. This many bytes are unpacked from however few.
_ALIKE_LIMIT = 1 << 24
# Records are a few bytes each; what comes behind this is not read.
_RECORDS_LIMIT = 1 << 16


def write(gaussians: Gaussians, path: Path, version: int = DEFAULT_VERSION) -> None:
    """Write SH degree 0 and as many fractional bits as the coordinates leave room for.

    Version 2 keeps the ellipsoids, their quaternions only up to half turns about the Gaussian's own axes.

    Raises:
        InputError: nothing to write, numbers that are not finite, coordinates beyond 24 bits, or a version not in VERSIONS.
    """
    if version not in VERSIONS:
        raise InputError(f".spz version {version} cannot be written: choose one of {', '.join(map(str, VERSIONS))}")
    source = raw.columns(gaussians)
    count = len(gaussians)
    reach = float(np.abs(source["means"]).max())
    bits = _MAX_FRACTIONAL_BITS if reach == 0 else min(_MAX_FRACTIONAL_BITS, math.floor(math.log2(((1 << 23) - 1) / reach)))
    if bits < 0:
        raise InputError(f"a coordinate of {reach:.3g} does not fit in .spz; save as .ply or scale the object down")
    fixed = np.rint(source["means"] * _HALF_TURN * (1 << bits)).astype("<i4")
    positions = np.ascontiguousarray(fixed).view(np.uint8).reshape(count, 3, 4)[:, :, :3]
    if version == 2:
        # Only x, y, z are stored; w follows from the unit length, exactly enough where it is large.
        rotations = _byte(_largest_first(source["quaternions"])[:, 1:] * _HALF_TURN * 127.5 + 127.5)
    else:
        rotations = _pack_smallest_three(source["quaternions"] * np.append(1.0, _HALF_TURN))
    arrays = (
        positions,
        _byte(source["opacities"] * 255),
        _byte(raw.dc_from_colors(source["colors"]) * (_COLOR_SCALE * 255) + 127.5),
        _byte((raw.logs_from_scales(source["scales"]) + 10) * 16),
        rotations,
    )
    body = [array.tobytes() for array in arrays]
    if version < 4:
        header = _HEADER.pack(_MAGIC, version, count, 0, bits, 0, 0)
        # Without a time stamp equal Gaussians give equal files.
        path.write_bytes(gzip.compress(header + b"".join(body), mtime=0))
        return
    zstandard = _zstandard()
    streams = [zstandard.ZstdCompressor(level=12).compress(data) for data in body]
    header = _HEADER_4.pack(_MAGIC, 4, count, 0, bits, 0, len(streams), _HEADER_4.size)
    table = b"".join(struct.pack("<QQ", len(stream), len(data)) for stream, data in zip(streams, body, strict=True))
    path.write_bytes(header + table + b"".join(streams))


def read(path: Path) -> Gaussians:
    """Read version 2, 3 or 4 with any SH degree, of which only degree 0 is kept, with a warning.

    Raises:
        InputError: not an .spz file, truncated, absurd, of another version, or in unknown axes.
    """
    with open(path, "rb") as stream:
        start = stream.read(4)
    if not start:
        raise InputError(f"{path} is empty")
    version, count, degree, bits, arrays, stated = _arrays_4(path) if start == _MAGIC else _arrays_of_gzip(path)
    positions, alphas, colors, scales, rotations = (np.frombuffer(data, np.uint8).reshape(count, -1) for data in arrays[:5])
    if any(byte != 128 for byte in set(arrays[5])):
        raw.warn_of_higher_bands(path, degree)
    quaternions = _unpack_vector(rotations) if version == 2 else _unpack_smallest_three(rotations)
    means = _fixed_to_float(positions.reshape(count, 3, 3), bits)
    # From the file's axes to the format's, then to ours. A mirror image turns about the same axes the other way.
    signs = np.array(_AXES[(stated - 1) % 8 + 1], dtype=np.float64)
    means, quaternions[:, 1:] = means * signs, quaternions[:, 1:] * signs * signs.prod()
    if stated > 8:
        # A quarter turn about X; what is read may have any length.
        means = np.stack([means[:, 0], means[:, 2], -means[:, 1]], axis=1)
        w, x, y, z = quaternions.T
        quaternions = np.stack([w + x, x - w, y + z, z - y], axis=1)
    quaternions[:, 1:] *= _HALF_TURN
    return raw.assemble(
        path,
        means=means * _HALF_TURN,
        quaternions=quaternions,
        scales=raw.scales_from_logs(scales / 16.0 - 10.0),
        opacities=alphas[:, 0] / 255.0,
        colors=raw.colors_from_dc((colors - 127.5) / (_COLOR_SCALE * 255)),
    )


def _arrays_of_gzip(path: Path) -> tuple:
    """Version, count, SH degree, fractional bits, the six arrays as bytes, and the number of the axes, of version 2 or 3."""
    size = path.stat().st_size
    try:
        with gzip.open(path) as stream:
            header = stream.read(_HEADER.size)
            if len(header) < _HEADER.size or header[:4] != _MAGIC:
                raise InputError(f'{path} is not an .spz file: it lacks the mark "NGSP"')
            _, version, count, degree, bits, flags, _ = _HEADER.unpack(header)
            if version not in (2, 3):
                raise InputError(f"{path} is .spz version {version}; versions {', '.join(map(str, VERSIONS))} can be read")
            widths = _widths(path, version, count, degree, bits)
            expected = count * sum(widths)
            if expected > size * _DEFLATE_LIMIT:
                raise InputError(f"{path} is truncated or damaged: its header promises {count} Gaussians, which {size} bytes cannot hold")
            content = stream.read(expected)
            records = stream.read(_RECORDS_LIMIT) if flags & _HAS_EXTENSIONS else b""
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} is truncated or not an .spz file: {error}") from error
    if len(content) < expected:
        raise InputError(f"{path} is truncated: {len(content)} of {expected} bytes for {count} Gaussians")
    ends = np.cumsum([0, *(width * count for width in widths)])
    arrays = [content[a:b] for a, b in zip(ends[:-1], ends[1:], strict=True)]
    return version, count, degree, bits, arrays, _stated_axes(path, records)


def _arrays_4(path: Path) -> tuple:
    """As `_arrays_of_gzip`, of version 4."""
    zstandard = _zstandard()
    content = path.read_bytes()
    if len(content) < _HEADER_4.size:
        raise InputError(f"{path} is truncated: {len(content)} bytes are no .spz header")
    _, version, count, degree, bits, flags, number, table = _HEADER_4.unpack_from(content)
    if version != 4:
        raise InputError(f"{path} is .spz version {version}; versions {', '.join(map(str, VERSIONS))} can be read")
    widths = _widths(path, version, count, degree, bits)
    stated = _stated_axes(path, content[_HEADER_4.size : table] if flags & _HAS_EXTENSIONS else b"")
    begin = table + 16 * number
    if table < _HEADER_4.size or begin > len(content):
        raise InputError(f"{path} is truncated or damaged: its table of streams lies outside the file")
    if count * sum(widths) > max(len(content) * _DEFLATE_LIMIT, _ALIKE_LIMIT):
        held = f"{count} Gaussians, which {len(content)} bytes cannot hold"
        raise InputError(f"{path} is truncated or damaged: its header promises {held}")
    arrays: list[bytes] = []
    # An empty array has a stream of its own or none.
    for packed, unpacked in struct.iter_unpack("<QQ", content[table:begin]):
        expected = count * widths[len(arrays)] if len(arrays) < len(widths) else 0
        if unpacked != expected or begin + packed > len(content):
            raise InputError(f"{path} is truncated or damaged: the sizes of its streams do not fit {count} Gaussians")
        stream = content[begin : begin + packed]
        try:
            # What a frame states is allocated, whatever `max_output_size` says.
            if zstandard.get_frame_parameters(stream).content_size not in (expected, zstandard.CONTENTSIZE_UNKNOWN):
                raise InputError(f"{path} is truncated or damaged: a stream is not of {expected} bytes")
            data = zstandard.ZstdDecompressor().decompress(stream, max_output_size=max(expected, 1))
        except zstandard.ZstdError as error:
            raise InputError(f"{path} is truncated or damaged: {error}") from error
        if len(data) != expected:
            raise InputError(f"{path} is truncated or damaged: a stream of {len(data)} bytes instead of {expected}")
        arrays.append(data)
        begin += packed
    arrays += [b""] * (len(arrays) == 5 and widths[5] == 0)
    if len(arrays) < len(widths):
        raise InputError(f"{path} is truncated or damaged: {number} streams instead of {len(widths)}")
    return version, count, degree, bits, arrays, stated


def _zstandard() -> ModuleType:
    """The package that version 4 needs; a Blender that a Linux distribution has built need not bring it."""
    try:
        import zstandard
    except ImportError as error:
        raise WorkError(".spz version 4 needs the Python package zstandard, which is not installed; versions 2 and 3 do not") from error
    return zstandard


def _widths(path: Path, version: int, count: int, degree: int, bits: int) -> tuple[int, ...]:
    """Bytes a Gaussian in each array: positions, opacities, colours, scales, rotations, SH."""
    if degree not in _SH_COEFFICIENTS or bits > 24:
        raise InputError(f"{path} is damaged: SH degree {degree} and {bits} fractional bits are out of range")
    if count == 0:
        raise InputError(f"{path} holds no Gaussians")
    return 9, 1, 3, 3, 3 if version == 2 else 4, 3 * _SH_COEFFICIENTS[degree]


def _stated_axes(path: Path, records: bytes) -> int:
    """The number of the axes that the extension records name; unknown records are passed over."""
    place = 0
    while len(records) >= place + 8:
        kind, length = struct.unpack_from("<II", records, place)
        if kind == _AXES_RECORD and length == 4 and len(records) >= place + 12:
            (value,) = struct.unpack_from("<I", records, place + 8)
            if value > 2 * len(_AXES):
                raise InputError(
                    f"{path} states axes (number {value}) that are not known: convert it to the format's own (right, up, back) first"
                )
            return value or _RIGHT_UP_BACK
        place += 8 + length
    return _RIGHT_UP_BACK


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


def _pack_smallest_three(quaternions: np.ndarray) -> np.ndarray:
    """Bytes [N, 4] of quaternions [N, 4] (w, x, y, z): what `_unpack_smallest_three` reads."""
    xyzw = np.roll(quaternions / np.linalg.norm(quaternions, axis=1, keepdims=True), -1, axis=1)
    largest = np.abs(xyzw).argmax(axis=1)
    xyzw = np.where(xyzw[np.arange(len(xyzw)), largest][:, None] < 0, -xyzw, xyzw)
    magnitudes = np.minimum(np.rint(np.abs(xyzw) * (511 / math.sqrt(0.5))), 511).astype(np.int64)
    fields = magnitudes | ((xyzw < 0).astype(np.int64) << 9)
    packed = largest.astype(np.int64)
    for component in range(4):
        packed = np.where(largest == component, packed, (packed << 10) | fields[:, component])
    return packed.astype("<u4").view(np.uint8).reshape(-1, 4)


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
