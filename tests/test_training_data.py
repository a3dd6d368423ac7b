"""Atlases read from shards at their place, and features of captions: against reading everything in order."""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from generator.atlas import Atlas, AtlasLayout, NormalizationAccumulator
from generator.errors import InputError
from generator.model.text import TextEncoder
from trainer import dataset
from trainer.dataset import read_shards, write_shards
from trainer.evaluate.references import layout_of
from trainer.training_data import CaptionFeatures, ShardedAtlases, from_shards

ROOT = Path(__file__).resolve().parent.parent
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


def members(**others: object) -> dict[str, bytes]:
    """What a shard of one atlas holds; others add to its record."""
    record = {"captions": ["a chair"], "object": "chair"} | others
    return {"chair.json": json.dumps(record).encode(), "chair.safetensors": Atlas(torch.zeros(16, 32, 32), LAYOUT.id).encode(torch.float16)}


def tar(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def both_refuse(path: Path, normalization, message: str) -> None:
    for read in (lambda: list(read_shards(path.parent)), lambda: ShardedAtlases(path.parent, normalization)):
        with pytest.raises(InputError, match=message) as caught:
            read()
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_path_is_a_file_whatever_it_is_called(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = tar(tmp_path / "pipe:touch owned;.tar", members()).name
    assert [sample.id for sample, _ in read_shards(name)] == ["chair"]
    assert not (tmp_path / "owned;.tar").exists() and not (tmp_path / "owned").exists(), "a name is no command"
    tar(tmp_path / "run{a,b}" / "atlases-000000.tar", members())
    assert [sample.id for sample, _ in read_shards(tmp_path / "run{a,b}")] == ["chair"]


def test_a_compressed_shard_is_refused_before_it_expands(tmp_path, normalization):
    path = tar(tmp_path / "s" / "atlases-000000.tar", {"chair.safetensors": bytes(64 * 2**20)}, "w:gz")
    assert path.stat().st_size < 2**20
    both_refuse(path, normalization, "is damaged")


@pytest.mark.parametrize(
    "record,reason",
    [
        (b"[1]", "the record of chair has no captions"),
        (b"null", "the record of chair has no captions"),
        (b'{"object": "chair"}', "the record of chair has no captions"),
        (b'{"captions": []}', "the record of chair has no captions"),
        (b'{"captions": "a chair"}', "the record of chair has no captions"),
        (b'{"captions": ["a chair", 3]}', "the record of chair has no captions"),
        (b'{"captions": ["a chair"], "object": 7}', "the record of chair names no object"),
        (b"{", "is damaged"),
        (b"[" * 100_000, "is damaged"),
        (None, "chair has no record"),
    ],
)
def test_records_of_a_wrong_shape_are_named(tmp_path, normalization, record, reason):
    files = {"chair.safetensors": members()["chair.safetensors"]} | ({} if record is None else {"chair.json": record})
    both_refuse(tar(tmp_path / "s" / "atlases-000000.tar", files), normalization, reason)


def test_shards_without_an_atlas_and_of_another_layout_are_named(tmp_path, normalization):
    first = tmp_path / "s" / "atlases-000000.tar"
    both_refuse(tar(first, {}), normalization, "it holds no atlas")
    with pytest.raises(InputError, match="it holds no atlas"):
        layout_of(first.parent)
    both_refuse(tar(first, {"chair.json": members()["chair.json"]}), normalization, "chair has no atlas")
    tar(first, members())
    lamp = {"lamp.json": members()["chair.json"], "lamp.safetensors": Atlas(torch.zeros(16, 64, 64), "another").encode()}
    tar(tmp_path / "s" / "atlases-000001.tar", lamp)
    with pytest.raises(InputError, match="atlases-000001.tar: lamp has another layout"):
        list(read_shards(tmp_path / "s"))
    with pytest.raises(InputError, match="atlases-000001.tar: lamp has another layout"):
        ShardedAtlases(tmp_path / "s", normalization)[[1]]


def test_headers_that_lie_cost_nothing_and_no_sample_is_lost_silently(tmp_path, normalization):
    path = tmp_path / "s" / "atlases-000000.tar"
    good = tar(path, members() | {name.replace("chair", "lamp"): content for name, content in members().items()}).read_bytes()

    def header(offset: int, **values: object) -> bytes:
        info = tarfile.TarInfo.frombuf(good[offset : offset + 512], "utf-8", "strict")
        for name, value in values.items():
            setattr(info, name, value)
        return good[:offset] + info.tobuf(tarfile.GNU_FORMAT) + good[offset + 512 :]

    with tarfile.open(path) as archive:
        second = archive.getmember("lamp.json").offset
    for lie in (
        header(0, size=10**13),
        header(0, size=-512),
        header(0, size=10**13, type=tarfile.GNUTYPE_LONGNAME),
        header(0, size=10**13, type=tarfile.XHDTYPE),
        header(second, type=tarfile.GNUTYPE_SPARSE),
        good[:second] + bytes([255]) * 512 + good[second + 512 :],  # a header that is none
        good[:second],  # cut between two members
    ):
        path.write_bytes(lie)
        both_refuse(path, normalization, "is damaged")


def test_a_rewrite_that_is_killed_leaves_whole_shards_or_a_folder_that_is_refused(tmp_path, normalization, monkeypatch):
    """Killed at every file that it makes, renames or removes, by a process that ends at once there."""
    script = """if True:
    import os, sys
    from pathlib import Path
    import torch
    from generator.atlas import Atlas
    from tests.test_training_data import LAYOUT
    from trainer import dataset
    dataset.ATLASES_PER_SHARD = 1
    last, count = int(sys.argv[2]), 0
    def killing(work):
        def counted(*arguments, **options):
            global count
            count += 1
            if count == last:
                os._exit(9)
            return work(*arguments, **options)
        return counted
    for name in ("replace", "unlink", "touch"):
        setattr(Path, name, killing(getattr(Path, name)))
    dataset.write_shards([(f"o{i}", Atlas(torch.ones(16, 32, 32), LAYOUT.id), {"captions": ["a"]}) for i in range(2)], sys.argv[1])
    """
    monkeypatch.setattr(dataset, "ATLASES_PER_SHARD", 1)
    refused = 0
    for last in range(1, 20):
        write_shards([(f"o{i}", Atlas(torch.zeros(16, 32, 32), LAYOUT.id), {"captions": ["a"]}) for i in range(2)], tmp_path)
        ended = subprocess.run([sys.executable, "-c", script, str(tmp_path), str(last)], cwd=ROOT).returncode
        try:
            values = {float(sample.values.mean()) for sample, _ in read_shards(tmp_path)}
            assert len(values) == 1, "old and new atlases in one set"
            whole = ShardedAtlases(tmp_path, normalization)
            assert len(whole) == 2
        except InputError as error:
            assert "holds old and new shards" in str(error)
            refused += 1
        if ended == 0:
            break
    assert ended == 0 and refused > 1 and not list(tmp_path.glob("*.partial"))
