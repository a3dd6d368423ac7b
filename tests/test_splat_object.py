"""Gaussians to Blender objects and back."""

from __future__ import annotations

import numpy as np
import pytest


@pytest.fixture
def splat_object(extension):
    return extension("blender_addon.splat_object")


@pytest.fixture
def layout(extension):
    return extension("blender_addon.splat_object.layout")


def assert_close(a, b, atol=1e-5):
    for name in ("means", "quaternions", "scales", "opacities", "colors"):
        assert np.allclose(getattr(a, name), getattr(b, name), atol=atol), name


def test_round_trip(bpy, splat_object, torus):
    gaussians = torus(500)
    object = splat_object.write(gaussians, "ring")
    assert object.type == "POINTCLOUD" and object.name == "ring" and len(object.data.points) == 500
    assert splat_object.is_splats(object)
    assert_close(splat_object.read(object), gaussians, atol=1e-6)


def test_attributes_have_the_names_and_meanings_of_native_splats(bpy, splat_object, torus):
    gaussians = torus(7)
    data = splat_object.write(gaussians).data
    assert data.attributes["rotation"].data_type == "QUATERNION"
    assert {name: data.attributes[name].domain for name in ("position", "scale", "rotation", "radiance:base")} == dict.fromkeys(
        ("position", "scale", "rotation", "radiance:base"), "POINT"
    )
    radiance = np.empty(7 * 4, np.float32)
    data.attributes["radiance:base"].data.foreach_get("color" if not splat_object.native() else "vector", radiance)
    radiance = radiance.reshape(7, 4)
    # rgb is the raw coefficient of the spherical harmonic of degree 0, 1 / (2 sqrt(pi)); w is the opacity itself.
    assert np.allclose(0.5 + radiance[:, :3] / (2 * np.sqrt(np.pi)), gaussians.colors, atol=1e-6)
    assert np.allclose(radiance[:, 3], gaussians.opacities)


def test_survives_saving_and_opening(bpy, splat_object, torus, tmp_path):
    gaussians = torus(300)
    object = splat_object.write(gaussians, "ring")
    object.gaussian_atlas.prompt = "a ring"
    bpy.ops.wm.save_as_mainfile(filepath=str(tmp_path / "ring.blend"))
    bpy.ops.wm.open_mainfile(filepath=str(tmp_path / "ring.blend"))
    object = bpy.data.objects["ring"]
    assert object.gaussian_atlas.prompt == "a ring"
    assert_close(splat_object.read(object), gaussians, atol=1e-6)


def test_writing_leaves_no_helpers_and_touches_no_selection(bpy, splat_object, torus):
    mesh = bpy.data.objects.new("cube", bpy.data.meshes.new("cube"))
    bpy.context.scene.collection.objects.link(mesh)
    bpy.context.view_layer.objects.active = mesh
    mesh.select_set(True)
    bpy.ops.object.mode_set(mode="EDIT")
    before = {name: len(getattr(bpy.data, name)) for name in ("meshes", "scenes", "node_groups")}
    splat_object.write(torus(50), "one")
    splat_object.write(torus(50), "two")
    assert bpy.context.mode == "EDIT_MESH"
    assert bpy.context.view_layer.objects.active == mesh and [o.name for o in bpy.context.view_layer.objects.selected] == ["cube"]
    assert len(bpy.data.meshes) == before["meshes"] and len(bpy.data.scenes) == before["scenes"]
    # All objects share one group and its materials.
    assert len(bpy.data.node_groups) - before["node_groups"] <= 1
    assert len(bpy.data.materials) <= 3


def test_goes_into_the_collection_that_is_asked_for(bpy, splat_object, torus):
    collection = bpy.data.collections.new("splats")
    bpy.context.scene.collection.children.link(collection)
    object = splat_object.write(torus(5), "ring", collection)
    assert list(collection.objects) == [object] and object.name not in bpy.context.scene.collection.objects


