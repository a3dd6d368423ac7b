"""`make interop`: other programs read our splat files and we read theirs, every number compared; a table of it in Markdown.

    python tools/interop.py [--keep FOLDER] [--freeze FOLDER]

An object of which every turn, mirror image and mixed-up column shows is written in every format, version and axes; each program
reads each file, writes each format that it can, and what comes out must be the object to the precision of the format. Exit status 1
where something that should work does not. What a program cannot read is stated in its own words.

The programs are gsply, gaussforge and Blender of .venv, and those of tests/interop/package.json, installed in .interop (220 MB) by
npm. After a change of their versions there, write the lock without the registry's name:
`npm install --package-lock-only --ignore-scripts --omit-lockfile-registry-resolved`.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import importlib.util
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from plyfile import PlyData
from setup import ROOT, SetupError, say

from generator.errors import InputError
from generator.formats import load, save
from generator.gaussians import Gaussians, quaternions_to_matrices

SOURCE = ROOT / "tests" / "interop"
FOLDER = ROOT / ".interop"
FROZEN = ROOT / "tests" / "data" / "interop"
# splat-transform asks for 22 and runs on 20; npm 7 was the first to know this kind of lock.
OLDEST = {"node": 20, "npm": 7}

KEPT, HALF = "kept", "half a turn about X"
# This and the axes are written out again: nothing that is compared may come from generator/formats.
SH_C0 = 0.5 / math.sqrt(math.pi)
# From the axes of Gaussians to those of a file.
FILE_AXES = {
    "Z": np.eye(3),
    "-Y": np.array([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]]),  # Y down, Z into the picture
    "Y": np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]]),  # Y up, Z towards the viewer
}
# How to read a file that another program made of our Y-down .ply.
UP_OF_THEIRS = {KEPT: "-Y", HALF: "Y"}


# ---------------------------------------------------------------------------------------------------------------- the object


def known_object(count: int = 18) -> Gaussians:
    """The object that is exchanged, in the axes of Gaussians: six coloured sides, then tilted ellipsoids off the centre.

    Side colours: right red, left cyan, back green, front magenta, top blue, bottom yellow. The tilted ones lie on a spiral about
    a centre of their own, each with three unlike sizes, an opacity and a colour of its own and a rotation of any kind: each of
    (w, x, y, z) is the largest of some and negative of some. No random numbers, so every version of everything makes the same.
    """
    sides = torch.tensor([[1.0, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1]])
    half = 0.5**0.5
    to_x, to_y, to_z = [half, 0, half, 0], [half, -half, 0, 0], [1.0, 0, 0, 0]  # turn a splat's thin Z to the side's axis
    i = torch.arange(count - 6, dtype=torch.float64)[:, None]
    height = 1 - 2 * (i + 0.5) / (count - 6)
    angle, radius = i * math.pi * (3 - 5**0.5), (1 - height**2).sqrt()
    spiral = torch.cat([radius * angle.cos(), radius * angle.sin(), height], dim=1)
    tilts = (i * torch.tensor([1.3, 2.1, 0.7, 1.9]) + torch.tensor([1.0, 2.0, 3.0, 4.0])).sin()
    logs = torch.tensor([[-2.6, -3.4, -4.4]]) + 0.15 * (i * torch.tensor([1.1, 1.7, 2.3])).sin()
    logs = torch.stack([row.roll(k % 3) for k, row in enumerate(logs)])  # the long axis is another one in turn
    return Gaussians(
        means=torch.cat([0.5 * sides, torch.tensor([0.09, -0.06, 0.04]) + spiral * torch.tensor([0.31, 0.24, 0.37])]),
        quaternions=torch.nn.functional.normalize(torch.cat([torch.tensor([to_x, to_x, to_y, to_y, to_z, to_z]), tilts]), dim=1),
        scales=torch.cat([torch.tensor([[0.2, 0.1, 0.02]]).repeat(6, 1), logs.exp()]),
        opacities=torch.cat([torch.tensor([0.95, 0.8, 0.65, 0.5, 0.35, 0.2]), 0.04 + 0.92 * (i[:, 0] * 0.618034).frac()]),
        colors=torch.cat(
            [
                torch.tensor([[1.0, 0, 0], [0, 1, 1], [0, 1, 0], [1, 0, 1], [0, 0, 1], [1, 1, 0]]),
                (i * torch.tensor([0.618034, 0.414214, 0.302776])).frac(),
            ]
        ),
    ).to(torch.float64)


@dataclass(frozen=True)
class Seen:
    """N Gaussians as numbers to compare, float64: means [N, 3], axes [N, 3, 3] in columns, the longest first, and their scales [N, 3]."""

    means: np.ndarray
    axes: np.ndarray
    scales: np.ndarray
    opacities: np.ndarray
    colors: np.ndarray

    @staticmethod
    def of(means: np.ndarray, quaternions: np.ndarray, scales: np.ndarray, opacities: np.ndarray, colors: np.ndarray) -> Seen:
        """Of activated columns; quaternions are (w, x, y, z) of any length."""
        scales = np.asarray(scales, dtype=np.float64)
        order = np.argsort(-scales, axis=1)
        axes = quaternions_to_matrices(torch.as_tensor(np.asarray(quaternions, dtype=np.float64))).numpy()
        return Seen(
            np.asarray(means, dtype=np.float64),
            np.take_along_axis(axes, order[:, None, :], axis=2),
            np.take_along_axis(scales, order, axis=1),
            np.asarray(opacities, dtype=np.float64).reshape(-1),
            np.asarray(colors, dtype=np.float64).reshape(-1, 3),
        )

    @staticmethod
    def of_raw(means: np.ndarray, quaternions: np.ndarray, logs: np.ndarray, logits: np.ndarray, dc: np.ndarray) -> Seen:
        """Of the columns of a .ply: logarithms of scales, logits of opacities, spherical harmonics of degree 0."""
        opacities = 1 / (1 + np.exp(-np.asarray(logits, dtype=np.float64)))
        return Seen.of(
            means, quaternions, np.exp(np.asarray(logs, dtype=np.float64)), opacities, 0.5 + SH_C0 * np.asarray(dc, dtype=np.float64)
        )

    @staticmethod
    def of_gaussians(gaussians: Gaussians) -> Seen:
        return Seen.of(*(getattr(gaussians, name).numpy() for name in ("means", "quaternions", "scales", "opacities", "colors")))

    def turned(self, matrix: np.ndarray) -> Seen:
        """Points p become `matrix` p; a mirror image too, since an ellipsoid's axes have no direction."""
        return Seen(self.means @ matrix.T, matrix @ self.axes, self.scales, self.opacities, self.colors)


