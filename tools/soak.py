"""What only shows after a while: many generations in one session, a batch that is killed again and again, two Blenders at once.

    python tools/soak.py session [--count 1000] [--steps 4]
    python tools/soak.py batch [--count 200] [--kills 20]
    python tools/soak.py pair [--count 20]

All use the bundled model. Each ends with status 1 and the reason if something was lost, left half-written, made twice, or if memory
grew. What was found is in docs/reliability.md.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tools"))

COLOURS = ("red", "green", "blue", "yellow", "black", "white", "brown", "grey", "orange", "purple")
# Steps of a solver matter neither to memory nor to files.
FEW = ["--steps", "2", "--size", "64", "--samples", "1"]
# Growth of memory, in MB, that is no leak: allocators keep some of what they once had.
GROWTH = 50.0
SUFFIXES = ("ply", "png", "blend")


def session(options: argparse.Namespace) -> None:
    """One process generates and deletes objects; its memory after a tenth of them and at the end."""
    import blender

    with tempfile.TemporaryDirectory() as folder:
        blender.start(Path(folder))
        import bpy

        prompts = _prompts(max(20, options.count // 10))
        marks: dict[int, float] = {}
        started = time.perf_counter()
        for index in range(options.count):
            done = bpy.ops.gaussian_atlas.generate(prompt=prompts[index % len(prompts)], seed=index, steps=options.steps)
            if done != {"FINISHED"}:
                _fail(f"generation {index + 1} ended with {done}")
            for object in [o for o in bpy.data.objects if o.type == "POINTCLOUD"]:
                cloud = object.data
                bpy.data.objects.remove(object)
                bpy.data.pointclouds.remove(cloud)
            if (index + 1) % max(1, options.count // 10) == 0:
                marks[index + 1] = _resident()
                print(f"{index + 1:6} generations  {marks[index + 1]:7.1f} MB  {time.perf_counter() - started:7.0f} s", flush=True)
        values = list(marks.values())
        growth = values[-1] - values[0]
        print(f"{options.count} generations: {growth:+.1f} MB from the first tenth to the last")
        if growth > GROWTH:
            _fail(f"memory grew by {growth:.0f} MB")


def batch(options: argparse.Namespace) -> None:
    """A batch is killed at random moments and started again until it is through."""
    chance = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        prompts, out = _write_prompts(Path(folder), options.count), Path(folder) / "out"
        kills = runs = 0
        while True:
            runs += 1
            process = subprocess.Popen(_command(prompts, out), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            try:
                # Long enough to get past importing, short enough to be killed on the way.
                _, errors = process.communicate(timeout=None if kills >= options.kills else chance.uniform(8, 20))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.communicate()
                kills += 1
                print(f"killed {kills} times, {_check_files(out)} objects so far, each whole", flush=True)
                continue
            if process.returncode:
                _fail(f"run {runs} ended with status {process.returncode}: {errors.strip()}")
            break
        _check_complete(out, options.count)
        print(f"{options.count} prompts, {kills} kills, {runs} runs: nothing lost, nothing twice, nothing half-written")


def pair(options: argparse.Namespace) -> None:
    """Two processes write the same objects into the same folder at once."""
    with tempfile.TemporaryDirectory() as folder:
        prompts, out = _write_prompts(Path(folder), options.count), Path(folder) / "out"
        both = [
            subprocess.Popen(_command(prompts, out), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for _ in "ab"
        ]
        for process in both:
            _, errors = process.communicate()
            if process.returncode:
                _fail(f"one of two ended with status {process.returncode}: {errors.strip()}")
        _check_complete(out, options.count, times=2)
        print(f"{options.count} prompts by two at once: every file whole, every line of {out.name}/results.jsonl readable")


def _prompts(count: int) -> list[str]:
    """So many different prompts of known things."""
    info = json.loads((ROOT / "models" / "starter" / "bundle.json").read_text(encoding="utf-8"))
    known = [f"a {colour} {noun}" for noun in info["vocabulary"] for colour in COLOURS]
    return random.Random(1).sample(known, count)


def _write_prompts(folder: Path, count: int) -> Path:
    path = folder / "prompts.txt"
    path.write_text("\n".join(_prompts(count)) + "\n", encoding="utf-8")
    return path


def _command(prompts: Path, out: Path) -> list[str]:
    return [sys.executable, str(ROOT / "tools" / "blender.py"), "generate", "--prompts", str(prompts), "--out", str(out), *FEW]


def _check_files(out: Path) -> int:
    """Whether every file under its own name is whole; the number of objects with all of theirs."""
    formats = importlib.import_module("generator.formats")
    if not out.is_dir():
        return 0
    for path in sorted(out.iterdir()):
        if path.name.startswith("."):
            continue
        if path.suffix == ".ply":
            formats.load(path)
        elif path.suffix == ".png" and not path.read_bytes().endswith(b"IEND\xaeB`\x82"):
            _fail(f"{path.name} is half a picture")
        elif path.suffix == ".blend" and path.stat().st_size < 10_000:
            _fail(f"{path.name} has {path.stat().st_size} bytes")
    names = Counter(path.stem for path in out.iterdir() if path.suffix[1:] in SUFFIXES and not path.name.startswith("."))
    return sum(count == len(SUFFIXES) for count in names.values())


def _check_complete(out: Path, count: int, times: int = 1) -> None:
    """Whether each prompt has its files, and at most so many lines that say so."""
    if (found := _check_files(out)) != count:
        _fail(f"{found} of {count} objects are there")
    lines = (out / "results.jsonl").read_text(encoding="utf-8").splitlines()
    records = []
    for line in lines:
        try:
            records.append(json.loads(line))
        except ValueError:
            if times > 1:
                _fail(f"a line of results.jsonl is broken: {line[:80]}")
    done = Counter(record["name"] for record in records if record["status"] == "done")
    if len(done) != count or max(done.values()) > times:
        _fail(f"results.jsonl names {len(done)} of {count} objects, one of them {max(done.values())} times")
    if left := [path.name for path in out.iterdir() if path.suffix[1:] not in (*SUFFIXES, "jsonl") and not path.name.startswith(".")]:
        _fail(f"{', '.join(left[:3])} should not be there")
    hidden = [path.name for path in out.iterdir() if path.name.startswith(".")]
    print(f"left behind by killed runs: {len(hidden)} hidden files")


def _resident() -> float:
    """Memory of this process in MB."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def _fail(reason: str) -> None:
    print(f"soak: {reason}", file=sys.stderr)
    sys.exit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    for work, count in ((session, 1000), (batch, 200), (pair, 20)):
        kind = kinds.add_parser(work.__name__, help=work.__doc__)
        kind.set_defaults(work=work)
        kind.add_argument("--count", type=int, default=count, help=f"objects (default: {count})")
        if work is session:
            kind.add_argument("--steps", type=int, default=4, help="solver steps of each (default: 4)")
        if work is batch:
            kind.add_argument("--kills", type=int, default=20, help="how often it is killed (default: 20)")
    options = parser.parse_args()
    options.work(options)


if __name__ == "__main__":
    main()
