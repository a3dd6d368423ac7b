"""A coloured triangle mesh as a binary glTF 2.0 file (.glb): Y up, colours of vertices, one matt material.

Written here and not by Blender's exporter, after which the bpy module 4.5 does not end: it waits for a lock for ever.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np

_FLOAT, _UINT, _USHORT = 5126, 5125, 5123
_VERTICES, _INDICES = 34962, 34963  # what a buffer view is for


def write(path: Path, name: str, vertices: np.ndarray, faces: np.ndarray, colors: np.ndarray) -> None:
    """Write one mesh.

    Args:
        vertices: [V, 3] in the axes of Gaussians (Z up, front -Y); turned to glTF's (Y up, front +Z).
        faces: [F, 3] indices of vertices, counter-clockwise seen from outside.
        colors: [V, 3] scene-linear, 0..1, as glTF takes them.
    """
    corners = vertices[faces]
    areas = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normals = np.stack([np.bincount(faces.ravel(), np.repeat(areas[:, i], 3), len(vertices)) for i in range(3)], axis=1)
    lengths = np.linalg.norm(normals, axis=1, keepdims=True)
    normals = np.where(lengths > 0, normals / np.where(lengths > 0, lengths, 1), (0.0, 0.0, 1.0))
    positions, normals = (_y_up(values) for values in (vertices, normals))
    opaque = np.concatenate([colors, np.ones((len(colors), 1))], axis=1)
    # 65535 would be the restart of a strip.
    small = len(vertices) < 65535
    arrays = [
        (positions.astype("<f4"), "VEC3", _FLOAT, _VERTICES),
        (normals.astype("<f4"), "VEC3", _FLOAT, _VERTICES),
        (np.rint(opaque * 65535).astype("<u2"), "VEC4", _USHORT, _VERTICES),
        (faces.astype("<u2" if small else "<u4").ravel(), "SCALAR", _USHORT if small else _UINT, _INDICES),
    ]
    views, accessors, binary = [], [], b""
    for index, (values, kind, component, target) in enumerate(arrays):
        data = values.tobytes()
        views.append({"buffer": 0, "byteOffset": len(binary), "byteLength": len(data), "target": target})
        accessors.append({"bufferView": index, "componentType": component, "count": len(values), "type": kind})
        binary += data + bytes(-len(data) % 4)
    accessors[0] |= {"min": arrays[0][0].min(axis=0).tolist(), "max": arrays[0][0].max(axis=0).tolist()}
    accessors[2]["normalized"] = True
    document = {
        "asset": {"version": "2.0", "generator": "Gaussian Atlas"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0, "name": name}],
        "meshes": [
            {
                "name": name,
                "primitives": [{"attributes": {"POSITION": 0, "NORMAL": 1, "COLOR_0": 2}, "indices": 3, "material": 0, "mode": 4}],
            }
        ],
        "materials": [{"name": name, "pbrMetallicRoughness": {"metallicFactor": 0.0, "roughnessFactor": 1.0}}],
        "accessors": accessors,
        "bufferViews": views,
        "buffers": [{"byteLength": len(binary)}],
    }
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 4)
    head = struct.pack("<4sIIII", b"glTF", 2, 28 + len(text) + len(binary), len(text), 0x4E4F534A)
    path.write_bytes(head + text + struct.pack("<II", len(binary), 0x004E4942) + binary)


def _y_up(vectors: np.ndarray) -> np.ndarray:
    return np.stack([vectors[:, 0], vectors[:, 2], -vectors[:, 1]], axis=1)