class Deviation(NamedTuple):
    """The largest deviations of a set of Gaussians: lengths of means, degrees, share of a size, opacities and colours in 0..1."""

    means: float
    rotation: float
    size: float
    opacity: float
    color: float

    def within(self, limits: Deviation) -> bool:
        return all(a <= b for a, b in zip(self, limits, strict=True))

    def __str__(self) -> str:
        return (
            f"means {self.means:.2g}, rotation {self.rotation:.2g} degrees, size {self.size:.2g}, "
            f"opacity {self.opacity:.2g}, colour {self.color:.2g}"
        )


def largest(deviations: Sequence[Deviation]) -> Deviation:
    return Deviation(*map(max, zip(*deviations, strict=True)))


def _signed_permutations() -> Iterator[np.ndarray]:
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1.0, -1.0), repeat=3):
            yield np.diag(signs) @ np.eye(3)[list(order)]


# All quarter turns and mirror images of the axes, 48 in all, the object as it is first.
TURNS = list(_signed_permutations())


def turn_name(matrix: np.ndarray) -> str:
    if (matrix == np.eye(3)).all():
        return KEPT
    if (matrix == np.diag([1, -1, -1])).all():
        return HALF
    letters = ["xyz"[np.abs(row).argmax()] for row in matrix]
    form = ", ".join(("-" if row.min() < 0 else "") + letter for row, letter in zip(matrix, letters, strict=True))
    return f"{'turned' if np.linalg.det(matrix) > 0 else 'MIRRORED'} to ({form})"


def compare(seen: Seen, expected: Seen) -> tuple[str, Deviation]:
    """What became of the axes of `expected`, as `turn_name`, and the largest deviations from `expected` under that turn.

    Rows are matched by the nearest mean, since some programs sort. Infinite where they do not match one to one.
    """
    nothing = Deviation(*[math.inf] * 5)
    if len(seen.means) != len(expected.means):
        return f"{len(seen.means)} of {len(expected.means)} Gaussians", nothing

    def distances(matrix: np.ndarray) -> np.ndarray:
        return np.linalg.norm(seen.means[:, None] - (expected.means @ matrix.T)[None], axis=2)

    # The usual ones first: the search costs most of the time.
    usual = (matrix for matrix in (np.eye(3), np.diag([1.0, -1, -1])) if distances(matrix).min(axis=1).max() < 0.01)
    best = next(usual, None)
    if best is None:
        best = min(TURNS, key=lambda matrix: distances(matrix).min(axis=1).max())
    rows = distances(best).argmin(axis=1)
    if len(set(rows.tolist())) < len(rows):
        return "points of another object", nothing
    wanted = expected.turned(best)
    sines = np.linalg.norm(np.cross(seen.axes, wanted.axes[rows], axis=1), axis=1)
    return turn_name(best), Deviation(
        means=float(distances(best).min(axis=1).max()),
        rotation=float(np.degrees(np.arcsin(np.minimum(sines, 1))).max()),
        size=float(np.abs(np.log(seen.scales / wanted.scales[rows])).max()),
        opacity=float(np.abs(seen.opacities - wanted.opacities[rows]).max()),
        color=float(np.abs(seen.colors - wanted.colors[rows]).max()),
    )


