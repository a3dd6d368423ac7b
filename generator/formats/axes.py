"""The axes of splat files: which way is up, and the turns between them.

Every one is right-handed with X to the right, so all differ by quarter turns about X:

* "Z": Blender's and this project's, Z up and the front towards -Y.
* "-Y": a camera's, Y down and Z into the picture; what 3D Gaussian splatting writes and most splat viewers show upright.
* "Y": glTF's, Y up and the front towards +Z.
"""

from __future__ import annotations

import math

import torch

from ..errors import InputError
from ..gaussians import Gaussians

UP = ("Z", "-Y", "Y")
# The names that command lines take: an argument cannot start with a minus.
NAMES = {"z-up": "Z", "y-down": "-Y", "y-up": "Y"}
# Quarter turns about X from the axes of Gaussians.
_QUARTERS = {"Z": 0, "-Y": 1, "Y": -1}


def angle(up: str) -> float:
    """The turn about X in radians that brings a file of these axes to the axes of Gaussians."""
    return -_QUARTERS[up] * math.pi / 2


def turn(gaussians: Gaussians, source: str, target: str) -> Gaussians:
    """Gaussians given in the axes `source`, in the axes `target` (both of UP): means and rotations turned, the rest as it is.

    Raises:
        InputError: axes of another name.
    """
    if unknown := {source, target} - set(UP):
        raise InputError(f"axes {', '.join(map(repr, sorted(unknown)))} are none of {', '.join(UP)}")
    quarters = _QUARTERS[target] - _QUARTERS[source]
    if quarters == 0:
        return gaussians
    # Quarter turns by hand: nothing is rounded, so there and back gives the same numbers.
    x, y, z = gaussians.means.unbind(1)
    for _ in range(quarters % 4):
        y, z = -z, y
    half = quarters * math.pi / 4
    c, s = math.cos(half), math.sin(half)
    qw, qx, qy, qz = gaussians.quaternions.unbind(1)
    turned = torch.stack([c * qw - s * qx, c * qx + s * qw, c * qy - s * qz, c * qz + s * qy], dim=1)
    return gaussians.replace(means=torch.stack([x, y, z], dim=1), quaternions=turned)
