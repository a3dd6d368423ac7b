"""The command line inside Blender: blender --background --command gaussian_atlas generate|convert|render|models ...

`generate` writes NAME.ply, NAME.png and NAME.blend for every object and one line for it in results.jsonl. A file appears
under its own name only when it is complete, so a run that was killed is continued by starting it again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

from ..generator import vocabulary
from ..generator.errors import InputError, WorkError
from ..generator.files import check_writable, parse_json
from . import extension, generation, service
from .generation import Generated, Request
from .job import one_line

log = logging.getLogger(__name__)

PROGRAM = "gaussian_atlas"
RESULTS = "results.jsonl"


def main(arguments: list[str]) -> int:
    """Run one command; returns the exit status: 0 done, 1 the work failed, 2 bad usage or input."""
    try:
        options = _parser().parse_args(arguments)
        return options.run(options)
    except InputError as error:
        return _complain(error, 2)
    except WorkError as error:
        return _complain(error, 1)
    except KeyboardInterrupt:
        return _complain(WorkError("stopped; run the same command again to go on"), 130)
    except SystemExit as stop:  # argparse ends the program itself; Blender wants the status
        return int(stop.code or 0)
    except Exception as error:
        if os.environ.get("GAUSSIAN_ATLAS_TRACEBACK"):
            raise
        return _complain(WorkError(f"{one_line(error)} (GAUSSIAN_ATLAS_TRACEBACK=1 shows where)"), 1)


def generate(options: argparse.Namespace) -> int:
    """The `generate` command."""
    model = Path(options.model) if options.model else _preferred_model()
    prompts = _read_prompts(Path(options.prompts)) if options.prompts is not None else [options.prompt]
    info = service.describe(model)
    if options.steps is None:
        options.steps = int(info.defaults.get("num_inference_steps", 20))
    if options.guidance is None:
        options.guidance = info.defaults.get("guidance_scale", 3.5)
    requests = [one for prompt in prompts for one in _request(prompt, model, options).each()]
    out = _output_folder(Path(options.out))
    # Many prompts are continued by default; a single one was asked for now.
    resume = options.resume if options.resume is not None else options.prompts is not None
    finished = _finished(out) if resume else {}
    failed = skipped = 0
    started = time.perf_counter()
    for index, request in enumerate(requests):
        name = file_name(request.prompt, request.seed)
        suffixes = ("ply", "png", "blend") if options.render else ("ply", "blend")
        files = {suffix: f"{name}.{suffix}" for suffix in suffixes}
        identity = _identity(request, info.sha256)
        if finished.get(name) == identity and all((out / file).is_file() for file in files.values()):
            skipped += 1
            continue
        print(f"[{index + 1}/{len(requests)}] {request.prompt} (seed {request.seed})", flush=True)
        if hint := vocabulary.hint(request.prompt, info.vocabulary):
            print(f"  {hint}", flush=True)
        record = {
            "name": name,
            **identity,
            "model": info.name,
            "status": "done",
            "files": files,
            "gaussians": 0,
            "seconds": {},
            "error": None,
        }
        try:
            record["gaussians"] = _make(request, out, files, record["seconds"], options)
        except Exception as error:  # the next object may well succeed
            if not isinstance(error, (InputError, WorkError)):
                log.exception("%s failed", name)
            failed += 1
            record |= {"status": "failed", "error": one_line(error), "files": {}}
            _complain(error, 1)
        _append(out / RESULTS, record)
        if record["status"] == "done":
            print("  " + ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in record["seconds"].items()))
            print("  " + "  ".join(str(out / file) for file in files.values()), flush=True)
    done = len(requests) - failed - skipped
    parts = [f"{done} generated"] + [f"{skipped} already there"] * bool(skipped) + [f"{failed} failed"] * bool(failed)
    print(f"{', '.join(parts)} in {time.perf_counter() - started:.1f} s; {out / RESULTS}", flush=True)
    return 1 if failed else 0


def convert(options: argparse.Namespace) -> int:
    """The `convert` command."""
    from ..generator import formats
    from . import mesh, preview

    output = Path(options.output)
    to_mesh = output.suffix.lower() in mesh.SUFFIXES
    if not to_mesh and output.suffix.lower() not in formats.SUFFIXES:
        raise InputError(f"{output}: splat files end in {', '.join(formats.SUFFIXES)}, mesh files in {', '.join(mesh.SUFFIXES)}")
    check_writable(output)
    gaussians = formats.load(options.input, up=formats.axes.NAMES.get(options.input_axes))
    if not to_mesh:
        metadata = formats.load_metadata(options.input)
        formats.save(gaussians, output, metadata, formats.axes.NAMES[options.output_axes], options.spz_version)
        print(f"{output}: {len(gaussians):,} Gaussians")
        return 0
    settings = mesh.Options(resolution=options.resolution, threshold=options.threshold, faces=options.faces)
    solid = mesh.prepare(gaussians, settings)
    import bpy

    scene = preview.empty_scene()
    object = bpy.data.objects.new(output.stem, mesh.build(solid, output.stem, settings))
    scene.collection.objects.link(object)
    with _quiet():
        mesh.save(object, output)
    print(f"{output}: {len(object.data.vertices):,} vertices, {len(object.data.polygons):,} faces")
    return 0


def render(options: argparse.Namespace) -> int:
    """The `render` command."""
    from ..generator import formats
    from . import preview, splat_object

    output = Path(options.output)
    if output.suffix.lower() != ".png":
        raise InputError(f"{output}: renders are PNG files; name it NAME.png")
    gaussians = formats.load(options.input)
    scene = preview.empty_scene()
    object = splat_object.write(gaussians, Path(options.input).stem)
    preview.look_at(scene, object, options.size, options.samples, options.azimuth, options.elevation, options.exact)
    with _quiet():
        preview.render(scene, output)
    print(f"{output}: {len(gaussians):,} Gaussians, {options.size} x {options.size} pixels")
    return 0


def manage_models(options: argparse.Namespace) -> int:
    """The `models` command."""
    import bpy

    from . import models

    place = extension.models_folder()
    if options.action == "install":
        # Blender's own switch, --online-mode, says whether the network may be used.
        model = models.install(options.model, place, _no_report, threading.Event(), online=bpy.app.online_access)
        print(f"{model.name}: {model.info.title} in {model.folder}")
    elif options.action == "remove":
        print(f"removed {models.remove(options.model, place)}")
    else:
        for model in models.installed(place):
            print(f"{model.name}: {model.info.title}, {model.info.licence}, {model.info.size / 1e6:,.0f} MB, {model.folder}")
    return 0


def file_name(prompt: str, seed: int) -> str:
    """A file name that is safe everywhere and different for different prompts: words of the prompt, then the seed.

    A prompt that the words do not spell exactly (capitals, punctuation, other scripts, length) gets a piece of its hash.
    """
    slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60].strip("-")
    if slug.replace("-", " ") != prompt:
        slug = f"{slug or 'object'}-{hashlib.sha256(prompt.encode()).hexdigest()[:6]}"
    return f"{slug}-{seed}"


def _make(request: Request, out: Path, files: dict[str, str], seconds: dict[str, float], options: argparse.Namespace) -> int:
    """Generate one object and write its files; fills `seconds` per stage and returns the number of Gaussians."""
    from ..generator import formats
    from . import preview, properties, splat_object
    from .splat_object import cells

    result: Generated = generation.generate(request, _no_report, threading.Event())[0]
    for note in result.notes:
        print(f"  {note}", flush=True)
    seconds.update({stage: round(value, 3) for stage, value in result.seconds.items()})
    with _timed(seconds, "ply"):
        formats.save(result.gaussians, out / files["ply"], metadata=result.provenance.as_metadata())
    with _timed(seconds, "scene"):
        scene = preview.empty_scene()
        object = splat_object.write(result.gaussians, request.prompt[:50])
        properties.store_provenance(object, result.provenance)
        cells.number(object)
        preview.look_at(scene, object, options.size, options.samples, exact=options.exact)
    if "png" in files:
        with _timed(seconds, "render"), _quiet():
            preview.render(scene, out / files["png"])
    with _timed(seconds, "blend"), _quiet():
        preview.save_blend(out / files["blend"])
    return len(result.gaussians)


def _no_report(stage: str, step: int = 0, total: int = 0, preview: object = None) -> None:
    pass


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[stage] = round(time.perf_counter() - started, 3)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Blender's own lines ("Saved: ...", "Fra:1 ...") out of the output: they go past Python, to the file descriptor."""
    sys.stdout.flush()
    try:
        kept = os.dup(1)
    except OSError:  # no standard output at all
        yield
        return
    sink = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(sink, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(sink)
        os.close(kept)


def _preferred_model() -> Path:
    import bpy

    return extension.model_folder(bpy.context)


def _request(prompt: str, model: Path, options: argparse.Namespace) -> Request:
    return Request(
        prompt=prompt,
        model=model,
        negative_prompt=options.negative,
        seed=options.seed,
        steps=options.steps,
        guidance=options.guidance,
        count=options.count,
        mix_prompt=options.mix,
        mix_weight=options.mix_weight,
    )


def _read_prompts(path: Path) -> list[str]:
    """One prompt a line; empty lines, lines that start with # and repetitions are left out.

    Raises:
        InputError: the file is missing, unreadable or holds no prompt.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise InputError(f"{path} is not text in UTF-8: save it as such, one prompt a line") from None
    except OSError as error:
        raise InputError(f"cannot read the prompts file {path}: {error.strerror}") from error
    prompts = [line.strip() for line in lines]
    prompts = list(dict.fromkeys(prompt for prompt in prompts if prompt and not prompt.startswith("#")))
    if not prompts:
        raise InputError(f"{path} holds no prompt: write one a line")
    return prompts


def _output_folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".{PROGRAM}-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"cannot write to the output folder {path}: {error.strerror}; choose another with --out") from error
    return path


def _identity(request: Request, model_hash: str) -> dict:
    """What has to be the same for a result to be the same."""
    identity = asdict(request)
    del identity["model"], identity["count"], identity["device"], identity["edit"]
    return identity | {"model_hash": model_hash}


def _finished(out: Path) -> dict[str, dict]:
    """The identity of every object that results.jsonl says is done, by name; later lines count. Broken lines are left out."""
    try:
        lines = (out / RESULTS).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {out / RESULTS} ({one_line(error)}): repair or remove it, or run with --no-resume") from error
    finished: dict[str, dict] = {}
    for line in lines:
        try:
            record = parse_json(line)
            identity = {key: record[key] for key in ("prompt", "negative_prompt", "seed", "steps", "guidance", "model_hash")}
            # What earlier versions did not write.
            identity |= {"mix_prompt": record.get("mix_prompt", ""), "mix_weight": record.get("mix_weight", 0.5)}
            finished.pop(record["name"], None)
            if record["status"] == "done":
                finished[record["name"]] = identity
        except (ValueError, KeyError, TypeError):  # the line that a killed run left unfinished
            continue
    return finished


def _append(path: Path, record: dict) -> None:
    """One more line, on a line of its own even after a line that was cut off."""
    line = json.dumps(record, ensure_ascii=False) + "\n"
    try:
        with open(path, "a+b") as file:
            if file.tell() > 0:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    line = "\n" + line
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise WorkError(f"cannot write {path}: {error.strerror}") from error


def _complain(error: BaseException, status: int) -> int:
    print(f"{PROGRAM}: {one_line(error)}", file=sys.stderr, flush=True)
    return status


class _Parser(argparse.ArgumentParser):
    """Bad usage is one line, not the whole usage text."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


def _add_axes_options(command: argparse.ArgumentParser) -> None:
    names = ("z-up", "y-down", "y-up")
    command.add_argument("--input-axes", choices=names, help="of IN (default: what a .ply states, else z-up)")
    command.add_argument("--output-axes", choices=names, default="z-up", help="of a splat file OUT (default: z-up, Blender's)")
    command.add_argument("--spz-version", type=int, default=2, choices=(2, 3, 4), help="of a .spz file OUT (default: 2)")


def _at_least(low: int, high: int | None = None) -> Callable[[str], int]:
    """The type of an argument that is a whole number from `low` on, to `high` where that is given."""

    def number(text: str) -> int:
        value = int(text)
        if value < low or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f"must be at least {low}{'' if high is None else f' and at most {high}'}, got {value}")
        return value

    return number


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog=PROGRAM, description="Text to 3D Gaussians without a window.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="generate|convert|render|models")

    command = commands.add_parser("generate", help="objects from prompts: .ply, .png and .blend files", allow_abbrev=False)
    which = command.add_mutually_exclusive_group(required=True)
    which.add_argument("--prompt", help="the object to generate")
    which.add_argument("--prompts", metavar="FILE", help="a text file with one prompt a line; # begins a comment line")
    command.add_argument("--negative", default="", metavar="PROMPT", help="what the objects should not be")
    command.add_argument("--mix", default="", metavar="PROMPT", help="a second prompt to mix into each")
    command.add_argument("--mix-weight", type=float, default=0.5, metavar="W", help="of the second prompt, 0 to 1 (default: 0.5)")
    command.add_argument("--seed", type=int, default=0, help="seed of the first object of each prompt (default: 0)")
    command.add_argument("--count", type=int, default=1, help="objects a prompt, with consecutive seeds (default: 1)")
    command.add_argument("--steps", type=int, help="solver steps (default: the model's, usually 20)")
    command.add_argument("--guidance", type=float, help="classifier-free guidance (default: the model's, usually 3.5)")
    command.add_argument("--model", metavar="DIR", help="model folder (default: the one chosen in the preferences)")
    command.add_argument("--out", default="out", metavar="DIR", help="folder for the files (default: out)")
    command.add_argument(
        "--render", action=argparse.BooleanOptionalAction, default=True, help="render a .png of each object (default: yes)"
    )
    command.add_argument("--resume", action=argparse.BooleanOptionalAction, help="skip what is there already (default: with --prompts)")
    _add_image_options(command)
    command.set_defaults(run=generate)

    command = commands.add_parser("convert", help="a splat file to another format, or to a mesh", allow_abbrev=False)
    command.add_argument("input", metavar="IN", help="a .ply, .splat or .spz file")
    command.add_argument("output", metavar="OUT", help="the file to write: .ply, .splat, .spz, or a mesh in .glb, .obj, .stl")
    _add_axes_options(command)
    command.add_argument("--resolution", type=_at_least(8, 512), default=128, help="of a mesh: cells along its longest side (default: 128)")
    command.add_argument("--threshold", type=float, default=0.6, help="of a mesh: opacity at its surface (default: 0.6)")
    command.add_argument("--faces", type=_at_least(0), default=50_000, help="of a mesh: triangles at most, 0 for all (default: 50000)")
    command.set_defaults(run=convert)

    command = commands.add_parser("render", help="a picture of a splat file in Cycles", allow_abbrev=False)
    command.add_argument("input", metavar="FILE", help="a .ply, .splat or .spz file")
    command.add_argument("output", metavar="OUT.png")
    command.add_argument("--azimuth", type=float, default=30.0, help="degrees round the object from its front (default: 30)")
    command.add_argument("--elevation", type=float, default=20.0, help="degrees above the horizon (default: 20)")
    _add_image_options(command)
    command.set_defaults(run=render)

    command = commands.add_parser("models", help="list, install and remove models", allow_abbrev=False)
    command.add_argument("action", choices=("list", "install", "remove"), nargs="?", default="list")
    command.add_argument("model", nargs="?", default="", help="install: a folder, a zip or a hub id; remove: a name of the list")
    command.set_defaults(run=manage_models)
    return parser


def _add_image_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--size", type=_at_least(1), default=512, help="image side in pixels (default: 512)")
    command.add_argument("--samples", type=_at_least(1), default=4, help="samples a pixel; they only smooth edges (default: 4)")
    command.add_argument(
        "--exact", action="store_true", help="blend display values under the Raw view, as splat renderers do (default: Standard view)"
    )