# ------------------------------------------------------------------------------------------------------------ what is written

# What a format may lose: half a step of each field, so 8 bits of colour and opacity, 1/16 of the logarithm of a size; of a rotation the
# angle where all of its stored numbers are half a step off.
_BYTE, _SPZ_COLOR, _SPZ_SIZE = 0.5 / 255 + 1e-6, 0.5 * SH_C0 / (0.15 * 255) + 1e-6, 1 / 32 + 1e-6
_PLY = Deviation(1e-6, 0.001, 1e-6, 1e-6, 1e-6)
_SPLAT = Deviation(1e-7, 0.9, 1e-6, _BYTE, _BYTE)
_SPZ_2 = Deviation(2**-17 * 3**0.5, 1.6, _SPZ_SIZE, _BYTE, _SPZ_COLOR)
_SPZ_3 = _SPZ_2._replace(rotation=0.28)
OURS = {".ply": _PLY, ".splat": _SPLAT, ".spz 2": _SPZ_2, ".spz 3": _SPZ_3, ".spz 4": _SPZ_3}

# The same of files that other programs write: .spz with 12 bits behind the point; in .spz 2 the quaternion as it comes, of which a small
# w is badly known from x, y and z (ours is turned until w is large); .splat cut off to bytes instead of rounded.
_THEIR_SPZ = _SPZ_3._replace(means=2**-13 * 3**0.5)
_THEIR_SPZ_2 = _THEIR_SPZ._replace(rotation=12.0)
_THEIR_SPLAT = _SPLAT._replace(rotation=1.8, opacity=2 * _BYTE, color=2 * _BYTE)
_COMPRESSED = Deviation(1e-3, 0.25, 2e-3, _BYTE, _BYTE)

# By program and format of ours: what becomes of the axes, and the most that may be lost.
_COPY_SPZ = {".spz 2": (HALF, _SPZ_2), ".spz 3": (HALF, _SPZ_3), ".spz 4": (HALF, _SPZ_3)}
_TURN_SPZ = {".spz 2": (KEPT, _SPZ_2), ".spz 3": (KEPT, _SPZ_3), ".spz 4": (KEPT, _SPZ_3)}
_WHOLE = {".ply": (KEPT, _PLY)}
READS = {
    "gsply": _WHOLE | _COPY_SPZ,
    "gaussforge": _WHOLE | {".splat": (KEPT, _SPLAT)} | _COPY_SPZ,
    "Blender": _WHOLE,
    # It takes the bytes of a rotation for -1..1 in steps of 2/255, not for (byte - 128) / 128: 0.004 more in each number.
    "splat-transform": _WHOLE | {".splat": (KEPT, _SPLAT._replace(rotation=1.8))} | _COPY_SPZ,
    "spz-js": _WHOLE | {".spz 2": _COPY_SPZ[".spz 2"]},
    # It rounds the constant of the colours to 0.282.
    "@spz-loader/core": {format: (KEPT, _TURN_SPZ[format][1]._replace(color=_SPZ_COLOR + 2e-4)) for format in (".spz 2", ".spz 3")},
    "@adobe/spz": _TURN_SPZ,
}
# What they are known not to read, and say so.
CANNOT = {"spz-js": (".spz 3", ".spz 4"), "@spz-loader/core": (".spz 4",)}
# The same as READS of the files that they write.
_PLYS = _WHOLE | {".compressed.ply": (KEPT, _COMPRESSED)}
_COPIED = {".spz 2": (HALF, _THEIR_SPZ_2), ".spz 3": (HALF, _THEIR_SPZ), ".spz 4": (HALF, _THEIR_SPZ)}
WRITES = {
    "gsply": _PLYS | {format: _COPIED[format] for format in (".spz 3", ".spz 4")},
    "gaussforge": _PLYS | {".splat": (KEPT, _THEIR_SPLAT)} | _COPIED,
    "Blender": _WHOLE,
    "splat-transform": _PLYS | {format: _COPIED[format] for format in (".spz 3", ".spz 4")},
    "spz-js": _PLYS | {".spz 2": _COPIED[".spz 2"]},
    "@adobe/spz": {format: (KEPT, limits) for format, (_, limits) in _COPIED.items()},
}
NOTES = {
    "Blender": "its own import and export: points, every property an attribute",
    "@spz-loader/core": "asked for the axes of a .ply",
    "@adobe/spz": "told that the numbers are those of a .ply",
}