def instances_of(bpy, object) -> np.ndarray:
    """World matrices [N, 4, 4] of an object's instances."""
    graph = bpy.context.evaluated_depsgraph_get()
    return np.array([np.array(i.matrix_world) for i in graph.object_instances if i.is_instance and i.parent.original == object])


def test_each_visible_splat_is_one_ellipsoid_of_the_right_place_and_size(bpy, splat_object, extension, torus):
    if splat_object.native():
        pytest.skip("this Blender draws splats itself")
    import torch

    gaussians = torus(40)
    gaussians = gaussians.replace(opacities=torch.linspace(0, 1, 40))
    object = splat_object.write(gaussians)
    object.location = (1, 2, 3)
    bpy.context.view_layer.update()
    visible = gaussians[gaussians.opacities > 1 / 255]
    matrices = instances_of(bpy, object)
    assert len(matrices) == len(visible) == 39
    order, expected = np.lexsort(matrices[:, :3, 3].T), np.lexsort(visible.means.numpy().T)
    assert np.allclose(matrices[order, :3, 3], visible.means.numpy()[expected] + [1, 2, 3], atol=1e-5)
    # The instance's axes times their transpose is k^2 times the covariance: k standard deviations to alpha = 1/255.
    square = matrices[order, :3, :3] @ matrices[order, :3, :3].transpose(0, 2, 1)
    k2 = 2 * np.log(255 * visible.opacities.numpy()[expected])
    assert np.allclose(square, k2[:, None, None] * visible.covariances().numpy()[expected], atol=1e-6)


@pytest.mark.parametrize("shear", [False, True])
def test_world_frame_moves_means_and_covariances(bpy, splat_object, torus, shear):
    from mathutils import Matrix

    gaussians = torus(200)
    object = splat_object.write(gaussians)
    uneven = Matrix.Diagonal((2.0, 0.5, -1.0, 1.0)) if shear else Matrix.Diagonal((1.5, 1.5, 1.5, 1.0))
    object.matrix_world = Matrix.Translation((1, -2, 0.5)) @ Matrix.Rotation(0.9, 4, (1, 2, 3)) @ uneven
    bpy.context.view_layer.update()
    world = splat_object.read(object, world=True)
    matrix = np.array(object.matrix_world)
    linear = matrix[:3, :3]
    assert np.allclose(world.means, gaussians.means.numpy() @ linear.T + matrix[:3, 3], atol=1e-5)
    assert np.allclose(world.covariances(), linear @ gaussians.covariances().numpy() @ linear.T, atol=1e-6)
    assert np.allclose(np.linalg.norm(world.quaternions, axis=1), 1, atol=1e-5)
    if not shear:
        assert np.allclose(world.scales, 1.5 * gaussians.scales, rtol=1e-4), "axes keep their order"


def test_empty_and_broken_gaussians_are_refused(bpy, splat_object, extension, torus):
    InputError = extension("generator.errors").InputError
    with pytest.raises(InputError, match="there are no Gaussians"):
        splat_object.write(torus(5)[:0], "ring")
    broken = torus(5)
    broken.means[2, 0] = float("nan")
    with pytest.raises(InputError, match="1 of 5"):
        splat_object.write(broken, "ring")
    assert not bpy.data.objects and not bpy.data.pointclouds


def test_other_objects_are_refused(bpy, splat_object, extension):
    InputError = extension("generator.errors").InputError
    empty = bpy.data.objects.new("empty", None)
    cloud = bpy.data.objects.new("cloud", bpy.data.pointclouds.new("cloud"))
    assert not splat_object.is_splats(empty) and not splat_object.is_splats(cloud) and not splat_object.is_splats(None)
    for other in (empty, None, cloud):
        with pytest.raises(InputError):
            splat_object.read(other)


def test_attribute_of_another_type_is_named(bpy, splat_object, extension, torus):
    object = splat_object.write(torus(5), "ring")
    object.data.attributes.remove(object.data.attributes["scale"])
    object.data.attributes.new("scale", "FLOAT", "POINT")
    with pytest.raises(extension("generator.errors").InputError, match="'scale'.*FLOAT"):
        splat_object.read(object)
