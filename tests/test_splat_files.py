"""Splat objects through undo, copies, other files, and a Blender that has never heard of the extension."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from tests.rendering import psnr, read_png, render_in_blender

NAMES = ("means", "quaternions", "scales", "opacities", "colors")
# What a render farm has: the file and Blender.
FARM = """
import sys
import bpy
assert "gaussian_atlas" not in " ".join(bpy.context.preferences.addons.keys())
bpy.ops.wm.open_mainfile(filepath=sys.argv[1])
bpy.context.scene.render.filepath = sys.argv[2]
bpy.ops.render.render(write_still=True)
"""


@pytest.fixture
def modules(bpy, extension):
    from types import SimpleNamespace

    return SimpleNamespace(**{name: extension(f"blender_addon.splat_object.{name}") for name in ("inputs", "node_group", "object")})


def assert_same(a, b) -> None:
    for name in NAMES:
        assert np.allclose(getattr(a, name), getattr(b, name), atol=1e-6), name


def kept(modules, object) -> float:
    return modules.inputs.get_value(modules.node_group.modifier_of(object), modules.inputs.SPLATS_KEPT)


def shown(bpy, object) -> int:
    graph = bpy.context.evaluated_depsgraph_get()
    return sum(1 for i in graph.object_instances if i.is_instance and i.parent.original == object)


def saved_ring(bpy, modules, torus, path):
    """The Gaussians of an object "ring", 40 % shown, in a file of its own."""
    gaussians = torus(300)
    object = modules.object.write(gaussians, "ring")
    object.gaussian_atlas.prompt = "a ring"
    modules.node_group.set_input(object, modules.inputs.SPLATS_KEPT, 0.4)
    count = shown(bpy, object)
    bpy.ops.wm.save_as_mainfile(filepath=str(path))
    bpy.ops.wm.read_homefile(use_empty=True, use_factory_startup=True)
    assert 90 <= count <= 150
    return gaussians, count


def test_undo_and_redo(bpy, modules, torus):
    gaussians = torus(300)
    bpy.ops.ed.undo_push(message="before")
    modules.node_group.set_input(modules.object.write(gaussians, "ring"), modules.inputs.SPLATS_KEPT, 0.4)
    bpy.ops.ed.undo_push(message="made")
    modules.node_group.set_input(bpy.data.objects["ring"], modules.inputs.SPLATS_KEPT, 0.7)
    bpy.ops.ed.undo_push(message="set")
    bpy.ops.ed.undo()
    assert np.isclose(kept(modules, bpy.data.objects["ring"]), 0.4)
    bpy.ops.ed.undo()
    assert "ring" not in bpy.data.objects
    bpy.ops.ed.redo()
    assert_same(modules.object.read(bpy.data.objects["ring"]), gaussians)
    bpy.ops.ed.redo()
    assert np.isclose(kept(modules, bpy.data.objects["ring"]), 0.7) and shown(bpy, bpy.data.objects["ring"]) > 150


@pytest.mark.parametrize("linked", [False, True])
def test_duplicates(bpy, modules, torus, linked):
    gaussians = torus(300)
    object = modules.object.write(gaussians, "ring")
    bpy.context.view_layer.objects.active = object
    object.select_set(True)
    bpy.ops.object.duplicate(linked=linked)
    copy = bpy.context.active_object
    assert copy != object and (copy.data == object.data) is linked
    modules.node_group.set_input(copy, modules.inputs.SPLATS_KEPT, 0.0)
    assert shown(bpy, object) == 300 and shown(bpy, copy) <= 1, "each has its own modifier"
    assert_same(modules.object.read(copy), gaussians)
    assert len([group for group in bpy.data.node_groups if modules.node_group.version(group)]) == 1


def test_append(bpy, modules, torus, tmp_path):
    gaussians, count = saved_ring(bpy, modules, torus, tmp_path / "ring.blend")
    other = modules.object.write(torus(50), "other")
    bpy.ops.wm.append(filename="ring", directory=str(tmp_path / "ring.blend" / "Object"))
    object = bpy.data.objects["ring"]
    assert object.library is None and object.gaussian_atlas.prompt == "a ring"
    assert_same(modules.object.read(object), gaussians)
    assert shown(bpy, object) == count and shown(bpy, other) == 50
    modules.node_group.set_input(object, modules.inputs.SPLATS_KEPT, 1.0)
    assert shown(bpy, object) == 300, "its inputs still work"


def test_link_and_override(bpy, modules, torus, tmp_path):
    gaussians, count = saved_ring(bpy, modules, torus, tmp_path / "ring.blend")
    other = modules.object.write(torus(50), "other")
    bpy.ops.wm.link(filename="ring", directory=str(tmp_path / "ring.blend" / "Object"))
    object = next(o for o in bpy.data.objects if o.library)
    assert_same(modules.object.read(object), gaussians)
    assert shown(bpy, object) == count and shown(bpy, other) == 50
    assert modules.node_group.modifier_of(other).node_group.library is None
    mine = object.override_create(remap_local_usages=True)
    mine.location.x = 2.0
    bpy.context.view_layer.update()
    assert shown(bpy, mine) == count
    assert_same(modules.object.read(mine), gaussians)


@pytest.mark.parametrize("display", ["Camera Quads", "Ellipsoids", "Points"])
def test_a_render_farm_without_the_extension_gives_the_same_picture(bpy, extension, modules, torus, tmp_path, display):
    cameras = extension("generator.render").Cameras.orbit(count=1, size=96, elevation=35.0)
    object = modules.object.write(torus(500), "ring")
    modules.node_group.set_input(object, modules.inputs.TINT_STRENGTH, 0.5)
    modules.node_group.set_input(object, modules.inputs.TINT, (0.1, 0.4, 1.0, 1.0))
    here = render_in_blender(bpy, extension, object, cameras, tmp_path / "here.png", display=display)
    bpy.ops.wm.save_as_mainfile(filepath=str(tmp_path / "ring.blend"))
    environment = {key: value for key, value in os.environ.items() if not key.startswith("BLENDER")}
    environment["BLENDER_USER_RESOURCES"] = str(tmp_path / "nobody")
    command = [sys.executable, "-c", FARM, str(tmp_path / "ring.blend"), str(tmp_path / "there.png")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (here.min(axis=2) < 0.8).mean() > 0.1, "an object on white"
    assert psnr(read_png(tmp_path / "there.png"), here) > 60