def suffix_of(format: str) -> str:
    return format.split(" ")[0]


def write_ours(gaussians: Gaussians, folder: Path) -> dict[tuple[str, str], Path]:
    """Our files of an object: every format of OURS in every axes, by (format, axes)."""
    files = {}
    for format, up in itertools.product(OURS, FILE_AXES):
        version = format.partition(" ")[2]
        files[format, up] = folder / f"ours{version and '-' + version}{up}{suffix_of(format)}"
        save(gaussians, files[format, up], up=up, **({"spz_version": int(version)} if version else {}))
    return files


def read_ply(path: Path) -> Seen:
    """A .ply of any program, by plyfile alone."""
    vertex = PlyData.read(str(path))["vertex"]

    def columns(*names: str) -> np.ndarray:
        return np.stack([vertex[name] for name in names], axis=1)

    return Seen.of_raw(
        columns("x", "y", "z"),
        columns("rot_0", "rot_1", "rot_2", "rot_3"),
        columns("scale_0", "scale_1", "scale_2"),
        vertex["opacity"],
        columns("f_dc_0", "f_dc_1", "f_dc_2"),
    )


# --------------------------------------------------------------------------------------------------------------- the programs


Jobs = list[tuple[str, Path]]  # formats and paths


class Refused(Exception):
    """A program's own line about a file that it does not read or write."""


class Program(NamedTuple):
    """A program that is installed here.

    `read` takes (format, path) pairs and a folder for what it makes on the way, and gives what it saw of each, or how it refused.
    `write` takes (format, path) pairs to be written, our Y-down .ply and the object in the same axes, and gives how it refused or None.
    """

    name: str
    version: str
    read: Callable[[Jobs, Path], list[Seen | Refused]]
    write: Callable[[Jobs, Path, Gaussians], list[Refused | None]]


def written_name(program: str, format: str) -> str:
    """The file that a program makes of a format: "splat-transform-3.spz" of ".spz 3"."""
    version = format.partition(" ")[2]
    return f"{program.strip('@').replace('/', '-')}{version and '-' + version}{suffix_of(format)}"


def _each(function: Callable, jobs: Jobs) -> list:
    """What the function gives for each job, or how it refused."""
    results = []
    for format, path in jobs:
        try:
            results.append(function(format, path))
        except Exception as error:
            results.append(Refused(_one_line(error)))
    return results


