"""Captions from an object's name, category and tags."""

from __future__ import annotations


def captions(name: str, category: str = "", tags: tuple[str, ...] = ()) -> list[str]:
    noun = name.lower()
    return [noun, f"a {noun}", f"a 3d model of a {noun}"]
