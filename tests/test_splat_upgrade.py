"""Splat objects in files of other versions, linked and appended ones, and files opened where the extension is absent."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

# Saved by Blender 4.5 with the extension as it was before the node group had a version.
VERSION_1 = Path(__file__).resolve().parent / "data" / "splats_version_1.blend"


@pytest.fixture
def modules(bpy, extension):
    """The modules under test, in a Blender without splats of its own."""
    from types import SimpleNamespace

    if extension("blender_addon.splat_object").native():
        pytest.skip("this Blender draws splats itself")
    names = ("inputs", "layout", "material", "node_group", "object", "upgrade")
    return SimpleNamespace(**{name: extension(f"blender_addon.splat_object.{name}") for name in names})


def instance_count(bpy, object) -> int:
    graph = bpy.context.evaluated_depsgraph_get()
    return sum(1 for i in graph.object_instances if i.is_instance and i.parent.original == object)


def value(modules, object, name):
    return modules.inputs.get_value(modules.node_group.modifier_of(object), name)


def test_a_file_of_the_first_version_is_upgraded_when_it_is_opened(bpy, modules):
    inputs, node_group = modules.inputs, modules.node_group
    bpy.ops.wm.open_mainfile(filepath=str(VERSION_1), load_ui=False)
    animated, plain = bpy.data.objects["animated"], bpy.data.objects["plain"]
    assert [node_group.version(group) for group in bpy.data.node_groups] == [node_group.VERSION]
    for object in (animated, plain):
        modifier = node_group.modifier_of(object)
        assert set(inputs.names(modifier)) == {entry.name for entry in inputs.TABLE}
        for entry in inputs.TABLE:  # what is new has its default
            if entry.name not in (inputs.RENDER_DISPLAY, inputs.SMOOTHING, inputs.BLEND_IN_DISPLAY_SPACE, inputs.SPLAT_SIZE):
                current = inputs.get_value(modifier, entry.name)
                is_one_value = entry.default is None or isinstance(entry.default, str | bool)
                assert current == entry.default if is_one_value else np.allclose(current, entry.default), entry.name
    # What was set stays.
    assert value(modules, animated, inputs.RENDER_DISPLAY) == inputs.ELLIPSOIDS
    assert np.isclose(value(modules, animated, inputs.SMOOTHING), 0.004)
    assert value(modules, animated, inputs.BLEND_IN_DISPLAY_SPACE) is True
    assert value(modules, plain, inputs.BLEND_IN_DISPLAY_SPACE) is False
    # So does what was animated: a size from 1 to 2, and "Face Camera" from on to off.
    for frame, size, display in ((1, 1.0, inputs.CAMERA_QUADS), (11, 2.0, inputs.ELLIPSOIDS)):
        bpy.context.scene.frame_set(frame)
        assert np.isclose(value(modules, animated, inputs.SPLAT_SIZE), size)
        assert value(modules, plain, inputs.RENDER_DISPLAY) == display
    assert instance_count(bpy, animated) == instance_count(bpy, plain) == 60
    assert modules.upgrade.upgrade() == [], "nothing is left to do"


def test_an_appended_object_of_the_first_version_is_upgraded(bpy, modules, torus):
    new = modules.object.write(torus(30), "new")
    with bpy.data.libraries.load(str(VERSION_1)) as (there, here):
        here.objects = ["plain"]
    bpy.context.scene.collection.objects.link(here.objects[0])
    modules.upgrade.upgrade()  # what the handler of Append calls, where this Blender has one
    versions = [modules.node_group.version(group) for group in bpy.data.node_groups]
    assert versions == [modules.node_group.VERSION] * len(versions)
    bpy.context.scene.frame_set(1)
    assert value(modules, here.objects[0], modules.inputs.RENDER_DISPLAY) == modules.inputs.CAMERA_QUADS
    assert instance_count(bpy, here.objects[0]) == 60 and instance_count(bpy, new) == 30


def test_a_linked_group_is_left_alone(bpy, modules, torus):
    with bpy.data.libraries.load(str(VERSION_1), link=True) as (there, here):
        here.objects = ["plain"]
    linked = here.objects[0]
    bpy.context.scene.collection.objects.link(linked)
    new = modules.object.write(torus(30), "new")
    assert modules.upgrade.upgrade() == []
    assert sorted(modules.node_group.version(group) for group in bpy.data.node_groups) == [1, modules.node_group.VERSION]
    assert modules.node_group.modifier_of(linked).node_group.library is not None
    assert modules.node_group.modifier_of(new).node_group.library is None
    assert modules.inputs.CROP not in modules.inputs.names(modules.node_group.modifier_of(linked))
    assert instance_count(bpy, linked) == 60 and instance_count(bpy, new) == 30


def test_a_group_of_a_later_version_is_left_alone(bpy, modules, torus):
    object = modules.object.write(torus(30), "new")
    group = modules.node_group.modifier_of(object).node_group
    group["gaussian_splats_version"] = modules.node_group.VERSION + 1
    nodes = len(group.nodes)
    group.nodes.new("NodeFrame")
    assert modules.upgrade.upgrade() == []
    assert len(group.nodes) == nodes + 1


def test_other_node_groups_are_none_of_ours(bpy, modules):
    group = bpy.data.node_groups.new("Gaussian Splats of My Own", "GeometryNodeTree")
    group.interface.new_socket("Splat Size", in_out="INPUT", socket_type="NodeSocketFloat")
    assert modules.node_group.version(group) == 0 and modules.upgrade.upgrade() == []
    assert modules.node_group.version(bpy.data.node_groups.new("Gaussian Splats", "ShaderNodeTree")) == 0


@pytest.mark.parametrize("number", ["two", "", [2], 2.5])
def test_a_version_that_is_no_number_is_none_of_ours(bpy, modules, torus, number):
    object = modules.object.write(torus(30), "new")
    group = modules.node_group.modifier_of(object).node_group
    group["gaussian_splats_version"] = number
    assert modules.node_group.version(group) == 0 and modules.node_group.modifier_of(object) is None
    assert modules.upgrade.upgrade() == []
    modules.node_group.attach(object)
    assert modules.node_group.modifier_of(object).node_group != group


def test_a_file_becomes_native_where_blender_draws_splats(bpy, modules, torus, monkeypatch):
    """The step that Blender 5.3 takes, with a stand-in for its point cloud's type, which no earlier one has."""
    if "FLOAT4" not in bpy.types.Attribute.bl_rna.properties["data_type"].enum_items:
        pytest.skip("this Blender has no 4-vector attributes")
    natives = []
    monkeypatch.setattr(modules.layout, "make_native", lambda cloud: natives.append(cloud.name) or True)
    gaussians = torus(50)
    object = modules.object.write(gaussians, "ring")
    modifier = modules.node_group.modifier_of(object)
    modules.inputs.set_value(modifier, modules.inputs.SPLAT_SIZE, 2.0)
    modules.inputs.set_value(modifier, modules.inputs.TINT, (0.0, 1.0, 1.0, 1.0))
    modules.inputs.set_value(modifier, modules.inputs.TINT_STRENGTH, 1.0)

    assert len(modules.upgrade.upgrade(native=True)) == 2 and natives == ["ring"]
    assert object.data.attributes["radiance:base"].data_type == "FLOAT4"
    assert modules.inputs.RENDER_DISPLAY not in modules.inputs.names(modifier)
    cloud = object.evaluated_get(bpy.context.evaluated_depsgraph_get()).data
    assert len(cloud.points) == 50 and instance_count(bpy, object) == 0
    values = modules.layout.extract(cloud)
    assert np.allclose(values["scale"], 2 * gaussians.scales, atol=1e-6)
    colors = 0.5 + values["radiance:base"][:, :3] / (2 * np.sqrt(np.pi))
    assert np.allclose(colors, gaussians.colors.numpy() * [0, 1, 1], atol=1e-4)
    assert np.allclose(values["radiance:base"][:, 3], gaussians.opacities, atol=1e-6)

    # Opened again by a Blender without native splats it is drawn by the nodes as before.
    assert len(modules.upgrade.upgrade(native=False)) == 2
    assert object.data.attributes["radiance:base"].data_type == "FLOAT_COLOR"
    assert np.isclose(value(modules, object, modules.inputs.SPLAT_SIZE), 2.0) and instance_count(bpy, object) == 50
    assert np.allclose(modules.object.read(object).colors, gaussians.colors, atol=1e-6)


def test_native_splats_that_nothing_edits_keep_their_point_cloud(bpy, modules, torus):
    """A modifier that only passes on what it gets cannot lose what Blender 5.3 knows of a splat point cloud."""
    gaussians = torus(50)
    object = modules.object.write(gaussians, "ring")
    modules.node_group.build(modules.node_group.modifier_of(object).node_group, native=True)
    cloud = object.evaluated_get(bpy.context.evaluated_depsgraph_get()).data
    assert len(cloud.points) == 50 and "splat_emission" not in cloud.attributes
    assert np.allclose(modules.layout.extract(cloud)["scale"], gaussians.scales)
