"""Sources of objects: catalogues, captions, unsafe archives, folders, the download."""

from __future__ import annotations

import inspect
import io
import json
import random
import re
import subprocess
import tracemalloc
import unicodedata
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest
from PIL import Image

from generator.errors import InputError, WorkError
from trainer.evaluate.prompts import own_prompts
from trainer.sources import (
    Part,
    captions,
    clean_name,
    credit_lines,
    credits,
    describe,
    download,
    download_sweet_home_3d,
    extract,
    folder,
    infinigen,
    objects,
    open_source,
    recoloured,
    sweet_home_3d,
    with_article,
    with_colour,
)
from trainer.sources.captions import head_noun
from trainer.sources.obj_parts import looks, material_word, read_surfaces
from trainer.sources.objects import read_entry
from trainer.sources.sweet_home_3d import CATALOGUE, parse_properties

OBJ = "mtllib chair.mtl\nv 0 0 0\nv 1 0 0\nv 0 1 0\nusemtl wood\nf 1 2 3\n"
MTL = "newmtl wood\nKa 1 1 1\nKd 0.5 0.25 0\nmap_Kd -s 2 2 1 My Wood.JPG\nmap_Bump bump.png\nmap_d C:\\stuff\\gone.png\n"
PROPERTIES = """# comment
name=Test library
license=Creative Commons Attribution 3.0 license
id#1=Test#armchair
name#1=Armchair
tags#1=Seat, Couch
category#1=Office
model#1=/chairs/chair.obj
width#1=59.4
depth#1=62.7
height#1=105
modelRotation#1=1 0 0 0 0 1 \\
    0 -1 0
creator#1=Zo\\u00eb \\
    Maker
name#2 = Lamp
model#2 : chairs/chair.obj
"""


def library(path, properties=PROPERTIES, **entries):
    files = {"chairs/chair.obj": OBJ, "chairs/chair.mtl": MTL, "chairs/my wood.jpg": "pixels", **entries}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        if properties is not None:
            archive.writestr(CATALOGUE, properties.encode("latin-1"))
        for name, text in files.items():
            archive.writestr(name, text)
    return path


def test_a_catalogue_becomes_objects(tmp_path):
    first, second = sweet_home_3d(library(tmp_path / "test.sh3f"))
    assert (first.id, first.name, first.category, first.tags) == ("test-armchair", "Armchair", "Office", ("Seat", "Couch"))
    assert first.creator == "Zoë Maker" and first.licence == "CC-BY-3.0" and first.library == "Test library"
    assert first.size == pytest.approx((0.594, 0.627, 1.05))
    assert first.rotation == ((1, 0, 0), (0, 0, 1), (0, -1, 0))
    assert first.captions[:3] == ["armchair", "an armchair", "a 3d model of an armchair"]
    assert second.id == "test-library-lamp" and second.size is None and second.rotation is None
    assert str(tmp_path) not in json.dumps(first.record())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a=1\nb : 2\nc 3\n", {"a": "1", "b": "2", "c": "3"}),
        ("! no\n  # no\nkey\\ with\\:signs = v\n", {"key with:signs": "v"}),
        ("price=10\\u20ac\ntab=a\\tb\\\\c\n", {"price": "10€", "tab": "a\tb\\c"}),
        ("long=one \\\n   two \\\r\n # three\nnext=x", {"long": "one two # three", "next": "x"}),
        ("even=a\\\\\nother=b", {"even": "a\\", "other": "b"}),
        ("empty=\nbare\n", {"empty": "", "bare": ""}),
        ("\\\n# no comment = 1", {"#": "no comment = 1"}),
        ("\u00e9t\u00e9=\u00fc", {"été": "ü"}),
    ],
)
def test_java_properties(text, expected):
    assert parse_properties(text) == expected


def test_catalogues_cannot_hang_their_reader(tmp_path):
    """Each took minutes, or far longer, by work that grew with the square of its size."""
    text = "long=" + "a\\\n" * 1_000_000 + "b"
    assert parse_properties(text) == {"long": "a" * 1_000_000 + "b"}
    assert objects.unique_slugs(["chair"] * 100_000)[-1] == "chair-100000"
    mtl = "newmtl wood\nmap_Kd " + "x " * 30_000 + "\nmap_Kd " + "x/" * 2_000_000 + "\nmap_Kd -mm 0 1 My Wood.jpg\n"
    source = sweet_home_3d(library(tmp_path / "test.sh3f", **{"chairs/chair.mtl": mtl}))[0]
    assert extract(source, tmp_path / "out").with_suffix(".mtl").read_text() == "newmtl wood\nmap_Kd -mm 0 1 texture_0.jpg\n"


