"""Splats to a coloured mesh: a field of density on a grid, and its surface by Blender's own "Volume to Mesh" (OpenVDB)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import bpy
import numpy as np

from ..generator import glb
from ..generator.errors import InputError, WorkError
from ..generator.files import replacing
from .splat_object.tree import Tree, output

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..generator.density import Field
    from ..generator.gaussians import Gaussians

COLOR = "Color"
MATERIAL = "Gaussian Atlas Mesh"
SUFFIXES = (".glb", ".obj", ".stl")


@dataclass(frozen=True)
class Options:
    """How a mesh is made of splats."""

    resolution: int = 128  # cells along the longest side; more is finer, and rougher where splats are sparse
    threshold: float = 0.6  # opacity at the surface; lower is fatter and has fewer holes
    fill: int = 2  # gaps up to twice as many cells wide count as shut when the inside is filled
    smooth: int = 4  # passes of smoothing
    faces: int = 50_000  # triangles at most, about; 0 for all
    keep: float = 0.01  # parts with a smaller share of the surface are dropped


DEFAULTS = Options()


@dataclass(frozen=True)
class Solid:
    """A body of opacity on a grid, ready for its surface to be drawn; made without bpy, so in any thread."""

    field: Field
    opacity: np.ndarray  # [X, Y, Z] float32


def prepare(gaussians: Gaussians, options: Options = DEFAULTS, check: Callable[[], None] | None = None) -> Solid:
    """The body that splats enclose: their opacity on a grid, holes between them shut, the inside filled.

    Args:
        check: called at every small part of the work; what it raises ends it.

    Raises:
        InputError: nothing is visible, an option is out of range, or no opacity reaches the threshold.
    """
    from ..generator import density

    if not 0 < options.threshold < 1:
        raise InputError(f"threshold must lie between 0 and 1, got {options.threshold:g}")
    field = density.sample(gaussians, options.resolution, check)
    opacity = 1 - np.exp(-field.density)
    solid = opacity > options.threshold
    if not solid.any():
        raise InputError(f"no opacity reaches the threshold {options.threshold:g}: lower it, or the resolution")
    if options.fill:
        opacity = np.maximum(opacity, density.softened(solid | density.enclosed(solid, options.fill, check)))
    return Solid(field, opacity)


def build(solid: Solid, name: str, options: Options = DEFAULTS) -> bpy.types.Mesh:
    """A new mesh with the colour attribute "Color" (scene-linear) and a material that shows it.

    Raises:
        WorkError: Blender made no surface.
    """
    surface = _surface(solid.opacity, solid.field, options.threshold, name)
    try:
        vertices, faces = triangles(surface)
    finally:
        bpy.data.meshes.remove(surface)
    if len(faces) == 0:
        raise WorkError(f"{name}: Blender made no surface at the threshold {options.threshold:g}")
    vertices, faces = _large_parts(vertices, faces, options.keep)
    mesh = _mesh(_smoothed(vertices, faces, options.smooth), faces, name)
    if options.faces and len(mesh.polygons) > options.faces:
        full = mesh
        mesh = _decimated(full, options.faces, name)
        bpy.data.meshes.remove(full)
        mesh.name = name
    _paint(mesh, solid.field)
    mesh.materials.append(material())
    return mesh


def save(object: bpy.types.Object, path: str | Path) -> None:
    """Write a mesh object that is alone in the open file to .glb (Y up), .obj (Y up) or .stl (Z up, without colours).

    Raises:
        InputError: another suffix, or a place that cannot be written.
        WorkError: Blender did not write it.
    """
    path = Path(path)
    suffix = check_suffix(path)
    with replacing(path) as temporary:
        target = str(temporary.resolve())
        try:
            match suffix:
                case ".glb":
                    glb.write(temporary, object.data.name, *triangles(object.data), _linear_colors(object.data))
                case ".obj":
                    bpy.ops.wm.obj_export(filepath=target, export_colors=True, export_materials=False)
                case ".stl":
                    bpy.ops.wm.stl_export(filepath=target)
        except RuntimeError as error:
            raise WorkError(f"cannot write {path.name}: {' '.join(str(error).split())}") from error
        if not temporary.exists():
            raise WorkError(f"cannot write {path.name}: Blender wrote no file")


def check_suffix(path: str | Path) -> str:
    """The lower-case suffix of a mesh file.

    Raises:
        InputError: it is none of SUFFIXES.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(f"{path}: mesh files end in {', '.join(SUFFIXES)}")
    return suffix


