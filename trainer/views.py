"""Views of objects: colour, depth and normals from known cameras, one file per object, rendered in worker processes."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import math
import os
import sys
import tempfile
import time
import tokenize
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from generator.errors import InputError, WorkError
from generator.files import parse_json, replacing
from generator.render.cameras import FOV_DEGREES, RADIUS, Cameras
from generator.render.ewa import LOW_PASS

from .farm import for_each
from .farm import read_records as read_journal
from .sources import SourceObject, extract
from .sources.objects import ARCHIVE_ERRORS

RECORDS = "views.jsonl"
SETTINGS = "views.json"
RIGS = ("sphere", "g_objaverse")
_ARRAYS = ("id.npy", "rgba.npy", "depth.npy", "normals.npy", "split.npy", "viewmats.npy", "Ks.npy")
_MOST_BYTES = 2 * 2**30  # of one object's views: 200 of 1024 pixels
_AIR = 1.04  # of the distance at which an object would touch the frame
_REACH = 0.65  # object lengths from the centre to the farthest vertex, where no object is at hand


@dataclass(frozen=True)
class ViewSettings:
    """What every object of a folder is rendered with."""

    train: int = 24  # cameras over the whole sphere, to fit from; more see more of deep folds, and cost in proportion
    held_out: int = 4  # cameras on a ring 20 degrees up, to judge by; never fitted
    size: int = 128  # pixels, image side
    samples: int = 16  # paths per pixel; noise falls with its root, time grows in proportion
    rig: str = "sphere"  # cameras all round at one distance, or "g_objaverse": two rings, top and bottom, the object filling the frame

    def __post_init__(self) -> None:
        if self.rig not in RIGS:
            raise InputError(f"rig must be one of {', '.join(RIGS)}, got {self.rig!r}")
        if self.rig != "sphere" and self.train + self.held_out < 6:
            raise InputError(f"rig {self.rig} needs 6 cameras or more, got train {self.train} and held_out {self.held_out}")
        for name, least in (("train", 1), ("held_out", 0), ("size", 8), ("samples", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, got {getattr(self, name)}")

    @property
    def low_pass(self) -> float:
        """Standard deviation of the renderers' low-pass at the object's distance, in object units."""
        cameras, _ = self.cameras()
        return math.sqrt(LOW_PASS) * float(cameras.positions[0].norm() / cameras.Ks[0, 0, 0])

    def cameras(self, reach: float = _REACH) -> tuple[Cameras, np.ndarray]:
        """The cameras, and [V] which split each belongs to ("train" or "held_out").

        Args:
            reach: object lengths from the origin to the object's farthest vertex, which "g_objaverse" brings to the frame's edge.
        """
        if self.rig == "g_objaverse":
            return self._rings(reach)
        sets = [Cameras.around(self.train, self.size)]
        if self.held_out:
            sets.append(Cameras.orbit(self.held_out, self.size, radius=RADIUS))
        viewmats, Ks = torch.cat([s.viewmats for s in sets]), torch.cat([s.Ks for s in sets])
        split = np.array(["train"] * self.train + ["held_out"] * self.held_out)
        return Cameras(viewmats, Ks, self.size, self.size), split

    def _rings(self, reach: float) -> tuple[Cameras, np.ndarray]:
        """Cameras like those of G-Objaverse (Qiu et al. 2023): three fifths 5 to 30 degrees up, the others level, top and bottom."""
        count = self.train + self.held_out
        upper = round(0.6 * (count - 2))
        steps = torch.arange(count - 2)
        azimuths = 2 * math.pi * torch.cat([steps[:upper] / upper, (steps[upper:] - upper) / (count - 2 - upper)])
        # Each view of the upper ring has a height of its own, neighbours unlike ones.
        golden = (steps * (math.sqrt(5) - 1) / 2) % 1
        elevations = torch.deg2rad(torch.where(steps < upper, 5 + 25 * golden, torch.zeros(count - 2)))
        level = torch.cos(elevations)
        ring = torch.stack([torch.sin(azimuths) * level, -torch.cos(azimuths) * level, torch.sin(elevations)], dim=1)
        directions = torch.cat([ring, torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, -1.0]])])
        distance = _AIR * reach / math.sin(math.radians(FOV_DEGREES) / 2)
        split = np.full(count, "train", dtype="<U8")
        split[np.linspace(0, count - 3, self.held_out).round().astype(int)] = "held_out"
        return Cameras.look_at(distance * directions, self.size), split


@dataclass(frozen=True)
class Views:
    """One object seen from V cameras, in the object frame (Z up, front to -Y, centred, longest side 1)."""

    id: str
    rgba: np.ndarray  # [V, H, W, 4] uint8, display sRGB with straight alpha; empty pixels are all zero
    depth: np.ndarray  # [V, H, W] float16, camera-space z in object units; 0 where empty
    normals: np.ndarray  # [V, H, W, 3] int8, 127 x unit normal in the object frame, turned to the camera; 0 where empty
    cameras: Cameras
    split: np.ndarray  # [V] str, "train" or "held_out"

    def __post_init__(self) -> None:
        shape = (len(self.cameras), self.cameras.height, self.cameras.width)
        for name, extra, dtype in (("rgba", (4,), np.uint8), ("depth", (), np.float16), ("normals", (3,), np.int8)):
            value = getattr(self, name)
            if value.shape != shape + extra or value.dtype != dtype:
                raise InputError(f"Views.{name} must be {np.dtype(dtype)} {list(shape + extra)}, got {value.dtype} {list(value.shape)}")
        if self.split.shape != shape[:1] or not np.isin(self.split, ("train", "held_out")).all():
            raise InputError(f'Views.split must hold {shape[0]} of "train" or "held_out"')

    def __len__(self) -> int:
        return len(self.cameras)

    def select(self, split: str) -> Views:
        """The views of one split, "train" or "held_out"."""
        keep = np.flatnonzero(self.split == split)
        cameras = self.cameras[torch.from_numpy(keep)]
        return Views(self.id, self.rgba[keep], self.depth[keep], self.normals[keep], cameras, self.split[keep])

    def composite(self, background: tuple[float, float, float] = (1, 1, 1)) -> np.ndarray:
        """Images [V, H, W, 3] float32 in 0..1 over a background colour, blended in display space as splats are."""
        pixels = self.rgba.astype(np.float32) / 255
        alpha = pixels[..., 3:]
        return pixels[..., :3] * alpha + np.asarray(background, dtype=np.float32) * (1 - alpha)

    def save(self, path: str | Path) -> None:
        """Writes one compressed .npz; the file appears only when it is complete."""
        with replacing(path) as partial, open(partial, "wb") as file:
            np.savez_compressed(
                file,
                id=np.array(self.id),
                rgba=self.rgba,
                depth=self.depth,
                normals=self.normals,
                split=self.split,
                viewmats=self.cameras.viewmats.numpy(),
                Ks=self.cameras.Ks.numpy(),
            )

    @staticmethod
    def load(path: str | Path) -> Views:
        """Reads a file that `save` wrote.

        Raises:
            InputError: the file is missing or cannot be read, or (`DamagedViews`) it is damaged or something else.
        """
        path = Path(path)
        try:
            file = open(path, "rb")
        except FileNotFoundError as error:
            raise InputError(f"{path}: no such file") from error
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror or error}") from error
        try:
            with file, zipfile.ZipFile(file) as archive:
                data = _arrays(archive, path.stat().st_size)
            rgba = data["rgba"]
            cameras = Cameras(torch.from_numpy(data["viewmats"]), torch.from_numpy(data["Ks"]), rgba.shape[2], rgba.shape[1])
            return Views(str(data["id"]), rgba, data["depth"], data["normals"], cameras, data["split"])
        except MemoryError as error:
            raise InputError(f"{path}: its views need more memory than there is") from error
        # (SystemError is NumPy's of text that is none.)
        except (
            *ARCHIVE_ERRORS,
            ArithmeticError,
            LookupError,
            SyntaxError,
            SystemError,
            TypeError,
            ValueError,
            tokenize.TokenError,
        ) as error:
            reason = " ".join(str(error).split())[:200]
            raise DamagedViews(f"{path}: not a file of views ({reason}): delete it and render it again") from error


class DamagedViews(InputError):
    """A file of views that no second reading would make readable."""


def _arrays(archive: zipfile.ZipFile, most_packed: int) -> dict[str, np.ndarray]:
    """The arrays of an .npz. What is allocated is bounded by what entries and arrays are declared to hold, which is checked first."""
    wanted = {info.filename: info for info in archive.infolist() if info.filename in _ARRAYS}
    if sum(info.file_size for info in wanted.values()) > _MOST_BYTES:
        raise zipfile.BadZipFile(f"it unpacks to more than {_MOST_BYTES // 2**30} GiB")
    found = {}
    for name in _ARRAYS:
        info = wanted[name]
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.compress_size > most_packed:
            raise zipfile.BadZipFile(f"{name} is packed in an unknown way, or said to be larger than the file")
        with archive.open(info) as entry:
            # A number of bytes bounds what is unpacked; without one zipfile unpacks first and cuts afterwards.
            payload = bytearray(entry.read(info.file_size))
        stream = io.BytesIO(payload)
        version = np.lib.format.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"{name} is of an unknown version")
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, in_columns, dtype = read_header(stream)
        start = stream.tell()
        if dtype.hasobject or math.prod(shape) * dtype.itemsize != len(payload) - start:
            raise ValueError(f"{name} does not hold what its header says")
        found[name.removesuffix(".npy")] = np.frombuffer(payload, dtype, offset=start).reshape(shape, order="F" if in_columns else "C")
    return found


def import_blender() -> None:
    """Load Blender as a module, in a process that another one may have started."""
    if "bpy" not in sys.modules:
        # A parent that runs Blender hands on its search path; Blender's own folder of modules would hide the bpy package.
        sys.path[:] = [entry for entry in sys.path if not (Path(entry) / "_bpy_types.py").is_file()]
        importlib.import_module("bpy")


def render_object(source: SourceObject, settings: ViewSettings | None = None, threads: int = 1) -> Views:
    """Renders one object in this process; Blender's current file is replaced.

    Raises:
        InputError: the object cannot be read.
        WorkError: nothing of it can be seen, or Blender failed.
    """
    from . import scene

    settings = settings or ViewSettings()
    with tempfile.TemporaryDirectory(prefix="views-") as name, scene.quiet():
        directory = Path(name)
        mesh = extract(source, directory / "mesh")
        rotation = None if source.rotation is None else np.array(source.rotation)
        reach = scene.load_object(mesh, up=source.up, rotation=rotation, size=source.size)
        cameras, split = settings.cameras(reach)
        linear, depth, normals = scene.render_cameras(cameras, directory, settings.samples, threads)
    if not (linear[..., 3] > 0.5).any():
        raise WorkError(f"{source.id}: nothing of it shows in any view")
    normals = np.round(normals * 127).astype(np.int8)
    return Views(source.id, scene.straight_srgb(linear), depth.astype(np.float16), normals, cameras, split)


def render_objects(
    objects: Iterable[SourceObject],
    directory: str | Path,
    settings: ViewSettings | None = None,
    *,
    workers: int = 2,
    timeout: float = 600.0,
    progress: bool = True,
    address: str = "",
) -> list[dict]:
    """Renders objects into `directory`: <id>.npz each, and views.jsonl with one record an object.

    Objects that already have their file are skipped, so a stopped run goes on where it was. An object that fails, hangs
    or takes Blender down is recorded with the reason and tried again by the next run; the others are not affected.

    Args:
        workers: processes that render at the same time, one core each; 0 for every core.
        timeout: seconds that one object may take.
        address: of a Ray cluster, as `farm.for_each` takes it; "" for processes of this machine.

    Returns:
        The records in the order of `objects`: SourceObject.record() plus "status" ("ok" or "failed"), "reason" and "seconds".

    Raises:
        InputError: two objects share an id, or the folder was rendered with other settings.
        WorkError: Blender as a module is missing, or the render processes cannot start.
    """
    settings = settings or ViewSettings()
    directory = Path(directory)
    objects = list(objects)
    if len({source.id for source in objects}) != len(objects):
        raise InputError("objects: two of them share an id: give each source its own")
    if importlib.util.find_spec("bpy") is None:
        raise WorkError("rendering views needs Blender as a module: pip install bpy==5.0.1 (Python 3.11)")
    directory.mkdir(parents=True, exist_ok=True)
    _check_settings(directory, settings)
    records = {record["id"]: record for record in read_records(directory)}
    pending = [source for source in objects if not views_path(directory, source.id).is_file()]
    waiting = {source.id for source in pending}
    for source in objects:
        # Names and captions follow the source even where the pixels are already there.
        if source.id not in waiting:
            seconds = records.get(source.id, {}).get("seconds", 0.0)
            records[source.id] = {**source.record(), "status": "ok", "reason": "", "seconds": seconds}
    _write_records(directory, records.values())
    by_id = {source.id: source for source in pending}
    with open(directory / RECORDS, "a", encoding="utf-8") as journal:

        def note(outcome: dict) -> None:
            source = by_id[outcome["id"]]
            record = {
                **source.record(),
                "status": outcome["status"],
                "reason": outcome["reason"],
                "seconds": outcome["seconds"].get("views", 0.0),
            }
            records[source.id] = record
            journal.write(json.dumps(record, ensure_ascii=False) + "\n")
            journal.flush()

        # Workers may start elsewhere.
        place = Path(os.path.abspath(directory))
        items = [(s.id, dataclasses.replace(s, path=Path(os.path.abspath(s.path))), settings, place) for s in pending]
        for_each(_render_one, items, workers, "views", progress, observe=note, address=address, limit=timeout)
    order = [source.id for source in objects]
    _write_records(directory, [records[i] for i in order] + [r for i, r in records.items() if i not in set(order)])
    return [records[i] for i in order]


def views_path(directory: str | Path, identifier: str) -> Path:
    """Where the views of one object lie."""
    return Path(directory) / f"{identifier}.npz"


def read_records(directory: str | Path) -> list[dict]:
    """The records of a folder of views; the last one of an id counts, and a line cut short by a crash is left out."""
    return read_journal(Path(directory) / RECORDS)


def select_records(directory: str | Path, identifiers: Iterable[str]) -> None:
    """Note which objects of a folder are to be learned: those given, and what was imported. What was rendered before stays there."""
    chosen = set(identifiers)
    kept = [{**record, "selected": record["id"] in chosen or bool(record.get("imported"))} for record in read_records(directory)]
    _write_records(Path(directory), kept)


def deselected(directory: str | Path) -> set[str]:
    """The ids of a folder that the last `select_records` left out."""
    return {record["id"] for record in read_records(directory) if record.get("selected") is False}


def add_records(directory: str | Path, records: Iterable[dict]) -> None:
    """Records of views that were not rendered here, beside those in the folder; of an id the new one counts."""
    imported = [{**record, "imported": True} for record in records]
    merged = {record["id"]: record for record in [*read_records(directory), *imported]}
    _write_records(Path(directory), merged.values())


def _write_records(directory: Path, records: Iterable[dict]) -> None:
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    _write_text(directory / RECORDS, text)


def _write_text(path: Path, text: str) -> None:
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _check_settings(directory: Path, settings: ViewSettings) -> None:
    path = directory / SETTINGS
    wanted = dataclasses.asdict(settings)
    if path.is_file():
        try:
            # Folders from before a setting existed were rendered with its default.
            found = {**dataclasses.asdict(ViewSettings()), **parse_json(path.read_text(encoding="utf-8"))}
        except (TypeError, ValueError) as error:
            raise InputError(f"{path}: not readable as JSON ({error}): delete the folder and render again") from error
        if found != wanted:
            raise InputError(f"{directory}: rendered with other settings ({found}): choose another folder or delete this one")
    else:
        _write_text(path, json.dumps(wanted, indent=1) + "\n")


def _render_one(_identifier: str, source: SourceObject, settings: ViewSettings, directory: Path) -> dict:
    torch.set_num_threads(1)
    import_blender()
    start = time.perf_counter()
    render_object(source, settings).save(views_path(directory, source.id))
    return {"seconds": {"views": round(time.perf_counter() - start, 2)}}
