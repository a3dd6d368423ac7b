"""The farm on processes of this machine and on a Ray cluster of two nodes: failures, killed workers, killed drivers, back-pressure."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from generator.errors import InputError, WorkError
from trainer.farm import append_records, for_each, read_records

ROOT = Path(__file__).resolve().parent.parent


def note(folder: Path, text: str) -> None:
    with open(folder / "calls.txt", "a") as file:
        file.write(text + "\n")


def calls(folder: Path) -> Counter:
    return Counter((folder / "calls.txt").read_text().split())


def work(identifier: str, folder: Path) -> dict | None:
    """Leaves a file; some ids have a fate of their own."""
    note(folder, identifier)
    if identifier.startswith("bad"):
        raise WorkError("nothing of it\nshows")
    if identifier.startswith("odd"):
        return {"psnr": object()}
    first = not (folder / f"{identifier}.tried").exists()
    (folder / f"{identifier}.tried").touch()
    if identifier.startswith("deadly") or (identifier.startswith("killed") and first):
        os.kill(os.getpid(), signal.SIGKILL)
    (folder / f"{identifier}.done").touch()
    if identifier.startswith("plain"):
        return None
    threads = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "OMP_WAIT_POLICY")}
    return {"seconds": {"fit": 1.5, "atlas": 0.5}, "bytes": {"fits": 7}, "psnr": 30.25, "pid": os.getpid(), "threads": threads}


def never_starts(pipe) -> None:
    raise SystemExit(3)


def hang(identifier: str) -> None:
    while True:
        pass


@pytest.fixture(scope="module")
def cluster():
    """The address of a Ray cluster of two nodes on this machine, with one core each."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # all on 127.0.0.1
    import ray
    from ray.cluster_utils import Cluster

    options = {"num_cpus": 1, "num_gpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=options)
    cluster.add_node(**{name: value for name, value in options.items() if name != "include_dashboard"})
    yield cluster.address
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(params=["processes", "cluster"])
def address(request):
    return request.getfixturevalue("cluster") if request.param == "cluster" else ""


def farm(folder: Path, names: list[str], address: str = "", workers: int = 2, **options) -> dict[str, str]:
    items = [(name, folder) for name in names]
    return for_each(work, items, workers, "fit", progress=False, records=folder / "records.jsonl", address=address, **options)


def seen_gpus(identifier: str) -> dict:
    return {"seen": os.environ.get("CUDA_VISIBLE_DEVICES", "all")}


def test_ray_gives_out_gpus_and_says_where_there_is_none(tmp_path, cluster):
    """The nodes only say that they have one each: Ray hands out the number."""
    journal = tmp_path / "records.jsonl"
    for gpus in (0.5, 0):
        assert not for_each(seen_gpus, [("a",), ("b",)], 0, "fit", progress=False, records=journal, address=cluster, gpus=gpus)
        assert all((record["scores"]["seen"] == "0") == bool(gpus) for record in read_records(journal))
    with pytest.raises(InputError, match="gpus must be"):
        for_each(seen_gpus, [("a",)], 0, "fit", gpus=1.5)


def test_processes_that_cannot_start_stop_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.farm._work", never_starts)
    with pytest.raises(WorkError, match=r"cannot start \(status 3\)"):
        farm(tmp_path, ["a", "b"])


def test_every_object_ends_once_and_only_the_one_in_hand_is_repeated(tmp_path, address):
    names = ["a", "bad", "b", "killed", "c", "deadly", "plain", "odd", "d"]
    failures = farm(tmp_path, names, address)
    assert set(failures) == {"bad", "deadly", "odd"}
    assert failures["bad"] == "WorkError: nothing of it shows" and "JSON" in failures["odd"]
    assert "died 3 times" in failures["deadly"]

    lines = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert sorted(line["id"] for line in lines) == sorted(names), "one record an object"
    assert calls(tmp_path) == Counter(names) + Counter({"killed": 1, "deadly": 2}), "nothing else was repeated"
    records = {line["id"]: line for line in lines}
    assert {name: records[name]["attempts"] for name in names} == {**dict.fromkeys(names, 1), "killed": 2, "deadly": 3}
    assert records["killed"]["status"] == "ok" and records["deadly"]["status"] == records["bad"]["status"] == "failed"
    good = records["a"]
    assert good["stage"] == "fit" and good["reason"] == "" and good["node"] and good["wall"] >= 0
    assert good["seconds"] == {"fit": 1.5, "atlas": 0.5} and good["bytes"] == {"fits": 7} and good["scores"]["psnr"] == 30.25
    assert good["scores"]["threads"] == {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    assert list(records["plain"]["seconds"]) == ["fit"], "work that says nothing is timed as a whole"
    assert good["scores"]["pid"] != os.getpid()


def test_a_hung_object_is_ended(tmp_path):
    failures = for_each(hang, [("loop",)], 1, "fit", progress=False, attempts=1, limit=1.0)
    assert "limit of 1 s" in failures["loop"]


def test_items_are_drawn_as_workers_become_free(tmp_path, address):
    """However many items there are, few of them are in memory."""
    drawn, lead = 0, []

    def items():
        nonlocal drawn
        for number in range(40):
            drawn += 1
            done = len((tmp_path / "records.jsonl").read_text().splitlines()) if (tmp_path / "records.jsonl").exists() else 0
            lead.append(drawn - done)
            yield f"{number}", tmp_path

    assert for_each(work, items(), 2, "fit", progress=False, records=tmp_path / "records.jsonl", address=address) == {}
    assert drawn == 40 and max(lead) <= 4


@pytest.mark.parametrize("kind", ["processes", "cluster"])
def test_a_killed_driver_resumes_and_loses_only_what_was_in_hand(tmp_path, kind, request):
    address = request.getfixturevalue("cluster") if kind == "cluster" else ""
    names = [f"n{number}" for number in range(60)]
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom tests.test_farm import slow\nfrom trainer.farm import for_each\n"
        "folder = Path(sys.argv[1])\n"
        "if __name__ == '__main__':\n"
        "    items = [(f'n{n}', folder) for n in range(60)]\n"
        "    for_each(slow, items, 2, 'fit', False, records=folder / 'records.jsonl', address=sys.argv[2])\n"
    )
    script = tmp_path / "driver.py"
    script.write_text(code)
    driver = subprocess.Popen([sys.executable, script, tmp_path, address], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    records = tmp_path / "records.jsonl"
    while not records.exists() or len(records.read_text().splitlines()) < 5:
        assert driver.poll() is None, "the driver must not end by itself"
        time.sleep(0.02)
    driver.kill()
    driver.wait()
    # What the worst moment leaves: half a line.
    with open(records, "a") as file:
        file.write('{"id": "n5')
    done = {record["id"] for record in read_records(records)}
    assert 5 <= len(done) < 60
    # Workers of the killed driver may still end the object in their hand.
    time.sleep(0.5)
    before = calls(tmp_path)
    assert len(set(before) - done) <= 2, "no more than one object a worker was in hand"
    assert farm(tmp_path, [name for name in names if name not in done], address) == {}
    ids = [record["id"] for record in read_records(records)]
    assert sorted(ids) == sorted(names), "the cut line swallowed no record"
    repeated = calls(tmp_path) - Counter(names)
    assert set(repeated) <= set(before) - done and sum(repeated.values()) <= 2


def slow(identifier: str, folder: Path) -> dict | None:
    time.sleep(0.05)
    return work(identifier, folder)


def test_a_journal_keeps_the_last_word_and_survives_damage(tmp_path):
    path = tmp_path / "records.jsonl"
    assert read_records(path) == []
    append_records(path, [{"id": "a", "stage": "fit", "status": "failed"}, {"id": "ä", "stage": "fit", "status": "ok"}])
    with open(path, "ab") as file:
        file.write(b'[1]\n"text"\n{"stage": "fit"}\n\xff\xfe\n{"id": "cut')
    append_records(path, [{"id": "a", "stage": "fit", "status": "ok"}, {"id": "a", "stage": "atlas", "status": "ok"}])
    found = [(record["id"], record["stage"], record["status"]) for record in read_records(path)]
    assert found == [("a", "fit", "ok"), ("ä", "fit", "ok"), ("a", "atlas", "ok")]


@pytest.mark.parametrize(
    "address,message",
    [
        ("127.0.0.1:1", "no Ray cluster answers"),
        ("auto", "no Ray cluster answers at 127.0.0.1:2"),
        ("nowhere", "HOST:PORT"),
        ("ray://127.0.0.1:1", "HOST:PORT"),
    ],
)
def test_a_wrong_address_is_one_clear_line(tmp_path, address, message, monkeypatch):
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:2")
    with pytest.raises(InputError, match=message) as caught:
        farm(tmp_path, ["a"], address)
    assert "--address" in str(caught.value) and "\n" not in str(caught.value)


def test_nothing_to_do_starts_nothing(tmp_path):
    assert for_each(work, [], 2, "fit", address="127.0.0.1:1") == {}
    with pytest.raises(InputError, match="workers"):
        for_each(work, [("a", tmp_path)], -1, "fit")


def test_an_object_goes_from_its_mesh_to_its_atlas_in_one_task(tmp_path, capsys):
    pytest.importorskip("bpy")
    # Not at the top: every worker of the other tests imports this module for its work.
    from trainer import stages
    from trainer.dataset import read_shards
    from trainer.presets import PRESETS
    from trainer.views import Views, ViewSettings, deselected

    meshes, run = tmp_path / "meshes", tmp_path / "runs" / "farm"
    meshes.mkdir()
    run.mkdir(parents=True)
    for name, height in (("plank", 0.2), ("tower", 3)):
        corners = [f"v {x} {y} {z}" for x in (0, 1) for y in (0, height) for z in (0, 1)]
        faces = ["f 1 2 4 3", "f 5 7 8 6", "f 1 5 6 2", "f 3 4 8 7", "f 1 3 7 5", "f 2 6 8 4"]
        (meshes / f"{name}.obj").write_text("\n".join([*corners, *faces]) + "\n")
    (meshes / "ghost.obj").write_text("this is no mesh\n")
    (meshes / "captions.csv").write_text("file,caption\nplank.obj,a plank\ntower.obj,a tower\nghost.obj,a ghost\n")
    preset = replace(
        PRESETS["tiny"], sources=(str(meshes),), include="", limit=0, minimum_psnr=1.0, workers=1,
        views=ViewSettings(train=4, held_out=1, size=32, samples=1), fit=replace(PRESETS["tiny"].fit, count=200, steps=3),
    )  # fmt: skip
    stages.farm(preset, run)
    assert "farm: 2 of 3 objects" in capsys.readouterr().out
    records = {record["id"]: record for record in read_records(run / "records.jsonl")}
    assert records["ghost"]["status"] == "failed" and records["ghost"]["reason"].startswith("WorkError: views failed: ")
    plank = records["plank"]
    assert set(plank["seconds"]) == set(plank["cpu"]) == {"views", "fit", "atlas"}
    assert {kind: (run / path).stat().st_size for kind, path in _files("plank").items()} == plank["bytes"]
    assert plank["scores"]["psnr"] > 1 and plank["scores"]["gaussians"] == 200
    shards = {sample.id: sample.record for sample, _ in read_shards(run / "shards")}
    assert set(shards) == {"plank", "tower"} and "a plank" in shards["plank"]["captions"]

    # The other stages find everything done.
    stages.fit(preset, run)
    # Only what is missing is made again, the failed object is tried again, and with a higher bar the worse fit is left out.
    worse, better = sorted(("plank", "tower"), key=lambda name: records[name]["scores"]["psnr"])
    (run / "atlases" / f"{better}.safetensors").unlink()
    stages.farm(replace(preset, minimum_psnr=records[worse]["scores"]["psnr"] + 0.001), run)
    lines = [json.loads(line) for line in (run / "records.jsonl").read_text().splitlines()]
    assert Counter(line["id"] for line in lines) == {"plank": 2, "tower": 2, "ghost": 2}
    assert {line["id"]: set(line["seconds"]) for line in lines[3:] if line["status"] == "ok"} == {better: {"atlas"}, worse: set()}
    assert {sample.id for sample, _ in read_shards(run / "shards")} == {better}
    # Other settings of the fit make it again, and its atlas with it, but not the views.
    stages.farm(replace(preset, fit=replace(preset.fit, steps=5)), run)
    lines = [json.loads(line) for line in (run / "records.jsonl").read_text().splitlines()][6:]
    assert {line["id"]: set(line["seconds"]) for line in lines if line["status"] == "ok"} == dict.fromkeys(
        ("plank", "tower"), {"fit", "atlas"}
    )
    # What is not chosen any more is not learned, though it is all there.
    capsys.readouterr()
    stages.farm(replace(preset, fit=replace(preset.fit, steps=5), exclude="tower"), run)
    assert "farm: 1 objects of earlier runs are left out" in capsys.readouterr().out
    assert {sample.id for sample, _ in read_shards(run / "shards")} == {"plank"} and deselected(run / "views") == {"tower"}
    # Damaged views cost one run, and the next renders them again.
    (run / "views" / "plank.npz").write_bytes(b"damaged")
    again = replace(preset, fit=replace(preset.fit, steps=6), exclude="tower|ghost")
    with pytest.raises(WorkError, match="not a file of views"):
        stages.farm(again, run)
    stages.farm(again, run)
    assert len(Views.load(run / "views" / "plank.npz")) == 5


def _files(name: str) -> dict[str, str]:
    return {"views": f"views/{name}.npz", "fits": f"fits/{name}.ply", "atlases": f"atlases/{name}.safetensors"}
