"""Named pictures, from which a 2D base may learn beside renders: any folder whose file names say what is on them."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, pad

from generator.errors import InputError

from .captions import with_article

SUFFIXES = (".png", ".webp", ".jpg", ".jpeg")
MAX_PIXELS = 4096**2
# Emoji are named by their code points; the variation selector after one says that it is drawn in colour.
_CODE_POINT = re.compile(r"([0-9a-f]{4,6})(?:-fe0f)?")
_CODE_POINTS = re.compile(r"(?=[^-]*\d)[0-9a-f]{2,6}(?:-[0-9a-f]{2,6})*")
# What an emoji's name says that is not on the picture.
_NOT_SEEN = re.compile(r"\b(?:emoji|symbol|sign|black|white|heavy)\b")


class NamedPicture(NamedTuple):
    """One picture and what is on it."""

    path: Path
    captions: list[str]


def named_pictures(folder: str | Path) -> list[NamedPicture]:
    """The pictures of a folder and its subfolders, by name; those whose name says nothing are left out.

    A name is words ("red-apple_02.png") or, as sets of emoji have it, the code point of a single character ("1fa91.webp": a chair).

    Raises:
        InputError: no such folder, or no picture in it has a name of words.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder of pictures")
    found = []
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in SUFFIXES:
            name = name_of(path.stem)
            if name:
                found.append(NamedPicture(path, list(dict.fromkeys([name, with_article(name)]))))
    if not found:
        raise InputError(f"{folder}: no {', '.join(SUFFIXES)} whose name says what is on it, such as red-apple.png")
    return found


def name_of(stem: str) -> str:
    """What a file's name says: lower-case words without numbers; empty where it says nothing."""
    stem = stem.lower()
    single = _CODE_POINT.fullmatch(stem)
    if single and int(single[1], 16) <= 0x10FFFF:
        character = chr(int(single[1], 16))
        # Letters, digits and what is no symbol are pictures of writing.
        name = unicodedata.name(character, "").lower() if unicodedata.category(character) == "So" else ""
        return " ".join(_NOT_SEEN.sub(" ", name).replace("-", " ").split()) if _is_thing(name) else ""
    if _CODE_POINTS.fullmatch(stem):  # several characters: flags, families, skin tones
        return ""
    return " ".join(re.findall(r"[^\W\d_]{2,}", stem))


def _is_thing(name: str) -> bool:
    """Whether an emoji stands for something that can be held or seen, not for writing or a direction."""
    return not re.search(r"\b(?:ideograph|letter|squared|circled|keycap|arrow|regional|button|copyright|registered|numerals?)\b", name)


def read_picture(path: Path, size: int) -> Tensor:
    """A picture as [4, size, size] in 0..1, colour times alpha and alpha, centred on a transparent square.

    Raises:
        InputError: it cannot be read, or is larger than 4,096 x 4,096 pixels.
    """
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise InputError(f"{path}: {image.width} x {image.height} pixels are too many")
            values = torch.from_numpy(np.array(image.convert("RGBA"))).permute(2, 0, 1).float() / 255
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: not a readable picture ({error})") from error
    values = torch.cat([values[:3] * values[3:], values[3:]])
    height, width = values.shape[1:]
    side = max(height, width, size)
    left, top = (side - width) // 2, (side - height) // 2
    return adaptive_avg_pool2d(pad(values, (left, side - width - left, top, side - height - top)), size)
