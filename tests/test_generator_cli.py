"""The command line of the generator: what it writes, what it prints, and how it fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from generator import GaussianAtlasPipeline
from generator.__main__ import main
from generator.errors import WorkError
from generator.formats import load, load_metadata, save
from generator.gaussians import Gaussians
from tests.tiny_bundle import write_tiny_bundle

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def splats(count: int = 10) -> Gaussians:
    torch.manual_seed(0)
    return Gaussians(
        torch.rand(count, 3) - 0.5,
        torch.tensor([[1.0, 0, 0, 0]]).repeat(count, 1),
        torch.full((count, 3), 0.01),
        torch.rand(count),
        torch.rand(count, 3),
    )


def test_a_prompt_becomes_a_file_and_a_picture(model: Path, folder: Path, capsys: pytest.CaptureFixture) -> None:
    status = main(["a red armchair", "--output", "o.ply", "--preview", "o.png", "--seed", "7", "--steps", "3", "--model", str(model)])
    captured = capsys.readouterr()
    assert status == 0
    assert captured.out == "o.ply o.png  1024 Gaussians, seed 7\n"
    assert names(folder) == ["o.ply", "o.png"]
    expected = GaussianAtlasPipeline.from_pretrained(model, device="cpu")("a red armchair", seed=7, num_inference_steps=3)
    if not torch.cuda.is_available():
        torch.testing.assert_close(load("o.ply").means, expected.gaussians[0].means)
    metadata = load_metadata("o.ply")
    assert metadata["prompt"] == "a red armchair" and metadata["seed"] == 7 and metadata["steps"] == 3
    assert metadata["model_name"] == "tiny" and len(metadata["model_hash"]) == 64
    from PIL import Image

    with Image.open("o.png") as picture:
        assert picture.size == (512, 512) and len(picture.convert("RGB").getcolors(512 * 512)) > 100


def test_json_and_count(model: Path, folder: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["a lamp", "--output", "o.splat", "--count", "2", "--seed", "4", "--json", "--device", "cpu"]
    assert main([*arguments, "--model", str(model)]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert names(folder) == ["o-0.splat", "o-1.splat"]
    assert [(entry["output"], entry["seed"], entry["gaussians"]) for entry in found["objects"]] == [
        ("o-0.splat", 4, 1024),
        ("o-1.splat", 5, 1024),
    ]
    assert (found["steps"], found["guidance"], found["seed"], found["gaussians"]) == (4, 2.0, 4, 1024)
    assert found["model"]["name"] == "tiny" and found["model"]["path"] == str(model) and found["device"] == "cpu"
    assert {"load", "text", "sample", "decode", "write", "total"} <= found["seconds"].keys()
    assert "loading" in captured.err


def test_a_prompt_named_like_a_command(model: Path, folder: Path) -> None:
    assert main(["--output", "o.ply", "--model", str(model), "--steps", "1", "info"]) == 0
    assert load_metadata("o.ply")["prompt"] == "info"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "PROMPT"),
        (["a lamp"], "--output"),
        (["a lamp", "--output", "o.obj"], ".ply, .splat, .spz"),
        (["", "--output", "o.ply"], "prompt"),
        (["a lamp", "--output", "none/o.ply"], "none"),
        (["a lamp", "--output", "o.ply", "--preview", "o.jpg"], "--preview"),
        (["a lamp", "--output", "o.ply", "--preview", "none/o.png"], "none"),
        (["a lamp", "--output", "o.ply", "--seed", "-1"], "--seed must"),
        (["a lamp", "--output", "o.ply", "--seed", "one"], "--seed"),
        (["a lamp", "--output", "o.ply", "--steps", "0"], "--steps must"),
        (["a lamp", "--output", "o.ply", "--guidance", "nan"], "--guidance must"),
        (["a lamp", "--output", "o.ply", "--count", "0"], "--count must"),
        (["a lamp", "--output", "o.ply", "--model", "no-such-model"], "no-such-model"),
        (["a lamp", "--output", "o.ply", "--device", "tpu9"], "device"),
        (["a lamp", "--output", "o.ply", "--bogus"], "--bogus"),
        (["a", "lamp", "--output", "o.ply"], "lamp"),
        (["info"], "FILE-or-BUNDLE"),
        (["info", "none.ply"], "none.ply"),
        (["info", "."], "bundle"),
        (["convert", "none.ply", "o.spz"], "none.ply"),
        (["convert", "in.ply", "o.xyz"], "o.xyz"),
        (["convert", "in.ply", "none/o.spz"], "none"),
        (["convert", "bad.ply", "o.spz"], "bad.ply"),
    ],
)
def test_bad_input_is_one_line_and_status_2(folder: Path, capsys: pytest.CaptureFixture, arguments: list[str], words: str) -> None:
    save(splats(), "in.ply")
    (folder / "bad.ply").write_bytes(b"ply\nformat")
    before = names(folder)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    (line,) = [text for text in captured.err.splitlines() if not text.startswith("loading")]
    assert line.startswith("gaussian-atlas: error: ") and words in line
    assert captured.out == "" and names(folder) == before


def test_failed_work_is_one_line_and_status_1(model: Path, folder: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    for error, line in (
        (WorkError("the network gave up"), "gaussian-atlas: error: the network gave up"),
        (MemoryError("no\nmemory"), "gaussian-atlas: error: MemoryError: no memory (GAUSSIAN_ATLAS_TRACEBACK=1 shows where)"),
    ):

        def fail(*_args: object, error: Exception = error, **_kwargs: object) -> None:
            raise error

        monkeypatch.setattr(GaussianAtlasPipeline, "_sample", fail)
        assert main(["a lamp", "--output", "o.ply", "--model", str(model)]) == 1
        assert capsys.readouterr().err.splitlines()[-1] == line
    assert names(folder) == []


def test_files_appear_together_or_not_at_all(model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import generator.render

    def fail(*_args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(generator.render, "save_png", fail)
    save(splats(), "o-0.ply")
    before = Path("o-0.ply").read_bytes()
    arguments = ["a lamp", "--output", "o.ply", "--preview", "o.png", "--count", "2", "--steps", "1", "--model", str(model)]
    assert main(arguments) == 130
    assert names(folder) == ["o-0.ply"] and Path("o-0.ply").read_bytes() == before


def test_info_on_a_file(capsys: pytest.CaptureFixture) -> None:
    gaussians = splats()
    save(gaussians, "in.ply", metadata={"prompt": "a lämp", "seed": 3})
    assert main(["info", "in.ply", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["gaussians"] == 10 and found["format"] == "ply" and found["metadata"] == {"prompt": "a lämp", "seed": 3}
    assert found["minimum"] == pytest.approx(gaussians.means.amin(0).tolist(), abs=1e-5)
    assert found["maximum"] == pytest.approx(gaussians.means.amax(0).tolist(), abs=1e-5)
    assert main(["info", "in.ply"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["gaussians", "10"] for line in lines) and any("a lämp" in line for line in lines)


def test_info_gives_no_orders_to_the_terminal(capsys: pytest.CaptureFixture) -> None:
    metadata = {"prompt": "a \x1b]0;title\x07lämp", "deep": ["\x9b2J"], "\x1b[31m": "red", "lines": "one\ntwo"}
    save(splats(), "in.ply", metadata=metadata)
    assert main(["info", "in.ply"]) == 0
    output = capsys.readouterr().out
    assert all(line.isprintable() for line in output.splitlines()) and r"a \u001b]0;title\u0007l\u00e4mp" in output
    assert r"\u009b2J" in output and r'"\u001b[31m": red' in output and r"one\ntwo" in output


def test_info_on_a_bundle(model: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["info", str(model), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["name"] == "tiny" and found["atlas"]["size"] == 32 and found["atlas"]["gaussians"] == 1024
    assert found["prediction_type"] == "v_prediction" and len(found["sha256"]) == 64 and "files" not in found
    assert main(["info", str(model)]) == 0
    assert "CC0-1.0" in capsys.readouterr().out


def test_convert(capsys: pytest.CaptureFixture) -> None:
    gaussians = splats()
    save(gaussians, "in.ply", metadata={"prompt": "a lamp"})
    for chain in (("in.ply", "a.splat"), ("a.splat", "b.spz"), ("b.spz", "c.ply"), ("in.ply", "d.ply")):
        assert main(["convert", *chain]) == 0
    torch.testing.assert_close(load("c.ply").means, gaussians.means, atol=1e-5, rtol=0)
    assert load_metadata("d.ply") == {"prompt": "a lamp"}
    assert "d.ply  10 Gaussians" in capsys.readouterr().out


def test_dropped_rows_are_a_one_line_warning(capsys: pytest.CaptureFixture) -> None:
    import numpy as np

    save(splats(), "in.splat")
    content = bytearray(Path("in.splat").read_bytes())
    content[:4] = np.float32("nan").tobytes()
    Path("in.splat").write_bytes(content)
    assert main(["convert", "in.splat", "out.ply"]) == 0
    assert capsys.readouterr().err.startswith("gaussian-atlas: warning: in.splat: dropped 1 of 10 Gaussians")
    assert len(load("out.ply")) == 9


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_interrupt_leaves_nothing(model: Path, folder: Path) -> None:
    command = [sys.executable, "-m", "generator", "a lamp", "--output", str(folder / "o.ply"), "--steps", "1000", "--model", str(model)]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A suite that runs in the background has Ctrl-C ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr.readline().startswith("loading")
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    assert out == "" and "interrupted" in err and "Traceback" not in err
    assert names(folder) == []


def test_help_and_version() -> None:
    run = [sys.executable, "-m", "generator"]
    text = subprocess.run([*run, "--help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for option in ("output", "preview", "seed", "steps", "guidance", "negative", "count", "model", "device", "json"):
        assert f"--{option}" in text
    assert "info FILE-or-BUNDLE" in text and "convert IN OUT" in text
    assert subprocess.run([*run, "--version"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.startswith("gaussian-atlas ")


def test_what_a_model_does_not_know_is_told_with_known_things_that_mean_alike(folder: Path, capsys: pytest.CaptureFixture) -> None:
    knows = ("armchair", "bicycle", "couch", "table lamp")
    model = str(write_tiny_bundle(folder / "knowing", vocabulary=knows))
    assert main(["a red divan", "--output", "o.ply", "--json", "--model", model, "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    hint = json.loads(captured.out)["hint"]
    assert "not trained on \u201cdivan\u201d" in hint and hint.index("couch") < hint.index("bicycle") and hint in captured.err
    assert main(["a red armchair", "--output", "o.ply", "--json", "--model", model, "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["hint"] == "" and "not trained" not in captured.err
