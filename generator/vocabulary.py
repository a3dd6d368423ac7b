"""The words that a model was trained on, against those of a prompt."""

from __future__ import annotations

import re
from difflib import get_close_matches
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .model.text import TextEncoder

# Words of a prompt that name no object.
_FILLERS = frozenset(
    "a an and at by for from his her in into its of on or over some the their under with without "
    "red green blue yellow orange purple pink brown black white grey gray cyan magenta turquoise beige golden gold silver "
    "dark light bright pale big large small little tiny tall short long wide narrow round square old new modern wooden metal "
    "plastic leather simple".split()
)
_NEAREST = 4


def hint(prompt: str, vocabulary: tuple[str, ...], encoder: TextEncoder | None = None) -> str:
    """One sentence where no known object is in the prompt, with known ones near to it; else empty.

    Args:
        encoder: finds the known objects that mean something alike; without it those that are spelled alike are told.
    """
    if not (prompt.strip() and vocabulary):
        return ""
    unknown = _unknown(" ".join(words(prompt)), vocabulary)
    if unknown is None:
        return ""
    if not unknown:
        return "Name an object too: the model knows no objects by colour or size alone"
    near = _meant_alike(unknown, vocabulary, encoder) if encoder else _spelled_alike(unknown, vocabulary)
    tail = f"; near to it: {', '.join(near[:_NEAREST])}" if near else ""
    return f"This model was not trained on \u201c{unknown}\u201d, so expect a rough shape{tail}"


def words(text: str) -> list[str]:
    """Lower-case words, in the singular where that is easy to see."""
    found = re.findall(r"[^\W\d_]+", text.lower())
    return [word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word for word in found]


def suggestions(text: str, vocabulary: tuple[str, ...]) -> list[str]:
    """The text with its last word completed to every known object that begins with it or holds it."""
    head, _, last = text.rpartition(" ")
    if len(last) < 2:
        return []
    start = [entry for entry in vocabulary if entry.lower().startswith(last.lower())]
    within = [entry for entry in vocabulary if last.lower() in entry.lower() and entry not in start]
    return [f"{head} {entry}".strip() for entry in start + within]


# Drawing a panel asks again and again.
@lru_cache(maxsize=64)
def _unknown(prompt: str, vocabulary: tuple[str, ...]) -> str | None:
    """The words of a prompt that could name an object, where none is known; else None."""
    given = prompt.split()
    if any(names and names <= set(given) for names in (set(words(entry)) for entry in vocabulary)):
        return None
    return " ".join(word for word in given if word not in _FILLERS)


@lru_cache(maxsize=64)
def _spelled_alike(unknown: str, vocabulary: tuple[str, ...]) -> list[str]:
    near: list[str] = []
    by_word: dict[str, list[str]] = {}
    for entry in vocabulary:
        for name in set(words(entry)):
            by_word.setdefault(name, []).append(entry)
    for word in unknown.split():
        for name in get_close_matches(word, by_word, n=_NEAREST, cutoff=0.6):
            near += [entry for entry in sorted(by_word[name], key=len) if entry not in near][:2]
    return near


def _meant_alike(unknown: str, vocabulary: tuple[str, ...], encoder: TextEncoder) -> list[str]:
    """Known objects by the cosine of the mean of their text features, nearest first."""
    means = encoder.sentences([unknown, *vocabulary])
    order = (means[1:] @ means[0]).argsort(descending=True).tolist()
    return [vocabulary[index] for index in order[:_NEAREST]]
