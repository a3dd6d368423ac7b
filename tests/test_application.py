"""A Blender application of its own Python, where there is one: the zip alone, in a new user folder, without a window.

Runs with BLENDER=/path/to/blender (or one on PATH) where dist has a zip for its Python: `make extension PYTHON=...`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import blender as application
import numpy as np
import pytest

from generator.formats import load, load_metadata

PROMPT = "a red armchair"

# What a person does with a file of the batch: open it, make a second object, write files, save.
EDIT = """
import json, sys, bpy
blend, folder = sys.argv[sys.argv.index("--") + 1:]
bpy.ops.wm.open_mainfile(filepath=blend)
(first,) = [o for o in bpy.data.objects if o.type == "POINTCLOUD"]
result = {"points": len(first.data.points), "prompt": first.gaussian_atlas.prompt, "torch": "torch" in sys.modules}
result["generated"] = sorted(bpy.ops.gaussian_atlas.generate(prompt="a blue car", seed=2, steps=4))
second = bpy.context.object
second.location = (0.4, -0.4, 0.0)  # beside it, in the camera's view
bpy.ops.gaussian_atlas.export_splats(filepath=folder + "/car.spz", spz_version="4")
bpy.ops.gaussian_atlas.import_splats(filepath=folder + "/car.spz")
result["imported"] = len(bpy.context.object.data.points)
bpy.data.objects.remove(bpy.context.object)
bpy.ops.wm.save_as_mainfile(filepath=folder + "/two.blend")
json.dump(result, open(folder + "/edit.json", "w"))
"""
# Another day, a render farm without the extension: the file alone.
FARM = """
import json, sys, bpy
folder = sys.argv[sys.argv.index("--") + 1]
bpy.ops.wm.open_mainfile(filepath=folder + "/two.blend")
scene = bpy.context.scene
scene.render.filepath = folder + "/farm.png"
bpy.ops.render.render(write_still=True)
points = [len(o.data.points) for o in bpy.data.objects if o.type == "POINTCLOUD"]
json.dump({"points": points, "extension": hasattr(bpy.ops.gaussian_atlas, "poll") and "gaussian_atlas" in dir(bpy.ops)},
          open(folder + "/farm.json", "w"))
"""


@pytest.fixture(scope="module")
def app(tmp_path_factory) -> Iterator[SimpleNamespace]:
    """run(*arguments) runs the application with the zip installed in a new user folder; `bare` without it."""
    blender = os.environ.get("BLENDER") or shutil.which("blender")
    if not blender:
        pytest.skip("no Blender application: none on PATH, and BLENDER names none")
    try:
        archive = application.fitting_zip(blender)
    except RuntimeError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("application")
    # Nothing of this environment's Python may help.
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    installed = clean | {"BLENDER_USER_RESOURCES": str(folder / "user")}
    (folder / "user").mkdir()
    application.install(blender, archive, installed)

    def run(*arguments: str, environment: dict[str, str] = installed) -> subprocess.CompletedProcess[str]:
        return subprocess.run([blender, "--background", *arguments], env=environment, capture_output=True, text=True, timeout=600)

    yield SimpleNamespace(run=run, folder=folder, installed=installed, bare=clean | {"BLENDER_USER_RESOURCES": str(folder / "bare")})
    shutil.rmtree(folder / "user", ignore_errors=True)  # gigabytes of unpacked wheels


@pytest.fixture(scope="module")
def batch(app) -> Path:
    """The folder that the extension's own command filled."""
    out = app.folder / "out"
    command = ("--command", "gaussian_atlas", "generate", "--prompt", PROMPT, "--seed", "0", "--size", "128", "--out", str(out))
    done = app.run(*command)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return out


def script(app, text: str, *arguments: str, **options: dict[str, str]) -> str:
    """Run a script in the application; what it printed."""
    path = app.folder / "script.py"
    path.write_text(text, encoding="utf-8")
    done = app.run("--python-exit-code", "7", "--python", str(path), "--", *arguments, **options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_the_command_makes_the_object_that_the_source_tree_makes(app, batch):
    from generator import GaussianAtlasPipeline

    (record,) = map(json.loads, (batch / "results.jsonl").read_text().splitlines())
    assert record["status"] == "done" and record["prompt"] == PROMPT
    made = load(batch / record["files"]["ply"])
    assert (load_metadata(batch / record["files"]["ply"]) or {})["prompt"] == PROMPT
    expected = GaussianAtlasPipeline.from_pretrained("models/starter")(PROMPT, seed=0).gaussians[0]
    assert len(made) == len(expected)
    # Other builds of torch and NumPy round otherwise.
    assert (made.means - expected.means).norm(dim=1).median() < 2e-3


def test_its_file_opens_takes_a_second_object_and_renders_without_the_extension(app, batch):
    (blend,) = batch.glob("*.blend")
    script(app, EDIT, str(blend), str(app.folder))
    edited = json.loads((app.folder / "edit.json").read_text())
    assert not edited["torch"], "opening a file must not load torch"
    assert edited["prompt"] == PROMPT and edited["generated"] == ["FINISHED"]
    assert edited["points"] == edited["imported"] == len(load(app.folder / "car.spz"))

    script(app, FARM, str(app.folder), environment=app.bare)
    farm = json.loads((app.folder / "farm.json").read_text())
    assert sorted(farm["points"]) == [edited["points"]] * 2 and not farm["extension"]
    from PIL import Image

    first, both = (np.asarray(Image.open(path).convert("RGB"), float) for path in (next(batch.glob("*.png")), app.folder / "farm.png"))
    assert first.shape == both.shape
    assert np.abs(first - both).mean() > 1, "the car is in the picture"
    red = (both[..., 0] - both[..., 1:].max(-1) > 40).mean()
    assert red > 0.02, "the armchair is drawn, red"


def test_removing_it_leaves_nothing(app, batch):
    done = app.run("--command", "extension", "remove", "gaussian_atlas")
    assert done.returncode == 0, done.stdout + done.stderr
    left = [path for path in (app.folder / "user" / "extensions").rglob("*") if "gaussian_atlas" in path.name or path.name == "torch"]
    assert not left
