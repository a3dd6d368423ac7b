"""What a Gaussian knows of atlases: the network corrects its estimate instead of seeing and painting the whole atlas itself.

The values of neighbouring cells are alike, in every channel and between channels, so a noisy atlas can be cleaned a good deal by a linear
filter alone. With the atlases' own covariance that filter (Wiener 1949) is the posterior mean under a Gaussian of that covariance, the best
that is linear. It takes what EDM's c_in, c_skip and c_out are in Karras et al. 2022, table 1, where the Gaussian is white:

    estimate(x) = filtered(x) + error network(filtered(x) / spread)

At low noise the filter gives the atlas back, so a narrow network need not carry it; at high noise it averages over all the cells that
belong together, which a network of small kernels does not reach in its first layers.
"""

from __future__ import annotations

import math
import os
from typing import NamedTuple

import torch
from torch import Tensor

from ..atlas import CHANNELS
from ..errors import InputError
from ..tensors import load_tensors, save_tensors

_FORMAT = "gaussian-atlas-prior-1"
# Below this share of the noise the atlas is as good as clean; keeps divisions finite.
_LEAST_VARIANCE = 1e-8


class Filtered(NamedTuple):
    """What a prior knows of clean atlases from noisy ones."""

    mean: Tensor  # [B, 16, H, W], of the posterior
    image: Tensor  # [B, 16, H, W], what the network sees: the mean at unit variance in each channel, also where there is no signal
    error: Tensor  # [B, 16, 1, 1], deviation of clean atlases from the mean

    def corrected(self, output: Tensor) -> Tensor:
        """The clean atlases that the network's output [B, 16, H, W] means."""
        return self.mean + self.error * output


