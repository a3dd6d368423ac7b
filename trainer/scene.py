"""One object in a Blender scene: import, upright and to size, matt materials, even light, renders from given cameras.

Needs Blender as a module (bpy). A process renders one object after another; `trainer.views` keeps it in a process of
its own, since a broken mesh can take Blender down with it.
"""

from __future__ import annotations

import contextlib
import math
from pathlib import Path

import numpy as np

from generator.errors import InputError, WorkError
from generator.render.cameras import Cameras

# Light: a world whose radiance is AMBIENT + KEY * cos(angle to KEY_DIRECTION). A convex matt white object shows between
# 0.83 (turned away) and 0.98 (turned to the key) in display sRGB, middle grey stays within 0.45 to 0.53.
AMBIENT = 0.86
KEY = 0.22
KEY_DIRECTION = (-0.45, -0.55, 0.70)
# Uniformly transparent materials (glass) keep at least this opacity: thinner ones leave nothing to fit.
MIN_OPACITY = 0.25
# Vertices above this opacity hide light; those below are panes.
WHOLE_OPACITY = 0.6
# Surfaces below this opacity (holes cut into leaves) do not show in depth and normals.
PASS_OPACITY = 0.2
# Edges sharper than this are not smoothed over.
SMOOTH_ANGLE = math.radians(35)
MAX_FACES = 5_000_000
# Matt colours that are given as plain numbers reflect at least this much light: black paint still shows its shape.
MIN_ALBEDO = 0.015
# How far apart faces on the same spot are moved, in object units; a pixel of a 128 px view is a hundred times wider.
COINCIDENT_GAP = 1e-4
_MAX_COPLANAR = 4000

# Object frame from a Y-up mesh: X stays, Y becomes up (Z), the front moves from +Z to -Y.
_Y_UP = np.array([[1.0, 0.0, 0.0], [0.0, 0.0, -1.0], [0.0, 1.0, 0.0]])
# Blender's cameras look along -Z with +Y up, OpenCV's along +Z with +Y down.
_OPENCV = np.diag([1.0, -1.0, -1.0, 1.0])


def load_object(path: Path, *, up: str = "y", rotation: np.ndarray | None = None, size: tuple[float, float, float] | None = None) -> float:
    """Empties Blender and fills it with one mesh in the object frame: Z up, front to -Y, centred, longest side 1.

    Args:
        path: an OBJ, GLB, GLTF or PLY file.
        up: the mesh's own up axis, "y" or "z".
        rotation: 3 x 3, turns the mesh in its own axes first.
        size: width (X), depth (Y) and height (Z) to stretch the bounding box to, in any unit; proportions as they are if None.

    Returns:
        Object lengths from the centre to the farthest vertex.

    Raises:
        InputError: the file cannot be imported, or holds no faces.
    """
    import bpy

    bpy.ops.wm.read_factory_settings(use_empty=True)
    suffix = path.suffix.lower()
    try:
        if suffix == ".obj":
            bpy.ops.wm.obj_import(filepath=str(path), forward_axis="Y", up_axis="Z", use_split_objects=False, validate_meshes=True)
        elif suffix in (".glb", ".gltf"):
            bpy.ops.import_scene.gltf(filepath=str(path))
        elif suffix == ".ply":
            bpy.ops.wm.ply_import(filepath=str(path), forward_axis="Y", up_axis="Z", import_colors="SRGB")
        else:
            raise InputError(f"{path.name}: Blender imports .obj, .glb, .gltf and .ply here, not {suffix or 'a file without suffix'}")
    except RuntimeError as error:
        raise InputError(f"{path.name}: Blender cannot import it ({' '.join(str(error).split())[:200]})") from error
    basis = _Y_UP if up == "y" else np.eye(3)
    if suffix in (".glb", ".gltf"):
        # The glTF importer has already turned Y up into Z up.
        basis = basis @ _Y_UP.T
    if rotation is not None:
        basis = basis @ np.asarray(rotation, dtype=np.float64)
    meshes = _bake_meshes(basis)
    _fit_box(path, meshes, size)
    _part_coincident(meshes)
    for mesh in meshes:
        _smooth(mesh)
        _matt_materials(mesh, display_colours=suffix == ".obj")
    return max(float(np.linalg.norm(_corners(mesh), axis=1).max()) for mesh in meshes)