def test_unique_slugs_are_numbered_in_order():
    def slowly(texts):
        taken = []
        for text in texts:
            base = objects.slug(text)
            taken.append(next(name for number in range(1, 1000) if (name := base if number == 1 else f"{base}-{number}") not in taken))
        return taken

    chance = random.Random(0)
    for _ in range(200):
        texts = chance.choices(["a", "a 2", "A!", "a-2-2", "a-3", "b", "été", "ÉTÉ", "", "object 2"], k=20)
        assert objects.unique_slugs(texts) == slowly(texts)


def test_ids_without_latin_letters_hang_on_the_name_alone(tmp_path):
    names = ["椅子", "桌子", "Стол", "стол 2", "chair ٣", "chair ٤", "木 chair", "ガラス"]
    ids = objects.unique_slugs(names)
    assert len(set(ids)) == len(names) and all(re.fullmatch(r"(object|2|chair)-[0-9a-f]{6}", name) for name in ids)
    assert objects.unique_slugs(reversed(names)) == ids[::-1], "not on its place in the list"
    assert objects.unique_slugs([unicodedata.normalize("NFD", "ガラス"), "椅子"]) == [ids[-1], ids[0]]
    assert objects.unique_slugs(["椅子", "椅子"]) == [ids[0], f"{ids[0]}-2"]
    assert objects.unique_slugs(["Frame Hôi An", "Straße Øre", "Bill 10€", "🪑"]) == ["frame-h-i-an", "stra-e-re", "bill-10", "object"]
    _meshes(tmp_path, "椅子.obj", "桌子.obj")
    (tmp_path / "captions.json").write_text(json.dumps({"椅子.obj": "chair", "桌子.obj": "table"}))
    both = [source.id for source in folder(tmp_path)]
    (tmp_path / "captions.json").write_text(json.dumps({"桌子.obj": "table"}))
    assert [source.id for source in folder(tmp_path)] == both[1:] == [ids[1]]


def test_extract_writes_a_clean_model(tmp_path):
    source = sweet_home_3d(library(tmp_path / "test.sh3f"))[0]
    mesh = extract(source, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["model.mtl", "model.obj", "texture_0.jpg"]
    assert mesh.read_text().startswith("mtllib model.mtl\n") and "f 1 2 3" in mesh.read_text()
    # The map is found whatever its case, its options stay; bump maps and maps that are missing go, the colour stays.
    assert mesh.with_suffix(".mtl").read_text().split("\n")[:3] == ["newmtl wood", "Kd 0.5 0.25 0", "map_Kd -s 2 2 1 texture_0.jpg"]
    assert "gone" not in mesh.with_suffix(".mtl").read_text() and "bump" not in mesh.with_suffix(".mtl").read_text()


def test_references_cannot_leave_the_archive(tmp_path):
    (tmp_path / "secret.png").write_text("secret")
    mtl = "newmtl wood\nKd 1 1 1\nmap_Kd ../../secret.png\nmap_d /etc/hostname\n"
    source = sweet_home_3d(library(tmp_path / "test.sh3f", **{"chairs/chair.mtl": mtl, "../escape.txt": "out"}))[0]
    extract(source, tmp_path / "a" / "out")
    assert sorted(p.name for p in (tmp_path / "a" / "out").iterdir()) == ["model.mtl", "model.obj"]
    assert not list(tmp_path.rglob("escape.txt"))
    assert "map_" not in (tmp_path / "a" / "out" / "model.mtl").read_text()


@pytest.mark.parametrize("member", ["../outside.obj", "chairs/../../outside.obj", "C:/outside.obj"])
def test_unsafe_model_names_are_refused(tmp_path, member):
    properties = PROPERTIES.replace("/chairs/chair.obj", member)
    with pytest.raises(InputError, match="unsafe entry name"):
        sweet_home_3d(library(tmp_path / "test.sh3f", properties, **{member: OBJ}))


def test_bad_libraries_are_named(tmp_path):
    path = tmp_path / "bad.sh3f"
    with pytest.raises(InputError, match="no such file"):
        sweet_home_3d(path)
    path.write_text("not a zip")
    with pytest.raises(InputError, match="bad.sh3f: not a readable zip"):
        sweet_home_3d(path)
    with pytest.raises(InputError, match=f"no {CATALOGUE}"):
        sweet_home_3d(library(path, properties=None))
    with pytest.raises(InputError, match="chairs/gone.obj, which the archive does not hold"):
        sweet_home_3d(library(path, PROPERTIES.replace("/chairs/chair.obj", "/chairs/gone.obj")))
    with pytest.raises(InputError, match="model#1"):
        sweet_home_3d(library(path, PROPERTIES.replace("model#1=/chairs/chair.obj\n", "")))
    with pytest.raises(InputError, match="width#1 is not a number"):
        sweet_home_3d(library(path, PROPERTIES.replace("59.4", "wide")))
    with pytest.raises(InputError, match="needs 9 numbers"):
        sweet_home_3d(library(path, PROPERTIES.replace("0 -1 0", "0 -1")))
    numbered = PROPERTIES + "name#0003=Three\nname#\\u0664=Four\nname#" + "9" * 5000 + "=Many\n"
    assert len(sweet_home_3d(library(path, numbered))) == 2, "no number that a catalogue counts with"
    with pytest.raises(InputError, match="names a b, which") as caught:
        sweet_home_3d(library(path, PROPERTIES.replace("/chairs/chair.obj", "a\\u000ab")))
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="no furniture"):
        sweet_home_3d(library(path, "name=empty\n"))