def _one_line(error: object) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Libraries in C write to the file descriptors themselves."""
    sys.stdout.flush()
    saved = [(number, os.dup(number)) for number in (1, 2)]
    with open(os.devnull, "wb") as nothing:
        try:
            for number, _ in saved:
                os.dup2(nothing.fileno(), number)
            yield
        finally:
            for number, copy in saved:
                os.dup2(copy, number)
                os.close(copy)


def gsply() -> Program:
    import gsply as library

    def read(jobs: Jobs, folder: Path) -> list[Seen | Refused]:
        def one(format: str, path: Path) -> Seen:
            data = library.plyread(path) if format == ".ply" else library.read_spz(path)
            return Seen.of_raw(data.means, data.quats, data.scales, data.opacities, data.sh0)

        return _each(one, jobs)

    def write(jobs: Jobs, source: Path, _: Gaussians) -> list[Refused | None]:
        def one(format: str, path: Path) -> None:
            data = library.plyread(source)
            if suffix_of(format) == ".spz":
                library.write_spz(path, data, version=int(format[-1]))
            else:
                library.plywrite(str(path), data, compressed=format == ".compressed.ply")

        return _each(one, jobs)

    return Program("gsply", library.__version__, read, write)


def gaussforge() -> Program:
    import gaussforge as library

    def convert(content: bytes, source: str, target: str, version: int = 3) -> bytes:
        with _silent():
            result = library.GaussForge().convert(content, source, target, spz_version=version)
        if "error" in result:
            raise Refused(result["error"])
        return result["data"]

    def read(jobs: Jobs, folder: Path) -> list[Seen | Refused]:
        def one(format: str, path: Path) -> Seen:
            made = folder / f"gaussforge-{path.name}.ply"
            made.write_bytes(convert(path.read_bytes(), suffix_of(format)[1:], "ply"))
            return read_ply(made)

        return _each(one, jobs)

    def write(jobs: Jobs, source: Path, _: Gaussians) -> list[Refused | None]:
        def one(format: str, path: Path) -> None:
            version = int(format[-1]) if suffix_of(format) == ".spz" else 3
            path.write_bytes(convert(source.read_bytes(), "ply", suffix_of(format)[1:], version))

        return _each(one, jobs)

    return Program("gaussforge", library.__version__, read, write)


def node_version(name: str, folder: Path = FOLDER) -> str:
    return json.loads((folder / "node_modules" / name / "package.json").read_text(encoding="utf-8"))["version"]


def run_splat_transform(*arguments: str | Path, folder: Path = FOLDER) -> None:
    """Its command line, without a graphics card, which none of our conversions needs."""
    command = folder / "node_modules" / "@playcanvas" / "splat-transform" / "bin" / "cli.mjs"
    done = subprocess.run(["node", command, "-q", "-w", "-g", "cpu", *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise Refused(_one_line(done.stderr or done.stdout or f"exit status {done.returncode}"))


def splat_transform(folder: Path = FOLDER) -> Program:
    run = functools.partial(run_splat_transform, folder=folder)

    def read(jobs: Jobs, made: Path) -> list[Seen | Refused]:
        def one(_: str, path: Path) -> Seen:
            target = made / f"splat-transform-{path.name}.ply"
            run(path, target)
            return read_ply(target)

        return _each(one, jobs)

    def write(jobs: Jobs, source: Path, _: Gaussians) -> list[Refused | None]:
        return _each(lambda format, path: run(*(["--spz-version", format[-1]] if path.suffix == ".spz" else []), source, path), jobs)

    return Program("splat-transform", node_version("@playcanvas/splat-transform", folder), read, write)


def ask_node(jobs: list[dict], folder: Path = FOLDER) -> list[dict]:
    """The answers of tests/interop/programs.mjs to jobs, which it describes."""
    script = folder / "programs.mjs"
    # A module finds its libraries from where it lies.
    shutil.copyfile(SOURCE / "programs.mjs", script)
    done = subprocess.run(["node", script], input=json.dumps(jobs), capture_output=True, text=True)
    if done.returncode:
        raise SetupError(f"{script} ended with status {done.returncode}: {_one_line(done.stderr)}")
    return json.loads(done.stdout)


def cloud_of(gaussians: Gaussians) -> dict[str, list[float]]:
    """The numbers of some Gaussians as Niantic's library takes them, see tests/interop/programs.mjs."""
    values = {
        "positions": gaussians.means,
        "rotations": gaussians.quaternions.roll(-1, dims=1),
        "scales": gaussians.scales.log(),
        "alphas": gaussians.opacities.logit(),
        "colors": (gaussians.colors - 0.5) / SH_C0,
    }
    return {name: value.reshape(-1).tolist() for name, value in values.items()}


def _seen_of_answer(answer: dict) -> Seen | Refused:
    if "error" in answer:
        return Refused(answer["error"])
    cloud = answer["cloud"]
    means, xyzw, scales, colors = (
        np.reshape(cloud[name], (-1, n)) for name, n in zip(("positions", "rotations", "scales", "colors"), (3, 4, 3, 3), strict=True)
    )
    make = Seen.of if cloud.get("activated") else Seen.of_raw
    return make(means, np.roll(xyzw, 1, axis=1), scales, cloud["alphas"], colors)


def library_of_npm(name: str, folder: Path = FOLDER) -> Program:
    """One of the libraries that tests/interop/programs.mjs knows."""

    def read(jobs: Jobs, made: Path) -> list[Seen | Refused]:
        return [
            _seen_of_answer(a) for a in ask_node([{"program": name, "do": "read", "path": str(p), "format": f} for f, p in jobs], folder)
        ]

    def write(jobs: Jobs, source: Path, gaussians: Gaussians) -> list[Refused | None]:
        common = {"program": name, "do": "write", "source": str(source), "cloud": cloud_of(gaussians)}
        answers = ask_node([common | {"path": str(path), "format": format} for format, path in jobs], folder)
        return [Refused(answer["error"]) if "error" in answer else None for answer in answers]

    return Program(name, node_version(name, folder), read, write)


def blender() -> Program:
    import bpy

    def empty() -> None:
        bpy.ops.wm.read_homefile(use_empty=True, use_factory_startup=True)

    def read(jobs: Jobs, folder: Path) -> list[Seen | Refused]:
        def one(_: str, path: Path) -> Seen:
            with _silent():
                empty()
                bpy.ops.wm.ply_import(filepath=str(path))
            (thing,) = bpy.data.objects
            return seen_of_mesh(thing)

        return _each(one, jobs)

    def write(jobs: Jobs, source: Path, _: Gaussians) -> list[Refused | None]:
        def one(format: str, path: Path) -> None:
            with _silent():
                empty()
                bpy.ops.wm.ply_import(filepath=str(source))
                bpy.ops.wm.ply_export(filepath=str(path), export_attributes=True)

        return _each(one, jobs)

    return Program("Blender", bpy.app.version_string, read, write)


