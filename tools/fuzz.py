"""Mutated files for every reader: each must be read or refused with one line, in bounded time and memory, and never crash.

    python tools/fuzz.py [READER ...] [--count 100000] [--seed 0] [--keep FOLDER]

Starts from valid files of every kind, flips, cuts, repeats and swaps bytes, enlarges numbers, and mixes files; where a format is
compressed, half of the mutations go to what is inside and are compressed again, or checksums would stop them all. The readers run in
a process of their own, so that one that dies is found, named by its file, and the rest goes on. Prints a table; exits 1 if anything failed.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import importlib
import io
import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import types
import warnings
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SECONDS = 10  # a file may take
MEMORY = 2**30  # bytes that reading a file of some kilobytes may add to the process
_NUMBERS = (b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x00\x00\x00\x80", b"\x00\x00\x00\x00", b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f")
_WORDS = (b"-1", b"0", b"99999999999", b"1e999", b"nan", b"null", b"[]", b"{}", b'""', b"../x", b"/etc/passwd", b"\\u0000", b"true")


@dataclass(frozen=True)
class Reader:
    """A kind of file: valid examples, and what reads one in a folder of its own."""

    suffix: str
    seeds: list[bytes]
    read: Callable[[Path], object]
    inside: tuple[Callable[[bytes], object], Callable[[object, bytes], bytes]] | None = None  # unpack, pack again
    name: str = ""  # of the file; "" for any
    isolated: bool = False  # read in a process of its own by the program too, which takes its end for an error


@dataclass
class Found:
    """What became of the files of one reader."""

    files: int = 0
    read: int = 0
    refused: int = 0
    ended: int = 0  # processes that ended, where the program has one for each
    slowest: float = 0.0
    failures: list[tuple[int, str]] = field(default_factory=list)  # index and last line


def mutate(payload: bytes, others: list[bytes], chance: random.Random) -> bytes:
    """One to eight changes."""
    data = bytearray(payload)
    for _ in range(chance.choice((1, 1, 1, 2, 4, 8))):
        at = chance.randrange(len(data) + 1)
        # Headers are short and matter most.
        at = at if chance.random() < 0.5 else min(at, chance.randrange(200))
        length = chance.choice((1, 2, 4, 8, 64, 1024))
        match chance.randrange(9):
            case 0 if data:
                data[min(at, len(data) - 1)] ^= 1 << chance.randrange(8)
            case 1:
                data[at : at + 1] = bytes((chance.choice((0, 1, 127, 128, 255)),))
            case 2:
                data[at : at + 4] = chance.choice(_NUMBERS)
            case 3:
                del data[at : at + length]
            case 4:
                data[at:at] = data[at : at + length] * chance.choice((1, 2, 50))
            case 5:
                del data[at:]
            case 6:
                data[at : at + chance.choice((0, 1, 2))] = chance.choice(_WORDS)
            case 7:
                other = chance.choice(others)
                start = chance.randrange(len(other) + 1)
                data[at : at + length] = other[start : start + length]
            case _:
                data[at:at] = chance.randbytes(length)
    return bytes(data)


def mutated(reader: Reader, index: int, seed: int) -> bytes:
    """File `index` of a reader; the same whenever it is asked for."""
    chance = random.Random(f"{reader.suffix}{reader.name}{seed}:{index}")
    payload = chance.choice(reader.seeds)
    if reader.inside is None or chance.random() < 0.5:
        return mutate(payload, reader.seeds, chance)
    unpack, again = reader.inside
    parts = unpack(payload)
    if isinstance(parts, dict):
        name = chance.choice(sorted(parts))
        return again(parts | {name: mutate(parts[name], list(parts.values()), chance)}, payload)
    return again(mutate(parts, [parts], chance), payload)


def _unzip(payload: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(payload)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _unzip_if_whole(path: Path) -> dict[str, bytes] | None:
    """Half of what is zipped is damaged as a zip: that is no fault of a folder that was zipped for being fuzzed."""
    try:
        return _unzip(path.read_bytes())
    except (zipfile.BadZipFile, zlib.error, ValueError, OSError, NotImplementedError, EOFError, RuntimeError):
        return None


def _zip(parts: dict[str, bytes], _: bytes = b"") -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    return stream.getvalue()


def _bundle_of(parts: dict[str, bytes], folder: Path) -> Path:
    """A bundle whose list of files agrees with what is there in size, so that every part is looked into."""
    for name, content in parts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    try:
        info = json.loads(parts["bundle.json"])
        for name, entry in info["files"].items():
            if name in parts:
                entry["size"] = len(parts[name])
        (folder / "bundle.json").write_text(json.dumps(info))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass
    return folder


def readers(folder: Path) -> dict[str, Reader]:
    """Every reader with its valid files, which are made in `folder`."""
    import gsply
    import torch

    from generator.atlas import Atlas, AtlasLayout, ChannelSpec, Normalization
    from generator.formats import load, load_metadata, save
    from generator.gaussians import Gaussians
    from generator.model.bundle import load_bundle
    from generator.model.prior import AtlasPrior
    from generator.model.regression import TextRegression
    from tests.test_prior import SAMPLE, random_prior
    from tests.test_regression import regression_on, smooth_atlases
    from tests.test_sources import library
    from tests.tiny_bundle import layout, normalization, write_tiny_bundle
    from trainer.dataset import write_shards
    from trainer.evaluate.prompts import read_prompts
    from trainer.sources.folder import folder as open_folder
    from trainer.sources.sweet_home_3d import sweet_home_3d
    from trainer.training_data import ShardedAtlases

    generator = torch.Generator().manual_seed(0)
    count = 300
    gaussians = Gaussians(
        torch.rand(count, 3, generator=generator) - 0.5,
        torch.nn.functional.normalize(torch.randn(count, 4, generator=generator), dim=1),
        0.01 + 0.02 * torch.rand(count, 3, generator=generator),
        torch.rand(count, generator=generator),
        torch.rand(count, 3, generator=generator),
    )

    def splats(suffix: str, **options: object) -> bytes:
        path = folder / f"seed{suffix}"
        save(gaussians, path, **options)
        return path.read_bytes()

    def load_splats(path: Path) -> None:
        load_metadata(path)
        load(path)

    plain = splats(".ply", metadata={"prompt": "a chair"})
    gsply.plywrite(str(folder / "seed.compressed.ply"), gsply.plyread(folder / "seed.ply"), compressed=True)
    compressed = next(folder.glob("*.compressed.ply")).read_bytes()
    found = {
        "ply": Reader(".ply", [plain, compressed], load_splats),
        "splat": Reader(".splat", [splats(".splat")], load_splats),
        "spz": Reader(
            ".spz",
            [splats(".spz", spz_version=version) for version in (2, 3)],
            load_splats,
            (gzip.decompress, lambda data, _: gzip.compress(data, 1)),
        ),
        "spz 4": Reader(".spz", [splats(".spz", spz_version=4)], load_splats),
    }

    atlas = Atlas(torch.rand(16, 32, 32, generator=generator), layout().id, ChannelSpec())
    for name, value, kind in (
        ("normalization", normalization(), Normalization),
        ("layout", layout(), AtlasLayout),
        ("prior", random_prior(4), AtlasPrior),
        ("regression", regression_on(smooth_atlases(3, 8), ["a chair", "a lamp", "a car"], list("abc")), TextRegression),
    ):
        value.save(folder / name)
        found[name] = Reader(".safetensors", [(folder / name).read_bytes()], kind.load)
    write_shards([(f"o{i}", atlas, {"captions": ["a chair"], "object": f"o{i}"}) for i in range(3)], folder / "shards")
    (shard,) = (folder / "shards").glob("*.tar")

    def read_shard(path: Path) -> None:
        atlases = ShardedAtlases(path.parent, normalization())
        for index in range(len(atlases)):
            atlases[[index]]

    found["shards"] = Reader(".tar", [shard.read_bytes()], read_shard, name="atlases-000000.tar")

    bundle = write_tiny_bundle(folder / "bundle", scheduler_config=SAMPLE, prior=random_prior(32, layout().id))
    parts = {str(path.relative_to(bundle)): path.read_bytes() for path in bundle.rglob("*") if path.is_file()}

    def read_bundle(path: Path) -> None:
        if (own := _unzip_if_whole(path)) is None:
            return
        with tempfile.TemporaryDirectory() as place:
            known = {name: content for name, content in own.items() if name in parts}
            load_bundle(_bundle_of(parts | known, Path(place)), verify=False).load_unet()

    found["bundle"] = Reader(".zip", [_zip(parts)], read_bundle, (_unzip, _zip))

    found["sh3f"] = Reader(".sh3f", [library(folder / "seed.sh3f").read_bytes()], sweet_home_3d, (_unzip, _zip))
    rows = [{"file": "a.obj", "caption": "a chair", "licence": "CC0"}, {"file": "b.obj", "caption": ["a lamp", "a red lamp"]}]
    captions = {
        "captions.csv": b'file,caption,licence\na.obj,a chair,CC0\n"b.obj","a ""red"" lamp",CC0\n',
        "captions.json": json.dumps(rows).encode(),
        "captions.jsonl": b"\n".join(json.dumps(row).encode() for row in rows),
    }

    def read_captions(path: Path) -> None:
        for mesh in ("a.obj", "b.obj"):
            (path.parent / mesh).touch()
        open_folder(path.parent)

    for name, content in captions.items():
        found[name] = Reader(Path(name).suffix, [content], read_captions, name=name)
    found["prompts"] = Reader(".txt", ["a red chair\n# none\n\na lamp\u00e9\n".encode()], read_prompts)
    return found | _of_training(folder, plain) | _of_meshes(folder)


def _of_training(folder: Path, splats: bytes) -> dict[str, Reader]:
    """Readers of what a run takes in from others, or from its earlier self."""
    from dataclasses import replace

    import torch

    from tests.test_finetune import CONFIG, data
    from tests.test_g_objaverse import write_object
    from tests.test_models import make, pack
    from tests.test_views import _views
    from trainer.evaluate import blind
    from trainer.evaluate.judge import HEADS, Judge
    from trainer.finetune import Trainer
    from trainer.sources.g_objaverse import read_views
    from trainer.sources.gaussian_verse import read_captions, read_fit
    from trainer.views import Views

    _views().save(folder / "views.npz")
    found = {"views": Reader(".npz", [(folder / "views.npz").read_bytes()], Views.load, (_unzip, _zip))}
    found["fit"] = Reader(".ply", [splats], lambda path: (read_fit(path), read_fit(path, "y")), name="point_cloud.ply")
    names = b'uid,caption\n1a,"a chair, with arms"\n1a,a seat\n2b,a lamp\n'
    texts = {"1871/1a": "a chair", "1923/2b": ["a lamp", "a light."]}
    found["fits.csv"] = Reader(".csv", [names], read_captions, name="fits.csv")
    found["fits.json"] = Reader(".json", [json.dumps(texts).encode()], read_captions, name="fits.json")

    write_object(folder / "renders", views=1)
    (renders,) = (folder / "renders").glob("*/00000")

    def read_render(path: Path) -> None:
        whole = path.parent / "whole" / "00000"
        shutil.copytree(renders, whole)
        shutil.copy(path, whole / path.name)
        read_views(whole.parent, "o", 64)

    for kind, name in (("camera", "00000.json"), ("picture", "00000.png"), ("depth", "00000_nd.exr")):
        found[kind] = Reader(Path(name).suffix, [(renders / name).read_bytes()], read_render, name=name)

    key = {"format": blind._FORMAT, "page": "0123456789abcdef", "methods": ["one", "two"], "prompts": ["a chair", "a lamp"], "left": [0, 1]}
    votes = [{"pair": 0, "choice": "left"}, {"pair": 1, "choice": "same"}]
    for name, content in (("key", key), ("votes", {"page": key["page"], "voter": "12ab", "votes": votes})):
        (folder / f"{name}.json").write_text(json.dumps(content))
    both = (folder / "key.json", folder / "votes.json")
    found["key"] = Reader(".json", [both[0].read_bytes()], lambda path: blind.text(blind.count(path, [both[1]])), name="key.json")
    found["votes"] = Reader(".json", [both[1].read_bytes()], lambda path: blind.text(blind.count(both[0], [path])), name="votes.json")

    judged = [torch.rand(8), torch.rand(8), torch.rand(HEADS, 8, 4), torch.rand(HEADS, 4), torch.rand(4)]
    Judge(*judged, ("a chair",), {"objects": 1}).save(folder / "judge")
    found["judge"] = Reader(".safetensors", [(folder / "judge").read_bytes()], Judge.load, name="judge.safetensors")

    small = {**CONFIG.unet, "block_out_channels": (8, 8), "norm_num_groups": 4}
    trainer = Trainer(replace(CONFIG, unet=small, max_steps=1, checkpoint_every=1), data(), folder / "trained")
    with contextlib.redirect_stdout(io.StringIO()):
        list(trainer.run(progress=False))
    (checkpoint,) = (folder / "trained").glob("checkpoint-*")
    state = {path.name: path.read_bytes() for path in checkpoint.iterdir()}

    def read_checkpoint(path: Path) -> None:
        if (own := _unzip_if_whole(path)) is None:
            return
        for name, content in (state | {name: own[name] for name in own.keys() & state.keys()}).items():
            (path.parent / checkpoint.name).mkdir(exist_ok=True)
            (path.parent / checkpoint.name / name).write_bytes(content)
        trainer.directory = path.parent
        trainer.resume()

    found["checkpoint"] = Reader(".zip", [_zip(state)], read_checkpoint, (_unzip, _zip), name="checkpoint.zip")

    models, errors = _models()
    model = pack(make(folder / "model", {"unet/config.json": b"{}", "CREDITS.md": b"all of them"}), folder / "model.zip").read_bytes()

    def install(path: Path) -> None:
        from generator.errors import InputError

        try:
            models.install(str(path), path.parent / "models", lambda *_: None, threading.Event())
        except errors.InputError as error:
            raise InputError(str(error)) from error

    found["model"] = Reader(".zip", [model], install, (_unzip, _zip), name="model.zip")
    return found


def _models() -> tuple:
    """The extension's own reader of models and its errors, without what needs Blender beside it."""
    for name, place in (("fuzzed", ROOT), ("fuzzed.blender_addon", ROOT / "blender_addon")):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(place)]
    return importlib.import_module("fuzzed.blender_addon.models"), importlib.import_module("fuzzed.generator.errors")


