"""The command line: `python -m generator PROMPT --output F.ply`, `info FILE-or-BUNDLE`, `convert IN OUT`.

Results go to standard output, progress and messages to standard error. Exit status: 0 done, 1 the work failed, 2 wrong usage or
input (one line, "gaussian-atlas: error: ..."), 130 interrupted. Files appear complete or not at all.
A prompt that is exactly "info" or "convert" must come after an option: `python -m generator --output sign.ply info`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from contextlib import ExitStack
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from .errors import Cancelled, InputError, WorkError
from .version import program_version

if TYPE_CHECKING:
    from .gaussians import Gaussians
    from .model.pipeline import GaussianAtlasPipeline

PROGRAM = "gaussian-atlas"
STARTER = Path(__file__).resolve().parent.parent / "models" / "starter"

DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
PREVIEW_SIZE = 512  # pixels
# Of a record of edits: a .ply has room for 8,000 characters of provenance, and quotes in it count twice.
_RECORD_LIMIT = 4000
# What the arguments of the pipeline are called here.
_OPTIONS = {"num_inference_steps": "--steps", "guidance_scale": "--guidance", "num_samples_per_prompt": "--count", "seed": "--seed"}
_OPTIONS |= {"mix_prompt": "--mix", "mix_weight": "--mix-weight", "strength": "--strength"}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see --help)")


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    shown = warnings.showwarning
    warnings.showwarning = lambda message, *_args, **_kwargs: _say(f"{PROGRAM}: warning: {_one_line(message)}")
    try:
        command = {"info": _info, "convert": _convert}.get(arguments[0] if arguments else "")
        if command is not None:
            command(arguments[1:])
        else:
            _generate(arguments)
        return DONE
    except (KeyboardInterrupt, Cancelled):
        _say(f"{PROGRAM}: interrupted; nothing was written")
        return INTERRUPTED
    except InputError as error:
        _say(f"{PROGRAM}: error: {_one_line(error)}")
        return USAGE
    except WorkError as error:
        _say(f"{PROGRAM}: error: {_one_line(error)}")
        return FAILED
    except BrokenPipeError:
        # The reader of standard output went away; keep Python from complaining once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        if os.environ.get("GAUSSIAN_ATLAS_TRACEBACK"):
            raise
        _say(f"{PROGRAM}: error: {type(error).__name__}: {_one_line(error)} (GAUSSIAN_ATLAS_TRACEBACK=1 shows where)")
        return FAILED
    finally:
        warnings.showwarning = shown


def _generate(arguments: list[str]) -> None:
    parser = _Parser(
        prog="python -m generator",
        usage="%(prog)s PROMPT --output FILE [options]\n       %(prog)s info FILE-or-BUNDLE [--json]\n       %(prog)s convert IN OUT",
        description="Text to 3D Gaussians.",
        epilog='A prompt that is exactly "info" or "convert" must come after an option.',
        allow_abbrev=False,
    )
    parser.add_argument("prompt", metavar="PROMPT", help='the object to generate, such as "a red armchair"')
    parser.add_argument("--output", required=True, metavar="FILE", help=".ply, .splat or .spz; with --count it becomes FILE-0, FILE-1, ...")
    parser.add_argument("--preview", metavar="FILE.png", help="also render a picture of each object")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first object; the others follow (default: 0)")
    parser.add_argument("--steps", type=int, help="solver steps (default: the model's, usually 20)")
    parser.add_argument("--guidance", type=float, help="how strictly the prompt is followed; 1 is off (default: the model's, usually 3.5)")
    parser.add_argument("--negative", default="", metavar="PROMPT", help="what the object should not be")
    parser.add_argument("--mix", metavar="PROMPT", help="a second prompt: the object comes to lie between both")
    parser.add_argument("--mix-weight", type=float, default=0.5, metavar="W", help="of the second prompt, 0 to 1 (default: 0.5)")
    parser.add_argument("--init", metavar="FILE.ply", help="start from this object, which was generated: a variation of it")
    parser.add_argument("--strength", type=float, metavar="S", help="how far from --init, 0 to 1 (default: 0.5, with --box 1)")
    parser.add_argument(
        "--box",
        type=float,
        nargs=6,
        metavar=("X0", "Y0", "Z0", "X1", "Y1", "Z1"),
        help="make only the Gaussians of --init in this box anew and keep the others",
    )
    parser.add_argument("--count", type=int, default=1, help="number of objects (default: 1)")
    parser.add_argument("--model", default=str(STARTER), metavar="DIR", help="model folder or hub id (default: the starter model)")
    parser.add_argument("--device", default="auto", metavar="auto|cpu|cuda", help="where to compute (default: auto)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {program_version()}")
    options = parser.parse_args(arguments)

    from .files import check_writable, replacing
    from .formats import check_suffix, save

    started = time.perf_counter()
    # What can be wrong is looked for before the seconds of loading; the cheap and likely first.
    check_suffix(options.output)
    from . import vocabulary
    from .model.pipeline import GaussianAtlasPipeline, check_arguments

    try:
        check_arguments(
            options.prompt,
            options.negative,
            options.seed,
            options.steps,
            options.guidance,
            options.count,
            mix_prompt=options.mix,
            mix_weight=options.mix_weight,
            strength=options.strength,
        )
    except InputError as error:
        argument, _, rest = str(error).partition(" ")
        raise InputError(f"{_OPTIONS.get(argument, argument)} {rest}") from error
    if options.init is None and (options.strength is not None or options.box is not None):
        raise InputError("--strength and --box need --init, the object to start from")
    source = None if options.init is None else _source(Path(options.init))
    outputs = _numbered(options.output, options.count)
    previews: list[Path] = []
    if options.preview is not None:
        if Path(options.preview).suffix.lower() != ".png":
            raise InputError(f"--preview {options.preview}: previews end in .png")
        previews = _numbered(options.preview, options.count)
    for path in outputs + previews:
        check_writable(path)

    _say(f"loading {options.model}")
    pipeline = GaussianAtlasPipeline.from_pretrained(options.model, device=options.device)
    known = tuple(str(entry) for entry in pipeline.info.get("vocabulary") or ())
    if hint := vocabulary.hint(options.prompt, known, pipeline.text_encoder):
        _say(hint)
    edit, record = ({}, "") if source is None else _edit(pipeline, *source, options.strength, options.box)
    from tqdm import tqdm

    bar = tqdm(desc="sampling", unit="step", file=sys.stderr, disable=None)

    def progress(step: int, total: int, _preview: object) -> None:
        bar.total = total
        bar.update(step - bar.n)

    with bar:
        result = pipeline(
            options.prompt,
            negative_prompt=options.negative,
            seed=options.seed,
            num_inference_steps=options.steps,
            guidance_scale=options.guidance,
            num_samples_per_prompt=options.count,
            callback=progress,
            mix_prompt=options.mix,
            mix_weight=options.mix_weight,
            **edit,
        )
    seconds = {"load": pipeline.load_seconds} | result.seconds
    provenance = {
        "prompt": options.prompt,
        "negative_prompt": options.negative,
        "steps": result.num_inference_steps,
        "guidance": result.guidance_scale,
        "model_name": pipeline.info["name"],
        "model_hash": pipeline.model_hash,
        "program_version": program_version(),
        "mix_prompt": options.mix or "",
        "mix_weight": options.mix_weight,
        "layout_id": pipeline.layout.id,
        "low_pass": pipeline.low_pass,
        "edit": record,
    }
    pictures = []
    if options.preview is not None:
        before = time.perf_counter()
        from .render import Cameras, render, save_png

        pictures = [render(gaussians, Cameras.orbit(count=1, size=PREVIEW_SIZE)).rgb[0] for gaussians in result.gaussians]
        seconds["preview"] = time.perf_counter() - before
    before = time.perf_counter()
    # Files are renamed to their places when all are written; only a rename that fails can leave some without the others.
    with ExitStack() as places:
        for path, gaussians, seed in zip(outputs, result.gaussians, result.seeds, strict=True):
            save(gaussians, places.enter_context(replacing(path)), metadata=provenance | {"seed": seed})
        for path, picture in zip(previews, pictures, strict=True):
            save_png(picture, places.enter_context(replacing(path)))
    seconds["write"] = time.perf_counter() - before
    seconds["total"] = time.perf_counter() - started
    seconds = {stage: round(value, 3) for stage, value in seconds.items()}
    _report(options, pipeline, result, outputs, previews, provenance, seconds, hint)


def _source(path: Path) -> tuple[Gaussians, dict]:
    """The object to start from and its provenance.

    Raises:
        InputError: it cannot be read, or does not say which cell each Gaussian is.
    """
    from .formats import load, load_metadata

    gaussians, provenance = load(path), load_metadata(path) or {}
    if not provenance.get("layout_id"):
        raise InputError(f"--init {path}: the file does not say which cells its Gaussians are; generate the object again, to a .ply")
    low_pass = provenance.get("low_pass", 0.0)
    if isinstance(low_pass, bool) or not isinstance(low_pass, int | float) or not 0 <= low_pass < float("inf"):
        raise InputError(f"--init {path}: its low_pass is not a number of at least 0 but {json.dumps(low_pass)}; generate the object again")
    return gaussians, provenance


def _edit(
    pipeline: GaussianAtlasPipeline, gaussians: Gaussians, provenance: dict, strength: float | None, box: list[float] | None
) -> tuple[dict, str]:
    """What a pipeline's call gets to start from an object, and the record of it.

    Raises:
        InputError: the object is of another model's layout, or the box holds none of it.
    """
    import torch

    from . import records

    if provenance["layout_id"] != pipeline.layout.id:
        raise InputError("--init was made by a model of another layout: take the model that made it")
    # Gaussian i is taken for cell i, which holds for a whole atlas alone.
    if len(gaussians) != pipeline.layout.count:
        count = pipeline.layout.count
        raise InputError(
            f"--init holds {len(gaussians)} usable Gaussians where its atlas has {count} cells: which are missing is not known"
        )
    atlas = pipeline.encode(gaussians, low_pass=float(provenance.get("low_pass", 0.0)))
    strength = (0.5 if box is None else 1.0) if strength is None else strength
    mask, cells = None, None
    if box is not None:
        low, high = torch.tensor(box).reshape(2, 3)
        inside = ((gaussians.means >= low) & (gaussians.means <= high)).all(1).nonzero()[:, 0]
        if not len(inside):
            raise InputError("--box holds none of the object; it is about 1 long and stands round 0, 0, 0")
        mask = torch.zeros(pipeline.layout.count, dtype=torch.bool)
        mask[inside] = True
        mask, cells = mask.reshape(pipeline.layout.size, pipeline.layout.size), inside.numpy()
    record = records.of_edit(provenance, strength, cells)
    return {"init_atlas": atlas, "strength": strength, "mask": mask}, record if len(record) <= _RECORD_LIMIT else ""


def _report(options, pipeline, result, outputs, previews, provenance, seconds, hint) -> None:
    objects = [
        {"output": str(output), "preview": None if preview is None else str(preview), "seed": seed, "gaussians": len(gaussians)}
        for output, preview, seed, gaussians in zip(outputs, previews or [None] * len(outputs), result.seeds, result.gaussians, strict=True)
    ]
    if options.json:
        model = {"name": pipeline.info["name"], "version": pipeline.info["version"], "sha256": pipeline.model_hash, "path": options.model}
        found = {
            "prompt": options.prompt,
            "negative_prompt": options.negative,
            "seed": options.seed,
            "steps": result.num_inference_steps,
            "guidance": result.guidance_scale,
            "gaussians": len(result.gaussians[0]),
            "model": model,
            "device": str(pipeline.device),
            "dtype": str(pipeline.unet.dtype).removeprefix("torch."),
            "seconds": seconds,
            "objects": objects,
            "hint": hint,
            "program_version": provenance["program_version"],
        }
        print(json.dumps(found))
        return
    for entry in objects:
        files = entry["output"] if entry["preview"] is None else f"{entry['output']} {entry['preview']}"
        print(f"{files}  {entry['gaussians']} Gaussians, seed {entry['seed']}")
    _say(f"{result.num_inference_steps} steps; " + ", ".join(f"{stage} {value:.1f} s" for stage, value in seconds.items()))


def _info(arguments: list[str]) -> None:
    parser = _Parser(prog="python -m generator info", description="What a splat file or a model bundle holds.", allow_abbrev=False)
    parser.add_argument("path", metavar="FILE-or-BUNDLE")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    options = parser.parse_args(arguments)
    path = Path(options.path)
    if not os.path.exists(path):
        raise InputError(f"{path} does not exist")
    found = _describe_bundle(path) if path.is_dir() else _describe_file(path)
    if options.json:
        print(json.dumps(found))
        return
    width = max(map(len, found))
    for key, value in found.items():
        if isinstance(value, dict):
            value = ", ".join(f"{_short(name)}: {_short(entry)}" for name, entry in value.items())
        print(f"{_short(key):<{width}}  {_short(value)}")


def _describe_file(path: Path) -> dict:
    from .formats import check_suffix, load, load_metadata

    suffix = check_suffix(path)
    gaussians = load(path)
    low, high = gaussians.means.amin(0), gaussians.means.amax(0)
    return {
        "file": str(path),
        "format": suffix.removeprefix("."),
        "bytes": path.stat().st_size,
        "gaussians": len(gaussians),
        "minimum": [round(value, 5) for value in low.tolist()],
        "maximum": [round(value, 5) for value in high.tolist()],
        "median_opacity": round(gaussians.opacities.median().item(), 5),
        "median_scale": round(gaussians.scales.median().item(), 7),
        "mean_color": [round(value, 4) for value in gaussians.colors.mean(0).tolist()],
        "metadata": load_metadata(path),
    }


def _describe_bundle(path: Path) -> dict:
    from .model.bundle import load_bundle

    bundle = load_bundle(path)
    stored = {key: value for key, value in bundle.info.items() if key != "files"}
    return {
        "bundle": str(path),
        **stored,
        "prediction_type": bundle.scheduler_config.get("prediction_type"),
        "bytes": sum(entry["size"] for entry in bundle.info["files"].values()),
        "sha256": bundle.hash,
    }


def _convert(arguments: list[str]) -> None:
    parser = _Parser(prog="python -m generator convert", description="One splat format to another, by suffix.", allow_abbrev=False)
    parser.add_argument("input", metavar="IN", help=".ply, .splat or .spz")
    parser.add_argument("output", metavar="OUT", help=".ply, .splat or .spz")
    names = ("z-up", "y-down", "y-up")
    parser.add_argument("--input-axes", choices=names, help="of IN (default: what a .ply states, else z-up)")
    parser.add_argument("--output-axes", choices=names, default="z-up", help="of OUT; viewers mostly want y-down (default: z-up)")
    parser.add_argument("--spz-version", type=int, default=2, choices=(2, 3, 4), help="of a .spz file OUT (default: 2)")
    options = parser.parse_args(arguments)
    from .files import check_writable
    from .formats import axes, check_suffix, load, load_metadata, save

    check_suffix(options.output)
    check_writable(options.output)
    gaussians = load(options.input, axes.NAMES.get(options.input_axes))
    save(gaussians, options.output, load_metadata(options.input), axes.NAMES[options.output_axes], options.spz_version)
    print(f"{options.output}  {len(gaussians)} Gaussians")


def _numbered(name: str, count: int) -> list[Path]:
    path = Path(name)
    return [path] if count == 1 else [path.with_name(f"{path.stem}-{index}{path.suffix}") for index in range(count)]


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if not text.isprintable():  # a file's text must not give orders to the terminal
        text = json.dumps(value)
    return text if len(text) <= 300 else f"{text[:297]}..."


def _one_line(message: object) -> str:
    return " ".join(str(message).split())


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    # A prompt may hold characters that a redirected stream cannot.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.exit(main())