def seen_of_mesh(thing) -> Seen:
    """What Blender's own import made of a .ply: vertices in world space, the rest in attributes of their names."""
    mesh, matrix = thing.data, np.array(thing.matrix_world)

    def columns(*names: str) -> np.ndarray:
        if missing := [name for name in names if name not in mesh.attributes]:
            raise Refused(f"no attribute {', '.join(missing)}")
        values = np.empty((len(names), len(mesh.vertices)), dtype=np.float32)
        for row, name in zip(values, names, strict=True):
            mesh.attributes[name].data.foreach_get("value", row)
        return values.T

    means = np.empty((len(mesh.vertices), 3), dtype=np.float32)
    mesh.vertices.foreach_get("co", means.reshape(-1))
    return Seen.of_raw(
        means @ matrix[:3, :3].T + matrix[:3, 3],
        columns("rot_0", "rot_1", "rot_2", "rot_3"),
        columns("scale_0", "scale_1", "scale_2"),
        columns("opacity"),
        columns("f_dc_0", "f_dc_1", "f_dc_2"),
    )


IN_PYTHON = {"gsply": gsply, "gaussforge": gaussforge, "bpy": blender}  # by what is imported


def of_npm(folder: Path = FOLDER) -> list[Program]:
    return [splat_transform(folder), *(library_of_npm(name, folder) for name in ("spz-js", "@spz-loader/core", "@adobe/spz"))]


# ---------------------------------------------------------------------------------------------------------------- comparisons


@dataclass(frozen=True)
class Result:
    """One direction of one format: `word` is "yes", "no" or "WRONG", and what was found."""

    word: str
    deviation: Deviation | None = None
    axes: str = ""
    remark: str = ""

    @property
    def failed(self) -> bool:
        return self.word == "WRONG"


def judge(found: Sequence[tuple[str, Deviation]], axes: str, limits: Deviation) -> Result:
    """The result of comparisons that must all find the axes `axes` and stay within the limits."""
    deviation = largest([deviation for _, deviation in found])
    seen = list(dict.fromkeys(name for name, _ in found))
    if seen == [axes] and deviation.within(limits):
        return Result("yes", deviation, axes)
    other = [name for name in seen if name != axes]
    turned = f"axes {other[0]}{f' and {len(other) - 1} others' if other[1:] else ''} instead of {axes}; " if other else ""
    return Result("WRONG", deviation, remark=f"{turned}{deviation}; allowed: {limits}")


def their_reading(program: Program, gaussians: Gaussians, ours: dict[tuple[str, str], Path], made: Path) -> dict[str, Result]:
    """By format, what the program saw in our files of the object in all axes."""
    reads, cannot = READS[program.name], CANNOT.get(program.name, ())
    jobs = [(format, up) for format, up in ours if format in reads or format in cannot]
    answers = dict(zip(jobs, program.read([(format, ours[format, up]) for format, up in jobs], made), strict=True))
    expected = Seen.of_gaussians(gaussians)
    results = {}
    for format in dict.fromkeys(format for format, _ in jobs):
        of_format = {up: answers[format, up] for up in FILE_AXES}
        refused = [answer for answer in of_format.values() if isinstance(answer, Refused)]
        if refused:
            results[format] = Result("no" if format in cannot else "WRONG", remark=f'"{refused[0]}"')
            continue
        found = [compare(seen, expected.turned(FILE_AXES[up])) for up, seen in of_format.items()]
        # A program that has learnt a version of .spz in the meantime will treat it as the one that it knew.
        axes, limits = reads[format] if format in reads else (reads[".spz 2"][0], OURS[format])
        results[format] = judge(found, axes, limits)
    return results


def our_reading(path: Path, gaussians: Gaussians, axes: str, limits: Deviation) -> Result:
    """What we read in a file that a program made of the object in Y-down axes."""
    expected = Seen.of_gaussians(gaussians)
    try:
        seen = Seen.of_gaussians(load(path, up="Z"))
        upright = Seen.of_gaussians(load(path, up=UP_OF_THEIRS[axes]))
    except InputError as error:
        return Result("WRONG", remark=f'we do not read it: "{_one_line(error).replace(f"{path} ", "")}"')
    result = judge([compare(seen, expected.turned(FILE_AXES["-Y"]))], axes, limits)
    # The user's way: the axes chosen, the object stands as it was.
    again = judge([compare(upright, expected)], KEPT, limits)
    return again if again.failed and not result.failed else result


