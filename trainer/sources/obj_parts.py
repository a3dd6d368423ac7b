"""What an OBJ's materials say about an object: of what it is made, and how its parts look."""

from __future__ import annotations

import io
import json
import math
import posixpath
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from generator.errors import InputError
from generator.files import parse_json, replacing

from .captions import Part
from .objects import MAX_OBJECT_BYTES, read_entry, texture_names

# Parts of a material's name -> material, the first that is found; makers wrote in English, French, Spanish, Catalan, Portuguese,
# Infinigen in English ("shader_galvanized_metal").
_MATERIALS = {
    "plywood": "wood",
    "wood": "wood",
    "madera": "wood",
    "madeira": "wood",
    "fusta": "wood",
    "bark": "",
    "bamboo": "bamboo",
    "rattan": "rattan",
    "wicker": "wicker",
    "leather": "leather",
    "cuir": "leather",
    "velvet": "velvet",
    "knit": "knitted fabric",
    "fabric": "fabric",
    "textile": "fabric",
    "cloth": "fabric",
    "plastic": "plastic",
    "lastic": "plastic",
    "rubber": "rubber",
    "ceramic": "ceramic",
    "porcelain": "ceramic",
    "marble": "marble",
    "stone": "stone",
    "concrete": "concrete",
    "brick": "brick",
    "plaster": "plaster",
    "glass": "glass",
    "vidro": "glass",
    "cristal": "glass",
    "brass": "brass",
    "steel": "metal",
    "inox": "metal",
    "iron": "metal",
    "chrom": "metal",
    "alumin": "metal",
    "metal": "metal",
}
# Whole words of a name that say what they say only alone: "oak", but not "soak".
_WHOLE = {"oak": "wood", "teak": "wood", "pine": "wood", "cherry": "wood", "alu": "metal", "cromo": "metal", "tela": "fabric"}
# Whole words of a material's name -> the part it covers.
_PARTS = {
    "leg": "legs",
    "legs": "legs",
    "feet": "legs",
    "foot": "legs",
    "pillow": "pillows",
    "pillows": "pillows",
    "cushion": "cushions",
    "cushions": "cushions",
    "seat": "seat",
    "mattress": "mattress",
    "matress": "mattress",
    "frame": "frame",
    "handle": "handles",
    "handles": "handles",
    "shade": "shade",
    "lampshade": "shade",
    "base": "base",
    "top": "top",
    "pot": "pot",
    "leaves": "leaves",
    "leaf": "leaves",
    "flower": "flowers",
    "flowers": "flowers",
    "trunk": "trunk",
    "door": "doors",
    "doors": "doors",
    "drawer": "drawers",
    "drawers": "drawers",
    "tire": "tyres",
    "tires": "tyres",
    "wheel": "wheels",
    "wheels": "wheels",
    "roof": "roof",
}
# Where these parts are looked for: others have them too, and nobody would say so.
_HEADS = {
    "top": r"table|desk|stand|cabinet|stool",
    "base": r"lamp|light|chair|stool|table|fan",
    "frame": r"chair|sofa|bed|bench|bunk|mirror|glasses",
    "trunk": r"tree|palm|pine|maple|acacia|bamboo|ficus|yucca",
}
_DEFAULTS = {(0.8, 0.8, 0.8), (0.64, 0.64, 0.64), (1.0, 1.0, 1.0)}
# Share of the surface that a part must have to be named, and that a material must have to be the object's.
PART_SHARE, MAIN_SHARE = 0.03, 0.5


def material_word(name: str) -> str:
    """What a material is called in a caption; "" where its name does not say.

    >>> material_word("White_Wood"), material_word("Material.001"), material_word("oak3"), material_word("eyeglasses")
    ('wood', '', 'wood', '')
    >>> material_word("shader_galvanized_metal"), material_word("shader_leaf")
    ('metal', '')
    """
    words = _split(name)
    text = " ".join(words).replace("material", "").replace("glasses", "")
    for key, word in _MATERIALS.items():
        if key in text:
            return word
    return next((_WHOLE[word] for word in words if word in _WHOLE), "")


def part_word(name: str) -> str:
    """The part that a material covers; "" where its name does not say.

    >>> part_word("chairLegs_metal"), part_word("metal")
    ('legs', '')
    """
    return next((_PARTS[word] for word in _split(name) if word in _PARTS), "")


def _split(name: str) -> list[str]:
    return re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower())


def looks(noun: str, surfaces: list[dict]) -> tuple[Part, list[Part]]:
    """Of what an object is made, and its parts that can be named, the largest first. Its colour is left to what the fit shows.

    Args:
        noun: what it is.
        surfaces: of each material its name, share of the surface and display colour, see `read_surfaces`.
    """
    from ..captions import colour_word

    parts: dict[str, list[dict]] = {}
    made: dict[str, float] = {}
    for surface in surfaces:
        parts.setdefault(part_word(surface["material"]), []).append(surface)
        word = material_word(surface["material"])
        made[word] = made.get(word, 0.0) + surface["share"]
    named = []
    for word, members in parts.items():
        share = sum(member["share"] for member in members)
        said = word.rstrip("s") in noun or not re.search(_HEADS.get(word, ""), noun)
        if word and not said and PART_SHARE <= share < 1 - PART_SHARE:
            largest = max(members, key=lambda member: member["share"])
            colour = colour_word(largest["colour"]) if largest["colour"] else ""
            # A leaf is black where its texture decides over a colour that nobody chose.
            colour = "" if (word, colour) == ("leaves", "black") else colour
            named.append((share, Part(word, colour, material_word(largest["material"]))))
    named.sort(key=lambda entry: -entry[0])
    material = max(made, key=made.__getitem__, default="")
    return Part("", "", material if made.get(material, 0) >= MAIN_SHARE else ""), [part for _, part in named]