def _of_meshes(folder: Path) -> dict[str, Reader]:
    """Readers of objects that are rendered: as they come out of a library, and by Blender."""
    import numpy as np
    from PIL import Image

    from generator import glb
    from trainer.sources import SourceObject, extract
    from trainer.sources.obj_parts import looks, read_surfaces

    vertices = np.array([[x, y, z] for x in (0.0, 1.0) for y in (0.0, 2.0) for z in (0.0, 0.5)])
    faces = np.array([[0, 1, 3], [0, 3, 2], [4, 6, 7], [4, 7, 5], [0, 4, 5], [0, 5, 1], [2, 3, 7], [2, 7, 6], [0, 2, 6], [0, 6, 4]])
    glb.write(folder / "box.glb", "box", vertices, faces, np.full((8, 3), 0.5))
    lines = [f"v {' '.join(map(str, vertex))}" for vertex in vertices]
    half = len(faces) // 2
    for name, part in (("Oak_top", faces[:half]), ("legs.metal", faces[half:])):
        lines += [f"usemtl {name}", *(f"f {a + 1}/1/1 {b - 8}//1 {c + 1}" for a, b, c in part)]
    picture = io.BytesIO()
    Image.new("RGB", (4, 4), (115, 71, 38)).save(picture, "png")
    box = {
        "a/box.obj": "\n".join(["mtllib box.mtl", "vt 0 0", "vn 0 0 1", *lines, ""]).encode(),
        "a/box.mtl": b"newmtl Oak_top\nKd 1 1 1\nmap_Kd -s 2 2 1 My Wood.png\nnewmtl legs.metal\nKd 0.1 0.1 0.1\nd 0.5\n",
        "a/my wood.png": picture.getvalue(),
    }

    def read_archive(path: Path) -> None:
        extract(SourceObject("box", "box", path, member="a/box.obj"), path.parent / "out")
        with zipfile.ZipFile(path) as archive:
            try:
                surfaces = read_surfaces(archive, "a/box.obj")
            except Exception:  # noqa: BLE001  (a library does without its materials, whatever is wrong with them)
                return
        looks("table", surfaces)

    def render(path: Path) -> None:
        from trainer import scene
        from trainer.views import import_blender

        import_blender()
        if path.suffix == ".zip":
            path = extract(SourceObject("box", "box", path, member="a/box.obj"), path.parent / "out")
        with scene.quiet():
            assert math.isfinite(scene.load_object(path))

    return {
        "obj": Reader(".zip", [_zip(box)], read_archive, (_unzip, _zip), name="obj.zip"),
        "obj in blender": Reader(".zip", [_zip(box)], render, (_unzip, _zip), name="scene.zip", isolated=True),
        "glb in blender": Reader(".glb", [(folder / "box.glb").read_bytes()], render, isolated=True),
        # Blender's reader of PLY ends its process at many a damaged header, and a new one takes half a minute.
    }


