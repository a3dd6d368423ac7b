"""What a prompt alone says of an object: kernel ridge regression from sentences to atlases, the mean of the prior that sampling corrects.

All atlases share one sphere, so a weighted mean of atlases is an object again: regression on them works as it does on aligned faces. It
is the posterior mean of a Gaussian process (Rasmussen and Williams 2006, equation 2.25) over unit sentence embeddings,

    mean(sentence) = k(sentence, keys) (K + noise / counts)^-1 targets

with a Gaussian kernel. On few objects this generalises better than a network, which learns their captions by heart. What is far from
every caption is drawn towards the nearest ones first, or the mean would fade to that of all objects; colours are left as they were
asked for, and made as strong as atlases are, for a mean is paler.

The targets are kept as quantised frequencies: an object in 7 kB instead of 131. Repainted copies of an object share its build.
"""

from __future__ import annotations

import lzma
import math
import os
from collections.abc import Callable

import torch
from torch import Tensor

from ..atlas import CHANNELS
from ..errors import InputError
from ..tensors import load_tensors, save_tensors
from .prior import cosine_transform

_FORMAT = "gaussian-atlas-regression-1"
# Channels of an atlas, see `generator.atlas.channels`: the second and third copy of the opacity are not kept.
_COLOUR = [4, 5, 6]
_BUILD = [0, 1, 2, 3, 8, 9, 10, 12, 13, 14, 15]
_OPACITY, _COPIES = 3, [7, 11]

MAX_CAPTIONS = 16_384  # of which a square matrix is kept, 1 GB

# Found on held-out objects and on prompts: see docs/decisions.md.
_WIDTH = 0.5  # of the kernel, as a distance of unit vectors
_NOISE = 0.2  # variance of an atlas about what its caption says, against that of all
_TEMPERATURE = 0.02  # of the similarities by which a sentence is drawn towards captions
_KEPT = 0.5  # weight of the sentence itself beside what it is drawn to
_LEAST_EXPLAINED = 0.2  # share of the variance that a sentence is taken to explain at least
_MOST_CONTRAST = 3.0
# Quantisation steps of normalised values. Places show at once; turns and extents of single splats are mostly noise.
_STEPS = torch.tensor([0.12] * 3 + [0.4] + [1.0] * 3 + [0.4] + [2.5] * 3 + [0.4] + [2.5] * 4)
_LEAST_DEVIATION = 0.5  # in steps: frequencies of less are not kept


