"""The data set card, from made records and shards, also from odd ones."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from generator.atlas import Atlas, AtlasLayout
from generator.errors import InputError
from trainer.__main__ import main
from trainer.card import card, histogram, plain
from trainer.dataset import write_shards

CREDIT = {"creator": "Ann", "licence": "CC0-1.0", "library": "Things"}


def lines(path: Path, records: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(record if isinstance(record, str) else json.dumps(record) + "\n" for record in records), encoding="utf-8")


def farmed(identifier: str, **changes) -> dict:
    scores = {"psnr": 30.0, "psnr_foreground": 25.0, "gaussians": 4096, "kept": True}
    record = {"id": identifier, "stage": "farm", "status": "ok", "reason": "", "attempts": 1}
    return {**record, "seconds": {"views": 4.0, "fit": 2.0, "atlas": 0.5}, "scores": scores, **changes}


@pytest.fixture
def run(tmp_path) -> Path:
    run = tmp_path / "starter"
    named = [("chair", "Chair"), ("lamp", "*Lamp* | <b>[x](y)</b>\n# big"), ("poor", "Poor"), ("bad", "Bad"), ("late", "Late")]
    views = [{"id": i, "name": name, "captions": [i], "status": "ok", "reason": "", "seconds": 0.0, **CREDIT} for i, name in named]
    views[3] |= {"status": "failed", "reason": "InputError: no `faces`"}
    lines(run / "views" / "views.jsonl", views)
    (run / "views" / "views.json").write_text('{"train": 24, "held_out": 4, "size": 128, "samples": 16}')
    better = {"psnr": 34.0, "psnr_foreground": 27.0, "gaussians": 2048, "kept": True, "ssim": 0.95, "perceptual": 0.2}
    records = [
        farmed("chair", status="failed", reason="killed", scores={}, seconds={}),
        farmed("chair"),
        farmed("lamp", scores={**better, "perceptual_name": "lpips"}),
        farmed("poor", scores={"psnr": 12.0, "kept": False}),
        farmed("bad", status="failed", reason="WorkError: views failed: no `faces`", scores={}, seconds={}),
        '{"id": "cut',
    ]
    lines(run / "records.jsonl", records)
    atlas = Atlas(torch.rand(16, 32, 32), AtlasLayout.load_default(32).id)

    def sample(name: str, of: str) -> tuple:
        about = {"id": of, "object": of, "captions": [of], "name": dict(named)[of], "psnr": 30.0 if of == "chair" else 34.0, **CREDIT}
        return name, atlas, about

    write_shards([sample("chair", "chair"), sample("chair-red", "chair"), sample("lamp", "lamp")], run / "shards")
    return run


def test_a_card_counts_scores_and_thanks(run):
    text = card(run)
    for row in (
        "| objects | 5 |",
        "| in the shards | 2 |",
        "| failed | 1 |",
        "| left out: the fit is not good enough | 1 |",
        "| not finished | 1 |",
        "| atlases, repainted ones included | 3 |",
        "| views | 24 to fit from and 4 to judge by, 128 pixels, 16 paths a pixel |",
        "| PSNR | 2 | 32.00 ± 2.00 dB | 30.00 | 32.00 | 34.00 |",
        "| PSNR on the object's pixels | 2 | 26.00 ± 1.00 dB | 25.00 | 26.00 | 27.00 |",
        "| SSIM | 1 | 0.9500 ± 0.0000 | 0.9500 | 0.9500 | 0.9500 |",
        "| LPIPS | 1 | 0.2000 ± 0.0000 | 0.2000 | 0.2000 | 0.2000 |",
        "| fit | 3 | 2.00 s | 2.00 s | 0.00 h |",
        "| Things | CC0-1.0 | 2 | Ann |",
        "* Chair (chair): Ann, Things, CC0-1.0",
    ):
        assert row in text.splitlines(), f"{row}\n{text}"
    assert "3,072 ± 1,024 over 2 objects" in text and "10,435 ± 4,453" in text
    assert "* bad, farm: WorkError: views failed: no \\`faces\\`" in text and "killed" not in text
    assert "cells, `" + AtlasLayout.load_default(32).id in text


def test_titles_cannot_break_the_card(run):
    text = card(run)
    assert r"* \*Lamp\* \| \<b\>\[x\](y)\</b\> \# big (lamp): Ann, Things, CC0-1.0" in text.splitlines()
    assert [line for line in text.splitlines() if line.startswith("# ")] == ["# Data set card: starter"]
    lines(run / "views" / "views.jsonl", [{"id": "x", "licence": "A|B", "library": "*L*"}])
    (run / "records.jsonl").unlink()
    for path in (run / "shards").glob("*"):
        path.unlink()
    assert r"| \*L\* | A\|B | 1 | not named |" in card(run).splitlines()


def test_records_without_most_of_their_fields_make_a_card(tmp_path):
    run = tmp_path / "odd"
    odd = {"psnr": None, "psnr_foreground": float("nan"), "gaussians": "many", "ssim": True}
    records = [{"id": "a"}, {"id": "b", "status": "ok"}, {"id": 3, "status": "ok", "seconds": 5, "scores": odd}, [1], "text\n"]
    lines(run / "records.jsonl", [*records, {"id": "c", "status": "ok", "seconds": {"fit": "long", "views": 2}, "scores": [1]}])
    text = card(run)
    assert "| objects | 4 |" in text and "No record says how many." in text and "No object has a score on held-out views" in text
    assert "* a, work: no reason recorded" in text and "* no name (3): maker not named, unknown library, unknown licence" in text
    assert "| views | 1 | 2.00 s | 2.00 s | 0.00 h |" in text and "| unknown | unknown | 4 | not named |" in text


def test_old_runs_without_records_are_read_from_their_shards(run):
    (run / "records.jsonl").unlink()
    text = card(run)
    assert "| in the shards | 2 |" in text and "| PSNR | 2 | 32.00 ± 2.00 dB |" in text
    assert "* bad, views: InputError: no \\`faces\\`" in text


@pytest.mark.parametrize("values", [[5.0], [1024, 1024], [0, 1e6], [29.7, 30.0, 30.3, 34.9], [-3.0, 2.5], [0.11, 0.12, 0.5]])
@pytest.mark.parametrize("digits", [0, 2])
def test_histograms_hold_every_value_in_few_ranges(values, digits):
    rows = histogram(values, digits).splitlines()
    assert sum(int(row.split()[-1]) for row in rows) == len(values) and len(rows) <= 13
    bounds = [re.match(r"\s*(\S+) to\s+(\S+) \|", row).groups() for row in rows]
    numbers = [(float(low.replace(",", "")), float(high.replace(",", ""))) for low, high in bounds]
    assert numbers[0][0] <= min(values) and max(values) <= numbers[-1][1]
    assert all(high == following for (_, high), (following, _) in zip(numbers, numbers[1:], strict=False))


def test_plain_keeps_words():
    assert plain("a chair, 2 legs (old)") == "a chair, 2 legs (old)" and plain("a|b_c", keep="|") == "a|b\\_c"


def test_the_command_writes_the_card_and_names_what_is_missing(run, capsys):
    assert main(["card", "--preset", "starter", "--runs", str(run.parent)]) == 0
    assert (run / "CARD.md").read_text() == card(run) and "CARD.md" in capsys.readouterr().out
    (run.parent / "empty").mkdir()
    for arguments, message in ((["--name", "empty"], "no records of objects"), (["--name", "none"], "no such run")):
        assert main(["card", "--runs", str(run.parent), *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error and len(error.strip().splitlines()) == 1
    assert main(["card", "--runs", str(run.parent), "--output", str(run / "no" / "card.md")]) == 2
    with pytest.raises(InputError, match="records"):
        card(run.parent / "empty")
