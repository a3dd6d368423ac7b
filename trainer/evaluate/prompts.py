"""What is asked of a model: the fixed list beside this file, or anyone's own."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from generator.errors import InputError
from trainer.captions import COLOURS

FIXED = Path(__file__).with_name("prompts.csv")


@dataclass(frozen=True)
class Prompt:
    """One thing to ask for."""

    text: str
    kind: str  # "colour", "material" and "words" in the fixed list; of one's own, "colour" where one is named, else "plain"
    noun: str  # what the thing is, as training captions call it

    @property
    def colour(self) -> str | None:
        """The colour word it names, None where there is none or several."""
        return named_colour(self.text)


def named_colour(text: str) -> str | None:
    """The one colour word of a text; None where it names none, or several."""
    named = [word for word in text.lower().split() if word in COLOURS]
    return named[0] if len(named) == 1 else None


def plain_noun(text: str) -> str:
    """A caption without article and colours: "armchair" of "a red armchair"."""
    words = [word for word in text.lower().split() if word not in COLOURS]
    return re.sub(r"^(an?|the) ", "", " ".join(words))


def fixed_prompts() -> list[Prompt]:
    """106 prompts of the starter's vocabulary, none of them a caption that anything is trained on (see `gives_away`): 74 things, each in
    a colour that no training object of that name is said to have, 20 of a material, 12 in other words."""
    with open(FIXED, newline="", encoding="utf-8") as file:
        return [Prompt(row["prompt"], row["kind"], row["noun"]) for row in csv.DictReader(file)]


def gives_away(caption: str) -> bool:
    """Whether training on a caption would give a fixed prompt away: it is one, or names the colour and the thing of one.

    >>> gives_away("a comfortable red japanese lantern"), gives_away("a japanese lantern"), gives_away("a wooden armchair")
    (True, False, True)
    """
    texts, things = _reserved()
    caption = caption.lower().replace(",", " ")
    colour = named_colour(caption)
    words = f" {plain_noun(caption)} "
    return caption in texts or any(f" {noun} " in words for noun in (things.get(colour, ()) if colour else ()))


@cache
def _reserved() -> tuple[frozenset[str], dict[str, list[str]]]:
    """Texts of the fixed prompts, and the things that they name in each colour."""
    things: dict[str, list[str]] = {}
    for prompt in fixed_prompts():
        if prompt.colour:
            things.setdefault(prompt.colour, []).append(prompt.noun)
    return frozenset(prompt.text for prompt in fixed_prompts()), things


def own_prompts(texts: Iterable[str]) -> list[Prompt]:
    """Prompts as someone wrote them, without repetitions.

    Raises:
        InputError: there is none.
    """
    texts = list(dict.fromkeys(" ".join(text.split()) for text in texts if text.strip()))
    if not texts:
        raise InputError("there are no prompts: give at least one")
    return [Prompt(text, "colour" if named_colour(text) else "plain", plain_noun(text)) for text in texts]


def read_prompts(path: str | Path) -> list[Prompt]:
    """A text file with a prompt on each line; lines that start with # are left out.

    Raises:
        InputError: it cannot be read or holds none.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a readable text file of prompts ({error})") from error
    return own_prompts(line for line in lines if not line.lstrip().startswith("#"))