def material() -> bpy.types.Material:
    """The material that shows the colour attribute, made on first use."""
    made = bpy.data.materials.get(MATERIAL)
    if made is not None:
        return made
    made = bpy.data.materials.new(MATERIAL)
    if made.node_tree is None:
        made.use_nodes = True  # the default, and deprecated, from Blender 5.0
    made.node_tree.nodes.clear()
    t = Tree(made.node_tree)
    color = t.node("ShaderNodeVertexColor", layer_name=COLOR).outputs["Color"]
    surface = t.node("ShaderNodeBsdfPrincipled", {"Base Color": color, "Roughness": 1.0, "Specular IOR Level": 0.0}).outputs[0]
    t.node("ShaderNodeOutputMaterial", {"Surface": surface})
    t.arrange()
    return made


def _surface(opacity: np.ndarray, field: Field, threshold: float, name: str) -> bpy.types.Mesh:
    """The surface at `threshold` of a grid of values, evaluated in a scene of its own so that the user's stays as it is.

    The values travel as an attribute of a mesh with one vertex a grid point; the Volume Cube node samples them by index.
    """
    grid = bpy.data.meshes.new(name)
    grid.vertices.add(opacity.size)
    grid.attributes.new("value", "FLOAT", "POINT").data.foreach_set("value", np.ascontiguousarray(opacity, np.float32).ravel())
    group = bpy.data.node_groups.new(name, "GeometryNodeTree")
    carrier = bpy.data.objects.new(name, grid)
    scene = bpy.data.scenes.new(name)
    try:
        group.interface.new_socket("Geometry", in_out="INPUT", socket_type="NodeSocketGeometry")
        group.interface.new_socket("Geometry", in_out="OUTPUT", socket_type="NodeSocketGeometry")
        t = Tree(group)
        given = t.node("NodeGroupInput").outputs[0]
        # The cube stands on whole numbers: position is index.
        axes = t.node("ShaderNodeSeparateXYZ", {0: t.node("GeometryNodeInputPosition").outputs[0]}).outputs
        whole = [t.node("FunctionNodeFloatToInt", {0: axis}, rounding_mode="ROUND").outputs[0] for axis in axes]
        stride = [opacity.shape[1] * opacity.shape[2], opacity.shape[2], 1]
        index = None
        for axis, step in zip(whole, stride, strict=True):
            part = t.node("FunctionNodeIntegerMath", {0: axis, 1: step}, operation="MULTIPLY").outputs[0]
            index = part if index is None else t.node("FunctionNodeIntegerMath", {0: index, 1: part}, operation="ADD").outputs[0]
        value = output(t.node("GeometryNodeInputNamedAttribute", {"Name": "value"}, data_type="FLOAT"), "Attribute")
        sampled = output(t.node("GeometryNodeSampleIndex", {"Geometry": given, "Value": value, "Index": index}, data_type="FLOAT"), "Value")
        top = [n - 1.0 for n in opacity.shape]
        sizes = dict(zip(("Resolution X", "Resolution Y", "Resolution Z"), opacity.shape, strict=True))
        cube = t.node("GeometryNodeVolumeCube", {"Density": sampled, "Min": (0.0, 0.0, 0.0), "Max": top, **sizes}).outputs[0]
        surface = t.node("GeometryNodeVolumeToMesh", {"Volume": cube, "Threshold": threshold}).outputs[0]
        t.node("NodeGroupOutput", {0: surface})
        carrier.modifiers.new(name, "NODES").node_group = group
        scene.collection.objects.link(carrier)
        layer = scene.view_layers[0]
        layer.update()
        mesh = bpy.data.meshes.new_from_object(carrier.evaluated_get(layer.depsgraph), depsgraph=layer.depsgraph)
    finally:
        bpy.data.scenes.remove(scene)
        bpy.data.objects.remove(carrier)
        bpy.data.meshes.remove(grid)
        bpy.data.node_groups.remove(group)
    points = np.empty(3 * len(mesh.vertices), np.float32)
    mesh.vertices.foreach_get("co", points)
    mesh.vertices.foreach_set("co", (points.reshape(-1, 3) * field.step + field.origin).astype(np.float32).ravel())
    return mesh


