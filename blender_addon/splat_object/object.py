"""Gaussians to a Blender object and back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import bpy
import numpy as np

from ...generator.errors import InputError
from . import inputs, layout, node_group

# Every redraw goes through all instances, 1 s for a million of them; points are one thing to draw.
POINTS_ABOVE = 200_000

if TYPE_CHECKING:
    from ...generator.gaussians import Gaussians


def write(gaussians: Gaussians, name: str = "Gaussians", collection: bpy.types.Collection | None = None) -> bpy.types.Object:
    """A new splat object of these Gaussians, linked to a collection (the scene's own by default).

    Selection, mode and active object stay as they are. On Blender 5.3 and later the object is a native splat point
    cloud; before, geometry nodes and a material draw the same attributes. Either way a modifier holds the inputs that
    `inputs.TABLE` lists. More than POINTS_ABOVE splats are points in the viewport to begin with.

    Raises:
        InputError: there are no Gaussians, or a number is not finite.
    """
    values, count = to_values(gaussians, name), len(gaussians)
    cloud = _new_cloud(name, count)
    layout.fill(cloud, values)
    object = bpy.data.objects.new(name, cloud)
    (collection or bpy.context.scene.collection).objects.link(object)
    if layout.native():
        layout.make_native(cloud)
    node_group.attach(object)
    if count > POINTS_ABOVE:
        node_group.set_input(object, inputs.VIEWPORT_DISPLAY, inputs.POINTS)
    return object


def to_values(gaussians: Gaussians, name: str) -> dict[str, np.ndarray]:
    """Gaussians as the attributes of the layout, each [N, width]; `name` is what messages call them.

    Raises:
        InputError: there are no Gaussians, or a number is not finite.
    """
    if len(gaussians) == 0:
        raise InputError(f"{name}: there are no Gaussians to make an object of")
    host = gaussians.to("cpu")
    values = {
        layout.POSITION: host.means.numpy(),
        layout.SCALE: host.scales.numpy(),
        layout.ROTATION: host.quaternions.numpy(),
        layout.RADIANCE: np.concatenate([(host.colors.numpy() - 0.5) / layout.SH_C0, host.opacities.numpy()[:, None]], axis=1),
    }
    if not all(np.isfinite(value).all() for value in values.values()):
        raise InputError(f"{name}: {int((~gaussians.finite()).sum())} of {len(gaussians)} Gaussians hold numbers that are not finite")
    return values


def from_values(values: dict[str, np.ndarray]) -> Gaussians:
    """The inverse of `to_values`, of float32 arrays."""
    import torch

    from ...generator.gaussians import Gaussians

    tensors = {name: torch.from_numpy(value) for name, value in values.items()}
    return Gaussians(
        means=tensors[layout.POSITION],
        quaternions=tensors[layout.ROTATION],
        scales=tensors[layout.SCALE],
        opacities=tensors[layout.RADIANCE][:, 3].contiguous(),
        colors=0.5 + layout.SH_C0 * tensors[layout.RADIANCE][:, :3],
    )


def read(object: bpy.types.Object, world: bool = False) -> Gaussians:
    """The Gaussians of a splat object, float32 on the CPU.

    Args:
        world: give them in the world frame instead of the object's own; the object may be rotated, sheared or scaled
            unevenly.

    Raises:
        InputError: the object is not a splat object.
    """
    if object is None or object.type != "POINTCLOUD":
        raise InputError(f"{object.name if object else 'nothing'!r} is not a splat object: select one that was generated or imported")
    gaussians = from_values(layout.extract(object.data))
    return transformed(gaussians, np.array(object.matrix_world, dtype=np.float64)) if world else gaussians


def transformed(gaussians: Gaussians, matrix: np.ndarray) -> Gaussians:
    """Gaussians moved by an affine matrix [4, 4]: means by A x + b, covariances by A S A^T.

    A Gaussian's half covariance R diag(s) becomes A R diag(s) = U diag(s') V^T, so U holds the new axes.
    """
    import torch

    from ...generator.gaussians import matrices_to_quaternions, quaternions_to_matrices

    affine = torch.from_numpy(matrix)
    linear, offset = affine[:3, :3], affine[:3, 3]
    if torch.equal(affine, torch.eye(4, dtype=affine.dtype)):
        return gaussians
    means = gaussians.means.double() @ linear.T + offset
    half = linear @ (quaternions_to_matrices(gaussians.quaternions.double()) * gaussians.scales.double()[:, None, :])
    # Columns that stay orthogonal keep their order and so their meaning; a shear needs the decomposition.
    scales = half.norm(dim=1)
    gram = half.transpose(1, 2) @ half
    product = scales[:, :, None] * scales[:, None, :]
    sheared = ((gram - torch.diag_embed(scales**2)).abs() > 1e-6 * product).any(dim=(1, 2)) | (scales <= 0).any(1)
    axes = half / scales.clamp_min(torch.finfo(scales.dtype).tiny)[:, None, :]
    if sheared.any():
        left, singular, _ = torch.linalg.svd(half[sheared])
        axes[sheared], scales[sheared] = left, singular
    axes = axes * torch.where(torch.linalg.det(axes) < 0, -1.0, 1.0)[:, None, None]
    return gaussians.replace(
        means=means.to(gaussians.means.dtype),
        quaternions=matrices_to_quaternions(axes).to(gaussians.means.dtype),
        scales=scales.to(gaussians.means.dtype),
    )


def _new_cloud(name: str, count: int) -> bpy.types.PointCloud:
    """An empty point cloud of a size."""
    if hasattr(bpy.types.PointCloud, "resize"):
        cloud = bpy.data.pointclouds.new(name)
        cloud.resize(count)
        return cloud
    return _cloud_of_mesh(name, count)


def _cloud_of_mesh(name: str, count: int) -> bpy.types.PointCloud:
    """Blender 4.5 and 5.0 cannot size a point cloud: copy the one that "Mesh to Points" evaluates to.

    A scene of its own keeps the user's selection, mode and dependency graph out of it, as the convert operator would not.
    """
    mesh = bpy.data.meshes.new(name)
    mesh.vertices.add(count)
    group = bpy.data.node_groups.new(name, "GeometryNodeTree")
    carrier = bpy.data.objects.new(name, mesh)
    scene = bpy.data.scenes.new(name)
    try:
        group.interface.new_socket("Geometry", in_out="INPUT", socket_type="NodeSocketGeometry")
        group.interface.new_socket("Geometry", in_out="OUTPUT", socket_type="NodeSocketGeometry")
        start, points, end = (group.nodes.new(k) for k in ("NodeGroupInput", "GeometryNodeMeshToPoints", "NodeGroupOutput"))
        group.links.new(start.outputs[0], points.inputs[0])
        group.links.new(points.outputs[0], end.inputs[0])
        carrier.modifiers.new(name, "NODES").node_group = group
        scene.collection.objects.link(carrier)
        layer = scene.view_layers[0]
        layer.update()
        geometry = carrier.evaluated_get(layer.depsgraph).evaluated_geometry()  # owns its point cloud: keep it while copying
        cloud = geometry.pointcloud.copy()
    finally:
        bpy.data.scenes.remove(scene)
        bpy.data.objects.remove(carrier)
        bpy.data.meshes.remove(mesh)
        bpy.data.node_groups.remove(group)
    cloud.name = name
    radius = cloud.attributes.get("radius")
    if radius is not None:
        cloud.attributes.remove(radius)
    return cloud