def test_archives_that_unpack_to_too_much_are_refused(tmp_path, monkeypatch):
    source = sweet_home_3d(library(tmp_path / "test.sh3f", **{"chairs/my wood.jpg": "0" * 5_000_000}))[0]
    assert source.path.stat().st_size < 50_000
    monkeypatch.setattr(objects, "MAX_OBJECT_BYTES", 1_000_000)
    with pytest.raises(InputError, match="unpacks to more than"):
        extract(source, tmp_path / "out")


def test_an_entry_without_a_name_is_passed_over(tmp_path):
    path = library(tmp_path / "test.sh3f", **{"x": "unnamed"})
    source = sweet_home_3d(path)[0]
    data = path.read_bytes()
    start = data.rindex(b"PK\x01\x02")  # the last entry of the directory; its name is the one letter after 46 bytes
    # The letter becomes the first of the comment.
    nameless = data[: start + 28] + b"\0\0" + data[start + 30 : start + 32] + b"\1\0" + data[start + 34 :]
    path.write_bytes(nameless)
    assert extract(source, tmp_path / "out").is_file()


def test_an_entry_that_claims_more_than_the_archive_holds_allocates_nothing(tmp_path):
    path = library(tmp_path / "test.sh3f")
    data = bytearray(path.read_bytes())
    entry = data.index(b"PK\x01\x02")  # of the catalogue, in the central directory
    data[entry + 20 : entry + 24] = (2**32 - 2).to_bytes(4, "little")
    path.write_bytes(bytes(data))
    with pytest.raises(InputError, match="not a readable zip archive .*larger than the archive"):
        sweet_home_3d(path)


def test_an_entry_that_unpacks_to_more_than_it_states_is_unpacked_no_further(tmp_path):
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a", bytes(100 << 20))
    data = bytearray(path.read_bytes())
    for mark, place in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        start = data.rindex(mark) + place
        data[start : start + 4] = (100).to_bytes(4, "little")
    path.write_bytes(bytes(data))
    with zipfile.ZipFile(path) as archive:
        tracemalloc.start()
        try:
            with suppress(zipfile.BadZipFile):  # its check sum is that of the whole
                assert read_entry(archive, archive.getinfo("a"), 1 << 20) == bytes(100)
            assert tracemalloc.get_traced_memory()[1] < 5 << 20
        finally:
            tracemalloc.stop()


def test_a_damaged_entry_is_an_input_error(tmp_path):
    path = library(tmp_path / "test.sh3f")
    source = sweet_home_3d(path)[0]
    data = bytearray(path.read_bytes())
    start = data.index(b"chairs/chair.obj") + len("chairs/chair.obj")
    data[start : start + 20] = bytes(20)
    path.write_bytes(bytes(data))
    with pytest.raises(InputError, match="cannot unpack chairs/chair.obj"):
        extract(source, tmp_path / "out")


