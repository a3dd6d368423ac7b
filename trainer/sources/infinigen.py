"""Procedural objects of Infinigen (Raistrick et al. 2023, 2024): any number of variants of everyday things, made on this machine.

Infinigen needs a Blender and a NumPy of its own, so it runs in an environment beside ours (`make infinigen` makes .venv-infinigen)
as a child process: `infinigen_spawn.py`, a line of JSON for every object. A factory and a seed always give the same object.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import subprocess
import zlib
from dataclasses import dataclass
from pathlib import Path

from generator.errors import InputError, WorkError
from generator.files import parse_json, replacing

from .captions import Part, describe
from .infinigen_factories import FACTORIES, Factory
from .obj_parts import MAIN_SHARE, PART_SHARE, material_word
from .objects import CACHE, SourceObject

INFINIGEN = "infinigen"
LIBRARY = "Infinigen 1.15.5"
LICENCE = "BSD-3-Clause"
PYTHON = Path(__file__).resolve().parents[2] / ".venv-infinigen" / "bin" / "python"
# Names another Python that has infinigen and its bpy.
PYTHON_VARIABLE = "GAUSSIAN_ATLAS_INFINIGEN_PYTHON"
SCRIPT = Path(__file__).with_name("infinigen_spawn.py")
# Changes when the same factory and seed give another file: older files are then made again.
RECIPE = 1
# Objects of `infinigen` without a number: so many of every factory.
OF_EACH = 20
# A fresh process after so many objects, whatever Blender has piled up.
OBJECTS_PER_PROCESS = 25
# Seconds by the clock after which an object is taken for hung; most need less than ten of one core.
LIMIT = 600.0


@dataclass(frozen=True)
class Variant:
    """One object to be made."""

    factory: Factory
    number: int  # of this factory, from 0

    @property
    def id(self) -> str:
        return f"infinigen-{self.factory.slug}-{self.number:05d}"

    @property
    def seed(self) -> int:
        """Unlike for every factory: equal seeds give equal materials."""
        return (zlib.crc32(self.factory.slug.encode()) + self.number) % 2**31


def variants(count: int) -> list[Variant]:
    """The first `count` objects: the first of every factory, then the second, so that a larger set repeats a smaller one.

    Raises:
        InputError: fewer than one.
    """
    if count < 1:
        raise InputError(f"infinigen:{count}: give the number of objects, at least 1")
    return [Variant(FACTORIES[index % len(FACTORIES)], index // len(FACTORIES)) for index in range(count)]


def infinigen(count: int = OF_EACH * len(FACTORIES), cache: str | Path = CACHE, workers: int = 2) -> list[SourceObject]:
    """Objects that Infinigen makes, in `cache`/infinigen as ID.ply with ID.json; those that are there are not made again.

    Objects that fail or hang are left out, with the reason in their ID.json: delete it to try again. So up to `count` come back.

    Raises:
        InputError: fewer than one is asked for.
        WorkError: something is to be made, and Infinigen's environment is missing or broken; or nothing at all could be made.
    """
    from ..farm import for_each

    wanted = variants(count)
    directory = Path(os.path.abspath(cache)) / INFINIGEN
    missing = [variant for variant in wanted if _read(directory, variant) is None]
    if missing:
        directory.mkdir(parents=True, exist_ok=True)
        python = find_python()
        items = [(variant.id, variant, directory, python) for variant in missing]
        failures = for_each(_make_one, items, workers, INFINIGEN)
        if failures:
            print(f"infinigen: {len(failures)} of {len(missing)} objects could not be made", flush=True)
        broken = next((reason for reason in failures.values() if "cannot start" in reason), None)
        if broken:
            raise WorkError(broken.removeprefix("WorkError: "))
    found = [(variant, _read(directory, variant)) for variant in wanted]
    objects = [_object(variant, answer, directory) for variant, answer in found if answer and answer["status"] == "ok"]
    if not objects:
        raise WorkError(f"infinigen: none of {count} objects could be made: {directory} holds the reasons as ID.json")
    return objects


def find_python() -> Path:
    """The Python of Infinigen's environment.

    Raises:
        WorkError: there is none.
    """
    path = Path(os.environ.get(PYTHON_VARIABLE) or PYTHON)
    if not path.is_file():
        raise WorkError(f"{path}: no environment for Infinigen: run `make infinigen`, or name its Python in {PYTHON_VARIABLE}")
    return path


def _read(directory: Path, variant: Variant) -> dict | None:
    """What is known of an object that was made, or that failed, by this recipe; None if it is to be made."""
    try:
        answer = parse_json((directory / f"{variant.id}.json").read_text(encoding="utf-8"))
        current = answer["recipe"] == RECIPE and answer["seed"] == variant.seed
        whole = answer["status"] != "ok" or (directory / f"{variant.id}.ply").is_file()
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return answer if current and whole else None


def _make_one(identifier: str, variant: Variant, directory: Path, python: Path) -> dict:
    mesh = directory / f"{identifier}.ply"
    task = {"module": variant.factory.module, "factory": variant.factory.name, "seed": variant.seed, "output": str(mesh)}
    answer = _child(python).ask({**task, "limit": LIMIT})
    answer |= {"seed": variant.seed, "recipe": RECIPE}
    with replacing(directory / f"{identifier}.json") as partial:
        partial.write_text(json.dumps(answer), encoding="utf-8")
    if answer["status"] != "ok":
        raise WorkError(answer["reason"])
    return {"seconds": answer.get("seconds", {}), "bytes": {"meshes": mesh.stat().st_size}, "faces": answer["faces"]}


class Child:
    """A process of Infinigen's environment that makes one object after another.

    Raises:
        WorkError: it does not come up.
    """

    def __init__(self, command: list[str]) -> None:
        # A session of its own: Ctrl-C is for us, and it ends when its standard input does.
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        assert self.process.stdin is not None and self.process.stdout is not None  # both are pipes
        self._tasks, self._answers = self.process.stdin, self.process.stdout
        self.asked = 0
        if (self._answer() or {}).get("status") != "ready":
            self.close()
            raise WorkError(f"Infinigen's process cannot start: `{' '.join(command)}` says why")

    def ask(self, task: dict) -> dict:
        """The answer to one task; "failed" where the process died of it, after which it is of no more use."""
        self.asked += 1
        try:
            print(json.dumps(task), file=self._tasks, flush=True)
        except OSError:
            pass
        return self._answer() or {
            "status": "failed",
            "reason": f"Infinigen's process died of it, or it took more than {task['limit']:.0f} s",
        }

    def usable(self) -> bool:
        return self.process.poll() is None and self.asked < OBJECTS_PER_PROCESS

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self._tasks, self._answers):
            try:
                stream.close()
            except OSError:
                pass

    def _answer(self) -> dict | None:
        line = self._answers.readline()
        try:
            return json.loads(line)
        except ValueError:
            self.close()
            return None


_children: dict[Path, Child] = {}


def _child(python: Path) -> Child:
    """This process's own child, made anew when it died or has done its share."""
    child = _children.pop(python, None)
    if child is not None and not child.usable():
        child.close()
        child = None
    if child is None:
        # -P: the script has neighbours with the names of packages.
        child = Child([str(python), "-P", str(SCRIPT)])
        atexit.register(child.close)
    _children[python] = child
    return child


