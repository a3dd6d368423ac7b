"""One .blend through the Blender versions: what an old one saved opens, renders the same and can be edited in newer ones.

Runs where `make test-blender` has made the environments, each Blender in a process of its own.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import setup as environments
import torch

from generator.formats import load, save
from generator.gaussians import Gaussians

ROOT = Path(__file__).resolve().parent.parent

# Start of every child: the extension of the checkout, enabled, in a Blender of the child's own.
START = """
import importlib, json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import blender
folder = Path(sys.argv[2])
blender.start(folder / sys.argv[3])
import bpy, numpy as np
module = lambda path: importlib.import_module(f"bl_ext.user_default.gaussian_atlas.{path}")
splat_object, preview, formats = module("blender_addon.splat_object"), module("blender_addon.preview"), module("generator.formats")
set_input = module("blender_addon.splat_object.node_group").set_input
"""
SAVE = """
scene = preview.empty_scene()
object = splat_object.write(formats.load(folder / "ball.ply"), "ball")
object.rotation_euler, object.scale = (0.3, 0.1, 0.5), (1.0, 0.8, 1.2)
bpy.context.view_layer.update()
object.gaussian_atlas.prompt = "a painted ball"
preview.look_at(scene, object, 96, samples=16)
set_input(object, "Splat Size", 1.2)
preview.render(scene, folder / "saved.png")
preview.save_blend(folder / "saved.blend")
"""
OPEN = """
bpy.ops.wm.open_mainfile(filepath=str(folder / "saved.blend"))
scene = bpy.context.scene
object = bpy.data.objects["ball"]
gaussians = splat_object.read(object)
names = ("means", "quaternions", "scales", "opacities", "colors")
np.savez(folder / "opened.npz", **{name: getattr(gaussians, name).numpy() for name in names})
assert object.gaussian_atlas.prompt == "a painted ball", object.gaussian_atlas.prompt
preview.render(scene, folder / "opened.png")
set_input(object, "Splat Size", 0.3)
preview.render(scene, folder / "edited.png")
"""
# Without the extension: a render farm.
FARM = """
import sys
from pathlib import Path
import bpy
folder = Path(sys.argv[2])
bpy.ops.wm.open_mainfile(filepath=str(folder / "saved.blend"))
assert not hasattr(bpy.types.Scene, "gaussian_atlas")
bpy.context.scene.render.filepath = str(folder / "farm.png")
bpy.ops.render.render(write_still=True)
"""


def ball(count: int) -> Gaussians:
    """Fairly opaque Gaussians on a painted ball."""
    random = torch.Generator().manual_seed(0)
    normals = torch.nn.functional.normalize(torch.randn(count, 3, generator=random), dim=1)
    return Gaussians(
        means=0.5 * normals,
        quaternions=torch.nn.functional.normalize(torch.randn(count, 4, generator=random), dim=1),
        scales=0.02 + 0.02 * torch.rand(count, 3, generator=random),
        opacities=0.6 + 0.3 * torch.rand(count, generator=random),
        colors=0.5 + 0.45 * torch.sin(5 * normals),
    )


def pythons() -> dict[str, Path]:
    """The Python of every Blender version at hand."""
    found = {version: ROOT / entry.folder / "bin" / "python" for version, entry in environments.environments().items()}
    found[".".join(environments.MAIN.bpy.split(".")[:2])] = Path(sys.executable)
    return {version: path for version, path in found.items() if path.exists()}


def run(version: str, script: str, folder: Path) -> None:
    if version not in pythons():
        pytest.skip(f"no environment of Blender {version}: make test-blender")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("BLENDER")}
    environment["BLENDER_USER_RESOURCES"] = str(folder / f"user-{version}-{len(script)}")
    command = [str(pythons()[version]), "-c", script, str(ROOT / "tools"), str(folder), f"user-{version}-{len(script)}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"Blender {version}: {done.stdout[-1000:]}{done.stderr[-3000:]}"


def picture(path: Path) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(path).convert("RGB"), np.float64) / 255


def psnr(one: Path, other: Path) -> float:
    return -10 * np.log10(max(np.mean((picture(one) - picture(other)) ** 2), 1e-10))


@pytest.mark.parametrize(("saved", "opened"), [("4.5", "5.0"), ("4.5", "5.2"), ("5.0", "5.2"), ("5.0", "4.5")])
def test_a_file_of_one_version_works_in_another(tmp_path: Path, saved: str, opened: str) -> None:
    save(ball(800), tmp_path / "ball.ply")
    run(saved, START + SAVE, tmp_path)
    run(opened, START + OPEN, tmp_path)
    written, read = load(tmp_path / "ball.ply"), np.load(tmp_path / "opened.npz")
    for name in (field.name for field in dataclasses.fields(Gaussians)):
        np.testing.assert_allclose(read[name], getattr(written, name).numpy(), atol=1e-6, err_msg=name)
    assert (picture(tmp_path / "saved.png").min(axis=2) < 0.8).mean() > 0.1, "an object on white"
    assert psnr(tmp_path / "saved.png", tmp_path / "opened.png") > 45
    assert psnr(tmp_path / "saved.png", tmp_path / "edited.png") < 25, "its inputs still work"
    run(opened, FARM, tmp_path)
    assert psnr(tmp_path / "saved.png", tmp_path / "farm.png") > 45, "without the extension"
