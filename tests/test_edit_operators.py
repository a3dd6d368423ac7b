"""Variations, in-painting, morphs and mixes inside Blender, with a real model of random weights."""

from __future__ import annotations

import json
import threading

import numpy as np
import pytest

from tests.tiny_bundle import write_tiny_bundle


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_bundle(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def model(bpy, extension, folder):
    """The tiny model, with the starter's low-pass; loaded once for the module."""
    service = extension("blender_addon.service")
    if folder not in _pipes:
        _pipes[folder] = service.from_bundle(folder, "cpu")
        _pipes[folder].info["low_pass"] = 0.005854
    service.set_pipeline_factory(lambda path, device: _pipes[folder])
    preferences = bpy.context.preferences.addons[extension("blender_addon.extension").PACKAGE].preferences
    preferences.model_path = str(folder)
    yield _pipes[folder]
    preferences.model_path = ""


_pipes: dict = {}


@pytest.fixture
def lamp(bpy, model):
    """A generated object, active and selected."""
    bpy.ops.gaussian_atlas.generate(prompt="a lamp", seed=5, steps=4, guidance=2.0, count=1)
    return bpy.context.active_object


def values(extension, object):
    return extension("blender_addon.splat_object.layout").extract(object.data)


def objects(bpy):
    return [object for object in bpy.context.scene.objects if object.type == "POINTCLOUD"]


def delete(bpy, object, rows):
    """Delete splats as an artist does."""
    mask = np.zeros(len(object.data.points), bool)
    mask[rows] = True
    choose(bpy, object, mask)
    bpy.ops.object.mode_set(mode="EDIT")
    bpy.ops.pointcloud.delete()
    bpy.ops.object.mode_set(mode="OBJECT")


def choose(bpy, object, mask):
    attribute = object.data.attributes.get(".selection") or object.data.attributes.new(".selection", "BOOLEAN", "POINT")
    attribute.data.foreach_set("value", mask)


def spoil(path, count, row):
    """Put NaN into one row of a binary .ply of that many."""
    content = bytearray(path.read_bytes())
    start = content.index(b"end_header\n") + len(b"end_header\n")
    begin = start + row * ((len(content) - start) // count)
    content[begin : begin + 4] = np.float32("nan").tobytes()
    path.write_bytes(content)


# Objects know their cells


def test_a_generated_object_knows_its_cells_and_gives_its_atlas_back(bpy, model, lamp, extension):
    cells = extension("blender_addon.splat_object.cells")
    assert np.array_equal(cells.stored(lamp), np.arange(1024))
    provenance = extension("blender_addon.properties").stored_provenance(lamp)
    assert (provenance.layout_id, provenance.low_pass) == (model.layout.id, 0.005854)
    read = extension("blender_addon.splat_object").read(lamp)
    again = model("a lamp", init_atlas=model.encode(read, low_pass=provenance.low_pass), strength=0).gaussians[0]
    assert np.allclose(again.means, read.means, atol=1e-6) and np.allclose(again.colors, read.colors, atol=1e-6)
    assert np.allclose(again.covariances(), read.covariances(), atol=1e-7, rtol=1e-3)
    assert np.allclose(again.opacities, read.opacities, atol=1e-3)


def test_cells_survive_deletion_save_and_load_copy_and_join(bpy, model, lamp, extension, tmp_path):
    cells = extension("blender_addon.splat_object.cells")
    delete(bpy, lamp, [0, 1, 500])
    expected = np.delete(np.arange(1024), [0, 1, 500])
    assert np.array_equal(cells.stored(lamp), expected)
    copy = lamp.copy()
    copy.data = lamp.data.copy()
    assert np.array_equal(cells.stored(copy), expected)
    name = lamp.name
    bpy.ops.wm.save_as_mainfile(filepath=str(tmp_path / "lamp.blend"))
    bpy.ops.wm.open_mainfile(filepath=str(tmp_path / "lamp.blend"))
    lamp = bpy.data.objects[name]
    assert np.array_equal(cells.stored(lamp), expected)
    # Splats that come from elsewhere are in no cell.
    extra = extension("blender_addon.splat_object").write(extension("blender_addon.splat_object").read(lamp)[:7])
    extra.select_set(True)
    lamp.select_set(True)
    bpy.context.view_layer.objects.active = lamp
    bpy.ops.object.join()
    assert sorted(cells.stored(lamp)) == [-1] * 7 + sorted(expected)
    assert bpy.ops.gaussian_atlas.vary(strength=0.2, seed=1, count=1) == {"FINISHED"}
    assert len(bpy.context.active_object.data.points) == 1024


# Variations


def test_variations_stand_beside_their_source_and_differ_more_with_strength(bpy, model, lamp, extension):
    lamp.location = (1, 2, 3)
    bpy.context.view_layer.update()
    source = values(extension, lamp)
    distances = []
    for strength in (0.0, 0.02, 1.0):
        bpy.ops.object.select_all(action="DESELECT")
        bpy.context.view_layer.objects.active = lamp
        assert bpy.ops.gaussian_atlas.vary(strength=strength, seed=8, count=1) == {"FINISHED"}
        made = bpy.context.active_object
        assert made != lamp and np.allclose(made.location, (2.25, 2, 3))
        distances.append(np.abs(values(extension, made)["position"] - source["position"]).mean())
    assert distances[0] < 1e-6 and distances == sorted(distances) and distances[2] > 0.01
    # All the way is a plain generation.
    bpy.ops.gaussian_atlas.generate(prompt="a lamp", seed=8, steps=4, guidance=2.0, count=1)
    assert np.array_equal(values(extension, bpy.context.active_object)["position"], values(extension, made)["position"])


def test_count_and_seed_of_variations(bpy, model, lamp, extension):
    bpy.ops.gaussian_atlas.vary(strength=0.5, count=3)
    made = [object for object in objects(bpy) if object != lamp]
    assert sorted(object.gaussian_atlas.seed for object in made) == [6, 7, 8], "not its own seed, which would lead back to it"
    assert len({round(object.location.x, 3) for object in made}) == 3
    assert lamp.gaussian_atlas.edit == ""


def test_what_was_done_by_hand_is_in_the_variation(bpy, model, lamp, extension):
    layout = extension("blender_addon.splat_object.layout")
    changed = values(extension, lamp)
    changed["position"][:, 2] += 0.2
    layout.fill(lamp.data, changed)
    delete(bpy, lamp, range(300, 400))
    bpy.ops.gaussian_atlas.vary(strength=0.0, seed=1, count=1)
    made = values(extension, bpy.context.active_object)
    kept = np.r_[0:300, 400:1024]
    assert np.allclose(made["position"][kept], changed["position"][kept], atol=1e-5)
    assert (made["radiance:base"][300:400, 3] < 2e-3).all(), "what was deleted is empty"


def test_an_edit_is_remembered_and_made_again(bpy, model, lamp, extension):
    bpy.ops.gaussian_atlas.vary(strength=0.3, seed=2, count=1)
    first = bpy.context.active_object
    choose(bpy, first, np.arange(1024) % 3 == 0)
    bpy.ops.gaussian_atlas.inpaint(seed=9, prompt="a red car")
    made = values(extension, first)
    provenance = extension("blender_addon.properties").stored_provenance(first)
    record = json.loads(provenance.edit)
    assert (record["kind"], record["strength"], provenance.prompt, provenance.seed) == ("inpainting", 1.0, "a red car", 9)
    assert json.loads(record["source"]["edit"])["strength"] == 0.3 and record["source"]["seed"] == 2
    bpy.ops.gaussian_atlas.regenerate()
    again = bpy.context.active_object
    assert again != first and extension("blender_addon.properties").stored_provenance(again) == provenance
    assert np.allclose(values(extension, again)["position"], made["position"], atol=1e-3)


def test_provenance_of_an_edit_travels_in_a_file(bpy, model, lamp, extension, tmp_path):
    bpy.ops.gaussian_atlas.vary(strength=0.3, seed=2, count=1)
    provenance = extension("blender_addon.properties").stored_provenance(bpy.context.active_object)
    bpy.ops.gaussian_atlas.export_splats(filepath=str(tmp_path / "vary.ply"))
    bpy.ops.gaussian_atlas.import_splats(filepath=str(tmp_path / "vary.ply"))
    assert extension("blender_addon.properties").stored_provenance(bpy.context.active_object) == provenance
    old = {
        key: value
        for key, value in provenance.as_metadata().items()
        if key not in ("mix_prompt", "mix_weight", "layout_id", "low_pass", "edit")
    }
    # The file holds the cells in order, so the object can be edited further.
    assert bpy.ops.gaussian_atlas.vary(strength=0.2, seed=3, count=1) == {"FINISHED"}
    delete(bpy, bpy.context.active_object, [4])
    bpy.ops.gaussian_atlas.export_splats(filepath=str(tmp_path / "cut.ply"))
    bpy.ops.gaussian_atlas.import_splats(filepath=str(tmp_path / "cut.ply"))
    assert bpy.context.active_object.gaussian_atlas.prompt == "a lamp"
    assert not bpy.ops.gaussian_atlas.vary.poll(), "which cell a splat is cannot be told any more"
    read = extension("blender_addon.properties").provenance_from_metadata(old)
    assert read.prompt == "a lamp" and read.edit == "" and read.layout_id == ""


@pytest.mark.parametrize(("count", "bad", "numbered"), [(16, None, True), (16, 0, False), (17, 0, False), (15, None, False)])
def test_cells_are_told_by_rows_only_where_the_file_holds_a_whole_atlas(bpy, extension, torus, tmp_path, count, bad, numbered):
    path = tmp_path / "atlas.ply"
    provenance = extension("blender_addon.generation").Provenance("a ring", "", 0, 20, 2.0, "m", "0", "1", layout_id="some")
    extension("generator.formats").save(torus(count), path, metadata=provenance.as_metadata())
    if bad is not None:
        spoil(path, count, bad)
    assert bpy.ops.gaussian_atlas.import_splats(filepath=str(path)) == {"FINISHED"}
    object = bpy.context.active_object
    assert object.gaussian_atlas.prompt == "a ring" and len(object.data.points) == count - (bad is not None)
    assert (extension("blender_addon.splat_object.cells").stored(object) is not None) is numbered


# In-painting


def test_only_the_chosen_splats_change(bpy, model, lamp, extension):
    before, count = values(extension, lamp), len(objects(bpy))
    chosen = before["position"][:, 2] > np.median(before["position"][:, 2])
    choose(bpy, lamp, chosen)
    bpy.ops.object.mode_set(mode="EDIT")
    assert bpy.ops.gaussian_atlas.inpaint(seed=4) == {"FINISHED"}
    bpy.ops.object.mode_set(mode="OBJECT")
    after = values(extension, lamp)
    for name in before:
        assert np.array_equal(after[name][~chosen], before[name][~chosen]), name
        assert (after[name][chosen] != before[name][chosen]).any(1).all(), name
    assert len(objects(bpy)) == count and not [cloud for cloud in bpy.data.pointclouds if cloud.users == 0]


@pytest.mark.parametrize("kind", ["EMPTY", "MESH"])
def test_another_object_chooses_by_its_box(bpy, model, lamp, extension, kind):
    before = values(extension, lamp)
    lamp.rotation_euler, lamp.location, lamp.scale = (0.3, 0.2, 0.1), (1, 0, 0), (2, 1, 1)
    if kind == "EMPTY":
        bpy.ops.object.empty_add(type="CUBE", location=(1, 0, 0.5), rotation=(0, 0, 0.5))
        bpy.context.object.scale = (9, 9, 0.5)
    else:
        bpy.ops.mesh.primitive_cube_add(location=(1, 0, 0.5), rotation=(0, 0, 0.5))
        bpy.context.object.scale = (9, 9, 0.5)
    bpy.context.view_layer.update()
    matrix = np.array(lamp.matrix_world)
    world = before["position"] @ matrix[:3, :3].T + matrix[:3, 3]
    box = bpy.context.object
    turned = np.array(box.matrix_world.inverted())
    local = world @ turned[:3, :3].T + turned[:3, 3]
    chosen = (np.abs(local) <= 1).all(1)
    assert 50 < chosen.sum() < 1000
    lamp.select_set(True)
    bpy.context.view_layer.objects.active = lamp
    bpy.ops.gaussian_atlas.inpaint(seed=4)
    changed = (values(extension, lamp)["position"] != before["position"]).any(1)
    assert np.array_equal(changed, chosen)


@pytest.mark.filterwarnings("ignore:the model reads")
def test_that_a_prompt_was_cut_is_said_of_an_edit_too(bpy, model, lamp, capfd):
    choose(bpy, lamp, np.arange(len(lamp.data.points)) < 50)
    assert bpy.ops.gaussian_atlas.inpaint(prompt="a tall lamp " * 30) == {"FINISHED"}
    said = [line for line in capfd.readouterr().out.splitlines() if line.startswith("Warning:")]
    assert len(said) == 1 and "the end of this prompt is left out" in said[0]


def test_undo_brings_the_old_splats_back(bpy, model, lamp, extension):
    name, before = lamp.name, values(extension, lamp)
    choose(bpy, lamp, np.arange(1024) < 200)
    bpy.ops.ed.undo_push(message="before")
    bpy.ops.gaussian_atlas.inpaint("EXEC_DEFAULT", True, seed=4)
    assert not np.array_equal(values(extension, lamp)["position"], before["position"])
    bpy.ops.ed.undo()
    lamp = bpy.data.objects[name]
    assert all(np.array_equal(before[key], column) for key, column in values(extension, lamp).items())
    assert (lamp.gaussian_atlas.edit, lamp.gaussian_atlas.seed) == ("", 5)


def test_splats_that_are_gone_stay_gone(bpy, model, lamp, extension):
    delete(bpy, lamp, range(100))
    before = values(extension, lamp)
    choose(bpy, lamp, np.arange(924) < 200)
    bpy.ops.gaussian_atlas.inpaint(seed=4)
    after = values(extension, lamp)
    assert len(after["position"]) == 924 and np.array_equal(after["position"][200:], before["position"][200:])
    assert (after["position"][:200] != before["position"][:200]).any(1).all()


# Errors: one line, and nothing changes


def refused(call, match):
    with pytest.raises(RuntimeError, match=match) as error:
        call()
    assert "Traceback" not in str(error.value) and len(str(error.value).strip().splitlines()) == 1


def test_what_cannot_be_edited_says_why(bpy, model, lamp, extension, torus):
    before = values(extension, lamp)
    refused(lambda: bpy.ops.gaussian_atlas.inpaint(seed=1), "select splats in Edit Mode")
    refused(lambda: bpy.ops.gaussian_atlas.inpaint(volume="Nowhere"), "no other object 'Nowhere'")
    bpy.ops.object.empty_add(location=(50, 0, 0))
    bpy.context.view_layer.objects.active = lamp
    refused(lambda: bpy.ops.gaussian_atlas.inpaint(volume="Empty"), "encloses some")
    bpy.data.objects["Empty"].scale = (0, 1, 1)
    bpy.context.view_layer.update()
    refused(lambda: bpy.ops.gaussian_atlas.inpaint(volume="Empty"), "encloses nothing")
    assert all(np.array_equal(before[name], column) for name, column in values(extension, lamp).items()) and len(objects(bpy)) == 1
    lamp.gaussian_atlas.layout_id = ""
    assert not bpy.ops.gaussian_atlas.vary.poll()
    loose = extension("blender_addon.splat_object").write(torus(50))
    bpy.context.view_layer.objects.active = loose
    for operator in (bpy.ops.gaussian_atlas.vary, bpy.ops.gaussian_atlas.inpaint, bpy.ops.gaussian_atlas.morph):
        assert not operator.poll()


def test_a_linked_object_is_varied_but_not_changed(bpy, model, lamp, extension, tmp_path):
    name = lamp.name
    bpy.ops.wm.save_as_mainfile(filepath=str(tmp_path / "lamp.blend"))
    bpy.ops.wm.read_homefile(use_empty=True, use_factory_startup=True)
    with bpy.data.libraries.load(str(tmp_path / "lamp.blend"), link=True) as (_, here):
        here.objects = [name]
    (linked,) = here.objects
    mine = bpy.data.objects.new("mine", linked.data)  # the object is this file's, its splats are not
    properties = extension("blender_addon.properties")
    properties.store_provenance(mine, properties.stored_provenance(linked))
    for object in (linked, mine):
        bpy.context.scene.collection.objects.link(object)
        bpy.context.view_layer.objects.active = object
        assert not bpy.ops.gaussian_atlas.inpaint.poll()
        assert bpy.ops.gaussian_atlas.vary(strength=0.1, seed=1, count=1) == {"FINISHED"}
        assert bpy.context.active_object.library is None and bpy.context.active_object != object
    copy = mine.copy()
    copy.data = linked.data.copy()
    bpy.context.scene.collection.objects.link(copy)
    bpy.context.view_layer.objects.active = copy
    assert bpy.ops.gaussian_atlas.inpaint.poll()


def test_an_object_of_another_model_is_refused(bpy, model, lamp, extension):
    attribute = lamp.data.attributes["atlas_cell"]
    attribute.data.foreach_set("value", np.arange(1024, dtype=np.int32) + 2000)
    refused(lambda: bpy.ops.gaussian_atlas.vary(strength=0.5, count=1), "not one of the 1024 cells")
    attribute.data.foreach_set("value", np.ones(1024, np.int32))
    refused(lambda: bpy.ops.gaussian_atlas.vary(strength=0.5, count=1), "joined")
    assert len(objects(bpy)) == 1 and not bpy.context.window_manager.gaussian_atlas.running


def test_cancel_and_failure_leave_the_object_alone(bpy, model, lamp, extension, monkeypatch):
    # The thread's half: in background there is no modal operator to drive.
    Job, edits, generation = (extension(f"blender_addon.{name}") for name in ("job", "edits", "generation"))
    _, current = extension("blender_addon.operators.edit").source_of(lamp)
    provenance = extension("blender_addon.properties").stored_provenance(lamp)
    edit = edits.Edit(provenance.as_metadata(), 0.5, np.arange(300), current)
    request = generation.Request("a lamp", extension("blender_addon.extension").model_folder(bpy.context), steps=50, edit=edit)
    cancel, steps = threading.Event(), []

    def report(stage, step=0, total=0, preview=None):
        steps.append(step)
        if step == 2:
            cancel.set()

    with pytest.raises(extension("generator.errors").Cancelled):
        generation.generate(request, report, cancel)
    assert max(steps) == 2
    before = values(extension, lamp)
    monkeypatch.setattr(type(model), "encode", lambda *args, **kwargs: (_ for _ in ()).throw(MemoryError()))
    choose(bpy, lamp, np.arange(1024) < 5)
    refused(lambda: bpy.ops.gaussian_atlas.inpaint(seed=1), "not enough memory")
    assert all(np.array_equal(before[name], column) for name, column in values(extension, lamp).items())


# Mixes


def test_mix_of_two_prompts(bpy, model, extension):
    def position(**arguments):
        bpy.ops.gaussian_atlas.generate(seed=3, steps=3, guidance=2.0, count=1, **arguments)
        return values(extension, bpy.context.active_object)["position"]

    lamp, car = position(prompt="a lamp"), position(prompt="a red car")
    assert np.array_equal(position(prompt="a lamp", mix_prompt="a red car", mix_weight=0.0), lamp)
    assert np.array_equal(position(prompt="a lamp", mix_prompt="a red car", mix_weight=1.0), car)
    half = position(prompt="a lamp", mix_prompt="a red car", mix_weight=0.4)
    assert not np.array_equal(half, lamp) and np.abs(half - lamp).mean() < np.abs(car - lamp).mean()
    stored = extension("blender_addon.properties").stored_provenance(bpy.context.active_object)
    assert (stored.mix_prompt, stored.mix_weight) == ("a red car", 0.4)
    bpy.ops.gaussian_atlas.regenerate()
    assert np.array_equal(values(extension, bpy.context.active_object)["position"], half)
    assert bpy.context.scene.gaussian_atlas.mix_prompt == "a red car"


# Morphs


@pytest.fixture
def pair(bpy, model, lamp):
    bpy.ops.gaussian_atlas.generate(prompt="a red car", seed=6, steps=4, guidance=2.0, count=1)
    car = bpy.context.active_object
    lamp.select_set(True)
    return lamp, car


def evaluated(bpy, object, extension):
    """Attributes after the morph, as the modifier that shows splats gets them; which is switched off, since it makes instances."""
    shown = extension("blender_addon.splat_object.node_group").modifier_of(object)
    shown.show_viewport = False
    bpy.context.view_layer.update()
    cloud = object.evaluated_get(bpy.context.evaluated_depsgraph_get()).data
    found = extension("blender_addon.splat_object.layout").extract(cloud)
    shown.show_viewport = True
    return {name: column.copy() for name, column in found.items()}


def test_a_morph_is_the_generators_at_any_factor(bpy, model, pair, extension):
    splat_object, inputs = extension("blender_addon.splat_object"), extension("blender_addon.splat_object.inputs")
    morph, reference = extension("blender_addon.splat_object.morph"), extension("generator.atlas").morph
    ends = [splat_object.read(object) for object in pair]
    assert bpy.ops.gaussian_atlas.morph(factor=0.25) == {"FINISHED"}
    object = bpy.context.active_object
    modifier = morph.modifier_of(object)
    assert [m.node_group.name for m in object.modifiers] == ["Gaussian Morph", "Gaussian Splats"]
    for factor in (0.25, 0.0, 1.0, 0.7):
        if factor != 0.25:
            inputs.set_value(modifier, "Factor", factor)
        expected = reference(*ends, factor)
        found = evaluated(bpy, object, extension)
        assert np.allclose(found["position"], expected.means, atol=1e-5)
        assert np.allclose(found["scale"], expected.scales, rtol=1e-3, atol=1e-7)
        assert np.allclose(np.abs((found["rotation"] * expected.quaternions.numpy()).sum(1)), 1, atol=1e-5)
        assert np.allclose(found["radiance:base"][:, 3], expected.opacities, atol=1e-5)
        assert np.allclose(0.5 + 0.28209479 * found["radiance:base"][:, :3], expected.colors, atol=1e-5)
        assert np.allclose(morph.current(object).means, expected.means, atol=1e-6)


def test_a_morph_is_animated_and_lives_alone(bpy, model, pair, extension, tmp_path):
    inputs, morph = extension("blender_addon.splat_object.inputs"), extension("blender_addon.splat_object.morph")
    bpy.ops.gaussian_atlas.morph(factor=0.0)
    object = bpy.context.active_object
    modifier = morph.modifier_of(object)
    path = inputs.data_path(modifier, "Factor")
    for frame, factor in ((1, 0.0), (11, 1.0)):
        inputs.set_value(modifier, "Factor", factor)
        assert object.keyframe_insert(path, frame=frame)
    ends = [values(extension, end)["position"] for end in pair]
    for end in pair:
        bpy.data.objects.remove(end)
    name = object.name
    bpy.ops.wm.save_as_mainfile(filepath=str(tmp_path / "morph.blend"))
    bpy.ops.wm.open_mainfile(filepath=str(tmp_path / "morph.blend"))
    object = bpy.data.objects[name]
    for frame, end in ((1, ends[0]), (11, ends[1])):
        bpy.context.scene.frame_set(frame)
        assert np.allclose(evaluated(bpy, object, extension)["position"], end, atol=1e-5)
    bpy.context.scene.frame_set(6)
    halfway = evaluated(bpy, object, extension)["position"]
    assert np.allclose(halfway, (ends[0] + ends[1]) / 2, atol=1e-5)
    # What is seen is what a variation starts from.
    bpy.ops.gaussian_atlas.vary(strength=0.0, seed=1, count=1)
    assert np.allclose(values(extension, bpy.context.active_object)["position"], halfway, atol=1e-5)
    bpy.context.view_layer.objects.active = object
    assert not bpy.ops.gaussian_atlas.inpaint.poll() and not bpy.ops.gaussian_atlas.regenerate.poll()


def test_deleted_splats_fade_in_a_morph(bpy, model, pair, extension):
    lamp, car = pair
    for other in pair:
        other.select_set(False)
    bpy.context.view_layer.objects.active = lamp
    delete(bpy, lamp, range(10))
    for other in pair:
        other.select_set(True)
    bpy.context.view_layer.objects.active = car
    bpy.ops.gaussian_atlas.morph(factor=0.0)
    object = bpy.context.active_object
    found = evaluated(bpy, object, extension)
    assert len(found["position"]) == 1024 and (found["radiance:base"][:10, 3] == 0).all()
    assert np.allclose(found["position"][10:], values(extension, lamp)["position"], atol=1e-6)


def test_a_morph_needs_two_objects_of_one_layout(bpy, model, pair, extension):
    lamp, car = pair
    lamp.gaussian_atlas.layout_id = "0" * 32
    refused(lambda: bpy.ops.gaussian_atlas.morph(), "different layouts")
    lamp.select_set(False)
    assert not bpy.ops.gaussian_atlas.morph.poll()


def test_a_morph_is_exported_as_it_is_seen(bpy, model, pair, extension, tmp_path):
    splat_object, inputs = extension("blender_addon.splat_object"), extension("blender_addon.splat_object.inputs")
    morph = extension("blender_addon.splat_object.morph")
    ends = [splat_object.read(object) for object in pair]
    bpy.ops.gaussian_atlas.morph(factor=0.25)
    object = bpy.context.active_object
    inputs.set_value(morph.modifier_of(object), "Factor", 0.6)
    object.location, object.scale = (1, 2, 3), (2, 2, 2)
    bpy.context.view_layer.update()
    expected = extension("generator.atlas").morph(*ends, 0.6)
    for applied, scale, shift in ((False, 1, [0, 0, 0]), (True, 2, [1, 2, 3])):
        path = tmp_path / f"{applied}.ply"
        assert bpy.ops.gaussian_atlas.export_splats(filepath=str(path), apply_transform=applied) == {"FINISHED"}
        found = extension("generator.formats").load(path)
        assert np.allclose(found.means, scale * expected.means.numpy() + shift, atol=1e-5)
        assert np.allclose(found.scales, scale * expected.scales, rtol=1e-3, atol=1e-7)


def test_a_morph_renders(bpy, model, pair, extension, tmp_path):
    preview = extension("blender_addon.preview")
    bpy.ops.gaussian_atlas.morph(factor=0.5)
    object = bpy.context.active_object
    for end in pair:
        end.hide_render = True
    preview.look_at(bpy.context.scene, object, 48, samples=1)
    preview.render(bpy.context.scene, tmp_path / "half.png")
    image = bpy.data.images.load(str(tmp_path / "half.png"))
    pixels = np.array(image.pixels[:]).reshape(48, 48, 4)[..., :3]
    assert 0.02 < (pixels.min(2) < 0.9).mean() < 0.98


def test_the_panel_shows_what_can_be_done(bpy, model, pair, extension):
    edit = extension("blender_addon.panels.edit").EditPanel
    assert edit.poll(bpy.context)
    describe = extension("generator.records").describe
    bpy.ops.gaussian_atlas.vary(strength=0.3, seed=1, count=1)
    assert describe(bpy.context.active_object.gaussian_atlas.edit) == "Variation, strength 0.3, of \u201ca red car\u201d, seed 6"
    assert describe("") == describe("no JSON") == ""