def _object(variant: Variant, answer: dict, directory: Path) -> SourceObject:
    factory = variant.factory
    turns = {0: (1.0, 0.0, 0.0, 1.0), 90: (0.0, -1.0, 1.0, 0.0), -90: (0.0, 1.0, -1.0, 0.0), 180: (-1.0, 0.0, 0.0, -1.0)}
    xx, xy, yx, yy = turns[factory.turn]
    return SourceObject(
        id=variant.id,
        name=factory.nouns[0],
        path=directory / f"{variant.id}.ply",
        captions=_captions(factory, answer),
        category=factory.category,
        creator="Infinigen",
        licence=LICENCE,
        library=LIBRARY,
        rotation=((xx, xy, 0.0), (yx, yy, 0.0), (0.0, 0.0, 1.0)),
        up="z",
    )


def _captions(factory: Factory, answer: dict) -> list[str]:
    """What the parts and switches of one object say about it."""
    from ..captions import colour_word

    parts: dict[str, list[dict]] = {}
    for part in answer["parts"]:
        word = next((word for role in part["roles"] for pattern, word in factory.parts.items() if re.fullmatch(pattern, role, re.I)), "")
        parts.setdefault(word, []).append(part)
    main = parts.pop("", [])
    named = []
    for word, members in parts.items():
        if sum(member["share"] for member in members) >= PART_SHARE:
            largest = max(members, key=lambda member: member["share"])
            named.append(Part(word, colour_word(largest["colour"]), material_word(largest["material"])))
    whole = Part("", "", "")
    if main:
        total = sum(part["share"] for part in main)
        largest = max(main, key=lambda part: part["share"])
        # Of many materials none is the object's.
        if largest["share"] >= MAIN_SHARE * total:
            whole = Part("", colour_word(largest["colour"]), material_word(largest["material"]))
    details = [text for trait, (value, text) in factory.details.items() if answer["traits"].get(trait) == value]
    return describe(factory.nouns, whole, named, details)
