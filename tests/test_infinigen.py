"""The source `infinigen`: which objects, the child process that makes them (a stand-in here), and what is said of them.

Infinigen itself is run only where its environment is (`make infinigen`, or GAUSSIAN_ATLAS_INFINIGEN_PYTHON).
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import pytest

from generator.errors import InputError, WorkError
from trainer.sources import open_source
from trainer.sources.captions import COLOUR_WORDS
from trainer.sources.infinigen import PYTHON, PYTHON_VARIABLE, RECIPE, SCRIPT, Child, find_python, infinigen, variants
from trainer.sources.infinigen_factories import FACTORIES

# Answers as infinigen_spawn.py does. What it does with an object is decided by the factory.
STAND_IN = """
import json, os, sys, time
log = open({log!r}, "a", buffering=1)
print(json.dumps({{"status": "ready"}}), flush=True)
for line in sys.stdin:
    task = json.loads(line)
    log.write(f"{{os.getpid()}} {{task['factory']}} {{task['seed']}}\\n")
    if task["factory"] == {crash!r}:
        os._exit(11)
    if task["factory"] == {fail!r}:
        print(json.dumps({{"status": "failed", "reason": "ValueError: no faces"}}), flush=True)
        continue
    with open(task["output"], "w") as file:
        file.write("ply\\n")
    parts = [{{"material": "shader_wood", "roles": ["surface"], "colour": [0.45, 0.28, 0.15], "share": 0.7}}]
    parts.append({{"material": "shader_brushed_black_metal", "roles": ["limb_surface"], "colour": [0.05, 0.05, 0.05], "share": 0.3}})
    answer = {{"status": "ok", "faces": 12, "parts": parts, "traits": {{"has_arm": True}}, "seconds": {{"spawn": 1.0}}}}
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A function that puts a stand-in in the script's place, and returns the log of what it was asked."""

    def use(crash: str = "", fail: str = "") -> Path:
        log = tmp_path / "log.txt"
        script = tmp_path / "stand_in.py"
        script.write_text(STAND_IN.format(log=str(log), crash=crash, fail=fail))
        monkeypatch.setenv(PYTHON_VARIABLE, str(_wrapper(tmp_path, script)))
        return log

    return use


def _wrapper(folder: Path, script: Path) -> Path:
    """A "Python" that runs the stand-in whatever it is given: the workers are processes of their own and know only the variable."""
    path = folder / "python"
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{script}"\n')
    path.chmod(0o755)
    return path


def test_factories_are_many_and_their_ids_can_be_told_apart():
    assert len(FACTORIES) >= 60 and len({factory.slug for factory in FACTORIES}) == len(FACTORIES)
    nouns = [noun for factory in FACTORIES for noun in factory.nouns]
    assert all(noun == noun.lower() and not COLOUR_WORDS & set(noun.split()) - {"green"} for noun in nouns)
    assert all(factory.turn in (0, 90, -90, 180) for factory in FACTORIES)


def test_a_larger_set_repeats_a_smaller_one_and_seeds_differ():
    small, large = variants(len(FACTORIES) + 3), variants(3 * len(FACTORIES))
    assert large[: len(small)] == small
    assert small[0].id == "infinigen-chair-00000" and small[len(FACTORIES)].id == "infinigen-chair-00001"
    assert len({variant.id for variant in large}) == len({variant.seed for variant in large}) == len(large)
    assert set(Counter(variant.factory.slug for variant in large).values()) == {3}
    with pytest.raises(InputError, match="at least 1"):
        variants(0)


def test_objects_are_made_once_and_say_what_they_are(tmp_path, stand_in):
    log = stand_in()
    objects = open_source("infinigen:3", tmp_path / "cache", workers=1)
    assert [o.id for o in objects] == ["infinigen-chair-00000", "infinigen-bar-stool-00000", "infinigen-office-chair-00000"]
    chair = objects[0]
    assert (chair.licence, chair.creator, chair.library, chair.up) == ("BSD-3-Clause", "Infinigen", "Infinigen 1.15.5", "z")
    assert chair.path == tmp_path / "cache" / "infinigen" / "infinigen-chair-00000.ply" and chair.path.is_file()
    assert chair.captions[:2] == ["chair", "a chair"]
    assert {"a wooden chair", "a brown wooden chair with black metal legs and armrests"} <= set(chair.captions)
    # Infinigen's +X is the front: it turns to -Y.
    assert chair.rotation[0][0] == 0 and [row[0] for row in chair.rotation] == [0, -1, 0]
    assert str(tmp_path) not in json.dumps(chair.record())
    asked = log.read_text().splitlines()
    assert len(asked) == 3 and len({line.split()[0] for line in asked}) == 1, "one process makes several objects"
    open_source("infinigen:3", tmp_path / "cache", workers=1)
    assert len(log.read_text().splitlines()) == 3, "what is there is not made again"
    (tmp_path / "cache" / "infinigen" / "infinigen-chair-00000.ply").unlink()
    open_source("infinigen:3", tmp_path / "cache", workers=1)
    assert len(log.read_text().splitlines()) == 4, "what is gone is"


