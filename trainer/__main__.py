"""The trainer's command line.

python -m trainer STAGE --preset NAME       one of the stages, or `train` for all of them
python -m trainer farm --preset NAME        views, fit and atlas of an object in one task, on a cluster too
python -m trainer COMMAND ...               what stands beside the stages, see `COMMANDS`
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from generator.errors import InputError, WorkError
from generator.files import check_writable, make_folder, replacing


def main(arguments: list[str] | None = None) -> int:
    """Run a command; 0 when done, 2 for bad usage or input, 1 when the work failed or the doctor found something sick."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        return _run(arguments)
    except InputError as error:
        print(f"trainer: error: {error}", file=sys.stderr)
        return 2
    except WorkError as error:
        print(f"trainer: error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        named = f"{error.filename}: " if error.filename else ""
        print(f"trainer: error: {named}{error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("trainer: stopped; the same command goes on from here", file=sys.stderr)
        return 130


def _run(arguments: list[str]) -> int:
    for name, (command, _) in COMMANDS.items():
        words = name.split()
        if arguments[: len(words)] == words:
            return command(arguments[len(words) :])
    from .presets import PRESETS, following_base
    from .stages import STAGES, farm, pretrain

    commands = {**STAGES, "farm": farm, "pretrain": pretrain}
    names = (*commands, "train")
    parser = argparse.ArgumentParser(
        prog="python -m trainer",
        description="From objects to a model bundle, stage by stage. `train` runs every stage in order; each goes on where it stopped.",
        epilog="`python -m trainer STAGE --preset NAME --help` lists every setting; any can be given, e.g. --finetune.max-steps 500. "
        "Beside the stages, each with --help: " + "; ".join(f"`python -m trainer {name}`, {what}" for name, (_, what) in COMMANDS.items()),
        add_help=False,
    )
    parser.add_argument("stage", nargs="?", choices=names, metavar="STAGE", help=" | ".join(names))
    parser.add_argument("--preset", default="starter", help=f"one of {', '.join(PRESETS)} (default: starter)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of all runs; this one lies in RUNS/PRESET (default: runs)")
    parser.add_argument("-h", "--help", action="store_true", help="this text; with a stage: every setting too")
    options, rest = parser.parse_known_args(arguments)
    if options.stage is None:
        parser.print_help()
        return 0 if options.help else 2
    if options.preset not in PRESETS:
        raise InputError(f"--preset {options.preset}: no such preset; choose one of {', '.join(PRESETS)}")

    # tyro turns the nested dataclasses, with the comment beside each field, into options.
    import tyro

    if options.help:
        parser.print_help()
        print()
    prog = f"python -m trainer {options.stage} --preset {options.preset}"
    preset = tyro.cli(type(PRESETS[options.preset]), default=PRESETS[options.preset], args=["--help"] if options.help else rest, prog=prog)
    # The others work without the base, which may be a large download.
    preset = following_base(preset, needed=options.stage in ("stats", "finetune", "pack", "train"))
    run = options.runs / preset.name
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--runs {options.runs}: cannot write there ({error.strerror}); choose another folder") from error
    for name in STAGES if options.stage == "train" else (options.stage,):
        start = time.perf_counter()
        commands[name](preset, run)
        print(f"{name}: {time.perf_counter() - start:.1f} s", flush=True)
    return 0


def _evaluate(arguments: list[str]) -> int:
    """Score a bundle or a folder of files."""
    from generator.formats.axes import UP

    parser = argparse.ArgumentParser(
        prog="python -m trainer evaluate",
        description="Score a bundle, or a folder of .ply, .splat, .spz and .glb files named by their prompts, by the paper's protocol: "
        "every object from 10 random sides. Writes report.html, with pictures, and report.json.",
    )
    parser.add_argument("source", metavar="SOURCE", help="a bundle, its hub id, or a folder of files such as a-red-chair-1.ply")
    parser.add_argument("--output", type=Path, default=Path("out/evaluation"), metavar="DIR", help="default: out/evaluation")
    parser.add_argument("--prompts", type=Path, metavar="F.txt", help="a prompt on each line (default: 106 of the starter's vocabulary)")
    parser.add_argument("--names", action="store_true", help="take a folder's file names as the prompts")
    parser.add_argument(
        "--shards",
        type=Path,
        metavar="DIR",
        help="training objects (runs/NAME/shards): adds the ceiling, the baseline and the look for copies",
    )
    parser.add_argument("--seeds", type=int, default=2, help="objects of each prompt from a bundle (default: 2)")
    parser.add_argument("--steps", type=int, help="sampling steps (default: the bundle's)")
    parser.add_argument("--views", type=int, default=10, help="random sides of each object (default: 10)")
    parser.add_argument("--up", choices=UP, help="axes of a folder's splats (default: what a file states, else Z)")
    parser.add_argument("--clip", default="", metavar="MODEL", help="adds the CLIP score: a folder, or a hub id, which is downloaded")
    options = parser.parse_args(arguments)
    if options.names and options.prompts:
        raise InputError("--names and --prompts exclude each other")

    from .evaluate import Protocol, evaluate, fixed_prompts, read_prompts, summary_line

    protocol = Protocol(views=options.views, seeds=options.seeds, steps=options.steps)
    prompts = None if options.names else read_prompts(options.prompts) if options.prompts else fixed_prompts()
    report = evaluate(options.source, options.output, prompts, options.shards, protocol, options.clip, options.up)
    print(f"evaluate: {summary_line(report)}")
    print(f"evaluate: {options.output / 'report.html'}")
    return 0


def _blind(arguments: list[str]) -> int:
    """Make a page that asks which of two methods is better."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer blind",
        description="A page of HTML that asks people which of two methods fits each prompt better and does not say which is which. Voters "
        "get blind.html and send back the file that it lets them download; key.json is for `python -m trainer votes`.",
    )
    parser.add_argument("first", metavar="A", help="a bundle, its hub id, or a folder of files named by prompt")
    parser.add_argument("second", metavar="B", help="the same")
    parser.add_argument("--output", type=Path, default=Path("out/blind"), metavar="DIR", help="default: out/blind")
    parser.add_argument("--prompts", type=Path, metavar="F.txt", help="a prompt on each line (default: 106 of the starter's vocabulary)")
    parser.add_argument("--seed", type=int, default=0, help="of sides and order (default: 0)")
    options = parser.parse_args(arguments)

    from .evaluate import Protocol, fixed_prompts, read_prompts
    from .evaluate.blind import write_page
    from .evaluate.report import open_source

    prompts = read_prompts(options.prompts) if options.prompts else fixed_prompts()
    # Drawing may take long: where it goes is checked first.
    make_folder(options.output)
    made, methods = [], []
    for source in (options.first, options.second):
        objects, method, _ = open_source(source, prompts, Protocol(seeds=1))
        made.append(objects)
        methods.append(method["name"])
    pairs = write_page(options.output, (methods[0], methods[1]), made[0], made[1], options.seed)
    print(f"blind: {pairs} pairs in {options.output / 'blind.html'}; keep {options.output / 'key.json'} from the voters")
    return 0


def _votes(arguments: list[str]) -> int:
    """Count the votes of a blind page."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer votes", description="Win rates, with intervals, from the votes of a blind page."
    )
    parser.add_argument("key", type=Path, metavar="key.json")
    parser.add_argument("votes", nargs="+", type=Path, metavar="VOTES.json")
    options = parser.parse_args(arguments)

    from .evaluate.blind import count, text

    print(text(count(options.key, options.votes)))
    return 0


def _judge(arguments: list[str]) -> int:
    """Train the offline judge."""
    from .evaluate.judge import Judge, examples_from_shards
    from .evaluate.references import layout_of

    parser = argparse.ArgumentParser(
        prog="python -m trainer judge",
        description="Train the offline judge on the objects of shards. The one that `evaluate` uses comes with the package.",
    )
    parser.add_argument("shards", type=Path, help="a folder of shards (runs/NAME/shards)")
    parser.add_argument("output", type=Path, metavar="F.safetensors")
    parser.add_argument("--views", type=int, default=4, help="sides of each object (default: 4)")
    options = parser.parse_args(arguments)
    check_writable(options.output)
    judge = Judge.train(examples_from_shards(options.shards, layout_of(options.shards)), options.views)
    judge.save(options.output)
    for name in ("unseen", "seen"):
        print(f"judge: on objects that are {name}: " + ", ".join(f"{key} {value}" for key, value in judge.record[name].items()))
    print(f"judge: {options.output}")
    return 0


def _layouts(arguments: list[str]) -> int:
    """Compute the stored layouts anew."""
    from generator.atlas.layout import PROJECTIONS, default_path

    from .atlas import compute_layout

    parser = argparse.ArgumentParser(prog="python -m trainer layout", description="Compute and store the layout of an atlas size.")
    parser.add_argument("--size", type=int, default=64, help="cells a side (default: 64)")
    parser.add_argument("--projection", choices=PROJECTIONS, default="equirectangular")
    options = parser.parse_args(arguments)
    layout = compute_layout(options.size, options.projection)
    layout.save(default_path(options.size, options.projection))
    print(f"layout {layout.id}: {default_path(options.size, options.projection)}")
    return 0


def _import_fits(arguments: list[str]) -> int:
    """Bring the fits of others into a run."""
    from .sources import gaussian_verse as source

    parser = _import_parser(
        "import-fits",
        "Bring Gaussians that others have fitted, such as GaussianVerse's, into RUNS/NAME/fits; then run the atlas stage.",
        "a folder of CHUNK/OBJECT/point_cloud.ply, a folder of .ply, or one .ply",
    )
    parser.add_argument("--up", choices="zy", default="z", help="the files' up axis: z, front to -Y, or y, front to +Z (default: z)")
    options = parser.parse_args(arguments)
    fits = _run_of(options) / "fits"
    objects, without = source.gaussian_verse(options.path, options.captions, options.up)
    failures = source.import_fits(objects, fits, options.workers)
    kept = [entry for entry in objects if entry.id not in failures]
    return _imported("import-fits", objects, without, failures, fits, source.outlier_table(fits, kept))


def _import_views(arguments: list[str]) -> int:
    """Bring the renders of others into a run."""
    from .presets import PRESETS
    from .sources import g_objaverse as source

    parser = _import_parser(
        "import-views",
        "Bring the renders of G-Objaverse into RUNS/NAME/views; then run the fit stage.",
        "a folder that holds CHUNK/OBJECT/campos_512_v4",
    )
    parser.add_argument("--size", type=int, help="pixels, image side, a whole part of 512 (default: the preset's)")
    options = parser.parse_args(arguments)
    views = _run_of(options) / "views"
    objects, without = source.g_objaverse(options.path, options.captions)
    failures = source.import_views(objects, views, options.size or PRESETS[options.preset].views.size, options.workers)
    return _imported("import-views", objects, without, failures, views)


def _import_parser(command: str, description: str, path: str) -> argparse.ArgumentParser:
    """What both imports take."""
    parser = argparse.ArgumentParser(
        prog=f"python -m trainer {command}",
        description=f"{description} Finished objects are skipped, damaged ones are named and left out.",
    )
    parser.add_argument("path", type=Path, metavar="PATH", help=path)
    _add_run(parser)
    parser.add_argument("--captions", type=Path, help="CSV lines uid,caption as Cap3D has them, or JSON {CHUNK/OBJECT: caption}")
    parser.add_argument("--workers", type=int, default=2, help="objects at the same time (default: 2)")
    return parser


def _add_run(parser: argparse.ArgumentParser) -> None:
    """The options that name a run; `_run_of` is its folder."""
    from .presets import PRESETS

    parser.add_argument("--preset", default="starter", choices=PRESETS, help="the run's preset (default: starter)")
    parser.add_argument("--name", help="the run's folder in RUNS, where the stages get a --name too (default: the preset's name)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of all runs (default: runs)")


def _run_of(options: argparse.Namespace) -> Path:
    from .presets import PRESETS

    return options.runs / (options.name or PRESETS[options.preset].name)


def _imported(command: str, objects: list, without: list[str], failures: dict[str, str], folder: Path, more: str = "") -> int:
    """Say what was imported.

    Raises:
        WorkError: nothing was.
    """
    for line in [*without, *(f"{identifier}: {reason}" for identifier, reason in failures.items())]:
        print(f"  {line}")
    if more:
        print(more)
    print(f"{command}: {len(objects) - len(failures)} of {len(objects) + len(without)} objects in {folder}")
    if len(failures) == len(objects):
        raise WorkError(f"{command} failed for every object; the first says: {next(iter(failures.values()))}")
    return 0


def _card(arguments: list[str]) -> int:
    """Write the card of a run's data set."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer card",
        description="A Markdown card of a run's data set, from its records and shards: counts, Gaussians per object, quality, seconds, "
        "failures with their reasons, licences, and the credits of every object.",
    )
    _add_run(parser)
    parser.add_argument("--output", type=Path, metavar="F.md", help="where to write it (default: CARD.md in the run's folder)")
    options = parser.parse_args(arguments)
    run = _run_of(options)
    if not run.is_dir():
        raise InputError(f"{run}: no such run: run `python -m trainer farm --preset {options.preset}` first, or give --name or --runs")
    output = options.output or run / "CARD.md"
    check_writable(output)

    from .card import card

    text = card(run)
    with replacing(output) as partial:
        partial.write_text(text, encoding="utf-8")
    print(f"card: {output}")
    return 0


def _ablations(arguments: list[str]) -> int:
    """Train the paper's choices against their alternatives, and write the page."""
    from .ablations import PRESET, VARIANTS, ablate

    parser = argparse.ArgumentParser(
        prog="python -m trainer ablations",
        description="Pretrain a small 2D base, then train the baseline and every variant with several seeds, judge what they "
        "draw, and write tables, curves and pictures. Finished runs are kept, a stopped one goes on. Hours on two cores.",
        epilog="Variants: " + "; ".join(f"{name}, {variant.title}" for name, variant in VARIANTS.items()),
    )
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), help="folder of all runs; this one lies in RUNS/ablations (default: runs)"
    )
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), metavar="NAME", help="which of the variants (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of every variant (default: 0 1 2)")
    parser.add_argument(
        "--output", type=Path, default=Path("docs/ablations.md"), metavar="F.md", help="the page (default: docs/ablations.md)"
    )
    options = parser.parse_args(arguments)
    check_writable(options.output)
    run = options.runs / PRESET.name
    run.mkdir(parents=True, exist_ok=True)
    ablate(PRESET, run, options.variants, options.seeds, options.output)
    print(f"ablations: {options.output}")
    return 0


