"""Atlases read from shards at their place, and features of captions: against reading everything in order."""

from __future__ import annotations

import random

import pytest
import torch

from generator.atlas import Atlas, AtlasLayout, NormalizationAccumulator
from generator.errors import InputError
from generator.model.text import TextEncoder
from trainer import dataset
from trainer.dataset import read_shards, write_shards
from trainer.training_data import CaptionFeatures, ShardedAtlases, from_shards

LAYOUT = AtlasLayout.load_default(32)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Seven atlases in three shards, one id with a dot in its name's place of one without."""
    folder = tmp_path_factory.mktemp("shards")
    generator = torch.Generator().manual_seed(0)

    def samples():
        for i in range(7):
            values = torch.randn(16, 32, 32, generator=generator)
            yield f"thing-{i}", Atlas(values, LAYOUT.id), {"captions": [f"a thing {i}", "a thing"], "object": f"thing-{i % 5}"}

    before, dataset.ATLASES_PER_SHARD = dataset.ATLASES_PER_SHARD, 3
    try:
        assert len(write_shards(samples(), folder)) == 3
    finally:
        dataset.ATLASES_PER_SHARD = before
    return folder


@pytest.fixture(scope="module")
def normalization(shards):
    accumulator = NormalizationAccumulator(LAYOUT.id)
    for sample, _ in read_shards(shards):
        accumulator.update(sample.values)
    return accumulator.result("cell")


def test_any_order_gives_what_reading_in_order_gives(shards, normalization):
    expected = [normalization.normalize(sample.values) for sample, _ in read_shards(shards)]
    atlases = ShardedAtlases(shards, normalization)
    assert len(atlases) == 7 and [record["object"] for record in atlases.records[:2]] == ["thing-0", "thing-1"]
    rows = [random.Random(0).randrange(7) for _ in range(30)]
    assert torch.equal(atlases[rows], torch.stack([expected[row] for row in rows]))


def test_captions_of_shards_and_their_features(shards, normalization):
    encoder = TextEncoder.default()
    found = from_shards(shards, normalization, encoder, LAYOUT)
    assert found.captions[0] == [0, 1] and found.captions[1] == [2, 1], "equal captions are one row"
    torch.testing.assert_close(found.features[[2, 1, 2]], encoder.encode(["a thing 1", "a thing", "a thing 1"]).hidden, atol=2e-3, rtol=0)
    assert found.unconditional.shape == (32, 384) and not found.unconditional.any()
    assert found.decoding.layout is LAYOUT and found.text_width == 384


def test_features_beyond_what_is_kept_are_made_again_and_stay_the_same():
    class Counting:
        config, width = TextEncoder.default().config, 384
        asked: list[str] = []

        def encode(self, prompts):
            self.asked += prompts
            return TextEncoder.default().encode(prompts)

    encoder = Counting()
    features = CaptionFeatures(encoder, ["a", "b", "c", "d"], keep=2 * 2 * 32 * 384)
    first = features[[0, 1]]
    assert torch.equal(features[[1, 0, 1]], first[[1, 0, 1]]) and encoder.asked == ["a", "b"]
    features[[2, 3]]
    assert torch.equal(features[[0, 1]], first) and encoder.asked == ["a", "b", "c", "d", "a", "b"]
    assert len(features[[0, 1, 2, 3]]) == 4, "a batch may be larger than what is kept"


def test_damaged_and_foreign_shards_are_named(shards, normalization, tmp_path):
    with pytest.raises(InputError, match="no atlases-"):
        ShardedAtlases(tmp_path, normalization)
    path = tmp_path / "atlases-000000.tar"
    whole = (shards / path.name).read_bytes()
    path.write_bytes(whole[: len(whole) // 2 + 100])
    with pytest.raises(InputError, match="is damaged"):
        ShardedAtlases(tmp_path, normalization)
    path.write_bytes(whole)
    atlases = ShardedAtlases(tmp_path, normalization)
    path.write_bytes(whole[:5000])
    with pytest.raises(InputError, match="ends early"):
        atlases[[2]]
    other = NormalizationAccumulator("another")
    other.update(torch.randn(2, 16, 32, 32))
    with pytest.raises(InputError, match="layout .* the statistics another"):
        ShardedAtlases(shards, other.result("channel"))


def test_an_atlas_that_is_damaged_inside_a_whole_shard_is_named(shards, normalization, tmp_path):
    """The tar is as it was, a letter of the atlas's own header is not."""
    for path in shards.glob("*.tar"):
        (tmp_path / path.name).write_bytes(path.read_bytes().replace(b'"values"', b'"v\\lues"'))
    with pytest.raises(InputError, match=r"atlases-000000\.tar is damaged"):
        ShardedAtlases(tmp_path, normalization)[[0]]
