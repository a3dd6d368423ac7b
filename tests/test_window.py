"""A real window on a virtual screen, where there is a Blender to open: tools/window.py drives it."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import pytest
import window


def test_the_screen_of_xvfb_is_read_and_written_as_png(tmp_path):
    width, height, stride = 3, 2, 16
    header = struct.pack(">25I", 100 + 4, 7, 2, 24, width, height, 0, 0, 32, 0, 32, 32, stride, 4, 0, 0, 0, 8, 0, 1, width, height, 0, 0, 0)
    pixels = [[(255, 0, 0), (0, 255, 0), (0, 0, 255)], [(1, 2, 3), (4, 5, 6), (7, 8, 9)]]
    rows = [b"".join(bytes([b, g, r, 0]) for r, g, b in row).ljust(stride, b"\0") for row in pixels]
    path = tmp_path / "Xvfb_screen0"
    path.write_bytes(header + b"name" + bytes(12) + b"".join(rows))  # a window name and one colour map entry come before the pixels
    assert window.read_screen(path) == (width, height, bytes(value for row in pixels for pixel in row for value in pixel))
    window.write_png(tmp_path / "a.png", *window.read_screen(path))
    data = (tmp_path / "a.png").read_bytes()
    start = data.index(b"IDAT")
    (length,) = struct.unpack(">I", data[start - 4 : start])
    lines = zlib.decompress(data[start + 4 : start + 4 + length])
    assert lines == b"".join(b"\0" + bytes(value for pixel in row for value in pixel) for row in pixels)
    Image = pytest.importorskip("PIL.Image")
    assert Image.open(tmp_path / "a.png").getpixel((2, 1)) == (7, 8, 9)


def test_panel_progress_cancel_and_undo_in_a_real_window(tmp_path):
    blender = os.environ.get("BLENDER") or None
    if why := window.missing(blender):
        pytest.skip(why)
    import shutil

    result = window.open_window(tmp_path, blender or shutil.which("blender"), steps=4)
    assert [check["claim"] for check in result["checks"] if not check["ok"]] == []
    assert len(result["checks"]) > 15
    for name in ("panel", "progress", "object", "grid", "error"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000, name
    assert all(Path(path).exists() for path in result["screenshots"])
