"""The objects that a model was trained on: the ceiling, the baseline and what a copy would be a copy of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor
from torch.nn.functional import normalize

from generator.atlas import Atlas, AtlasLayout, from_atlas
from generator.errors import InputError
from generator.gaussians import Gaussians
from generator.model.text import TextEncoder
from trainer.captions import recolour
from trainer.dataset import Sample, read_shards
from trainer.sources.captions import head_noun

from .judge import Looks, describe, draw, full_caption, protocol_cameras, stack
from .prompts import Prompt, plain_noun

_AGAIN = 40  # objects looked at a second time, to learn how near an object is to itself
_NEAR = 0.95  # of these, how many are nearer than what counts as a copy


@dataclass(frozen=True)
class Reference:
    """A real object that stands for a prompt."""

    object: str  # its id
    caption: str
    gaussians: Gaussians


class References:
    """Training objects out of shards.

    Args:
        views, size: pictures of each object and their side in pixels.

    Raises:
        InputError: there are no shards, one is damaged, or their layout is none of the stored ones.
    """

    def __init__(self, shards: str | Path, encoder: TextEncoder, views: int, size: int) -> None:
        self.encoder, self.views, self.size = encoder, views, size
        self.samples: list[Sample] = []
        self.layout = layout_of(shards)
        for sample, _ in read_shards(shards):
            # Half precision: that is how they are stored.
            self.samples.append(Sample(sample.id, sample.values.half(), sample.spec, sample.record))
        self.originals = [sample for sample in self.samples if sample.id == sample.record["object"]]

    def gaussians(self, sample: Sample) -> Gaussians:
        return from_atlas(Atlas(sample.values.float(), self.layout.id, sample.spec), self.layout)

    @cached_property
    def captions(self) -> frozenset[str]:
        """Everything that any of them is called."""
        return frozenset(caption for sample in self.samples for caption in sample.record["captions"])

    @cached_property
    def looks(self) -> Looks:
        """Of the originals."""
        return self._look(self.originals, 0)

    def fit(self, prompt: Prompt) -> Reference | None:
        """The fit of a real object that is what the prompt asks for, painted in its colour: the ceiling. None where there is none.

        Of objects with the prompt's noun as their name, else of those with the same head noun, the first by id.
        """
        named = [s for s in self.originals if prompt.noun in map(plain_noun, s.record["captions"])]
        named = named or [s for s in self.originals if head_noun(plain_noun(s.record["captions"][0])) == head_noun(prompt.noun)]
        if prompt.colour:
            # One without a main colour cannot be painted.
            named = [s for s in named if s.record.get("colour", "")]
        if not named:
            return None
        # One that has the colour already needs no paint.
        sample = min(named, key=lambda s: (s.record.get("colour", "") != prompt.colour, s.id))
        gaussians = self.gaussians(sample)
        if prompt.colour and sample.record.get("colour", "") != prompt.colour:
            gaussians = recolour(gaussians, sample.record.get("colour", ""), prompt.colour)
        return Reference(sample.id, full_caption(sample.record), gaussians)

    def retrieve(self, prompts: Sequence[Prompt]) -> list[Reference]:
        """For each prompt the training atlas whose caption is the most similar: the baseline. Repainted atlases take part."""
        texts = [full_caption(sample.record) for sample in self.samples]
        distinct = list(dict.fromkeys(texts))
        known = self.encoder.sentences(distinct)
        asked = self.encoder.sentences([prompt.text for prompt in prompts])
        found = []
        for row in (asked @ known.T).argmax(1).tolist():
            sample = self.samples[texts.index(distinct[row])]
            found.append(Reference(sample.record["object"], distinct[row], self.gaussians(sample)))
        return found

    def nearest(self, looks: Looks) -> tuple[list[str], Tensor]:
        """For each of N objects the original that looks most like it, and how far it is [N]: cosine distance of the mean features."""
        distances = 1 - _directions(looks) @ _directions(self.looks).T
        least = distances.min(1)
        return [self.originals[row].id for row in least.indices.tolist()], least.values

    def distances(self) -> dict:
        """What distances mean: the median of an original to its nearest other one, and of one to itself seen from other sides.

        `copy` is what 95 % of the latter stay below: an object nearer than that to an original might as well be it.
        """
        directions = _directions(self.looks)
        between = 1 - directions @ directions.T
        between.fill_diagonal_(float("inf"))
        again = _directions(self._look(self.originals[:_AGAIN], 10_000))
        itself = 1 - (again * directions[: len(again)]).sum(1)
        return {
            "between_objects": round(between.min(1).values.median().item(), 4) if len(directions) > 1 else None,
            "same_object": round(itself.median().item(), 4),
            "copy": round(itself.quantile(_NEAR).item(), 4),
        }

    def _look(self, samples: list[Sample], seed: int) -> Looks:
        cameras = (protocol_cameras(self.views, self.size, seed + index) for index in range(len(samples)))
        return stack([describe(*draw(self.gaussians(sample), view)) for sample, view in zip(samples, cameras, strict=True)])


def _directions(looks: Looks) -> Tensor:
    return normalize(looks.features.mean(1), dim=1)


def layout_of(shards: str | Path) -> AtlasLayout:
    """The stored layout that a folder of shards was made with.

    Raises:
        InputError: there are no shards, or theirs is none of the stored ones.
    """
    from generator.atlas.layout import PROJECTIONS

    sample, identity = next(iter(read_shards(shards)))
    size = sample.values.shape[-1]
    for projection in PROJECTIONS:
        try:
            layout = AtlasLayout.load_default(size, projection)
        except InputError:
            continue
        if layout.id == identity:
            return layout
    raise InputError(f"{shards} has layout {identity}, which is none of the stored ones of {size} x {size} cells")