def read_surfaces(archive: zipfile.ZipFile, member: str) -> list[dict]:
    """The materials of an OBJ in an archive: name, share of the surface, and display colour [3] or None; the largest first."""
    names = {name.lower(): name for name in archive.namelist()}
    folder = posixpath.dirname(member)

    def read(reference: str) -> bytes | None:
        reference = reference.strip().strip('"').replace("\\", "/")
        for candidate in (posixpath.join(folder, reference), posixpath.join(folder, posixpath.basename(reference))):
            found = names.get(posixpath.normpath(candidate).lower())
            if reference and found:
                return read_entry(archive, archive.getinfo(found), MAX_OBJECT_BYTES)
        return None

    areas, libraries = _areas(read_entry(archive, archive.getinfo(member), MAX_OBJECT_BYTES))
    colours: dict[str, list[float] | None] = {}
    for library in libraries:
        _read_colours((read(library) or b"").decode("latin-1"), read, colours)
    total = sum(areas.values()) or 1.0
    found = [{"material": name, "share": round(area / total, 4), "colour": colours.get(name)} for name, area in areas.items()]
    return sorted(found, key=lambda surface: -surface["share"])


def _areas(obj: bytes) -> tuple[dict[str, float], list[str]]:
    """The surface of every material of an OBJ, and the names of its material libraries."""
    lines = obj.splitlines()
    vertices = np.array(b" ".join(b" ".join(line.split()[1:4]) for line in lines if line[:2] == b"v ").split(), dtype=np.float64)
    vertices = vertices.reshape(-1, 3)
    areas: dict[str, float] = {}
    libraries, material, seen = [], "", 0
    faces: list[tuple[int, int, int]] = []

    def close() -> None:
        if faces:
            a, b, c = (vertices[np.array(faces)[:, k]] for k in range(3))
            areas[material] = areas.get(material, 0.0) + float(np.linalg.norm(np.cross(b - a, c - a), axis=1).sum() / 2)
            faces.clear()

    for line in lines:
        kind = line[:2]
        if kind == b"v ":
            seen += 1
        elif kind == b"f ":
            numbers = [int(word.split(b"/")[0]) for word in line.split()[1:]]
            corners = [n - 1 if n > 0 else seen + n for n in numbers]
            faces += [(corners[0], corners[i], corners[i + 1]) for i in range(1, len(corners) - 1)]
        elif line.startswith(b"usemtl"):
            close()
            material = line[6:].strip().decode("latin-1")
        elif line.startswith(b"mtllib"):
            libraries.append(line[6:].strip().decode("latin-1"))
    close()
    return areas, list(dict.fromkeys(libraries))


def _read_colours(text: str, read: Callable[[str], bytes | None], colours: dict[str, list[float] | None]) -> None:
    """Adds the display colour of each material of an MTL: of its texture's mean where it has one, else its diffuse colour."""
    name = ""
    for line in text.splitlines():
        words = line.split(None, 1)
        if len(words) != 2:
            continue
        if words[0] == "newmtl":
            name = words[1].strip()
        elif words[0] == "Kd" and name not in colours:
            try:
                given = [float(value) for value in words[1].split()[:3]]
            except ValueError:
                given = []
            given = given * 3 if len(given) == 1 else given  # the format's way of saying grey
            colour = [min(max(value, 0.0), 1.0) for value in given]
            whole = len(colour) == 3 and all(map(math.isfinite, given))
            # What programs write where nobody chose a colour.
            colours[name] = colour if whole and tuple(colour) not in _DEFAULTS else None
        elif words[0] == "map_Kd":
            pixels = next((data for _, reference in texture_names(words[1]) if (data := read(reference)) is not None), None)
            colours[name] = _mean(pixels) if pixels else None


def _mean(image: bytes) -> list[float] | None:
    """Mean display colour of an image's opaque pixels."""
    try:
        pixels = np.asarray(Image.open(io.BytesIO(image)).convert("RGBA").resize((32, 32)), dtype=np.float64) / 255
    except (OSError, ValueError):
        return None
    weights = pixels[..., 3:]
    return [round(float(c), 3) for c in (pixels[..., :3] * weights).sum((0, 1)) / max(float(weights.sum()), 1e-6)]


def library_surfaces(path: Path, members: list[str]) -> dict[str, list[dict]]:
    """`read_surfaces` of the OBJ members of a library; kept in PATH.parts.json, since reading all takes half a minute.

    A member that cannot be read has no materials: it fails where it is rendered, with its reason.
    """
    kept = path.with_name(f"{path.name}.parts.json")
    stamp = [path.stat().st_size, int(path.stat().st_mtime)]
    try:
        stored = parse_json(kept.read_text(encoding="utf-8"))
        if stored["stamp"] == stamp and set(members) <= set(stored["surfaces"]):
            return stored["surfaces"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    surfaces = {}
    with zipfile.ZipFile(path) as archive:
        for member in members:
            try:
                surfaces[member] = read_surfaces(archive, member)
            except Exception:  # whatever a stranger's file holds, captions do without
                surfaces[member] = []
    try:
        with replacing(kept) as partial:
            partial.write_text(json.dumps({"stamp": stamp, "surfaces": surfaces}), encoding="utf-8")
    except InputError:
        pass  # a folder that cannot be written to is read anew the next time
    return surfaces
