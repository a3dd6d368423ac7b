"""The trainer's command line: `python -m trainer STAGE --preset NAME`, where STAGE is one of the stages, `train` or `layout`."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from generator.errors import InputError, WorkError


def main(arguments: list[str] | None = None) -> int:
    """Run one stage or all of them; 0 when done, 2 for bad usage or input, 1 when the work failed."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        return _run(arguments)
    except InputError as error:
        print(f"trainer: error: {error}", file=sys.stderr)
        return 2
    except WorkError as error:
        print(f"trainer: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("trainer: stopped; the same command goes on from here", file=sys.stderr)
        return 130


def _run(arguments: list[str]) -> int:
    from .presets import PRESETS
    from .stages import STAGES

    names = (*STAGES, "train", "layout")
    parser = argparse.ArgumentParser(
        prog="python -m trainer",
        description="From objects to a model bundle, stage by stage. `train` runs every stage in order; each goes on where it stopped.",
        epilog="`python -m trainer STAGE --preset NAME --help` lists every setting; any can be given, e.g. --finetune.max-steps 500",
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
    if options.stage == "layout":
        return _layouts(rest, options.help)

    # tyro turns the nested dataclasses, with the comment beside each field, into options.
    import tyro

    if options.help:
        parser.print_help()
        print()
    prog = f"python -m trainer {options.stage} --preset {options.preset}"
    preset = tyro.cli(type(PRESETS[options.preset]), default=PRESETS[options.preset], args=["--help"] if options.help else rest, prog=prog)
    run = options.runs / preset.name
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--runs {options.runs}: cannot write there ({error.strerror}); choose another folder") from error
    for name in STAGES if options.stage == "train" else (options.stage,):
        start = time.perf_counter()
        STAGES[name](preset, run)
        print(f"{name}: {time.perf_counter() - start:.1f} s", flush=True)
    return 0


def _layouts(arguments: list[str], help_wanted: bool) -> int:
    """Compute the stored layouts anew."""
    from generator.atlas.layout import PROJECTIONS, default_path

    from .atlas import compute_layout

    parser = argparse.ArgumentParser(prog="python -m trainer layout", description="Compute and store the layout of an atlas size.")
    parser.add_argument("--size", type=int, default=64, help="cells a side (default: 64)")
    parser.add_argument("--projection", choices=PROJECTIONS, default="equirectangular")
    options = parser.parse_args(["--help"] if help_wanted else arguments)
    layout = compute_layout(options.size, options.projection)
    layout.save(default_path(options.size, options.projection))
    print(f"layout {layout.id}: {default_path(options.size, options.projection)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
