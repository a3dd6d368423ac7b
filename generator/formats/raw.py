"""Between the raw numbers of files (logits, logs, spherical harmonics) and activated Gaussians.

Every reader hands its columns to `assemble`, so all formats treat the oddities of other programs' files alike.
"""

from __future__ import annotations

import math
import warnings

import numpy as np
import torch

from ..errors import InputError
from ..gaussians import Gaussians

# The constant spherical harmonic, 1 / (2 sqrt(pi)): colour = 0.5 + SH_C0 * f_dc (Kerbl et al. 2023).
SH_C0 = 0.28209479177387814
# Log standard deviations outside these limits (1e-13 to 5e8) are noise of an optimiser; exp would lose them in float32.
LOG_SCALE_LIMITS = (-30.0, 20.0)
# An opacity of exactly 0 or 1 has no logit: 1e-6 off is invisible and below what a round trip may lose.
OPACITY_MARGIN = 1e-6


def colors_from_dc(dc: np.ndarray) -> np.ndarray:
    """Display sRGB of SH coefficients of degree 0."""
    return 0.5 + SH_C0 * dc


def dc_from_colors(colors: np.ndarray) -> np.ndarray:
    """SH coefficients of degree 0 of display sRGB in 0..1."""
    return (colors - 0.5) / SH_C0


def opacities_from_logits(logits: np.ndarray) -> np.ndarray:
    """Sigmoid; infinite logits give exactly 0 and 1."""
    with np.errstate(over="ignore"):
        return 1.0 / (1.0 + np.exp(-logits))


def logits_from_opacities(opacities: np.ndarray) -> np.ndarray:
    """Inverse sigmoid; opacities at 0 and 1 are moved inwards by OPACITY_MARGIN."""
    inside = np.clip(opacities, OPACITY_MARGIN, 1 - OPACITY_MARGIN)
    return np.log(inside / (1 - inside))


def logs_from_scales(scales: np.ndarray) -> np.ndarray:
    """Logarithms of standard deviations, within LOG_SCALE_LIMITS."""
    return np.log(np.clip(scales, math.exp(LOG_SCALE_LIMITS[0]), math.exp(LOG_SCALE_LIMITS[1])))


def scales_from_logs(logs: np.ndarray) -> np.ndarray:
    """Standard deviations of logarithms; below LOG_SCALE_LIMITS (some programs write -inf) they are clamped."""
    return np.exp(np.clip(logs, *LOG_SCALE_LIMITS))


class RowsDropped(UserWarning):
    """Some of a file's Gaussians were left out: Gaussian i is not the file's row i any more, so it need not be cell i of an atlas."""


def warn_of_higher_bands(path: object, degree: int) -> None:
    """Say that a file's view-dependent colour is left out; to be called only where it holds some."""
    warnings.warn(f"{path}: colour that depends on the view (spherical harmonics of degree {degree}) is left out", stacklevel=2)


def columns(gaussians: Gaussians) -> dict[str, np.ndarray]:
    """The fields of some Gaussians as float64 NumPy arrays, checked to be worth writing.

    Raises:
        InputError: there are none, or one holds a number that is not finite.
    """
    if len(gaussians) == 0:
        raise InputError("there are no Gaussians to save")
    bad = int((~gaussians.finite()).sum())
    if bad:
        raise InputError(f"{bad} of {len(gaussians)} Gaussians hold numbers that are not finite; drop them before saving")
    names = ("means", "quaternions", "scales", "opacities", "colors")
    return {name: getattr(gaussians, name).detach().to("cpu", torch.float64).numpy() for name in names}


def assemble(
    path: object, means: np.ndarray, quaternions: np.ndarray, scales: np.ndarray, opacities: np.ndarray, colors: np.ndarray
) -> Gaussians:
    """Gaussians (float32, CPU) of activated columns read from the file `path`.

    Quaternions are normalised (a zero one becomes the identity), opacities and colours clamped to 0..1. Rows with numbers
    that are not finite or do not fit in float32 are dropped with a warning (RowsDropped).

    Raises:
        InputError: no row is left.
    """
    count = len(means)
    if count == 0:
        raise InputError(f"{path} holds no Gaussians")
    norms = np.linalg.norm(quaternions, axis=1, keepdims=True)
    identity = np.array([[1.0, 0.0, 0.0, 0.0]])
    with np.errstate(invalid="ignore", divide="ignore"):
        quaternions = np.where(norms == 0, identity, quaternions / norms)
    table = np.concatenate([means, quaternions, scales, np.clip(opacities, 0, 1)[:, None], np.clip(colors, 0, 1)], axis=1)
    with np.errstate(over="ignore"):
        table = table.astype(np.float32)
    keep = np.isfinite(table).all(axis=1)
    if not keep.any():
        raise InputError(f"{path}: none of its {count} Gaussians has finite numbers; it is not a usable splat file")
    if not keep.all():
        message = f"{path}: dropped {count - int(keep.sum())} of {count} Gaussians with numbers that are not finite"
        warnings.warn(message, RowsDropped, stacklevel=2)
        table = table[keep]
    tensor = torch.from_numpy(np.ascontiguousarray(table))
    means_, quaternions_, scales_, opacities_, colors_ = tensor.split([3, 4, 3, 1, 3], dim=1)
    return Gaussians(
        means=means_.contiguous(),
        quaternions=quaternions_.contiguous(),
        scales=scales_.contiguous(),
        opacities=opacities_[:, 0].contiguous(),
        colors=colors_.contiguous(),
    )
