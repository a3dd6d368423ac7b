"""Makes objects with Infinigen: runs in Infinigen's own environment (bpy 4.2, infinigen), never imported by the trainer.

Reads one JSON object a line from standard input, `{"module": ..., "factory": ..., "seed": ...,
"output": FILE.ply, "limit": SECONDS}`, and
answers each with one line on the standard output that it was started with: `{"status": "ok", "faces": ..., "parts": [...],
"traits": {...}}` or `{"status": "failed", "reason": ...}`. The first line, `{"status": "ready", ...}`, says that it is up.

What is written is a PLY in Infinigen's axes (Z up, metres) with baked colours: each vertex has display sRGB and an opacity.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import random
import sys
import time

import bpy
import numpy as np

# Colours are stored at vertices, so triangles have one size: a part of the object's longest side, two pixels of a 128 px view.
SIDES = 40
FACES = 14_000  # of an object at most, about; the triangles are larger where it has more surface
MERGED = 0.4  # of that size: vertices this near to each other become one
MOST_FACES = 8_000_000  # an object that has more is given up
GLASS = 0.3  # opacity of glass and of what transmits light
DARKEST = 0.015  # linear light: black paint still shows its shape
SURFACES = (
    "BSDF_DIFFUSE",
    "BSDF_GLOSSY",
    "BSDF_TRANSLUCENT",
    "BSDF_SHEEN",
    "BSDF_VELVET",
    "BSDF_TOON",
    "BSDF_HAIR",
    "SUBSURFACE_SCATTERING",
)
CLEAR = ("BSDF_GLASS", "BSDF_REFRACTION")


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    # What Blender and Infinigen print must not get between the answers.
    os.dup2(2, 1)
    start = time.perf_counter()
    set_up()
    print(
        json.dumps({"status": "ready", "blender": bpy.app.version_string, "seconds": round(time.perf_counter() - start, 2)}), file=answers
    )
    for line in sys.stdin:
        task = json.loads(line)
        # Its timer needs no lock of Python's, so that it also ends a loop inside Blender.
        faulthandler.dump_traceback_later(task.pop("limit"), exit=True)
        try:
            answer = {"status": "ok", **spawn(**task)}
        except Exception as error:  # whatever one object's trouble is, the others go on
            answer = {"status": "failed", "reason": f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]}
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps(answer), file=answers)


def set_up() -> None:
    import logging

    logging.disable(logging.WARNING)
    from infinigen.core import init

    # Asked for by rocks and landscapes: would be fetched from Blender's server where there is a network, and objects would differ.
    init.require_blender_addon = lambda *_, **__: None
    init.apply_gin_configs(["infinigen_examples/configs_indoor", "infinigen_examples/configs_nature"], skip_unknown=True)


def spawn(module: str, factory: str, seed: int, output: str) -> dict:
    """Make one object and write it."""
    from infinigen.core.util import blender as butil
    from infinigen.core.util.math import FixedSeed

    bpy.ops.wm.read_factory_settings(use_empty=True)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    kind = getattr(importlib.import_module(f"infinigen.assets.objects.{module}"), factory)
    start = time.perf_counter()
    with FixedSeed(seed):
        maker = kind(seed)
        asset = maker.spawn_asset(seed)
        maker.finalize_assets(asset)
    made = time.perf_counter()
    tree = set(butil.iter_object_tree(asset))
    pieces = collect(tree)
    if not pieces:
        raise ValueError("no faces")
    reduce(pieces)
    bake([piece for piece, _ in pieces])
    answer = write(pieces, output, maker)
    answer["seconds"] = {"spawn": round(made - start, 2), "bake": round(time.perf_counter() - made, 2)}
    return answer


def collect(tree: set) -> list[tuple]:
    """The visible meshes of an object tree with modifiers applied: (object, [matrices of its copies, 4 x 4])."""
    graph = bpy.context.evaluated_depsgraph_get()
    found: dict = {}
    for instance in graph.object_instances:
        source = instance.object
        owner = (instance.parent if instance.is_instance else source).original
        if owner not in tree or owner.hide_render or not instance.show_self or source.type not in ("MESH", "CURVE", "SURFACE", "META"):
            continue
        key = (source.original.name, source.data.name if source.data else "")
        if key not in found:
            found[key] = (source, [])
        found[key][1].append(np.array(instance.matrix_world))
    pieces = []
    for source, matrices in found.values():
        mesh = bpy.data.meshes.new_from_object(source, preserve_all_data_layers=True, depsgraph=graph)
        if not len(mesh.polygons):
            continue
        pieces.append((bpy.data.objects.new("piece", mesh), matrices))
    for other in bpy.data.objects:
        other.hide_render = True
    from mathutils import Matrix

    for piece, matrices in pieces:
        bpy.context.scene.collection.objects.link(piece)
        piece.matrix_world = Matrix(matrices[0].tolist())
        piece.hide_render = piece.hide_viewport = False
    return pieces


def reduce(pieces: list[tuple]) -> None:
    """Triangles of about one size: what is finer is merged, what is coarser is cut, so that vertices can carry the colours."""
    low, high = bounds(pieces)
    scales = [abs(np.linalg.det(matrices[0][:3, :3])) ** (1 / 3) or 1e-9 for _, matrices in pieces]
    areas = [sum(face.area for face in piece.data.polygons) * scale**2 for (piece, _), scale in zip(pieces, scales, strict=True)]
    area = sum(area * len(matrices) for area, (_, matrices) in zip(areas, pieces, strict=True))
    side = max((high - low).max() / SIDES, (area / (0.433 * FACES)) ** 0.5)
    if sum(len(piece.data.polygons) * len(matrices) for piece, matrices in pieces) > MOST_FACES:
        raise ValueError(f"more than {MOST_FACES:,} faces")
    for (piece, _), scale in zip(pieces, scales, strict=True):
        points = corners(piece.data)
        own = (points.max(0) - points.min(0)).max()
        merge(piece.data, min(side / scale * MERGED, own / 8))
        cut(piece.data, side / scale)
    total = sum(len(piece.data.polygons) * len(matrices) for piece, matrices in pieces)
    if total > 4 * FACES:
        for piece, _ in pieces:
            modifier = piece.modifiers.new("fewer", "DECIMATE")
            modifier.ratio = max(4 * FACES / total, min(1.0, 6 / max(len(piece.data.polygons), 1)))
        graph = bpy.context.evaluated_depsgraph_get()
        for piece, _ in pieces:
            fewer = bpy.data.meshes.new_from_object(piece.evaluated_get(graph), preserve_all_data_layers=True, depsgraph=graph)
            piece.modifiers.clear()
            piece.data = fewer


def merge(data, size: float) -> None:
    """Makes triangles, and one vertex of those in one cube of that side that look the same way and bear the same material.

    Thin boards and rods stay what they are: their sides look different ways.
    """
    import bmesh

    mesh = bmesh.new()
    mesh.from_mesh(data)
    bmesh.ops.triangulate(mesh, faces=mesh.faces[:])
    # Materials that meet share no vertex: the border between their colours stays sharp.
    borders = [edge for edge in mesh.edges if len({face.material_index for face in edge.link_faces}) > 1]
    bmesh.ops.split_edges(mesh, edges=borders)
    mesh.to_mesh(data)
    points = corners(data)
    normals = np.empty(len(points) * 3, dtype=np.float32)
    data.vertex_normals.foreach_get("vector", normals)
    normals = normals.reshape(-1, 3)
    axis = np.abs(normals).argmax(1)
    facing = axis * 2 + (normals[np.arange(len(axis)), axis] > 0)
    loops = np.empty(len(data.loops), dtype=np.int32)
    data.loops.foreach_get("vertex_index", loops)
    slots = np.empty(len(data.polygons), dtype=np.int32)
    data.polygons.foreach_get("material_index", slots)
    material = np.zeros(len(points), dtype=np.int64)
    material[loops] = np.repeat(slots, 3)
    cells = np.column_stack([np.floor((points - points.min(0)) / max(size, 1e-12)).astype(np.int64), facing, material])
    _, first, group = np.unique(cells, axis=0, return_index=True, return_inverse=True)
    target = first[group.ravel()]
    mesh.verts.ensure_lookup_table()
    moved = np.flatnonzero(target != np.arange(len(target)))
    bmesh.ops.weld_verts(mesh, targetmap={mesh.verts[int(i)]: mesh.verts[int(target[i])] for i in moved})
    bmesh.ops.triangulate(mesh, faces=[face for face in mesh.faces if len(face.verts) > 3])
    mesh.to_mesh(data)
    mesh.free()


def bounds(pieces: list[tuple]) -> tuple[np.ndarray, np.ndarray]:
    points = [place(corners(piece.data), matrix) for piece, matrices in pieces for matrix in matrices]
    return np.min([p.min(0) for p in points], axis=0), np.max([p.max(0) for p in points], axis=0)


def corners(mesh) -> np.ndarray:
    points = np.empty(len(mesh.vertices) * 3, dtype=np.float32)
    mesh.vertices.foreach_get("co", points)
    return points.reshape(-1, 3).astype(np.float64)


def place(points: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    return points @ matrix[:3, :3].T + matrix[:3, 3]


def cut(data, longest: float) -> None:
    """Halves edges until none is longer."""
    import bmesh

    mesh = bmesh.new()
    mesh.from_mesh(data)
    for _ in range(8):
        edges = [edge for edge in mesh.edges if edge.calc_length() > longest]
        if not edges or len(mesh.faces) > 4 * FACES:
            break
        bmesh.ops.subdivide_edges(mesh, edges=edges, cuts=1)
        bmesh.ops.triangulate(mesh, faces=[face for face in mesh.faces if len(face.verts) > 3])
    mesh.to_mesh(data)
    mesh.free()


def bake(objects: list) -> None:
    """Colour attributes "colour" (linear light, premultiplied) and, where something is clear, "opacity" of every object."""
    plain = None
    for piece in objects:
        data = piece.data
        for name in ("colour", "opacity"):
            if name in data.attributes:
                data.attributes.remove(data.attributes[name])
        if not len(data.materials):
            data.materials.append(None)
        for slot, material in enumerate(data.materials):
            if material is None or not material.use_nodes:
                plain = plain or grey()
                data.materials[slot] = plain
    materials = {material for piece in objects for material in piece.data.materials}
    trees = list(dict.fromkeys(tree for material in materials for tree in trees_of(material.node_tree, [])))
    for tree in trees:
        tint(tree)
    lamps, clear = [], False
    for tree in trees:
        for node in list(tree.nodes):
            made, seen_through = glow(tree, node)
            lamps += made
            clear |= seen_through
    scene = bpy.context.scene
    scene.render.engine = "CYCLES"
    scene.cycles.device, scene.cycles.samples = "CPU", 1
    scene.cycles.use_adaptive_sampling = scene.cycles.use_denoising = False
    scene.render.threads_mode, scene.render.threads = "FIXED", 1
    scene.render.bake.target = "VERTEX_COLORS"
    scene.render.bake.use_clear = True
    bake_into(objects, "colour")
    if clear:
        for tree, lamp in lamps:
            for socket in ("Color", "Strength"):
                for link in list(lamp.inputs[socket].links):
                    tree.links.remove(link)
            lamp.inputs["Color"].default_value, lamp.inputs["Strength"].default_value = (1, 1, 1, 1), 1.0
        bake_into(objects, "opacity")


def bake_into(objects: list, name: str) -> None:
    bpy.ops.object.select_all(action="DESELECT")
    for piece in objects:
        attribute = piece.data.color_attributes.new(name=name, type="FLOAT_COLOR", domain="POINT")
        piece.data.color_attributes.active_color = attribute
        piece.select_set(True)
    bpy.context.view_layer.objects.active = objects[0]
    bpy.ops.object.bake(type="EMIT")


def grey():
    material = bpy.data.materials.new("plain")
    material.use_nodes = True
    return material


def trees_of(tree, seen: list) -> list:
    """A node tree and all groups inside."""
    if tree is not None and tree not in seen:
        seen.append(tree)
        for node in tree.nodes:
            if node.type == "GROUP":
                trees_of(node.node_tree, seen)
    return seen


def tint(tree) -> None:
    """Gives clear glass the colour that its inside filters."""
    filters = [node for node in tree.nodes if node.type == "VOLUME_ABSORPTION" and not node.inputs["Color"].is_linked]
    for node in tree.nodes if filters else ():
        if (
            node.type == "BSDF_PRINCIPLED"
            and node.inputs["Transmission Weight"].default_value > 0.5
            and not node.inputs["Base Color"].is_linked
        ):
            node.inputs["Base Color"].default_value = filters[0].inputs["Color"].default_value


def glow(tree, node) -> tuple[list, bool]:
    """Puts emission of its colour in the place of a surface shader: ([(tree, emission node)], whether light passes through it)."""
    if node.type == "EMISSION":
        if not node.inputs["Strength"].is_linked:
            node.inputs["Strength"].default_value = min(node.inputs["Strength"].default_value, 1.0)
        return [(tree, node)], False
    if node.type == "BSDF_TRANSPARENT":
        return [], True
    if node.type not in ("BSDF_PRINCIPLED", *SURFACES, *CLEAR):
        return [], False
    lamp = tree.nodes.new("ShaderNodeEmission")
    copy_input(tree, node.inputs["Base Color" if node.type == "BSDF_PRINCIPLED" else "Color"], lamp.inputs["Color"])
    shader, seen_through = lamp.outputs[0], False
    lamps = [(tree, lamp)]
    opacity = None
    if node.type == "BSDF_PRINCIPLED":
        emission, strength = node.inputs["Emission Color"], node.inputs["Emission Strength"]
        if strength.is_linked or (strength.default_value > 0 and (emission.is_linked or max(emission.default_value[:3]) > 0)):
            own = tree.nodes.new("ShaderNodeEmission")
            copy_input(tree, emission, own.inputs["Color"])
            copy_input(tree, strength, own.inputs["Strength"])
            if not strength.is_linked:
                own.inputs["Strength"].default_value = min(strength.default_value, 1.0)
            add = tree.nodes.new("ShaderNodeMixShader")
            tree.links.new(shader, add.inputs[1])
            tree.links.new(own.outputs[0], add.inputs[2])
            shader = add.outputs[0]
            lamps.append((tree, own))
        through, alpha = node.inputs["Transmission Weight"], node.inputs["Alpha"]
        if through.is_linked or through.default_value > 0:
            opacity = tree.nodes.new("ShaderNodeMath")
            opacity.operation = "MULTIPLY_ADD"
            copy_input(tree, through, opacity.inputs[0])
            opacity.inputs[1].default_value, opacity.inputs[2].default_value = GLASS - 1, 1.0
        if alpha.is_linked or alpha.default_value < 1:
            product = tree.nodes.new("ShaderNodeMath")
            product.operation = "MULTIPLY"
            copy_input(tree, alpha, product.inputs[0])
            product.inputs[1].default_value = 1.0
            if opacity is not None:
                tree.links.new(opacity.outputs[0], product.inputs[1])
            opacity = product
    elif node.type in CLEAR:
        opacity = tree.nodes.new("ShaderNodeValue")
        opacity.outputs[0].default_value = GLASS
    if opacity is not None:
        mix, nothing = tree.nodes.new("ShaderNodeMixShader"), tree.nodes.new("ShaderNodeBsdfTransparent")
        tree.links.new(opacity.outputs[0], mix.inputs["Fac"])
        tree.links.new(nothing.outputs[0], mix.inputs[1])
        tree.links.new(shader, mix.inputs[2])
        shader, seen_through = mix.outputs[0], True
    for link in list(node.outputs[0].links):
        tree.links.new(shader, link.to_socket)
    tree.nodes.remove(node)
    return lamps, seen_through


def copy_input(tree, source, target) -> None:
    if source.is_linked:
        tree.links.new(source.links[0].from_socket, target)
    else:
        target.default_value = source.default_value


def write(pieces: list[tuple], output: str, maker) -> dict:
    """Write the PLY; returns what is known about the object."""
    points, colours, faces, start = [], [], [], 0
    roles = materials_of(maker)
    parts: dict[str, dict] = {}
    for piece, matrices in pieces:
        data = piece.data
        loops = np.empty(len(data.loops), dtype=np.int32)
        data.loops.foreach_get("vertex_index", loops)
        slots = np.empty(len(data.polygons), dtype=np.int32)
        data.polygons.foreach_get("material_index", slots)
        slots = np.clip(slots, 0, len(data.materials) - 1)
        linear = read_colours(data, "colour")[:, :3]
        if "opacity" in data.attributes:
            opacity = np.clip(read_colours(data, "opacity")[:, 0], 0, 1)
            linear = linear / np.maximum(opacity, 0.02)[:, None]
        else:
            opacity = np.ones(len(linear))
        linear = np.nan_to_num(np.clip(linear, DARKEST, 1), nan=DARKEST)
        rgba = np.column_stack([linear, opacity])
        rgba[:, :3] = np.where(rgba[:, :3] <= 0.0031308, rgba[:, :3] * 12.92, 1.055 * rgba[:, :3] ** (1 / 2.4) - 0.055)
        triangles = loops.reshape(-1, 3)
        local = corners(data)
        note_parts(parts, data, slots, rgba, triangles, place(local, matrices[0]), len(matrices), roles)
        for matrix in matrices:
            points.append(place(local, matrix))
            colours.append(rgba)
            faces.append(start + (triangles if np.linalg.det(matrix[:3, :3]) > 0 else triangles[:, ::-1]))
            start += len(local)
    points, colours, faces = np.concatenate(points), np.concatenate(colours), np.concatenate(faces)
    save_ply(output, points, colours, faces)
    total = sum(part["area"] for part in parts.values()) or 1.0
    for part in parts.values():
        part["colour"] = [round(float(c) / max(part["area"], 1e-12), 3) for c in part["colour"]]
        part["share"] = round(part.pop("area") / total, 4)
    return {
        "faces": len(faces),
        "vertices": len(points),
        "size": [round(float(v), 4) for v in points.max(0) - points.min(0)],
        "clear": round(float((colours[:, 3] < 0.6).mean()), 3),
        "parts": sorted(parts.values(), key=lambda part: -part["share"]),
        "traits": traits(maker),
    }


def note_parts(parts: dict, data, slots, rgba, triangles, points, copies: int, roles: dict[str, list[str]]) -> None:
    """Adds area, summed colour and roles of each material of a mesh."""
    a, b, c = (points[triangles[:, k]] for k in range(3))
    areas = np.linalg.norm(np.cross(b - a, c - a), axis=1) / 2 * copies
    mean = rgba[triangles].mean(1)[:, :3]
    for slot in np.unique(slots):
        material = data.materials[int(slot)]
        name = material.name.split(".")[0]
        part = parts.setdefault(
            material.name, {"material": name, "roles": roles.get(material.name, []), "area": 0.0, "colour": np.zeros(3)}
        )
        here = slots == slot
        part["area"] += float(areas[here].sum())
        part["colour"] = part["colour"] + (mean[here] * areas[here, None]).sum(0)


def makers(maker, seen: list) -> list:
    """A factory and those that it holds."""
    from infinigen.core.placement.factory import AssetFactory

    if maker not in seen and len(seen) < 8:
        seen.append(maker)
        for value in vars(maker).values():
            if isinstance(value, AssetFactory):
                makers(value, seen)
    return seen


def materials_of(maker) -> dict[str, list[str]]:
    """Material name -> the names under which the factory keeps it: "limb_surface", "shade_mat"."""
    found: dict[str, list[str]] = {}

    def note(name: str, value) -> None:
        if isinstance(value, bpy.types.Material):
            try:
                found.setdefault(value.name, []).append(name)
            except ReferenceError:
                pass
        elif isinstance(value, dict):
            for key, inner in value.items():
                if isinstance(key, str):
                    note(key, inner)

    for one in makers(maker, []):
        for name, value in vars(one).items():
            note(name, value)
    return found


def traits(maker) -> dict:
    """Switches and choices of a factory: has_arm, leg_type and the like."""
    found: dict[str, object] = {}
    for one in makers(maker, []):
        for name, value in vars(one).items():
            if isinstance(value, np.generic):
                value = value.item()
            if isinstance(value, bool | str | int) and not name.startswith("_") and name not in ("factory_seed", "coarse"):
                found.setdefault(name, value if not isinstance(value, str) else value[:60])
        found.setdefault("class", type(one).__name__) if one is maker else found.setdefault("base_class", type(one).__name__)
    return found


def read_colours(data, name: str) -> np.ndarray:
    attribute = data.color_attributes[name]
    values = np.empty(len(attribute.data) * 4, dtype=np.float32)
    attribute.data.foreach_get("color", values)
    return values.reshape(-1, 4)


def save_ply(path: str, points: np.ndarray, colours: np.ndarray, faces: np.ndarray) -> None:
    rows = np.empty(len(points), dtype=[("position", "<f4", 3), ("colour", "u1", 4)])
    rows["position"], rows["colour"] = points, np.round(np.clip(colours, 0, 1) * 255)
    lists = np.empty(len(faces), dtype=[("count", "u1"), ("corners", "<i4", 3)])
    lists["count"], lists["corners"] = 3, faces
    properties = [*(f"property float {c}" for c in "xyz"), *(f"property uchar {c}" for c in ("red", "green", "blue", "alpha"))]
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(points)}", *properties]
    header += [f"element face {len(faces)}", "property list uchar int vertex_indices", "end_header", ""]
    partial = f"{path}.{os.getpid()}.tmp"
    with open(partial, "wb") as file:
        file.write("\n".join(header).encode())
        file.write(rows.tobytes())
        file.write(lists.tobytes())
    os.replace(partial, path)


if __name__ == "__main__":
    main()