def _scale(arguments: list[str]) -> int:
    """Print what a large data set takes."""
    from .scale import PAPER_OBJECTS, Cluster, measure, report

    parser = argparse.ArgumentParser(
        prog="python -m trainer scale",
        description="What a large data set takes, as Markdown: core-hours and bytes projected from the records of a small one, the "
        "bottleneck, and a simulation of the schedule with stragglers and dying workers. The same arguments give the same text.",
    )
    parser.add_argument("records", nargs="+", type=Path, metavar="RECORDS", help="records.jsonl of a farm, or the folder of a run")
    parser.add_argument(
        "--objects", nargs="+", type=int, default=[PAPER_OBJECTS, 10_000_000], help="of the data set (default: the paper's; 10 million)"
    )
    parser.add_argument("--workers", nargs="+", type=int, default=[1000], help="cores, each with one object in hand (default: 1000)")
    parser.add_argument("--lifetime", type=float, default=100.0, metavar="HOURS", help="after which a worker dies, mean (default: 100)")
    parser.add_argument("--restart", type=float, default=120.0, metavar="SECONDS", help="until a dead worker is replaced (default: 120)")
    parser.add_argument("--dispatch", type=float, default=2.2, metavar="MS", help="the driver takes for an object (default: 2.2, measured)")
    parser.add_argument("--bandwidth", type=float, default=1000.0, metavar="MB/S", help="the file system writes (default: 1000)")
    parser.add_argument("--gpu", nargs="*", default=[], metavar="STEP=SECONDS", help="measured seconds of one GPU an object, by step")
    parser.add_argument("--seed", type=int, default=0, help="of the simulation (default: 0)")
    options = parser.parse_args(arguments)
    for name in ("objects", "workers", "lifetime", "bandwidth"):
        values = getattr(options, name)
        if not all(0 < value < float("inf") for value in (values if isinstance(values, list) else [values])):
            raise InputError(f"--{name} must be above 0, got {values}")
    for name in ("restart", "dispatch", "seed"):
        if not 0 <= getattr(options, name) < float("inf"):
            raise InputError(f"--{name} must be at least 0, got {getattr(options, name)}")
    measured = measure(options.records)
    gpu = {}
    for text in options.gpu:
        step, _, seconds = text.partition("=")
        try:
            gpu[step] = float(seconds)
        except ValueError:
            gpu[step] = 0.0
        if step not in measured.steps or not 0 < gpu[step] < float("inf"):
            raise InputError(f"--gpu {text}: give STEP=SECONDS with one of the steps {', '.join(measured.steps)}")
    cluster = Cluster(lifetime=options.lifetime * 3600, restart=options.restart, dispatch=options.dispatch / 1000)
    print(report(measured, options.objects, options.workers, cluster, options.bandwidth * 1e6, gpu, options.seed), end="")
    return 0