def test_names_lose_brands_and_numbers():
    assert clean_name("Yamaha YZR R6") == "racing motorcycle"
    assert clean_name("VW Polo") == "polo" and clean_name("Sony X200", "Office") == "piece of office furniture"
    assert clean_name("Chair 03") == "chair"
    assert clean_name("Double window 3 panes") == "double window with three panes"
    assert clean_name("!!!", "Vehicles") == "vehicle"


@pytest.mark.parametrize(
    ("noun", "expected"),
    [
        ("armchair", "an armchair"),
        ("urinal", "a urinal"),
        ("umbrella", "an umbrella"),
        ("upright piano", "an upright piano"),
        ("hourglass", "an hourglass"),
        ("suv", "an suv"),
        ("scissors", "scissors"),
        ("glass", "a glass"),
        ("cactus", "a cactus"),
        ("bowl with fruits", "a bowl with fruits"),
        ("milk", "milk"),
    ],
)
def test_articles(noun, expected):
    assert with_article(noun) == expected


def test_phrases_without_a_head_are_taken_as_they_are():
    assert [head_noun(phrase) for phrase in ("a red bowl, with fruits", "", " ", ", x", " with legs")] == ["bowl", "", "", "x", "legs"]
    assert head_noun(own_prompts(["red"])[0].noun) == "", "a colour alone names no thing"
    assert with_article(", x") == "a , x" and captions(", x")[0] == "x"


def test_captions_go_from_plain_to_placed():
    assert captions("Corner sofa", "Living room", ["Couch"])[:4] == [
        "corner sofa",
        "a corner sofa",
        "a 3d model of a corner sofa",
        "a corner sofa for the living room",
    ]
    assert "a pine tree under snow" in captions("Pine under snow", "Exterior", ["Tree"])
    assert "a toy biplane" in captions("Biplane", "Bedroom", ["Toy"])
    assert not any("kitchen" in caption for caption in captions("Steak", "Kitchen", ["Food"]))
    for caption in captions("Apple iPhone", "Office", ["iPhone"]):
        assert "apple" not in caption and "iphone" not in caption


@pytest.mark.parametrize(
    ("caption", "colour", "expected"),
    [
        ("armchair", "red", "red armchair"),
        ("an armchair", "red", "a red armchair"),
        ("a lamp", "orange", "an orange lamp"),
        ("a 3d model of an armchair", "red", "a 3d model of a red armchair"),
        ("a 3d model of scissors", "red", "a 3d model of red scissors"),
        ("a chair with a cushion", "blue", "a blue chair with a cushion"),
        ("a bowl of apples", "green", "a green bowl of apples"),
        ("a black table", "red", "a black table"),
        ("the sofa", "grey", "the grey sofa"),
        ("a sofa", "", "a sofa"),
    ],
)
def test_colours_go_before_the_noun(caption, colour, expected):
    assert with_colour(caption, colour) == expected


def test_descriptions_come_at_several_lengths():
    legs, seat = Part("legs", "black", "metal"), Part("seat", "brown", "wood")
    found = describe(["chair", "dining chair"], Part("", "brown", "wood"), [legs, seat], ["armrests"])
    assert found[:4] == ["chair", "a chair", "a 3d model of a chair", "a dining chair"]
    assert {"a wooden chair", "a chair made of wood", "a brown wooden chair", "a chair with metal legs"} <= set(found)
    assert "a brown wooden dining chair with black metal legs and armrests" in found
    assert not any("seat" in caption for caption in found), "what looks like the whole need not be said"
    assert describe(["jar"], Part(""), [Part("lid", "blue")])[-2:] == ["a jar with a blue lid", "jar, blue lid"]
    assert describe(["glass jar"], Part("", "", "glass")) == ["glass jar", "a glass jar", "a 3d model of a glass jar"]
    assert len(describe(["lamp"], Part(""))) == 3


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a red chair with black legs", "an orange chair with black legs"),
        ("red chair, red legs", "orange chair, orange legs"),
        ("a chair", "an orange chair"),
        ("a chair with black legs", None),
        ("a 3d model of a red lamp", "a 3d model of an orange lamp"),
        ("a covered sofa", "an orange covered sofa"),
    ],
)
def test_captions_of_repainted_objects(caption, expected):
    assert recoloured(caption, "red", "orange") == expected