# In the process that reads ------------------------------------------------------------------------------------------


class Slow(BaseException):
    """A file took too long; no reader catches it."""


def work(name: str, start: int, count: int, seed: int, pipe: object) -> None:
    """Read files `start` to `count` of a reader, telling of each before and after."""
    warnings.simplefilter("ignore")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    from generator.errors import InputError

    def stop(*_: object) -> None:
        raise Slow

    signal.signal(signal.SIGALRM, stop)
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "seeds").mkdir()
        reader = readers(Path(place) / "seeds")[name]
        for payload in reader.seeds:  # what reading loads is loaded, and the examples are good
            read(reader, payload, Path(place))
        os.dup2(1, 2)  # libraries in C say there what they find
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        for index in range(start, count):
            payload = mutated(reader, index, seed)
            pipe.send((index, "begins", 0.0))
            began, outcome = time.perf_counter(), "read"
            try:
                signal.alarm(SECONDS)
                read(reader, payload, Path(place))
            except InputError as error:
                outcome = "refused" if "\n" not in str(error) else f"more than one line: {error}"
            except Slow:
                outcome = f"more than {SECONDS} s"
            except BaseException:  # noqa: BLE001  (whatever it is, it should not have come out)
                lines = traceback.format_exc().strip().splitlines()
                where = next((line.strip() for line in reversed(lines) if line.strip().startswith("File")), "")
                outcome = f"{lines[-1]} ({where})"
            finally:
                signal.alarm(0)
            pipe.send((index, outcome, time.perf_counter() - began))
    pipe.send((count, "done", 0.0))