def write_theirs(program: Program, gaussians: Gaussians, folder: Path) -> dict[str, Path | Refused]:
    """By format, the file that the program made of our Y-down .ply."""
    source = folder / "source.ply"
    save(gaussians, source, up="-Y")
    turned = load(source, up="Z").to(torch.float64)
    jobs = [(format, folder / written_name(program.name, format)) for format in WRITES.get(program.name, ())]
    answers = program.write(jobs, source, turned) if jobs else []
    return {format: path if answer is None else answer for (format, path), answer in zip(jobs, answers, strict=True)}


def our_readings(program: Program, gaussians: Gaussians, folder: Path) -> dict[str, Result]:
    """By format, what we read in files that the program wrote."""
    results = {}
    for format, path in write_theirs(program, gaussians, folder).items():
        if isinstance(path, Refused):
            results[format] = Result("WRONG", remark=f'does not write it: "{path}"')
        else:
            results[format] = our_reading(path, gaussians, *WRITES[program.name][format])
    return results


# Adobe's record that names the axes of an .spz: Niantic's names, of which the second eight swap Y and Z.
STATED = "LDB RDB LUB RUB LDF RDF LUF RUF LFD RFD LFU RFU LBD RBD LBU RBU".split()


def stated_name(version: int, axes: str) -> str:
    """The file that Adobe's library makes in axes that it states."""
    return f"adobe-spz-{version}-{axes}.spz"


def write_stated(gaussians: Gaussians, folder: Path, version: int, axes: Sequence[str] = STATED, node: Path = FOLDER) -> dict[str, Path]:
    """Files of Adobe's library of the object in Y-down axes, each stored in and stating one of the axes."""
    source = folder / "source.ply"
    save(gaussians, source, up="-Y")
    cloud = cloud_of(load(source, up="Z").to(torch.float64))
    paths = {name: folder / stated_name(version, name) for name in axes}
    common = {"program": "@adobe/spz", "do": "write", "format": f".spz {version}", "cloud": cloud}
    answers = ask_node([common | {"axes": name, "path": str(path)} for name, path in paths.items()], node)
    if errors := [answer["error"] for answer in answers if "error" in answer]:
        raise SetupError(f"@adobe/spz did not write .spz {version} with axes stated: {errors[0]}")
    return paths


def stated_axes(version: int, gaussians: Gaussians, folder: Path, node: Path = FOLDER) -> Result:
    """What we read in .spz files that state their axes: the object upright, or a refusal, never anything else."""
    found, refusals = [], []
    for name, path in write_stated(gaussians, folder, version, node=node).items():
        try:
            seen = Seen.of_gaussians(load(path, up="-Y"))
        except InputError as error:
            refusals.append((name, _one_line(error).replace(f"{path} ", "")))
            continue
        found.append(compare(seen, Seen.of_gaussians(gaussians)))
    if not found:
        return Result("no", remark=f'we refuse all: "{refusals[0][1]}"')
    result = judge(found, KEPT, _THEIR_SPZ_2 if version == 2 else _THEIR_SPZ)
    if result.failed or not refusals:
        return result
    named = f'we refuse {len(refusals)} of {len(STATED)}, {refusals[0][0]} first: "{refusals[0][1]}"'
    return Result("yes", result.deviation, result.axes, named)


# -------------------------------------------------------------------------------------------------------------- installation


def make_node_folder(folder: Path = FOLDER, source: Path = SOURCE) -> Path:
    """Install what tests/interop/package.json names, or leave it alone where it is there and whole.

    Raises:
        SetupError: node or npm is missing, too old, or did not install; one clear line.
    """
    digest = node_digest(source)
    stamp = folder / ".stamp"
    for name, oldest in OLDEST.items():
        if shutil.which(name) is None:
            raise SetupError(f"{name} was not found: install Node.js {OLDEST['node']} or newer (Debian: sudo apt-get install nodejs npm)")
        text = subprocess.run([name, "--version"], stdin=subprocess.DEVNULL, capture_output=True, text=True).stdout.strip()
        major = re.match(r"v?(\d+)\.", text)
        if major is None or int(major[1]) < oldest:
            raise SetupError(f"{name} {oldest} or newer is needed, but this is {text or 'of no version'}: install a newer Node.js")
    if stamp.exists() and stamp.read_text() == digest:
        return folder
    say("what tests/interop/package-lock.json names (220 MB)")
    folder.mkdir(exist_ok=True)
    stamp.unlink(missing_ok=True)
    for name in ("package.json", "package-lock.json"):
        shutil.copyfile(source / name, folder / name)
    # Nothing that is installed may run by itself.
    done = subprocess.run(
        ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"], cwd=folder, capture_output=True, text=True
    )
    if done.returncode:
        print(done.stdout + done.stderr, file=sys.stderr, end="")
        raise SetupError(
            f"npm could not install them (exit status {done.returncode}): see the lines above, then run the same command again"
        )
    stamp.write_text(digest)
    return folder


