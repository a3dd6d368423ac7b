"""Other programs read our splat files and we read theirs: live where they are installed, and small files of theirs everywhere."""

from __future__ import annotations

import functools
import itertools
import json
import re
import struct
import warnings
from pathlib import Path

import interop
import numpy as np
import pytest
from interop import HALF, KEPT, Refused, Seen
from setup import SetupError

from generator.formats import axes, load, save
from generator.gaussians import Gaussians

NO_NODE = "the programs of npm are not installed here: `make interop` installs them and shows what it found"
# .spz files that state axes by a record: read wrong in versions 2 and 3, refused where Y and Z are swapped.


@pytest.fixture
def whole():
    """Nothing in the files of this page may be left out or dropped: both are warnings of the readers."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def exchange(program: interop.Program, folder: Path) -> None:
    """Assert that a program reads our files in all axes and we read its, but for what it is known not to read."""
    gaussians = interop.known_object(300)
    theirs = interop.their_reading(program, gaussians, interop.write_ours(gaussians, folder), folder)
    ours = interop.our_readings(program, gaussians, folder)
    assert not {format: result.remark for format, result in (theirs | ours).items() if result.failed}
    assert {format for format, result in theirs.items() if result.word == "yes"} >= set(interop.READS[program.name])
    assert {format for format, result in ours.items() if result.word == "yes"} == set(interop.WRITES.get(program.name, ()))


# ------------------------------------------------------------------------------------------- what the comparison itself can see


def test_every_turn_and_mirror_image_of_the_object_is_told_from_every_other():
    seen = Seen.of_gaussians(interop.known_object())
    names = set()
    for turn in interop.TURNS:
        name, deviation = interop.compare(seen.turned(turn), seen)
        assert name == interop.turn_name(turn) and deviation.within(interop.Deviation(1e-9, 1e-4, 1e-9, 0, 0))
        names.add(name)
    assert len(names) == 48 and {KEPT, HALF} < names


def test_the_object_has_every_kind_of_rotation_and_its_own_opacity_and_colour_everywhere():
    gaussians = interop.known_object()
    quaternions = gaussians.quaternions.numpy()
    assert set(np.abs(quaternions).argmax(axis=1)) == {0, 1, 2, 3}
    assert (quaternions < -0.1).any(axis=0).all() and (quaternions > 0.1).any(axis=0).all()
    assert len(set(gaussians.opacities.numpy().round(2))) == len(gaussians)
    assert len({tuple(color) for color in gaussians.colors.numpy().round(1)}) == len(gaussians)
    lengths = Seen.of_gaussians(gaussians).scales
    assert (lengths[:, :-1] > 1.4 * lengths[:, 1:]).all(), "an ellipsoid that is nearly round has no axes to compare"


def _turned_about_x(gaussians: Gaussians) -> Gaussians:
    return axes.turn(axes.turn(gaussians, "-Y", "Z"), "-Y", "Z")


FAULTS = {
    "red and blue swapped": lambda g: g.replace(colors=g.colors.flip(1)),
    "colours of linear light": lambda g: g.replace(colors=g.colors**2.2),
    "w behind x, y, z": lambda g: g.replace(quaternions=g.quaternions.roll(-1, dims=1)),
    "rotations the other way": lambda g: g.replace(quaternions=g.quaternions * g.quaternions.new_tensor([1, -1, -1, -1])),
    "sizes of other axes": lambda g: g.replace(scales=g.scales.roll(1, dims=1)),
    "sizes a tenth too large": lambda g: g.replace(scales=1.1 * g.scales),
    "opacities of neighbours": lambda g: g.replace(opacities=g.opacities.roll(1)),
    "opacities as logits twice": lambda g: g.replace(opacities=g.opacities.sigmoid()),
    "one missing": lambda g: g[1:],
    "turned, the ellipsoids not": lambda g: _turned_about_x(g).replace(quaternions=g.quaternions),
    "turned": _turned_about_x,
    "moved": lambda g: g.replace(means=g.means + 0.01),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen_within_the_widest_limits(fault: str):
    gaussians = interop.known_object(300)
    wrong = Seen.of_gaussians(FAULTS[fault](gaussians))
    limits = interop.largest([deviation for formats in interop.WRITES.values() for _, deviation in formats.values()])
    result = interop.judge([interop.compare(wrong, Seen.of_gaussians(gaussians))], KEPT, limits)
    assert result.failed and result.remark


# ------------------------------------------------------------------------------------------------------------- live, in Python


def test_gsply_reads_ours_and_we_read_its_files(tmp_path, whole):
    pytest.importorskip("gsply")
    exchange(interop.gsply(), tmp_path)


def test_gaussforge_reads_ours_and_we_read_its_files(tmp_path, whole):
    pytest.importorskip("gaussforge")
    exchange(interop.gaussforge(), tmp_path)


def test_blender_itself_imports_our_ply_with_every_property_and_exports_one_that_we_read(tmp_path, bpy, whole):
    exchange(interop.blender(), tmp_path)
    (thing,) = bpy.data.objects
    properties = {"opacity", *(f"{name}_{i}" for name, count in (("f_dc", 3), ("scale", 3), ("rot", 4)) for i in range(count))}
    assert thing.type == "MESH" and properties <= set(thing.data.attributes.keys())
    assert {thing.data.attributes[name].domain for name in properties} == {"POINT"}


# ---------------------------------------------------------------------------------------------------------------- live, of npm


@pytest.fixture
def node():
    if not interop.node_is_ready():
        pytest.skip(NO_NODE)
    return interop.FOLDER


@pytest.mark.parametrize("name", ["splat-transform", "spz-js", "@spz-loader/core", "@adobe/spz"])
def test_a_program_of_npm_reads_ours_and_we_read_its_files(name: str, tmp_path, node, whole):
    exchange(next(program for program in interop.of_npm(node) if program.name == name), tmp_path)


@pytest.mark.parametrize("version", [2, 3, 4])
def test_all_sixteen_axes_that_adobes_record_can_state(version: int, tmp_path, node, whole):
    result = interop.stated_axes(version, interop.known_object(), tmp_path, node)
    assert (result.word, result.remark) == ("yes", "")


@pytest.mark.parametrize(("suffix", "up"), [(".ply", "-Y"), (".splat", "-Y"), (".spz", "Y")])
def test_what_playcanvas_shows_upright(suffix: str, up: str, tmp_path, node):
    """splat-transform's .glb has its engine's axes, Y up: there our .spz stands as it should where it was written Y up."""
    source, target = tmp_path / f"ours{suffix}", tmp_path / "engine.glb"
    save(interop.known_object(), source, up=up)
    interop.run_splat_transform(source, target, folder=node)
    content = target.read_bytes()
    (length,) = struct.unpack_from("<I", content, 12)
    scene = json.loads(content[20 : 20 + length])
    accessor = scene["accessors"][scene["meshes"][0]["primitives"][0]["attributes"]["POSITION"]]
    begin = 28 + length + scene["bufferViews"][accessor["bufferView"]].get("byteOffset", 0) + accessor.get("byteOffset", 0)
    means = np.frombuffer(content, "<f4", 3 * accessor["count"], begin).reshape(-1, 3)
    top, bottom = 4, 5
    np.testing.assert_allclose(means[[top, bottom]], [[0, 0.5, 0], [0, -0.5, 0]], atol=1e-4)


# --------------------------------------------------------------------------------------------------- files of theirs, everywhere

FROZEN = {
    interop.written_name(program, format): (turn, limits)
    for program in interop.FROZEN_PROGRAMS
    for format, (turn, limits) in interop.WRITES[program].items()
}
STATED = [interop.stated_name(version, name) for version, name in interop.FROZEN_STATED]


@pytest.mark.parametrize("name", FROZEN)
def test_a_file_that_another_program_wrote(name: str, whole):
    result = interop.our_reading(interop.FROZEN / name, interop.known_object(), *FROZEN[name])
    assert (result.word, result.remark) == ("yes", "")


@pytest.mark.parametrize("name", STATED)
def test_a_file_that_states_its_axes(name: str, whole):
    seen = Seen.of_gaussians(load(interop.FROZEN / name, up="-Y"))
    limits = interop.WRITES["@adobe/spz"][f".spz {name[10]}"][1]
    result = interop.judge([interop.compare(seen, Seen.of_gaussians(interop.known_object()))], KEPT, limits)
    assert (result.word, result.remark) == ("yes", "")


def test_the_files_of_other_programs_are_all_tested_named_and_small():
    there = {path.name for path in interop.FROZEN.iterdir()} - {"README.md"}
    assert there == {*FROZEN, *STATED}
    assert sum((interop.FROZEN / name).stat().st_size for name in there) < 60_000
    text = (interop.FROZEN / "README.md").read_text(encoding="utf-8")
    wanted = json.loads((interop.SOURCE / "package.json").read_text(encoding="utf-8"))["dependencies"]
    written = {name: version for name, version in wanted.items() if name != "@spz-loader/core"}
    assert all(f"{name} {version}" in text for name, version in written.items()), "their versions are others: tools/interop.py --freeze"


# ---------------------------------------------------------------------------------------------------------------- installation


def test_the_lock_names_no_registry_and_has_a_hash_for_everything():
    package, lock = (json.loads((interop.SOURCE / name).read_text(encoding="utf-8")) for name in ("package.json", "package-lock.json"))
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", version) for version in package["dependencies"].values())
    assert lock["packages"].pop("")["dependencies"] == package["dependencies"]
    assert all(entry["integrity"].startswith("sha512-") and "resolved" not in entry for entry in lock["packages"].values())
    assert "://" not in (interop.SOURCE / "package-lock.json").read_text(encoding="utf-8")


def stand_in(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("node", "npm", "message"),
    [
        (None, "echo 11.0.0", "node was not found"),
        ("echo v20.1.0", None, "npm was not found"),
        ("echo v18.19.0", "echo 11.0.0", "node 20 or newer is needed, but this is v18.19.0"),
        ("echo v20.1.0", "echo 6.14.0", "npm 7 or newer is needed, but this is 6.14.0"),
        ("exit 1", "echo 11.0.0", "node 20 or newer is needed, but this is of no version"),
        ("echo v20.1.0", 'test "$1" = --version && echo 11.0.0 || exit 3', "npm could not install them .exit status 3."),
    ],
)
def test_node_that_is_missing_or_too_old_is_one_clear_line(tmp_path, monkeypatch, node, npm, message):
    commands, target = tmp_path / "bin", tmp_path / "interop"
    commands.mkdir()
    for name, script in (("node", node), ("npm", npm)):
        if script:
            stand_in(commands, name, script)
    monkeypatch.setenv("PATH", str(commands))
    with pytest.raises(SetupError, match=message) as error:
        interop.make_node_folder(target)
    assert "\n" not in str(error.value) and not (target / ".stamp").exists()


def test_npm_is_asked_once_and_again_when_the_lock_is_another(tmp_path, monkeypatch):
    commands, source, target = tmp_path / "bin", tmp_path / "source", tmp_path / "interop"
    commands.mkdir()
    source.mkdir()
    for name in ("package.json", "package-lock.json"):
        (source / name).write_bytes((interop.SOURCE / name).read_bytes())
    stand_in(commands, "node", "echo v22.0.0")
    stand_in(commands, "npm", f'test "$1" = --version && echo 11.0.0 || echo "$@" >> {tmp_path}/asked')
    monkeypatch.setenv("PATH", str(commands))
    for _ in range(2):
        interop.make_node_folder(target, source)
    asked = (tmp_path / "asked").read_text().splitlines()
    assert len(asked) == 1 and asked[0].startswith("ci --ignore-scripts")
    with open(source / "package-lock.json", "a") as lock:
        lock.write("\n")
    interop.make_node_folder(target, source)
    assert len((tmp_path / "asked").read_text().splitlines()) == 2


# --------------------------------------------------------------------------------------------------------------------- the table


def made_up(read=None, write=None) -> interop.Program:
    """spz-js as if it did everything right, but for what is given."""

    def reads(jobs, _):
        return [
            Seen.of_gaussians(load(path, up="Z")).turned(np.diag([1.0, -1, -1]) if ".spz" in form else np.eye(3)) for form, path in jobs
        ]

    def writes(jobs, _, gaussians):
        for format, path in jobs:
            if format == ".compressed.ply":
                path.write_bytes((interop.FROZEN / "spz-js.compressed.ply").read_bytes())
            else:
                save(_turned_about_x(gaussians) if ".spz" in format else gaussians, path)
        return [None for _ in jobs]

    return interop.Program("spz-js", "0", read or reads, write or writes)


def test_the_table_says_yes_no_or_wrong(tmp_path):
    known = functools.partial(interop.report, folder=tmp_path, node=None, count=18)
    table, wrong = known([made_up()])
    lines = table.splitlines()[2:]
    assert wrong == 0 and len(lines) == 5
    assert all("| yes |" in line for line in lines)

    def refuse(jobs, _):
        return [Refused("cannot read that") for _ in jobs]

    table, wrong = known([made_up(read=refuse)])
    assert wrong == 2, "it should read .ply and .spz 2, and is known not to read 3 and 4"
    assert [line.split("|")[3].strip() for line in table.splitlines()[2:]] == ["", "WRONG", "WRONG", "no", "no"]
    assert table.count('"cannot read that"') == 4

    def mirrored(jobs, _):
        return [Seen.of_gaussians(load(path, up="Z")).turned(np.diag([-1.0, 1, 1])) for _, path in jobs]

    table, wrong = known([made_up(read=mirrored)])
    assert wrong == 4 and "MIRRORED to (-x, y, z)" in table

    def bad(jobs, _, gaussians):
        for (_, path), content in zip(jobs, itertools.cycle([b"ply\n", b"no file of theirs"]), strict=False):
            path.write_bytes(content)
        return [None for _ in jobs]

    table, wrong = known([made_up(write=bad)])
    assert wrong == 3 and table.count("we do not read it") == 3