def read(reader: Reader, payload: bytes, place: Path) -> None:
    """Let a reader read one file, in a folder of its own."""
    with tempfile.TemporaryDirectory(dir=place) as own:
        path = Path(own) / (reader.name or f"file{reader.suffix}")
        path.write_bytes(payload)
        reader.read(path)


# In the process that looks on ---------------------------------------------------------------------------------------


def fuzz(name: str, count: int, seed: int, isolated: bool = False) -> Found:
    """Files 0 to `count` of a reader, in processes that may die; of an `isolated` one that is no failure."""
    context, found, start = multiprocessing.get_context("spawn"), Found(), 0
    while start < count:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=work, args=(name, start, count, seed, sender), daemon=True)
        process.start()
        sender.close()
        current = None
        try:
            while True:
                # The alarm does not reach a loop in compiled code.
                if not receiver.poll(6 * SECONDS if current is not None else 300):
                    process.kill()
                    raise EOFError
                index, outcome, seconds = receiver.recv()
                if outcome == "done":
                    return found
                current = index
                if outcome == "begins":
                    continue
                found.files += 1
                found.slowest = max(found.slowest, seconds)
                if outcome in ("read", "refused"):
                    setattr(found, outcome, getattr(found, outcome) + 1)
                else:
                    found.failures.append((index, outcome))
        except EOFError:
            process.join()
            if current is None:
                raise RuntimeError(f"{name}: the reader does not start; run it alone to see why") from None
            found.files += 1
            if isolated:
                found.ended += 1
            else:
                found.failures.append((current, f"the process ended with {process.exitcode}"))
            start = current + 1
        finally:
            process.join(5)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("readers", nargs="*")
    parser.add_argument("--count", type=int, default=100_000, help="files in all (default: 100000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for the files that failed")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        known = readers(Path(place))
        unknown = [name for name in options.readers if name not in known]
        if unknown:
            parser.error(f"unknown reader {unknown[0]!r}; choose from {', '.join(known)}")
        chosen = options.readers or list(known)
        failed = 0
        print("| reader | files | read | refused | failed | slowest |\n|---|---|---|---|---|---|")
        for name in chosen:
            found = fuzz(name, max(1, options.count // len(chosen)), options.seed, known[name].isolated)
            numbers = f"{found.files:,} | {found.read:,} | {found.refused:,} | {len(found.failures):,} | {found.slowest:.2f} s"
            print(f"| {name} | {numbers} |", flush=True)
            failed += len(found.failures)
            if found.ended:
                print(f"  {name}: {found.ended} took the process down that it has for itself", file=sys.stderr)
            for index, outcome in found.failures[:10]:
                print(f"  {name} {index}: {outcome}", file=sys.stderr)
            if options.keep and found.failures:
                options.keep.mkdir(parents=True, exist_ok=True)
                for index, _ in found.failures:
                    path = options.keep / f"{name.replace(' ', '-')}-{index}{known[name].suffix}"
                    path.write_bytes(mutated(known[name], index, options.seed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