class TextRegression:
    """Atlases by what they are called.

    Args:
        keys: [U, D], unit sentence embeddings of the captions.
        rows: [M] int64, the caption of each atlas.
        objects: [M] int64, whose build each atlas has.
        zone: [16, S, S] bool, the frequencies that are kept.
        steps: [16], one unit of the quantised frequencies.
        builds: [O, N] int16, of all channels but colours; N are those of the zone, in its order.
        colours: [M, N'] int16.
        layout_id: of the atlases.

    Raises:
        InputError: the parts do not fit each other, or a number is not finite.
    """

    def __init__(
        self, keys: Tensor, rows: Tensor, objects: Tensor, zone: Tensor, steps: Tensor, builds: Tensor, colours: Tensor, layout_id: str
    ) -> None:
        fits = (
            keys.ndim == 2
            and rows.ndim == 1
            and len(rows) > 0
            and 0 <= int(rows.min()) <= int(rows.max()) < len(keys)
            and objects.shape == rows.shape
            and 0 <= int(objects.min()) <= int(objects.max()) < len(builds)
            and zone.ndim == 3
            and zone.shape[0] == CHANNELS
            and steps.shape == (CHANNELS,)
            and zone.shape[1] == zone.shape[2]
            and builds.shape[1:] == (int(zone[_BUILD].sum()),)
            and colours.shape == (len(rows), int(zone[_COLOUR].sum()))
        )
        if fits and len(keys) > MAX_CAPTIONS:
            raise InputError(f"regression: {len(keys)} captions are more than {MAX_CAPTIONS}; with that much to learn, leave it out")
        # Of a file's rows no more is counted than it has captions.
        if not fits or not bool((counts := torch.bincount(rows, minlength=len(keys))).all()):
            raise InputError("regression: captions, atlases and frequencies do not fit each other")
        if not all(bool(torch.isfinite(part).all()) for part in (keys, steps)):
            raise InputError("regression: a number is not finite")
        self.keys, self.rows, self.objects, self.zone, self.steps = keys.float(), rows, objects, zone, steps.float()
        self.builds, self.colours, self.layout_id = builds, colours, layout_id
        self.size = zone.shape[-1]
        # An atlas's weight is its caption's over how many have that caption.
        self._shares = 1 / counts[rows]
        kernel = _kernel(self.keys, self.keys)
        kernel.diagonal().add_(_NOISE / counts)
        self._root = torch.linalg.cholesky(kernel)
        self._mean_build = _product(self._of_builds((self._shares / len(keys))[None]), builds)
        self._mean_colour = _product((self._shares / len(keys))[None], colours)

    def mean(self, sentences: Tensor, contrast: float = 1.0, varied: Tensor | None = None, chosen: Tensor | None = None) -> Tensor:
        """The normalised atlases to expect, [B, 16, S, S] float32 on the CPU.

        Args:
            sentences: [B, D], unit length.
            contrast: how far colours are carried back to the deviation that atlases have; 0 leaves them as pale as a mean is.
            varied: [B, U] of a standard Gumbel distribution. Added to the similarities it draws the sentence towards some of the likely
                captions by chance, so that seeds differ in more than noise.
            chosen: [B, O], one number for each object. Of the objects that share a caption those with higher ones count more, by a softmax;
                without it all count alike, and what is common to unlike things of one name has no clear shape.
        """
        shares = self._shares if chosen is None else self._chosen(chosen)
        similar = sentences @ self.keys.T / _TEMPERATURE
        near = torch.softmax(similar if varied is None else similar + varied, 1) @ self.keys
        near = _unit(_unit(near) + _KEPT * sentences)
        build_weights = self._solved(_kernel(near, self.keys))
        asked = _kernel(sentences, self.keys)
        colour_weights = self._solved(asked)
        explained = (asked * colour_weights).sum(1, keepdim=True).clamp(_LEAST_EXPLAINED, 1.0)
        strength = explained.pow(-contrast / 2).clamp_max(_MOST_CONTRAST)
        build = _product(self._of_builds(build_weights[:, self.rows] * shares), self.builds)
        build = build + (1 - build_weights.sum(1, keepdim=True)) * self._mean_build
        colour = _product(colour_weights[:, self.rows] * shares, self.colours)
        colour = self._mean_colour + strength * (colour - colour_weights.sum(1, keepdim=True) * self._mean_colour)
        values = torch.zeros(len(sentences), CHANNELS, self.size, self.size)
        values[:, _BUILD] = _spread(build, self.zone[_BUILD]) * self.steps[_BUILD, None, None]
        values[:, _COLOUR] = _spread(colour, self.zone[_COLOUR]) * self.steps[_COLOUR, None, None]
        values[:, _COPIES] = values[:, [_OPACITY]]
        return cosine_transform(self.size).T @ values @ _waves(self.size)

    def _solved(self, kernel: Tensor) -> Tensor:
        """Weights of the captions, [B, U]."""
        return torch.cholesky_solve(kernel.T, self._root).T

    def _chosen(self, numbers: Tensor) -> Tensor:
        """Weights of the atlases among those of their captions, [B, M], from numbers of the objects."""
        raised = torch.exp(numbers - numbers.amax(1, keepdim=True)).clamp_min(1e-20)[:, self.objects]
        return raised / torch.zeros(len(numbers), len(self.keys)).index_add_(1, self.rows, raised)[:, self.rows]

    def _of_builds(self, weights: Tensor) -> Tensor:
        """Weights of the objects, [B, O], from those of the atlases."""
        return torch.zeros(len(weights), len(self.builds)).index_add_(1, self.objects, weights)

    def save(self, path: str | os.PathLike) -> None:
        """Write a safetensors file; the frequencies are compressed."""
        tensors = {
            "keys": self.keys.half(),
            "rows": self.rows.int(),
            "objects": self.objects.int(),
            "zone": self.zone.to(torch.uint8),
            "steps": self.steps,
            "builds": _packed(self.builds),
            "colours": _packed(self.colours),
        }
        save_tensors(path, tensors, {"format": _FORMAT, "layout_id": self.layout_id, "objects": len(self.builds)})

    @classmethod
    def load(cls, path: str | os.PathLike) -> TextRegression:
        """Read what `save` wrote; raises InputError on anything else."""
        tensors, record = load_tensors(path)
        names = {"keys", "rows", "objects", "zone", "steps", "builds", "colours"}
        if record.get("format") != _FORMAT or tensors.keys() != names or not isinstance(record.get("objects"), int):
            raise InputError(f"{path}: not a regression of format {_FORMAT}")
        try:
            zone, rows = tensors["zone"].bool(), tensors["rows"].long()
            if zone.ndim != 3 or len(zone) != CHANNELS:
                raise ValueError("its zone is not one of 16 channels")
            if record["objects"] > len(rows):
                raise ValueError("more objects than rows that name them")
            builds = _unpacked(tensors["builds"], record["objects"], int(zone[_BUILD].sum()))
            colours = _unpacked(tensors["colours"], len(rows), int(zone[_COLOUR].sum()))
            objects, layout_id = tensors["objects"].long(), str(record.get("layout_id", ""))
            keys = _unit(tensors["keys"].float())
            return cls(keys, rows, objects, zone, tensors["steps"], builds, colours, layout_id)
        except (TypeError, ValueError, IndexError, RuntimeError, lzma.LZMAError) as error:
            raise InputError(f"{path}: the regression is damaged ({error})") from error