def _doctor(arguments: list[str]) -> int:
    """Examine atlases."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer atlas doctor",
        description="Whether atlases are fit to be trained on: transport, locality, channels, dead cells, and what each stage loses.",
        epilog="Exit status: 0 all is well, 1 some atlas must not be trained on (each reason is one line), 2 something cannot be read.",
    )
    parser.add_argument(
        "paths",
        nargs="+",
        type=Path,
        metavar="PATH",
        help="Gaussians (.ply .splat .spz, transported first), an atlas (runs/PRESET/atlases/ID.safetensors), a shard (.tar), "
        "or a folder of shards",
    )
    parser.add_argument(
        "--layout",
        help="a stored layout such as equirectangular_64, or a layout file (default: the one that an atlas names; for Gaussians the "
        "smallest that holds them)",
    )
    parser.add_argument("--views", type=Path, help="views to score against: a .npz, or a folder of ID.npz (runs/PRESET/views)")
    parser.add_argument("--picture", type=Path, metavar="F.png", help="draw the atlases: at most 8, the sick and the least local first")
    parser.add_argument("--json", type=Path, metavar="F.json", help="write everything found as JSON")
    options = parser.parse_args(arguments)
    # The examination may take long: what it writes to is checked first.
    for path in filter(None, (options.picture, options.json)):
        check_writable(path)

    from . import doctor

    layout = doctor.open_layout(options.layout) if options.layout else None
    if options.views is not None and not options.views.exists():
        raise InputError(f"--views {options.views}: no such file or folder")
    found = doctor.examine_paths(options.paths, layout, options.views)
    print(doctor.text(found))
    for line in found.unreadable:
        print(f"trainer: error: {line}", file=sys.stderr)
    if options.json:
        with replacing(options.json) as partial:
            partial.write_text(found.to_json(), encoding="utf-8")
    if options.picture and found.pictured:
        doctor.save_picture(doctor.picture(found.pictured), options.picture)
    return found.status


COMMANDS = {
    "atlas doctor": (_doctor, "whether atlases are fit to be trained on, as a table, JSON and a picture"),
    "import-fits": (_import_fits, "Gaussians that others have fitted (GaussianVerse) as the fits of a run"),
    "import-views": (_import_views, "the renders of G-Objaverse as the views of a run"),
    "evaluate": (_evaluate, "one report, with pictures, of what a bundle or any other method makes of many prompts"),
    "blind": (_blind, "a page on which people compare two methods without knowing which is which"),
    "votes": (_votes, "win rates from the votes of such a page"),
    "judge": (_judge, "train the offline judge that `evaluate` uses"),
    "card": (_card, "what a run's data set holds, how good it is and whom to thank, as Markdown"),
    "scale": (_scale, "what a large data set would take, projected and simulated from the records of a small one"),
    "ablations": (_ablations, "what the paper's choices are worth at a small scale: trains, judges and writes docs/ablations.md"),
    "layout": (_layouts, "compute a stored layout anew"),
}

if __name__ == "__main__":
    sys.exit(main())