def _bake_meshes(basis: np.ndarray) -> list:
    """Replaces the scene's objects by plain meshes with every transform and modifier applied; returns the meshes."""
    import bpy
    from mathutils import Matrix

    turn = Matrix(basis.tolist()).to_4x4()
    depsgraph = bpy.context.evaluated_depsgraph_get()
    baked = []
    for instance in depsgraph.object_instances:
        source = instance.object
        if source.type != "MESH" or not instance.show_self:
            continue
        mesh = bpy.data.meshes.new_from_object(source)
        mesh.transform(turn @ instance.matrix_world)
        baked.append(mesh)
    for old in list(bpy.data.objects):
        bpy.data.objects.remove(old)
    meshes = []
    for mesh in baked:
        if len(mesh.polygons) == 0:
            bpy.data.meshes.remove(mesh)
            continue
        bpy.context.scene.collection.objects.link(bpy.data.objects.new("model", mesh))
        meshes.append(mesh)
    return meshes


def _fit_box(path: Path, meshes: list, size: tuple[float, float, float] | None) -> None:
    from mathutils import Matrix

    if not meshes:
        raise InputError(f"{path.name}: no faces to render")
    if sum(len(mesh.polygons) for mesh in meshes) > MAX_FACES:
        raise InputError(f"{path.name}: more than {MAX_FACES:,} faces: simplify the mesh first")
    low, high = np.full(3, np.inf), np.full(3, -np.inf)
    for mesh in meshes:
        used = _corners(mesh)
        low, high = np.minimum(low, used.min(0)), np.maximum(high, used.max(0))
    extent = high - low
    if not np.isfinite(extent).all() or extent.max() <= 0:
        raise InputError(f"{path.name}: the mesh has no extent or holds numbers that are not finite")
    if size is None:
        scale = np.full(3, 1 / extent.max())
    else:
        # A flat side has nothing to stretch.
        stretched = np.where(extent > 1e-9 * extent.max(), np.asarray(size, dtype=np.float64), 0)
        scale = np.where(stretched > 0, stretched / np.maximum(extent, 1e-30), 1) / stretched.max()
    matrix = Matrix(np.diag([*scale, 1.0]).tolist()) @ Matrix.Translation((-(low + high) / 2).tolist())
    for mesh in meshes:
        mesh.transform(matrix)


def _part_coincident(meshes: list) -> None:
    """Lifts faces that lie on another face by COINCIDENT_GAP along their normal.

    Everything is rendered double-sided, and which of two coincident faces a ray meets first is chance. Of two that look
    opposite ways each must show on its own side, as in viewers that cull back faces; of two that look the same way but
    differ in material the smaller is a decal and belongs on top.
    """
    parts: list[tuple[np.ndarray, ...]] = []
    for mesh in meshes:
        count = len(mesh.polygons)
        corner = _foreach(mesh.vertices, "co", 3)[_foreach(mesh.loops, "vertex_index", dtype=np.int32)]
        starts = _foreach(mesh.polygons, "loop_start", dtype=np.int32)
        normal = _foreach(mesh.polygons, "normal", 3)
        # Materials count apart from mesh to mesh.
        material = _foreach(mesh.polygons, "material_index", dtype=np.int32) + 10_000 * len(parts)
        lows, highs = np.minimum.reduceat(corner, starts), np.maximum.reduceat(corner, starts)
        parts.append((normal, (normal * corner[starts]).sum(1), lows, highs, material, np.full(count, len(parts))))
    normal, plane, lows, highs, material, owner = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    lifted = coincident_faces(normal, plane, lows, highs, material)
    for number, mesh in enumerate(meshes):
        mask = lifted[owner == number]
        if not mask.any():
            continue
        # Lifted faces get vertices of their own.
        totals = _foreach(mesh.polygons, "loop_total", dtype=np.int32)
        corners = _foreach(mesh.loops, "vertex_index", dtype=np.int32)
        points = _foreach(mesh.vertices, "co", 3)
        loops = np.flatnonzero(np.repeat(mask, totals))
        shift = np.repeat(parts[number][0][mask], totals[mask], axis=0) * COINCIDENT_GAP
        fresh = points[corners[loops]] + shift
        corners[loops] = len(points) + np.arange(len(loops))
        mesh.vertices.add(len(loops))
        mesh.vertices.foreach_set("co", np.concatenate([points, fresh]).ravel())
        mesh.loops.foreach_set("vertex_index", corners)
        mesh.update(calc_edges=True)