def test_materials_and_parts_are_read_from_an_obj(tmp_path):
    """A table of a large wooden top and small legs: shares are by surface, colours from Kd, or the texture's mean."""
    corners = "v 0 0 0\nv 4 0 0\nv 4 2 0\nv 0 2 0\nv 0 0 1\nv 1 0 1\nv 1 2 1\n"
    obj = f"mtllib chair.mtl\n{corners}usemtl Oak_board\nf 1 2 3 4\nusemtl blackLegs.metal\nf -3/1 -2/2 -1/3\nusemtl gone\nf 5 6 6\n"
    mtl = "newmtl Oak_board\nKd 1 1 1\nmap_Kd wood.png\nnewmtl blackLegs.metal\nKd 0.02 0.02 0.02\n"
    picture = io.BytesIO()
    Image.new("RGB", (4, 4), (115, 71, 38)).save(picture, "png")
    path = library(tmp_path / "test.sh3f", PROPERTIES.replace("Armchair", "Table"), **{"chairs/chair.obj": obj, "chairs/chair.mtl": mtl})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("chairs/wood.png", picture.getvalue())
        found = read_surfaces(archive, "chairs/chair.obj")
    assert [surface["material"] for surface in found] == ["Oak_board", "blackLegs.metal", "gone"]
    assert [surface["share"] for surface in found] == pytest.approx([8 / 9, 1 / 9, 0], abs=1e-3)
    assert found[0]["colour"] == pytest.approx([115 / 255, 71 / 255, 38 / 255], abs=0.01)
    whole, parts = looks("table", found)
    assert whole.material == "wood" and parts == [Part("legs", "black", "metal")]
    table = sweet_home_3d(path)[0]
    assert {"a wooden table", "a table with metal legs", "a wooden table with black metal legs"} <= set(table.captions)
    assert table.captions[:2] == ["table", "a table"]
    kept = path.with_name("test.sh3f.parts.json")
    assert kept.is_file()
    kept.write_text(kept.read_text().replace("Oak_board", "Marble_board"))
    assert "a marble table" in sweet_home_3d(path)[0].captions, "read once, then taken from the file"
    path.touch()
    kept.write_text("damaged")
    assert "a wooden table" in sweet_home_3d(path)[0].captions
    kept.unlink()
    kept.mkdir()  # as in a folder of which nothing but reading is allowed, this file cannot be made
    assert "a wooden table" in sweet_home_3d(path)[0].captions


@pytest.mark.parametrize(
    ("line", "colour"),
    [
        ("0.1 0.2 0.3", [0.1, 0.2, 0.3]),
        ("0.4", [0.4, 0.4, 0.4]),  # one number is a grey
        ("0.4 0.5", None),
        ("0.4 nan 0.5", None),
        ("red", None),
        ("7 -1 0.5", [1.0, 0.0, 0.5]),
    ],
)
def test_a_colour_of_a_material_is_three_numbers_or_one(tmp_path, line, colour):
    mtl = f"newmtl wood\nKd {line}\n"
    path = library(tmp_path / "test.sh3f", **{"chairs/chair.mtl": mtl})
    with zipfile.ZipFile(path) as archive:
        found = read_surfaces(archive, "chairs/chair.obj")
    assert found[0]["colour"] == colour
    looks("chair", found)


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("shader_coarse_knit_fabric", "knitted fabric"),
        ("shader_black_glass", "glass"),
        ("shader_wood_tiled", "wood"),
        ("shader_bark", ""),
        ("redBricks", "brick"),
        ("Tela_azul", "fabric"),
        ("soaked", ""),
    ],
)
def test_materials_are_called_the_same_in_every_source(name, word):
    assert material_word(name) == word


def test_people_and_nouns_that_say_it_themselves_get_no_parts():
    surfaces = [{"material": "cabinetDoor", "share": 0.4, "colour": [0.05, 0.05, 0.05]}, {"material": "body", "share": 0.6, "colour": None}]
    assert looks("glass door cabinet", surfaces)[1] == [] and looks("cabinet", surfaces)[1] == [Part("doors", "black", "")]


def _meshes(tmp_path, *names):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(OBJ)
    return tmp_path


