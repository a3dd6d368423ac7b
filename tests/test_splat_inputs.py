"""What the inputs of the splat modifier do, and that they can be animated."""

from __future__ import annotations

import numpy as np
import pytest


@pytest.fixture
def inputs(extension):
    return extension("blender_addon.splat_object.inputs")


@pytest.fixture
def ring(bpy, extension, torus):
    """A splat object of 400 Gaussians and its modifier."""
    if extension("blender_addon.splat_object").native():
        pytest.skip("this Blender draws splats itself")
    object = extension("blender_addon.splat_object").write(torus(400), "ring")
    return object, extension("blender_addon.splat_object.node_group").modifier_of(object)


def shown(bpy, object) -> np.ndarray:
    """Centres [N, 3] of the splats that the viewport shows as instances, world frame, in the order of the data."""
    graph = bpy.context.evaluated_depsgraph_get()
    return np.array([i.matrix_world.translation[:] for i in graph.object_instances if i.is_instance and i.parent.original == object])


def matrices(bpy, object) -> np.ndarray:
    graph = bpy.context.evaluated_depsgraph_get()
    return np.array([np.array(i.matrix_world) for i in graph.object_instances if i.is_instance and i.parent.original == object])


def emission(bpy, object) -> np.ndarray:
    """What points emit [N, 4]."""
    cloud = object.evaluated_get(bpy.context.evaluated_depsgraph_get()).data
    values = np.empty(4 * len(cloud.points), np.float32)
    cloud.attributes["splat_emission"].data.foreach_get("color", values)
    return values.reshape(-1, 4)


def keyframe(bpy, inputs, modifier, name, values: dict) -> None:
    for frame, value in values.items():
        inputs.set_value(modifier, name, value)
        owner, path = inputs.place(modifier, name)
        assert owner.keyframe_insert(path, frame=frame)


def at(bpy, frame: int) -> None:
    bpy.context.scene.frame_set(frame)


def test_every_input_has_its_default_and_can_be_set(ring, inputs, extension):
    _, modifier = ring
    for entry in inputs.TABLE:
        value = inputs.get_value(modifier, entry.name)
        if entry.default is None or isinstance(entry.default, str | bool):
            assert value == entry.default, entry.name
        else:
            assert np.allclose(value, entry.default), entry.name
    inputs.set_value(modifier, inputs.RENDER_DISPLAY, inputs.POINTS)
    assert inputs.get_value(modifier, inputs.RENDER_DISPLAY) == inputs.POINTS
    with pytest.raises(extension("generator.errors").InputError, match="'Sparkle'"):
        inputs.set_value(modifier, "Sparkle", 1.0)


def test_every_number_input_can_be_keyframed(bpy, ring, inputs):
    object, modifier = ring
    for entry in inputs.TABLE:
        if entry.kind != "NodeSocketObject":
            owner, path = inputs.place(modifier, entry.name)
            assert owner.keyframe_insert(path, frame=1), entry.name
    curves = [c.data_path for layer in object.animation_data.action.layers for s in layer.strips for b in s.channelbags for c in b.fcurves]
    assert set(curves) == {inputs.data_path(modifier, entry.name) for entry in inputs.TABLE if entry.kind != "NodeSocketObject"}


def test_display_is_animated(bpy, ring, inputs):
    object, modifier = ring
    keyframe(bpy, inputs, modifier, inputs.VIEWPORT_DISPLAY, {1: inputs.ELLIPSOIDS, 5: inputs.POINTS})
    at(bpy, 1)
    assert len(shown(bpy, object)) == 400
    at(bpy, 5)
    assert len(shown(bpy, object)) == 0
    cloud = object.evaluated_get(bpy.context.evaluated_depsgraph_get()).data
    assert len(cloud.points) == 400 and [m.name for m in cloud.materials] == ["Gaussian Splat Point"]


def test_points_hide_as_much_as_their_splats(bpy, ring, inputs, torus):
    object, modifier = ring
    inputs.set_value(modifier, inputs.VIEWPORT_DISPLAY, inputs.POINTS)
    cloud = object.evaluated_get(bpy.context.evaluated_depsgraph_get()).data
    radii = np.empty(400, np.float32)
    cloud.points.foreach_get("radius", radii)
    gaussians = torus(400)
    wide = np.sort(gaussians.scales.numpy(), axis=1)[:, 1:].mean(1)
    assert np.allclose(radii, wide * np.sqrt(2 * gaussians.opacities.numpy()), rtol=1e-4)