def node_digest(source: Path = SOURCE) -> str:
    return hashlib.sha256(b"".join((source / name).read_bytes() for name in ("package.json", "package-lock.json"))).hexdigest()


def node_is_ready(folder: Path = FOLDER) -> bool:
    """Whether `make interop` has installed what package-lock.json names now."""
    stamp = folder / ".stamp"
    return shutil.which("node") is not None and stamp.exists() and stamp.read_text() == node_digest()


# --------------------------------------------------------------------------------------------------------------------- report


def rows(program: Program, theirs: dict[str, Result], ours: dict[str, Result]) -> Iterator[str]:
    """The lines of the table for a program: `theirs` is how it reads our files, `ours` how we read its."""
    for format in sorted({*theirs, *ours}):
        both = [results.get(format) for results in (theirs, ours)]
        words = [result.word if result else "" for result in both]
        numbers = [result.deviation for result in both if result and result.deviation]
        means, rotations = (" / ".join(f"{getattr(d, name):.1g}" for d in numbers) for name in ("means", "rotation"))
        spz = {KEPT: "turned as the format says", HALF: "copied as in a .ply"}
        axes = spz if ".spz" in format else {KEPT: "as they are"}
        found = ", ".join(dict.fromkeys(axes.get(result.axes, result.axes) for result in both if result and result.axes))
        remarks = "; ".join(dict.fromkeys([NOTES.get(program.name, ""), *(result.remark for result in both if result)])).strip("; ")
        yield f"| {program.name} {program.version} | `{format}` | {' | '.join(words)} | {found} | {means} | {rotations} | {remarks} |"


HEAD = (
    "| program | format | reads ours | we read theirs | axes | largest deviation of means | of rotations, in degrees | remarks |\n"
    "|---|---|---|---|---|---|---|---|"
)


def report(programs: Sequence[Program], folder: Path, node: Path | None, count: int = 300) -> tuple[str, int]:
    """The table, and how many of its cells are wrong."""
    gaussians = known_object(count)
    ours = write_ours(gaussians, folder)
    lines, wrong = [HEAD], 0
    for program in programs:
        made = folder / written_name(program.name, "")
        made.mkdir(exist_ok=True)
        theirs, read = their_reading(program, gaussians, ours, made), our_readings(program, gaussians, made)
        if program.name == "@adobe/spz" and node:
            read |= {f".spz {version}, axes stated": stated_axes(version, gaussians, made, node) for version in (2, 3, 4)}
        lines += rows(program, theirs, read)
        wrong += sum(result.failed for result in (*theirs.values(), *read.values()))
    return "\n".join(lines), wrong


# Small files for the tests to read where nothing is installed: not of gsply and Blender, which always are.
FROZEN_PROGRAMS = ("gaussforge", "splat-transform", "spz-js", "@adobe/spz")
FROZEN_STATED = ((4, "LUF"), (4, "RFU"), (3, "LUF"))


def freeze(programs: Sequence[Program], folder: Path, node: Path) -> None:
    """Write the small files of tests/data/interop anew; README.md there says what they are."""
    gaussians = known_object()
    for program in programs:
        for format, path in write_theirs(program, gaussians, folder).items():
            if isinstance(path, Refused):
                raise SetupError(f"{program.name} did not write {format}: {path}")
    for version, axes in FROZEN_STATED:
        write_stated(gaussians, folder, version, [axes], node)
    (folder / "source.ply").unlink()
    print(f"{folder}: " + ", ".join(sorted(path.name for path in folder.iterdir())))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="leave every file that was exchanged there")
    parser.add_argument("--freeze", type=Path, metavar="FOLDER", help="write the small files of tests/data/interop there instead")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gaussian-atlas-interop-") as temporary, warnings.catch_warnings():
        os.environ["BLENDER_USER_RESOURCES"] = temporary  # before bpy is loaded: nobody's own settings
        warnings.simplefilter("error", UserWarning)  # nothing in these files is left out or dropped
        folder = arguments.freeze or arguments.keep or Path(temporary) / "files"
        folder.mkdir(parents=True, exist_ok=True)
        try:
            node = make_node_folder()
            programs = [make() for name, make in IN_PYTHON.items() if importlib.util.find_spec(name)] + of_npm(node)
            if arguments.freeze:
                freeze([program for program in programs if program.name in FROZEN_PROGRAMS], folder, node)
                return 0
            table, wrong = report(programs, folder, node)
        except SetupError as error:
            print(f"make interop: {error}", file=sys.stderr)
            return 1
    print(table)
    for name in IN_PYTHON:
        if importlib.util.find_spec(name) is None:
            print(f"\n{name} is not installed: left out")
    if wrong:
        print(f"\nmake interop: {wrong} cells are WRONG", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