@pytest.mark.parametrize("kind", ["csv", "json", "list", "jsonl"])
def test_folders_in_every_captions_format(tmp_path, kind):
    _meshes(tmp_path, "a/chair.obj", "lamp.ply", "ignored.glb")
    rows = [
        {"file": "a/chair.obj", "caption": "A red  Chair."},
        {"file": "lamp.ply", "caption": "a lamp"},
        {"file": "a/chair.obj", "caption": "seat"},
    ]
    if kind == "csv":
        text = "file,caption,creator\n" + "".join(f"{r['file']},{r['caption']},Zoe\n" for r in rows)
    elif kind == "json":
        text = json.dumps({"a/chair.obj": ["A red  Chair.", "seat"], "lamp.ply": "a lamp"})
    elif kind == "list":
        text = json.dumps(rows)
    else:
        text = "\n".join(json.dumps(row) for row in rows)
    (tmp_path / f"captions.{'json' if kind == 'list' else kind}").write_text(text)
    chair, lamp = open_source(tmp_path)
    assert (chair.id, chair.captions, chair.up) == ("a-chair", ["a red chair", "seat"], "y")
    assert (lamp.id, lamp.captions, lamp.up) == ("lamp", ["a lamp"], "z")
    assert chair.creator == ("Zoe" if kind == "csv" else "") and chair.library == tmp_path.name
    assert extract(chair, tmp_path / "out") == tmp_path / "a/chair.obj"