def test_opacity_threshold_is_animated(bpy, ring, inputs, torus):
    object, modifier = ring
    keyframe(bpy, inputs, modifier, inputs.OPACITY_THRESHOLD, {1: 0.0, 11: 0.9})
    opacities = torus(400).opacities.numpy()
    for frame in (1, 11):
        at(bpy, frame)
        assert len(shown(bpy, object)) == (opacities > (0.0 if frame == 1 else 0.9)).sum()
    assert 0 < (opacities > 0.9).sum() < 400


def test_raising_the_share_kept_only_adds(bpy, ring, inputs):
    object, modifier = ring
    keyframe(bpy, inputs, modifier, inputs.SPLATS_KEPT, {1: 0.0, 11: 1.0})
    before = set()
    for frame in range(1, 12):
        at(bpy, frame)
        now = {tuple(centre) for centre in shown(bpy, object).round(5).tolist()}
        assert before <= now, frame
        if frame == 6:
            assert 160 <= len(now) <= 240
        before = now
    assert len(before) == 400
    at(bpy, 1)
    assert len(shown(bpy, object)) <= 1
    at(bpy, 6)
    again = shown(bpy, object)
    at(bpy, 6)
    assert np.array_equal(again, shown(bpy, object))


def test_splats_that_are_kept_cover_what_the_others_did(bpy, ring, inputs):
    object, modifier = ring
    whole = matrices(bpy, object)
    inputs.set_value(modifier, inputs.SPLATS_KEPT, 0.25)
    part = matrices(bpy, object)
    mine = {tuple(m[:3, 3].round(5)): m for m in whole}
    assert all(np.allclose(m[:3, :3], 2 * mine[tuple(m[:3, 3].round(5))][:3, :3], atol=1e-6) for m in part) and len(part) > 50


def test_size_is_animated(bpy, ring, inputs):
    object, modifier = ring
    keyframe(bpy, inputs, modifier, inputs.SPLAT_SIZE, {1: 1.0, 11: 3.0})
    at(bpy, 1)
    first = matrices(bpy, object)
    at(bpy, 11)
    assert np.allclose(matrices(bpy, object)[:, :3, :3], 3 * first[:, :3, :3], atol=1e-6)


def test_tint_is_animated(bpy, ring, inputs, torus):
    object, modifier = ring
    inputs.set_value(modifier, inputs.VIEWPORT_DISPLAY, inputs.POINTS)
    inputs.set_value(modifier, inputs.BLEND_IN_DISPLAY_SPACE, True)
    inputs.set_value(modifier, inputs.TINT, (1.0, 0.0, 0.21404114, 1.0))  # scene-linear; shown as 1, 0, 0.5
    keyframe(bpy, inputs, modifier, inputs.TINT_STRENGTH, {1: 0.0, 11: 1.0})
    colors = torus(400).colors.numpy()
    at(bpy, 1)
    assert np.allclose(emission(bpy, object)[:, :3], colors, atol=1e-5)
    at(bpy, 11)
    assert np.allclose(emission(bpy, object)[:, :3], colors * [1.0, 0.0, 0.5], atol=1e-4)


def crop_box(bpy, modifier, inputs, location, scale):
    box = bpy.data.objects.new("box", None)
    bpy.context.scene.collection.objects.link(box)
    box.location, box.scale = location, scale
    inputs.set_value(modifier, inputs.CROP_BOX, box)
    return box