class RegressionBuilder:
    """A regression from atlases that come one after the other.

    Args:
        variances: [16, S, S], of the frequencies of normalised atlases, see `AtlasPrior.covariance`; those that would nearly always be
            nought are not kept.
        layout_id: of the atlases to come.
    """

    def __init__(self, variances: Tensor, layout_id: str) -> None:
        self.layout_id = layout_id
        self.steps = _STEPS
        self.zone = variances > (self.steps[:, None, None] * _LEAST_DEVIATION) ** 2
        self._captions: dict[str, int] = {}
        self._builds: dict[str, int] = {}
        self._rows: list[int] = []
        self._objects: list[int] = []
        self._quantised: tuple[list[Tensor], list[Tensor]] = ([], [])

    def add(self, values: Tensor, caption: str, build: str) -> None:
        """One normalised atlas [16, S, S]; of atlases with the same `build` all but the colours of the first are left out."""
        size = values.shape[-1]
        found = cosine_transform(size) @ values @ _waves(size).T / self.steps[:, None, None]
        found = found.round().clamp(-(2**15), 2**15 - 1).short()
        if build not in self._builds:
            self._quantised[0].append(found[_BUILD][self.zone[_BUILD]])
        self._quantised[1].append(found[_COLOUR][self.zone[_COLOUR]])
        self._objects.append(self._builds.setdefault(build, len(self._builds)))
        self._rows.append(self._captions.setdefault(caption, len(self._captions)))

    def result(self, embed: Callable[[list[str]], Tensor]) -> TextRegression:
        """The regression of what was added.

        Args:
            embed: called with a list of captions, gives their unit embeddings [U, D].

        Raises:
            InputError: nothing was added.
        """
        if not self._rows:
            raise InputError("there are no atlases to regress on")
        rows, objects = torch.tensor(self._rows), torch.tensor(self._objects)
        builds, colours = (torch.stack(each) for each in self._quantised)
        return TextRegression(embed(list(self._captions)), rows, objects, self.zone, self.steps, builds, colours, self.layout_id)


def variances_of(covariance: Tensor) -> Tensor:
    """The variances [16, S, S] of an atlas's real frequencies, from a prior's covariance [S, S / 2 + 1, 16, 16]."""
    size = len(covariance)
    return covariance.diagonal(dim1=-2, dim2=-1)[:, _turns(size)].permute(2, 0, 1)


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return torch.exp((2 - 2 * a @ b.T).clamp_min(0) / (-2 * _WIDTH**2))


def _product(weights: Tensor, quantised: Tensor) -> Tensor:
    """weights [B, M] float32 times [M, N] int16, of which only a part is turned to floats at a time."""
    return torch.cat([weights @ part.float() for part in quantised.split(4096, dim=1)], dim=1)


def _spread(values: Tensor, zone: Tensor) -> Tensor:
    """Values [B, N] at the N true places of a zone [C, S, S], noughts elsewhere."""
    spread = torch.zeros(len(values), *zone.shape)
    spread[:, zone] = values
    return spread


def _unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=-1)


def _turns(size: int) -> Tensor:
    """How often each row of `_waves` comes round."""
    return (torch.arange(size) + 1) // 2


def _waves(size: int) -> Tensor:
    """The orthonormal real Fourier transform as a matrix [size, size]: 1, cos, sin, cos, sin, ..."""
    angle = 2 * math.pi * _turns(size)[:, None] * torch.arange(size, dtype=torch.float64) / size
    odd = torch.arange(size)[:, None] % 2 == 1
    matrix = torch.where(odd, torch.cos(angle), torch.sin(angle)) * math.sqrt(2 / size)
    matrix[0] = math.sqrt(1 / size)
    if size % 2 == 0:
        matrix[-1] /= math.sqrt(2)
    return matrix.float()


def _packed(values: Tensor) -> Tensor:
    """int16 [A, B] compressed to uint8 [n]: one frequency of all objects after the other, low bytes before high ones."""
    # Signs go into the lowest bit, so that small numbers of both have a high byte of nought.
    folded = (values.T.int() << 1) ^ (values.T.int() >> 15)
    planes = torch.stack([folded & 255, folded >> 8 & 255]).to(torch.uint8)
    return torch.frombuffer(bytearray(lzma.compress(planes.numpy().tobytes(), preset=9)), dtype=torch.uint8)


def _unpacked(payload: Tensor, count: int, width: int) -> Tensor:
    """What `_packed` was given; raises ValueError where it is of another size, before more than that is allocated."""
    needed = 2 * count * width
    if payload.dtype != torch.uint8 or not 0 < needed < 2**31:
        raise ValueError("its frequencies are not compressed bytes, or too many")
    unzip = lzma.LZMADecompressor(memlimit=2**28)
    raw = unzip.decompress(payload.numpy().tobytes(), needed)
    # The end with its checksum is read only when something more is asked for.
    beyond = b"" if unzip.eof else unzip.decompress(b"", 1)
    if len(raw) != needed or beyond or not unzip.eof:
        raise ValueError(f"its frequencies are not {needed} bytes")
    low, high = torch.frombuffer(bytearray(raw), dtype=torch.uint8).reshape(2, width, count).short()
    folded = low.T | high.T << 8
    return (folded >> 1 & 0x7FFF ^ -(folded & 1)).contiguous()
