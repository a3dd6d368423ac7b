"""Views of a sphere, drawn without a renderer: what fits are tested on."""

from __future__ import annotations

import numpy as np
import torch

from generator.render import Cameras
from trainer.views import Views


def sphere_views(size: int = 64, radius: float = 0.4) -> Views:
    """A sphere whose upper half is red and lower half blue, ray-traced here."""
    train, held_out = Cameras.around(12, size), Cameras.orbit(2, size)
    cameras = Cameras(torch.cat([train.viewmats, held_out.viewmats]), torch.cat([train.Ks, held_out.Ks]), size, size)
    rgba = np.zeros((14, size, size, 4), np.uint8)
    depth = np.zeros((14, size, size), np.float16)
    normals = np.zeros((14, size, size, 3), np.int8)
    columns, rows = np.meshgrid(np.arange(size) + 0.5, np.arange(size) + 0.5)
    for view in range(14):
        K, viewmat = cameras.Ks[view].numpy(), cameras.viewmats[view].numpy()
        rays = np.stack([(columns - K[0, 2]) / K[0, 0], (rows - K[1, 2]) / K[1, 1], np.ones_like(rows)], -1)
        origin = cameras.positions[view].numpy()
        world = rays @ viewmat[:3, :3]
        a, b, c = (world**2).sum(-1), 2 * world @ origin, origin @ origin - radius**2
        discriminant = b * b - 4 * a * c
        hit = discriminant > 0
        z = np.where(hit, (-b - np.sqrt(np.maximum(discriminant, 0))) / (2 * a), 0)
        points = origin + z[..., None] * world
        rgba[view][hit] = np.where(points[hit][:, 2:] > 0, (220, 30, 30, 255), (30, 30, 220, 255))
        depth[view] = z
        normals[view][hit] = np.round(127 * points[hit] / radius)
    return Views("sphere", rgba, depth, normals, cameras, np.array(["train"] * 12 + ["held_out"] * 2))