def test_crop_box_is_an_object_that_can_be_animated(bpy, ring, inputs):
    object, modifier = ring
    object.location = (2.0, 0.0, 0.0)
    object.rotation_euler = (0.0, 0.3, 0.0)
    bpy.context.view_layer.update()
    everything = shown(bpy, object)
    box = crop_box(bpy, modifier, inputs, (2.3, 0.0, 0.0), (0.3, 0.4, 0.3))
    box.rotation_euler.z = 0.5
    box.keyframe_insert("location", frame=1)
    box.location.x = 1.9
    box.keyframe_insert("location", frame=11)
    assert len(shown(bpy, object)) == 400, "the box does nothing before Crop is on"
    inputs.set_value(modifier, inputs.CROP, True)
    counts = []
    for frame in (1, 11):
        at(bpy, frame)
        local = np.c_[everything, np.ones(400)] @ np.linalg.inv(np.array(box.matrix_world)).T
        inside = (np.abs(local[:, :3]) <= 1).all(1)
        assert np.allclose(shown(bpy, object), everything[inside], atol=1e-6), frame
        counts.append(inside.sum())
    assert counts[0] != counts[1] and min(counts) > 0
    inputs.set_value(modifier, inputs.INVERT_CROP, True)
    assert len(shown(bpy, object)) == 400 - counts[1]


def test_crop_is_animated(bpy, ring, inputs):
    object, modifier = ring
    crop_box(bpy, modifier, inputs, (1.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    keyframe(bpy, inputs, modifier, inputs.CROP, {1: False, 2: True})
    at(bpy, 1)
    assert len(shown(bpy, object)) == 400
    at(bpy, 2)
    right = shown(bpy, object)
    assert 100 < len(right) < 300 and (right[:, 0] >= 0).all()


def test_a_crop_box_scaled_to_nothing_holds_nothing(bpy, ring, inputs):
    object, modifier = ring
    box = crop_box(bpy, modifier, inputs, (0, 0, 0), (0.0, 1.0, 1.0))
    inputs.set_value(modifier, inputs.CROP, True)
    assert len(shown(bpy, object)) == 0
    inputs.set_value(modifier, inputs.INVERT_CROP, True)
    assert len(shown(bpy, object)) == 400
    bpy.data.objects.remove(box)  # without a box the cube of the object itself crops
    inputs.set_value(modifier, inputs.INVERT_CROP, False)
    assert len(shown(bpy, object)) == 400


def test_two_objects_have_their_own_values(bpy, ring, inputs, extension, torus):
    object, modifier = ring
    other = extension("blender_addon.splat_object").write(torus(100), "other")
    inputs.set_value(modifier, inputs.OPACITY_THRESHOLD, 1.0)
    assert len(shown(bpy, object)) == 0 and len(shown(bpy, other)) == 100


def test_crop_box_is_added_round_the_object(bpy, ring, inputs):
    object, modifier = ring
    object.location, object.scale = (3.0, 1.0, 0.0), (1.0, 2.0, 1.0)
    bpy.context.view_layer.objects.active = object
    bpy.context.view_layer.update()
    assert bpy.ops.gaussian_atlas.add_crop_box() == {"FINISHED"}
    box = bpy.context.active_object
    assert box.parent == object and box.empty_display_type == "CUBE" and box.select_get() and not object.select_get()
    assert inputs.get_value(modifier, inputs.CROP_BOX) == box and inputs.get_value(modifier, inputs.CROP) is True
    assert len(shown(bpy, object)) == 400, "nothing is lost before the box is moved"
    box.location.x += box.scale.x
    bpy.context.view_layer.update()
    right = shown(bpy, object)
    assert 100 < len(right) < 300 and (right[:, 0] > 2.99).all()
    object.location.x += 5  # the box goes with its object
    bpy.context.view_layer.update()
    assert len(shown(bpy, object)) == len(right)
    assert not bpy.ops.gaussian_atlas.add_crop_box.poll(), "an empty has nothing to crop"


def test_many_splats_are_points_in_the_viewport_only(bpy, ring, inputs, extension, torus, monkeypatch):
    module = extension("blender_addon.splat_object.object")
    monkeypatch.setattr(module, "POINTS_ABOVE", 99)
    displays = []
    for count in (99, 100):
        modifier = extension("blender_addon.splat_object.node_group").modifier_of(module.write(torus(count)))
        displays.append([inputs.get_value(modifier, name) for name in (inputs.VIEWPORT_DISPLAY, inputs.RENDER_DISPLAY)])
    assert displays == [[inputs.ELLIPSOIDS, inputs.CAMERA_QUADS], [inputs.POINTS, inputs.CAMERA_QUADS]]
