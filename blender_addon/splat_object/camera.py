"""Blender cameras for the generator's cameras, and a view that fills the frame with an object."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import bpy
import numpy as np
from mathutils import Matrix

from ...generator.errors import InputError

if TYPE_CHECKING:
    from ...generator.gaussians import Gaussians
    from ...generator.render.cameras import Cameras

# OpenCV camera axes (+Y down, +Z forward) to Blender's (+Y up, -Z forward).
_FLIP = Matrix.Diagonal((1.0, -1.0, -1.0, 1.0))


def camera_from(cameras: Cameras, index: int = 0, name: str = "Camera") -> bpy.types.Object:
    """A Blender camera object that sees what cameras[index] sees; not linked to any collection.

    The scene's resolution has to be cameras.width x cameras.height; the clip range fits objects about a unit in size.

    Raises:
        InputError: the pixels are not square (fx and fy differ), which a Blender camera does not have.
    """
    fx, fy = float(cameras.Ks[index, 0, 0]), float(cameras.Ks[index, 1, 1])
    if abs(fx - fy) > 1e-4 * fx:
        raise InputError(f"camera {index} has focal lengths {fx:g} and {fy:g} pixels: a Blender camera needs them equal")
    data = bpy.data.cameras.new(name)
    data.sensor_fit = "HORIZONTAL"
    data.lens = data.sensor_width * fx / cameras.width
    data.shift_x = (0.5 * cameras.width - float(cameras.Ks[index, 0, 2])) / cameras.width
    data.shift_y = (float(cameras.Ks[index, 1, 2]) - 0.5 * cameras.height) / cameras.width
    data.clip_start, data.clip_end = 0.01, 1000.0
    camera = bpy.data.objects.new(name, data)
    view = Matrix(cameras.viewmats[index].double().tolist())
    camera.matrix_world = view.inverted() @ _FLIP
    return camera


def pixel(scene: bpy.types.Scene) -> float | None:
    """The side of one of the render's pixels as the scene's camera sees it, per unit of distance; in units under an orthographic camera.

    None where there is no camera or it is panoramic.
    """
    camera = scene.camera.data if scene.camera else None
    if camera is None or camera.type not in ("PERSP", "ORTHO"):
        return None
    width, height = (side * scene.render.resolution_percentage / 100 for side in (scene.render.resolution_x, scene.render.resolution_y))
    is_wide = camera.sensor_fit == "HORIZONTAL" or (camera.sensor_fit == "AUTO" and width >= height)
    pixels = max(1.0, width if is_wide else height)
    sensor = camera.sensor_height if camera.sensor_fit == "VERTICAL" else camera.sensor_width
    return (camera.ortho_scale if camera.type == "ORTHO" else sensor / camera.lens) / pixels


def framing(
    gaussians: Gaussians, size: int, azimuth: float = 30.0, elevation: float = 20.0, fov: float = 39.6, margin: float = 0.06
) -> Cameras:
    """One square camera, looking from a direction, placed so that the visible Gaussians just fill the frame.

    The distance is exact for points in perspective: with T the tangent of half the field of view, a point at (x, depth)
    stays inside the right edge where x - T depth <= cx + T D, and likewise for the other three edges.

    Args:
        size: image side in pixels.
        azimuth: degrees round Z from the object's front (-Y).
        elevation: degrees above the horizon.
        margin: share of the frame left empty on each side.
    """
    import torch

    from ...generator.render.cameras import Cameras

    visible = gaussians.opacities > 0.2
    if not bool(visible.any()):
        visible = torch.ones_like(visible)
    chosen = gaussians[visible]
    direction = _direction(azimuth, elevation)
    turned = Cameras.look_at(torch.tensor([direction], dtype=torch.float32), size, fov)
    rotation = turned.viewmats[0, :3, :3]
    local = (chosen.means.float() @ rotation.T).double().numpy()  # [N, 3] right, down, forward
    reach = torch.sqrt(torch.einsum("ij,njk,ik->ni", rotation, chosen.covariances().float(), rotation)).double().numpy()
    tangent = math.tan(math.radians(fov) / 2) * (1 - 2 * margin)
    centres, distances = [], []
    for axis in (0, 1):
        high = np.max(local[:, axis] + reach[:, axis] - tangent * local[:, 2])
        low = np.max(-local[:, axis] + reach[:, axis] - tangent * local[:, 2])
        centres.append((high - low) / 2)
        distances.append((high + low) / (2 * tangent))
    nearest = float(-(local[:, 2] - reach[:, 2]).min()) + 0.05
    distance = max(*distances, nearest)
    viewmat = turned.viewmats.clone()
    viewmat[0, :3, 3] = torch.tensor([-centres[0], -centres[1], distance])
    return Cameras(viewmat, turned.Ks, size, size)


def _direction(azimuth: float, elevation: float) -> tuple[float, float, float]:
    a, e = math.radians(azimuth), math.radians(elevation)
    return math.sin(a) * math.cos(e), -math.cos(a) * math.cos(e), math.sin(e)