def test_bad_folders_are_named(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        folder(tmp_path / "none")
    with pytest.raises(InputError, match="write captions.csv"):
        folder(tmp_path)
    _meshes(tmp_path, "data/a.obj", "outside.obj")
    for text, message in [
        ("name,text\n", "no captions inside"),
        ("name,text\na.obj,x\n", "columns file,caption"),
        ("file,caption\na.obj,\n", "entry 1 needs a file and a caption"),
        ("file,caption\nb.obj,x\n", "b.obj is not in"),
        ("file,caption\na.stl,x\n", "not a mesh this program reads"),
        ("file,caption\n../outside.obj,x\n", "lies outside"),
    ]:
        (tmp_path / "data" / "captions.csv").write_text(text)
        with pytest.raises(InputError, match=message):
            folder(tmp_path / "data")
    (tmp_path / "data" / "broken.json").write_text("{")
    with pytest.raises(InputError, match="not readable as JSON"):
        open_source(tmp_path / "data" / "broken.json")


@pytest.mark.parametrize(
    "name", ["a\0b.obj", "x" * 5000 + ".obj", "gone\nInputError: none.obj", "\ud800.obj", ".", "/", "\N{LINE SEPARATOR}.obj"]
)
def test_names_that_no_file_can_have_are_one_line(tmp_path, name):
    captions_file = tmp_path / "captions.json"
    captions_file.write_text(json.dumps({name: "a chair"}))
    with pytest.raises(InputError, match=r"captions\.json: ") as caught:
        open_source(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


def test_a_source_by_an_endless_name_is_none(tmp_path):
    for spec in ("x" * 5000, "infinigen:" + "x" * 5000, "/".join(["x" * 300] * 2)):
        with pytest.raises(InputError):
            open_source(spec, tmp_path)


def test_quoted_captions_keep_their_line_ends_apart(tmp_path):
    _meshes(tmp_path, "a.obj", "b.obj")
    text = 'file,caption,creator\na.obj,"a red\nchair","Zoe, Maker"\n\nb.obj,a next\u0085line\u2028lamp,Ann\n'
    (tmp_path / "captions.csv").write_bytes(text.replace("\n", "\r\n").encode())
    chair, lamp = folder(tmp_path)
    assert (chair.captions, chair.creator) == (["a red chair"], "Zoe, Maker")
    assert (lamp.captions, lamp.creator) == (["a next line lamp"], "Ann")
    lines = [json.dumps({"file": name, "caption": f"a\u2028{name}\u0085x"}, ensure_ascii=False) for name in ("a.obj", "b.obj")]
    (tmp_path / "captions.jsonl").write_text("\r\n".join(lines), encoding="utf-8")
    assert [s.captions for s in folder(tmp_path, tmp_path / "captions.jsonl")] == [["a a.obj x"], ["a b.obj x"]]


@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_captions_that_are_nested_too_deeply_are_one_line(tmp_path, kind):
    path = tmp_path / f"captions.{kind}"
    path.write_text("[" * 200_000 + "]" * 200_000)
    with pytest.raises(InputError, match=rf"captions\.{kind}: not readable as JSON"):
        open_source(tmp_path)


def test_open_source_picks_by_what_the_path_is(tmp_path):
    library(tmp_path / "b.sh3f", PROPERTIES.replace("Test", "B"))
    library(tmp_path / "a.sh3f", PROPERTIES.replace("Test", "A"))
    assert [s.id for s in open_source(tmp_path)] == ["a-armchair", "a-library-lamp", "b-armchair", "b-library-lamp"]
    assert len(open_source(tmp_path / "a.sh3f")) == 2
    with pytest.raises(InputError, match="no such source"):
        open_source(tmp_path / "nothing")


def test_credits_group_by_library(tmp_path):
    table = credits(sweet_home_3d(library(tmp_path / "a.sh3f")))
    assert table.splitlines()[2] == "| Test library | CC-BY-3.0 | 2 | Zoë Maker |"


def test_credits_of_many_variants_share_a_line_and_others_are_named_one_by_one():
    def made(identifier, name, creator):
        return objects.SourceObject(id=identifier, name=name, path=Path(), creator=creator, library="L", licence="CC0-1.0")

    variants = [made(f"chair-{i}", "chair", "Zoe") for i in range(12)]
    lines = credit_lines([*variants, made("d", "lamp", "Zoe"), made("a", "lamp", "Zoe"), made("b", "lamp", "Ann"), made("c", "lamp", "")])
    assert lines == [
        "* chair (12 objects: chair-0 to chair-11): Zoe, L, CC0-1.0",
        "* lamp (d): Zoe, L, CC0-1.0",
        "* lamp (a): Zoe, L, CC0-1.0",
        "* lamp (b): Ann, L, CC0-1.0",
        "* lamp (c): not named, L, CC0-1.0",
    ]


def _fake_package(monkeypatch, tmp_path, fill):
    """Stands in for apt-get and dpkg: the first leaves a .deb, the second what `fill` writes into its folder."""

    def run(command, cwd, **_):
        if command[0] == "apt-get":
            (cwd / f"{download.PACKAGE}_1_all.deb").write_text("deb")
        else:
            target = cwd / command[-1] / "usr" / "share"
            target.mkdir(parents=True)
            fill(target)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(download.subprocess, "run", run)


def test_cleaning_up_keeps_what_was_fetched():
    makefile = (Path(__file__).parent.parent / "Makefile").read_text(encoding="utf-8")
    removed = re.search(r"^clean:.*\n\t@rm -rf (.*)", makefile, re.MULTILINE)[1].split()
    for function in (open_source, download_sweet_home_3d, infinigen):
        cache = inspect.signature(function).parameters["cache"].default
        assert Path(cache).parts[0] == "runs" and not {"runs", cache} & set(removed)


def test_the_download_checks_what_it_got(tmp_path, monkeypatch):
    _fake_package(monkeypatch, tmp_path, lambda target: library(target / "one.sh3f"))
    found = download_sweet_home_3d(tmp_path / "cache")
    assert [p.name for p in found.iterdir()] == ["one.sh3f"] and [p.name for p in found.parent.iterdir()] == [found.name]
    assert len(open_source("sweet-home-3d", tmp_path / "cache")) == 2
    # The second time nothing is run.
    monkeypatch.setattr(download.subprocess, "run", None)
    assert download_sweet_home_3d(tmp_path / "cache") == found


@pytest.mark.parametrize(("content", "message"), [(None, "holds no .sh3f"), ("damaged", "is damaged")])
def test_a_bad_package_leaves_nothing(tmp_path, monkeypatch, content, message):
    _fake_package(monkeypatch, tmp_path, lambda target: content and (target / "one.sh3f").write_text(content))
    with pytest.raises(WorkError, match=message):
        download_sweet_home_3d(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_failed_download_says_how_to_do_it_by_hand(tmp_path, monkeypatch):
    def offline(command, **_):
        return subprocess.CompletedProcess(command, 100, "", "E: Unable to locate package\n")

    monkeypatch.setattr(download.subprocess, "run", offline)
    with pytest.raises(WorkError, match=r"Unable to locate package.*dpkg -x"):
        download_sweet_home_3d(tmp_path / "cache")

    def missing(command, **_):
        raise FileNotFoundError(command[0])

    monkeypatch.setattr(download.subprocess, "run", missing)
    with pytest.raises(WorkError, match="apt-get is not on this system"):
        download_sweet_home_3d(tmp_path / "cache")