class AtlasPrior:
    """A Gaussian over normalised atlases, the same wherever one looks: its covariance is one 16 x 16 matrix for each frequency.

    Frequencies are those of a cosine transform along latitude, which ends at the poles, and of a Fourier transform along longitude, which
    comes round. Of the matrices only the real part is kept: an atlas and its mirror image are taken to be equally likely.

    Args:
        covariance: [H, W / 2 + 1, 16, 16] real, symmetric, positive semi-definite.
        layout_id: of the atlases it was computed from.

    Raises:
        InputError: the shape is not that, or a number is not finite.
    """

    def __init__(self, covariance: Tensor, layout_id: str) -> None:
        shape = tuple(covariance.shape)
        if len(shape) != 4 or not shape[0] or shape[1] != shape[0] // 2 + 1 or shape[2:] != (CHANNELS, CHANNELS):
            raise InputError(f"prior: the covariance has shape {list(shape)}, needed is [size, size / 2 + 1, {CHANNELS}, {CHANNELS}]")
        if not bool(torch.isfinite(covariance).all()):
            raise InputError("prior: the covariance contains NaN or infinity")
        self.covariance = covariance.float().cpu()
        self.layout_id = layout_id
        self.size = shape[0]
        variances, axes = torch.linalg.eigh(self.covariance.flatten(0, 1).double())
        self._variances = variances.clamp_min(0).float()  # [H F, 16] along the axes
        self._axes = axes.float()  # [H F, 16, 16], columns are axes
        self._cosines = cosine_transform(self.size)
        # Every column of the half spectrum but the first and the last stands for two.
        counts = torch.full((shape[1],), 2.0)
        counts[0] = 1.0
        if self.size % 2 == 0:
            counts[-1] = 1.0
        # What the variance along each axis adds to that of each channel: [H F 16, 16].
        shares = axes.float().square().mT * (counts / self.size**2).repeat(self.size)[:, None, None]
        self._shares = shares.flatten(0, 1)

    def to(self, device: torch.device | str) -> AtlasPrior:
        """Itself, for tensors on that device."""
        for name in ("_variances", "_axes", "_cosines", "_shares"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def filter(self, x: Tensor, alpha: Tensor, sigma: Tensor, damping: Tensor | None = None) -> Filtered:
        """What is known of clean atlases from x = alpha clean + sigma noise.

        Args:
            x: [B, 16, H, W] float32.
            alpha: [B], or one for all; 0 is allowed.
            sigma: likewise.
            damping: [H, F], see `damping`; the mean is then what it would be if so much less were expected of each frequency. What the
                network sees, and what it corrects by, stay.
        """
        signal, noise = (value.reshape(-1, 1, 1).square() for value in (alpha, sigma.clamp_min(math.sqrt(_LEAST_VARIANCE))))
        gain = self._variances / (signal * self._variances + noise)  # [B, H F, 16]
        spread, error = ((scale * gain).flatten(1) @ self._shares for scale in (self._variances, noise))
        spread, error = (value.clamp_min(_LEAST_VARIANCE).sqrt()[..., None, None] for value in (spread, error))
        along = self._along(x)
        seen = self._across(along, gain)
        mean = seen
        if damping is not None:
            expected = self._variances * damping.reshape(-1, 1).to(self._variances)
            mean = self._across(along, expected / (signal * expected + noise))
        return Filtered(alpha.reshape(-1, 1, 1, 1) * mean, seen / spread, error)

    def _along(self, x: Tensor) -> Tensor:
        """[B, 16, H, W] along the axes of each frequency: [H F, 16, B, 2], real and imaginary parts last."""
        z = torch.view_as_real(torch.fft.rfft(self._cosines @ x, norm="ortho"))
        z = z.permute(2, 3, 1, 0, 4).reshape(-1, CHANNELS, 2 * len(x))
        return (self._axes.mT @ z).unflatten(-1, (-1, 2))

    def _across(self, along: Tensor, gain: Tensor) -> Tensor:
        """The inverse of `_along` after factors [B or 1, H F, 16] on each axis."""
        z = self._axes @ (along * gain.permute(1, 2, 0)[..., None]).flatten(-2)
        z = z.reshape(self.size, -1, CHANNELS, along.shape[2], 2).permute(3, 2, 0, 1, 4)
        return self._cosines.mT @ torch.fft.irfft(torch.view_as_complex(z.contiguous()), n=self.size, norm="ortho")

    def save(self, path: str | os.PathLike) -> None:
        """Write a safetensors file with the layout id as its record."""
        save_tensors(path, {"covariance": self.covariance}, {"format": _FORMAT, "layout_id": self.layout_id})

    @classmethod
    def load(cls, path: str | os.PathLike) -> AtlasPrior:
        """Read what `save` wrote; raises InputError on anything else."""
        tensors, record = load_tensors(path)
        if record.get("format") != _FORMAT or tensors.keys() != {"covariance"}:
            raise InputError(f"{path}: not a prior of format {_FORMAT}")
        try:
            return cls(tensors["covariance"], record.get("layout_id", ""))
        except (InputError, RuntimeError) as error:  # torch, of numbers that are not real
            raise InputError(f"{path}: {error}") from error


class PriorAccumulator:
    """Running sum of the covariances of normalised atlases.

    Args:
        layout_id: of the atlases to come.
    """

    def __init__(self, layout_id: str) -> None:
        self.layout_id = layout_id
        self.count = 0
        self._sum: Tensor | None = None

    def update(self, values: Tensor) -> None:
        """Add normalised atlases [B, 16, size, size]."""
        cosines = cosine_transform(values.shape[-2]).to(values)
        z = torch.fft.rfft(torch.einsum("kh,bchw->bckw", cosines, values), norm="ortho")
        found = torch.einsum("bckw,bdkw->kwcd", z, z.conj()).real.double()
        self._sum = found if self._sum is None else self._sum + found
        self.count += len(values)

    def result(self) -> AtlasPrior:
        """The prior of what was added; raises InputError where nothing was."""
        if self._sum is None:
            raise InputError("there are no atlases to take a prior from")
        return AtlasPrior((self._sum / self.count).float(), self.layout_id)


def damping(size: int, above: float, variance: float) -> Tensor:
    """Factors [size, size / 2 + 1] on a prior's variances for sampling: 1 up to a frequency, in turns round the atlas, `variance` beyond.

    What the network does not know of the fine structure, the prior makes up at random: splats that stand off their surface like fur. With
    less expected of these frequencies they are left smooth, but for what the network adds.
    """
    return torch.where(_frequencies(size) <= above, 1.0, float(variance))


def quieter(noise: Tensor, above: float, deviation: float) -> Tensor:
    """Noise [16, H, W] with that share of its deviation at frequencies up to `above`, in turns round the atlas.

    There lie an object's build and its colours as a whole. Begun with less of it, sampling comes to what is more typical of the prompt, and
    objects of different seeds are more alike (the truncation trick, Brock et al. 2019, section 3.1).
    """
    cosines = cosine_transform(noise.shape[-2])
    low = torch.fft.rfft(cosines @ noise, norm="ortho") * (_frequencies(noise.shape[-2]) <= above)
    return noise - (1 - deviation) * (cosines.mT @ torch.fft.irfft(low, n=noise.shape[-1], norm="ortho"))


def _frequencies(size: int) -> Tensor:
    """[size, size / 2 + 1], in turns round the atlas; a row of the cosine transform is half a turn from pole to pole."""
    return torch.hypot(torch.arange(size)[:, None] / 2, torch.arange(size // 2 + 1)[None].float())


def cosine_transform(size: int) -> Tensor:
    """The orthonormal DCT-II as a matrix [size, size]."""
    steps = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi * (steps[None] + 0.5) * steps[:, None] / size) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix.float()