def triangles(mesh: bpy.types.Mesh) -> tuple[np.ndarray, np.ndarray]:
    """Vertices [V, 3] and triangles [F, 3] of a mesh."""
    mesh.calc_loop_triangles()
    vertices = np.empty(3 * len(mesh.vertices), np.float32)
    mesh.vertices.foreach_get("co", vertices)
    faces = np.empty(3 * len(mesh.loop_triangles), np.int32)
    mesh.loop_triangles.foreach_get("vertices", faces)
    return vertices.reshape(-1, 3).astype(np.float64), faces.reshape(-1, 3)


def parts(count: int, faces: np.ndarray) -> np.ndarray:
    """For each of `count` vertices the lowest vertex that its faces [F, 3] connect it with."""
    label = np.arange(count)
    edges = np.concatenate([faces[:, :2], faces[:, 1:]])
    while True:
        before = label.copy()
        low = np.minimum(label[edges[:, 0]], label[edges[:, 1]])
        # The label's own label joins too: the number of rounds grows with the logarithm of the longest path.
        for end in (0, 1):
            np.minimum.at(label, before[edges[:, end]], low)
            np.minimum.at(label, edges[:, end], low)
        label = label[label]
        if (label == before).all():
            return label


def _large_parts(vertices: np.ndarray, faces: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Without the connected parts that have less than a share of the surface."""
    corners = vertices[faces]
    areas = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1)
    label = parts(len(vertices), faces)[faces[:, 0]]
    total = np.bincount(label, weights=areas, minlength=len(vertices))
    faces = faces[total[label] >= share * areas.sum()]
    used, packed = np.unique(faces, return_inverse=True)
    return vertices[used], packed.reshape(-1, 3)


def _smoothed(vertices: np.ndarray, faces: np.ndarray, passes: int) -> np.ndarray:
    """Vertices moved towards their neighbours and back, which smooths without shrinking (Taubin 1995)."""
    edges = np.unique(np.sort(np.concatenate([faces[:, :2], faces[:, 1:], faces[:, ::2]]), axis=1), axis=0)
    degree = np.bincount(edges.ravel(), minlength=len(vertices))[:, None]
    for step in (0.5, -0.53) * passes:
        total = np.zeros_like(vertices)
        for axis in range(3):
            total[:, axis] += np.bincount(edges[:, 0], vertices[edges[:, 1], axis], len(vertices))
            total[:, axis] += np.bincount(edges[:, 1], vertices[edges[:, 0], axis], len(vertices))
        vertices = vertices + step * (total / np.maximum(degree, 1) - vertices)
    return vertices


def _mesh(vertices: np.ndarray, faces: np.ndarray, name: str) -> bpy.types.Mesh:
    mesh = bpy.data.meshes.new(name)
    mesh.from_pydata(vertices, [], faces, shade_flat=False)
    mesh.update()
    return mesh


def _decimated(mesh: bpy.types.Mesh, faces: int, name: str) -> bpy.types.Mesh:
    """A copy with about that many triangles, by Blender's Decimate modifier in a scene of its own."""
    carrier = bpy.data.objects.new(name, mesh)
    scene = bpy.data.scenes.new(name)
    try:
        modifier = carrier.modifiers.new(name, "DECIMATE")
        modifier.ratio = faces / len(mesh.polygons)
        scene.collection.objects.link(carrier)
        layer = scene.view_layers[0]
        layer.update()
        return bpy.data.meshes.new_from_object(carrier.evaluated_get(layer.depsgraph), depsgraph=layer.depsgraph)
    finally:
        bpy.data.scenes.remove(scene)
        bpy.data.objects.remove(carrier)


def _paint(mesh: bpy.types.Mesh, field: Field) -> None:
    """The colour attribute, scene-linear as Blender and glTF keep it."""
    vertices, _ = triangles(mesh)
    display = field.colors_at(vertices)
    linear = np.where(display <= 0.04045, display / 12.92, ((display + 0.055) / 1.055) ** 2.4)
    colors = np.concatenate([linear, np.ones((len(linear), 1))], axis=1).astype(np.float32)
    attribute = mesh.color_attributes.new(COLOR, "FLOAT_COLOR", "POINT")
    attribute.data.foreach_set("color", colors.ravel())
    mesh.color_attributes.active_color = attribute
    mesh.color_attributes.render_color_index = mesh.color_attributes.find(COLOR)


def _linear_colors(mesh: bpy.types.Mesh) -> np.ndarray:
    """The colour attribute [V, 3], scene-linear."""
    colors = np.empty(4 * len(mesh.vertices), np.float32)
    mesh.color_attributes[COLOR].data.foreach_get("color", colors)
    return colors.reshape(-1, 4)[:, :3]