def _corners(mesh) -> np.ndarray:
    """The vertices [N, 3] that faces use: stray ones would move the centre."""
    return _foreach(mesh.vertices, "co", 3)[np.unique(_foreach(mesh.loops, "vertex_index", dtype=np.int32))]


def _foreach(collection, name: str, width: int = 1, dtype: type = np.float32) -> np.ndarray:
    """One property of a Blender collection as an array [N] or [N, width]."""
    values: np.ndarray = np.empty(len(collection) * width, dtype=dtype)
    collection.foreach_get(name, values)
    return values.reshape(-1, width) if width > 1 else values


def coincident_faces(normals: np.ndarray, planes: np.ndarray, lows: np.ndarray, highs: np.ndarray, materials: np.ndarray) -> np.ndarray:
    """Mask [F] of faces to lift: they share plane and place with a face that looks the opposite way, or with a larger one
    of another material that looks the same way. Places are compared by bounding boxes; planes with very many faces are
    left as they are.

    Args:
        normals: [F, 3] unit normals.
        planes: [F] signed distances of the faces' planes to the origin, along the normals.
        lows, highs: [F, 3] bounding boxes.
        materials: [F] integers.
    """
    lifted = np.zeros(len(normals), dtype=bool)
    axis = np.abs(normals).argmax(1)
    side = np.sign(normals[np.arange(len(normals)), axis]).astype(np.int64)
    keys = np.round(np.column_stack([normals * 500, planes / 2e-4]) * side[:, None]).astype(np.int64)
    _, group = np.unique(keys, axis=0, return_inverse=True)
    group = group.ravel()
    # Only planes that hold two kinds of faces are looked at, face by face.
    kind = np.unique(np.column_stack([side, materials]), axis=0, return_inverse=True)[1].ravel()
    first = np.full(group.max(initial=-1) + 1, -1)
    first[group] = kind
    mixed = np.bincount(group, kind != first[group]) > 0
    order = np.flatnonzero(mixed[group] & (side != 0))
    order = order[np.argsort(group[order], kind="stable")]
    for faces in np.split(order, np.flatnonzero(np.diff(group[order])) + 1) if len(order) else []:
        if len(faces) > _MAX_COPLANAR:
            continue
        axes = [a for a in range(3) if a != axis[faces[0]]]
        low, high = lows[faces][:, axes], highs[faces][:, axes]
        # Boxes that only touch do not overlap.
        overlap = (np.minimum(high[:, None], high) - np.maximum(low[:, None], low) > 1e-4).all(-1)
        opposite = side[faces][:, None] != side[faces]
        other = materials[faces][:, None] != materials[faces]
        area = (high - low).prod(1)
        rank = np.lexsort((np.arange(len(faces)), -area)).argsort()
        lifted[faces] = (overlap & (opposite | (other & (rank[:, None] > rank)))).any(1)
    return lifted


def _smooth(mesh) -> None:
    """Normals from the faces: the ones that files carry are often turned inside out, which renders black."""
    if "custom_normal" in mesh.attributes:
        mesh.attributes.remove(mesh.attributes["custom_normal"])
    mesh.shade_smooth()
    mesh.set_sharp_from_angle(angle=SMOOTH_ANGLE)


def _matt_materials(mesh, display_colours: bool) -> None:
    """Turns every material into matt base colour (plus emission) and opacity; the rest of a material depends on the view."""
    import bpy

    if not any(mesh.materials):
        mesh.materials.clear()
        mesh.materials.append(_plain_material(mesh))
        return
    for slot, material in enumerate(mesh.materials):
        if material is None:
            mesh.materials[slot] = _plain_material(mesh)
        elif not material.get("matt"):
            material["matt"] = True
            for node in [n for n in material.node_tree.nodes if n.bl_idname == "ShaderNodeTexImage"]:
                if node.image is None or 0 in node.image.size[:]:
                    material.node_tree.nodes.remove(node)
            for node in [n for n in material.node_tree.nodes if n.bl_idname == "ShaderNodeBsdfPrincipled"]:
                _matt(material.node_tree, node, display_colours)
    bpy.context.view_layer.update()