def test_a_crash_and_a_failure_cost_one_object_each(tmp_path, stand_in):
    log = stand_in(crash="BarChairFactory", fail="SofaFactory")
    objects = infinigen(5, tmp_path, workers=1)
    assert [o.id.split("-")[1] for o in objects] == ["chair", "office", "armchair"]
    pids = [line.split()[0] for line in log.read_text().splitlines()]
    assert len(pids) == 5 and len(set(pids)) == 2, "a new process after the crash, none after the failure"
    reasons = {name: json.loads((tmp_path / "infinigen" / f"infinigen-{name}-00000.json").read_text()) for name in ("bar-stool", "sofa")}
    assert "died" in reasons["bar-stool"]["reason"] and reasons["sofa"]["reason"] == "ValueError: no faces"
    infinigen(5, tmp_path, workers=1)
    assert len(log.read_text().splitlines()) == 5, "what failed is not tried again by itself"


def test_another_recipe_makes_everything_again(tmp_path, stand_in, monkeypatch):
    log = stand_in()
    infinigen(1, tmp_path, workers=1)
    path = tmp_path / "infinigen" / "infinigen-chair-00000.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "recipe": RECIPE - 1}))
    infinigen(1, tmp_path, workers=1)
    assert len(log.read_text().splitlines()) == 2


def test_a_missing_or_broken_environment_is_said_and_nothing_is_written_off(tmp_path, monkeypatch):
    monkeypatch.setenv(PYTHON_VARIABLE, str(tmp_path / "none"))
    with pytest.raises(WorkError, match="make infinigen"):
        infinigen(1, tmp_path, workers=1)
    monkeypatch.setenv(PYTHON_VARIABLE, "/bin/false")
    with pytest.raises(WorkError, match="cannot start"):
        infinigen(1, tmp_path, workers=1)
    assert not list((tmp_path / "infinigen").glob("*.json"))
    with pytest.raises(InputError, match="give the number of objects"):
        open_source("infinigen:many", tmp_path)


def test_a_hanging_process_ends_itself(tmp_path):
    """The limit is kept by the script's own watchdog, which a loop in Blender cannot stop: here with its loop, without Blender."""
    code = (
        "import faulthandler, json, sys, time\n"
        'print(json.dumps({"status": "ready"}), flush=True)\n'
        "for line in sys.stdin:\n"
        '    faulthandler.dump_traceback_later(json.loads(line)["limit"], exit=True)\n'
        "    time.sleep(60)\n"
    )
    child = Child([sys.executable, "-c", code])
    answer = child.ask({"limit": 0.2})
    assert answer["status"] == "failed" and "more than 0 s" in answer["reason"] and not child.usable()


def _environment() -> str | None:
    try:
        return str(find_python())
    except WorkError:
        return None


@pytest.mark.skipif(_environment() is None, reason=f"no environment for Infinigen: make infinigen, or {PYTHON_VARIABLE}; {PYTHON}")
def test_infinigen_makes_the_same_painted_object_twice(tmp_path):
    import numpy as np

    task = {"module": "tableware", "factory": "ForkFactory", "seed": 4, "limit": 300}
    child = Child([_environment(), "-P", str(SCRIPT)])
    answers = [child.ask({**task, "output": str(tmp_path / f"{name}.ply")}) for name in "ab"]
    child.close()
    assert [answer["status"] for answer in answers] == ["ok", "ok"]
    data = (tmp_path / "a.ply").read_bytes()
    assert data == (tmp_path / "b.ply").read_bytes()
    header, body = data.split(b"end_header\n", 1)
    count = int(header.split(b"element vertex ")[1].split()[0])
    rows = np.frombuffer(body, dtype=[("position", "<f4", 3), ("colour", "u1", 4)], count=count)
    assert rows["colour"][:, 3].min() > 0 and rows["colour"][:, :3].std() > 0
    extent = rows["position"].max(0) - rows["position"].min(0)
    assert 0.1 < extent.max() < 0.4, "metres"
