"""The page that asks which of two methods is better, and the count of its votes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from generator.errors import InputError
from tests.test_judge import ellipsoid
from trainer.__main__ import COMMANDS, main
from trainer.evaluate.blind import count, text, wilson, write_page
from trainer.evaluate.made import Made
from trainer.evaluate.prompts import own_prompts

PROMPTS = [f"a ball number {word}" for word in ("one", "two", "three", "four", "five", "six", "<b>")]


def made(colour: str, prompts: list[str]) -> list[Made]:
    return [Made(prompt, 0, ellipsoid("ball", colour, 0, 100)) for prompt in own_prompts(prompts)]


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("blind")
    assert write_page(folder, ("secret red", "secret blue"), made("red", PROMPTS), made("blue", PROMPTS[::-1] + ["only blue"])) == 7
    return folder


def vote(folder: Path, voter: str, choices: dict[int, str]) -> Path:
    key = json.loads((folder / "key.json").read_text())
    path = folder / f"votes-{voter}-{len(choices)}.json"
    votes = [{"pair": pair, "choice": choice} for pair, choice in choices.items()]
    path.write_text(json.dumps({"page": key["page"], "voter": voter, "votes": votes}))
    return path


def test_the_page_does_not_say_which_is_which(page):
    content, key = (page / "blind.html").read_text(), json.loads((page / "key.json").read_text())
    assert "secret" not in content and "http" not in content
    assert sorted(key["prompts"]) == sorted(PROMPTS) and "only blue" not in content
    assert "<b>" not in content and "&lt;b&gt;" in content
    assert sorted(key["left"]) == [0, 0, 0, 0, 1, 1, 1], "each method is on the left as often as the other"


def test_the_key_tells_which_picture_is_whose(page):
    import base64
    import io

    import numpy as np
    from PIL import Image

    content, key = (page / "blind.html").read_text(), json.loads((page / "key.json").read_text())
    for pair, section in enumerate(content.split("<section")[1:]):
        data = re.findall(r"base64,([A-Za-z0-9+/=]+)", section)
        means = [np.asarray(Image.open(io.BytesIO(base64.b64decode(one)))).reshape(-1, 3).mean(0) for one in data]
        is_red = [mean[0] > mean[2] for mean in means]
        assert is_red == [key["left"][pair] == 0, key["left"][pair] == 1]


def test_votes_go_to_the_method_on_the_side_that_was_chosen(page):
    left = json.loads((page / "key.json").read_text())["left"]
    for_red = {pair: "left" if side == 0 else "right" for pair, side in enumerate(left)}
    files = [vote(page, "anna", for_red), vote(page, "ben", {0: "same", 1: for_red[1], 2: "left" if for_red[2] == "right" else "right"})]
    found = count(page / "key.json", files)
    assert (found.methods, found.voters, found.wins, found.same) == (("secret red", "secret blue"), 2, (8, 1), 1)
    assert found.rate == pytest.approx(8 / 9) and found.interval == wilson(8, 9)
    assert "secret red is preferred in 88.9%" in text(found)
    # A later file of the same voter replaces what it holds again.
    again = vote(page, "anna", {0: "same"})
    assert count(page / "key.json", [*files, again]).wins == (7, 1)


def test_the_interval_is_wilsons():
    # Wilson's interval solves (share - p)^2 = z^2 p (1 - p) / n for p.
    for successes, trials in ((8, 9), (0, 5), (50, 100)):
        for bound in wilson(successes, trials):
            assert (successes / trials - bound) ** 2 == pytest.approx(1.959964**2 * bound * (1 - bound) / trials, abs=1e-9)
    assert wilson(0, 0) == (0.0, 1.0)


def test_votes_of_another_page_or_kind_are_refused(page, tmp_path, capsys):
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"page": "another", "votes": []}))
    with pytest.raises(InputError, match="was not cast on the page"):
        count(page / "key.json", [other])
    for choice, pair in (("middle", 0), ("left", 99), ("left", "0")):
        with pytest.raises(InputError, match="a vote that the page cannot give"):
            count(page / "key.json", [vote(page, "x", {pair: choice})])
    with pytest.raises(InputError, match="is no key"):
        count(other, [other])
    assert main(["votes", str(page / "key.json"), str(tmp_path / "missing.json")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "votes",
    [
        5,
        None,
        {},
        [1],
        [[]],
        [{"pair": True, "choice": "left"}],
        [{"pair": 0}],
        [{"pair": 0, "choice": ["left"]}],
        [{"pair": 0.0, "choice": "left"}],
    ],
)
def test_votes_of_a_wrong_shape_are_one_line(page, tmp_path, votes):
    path = tmp_path / "votes.json"
    path.write_text(json.dumps({"page": json.loads((page / "key.json").read_text())["page"], "voter": "x", "votes": votes}))
    with pytest.raises(InputError, match="votes.json holds (a vote that the page cannot give|no list of votes)"):
        count(page / "key.json", [path])


def test_keys_and_votes_that_are_none_are_one_line(page, tmp_path):
    path = tmp_path / "votes.json"
    for content in ("[" * 100_000, "[1]", "{"):
        path.write_text(content)
        with pytest.raises(InputError, match="votes.json: "):
            count(page / "key.json", [path])
    key = json.loads((page / "key.json").read_text())
    for changes in ({"page": None}, {"methods": ["a"]}, {"left": [5] * 7}, {"left": ["0"] * 7}):
        path.write_text(json.dumps({name: value for name, value in (key | changes).items() if value is not None}))
        with pytest.raises(InputError, match="votes.json is no key"):
            count(path, [vote(page, "x", {0: "same"})])


def test_a_folder_that_cannot_be_written_is_named_before_anything_is_drawn(tmp_path, capsys, monkeypatch):
    (tmp_path / "taken").write_text("a file")
    missing = [str(tmp_path / "a"), str(tmp_path / "b")]
    assert main(["blind", *missing, "--output", str(tmp_path / "taken")]) == 2
    assert main(["evaluate", missing[0], "--output", str(tmp_path / "taken" / "below")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all("cannot write in" in line and "taken" in line for line in lines)

    def full(*_) -> int:
        raise OSError(28, "No space left on device", str(tmp_path / "x"))

    monkeypatch.setitem(COMMANDS, "votes", (full, ""))
    assert main(["votes"]) == 1
    assert capsys.readouterr().err == f"trainer: error: {tmp_path / 'x'}: No space left on device\n"


def test_methods_need_a_prompt_in_common(tmp_path):
    with pytest.raises(InputError, match="no prompt in common"):
        write_page(tmp_path, ("one", "two"), made("red", ["a"]), made("red", ["b"]))
