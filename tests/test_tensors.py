"""Tensors with one record: the same bytes every time, files of other writers, damaged files."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from generator.errors import InputError
from generator.tensors import decode_tensors, encode_tensors, load_tensors, save_tensors

TENSORS = {"wide": torch.arange(6.0).reshape(2, 3), "odd": torch.tensor([1, 2, 3], dtype=torch.uint8), "turned": torch.eye(3)[:, :2].T}
RECORD = {"format": "x-1", "size": 3, "name": "caf\u00e9", "names": ["a", "b"], "nested": {"share": 0.1}, "z": None}


def test_the_same_content_is_the_same_bytes():
    # With several entries of metadata, safetensors itself gives a different order nearly every time.
    assert len({encode_tensors(dict(reversed(TENSORS.items())), RECORD) for _ in range(20)}) == 1


def test_round_trip_leaves_nothing_beside_it(tmp_path):
    save_tensors(tmp_path / "a.safetensors", TENSORS, RECORD)
    tensors, record = load_tensors(tmp_path / "a.safetensors")
    assert record == RECORD and tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], TENSORS[name]) and tensors[name].dtype == TENSORS[name].dtype for name in TENSORS)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("metadata", [None, {"format": "x-1", "size": "64"}])
def test_plain_metadata_is_the_record_of_other_files(tmp_path, metadata):
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors", metadata)
    tensors, record = load_tensors(tmp_path / "a.safetensors")
    assert record == (metadata or {}) and torch.equal(tensors["a"], torch.ones(2))


def test_damaged_files_are_named(tmp_path):
    whole = encode_tensors(TENSORS, RECORD)
    save_file({"a": torch.ones(2)}, tmp_path / "list.safetensors", {"record": "[]"})
    save_file({"a": torch.ones(2)}, tmp_path / "broken.safetensors", {"record": "{"})
    save_file({"a": torch.ones(2)}, tmp_path / "brackets.safetensors", {"record": "[" * 100_000})
    # Kinds of numbers that torch does not know.
    unknown = b'{"a":{"dtype":"F8_E8M0","shape":[2],"data_offsets":[0,2]}}'
    (tmp_path / "unknown.safetensors").write_bytes(len(unknown).to_bytes(8, "little") + unknown + bytes(2))
    contents = {"short": whole[:-4], "header": whole[:20], "empty": b"", "text": b"no tensors here, only text", "long": b"\xff" * 64}
    for name, content in contents.items():
        (tmp_path / f"{name}.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match="."):
            decode_tensors(content)
    for name in (*contents, "list", "broken", "brackets", "unknown", "absent"):
        with pytest.raises(InputError, match=rf"{name}\.safetensors"):
            load_tensors(tmp_path / f"{name}.safetensors")
    with pytest.raises(InputError, match="missing"):
        save_tensors(tmp_path / "missing" / "a.safetensors", TENSORS, RECORD)