def _plain_material(mesh):
    """A light grey, or the mesh's own vertex colours with their opacity."""
    import bpy

    material = bpy.data.materials.new("plain")
    material["matt"] = True
    tree = material.node_tree
    tree.nodes.clear()
    diffuse = tree.nodes.new("ShaderNodeBsdfDiffuse")
    diffuse.inputs["Color"].default_value = (0.6, 0.6, 0.6, 1)
    output = tree.nodes.new("ShaderNodeOutputMaterial")
    shader = diffuse.outputs[0]
    colours = mesh.color_attributes.active_color
    if colours is not None:
        attribute = tree.nodes.new("ShaderNodeVertexColor")
        attribute.layer_name = colours.name
        tree.links.new(attribute.outputs["Color"], diffuse.inputs["Color"])
        opacities = _foreach(colours.data, "color", 4)[:, 3]
        if opacities.size and opacities.min() < 1:
            mix, clear = tree.nodes.new("ShaderNodeMixShader"), tree.nodes.new("ShaderNodeBsdfTransparent")
            # Panes hide nothing from light, as those of uniform materials; whole surfaces do.
            whole, path, seen = (tree.nodes.new(f"ShaderNode{kind}") for kind in ("Math", "LightPath", "Math"))
            whole.operation, seen.operation = "GREATER_THAN", "MAXIMUM"
            whole.inputs[1].default_value = WHOLE_OPACITY
            opacity = tree.nodes.new("ShaderNodeMath")
            opacity.operation = "MULTIPLY"
            tree.links.new(attribute.outputs["Alpha"], whole.inputs[0])
            tree.links.new(whole.outputs[0], seen.inputs[0])
            tree.links.new(path.outputs["Is Camera Ray"], seen.inputs[1])
            tree.links.new(attribute.outputs["Alpha"], opacity.inputs[0])
            tree.links.new(seen.outputs[0], opacity.inputs[1])
            tree.links.new(opacity.outputs[0], mix.inputs["Fac"])
            tree.links.new(clear.outputs[0], mix.inputs[1])
            tree.links.new(shader, mix.inputs[2])
            shader = mix.outputs[0]
    tree.links.new(shader, output.inputs["Surface"])
    return material


def _matt(tree, principled, display_colours: bool) -> None:
    """Swaps one Principled BSDF for Diffuse + Emission mixed with Transparent, keeping what feeds it."""
    nodes, links = tree.nodes, tree.links

    def feed(name: str, target) -> bool:
        socket = principled.inputs[name]
        if socket.is_linked:
            links.new(socket.links[0].from_socket, target)
        else:
            target.default_value = socket.default_value
        return socket.is_linked

    surface = nodes.new("ShaderNodeBsdfDiffuse")
    textured = feed("Base Color", surface.inputs["Color"])
    if display_colours and not textured:
        # MTL colours were picked on a screen: display values, where Blender takes them for linear light.
        colour = surface.inputs["Color"].default_value
        colour[:3] = np.maximum(srgb_to_linear(np.clip(colour[:3], 0, 1)), MIN_ALBEDO).tolist()
    shader = surface.outputs[0]
    emission = principled.inputs["Emission Color"]
    strength = principled.inputs["Emission Strength"]
    if emission.is_linked or (strength.default_value > 0 and max(emission.default_value[:3]) > 0):
        glow, add = nodes.new("ShaderNodeEmission"), nodes.new("ShaderNodeAddShader")
        feed("Emission Color", glow.inputs["Color"])
        glow.inputs["Strength"].default_value = min(strength.default_value, 1.0)
        links.new(shader, add.inputs[0])
        links.new(glow.outputs[0], add.inputs[1])
        shader = add.outputs[0]
    mix, clear = nodes.new("ShaderNodeMixShader"), nodes.new("ShaderNodeBsdfTransparent")
    opacity = mix.inputs["Fac"]
    if not feed("Alpha", opacity):
        opacity.default_value = min(max(opacity.default_value, MIN_OPACITY), 1.0)
        image = principled.inputs["Base Color"].links[0].from_node if textured else None
        if display_colours and image is not None and image.bl_idname == "ShaderNodeTexImage" and image.image.depth in (32, 64):
            # OBJ has no word for it, but programs that write OBJ mean a texture's own alpha: leaves, nets, decals.
            product = nodes.new("ShaderNodeMath")
            product.operation = "MULTIPLY"
            product.inputs[1].default_value = opacity.default_value
            links.new(image.outputs["Alpha"], product.inputs[0])
            links.new(product.outputs[0], opacity)
    if not opacity.is_linked and opacity.default_value < 1:
        # Panes hide nothing from light: grey boxes behind glass and most of its noise go.
        path, seen = nodes.new("ShaderNodeLightPath"), nodes.new("ShaderNodeMath")
        seen.operation = "MULTIPLY"
        seen.inputs[1].default_value = opacity.default_value
        links.new(path.outputs["Is Camera Ray"], seen.inputs[0])
        links.new(seen.outputs[0], opacity)
    links.new(clear.outputs[0], mix.inputs[1])
    links.new(shader, mix.inputs[2])
    for link in list(principled.outputs[0].links):
        links.new(mix.outputs[0], link.to_socket)
    nodes.remove(principled)


