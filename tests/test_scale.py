"""Projection and simulation: closed forms, conservation, determinism, odd records, and the figures of the documentation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainer import scale
from trainer.__main__ import main
from trainer.scale import Cluster, measure, simulate

ROOT = Path(__file__).resolve().parent.parent
CALM = Cluster(workers=10, lifetime=1e15, restart=0.0, dispatch=0.0)


def journal(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def farmed(identifier: str, **changes) -> dict:
    steps = {"views": 3.0, "fit": 2.0, "atlas": 1.0}
    record = {"id": identifier, "stage": "farm", "status": "ok", "seconds": {step: 9 * value for step, value in steps.items()}}
    return {**record, "cpu": steps, "nth": 2, "bytes": {"views": 1000, "fits": 500, "atlases": 400}, "scores": {"kept": True}, **changes}


def test_equal_objects_without_trouble_are_packed_perfectly():
    found = simulate([2.0], 1000, CALM)
    assert found.makespan == found.ideal == 200.0 and found.utilisation == 1.0
    assert (found.lost, found.deaths, found.given_up) == (0.0, 0, 0)
    assert simulate([2.0], 1001, CALM).makespan == 202.0, "one object more takes one round more"
    assert simulate([2.0], 3, CALM).makespan == 2.0, "more workers than objects"


def test_a_straggler_bounds_the_end():
    seconds = [1.0] * 99 + [50.0]
    found = simulate(seconds, 2000, CALM, seed=3)
    assert found.ideal <= found.makespan <= found.ideal + 50.0
    assert found.utilisation == pytest.approx(found.ideal / found.makespan)


def test_the_driver_and_the_start_of_processes_are_paid_for():
    slow = Cluster(workers=10, lifetime=1e15, restart=0.0, dispatch=1.0)
    assert simulate([2.0], 100, slow).makespan == pytest.approx(102.0), "one object a second, the last takes two"
    # 10 workers with 200 objects each: one start-up; with 201 of them, a second process.
    assert simulate([2.0], 2000, CALM, startup=30.0).makespan == pytest.approx(430.0)
    assert simulate([2.0], 2010, CALM, startup=30.0).makespan == pytest.approx(462.0)


def test_dying_workers_lose_what_theory_says():
    mortal = Cluster(workers=50, lifetime=1000.0, restart=10.0, dispatch=0.0, attempts=100)
    found = simulate([10.0], 20_000, mortal, seed=1)
    # Exponential lives: an object is cut off with p = 1 - exp(-d / L), so each needs p / (1 - p) = exp(d / L) - 1 repeats.
    assert found.deaths == pytest.approx(20_000 * (2.718281828**0.01 - 1), rel=0.2)
    assert found.lost / found.deaths == pytest.approx(5.0, rel=0.2), "cut off halfway, on average"
    assert found.given_up == 0 and found.ideal == pytest.approx(4000.0), "every object is finished once"
    assert found.ideal + (found.lost + 10 * found.deaths) / 50 <= found.makespan + 10
    deadly = simulate([10.0], 1000, Cluster(workers=5, lifetime=5.0, restart=0.0, dispatch=0.0, attempts=2), seed=1)
    assert deadly.given_up == pytest.approx(1000 * (1 - 2.718281828**-2) ** 2, rel=0.1), "two tries, each fails with 1 - exp(-d / L)"
    assert deadly.ideal == pytest.approx((1000 - deadly.given_up) * 10 / 5)


def test_a_seed_repeats_itself():
    cluster = Cluster(workers=20, lifetime=500.0)
    assert simulate([1.0, 5.0], 3000, cluster, seed=1) == simulate([1.0, 5.0], 3000, cluster, seed=1)
    assert simulate([1.0, 5.0], 3000, cluster, seed=1) != simulate([1.0, 5.0], 3000, cluster, seed=2)


def test_measuring_leaves_out_first_failed_and_partial_objects(tmp_path):
    records = [
        farmed("first", cpu={"views": 10.0, "fit": 8.0, "atlas": 2.0}, nth=1),
        farmed("a"),
        farmed("b", cpu={"views": 5.0, "fit": 4.0, "atlas": 1.0}),
        farmed("resumed", cpu={"atlas": 100.0}),
        farmed("poor", cpu={"views": 3.0, "fit": 1.0}, scores={"kept": False}),
        farmed("bad", status="failed"),
    ]
    found = measure([journal(tmp_path / "records.jsonl", records)])
    assert found.objects == [6.0, 10.0, 4.0] and found.startup == 14.0 and found.failed == 1 and not found.clock
    assert found.steps == {"views": [3.0, 5.0, 3.0], "fit": [2.0, 4.0, 1.0], "atlas": [1.0, 1.0]}
    assert found.mean("atlas") == pytest.approx(2 / 3), "an object that needs no atlas counts"
    assert found.bytes == {"views": 1000, "fits": 500, "atlases": 400, "shards, no repainted copies": 200}


def test_a_run_without_processor_seconds_is_measured_by_the_clock(tmp_path):
    (tmp_path / "views").mkdir()
    journal(tmp_path / "views" / "views.jsonl", [{"id": "a", "seconds": 4.0}, {"id": "b", "seconds": 0.0}])
    stages = [{"id": "a", "stage": "fit", "status": "ok", "seconds": {"fit": 3.0}}, {"id": "a", "stage": "atlas", "status": "ok"}]
    journal(tmp_path / "records.jsonl", [*stages, {"id": "b", "stage": "fit", "status": "ok", "seconds": {"fit": "long"}, "cpu": 3}])
    found = measure([tmp_path])
    assert found.clock and found.objects == [7.0] and found.bytes == {}


def test_the_report_adds_up(tmp_path, capsys):
    path = journal(tmp_path / "records.jsonl", [farmed("a"), farmed("b")])
    command = ["scale", str(path), "--objects", "3600", "--workers", "10", "6000000", "--seed", "5", "--bandwidth", "2.1"]
    assert main(command) == 0
    text = capsys.readouterr().out
    for row in (
        "| views | 2 | 3.00 | 3.00 | 3.00 | 50% |",
        "| core-hours, fit | 2 |",
        "| **core-hours** | **6** |",
        "| GPU-hours | none: all steps ran on cores |",
        "| the paper: A100-hours, 583 s an object | 583 |",
        "| views (1 kB an object) | 3.6 MB |",
        "| 10 | 1.7 | 454.5 | 1,000.0 | 0.0 MB/s | **cores: views** |",
    ):
        assert row in text.splitlines(), f"{row}\n{text}"
    assert main(command) == 0 and capsys.readouterr().out == text
    assert main([*command, "--gpu", "fit=0.5"]) == 0
    text = capsys.readouterr().out
    assert "| GPU-hours, fit (0.5 s an object, given) | 0 |" in text and "| **core-hours** | **4** |" in text
    assert main(["scale", str(path), "--objects", "10", "--workers", "100000", "--bandwidth", "0.001"]) == 0
    assert "**storage** |" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["nowhere.jsonl"], "no such file"),
        (["{empty}"], "no record of a finished object"),
        (["{good}", "--workers", "0"], "--workers must be above 0"),
        (["{good}", "--objects", "-5"], "--objects must be above 0"),
        (["{good}", "--lifetime", "nan"], "--lifetime must be above 0"),
        (["{good}", "--dispatch", "-1"], "--dispatch must be at least 0"),
        (["{good}", "--gpu", "fit"], "--gpu fit: give STEP=SECONDS"),
        (["{good}", "--gpu", "paint=2"], "one of the steps views, fit, atlas"),
    ],
)
def test_bad_input_is_one_clear_line(tmp_path, capsys, arguments, message):
    places = {"good": journal(tmp_path / "good.jsonl", [farmed("a")]), "empty": journal(tmp_path / "empty.jsonl", [{"id": "a"}])}
    assert main(["scale", *(text.format(**places) for text in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1


@pytest.mark.parametrize("records", ["starter", "fine"])
def test_the_documentation_shows_what_the_command_prints(records, capsys, monkeypatch):
    text = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    command = ["scale", str(ROOT / "docs" / "scale" / f"{records}.jsonl")]
    assert main([*command, "--objects", "205737"]) == 0
    row = capsys.readouterr().out.splitlines()[-1]
    assert row.startswith("| 205,737 | 1,000 |") and row in text.splitlines()
    # 10 million objects take a while to simulate: of that table only the frame is compared.
    monkeypatch.setattr(scale, "simulate", lambda *_: scale.Schedule(0, 0, 0, 0, 0, 0))
    assert main(command) == 0
    assert capsys.readouterr().out.split("| 205,737 |")[0] in text
