"""The operators and panels, with a model that answers at once."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest


@pytest.fixture
def generate(extension):
    return extension("blender_addon.operators.generate")


@pytest.fixture
def base(extension):
    return extension("blender_addon.operators.base")


@pytest.fixture
def formats(extension):
    return extension("generator.formats")


def status(bpy):
    return bpy.context.window_manager.gaussian_atlas


# Generating from a script


def test_generate_makes_a_splat_object_with_its_provenance(bpy, fake_model, extension):
    assert bpy.ops.gaussian_atlas.generate(prompt="a red armchair", negative_prompt="wood", seed=7, steps=3, guidance=2.7) == {"FINISHED"}
    object = bpy.context.active_object
    assert object.name == "a red armchair" and object.select_get()
    assert len(extension("blender_addon.splat_object").read(object)) == 200
    (call,) = fake_model.pipeline.calls
    assert call["prompt"] == "a red armchair" and call["negative_prompt"] == "wood"
    assert (call["seed"], call["num_inference_steps"], call["guidance_scale"]) == (7, 3, 2.7)
    stored = object.gaussian_atlas
    assert (stored.prompt, stored.negative_prompt, stored.seed, stored.steps) == ("a red armchair", "wood", 7, 3)
    assert stored.model_name == "fake" and stored.guidance == pytest.approx(2.7)
    assert stored.model_hash == hashlib.sha256((fake_model.folder / "bundle.json").read_bytes()).hexdigest()
    assert stored.program_version == extension("generator.version").program_version()


def test_that_a_prompt_was_cut_is_said_once(bpy, fake_model, capfd):
    fake_model.pipeline.notes = ["the model reads 32 tokens; the end of this prompt is left out: 'a'"]
    bpy.ops.gaussian_atlas.generate(prompt="a chair", count=3, steps=1)
    out = capfd.readouterr().out.splitlines()
    assert [line for line in out if line.startswith("Warning:")] == [f"Warning: {fake_model.pipeline.notes[0]}"]


def test_count_gives_a_grid_of_consecutive_seeds(bpy, fake_model):
    bpy.context.scene.cursor.location = (1, 2, 3)
    bpy.ops.gaussian_atlas.generate(prompt="a chair", seed=2**31 - 2, steps=1, count=5)
    objects = sorted((o for o in bpy.context.scene.objects if o.type == "POINTCLOUD"), key=lambda o: o.name)
    assert [o.gaussian_atlas.seed for o in objects] == [2**31 - 2, 2**31 - 1, 0, 1, 2], "seeds stay within 31 bits"
    grid = [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1)]
    assert np.allclose([o.location for o in objects], [(1 + 1.25 * x, 2 + 1.25 * y, 3) for x, y in grid])
    assert all(o.select_get() for o in objects)


@pytest.mark.parametrize(("count", "columns", "rows"), [(1, 1, 1), (2, 2, 1), (3, 2, 2), (4, 2, 2), (7, 3, 3), (9, 3, 3), (10, 4, 3)])
def test_the_grid_is_about_square_and_no_place_is_taken_twice(generate, count, columns, rows):
    offsets = generate.grid_offsets(count)
    assert len(set(offsets)) == len(offsets) == count
    assert (len({x for x, _, _ in offsets}), len({y for _, y, _ in offsets})) == (columns, rows)
    assert min(np.linalg.norm(np.subtract(a, b)) for a in offsets for b in offsets if a != b) > 1 if count > 1 else True


def test_what_is_not_given_comes_from_the_scene(bpy, fake_model):
    settings = bpy.context.scene.gaussian_atlas
    settings.prompt, settings.seed, settings.steps, settings.guidance = "a lamp", 11, 4, 1.5
    bpy.ops.gaussian_atlas.generate(steps=2)
    assert fake_model.pipeline.calls[0]["prompt"] == "a lamp"
    assert fake_model.pipeline.calls[0]["seed"] == 11
    assert fake_model.pipeline.calls[0]["num_inference_steps"] == 2


def test_the_model_is_loaded_once_until_unloaded(bpy, fake_model):
    for _ in range(2):
        bpy.ops.gaussian_atlas.generate(prompt="a chair", steps=1)
    assert fake_model.loads == 1
    bpy.ops.gaussian_atlas.unload_model()
    bpy.ops.gaussian_atlas.generate(prompt="a chair", steps=1)
    assert fake_model.loads == 2


@pytest.mark.parametrize(
    ("prompt", "message"), [("", "the prompt is empty"), ("  ", "the prompt is empty"), ("explode", "WorkError|not finite")]
)
def test_an_error_is_one_line_and_leaves_nothing(bpy, fake_model, extension, prompt, message):
    WorkError = extension("generator.errors").WorkError

    def fail(step):
        raise WorkError("the network gave numbers that are not finite")

    fake_model.pipeline.before_step = fail
    with pytest.raises(RuntimeError, match=message) as caught:
        bpy.ops.gaussian_atlas.generate(prompt=prompt, steps=2)
    assert "Traceback" not in str(caught.value) and len(str(caught.value).strip().splitlines()) == 1
    assert status(bpy).error and status(bpy).error in str(caught.value)
    assert not bpy.data.objects and not bpy.data.pointclouds


def test_a_missing_model_says_where_and_offers_the_starter(bpy, fake_model):
    (fake_model.folder / "bundle.json").unlink()
    with pytest.raises(RuntimeError, match="bundle.json is missing; choose a model folder"):
        bpy.ops.gaussian_atlas.generate(prompt="a chair")
    assert status(bpy).fix_operator == "gaussian_atlas.use_starter_model"


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"version": "1"}', "\x00", "[" * 100_000, '{"name": "a", "defaults": {"guidance_scale": "much"}}']
)
def test_a_damaged_model_description_is_named(bpy, fake_model, text):
    (fake_model.folder / "bundle.json").write_text(text)
    with pytest.raises(RuntimeError, match="bundle.json is not a readable model description"):
        bpy.ops.gaussian_atlas.generate(prompt="a chair")


def test_a_later_success_clears_the_error(bpy, fake_model):
    with pytest.raises(RuntimeError):
        bpy.ops.gaussian_atlas.generate(prompt="")
    bpy.ops.gaussian_atlas.generate(prompt="a chair", steps=1)
    assert status(bpy).error == "" and status(bpy).fix_operator == ""


def test_undo_takes_the_object_back(bpy, fake_model):
    bpy.ops.ed.undo_push(message="before")
    bpy.ops.gaussian_atlas.generate("EXEC_DEFAULT", True, prompt="a chair", steps=1)
    assert "a chair" in bpy.data.objects
    bpy.ops.ed.undo()
    assert "a chair" not in bpy.data.objects


def test_regenerate_repeats_the_active_object(bpy, fake_model):
    bpy.ops.gaussian_atlas.generate(prompt="a chair", negative_prompt="metal", seed=5, steps=2, guidance=1.5)
    bpy.context.scene.gaussian_atlas.randomize_seed = True
    assert bpy.ops.gaussian_atlas.regenerate() == {"FINISHED"}
    first, second = fake_model.pipeline.calls
    assert first == second
    assert bpy.context.active_object.name == "a chair.001"


# Generating from the user interface: Blender's event loop is played by hand


class FakeContext(SimpleNamespace):
    """A context with a window manager that counts timers."""


@pytest.fixture
def interface(bpy, generate, base):
    """An operator instance driven as Blender does: interface.invoke(), interface.tick(), interface.key("ESC")."""
    timers = []

    class Manager:
        windows = ()
        gaussian_atlas = bpy.context.window_manager.gaussian_atlas

        def event_timer_add(self, step, window):
            timers.append(step)
            return "timer"

        def event_timer_remove(self, timer):
            timers.pop()

        def modal_handler_add(self, operator):
            return True

    real = bpy.context
    context = FakeContext(
        window_manager=Manager(), window=None, scene=real.scene, collection=real.collection, mode="OBJECT", view_layer=real.view_layer
    )
    context.preferences = real.preferences

    class Stand(SimpleNamespace):
        """Takes the operator's place: its methods, without Blender's instance behind them."""

    values = {"prompt": "", "negative_prompt": "", "seed": 0, "steps": 20, "guidance": 2.0, "count": 1}
    values |= {"mix_prompt": "", "mix_weight": 0.5, "edit": ""}
    stand = Stand(**values, job_name="Generation", _job=None, _finishing=None, messages=[])
    stand.properties = SimpleNamespace(is_property_set=lambda name: False)
    stand.report = lambda kind, message: stand.messages.append((next(iter(kind)), message))
    for name in ("invoke", "modal", "cancel", "work", "finish", "salvage", "show", "drop", "_step", "_fail", "_end", "place_at"):
        setattr(stand, name, getattr(generate.GenerateOperator, name).__get__(stand))

    def event(kind):
        return SimpleNamespace(type=kind, value="PRESS")

    def until_ended(limit=30.0):
        end = time.monotonic() + limit
        while time.monotonic() < end:
            result = stand.modal(context, event("TIMER"))
            if result & {"FINISHED", "CANCELLED"}:
                return result
            time.sleep(0.005)
        raise AssertionError("the operator did not end")

    yield SimpleNamespace(
        operator=stand,
        context=context,
        timers=timers,
        invoke=lambda: stand.invoke(context, None),
        send=lambda kind: stand.modal(context, event(kind)),
        until_ended=until_ended,
    )
    base.cancel_running()
    if stand._job:
        stand._job.join(20)
        stand._end(context)


def test_invoke_works_in_a_thread_and_leaves_the_interface_free(bpy, fake_model, interface, base):
    go_on, threads = threading.Event(), []

    def wait(step):
        threads.append(threading.current_thread())
        assert go_on.wait(30)

    fake_model.pipeline.before_step = wait
    bpy.context.scene.gaussian_atlas.prompt = "a chair"
    bpy.context.scene.gaussian_atlas.steps = 4
    assert interface.invoke() == {"RUNNING_MODAL"}
    assert interface.timers == [0.1] and base.running() and status(bpy).running
    assert not bpy.ops.gaussian_atlas.generate.poll() and bpy.ops.gaussian_atlas.cancel.poll()
    assert not bpy.ops.gaussian_atlas.unload_model.poll()
    for kind in ("MOUSEMOVE", "LEFTMOUSE", "TIMER", "Z"):
        assert interface.send(kind) == {"PASS_THROUGH"}
    assert not bpy.data.pointclouds, "nothing is made while the work runs"
    go_on.set()
    assert interface.until_ended() == {"FINISHED"}
    assert threads[0] is not threading.current_thread()
    assert bpy.data.objects["a chair"].gaussian_atlas.seed == 0
    assert interface.timers == [] and not base.running() and not status(bpy).running
    assert interface.operator.messages[-1][0] == "INFO"


@pytest.mark.parametrize("how", ["ESC", "button", "file"])
def test_cancel_within_a_step_leaves_nothing(bpy, fake_model, interface, base, how):
    reached, go_on = threading.Event(), threading.Event()

    def wait(step):
        reached.set()
        assert go_on.wait(30)

    fake_model.pipeline.before_step = wait
    bpy.context.scene.gaussian_atlas.prompt = "a chair"
    interface.invoke()
    assert reached.wait(30)
    if how == "ESC":
        assert interface.send("ESC") == {"RUNNING_MODAL"}, "the key is used up"
    elif how == "button":
        bpy.ops.gaussian_atlas.cancel()
    else:
        interface.operator.cancel(interface.context)  # what Blender calls when another file is opened
    go_on.set()
    if how == "file":
        interface.operator._job.join(30)
        interface.operator._job.poll()
    else:
        interface.send("TIMER")
        assert status(bpy).stage in ("Cancelling", "")
        assert interface.operator._job.ended or interface.until_ended() == {"CANCELLED"}
    assert interface.operator._job.state.value == "cancelled"
    assert not bpy.data.pointclouds and not base.running() and not status(bpy).running and interface.timers == []
    assert status(bpy).error == "", "to cancel is no error"


def test_progress_is_shown(bpy, fake_model, interface):
    gate = threading.Semaphore(0)
    fake_model.pipeline.before_step = lambda step: gate.acquire(timeout=30)
    bpy.context.scene.gaussian_atlas.prompt = "a chair"
    bpy.context.scene.gaussian_atlas.steps = 4
    interface.invoke()
    for done in (0.0, 0.25, 0.5, 0.75):
        end = time.monotonic() + 30
        while (status(bpy).stage, status(bpy).fraction) != ("Sampling", done) and time.monotonic() < end:
            interface.send("TIMER")
            time.sleep(0.005)
        assert (status(bpy).stage, status(bpy).fraction) == ("Sampling", done)
        gate.release()
    assert interface.until_ended() == {"FINISHED"}
    assert (status(bpy).stage, status(bpy).fraction) == ("", 0.0)


def test_an_error_in_the_thread_reaches_the_panel_with_its_fix(bpy, fake_model, interface, base):
    class OutOfMemoryError(RuntimeError):
        pass

    def fail(step):
        raise OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    fake_model.pipeline.before_step = fail
    bpy.context.scene.gaussian_atlas.prompt = "a chair"
    interface.invoke()
    assert interface.until_ended() == {"CANCELLED"}
    assert interface.operator.messages[-1][0] == "ERROR" and "not enough memory" in interface.operator.messages[-1][1]
    assert status(bpy).fix_operator == "gaussian_atlas.use_cpu" and not base.running()
    bpy.ops.gaussian_atlas.use_cpu()
    preferences = bpy.context.preferences.addons[base.extension.PACKAGE].preferences
    assert preferences.device == "cpu" and status(bpy).error == ""
    fake_model.pipeline.before_step = lambda step: None
    bpy.ops.gaussian_atlas.generate(steps=1)
    assert fake_model.device == "cpu", "the model is loaded again where it was asked for"
    preferences.device = "auto"


@pytest.mark.parametrize(
    ("error", "starter", "operator"),
    [
        (MemoryError(), True, "unload_model"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"), True, "unload_model"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), True, "open_preferences"),
        ("device cuda is not available: this torch sees no CUDA device; use auto or cpu", True, "use_cpu"),
        ("/models/x/unet.safetensors was altered or is damaged; get the model again", False, "use_starter_model"),
        ("/models/x/unet.safetensors was altered or is damaged; get the model again", True, "open_preferences"),
        ("guidance must be a number of at least 0, got -1", True, ""),
    ],
)
def test_every_error_that_can_be_mended_offers_it(bpy, extension, error, starter, operator):
    if isinstance(error, str):
        error = extension("generator.errors").InputError(error)
    problem = extension("blender_addon.problems").explain(error, starter)
    assert problem.operator == (f"gaussian_atlas.{operator}" if operator else "") and bool(problem.label) is bool(operator)
    assert len(problem.message.splitlines()) == 1
    if operator:
        assert operator in dir(bpy.ops.gaussian_atlas)


def test_what_was_generated_in_the_window_is_remembered(bpy, fake_model, interface, extension):
    history, path = extension("blender_addon.history"), extension("blender_addon.extension").history_file()
    bpy.ops.gaussian_atlas.clear_prompts()
    settings = bpy.context.scene.gaussian_atlas
    settings.prompt, settings.steps = "  a   blue vase ", 4
    interface.invoke()
    interface.until_ended()
    stored = history.read(path)
    assert stored.prompts == ("a blue vase",)
    speed = stored.speeds[history.speed_key(extension("blender_addon.service").describe(fake_model.folder).sha256, "auto")]
    assert speed.step > 0
    preferences = bpy.context.preferences.addons[extension("blender_addon.extension").PACKAGE].preferences
    preferences.remember_prompts = False
    settings.prompt = "a secret"
    interface.invoke()
    interface.until_ended()
    preferences.remember_prompts = True
    bpy.ops.gaussian_atlas.generate(prompt="from a script", steps=1)
    assert history.read(path).prompts == ("a blue vase",)


def test_a_folder_that_cannot_be_written_does_not_stop_generating(bpy, fake_model, interface, extension, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr(extension("blender_addon.extension"), "history_file", lambda: tmp_path / "file" / "history.json")
    bpy.context.scene.gaussian_atlas.prompt = "a chair"
    interface.invoke()
    assert interface.until_ended() == {"FINISHED"}


def test_bad_settings_are_told_before_any_thread_starts(bpy, fake_model, interface, base):
    assert interface.invoke() == {"CANCELLED"}
    assert "prompt is empty" in status(bpy).error and interface.timers == [] and not base.running()


def test_randomize_draws_a_new_seed_and_shows_it(bpy, fake_model, interface):
    settings = bpy.context.scene.gaussian_atlas
    settings.prompt, settings.randomize_seed, settings.steps = "a chair", True, 1
    settings.seed = 0
    interface.invoke()
    interface.until_ended()
    assert fake_model.pipeline.calls[0]["seed"] == settings.seed != 0


# What is seen while it works


@pytest.fixture
def overlay(extension, monkeypatch):
    monkeypatch.setattr(extension("blender_addon.generation"), "PREVIEW_SECONDS", 0.0)
    monkeypatch.setattr(extension("blender_addon.generation"), "PREVIEW_SHARE", 1e9)
    return extension("blender_addon.overlay")


def tick_until(interface, condition, limit=30.0):
    end = time.monotonic() + limit
    while not condition() and time.monotonic() < end:
        interface.send("TIMER")
        time.sleep(0.005)
    assert condition()


def test_the_object_is_seen_as_it_comes_to_be_and_becomes_real_in_place(bpy, fake_model, interface, overlay):
    gate = threading.Semaphore(0)
    fake_model.pipeline.before_step = lambda step: gate.acquire(timeout=30)
    bpy.context.scene.cursor.location = (1, 2, 3)
    settings = bpy.context.scene.gaussian_atlas
    settings.prompt, settings.steps, settings.count = "a chair", 4, 2
    interface.invoke()
    assert overlay.shown() == {}
    seen = []
    for _ in range(2):
        gate.release()
        tick_until(interface, lambda: overlay.shown() and (not seen or overlay.shown()[0][0] is not seen[-1]))
        preview, location = overlay.shown()[0]
        assert location == (1, 2, 3) and len(preview.positions) == 50 and preview.result is None
        seen.append(preview)
    assert not np.array_equal(seen[0].positions, seen[1].positions)
    bpy.context.scene.cursor.location = (9, 9, 9)  # moved while it works: the object stays where it was seen
    for _ in range(3):
        gate.release()
    tick_until(interface, lambda: len(overlay.shown()) == 2)
    done, location = overlay.shown()[0]
    assert done.result and len(done.positions) == 200, "the first is shown as it will be while the second is made"
    assert overlay.shown()[1][1] == (2.25, 2, 3)
    assert not bpy.data.pointclouds and not bpy.data.objects, "what is seen is no data of the file"
    for _ in range(3):
        gate.release()
    assert interface.until_ended() == {"FINISHED"}
    assert overlay.shown() == {}
    assert {tuple(o.location) for o in bpy.data.objects} == {(1, 2, 3), (2.25, 2, 3)}


@pytest.mark.parametrize("how", ["ESC", "error", "file", "disabled"])
def test_nothing_of_it_is_left(bpy, fake_model, interface, base, overlay, extension, how):
    gate = threading.Semaphore(0)

    def step(index):
        assert gate.acquire(timeout=30)
        if index == 2 and how == "error":
            raise extension("generator.errors").WorkError("the network failed")

    fake_model.pipeline.before_step = step
    bpy.context.scene.gaussian_atlas.prompt = "a chair"
    interface.invoke()
    gate.release()
    tick_until(interface, overlay.shown)
    if how == "ESC":
        interface.send("ESC")
    elif how == "file":
        interface.operator.cancel(interface.context)
    elif how == "disabled":
        threading.Timer(0.1, gate.release).start()
        base.end_running(interface.context)
        overlay.clear()
    for _ in range(3):
        gate.release()
    if how in ("ESC", "error"):
        assert interface.until_ended() == {"CANCELLED"}
    assert overlay.shown() == {} and overlay._handler is None
    assert not bpy.data.pointclouds and not bpy.data.objects


@pytest.mark.parametrize("how", ["ESC", "error"])
def test_objects_that_are_complete_stay_when_the_rest_is_stopped(bpy, fake_model, interface, overlay, extension, how):
    reached, go_on = threading.Event(), threading.Event()

    def step(index):
        if len(fake_model.pipeline.calls) == 3:
            reached.set()
            assert go_on.wait(30)
            if how == "error":
                raise extension("generator.errors").WorkError("the network failed")

    fake_model.pipeline.before_step = step
    settings = bpy.context.scene.gaussian_atlas
    settings.prompt, settings.steps, settings.count, settings.seed = "a chair", 2, 5, 4
    interface.invoke()
    assert reached.wait(30)
    if how == "ESC":
        interface.send("ESC")
    go_on.set()
    assert interface.until_ended() == {"FINISHED"}, "finished, so that undo takes the two away again"
    assert sorted(o.gaussian_atlas.seed for o in bpy.data.objects) == [4, 5]
    assert status(bpy).error == ("" if how == "ESC" else "the network failed")


def test_undo_and_a_deleted_scene_while_it_works(bpy, fake_model, interface, overlay):
    gate = threading.Semaphore(0)
    fake_model.pipeline.before_step = lambda step: gate.acquire(timeout=30)
    settings = bpy.context.scene.gaussian_atlas
    settings.prompt, settings.steps = "a chair", 3
    bpy.ops.ed.undo_push(message="before")
    bpy.context.scene.collection.objects.link(bpy.data.objects.new("empty", None))
    bpy.ops.ed.undo_push(message="empty")
    interface.invoke()
    gate.release()
    tick_until(interface, overlay.shown)
    bpy.ops.ed.undo()
    real = bpy.context
    interface.context.scene, interface.context.view_layer = real.scene, real.view_layer  # as Blender gives them to every event
    assert "empty" not in bpy.data.objects
    interface.send("TIMER")
    other = bpy.data.scenes.new("other")
    interface.context.scene, interface.context.view_layer, interface.context.collection = other, other.view_layers[0], other.collection
    bpy.data.scenes.remove(next(scene for scene in bpy.data.scenes if scene is not other and scene != other))
    for _ in range(3):
        gate.release()
    assert interface.until_ended() == {"FINISHED"}
    assert [o.name for o in other.objects] == ["a chair"]


def test_points_are_drawn_from_the_back(bpy, extension, overlay, torus):
    from math import radians

    from mathutils import Matrix

    Preview = extension("blender_addon.generation").Preview
    for index, location in enumerate([(0, 0, 0), (3, 0, 0)]):
        overlay.show(bpy.context.scene, Preview.of(torus(100, seed=index), index), location)
    camera = Matrix.Translation((2, -5, 1)) @ Matrix.Rotation(radians(80), 4, "X")
    positions, colors, radii = overlay.sorted_points(np.array(camera.inverted()))
    overlay.clear()
    assert len(positions) == len(colors) == len(radii) == 200 and positions[:, 0].max() > 3
    forward = np.array(camera)[:3, 2] * -1
    depth = (positions - np.array(camera)[:3, 3]) @ forward
    assert (np.diff(depth) <= 1e-5).all() and depth.min() > 0
    assert colors.min() >= 0 and colors.max() <= 1 and radii.min() > 0


def test_looking_costs_a_small_share_of_the_time(extension, torus, monkeypatch):
    generation = extension("blender_addon.generation")
    clock = [0.0]
    monkeypatch.setattr(generation.time, "monotonic", lambda: clock[0])
    decoded, reports = [], []

    def decode(cost):
        clock[0] += cost
        decoded.append(clock[0])
        return [torus(5)]

    for cost, step_seconds in ((0.001, 0.05), (0.2, 0.05)):
        clock[0], decoded[:], reports[:] = 100.0, [], []
        watcher = generation.Watcher(lambda *report: reports.append(report), "Sampling", 0, look=True)
        for step in range(100):
            clock[0] += step_seconds
            watcher(step + 1, 100, lambda cost=cost: decode(cost))
        assert len(reports) == 100 and [report[1] for report in reports] == list(range(1, 101))
        assert min(np.diff(decoded)) >= generation.PREVIEW_SECONDS
        assert len(decoded) * cost <= 1.2 * generation.PREVIEW_SHARE * (clock[0] - 100) + cost
        assert len(decoded) > 3
    blind = generation.Watcher(lambda *report: None, "Sampling")
    blind(1, 100, lambda: pytest.fail("nobody looks"))


def test_a_file_that_was_saved_in_mid_run_does_not_open_as_running(bpy, extension, tmp_path):
    status(bpy).running, status(bpy).stage, status(bpy).error = True, "Sampling", "old"
    bpy.ops.wm.save_as_mainfile(filepath=str(tmp_path / "a.blend"), copy=True)
    bpy.ops.wm.open_mainfile(filepath=str(tmp_path / "a.blend"), load_ui=True)
    assert not status(bpy).running and status(bpy).stage == "" and status(bpy).error == ""


# The machinery that other long operators share


@pytest.fixture
def counting(bpy, base, extension):
    """An operator of the shared kind, registered: it counts to `to` and names a mesh after the sum; -1 is refused, 0 fails."""
    errors = extension("generator.errors")

    class CountOperator(base.JobOperator, bpy.types.Operator):
        bl_idname = "gaussian_atlas.test_count"
        bl_label = "Count"
        to: bpy.props.IntProperty()

        def work(self, context, interactive):
            if self.to < 0:
                raise errors.InputError("count to at least 1")
            to = self.to

            def count(report, cancel):
                for number in range(to):
                    report("Counting", number + 1, to)
                return sum(range(to + 1)) / to

            return count

        def finish(self, context, result):
            for _ in range(2):
                bpy.data.meshes.new(f"mean {result * 2:g}")
                yield {"PASS_THROUGH"}
            yield {"FINISHED"}

    CountOperator.__annotations__["to"] = bpy.props.IntProperty()
    bpy.utils.register_class(CountOperator)
    yield bpy.ops.gaussian_atlas.test_count
    bpy.utils.unregister_class(CountOperator)


def test_any_work_runs_through_the_shared_operator(bpy, counting):
    assert counting(to=4) == {"FINISHED"}
    assert [mesh.name for mesh in bpy.data.meshes] == ["mean 5", "mean 5.001"], "finish is run to its end"
    for to, message in ((-1, "count to at least 1"), (0, "ZeroDivisionError")):
        with pytest.raises(RuntimeError, match=message):
            counting(to=to)
        assert message in status(bpy).error
    counting(to=1)
    assert status(bpy).error == ""


def test_disabling_the_extension_stops_what_runs(bpy, fake_model, interface, base):
    reached = threading.Event()

    def wait(step):
        reached.set()
        time.sleep(0.01)

    fake_model.pipeline.before_step = wait
    bpy.context.scene.gaussian_atlas.prompt = "a chair"
    bpy.context.scene.gaussian_atlas.steps = 1000
    interface.invoke()
    assert reached.wait(30)
    job = interface.operator._job
    base.end_running(interface.context)  # what unregister does: the operator itself is freed by Blender and hears nothing
    assert not base.running() and interface.timers == [] and not status(bpy).running
    assert not job._thread.is_alive()
    job.poll()
    assert job.state.value == "cancelled" and not bpy.data.pointclouds


# Files


@pytest.mark.parametrize("suffix", [".ply", ".splat", ".spz"])
def test_export_and_import(bpy, extension, torus, tmp_path, suffix, formats):
    splat_object = extension("blender_addon.splat_object")
    gaussians = torus(300)
    bpy.context.view_layer.objects.active = splat_object.write(gaussians, "ring")
    path = tmp_path / f"ring{suffix}"
    assert bpy.ops.gaussian_atlas.export_splats(filepath=str(path)) == {"FINISHED"}
    assert bpy.ops.gaussian_atlas.import_splats(filepath=str(path)) == {"FINISHED"}
    object = bpy.context.active_object
    assert object.name == "ring.001" and object.gaussian_atlas.file == str(path)
    atol = {".ply": 1e-5, ".splat": 0.02, ".spz": 0.02}[suffix]
    again = splat_object.read(object)
    if suffix == ".splat":  # sorted by visibility
        order = [np.lexsort(np.round(g.means.numpy(), 4).T) for g in (gaussians, again)]
    else:
        order = [slice(None)] * 2
    for name in ("means", "scales", "opacities", "colors"):
        assert np.allclose(getattr(gaussians, name)[order[0]], getattr(again, name)[order[1]], atol=atol), name


def test_provenance_travels_in_the_file(bpy, fake_model, tmp_path, formats):
    bpy.ops.gaussian_atlas.generate(prompt="a chair", negative_prompt="metal", seed=5, steps=2, guidance=1.7)
    path = str(tmp_path / "chair.ply")
    bpy.ops.gaussian_atlas.export_splats(filepath=path)
    assert formats.load_metadata(path)["prompt"] == "a chair"
    bpy.ops.gaussian_atlas.import_splats(filepath=path)
    assert bpy.context.active_object.name == "chair"
    bpy.ops.gaussian_atlas.regenerate()
    first, second = fake_model.pipeline.calls
    assert first == second


def test_apply_transform_writes_where_the_object_stands(bpy, extension, torus, tmp_path, formats):
    gaussians = torus(50)
    object = extension("blender_addon.splat_object").write(gaussians)
    object.location.x = 5
    bpy.context.view_layer.objects.active = object
    bpy.context.view_layer.update()
    for apply, offset in ((False, 0), (True, 5)):
        path = str(tmp_path / "ring.ply")
        bpy.ops.gaussian_atlas.export_splats(filepath=path, apply_transform=apply)
        assert np.allclose(formats.load(path).means[:, 0], gaussians.means[:, 0] + offset, atol=1e-5)


def test_up_axis_turns_the_object_and_not_its_data(bpy, extension, torus, tmp_path, formats):
    gaussians = torus(50)
    formats.save(gaussians, tmp_path / "ring.ply")
    ups = {}
    for axis in ("Z", "-Y", "Y"):
        bpy.ops.gaussian_atlas.import_splats(filepath=str(tmp_path / "ring.ply"), up_axis=axis)
        bpy.context.view_layer.update()
        ups[axis] = np.array(bpy.context.active_object.matrix_world)[:3, :3]
        assert np.allclose(extension("blender_addon.splat_object").read(bpy.context.active_object).means, gaussians.means, atol=1e-6)
    assert np.allclose(ups["Z"] @ [0, 0, 1], [0, 0, 1])
    assert np.allclose(ups["Y"] @ [0, 1, 0], [0, 0, 1], atol=1e-6)
    assert np.allclose(ups["-Y"] @ [0, -1, 0], [0, 0, 1], atol=1e-6)


def test_bad_files_are_one_clear_line(bpy, torus, tmp_path, extension):
    (tmp_path / "text.ply").write_text("no splats here")
    for path, message in (
        (tmp_path / "missing.ply", "does not exist"),
        (tmp_path / "text.ply", "text.ply"),
        (tmp_path / "mesh.obj", "splat files end in"),
    ):
        with pytest.raises(RuntimeError, match=message) as caught:
            bpy.ops.gaussian_atlas.import_splats(filepath=str(path))
        assert len(str(caught.value).strip().splitlines()) == 1
    assert not bpy.data.objects
    bpy.context.view_layer.objects.active = extension("blender_addon.splat_object").write(torus(5))
    with pytest.raises(RuntimeError, match="folder .* does not exist"):
        bpy.ops.gaussian_atlas.export_splats(filepath=str(tmp_path / "nowhere" / "ring.ply"))


PROVENANCE = {
    "prompt": "a chair", "negative_prompt": "", "seed": 3, "steps": 20, "guidance": 2.0, "model_name": "m", "model_hash": "0",
    "program_version": "1", "layout_id": "x",
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 2**31}, "seed 2147483648 does not fit Blender's integers"),
        ({"seed": -1}, "seed -1 does not fit"),
        ({"steps": 10**12}, "steps 1000000000000 does not fit"),
        ({"guidance": 10**400}, "a number of it is out of range"),
        ({"guidance": 1e300}, "guidance 1e[+]300 does not fit Blender's numbers"),
        ({"low_pass": float("nan")}, "low_pass nan does not fit"),
        ({"prompt": "a \ud800 chair"}, "prompt .* does not fit Blender's text"),
        ({"edit": "null\0"}, "edit .* does not fit Blender's text"),
    ],
)
def test_a_file_whose_origin_blender_cannot_hold_is_imported_without_it(bpy, torus, tmp_path, formats, change, message, capfd):
    """Seeds have 63 bits on the command line and 32 in Blender."""
    path = tmp_path / "chair.ply"
    formats.save(torus(50), path, metadata=PROVENANCE)
    given, wanted = (json.dumps(each, sort_keys=True).encode() for each in (PROVENANCE, PROVENANCE | change))
    path.write_bytes(path.read_bytes().replace(given, wanted))
    assert bpy.ops.gaussian_atlas.import_splats(filepath=str(path)) == {"FINISHED"}
    (object,) = bpy.data.objects
    assert object.name == "chair" and len(object.data.points) == 50 and object.gaussian_atlas.prompt == ""
    said = [line for line in capfd.readouterr().out.splitlines() if line.startswith("Warning:")]
    assert len(said) == 1 and re.search(f"left out.*{message}|left out: {message}", said[0])


def test_the_rest_of_many_files_is_imported_whatever_one_of_them_does(bpy, torus, tmp_path, formats, monkeypatch, capfd):
    for name in "abc":
        formats.save(torus(20), tmp_path / f"{name}.ply")
    read = formats.ply.read

    def odd(path):
        if path.name == "b.ply":
            raise TypeError("nobody thought\nof this")
        return read(path)

    monkeypatch.setattr(formats.ply, "read", odd)
    files = [{"name": f"{name}.ply"} for name in "abc"]
    assert bpy.ops.gaussian_atlas.import_splats(directory=str(tmp_path), files=files) == {"FINISHED"}
    assert sorted(object.name for object in bpy.data.objects) == ["a", "c"]
    assert f"Warning: {tmp_path / 'b.ply'}: TypeError: nobody thought of this" in capfd.readouterr().out


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names of files are text")
def test_names_of_files_need_not_be_text(bpy, torus, tmp_path, formats):
    formats.save(torus(20), tmp_path / "chair.ply")
    odd = os.fsencode(tmp_path / "chair.ply").replace(b"chair", b"ch\xe4ir")
    os.rename(tmp_path / "chair.ply", odd)
    assert bpy.ops.gaussian_atlas.import_splats(filepath=os.fsdecode(odd)) == {"FINISHED"}
    assert [object.name for object in bpy.data.objects] == ["ch?ir"]
    with open(odd, "wb") as file:
        file.write(b"ply")
    with pytest.raises(RuntimeError, match="ch[?]ir.ply is not a"):
        bpy.ops.gaussian_atlas.import_splats(filepath=os.fsdecode(odd))


def test_only_splat_objects_can_be_exported(bpy, tmp_path):
    assert not bpy.ops.gaussian_atlas.export_splats.poll()


# Render settings


def test_render_settings_are_set_said_and_put_back(bpy, extension):
    scene = bpy.context.scene
    settings = extension("blender_addon.render_settings")
    before = (scene.view_settings.view_transform, scene.cycles.transparent_max_bounces, scene.cycles.min_transparent_bounces)
    assert {c.path for c in settings.changes(scene)} == {
        "view_settings.view_transform",
        "cycles.transparent_max_bounces",
        "cycles.min_transparent_bounces",
    }
    bpy.ops.gaussian_atlas.render_settings()
    assert scene.view_settings.view_transform == "Standard"
    assert scene.cycles.transparent_max_bounces >= 1024 and scene.cycles.min_transparent_bounces >= 1024
    assert settings.changes(scene) == []
    bpy.ops.gaussian_atlas.render_settings()  # a second time must not forget the first values
    bpy.ops.gaussian_atlas.render_settings(restore=True)
    assert (scene.view_settings.view_transform, scene.cycles.transparent_max_bounces, scene.cycles.min_transparent_bounces) == before
    assert settings.stored_values(scene) == {}


def test_the_look_of_a_view_transform_is_said_and_put_back(bpy, extension):
    scene = bpy.context.scene
    scene.view_settings.look = "AgX - Punchy"
    said = [str(change) for change in extension("blender_addon.render_settings").changes(scene)]
    assert "Look: AgX - Punchy to None" in said
    bpy.ops.gaussian_atlas.render_settings()
    assert scene.view_settings.look == "None"
    bpy.ops.gaussian_atlas.render_settings(restore=True)
    assert (scene.view_settings.view_transform, scene.view_settings.look) == ("AgX", "AgX - Punchy")


def test_every_stored_setting_comes_back_after_saving(bpy, extension, tmp_path):
    scene, settings = bpy.context.scene, extension("blender_addon.render_settings")
    scene.cycles.transparent_max_bounces = 12
    bpy.ops.gaussian_atlas.render_settings()
    bpy.ops.wm.save_as_mainfile(filepath=str(tmp_path / "adapted.blend"))
    bpy.ops.wm.open_mainfile(filepath=str(tmp_path / "adapted.blend"))
    scene = bpy.context.scene
    done, refused = settings.restore(scene)
    assert "Transparent bounces: 1024 to 12" in map(str, done) and refused == [] and scene.cycles.transparent_max_bounces == 12


def test_what_cannot_be_put_back_is_said_and_forgotten(bpy, extension, torus, capfd):
    scene, settings = bpy.context.scene, extension("blender_addon.render_settings")
    extension("blender_addon.splat_object").write(torus(5), "ring")
    bpy.ops.gaussian_atlas.render_settings()
    stored = {"view_settings.view_transform": "Filmic of My Own", "objects/ring": "wide", "objects/gone": 1.0, "render.filepath": "/"}
    stored |= {"cycles.transparent_max_bounces": 12, "cycles.min_transparent_bounces": 10**30}
    scene.gaussian_atlas.stored_render_settings = json.dumps(stored)
    path = scene.render.filepath
    done, refused = settings.restore(scene)
    assert [change.path for change in done] == ["cycles.transparent_max_bounces"] and scene.cycles.transparent_max_bounces == 12
    assert [line.partition(":")[0] for line in refused] == ["View transform", "Smoothing of ring", "Minimum transparent bounces"]
    assert scene.render.filepath == path and scene.gaussian_atlas.stored_render_settings == ""
    scene.gaussian_atlas.stored_render_settings = json.dumps({"view_settings.view_transform": "Filmic of My Own"})
    capfd.readouterr()
    assert bpy.ops.gaussian_atlas.render_settings(restore=True) == {"FINISHED"}
    assert "Warning: View transform: 'Filmic of My Own' cannot be put back here" in capfd.readouterr().out


@pytest.mark.parametrize("text", ["{", "[1, 2]", "7", '"x"', "null"])
def test_damaged_stored_settings_are_none(bpy, extension, text):
    scene, settings = bpy.context.scene, extension("blender_addon.render_settings")
    scene.gaussian_atlas.stored_render_settings = text
    assert settings.stored_values(scene) == {}, "as the panel asks"
    assert bpy.ops.gaussian_atlas.render_settings(restore=True) == {"FINISHED"}
    assert scene.gaussian_atlas.stored_render_settings == ""


def test_settings_that_already_fit_are_left_alone(bpy, extension):
    scene = bpy.context.scene
    scene.view_settings.view_transform = "Raw"
    scene.cycles.transparent_max_bounces = 1024
    bpy.ops.gaussian_atlas.render_settings()
    assert scene.view_settings.view_transform == "Raw" and scene.cycles.transparent_max_bounces == 1024


def test_generating_changes_no_render_setting(bpy, fake_model, extension):
    before = extension("blender_addon.render_settings").changes(bpy.context.scene)
    bpy.ops.gaussian_atlas.generate(prompt="a chair", steps=1)
    assert extension("blender_addon.render_settings").changes(bpy.context.scene) == before != []


# The extension as a whole


def test_disable_and_enable_again(bpy, extension):
    import addon_utils

    module = "bl_ext.user_default.gaussian_atlas"
    addon_utils.disable(module)
    assert not hasattr(bpy.types.Scene, "gaussian_atlas") and "generate" not in dir(bpy.ops.gaussian_atlas)
    addon_utils.enable(module, default_set=True)
    assert hasattr(bpy.types.Scene, "gaussian_atlas") and "generate" in dir(bpy.ops.gaussian_atlas)


def test_menus_offer_import_and_export(bpy, extension):
    files = extension("blender_addon.operators.files")
    for menu, draw_entry in ((bpy.types.TOPBAR_MT_file_import, files._draw_import), (bpy.types.TOPBAR_MT_file_export, files._draw_export)):
        assert draw_entry in menu._dyn_ui_initialize()


# The documentation


def test_the_example_for_scripts_runs_as_it_is_printed(bpy, fake_model, capsys):
    import re
    from pathlib import Path

    text = (Path(__file__).resolve().parent.parent / "docs" / "panel.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(example, "docs/panel.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "[('a red armchair', 7), ('a red armchair.001', 8)]" in printed and "the prompt is empty" in printed
    assert sorted(object.name for object in bpy.data.objects) == ["a floor lamp", "a red armchair", "a red armchair.001"]
    assert [call["num_inference_steps"] for call in fake_model.pipeline.calls] == [20, 20, 10]
