"""What is remembered on a machine: prompts and speeds."""

from __future__ import annotations

import json

import pytest


@pytest.fixture
def history(extension):
    return extension("blender_addon.history")


@pytest.fixture
def vocabulary(extension):
    return extension("generator.vocabulary")


def test_prompts_are_newest_first_once_each_and_bounded(history, tmp_path):
    path = tmp_path / "new" / "history.json"
    assert history.read(path) == history.History()
    for number in range(history.PROMPTS_MAX + 20):
        history.add_prompt(path, f"chair {number}")
    history.add_prompt(path, "  chair   60 ")
    history.add_prompt(path, "   ")
    prompts = history.read(path).prompts
    assert prompts[:2] == ("chair 60", f"chair {history.PROMPTS_MAX + 19}")
    assert len(prompts) == len(set(prompts)) == history.PROMPTS_MAX


def test_speeds_and_prompts_keep_each_other(history, tmp_path):
    path = tmp_path / "history.json"
    history.add_speed(path, "model cpu", 10, True, {"load": 3.0, "sample": 4.0})
    history.add_prompt(path, "a lamp")
    history.add_speed(path, "model cpu", 10, False, {"load": 0.0, "sample": 4.0})
    stored = history.read(path)
    assert stored.prompts == ("a lamp",)
    assert stored.speeds["model cpu"].load == 3.0, "a model that was in memory says nothing of loading"
    assert stored.speeds["model cpu"].step == pytest.approx((0.2 + 0.4) / 2)
    history.clear_prompts(path)
    assert history.read(path) == history.History((), stored.speeds)
    for number in range(history.SPEEDS_MAX + 5):
        history.add_speed(path, f"model {number}", 1, False, {"load": 1.0, "sample": 1.0})
    assert len(history.read(path).speeds) == history.SPEEDS_MAX and "model cpu" not in history.read(path).speeds


@pytest.mark.parametrize("text", ["", "{", "[]", '{"prompts": 3}', '{"prompts": ["a"], "speeds": {"x": {}}}', "\x00\xff"])
def test_a_damaged_file_counts_as_empty_and_is_replaced(history, tmp_path, text):
    path = tmp_path / "history.json"
    path.write_text(text, encoding="latin-1")
    assert history.read(path) == history.History()
    history.add_prompt(path, "a chair")
    assert history.read(path).prompts == ("a chair",)


def test_a_crash_while_writing_keeps_the_old_file(history, tmp_path, monkeypatch):
    path = tmp_path / "history.json"
    history.add_prompt(path, "a chair")

    def crash(self, text, **options):
        with open(self, "w") as file:
            file.write(text[:10])
        raise KeyboardInterrupt

    monkeypatch.setattr(type(path), "write_text", crash)
    with pytest.raises(KeyboardInterrupt):
        history.add_prompt(path, "a lamp")
    monkeypatch.undo()
    assert history.read(path).prompts == ("a chair",)
    assert [file.name for file in tmp_path.iterdir()] == ["history.json"]
    json.loads(path.read_text())


def test_what_another_blender_wrote_is_kept(history, tmp_path):
    path = tmp_path / "history.json"
    history.add_prompt(path, "mine")
    history.read(path)
    path.write_text(json.dumps({"prompts": ["theirs", "mine"], "speeds": {}}))
    history.add_prompt(path, "mine again")
    assert history.read(path).prompts == ("mine again", "theirs", "mine")


# The vocabulary


@pytest.mark.parametrize(
    ("prompt", "told", "near"),
    [
        ("a red armchair", False, ()),
        ("Two ARMCHAIRS, please", False, ()),
        ("a sofa bed", False, ()),
        ("", False, ()),
        ("a red armchiar", True, ("armchair",)),
        ("a sofa", True, ("sofa bed",)),
        ("a dragon", True, ()),
        ("a small red", True, ()),
    ],
)
def test_unknown_objects_are_told_with_known_ones_that_are_spelled_alike(vocabulary, prompt, told, near):
    text = vocabulary.hint(prompt, ("armchair", "sofa bed", "pot", "bed"))
    assert bool(text) is told
    assert all(word in text for word in near)
    assert vocabulary.hint(prompt, ()) == "", "a model that does not say what it knows gives no hint"


def test_the_last_word_is_completed(vocabulary):
    known = ("armchair", "bar chair", "lamp", "wheelchair")
    assert vocabulary.suggestions("a red chair", known) == ["a red armchair", "a red bar chair", "a red wheelchair"]
    assert vocabulary.suggestions("la", known) == ["lamp"]
    assert vocabulary.suggestions("a", known) == vocabulary.suggestions("", known) == []