def render_cameras(cameras: Cameras, directory: Path, samples: int = 16, threads: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Renders the scene's object from every camera with Cycles on the CPU.

    Args:
        directory: an existing folder for the frames in passing, best on a fast disk.
        samples: paths per pixel.
        threads: CPU threads.

    Returns:
        Linear light [V, H, W, 4] premultiplied, camera-space depth z [V, H, W] (0 where empty) and unit normals
        [V, H, W, 3] in the object frame turned to the camera (0 where empty), all float32.
    """
    import bpy
    from mathutils import Matrix

    scene = bpy.context.scene
    _settings(scene, cameras, samples, threads)
    _light(scene)
    lens = bpy.data.cameras.new("camera")
    camera = bpy.data.objects.new("camera", lens)
    scene.collection.objects.link(camera)
    scene.camera = camera
    lens.sensor_fit = "HORIZONTAL"
    lens.sensor_width = 36.0
    lens.clip_start, lens.clip_end = 0.01, 100.0
    colours, depths, normals = [], [], []
    frame = directory / "frame.exr"
    for viewmat, intrinsics in zip(cameras.viewmats.double().numpy(), cameras.Ks.double().numpy(), strict=True):
        camera.matrix_world = Matrix((np.linalg.inv(viewmat) @ _OPENCV).tolist())
        lens.lens = lens.sensor_width * intrinsics[0, 0] / cameras.width
        lens.shift_x = 0.5 - intrinsics[0, 2] / cameras.width
        lens.shift_y = (intrinsics[1, 2] - cameras.height / 2) / cameras.width
        scene.render.filepath = str(frame)
        bpy.ops.render.render(write_still=True)
        colour, depth, normal = _read_frame(frame)
        colours.append(colour)
        depths.append(depth)
        normals.append(normal)
        frame.unlink()
    return np.stack(colours), np.stack(depths), np.stack(normals)


def _settings(scene, cameras: Cameras, samples: int, threads: int) -> None:
    render, cycles = scene.render, scene.cycles
    render.engine = "CYCLES"
    render.resolution_x, render.resolution_y, render.resolution_percentage = cameras.width, cameras.height, 100
    render.film_transparent = True
    render.threads_mode, render.threads = "FIXED", threads
    render.use_persistent_data = True
    render.use_compositing = render.use_sequencer = False
    cycles.device = "CPU"
    cycles.samples = samples
    cycles.use_adaptive_sampling = cycles.use_denoising = False
    cycles.pixel_filter_type = "BOX"
    cycles.max_bounces = cycles.diffuse_bounces = 2
    cycles.glossy_bounces = cycles.transmission_bounces = cycles.volume_bounces = 0
    # Without the minimum, Russian roulette at every pane fills glass with noise.
    cycles.transparent_max_bounces = cycles.min_transparent_bounces = 16
    cycles.caustics_reflective = cycles.caustics_refractive = False
    layer = scene.view_layers[0]
    layer.use_pass_z = layer.use_pass_normal = True
    layer.pass_alpha_threshold = PASS_OPACITY
    image = render.image_settings
    image.media_type = "MULTI_LAYER_IMAGE"
    image.file_format = "OPEN_EXR_MULTILAYER"
    image.exr_codec = "NONE"
    image.color_depth = "32"


def _light(scene) -> None:
    import bpy

    world = bpy.data.worlds.new("light")
    scene.world = world
    tree = world.node_tree
    tree.nodes.clear()
    direction = tree.nodes.new("ShaderNodeTexCoord")
    cosine, strength = tree.nodes.new("ShaderNodeVectorMath"), tree.nodes.new("ShaderNodeMath")
    cosine.operation, strength.operation = "DOT_PRODUCT", "MULTIPLY_ADD"
    cosine.inputs[1].default_value = (np.array(KEY_DIRECTION) / np.linalg.norm(KEY_DIRECTION)).tolist()
    strength.inputs[1].default_value, strength.inputs[2].default_value = KEY, AMBIENT
    background, output = tree.nodes.new("ShaderNodeBackground"), tree.nodes.new("ShaderNodeOutputWorld")
    tree.links.new(direction.outputs["Generated"], cosine.inputs[0])
    tree.links.new(cosine.outputs["Value"], strength.inputs[0])
    tree.links.new(strength.outputs[0], background.inputs["Strength"])
    tree.links.new(background.outputs[0], output.inputs["Surface"])
    # Nearly even light: paths find it by themselves, next-event sampling would only cost shadow rays.
    world.cycles.sampling_method = "NONE"


def _read_frame(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    import OpenEXR

    try:
        parts = OpenEXR.File(str(path), separate_channels=True).parts
    except RuntimeError as error:
        raise WorkError(f"Blender wrote no readable frame ({error})") from error
    channels = {name.split(".", 1)[1]: channel.pixels for part in parts for name, channel in part.channels.items()}
    colour = np.stack([channels[f"Combined.{c}"] for c in "RGBA"], axis=-1).astype(np.float32)
    depth = channels["Depth.Z"].astype(np.float32)
    normal = np.stack([channels[f"Normal.{c}"] for c in "XYZ"], axis=-1).astype(np.float32)
    length = np.linalg.norm(normal, axis=-1, keepdims=True)
    seen = (depth < 1e4) & (colour[..., 3] > 0) & (length[..., 0] > 1e-3)
    return colour, np.where(seen, depth, 0), np.where(seen[..., None], normal / np.maximum(length, 1e-3), 0)


def srgb_to_linear(values: np.ndarray) -> np.ndarray:
    """Display sRGB 0..1 to linear light (IEC 61966-2-1)."""
    values = np.asarray(values, dtype=np.float64)
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def linear_to_srgb(values: np.ndarray) -> np.ndarray:
    """Linear light to display sRGB 0..1 (IEC 61966-2-1); clipped, which is Blender's Standard view."""
    values = np.clip(values, 0, 1)
    return np.where(values <= 0.0031308, values * 12.92, 1.055 * values ** (1 / 2.4) - 0.055)


def straight_srgb(linear: np.ndarray) -> np.ndarray:
    """Premultiplied linear light [..., 4] to straight-alpha display sRGB uint8 [..., 4]; empty pixels are all zero."""
    alpha = np.clip(linear[..., 3:], 0, 1)
    colour = linear_to_srgb(linear[..., :3] / np.maximum(alpha, 1e-4))
    pixels = np.concatenate([colour, alpha], axis=-1)
    pixels = np.where(np.round(alpha * 255) > 0, pixels, 0)
    return np.round(pixels * 255).astype(np.uint8)


@contextlib.contextmanager
def quiet():
    """Sends what Blender prints to standard output away while the block runs."""
    import os
    import sys

    sys.stdout.flush()
    kept = os.dup(1)
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
        os.close(sink)
