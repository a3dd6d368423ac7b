"""The headless command line, with a model that answers at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def run(extension, fake_model, capfd):
    """run("generate", ...) gives (status, standard output, standard error); images are small."""
    batch = extension("blender_addon.batch")

    def call(*arguments):
        extra = ["--size", "32", "--samples", "1"] if arguments[:1] == ("generate",) else []
        capfd.readouterr()
        status = batch.main([*map(str, arguments), *extra])
        return status, *capfd.readouterr()

    return call


def records(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def snapshot(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_one_prompt_writes_blend_ply_and_png(bpy, run, extension, fake_model, tmp_path):
    from PIL import Image

    out = tmp_path / "deep" / "out"
    status, output, errors = run("generate", "--prompt", "a red armchair", "--seed", 3, "--steps", 2, "--out", out)
    assert status == 0 and errors == ""
    names = [f"a-red-armchair-3.{suffix}" for suffix in ("ply", "png", "blend")]
    assert sorted(p.name for p in out.iterdir()) == sorted([*names, "results.jsonl"])
    for name in names:
        assert str(out / name) in output, "says where the files are"
    for stage in ("load", "sample", "ply", "render", "blend"):
        assert f"{stage} " in output, "says how long each stage took"
    (record,) = records(out)
    assert (record["prompt"], record["seed"], record["status"], record["error"]) == ("a red armchair", 3, "done", None)
    assert record["gaussians"] == 200 and set(record["seconds"]) >= {"load", "sample", "ply", "scene", "render", "blend"}
    assert record["files"] == {"ply": names[0], "png": names[1], "blend": names[2]}
    metadata = extension("generator.formats").load_metadata(out / names[0])
    assert metadata["prompt"] == "a red armchair" and metadata["seed"] == 3 and metadata["steps"] == 2
    image = np.asarray(Image.open(out / names[1]).convert("RGB"), int)
    assert image.shape == (32, 32, 3)
    assert image[0, 0].tolist() == [255, 255, 255] and (image.min(axis=2) < 200).sum() > 100, "an object on white"

    bpy.ops.wm.open_mainfile(filepath=str(out / names[2]))
    object = next(o for o in bpy.data.objects if o.type == "POINTCLOUD")
    assert object.gaussian_atlas.prompt == "a red armchair" and object.gaussian_atlas.seed == 3
    assert bpy.context.scene.camera and bpy.context.scene.cycles.transparent_max_bounces >= 256
    assert str(tmp_path) not in bpy.context.scene.render.filepath, "no path of this machine in the file"


def test_that_a_prompt_was_cut_is_said(run, fake_model, tmp_path):
    fake_model.pipeline.notes = ["the end of this prompt is left out"]
    status, out, _ = run("generate", "--prompt", "a chair", "--steps", 1, "--out", tmp_path / "out", "--no-render")
    assert status == 0 and "  the end of this prompt is left out" in out.splitlines()


def test_many_prompts_resume_and_leave_finished_files_alone(run, fake_model, tmp_path):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("a chair\n\n# a comment\na lamp\na chair\n", encoding="utf-8")
    command = ("generate", "--prompts", prompts, "--count", 2, "--steps", 1, "--out", out)
    assert run(*command)[0] == 0
    assert [r["name"] for r in records(out)] == ["a-chair-0", "a-chair-1", "a-lamp-0", "a-lamp-1"]
    assert len(fake_model.pipeline.calls) == 4
    before = snapshot(out)
    status, output, _ = run(*command)
    assert status == 0 and "4 already there" in output and len(fake_model.pipeline.calls) == 4
    assert snapshot(out) == before

    (out / "a-lamp-0.png").unlink()  # a finished object that lost a file is made again
    status, output, _ = run(*command)
    assert status == 0 and len(fake_model.pipeline.calls) == 5 and (out / "a-lamp-0.png").exists()
    run(*command[:-4], "--steps", 2, "--out", out)  # and so is one that other settings made
    assert len(fake_model.pipeline.calls) == 9
    run(*command[:-4], "--steps", 2, "--out", out, "--no-resume")
    assert len(fake_model.pipeline.calls) == 13


def test_goes_on_after_an_error_and_exits_1(run, extension, fake_model, tmp_path):
    WorkError = extension("generator.errors").WorkError

    def fail_on_lamps(step):
        if fake_model.pipeline.calls[-1]["prompt"] == "a lamp":
            raise WorkError("the network gave numbers that are not finite")

    fake_model.pipeline.before_step = fail_on_lamps
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("a chair\na lamp\na table")
    status, output, errors = run("generate", "--prompts", prompts, "--steps", 1, "--out", out, "--no-render")
    assert status == 1 and "1 failed" in output
    assert errors.strip().splitlines() == ["gaussian_atlas: the network gave numbers that are not finite"]
    assert [(r["name"], r["status"]) for r in records(out)] == [("a-chair-0", "done"), ("a-lamp-0", "failed"), ("a-table-0", "done")]
    assert not list(out.glob("a-lamp*")) and not list(out.glob("*.png"))
    fake_model.pipeline.before_step = lambda step: None
    status, output, _ = run("generate", "--prompts", prompts, "--steps", 1, "--out", out, "--no-render")
    assert status == 0 and "2 already there" in output
    assert records(out)[-1]["name"] == "a-lamp-0" and records(out)[-1]["status"] == "done"


def test_an_unexpected_error_is_recorded_too(run, fake_model, tmp_path):
    def fail(step):
        raise ZeroDivisionError("boom")

    fake_model.pipeline.before_step = fail
    status, _, errors = run("generate", "--prompt", "a chair", "--out", tmp_path / "out")
    assert status == 1 and records(tmp_path / "out")[0]["error"] == "ZeroDivisionError: boom"
    assert "gaussian_atlas: ZeroDivisionError: boom" in errors


def test_resumes_after_a_line_that_was_cut_off(run, fake_model, tmp_path):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("a chair\na lamp")
    command = ("generate", "--prompts", prompts, "--steps", 1, "--out", out, "--no-render")
    run(*command)
    results = out / "results.jsonl"
    results.write_text(results.read_text()[:-40])  # killed while it wrote the second line
    status, output, _ = run(*command)
    assert status == 0 and "1 already there" in output and len(fake_model.pipeline.calls) == 3
    lines = results.read_text().splitlines()
    assert len(lines) == 3 and json.loads(lines[0])["name"] == "a-chair-0" and json.loads(lines[2])["name"] == "a-lamp-0"


def test_a_stop_while_writing_leaves_no_half_file(run, extension, fake_model, tmp_path, monkeypatch):
    formats = extension("generator.formats")
    written = []

    def interrupt(gaussians, path, metadata=None):
        Path(path).write_bytes(b"half")
        written.append(path)
        raise KeyboardInterrupt

    monkeypatch.setattr(formats.ply, "write", interrupt)
    status, _, errors = run("generate", "--prompt", "a chair", "--steps", 1, "--out", tmp_path / "out")
    assert status == 130 and "stopped" in errors and written
    assert [p.name for p in (tmp_path / "out").iterdir()] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required"),
        (["paint"], "invalid choice"),
        (["generate"], "--prompt"),
        (["generate", "--prompt", ""], "the prompt is empty"),
        (["generate", "--prompt", " \n"], "the prompt is empty"),
        (["generate", "--prompt", "a chair", "--prompts", "x"], "not allowed with"),
        (["generate", "--prompt", "a chair", "--steps", "0"], "steps must be between 1 and 1000"),
        (["generate", "--prompt", "a chair", "--steps", "5000"], "steps must be between 1 and 1000"),
        (["generate", "--prompt", "a chair", "--steps", "many"], "--steps"),
        (["generate", "--prompt", "a chair", "--seed", "-1"], "seed must be between"),
        (["generate", "--prompt", "a chair", "--guidance", "nan"], "guidance must be"),
        (["generate", "--prompt", "a chair", "--count", "0"], "count must be at least 1"),
        (["generate", "--prompts", "{tmp}/missing.txt"], "missing.txt"),
        (["generate", "--prompts", "{tmp}/empty.txt"], "holds no prompt"),
        (["generate", "--prompts", "{tmp}/latin.txt"], "UTF-8"),
        (["generate", "--prompts", "{tmp}"], "cannot read the prompts file"),
        (["generate", "--prompt", "a chair", "--out", "{tmp}/empty.txt"], "cannot write to the output folder"),
        (["generate", "--prompt", "a chair", "--out", "{tmp}/empty.txt/deep"], "cannot write to the output folder"),
        (["generate", "--prompt", "a chair", "--model", "{tmp}/nowhere"], "no model in"),
        (["convert", "{tmp}/missing.ply", "{tmp}/out.ply"], "does not exist"),
        (["convert", "{tmp}/ring.ply", "{tmp}/out.fbx"], "splat files end in"),
        (["convert", "{tmp}/ring.ply", "{tmp}/out.glb", "--resolution", "20000"], "at least 8 and at most 512"),
        (["convert", "{tmp}/ring.ply", "{tmp}/out.glb", "--resolution", "7"], "at least 8"),
        (["convert", "{tmp}/ring.ply", "{tmp}/out.glb", "--faces", "-5"], "at least 0"),
        (["convert", "{tmp}/ring.ply", "{tmp}/out.glb", "--faces", "few"], "--faces"),
        (["render", "{tmp}/missing.ply", "{tmp}/out.png"], "does not exist"),
        (["render", "{tmp}/ring.ply", "{tmp}/out.jpg"], "renders are PNG files"),
        (["render", "{tmp}/ring.ply", "{tmp}/nowhere/out.png"], "does not exist; make it first"),
        (["render", "{tmp}/ring.ply", "{tmp}/out.png", "--size", "0"], "at least 1"),
    ],
)
def test_bad_usage_is_one_line_and_status_2(extension, fake_model, torus, tmp_path, capfd, arguments, message):
    (tmp_path / "empty.txt").write_text("\n# nothing\n")
    (tmp_path / "latin.txt").write_bytes("ein Stühlchen".encode("latin-1"))
    extension("generator.formats").save(torus(5), tmp_path / "ring.ply")
    before = sorted(tmp_path.iterdir())
    capfd.readouterr()
    status = extension("blender_addon.batch").main([argument.replace("{tmp}", str(tmp_path)) for argument in arguments])
    output, errors = capfd.readouterr()
    assert status == 2 and output == ""
    assert message in errors and len(errors.strip().splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == before, "nothing is written"


def test_steps_and_guidance_are_the_models_unless_given(run, fake_model, tmp_path):
    defaults = {"num_inference_steps": 3, "guidance_scale": 1.5}
    (fake_model.folder / "bundle.json").write_text(json.dumps({"name": "fake", "defaults": defaults}))
    command = ("generate", "--prompt", "a chair", "--no-render", "--out", tmp_path / "out")
    assert run(*command)[0] == run(*command, "--steps", 2, "--guidance", 4.0)[0] == 0
    called = [(call["num_inference_steps"], call["guidance_scale"]) for call in fake_model.pipeline.calls]
    assert called == [(3, 1.5), (2, 4.0)] and [record["steps"] for record in records(tmp_path / "out")] == [3, 2]


def test_what_nobody_expected_is_one_line_and_status_1(run, extension, torus, tmp_path, monkeypatch):
    extension("generator.formats").save(torus(5), tmp_path / "ring.ply")

    def fail(*_):
        raise RuntimeError("not enough\nroom")

    monkeypatch.setattr(extension("blender_addon.mesh"), "prepare", fail)
    status, _, errors = run("convert", tmp_path / "ring.ply", tmp_path / "ring.glb")
    assert status == 1 and errors == "gaussian_atlas: RuntimeError: not enough room (GAUSSIAN_ATLAS_TRACEBACK=1 shows where)\n"
    assert not (tmp_path / "ring.glb").exists()
    monkeypatch.setenv("GAUSSIAN_ATLAS_TRACEBACK", "1")
    with pytest.raises(RuntimeError, match="room"):
        run("convert", tmp_path / "ring.ply", tmp_path / "ring.glb")


def test_help_is_no_error(extension, capfd):
    assert extension("blender_addon.batch").main(["generate", "--help"]) == 0
    assert "--prompts" in capfd.readouterr().out


def test_file_names_are_safe_and_tell_prompts_apart(extension):
    file_name = extension("blender_addon.batch").file_name
    assert file_name("a red armchair", 0) == "a-red-armchair-0"
    prompts = [
        "a chair",
        "A chair",
        "a chair!",
        "a, chair",
        "椅子",
        "沙发",
        "../../etc/passwd",
        "a" * 300,
        "a" * 301,
        "con/nul",
        "a  chair",
    ]
    names = [file_name(prompt, 1) for prompt in prompts]
    assert len({name.lower() for name in names}) == len(prompts)
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-") and len(name) < 90 for name in names)


def test_convert_keeps_gaussians_and_provenance(run, extension, torus, tmp_path):
    formats = extension("generator.formats")
    formats.save(torus(50), tmp_path / "ring.ply", metadata={"prompt": "a ring"})
    status, output, _ = run("convert", tmp_path / "ring.ply", tmp_path / "again.ply")
    assert status == 0 and "50 Gaussians" in output
    assert formats.load_metadata(tmp_path / "again.ply") == {"prompt": "a ring"}
    assert np.allclose(formats.load(tmp_path / "again.ply").means, formats.load(tmp_path / "ring.ply").means, atol=1e-6)


@pytest.mark.parametrize(("options", "bound"), [([], 20), (["--exact"], 35)])
def test_render_matches_the_generators_renderer(run, extension, torus, tmp_path, options, bound):
    """The Standard view blends linearly and so differs from display-space blending; --exact differs by antialiasing alone."""
    from PIL import Image

    gaussians = torus(1500)
    extension("generator.formats").save(gaussians, tmp_path / "ring.ply")
    assert run("render", tmp_path / "ring.ply", tmp_path / "ring.png", "--size", 128, *options)[0] == 0
    cameras = extension("blender_addon.splat_object").framing(gaussians, 128)
    reference = extension("generator.render").render(gaussians, cameras).rgb[0].numpy()
    image = np.asarray(Image.open(tmp_path / "ring.png").convert("RGB"), np.float32) / 255
    assert -10 * np.log10(np.mean((image - reference) ** 2)) > bound


def test_the_script_gives_status_and_one_line(tmp_path):
    """tools/blender.py in a process of its own, as make calls it; its Blender folder is the checkout's."""
    environment = {key: value for key, value in os.environ.items() if key not in ("BLENDER_USER_RESOURCES", "BLENDER")}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "blender.py"), "generate", "--prompt", "", "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert "the prompt is empty" in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_enabling_imports_neither_torch_nor_diffusers(tmp_path):
    """Blender starts with the extension enabled: its start must not cost seconds."""
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import blender; from pathlib import Path; blender.start(Path(sys.argv[2]));"
        "print([name for name in ('torch', 'diffusers', 'transformers', 'plyfile') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script, str(ROOT / "tools"), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "[]"
