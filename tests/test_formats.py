"""Splat files: round trips, files of other programs, damaged files."""

from __future__ import annotations

import gzip
import json
import struct
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from plyfile import PlyData, PlyElement

from generator.errors import InputError, WorkError
from generator.formats import SUFFIXES, axes, load, load_metadata, save, spz
from generator.formats.raw import SH_C0
from generator.gaussians import Gaussians

FULL_HEADER = [
    "x", "y", "z", "nx", "ny", "nz", "f_dc_0", "f_dc_1", "f_dc_2",
    "opacity", "scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3",
]  # fmt: skip


def random_gaussians(count: int = 500, seed: int = 0) -> Gaussians:
    generator = torch.Generator().manual_seed(seed)
    return Gaussians(
        means=torch.rand(count, 3, generator=generator) - 0.5,
        quaternions=torch.nn.functional.normalize(torch.randn(count, 4, generator=generator), dim=1),
        scales=torch.exp(torch.randn(count, 3, generator=generator) - 4),
        opacities=torch.rand(count, generator=generator),
        colors=torch.rand(count, 3, generator=generator),
    )


def write_ply(path: Path, columns: dict[str, np.ndarray], text: bool = False, byte_order: str = "<") -> Path:
    dtype = [(name, values.dtype) for name, values in columns.items()]
    table = np.empty(len(next(iter(columns.values()))), dtype=dtype)
    for name, values in columns.items():
        table[name] = values
    PlyData([PlyElement.describe(table, "vertex")], text=text, byte_order="=" if text else byte_order).write(str(path))
    return path


def foreign_columns(gaussians: Gaussians, dtype: type = np.float32) -> dict[str, np.ndarray]:
    """Raw columns as another program would write them, in an order of its own."""
    opacities = gaussians.opacities.double().numpy()
    columns = {f"scale_{i}": np.log(gaussians.scales[:, i].double().numpy()) for i in range(3)}
    columns |= {f"rot_{i}": 3.7 * gaussians.quaternions[:, i].double().numpy() for i in range(4)}
    columns |= {f"f_rest_{i}": np.zeros(len(gaussians)) for i in range(9)}
    columns |= {f"f_dc_{i}": (gaussians.colors[:, i].double().numpy() - 0.5) / SH_C0 for i in range(3)}
    columns |= {"z": gaussians.means[:, 2].numpy(), "y": gaussians.means[:, 1].numpy(), "x": gaussians.means[:, 0].numpy()}
    columns |= {"opacity": np.log(opacities / (1 - opacities))}
    return {name: values.astype(dtype) for name, values in columns.items()}


def assert_close(a: Gaussians, b: Gaussians, tolerance: float = 1e-5) -> None:
    for name in ("means", "quaternions", "scales", "opacities", "colors"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), atol=tolerance, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_ply_keeps_the_gaussians(tmp_path: Path) -> None:
    gaussians = random_gaussians()
    save(gaussians, tmp_path / "a.ply")
    assert_close(load(tmp_path / "a.ply"), gaussians, 1e-6)


def test_ply_keeps_the_extremes(tmp_path: Path) -> None:
    gaussians = random_gaussians(4).replace(
        opacities=torch.tensor([0.0, 1.0, 1e-9, 0.5]), colors=torch.tensor([[0.0, 1, 0.5]]).repeat(4, 1), scales=torch.full((4, 3), 1e-20)
    )
    save(gaussians, tmp_path / "a.ply")
    raw = PlyData.read(str(tmp_path / "a.ply"))["vertex"]
    assert all(np.isfinite(raw[name]).all() for name in FULL_HEADER)
    assert_close(load(tmp_path / "a.ply"), gaussians)


def test_ply_header_is_what_viewers_expect(tmp_path: Path) -> None:
    save(random_gaussians(3), tmp_path / "a.ply", metadata={"prompt": "a red\narmchäir"})
    content = (tmp_path / "a.ply").read_bytes()
    header, _, body = content.partition(b"end_header\n")
    lines = header.decode("ascii").splitlines()
    assert lines[:2] == ["ply", "format binary_little_endian 1.0"]
    assert [line for line in lines if line.startswith("property")] == [f"property float {name}" for name in FULL_HEADER]
    assert len(body) == 3 * 4 * len(FULL_HEADER)


def test_provenance_survives_in_a_ply_only(tmp_path: Path) -> None:
    metadata = {"prompt": 'a "red"\narmchäir', "seed": 3}
    for suffix in SUFFIXES:
        save(random_gaussians(3), tmp_path / f"a{suffix}", metadata=metadata)
    assert load_metadata(tmp_path / "a.ply") == metadata
    assert load_metadata(tmp_path / "a.spz") is None
    deep = (tmp_path / "a.ply").read_bytes().replace(b'"prompt": ', b'"prompt": ' + b"[" * 10_000, 1)
    (tmp_path / "deep.ply").write_bytes(deep)
    assert load_metadata(tmp_path / "deep.ply") is None
    save(random_gaussians(3), tmp_path / "b.ply")
    assert load_metadata(tmp_path / "b.ply") is None
    with pytest.raises(InputError, match="metadata"):
        save(random_gaussians(3), tmp_path / "c.ply", metadata={"prompt": "x" * 100_000})
    with pytest.raises(InputError, match="metadata"):
        save(random_gaussians(3), tmp_path / "c.ply", metadata={"seed": object()})
    assert not (tmp_path / "c.ply").exists()
    # Python's JSON parser ends in a RecursionError.
    content = (tmp_path / "b.ply").read_bytes()
    (tmp_path / "b.ply").write_bytes(content.replace(b"element", b"comment gaussian-atlas " + b"[" * 100_000 + b"\nelement", 1))
    assert load_metadata(tmp_path / "b.ply") is None and len(load(tmp_path / "b.ply")) == 3


@pytest.mark.parametrize(("dtype", "text", "byte_order"), [("f4", False, "<"), ("f8", False, ">"), ("f4", True, "=")])
def test_ply_of_other_programs(tmp_path: Path, dtype: str, text: bool, byte_order: str) -> None:
    gaussians = random_gaussians(50)
    path = write_ply(tmp_path / "a.ply", foreign_columns(gaussians, np.dtype(dtype).type), text, byte_order)
    assert_close(load(path), gaussians)


def test_ply_colours_of_point_clouds(tmp_path: Path) -> None:
    gaussians = random_gaussians(50)
    columns = {name: values for name, values in foreign_columns(gaussians).items() if not name.startswith("f_")}
    write_ply(tmp_path / "grey.ply", columns)
    assert (load(tmp_path / "grey.ply").colors == 0.5).all()
    names = ("red", "green", "blue")
    as_bytes = {name: np.rint(gaussians.colors[:, i].numpy() * 255).astype(np.uint8) for i, name in enumerate(names)}
    write_ply(tmp_path / "bytes.ply", columns | as_bytes)
    torch.testing.assert_close(load(tmp_path / "bytes.ply").colors, gaussians.colors, atol=0.5 / 255 + 1e-6, rtol=0)
    write_ply(tmp_path / "floats.ply", columns | {name: gaussians.colors[:, i].numpy() for i, name in enumerate(names)})
    torch.testing.assert_close(load(tmp_path / "floats.ply").colors, gaussians.colors)


def test_ply_without_opacity_or_third_scale(tmp_path: Path) -> None:
    gaussians = random_gaussians(50)
    columns = foreign_columns(gaussians)
    del columns["opacity"], columns["scale_2"]
    loaded = load(write_ply(tmp_path / "a.ply", columns))
    assert (loaded.opacities == 1).all()
    assert (loaded.scales[:, 2] < 0.011 * loaded.scales[:, :2].min(1).values).all()


def test_ply_with_infinities_and_nans(tmp_path: Path) -> None:
    gaussians = random_gaussians(6)
    columns = foreign_columns(gaussians)
    columns["opacity"][:2] = [np.inf, -np.inf]
    columns["scale_0"][2] = -np.inf
    columns["x"][3] = np.nan
    columns["scale_1"][4] = np.nan
    for i in range(4):
        columns[f"rot_{i}"][5] = 0
    path = write_ply(tmp_path / "a.ply", columns)
    with pytest.warns(UserWarning, match="dropped 2 of 6"):
        loaded = load(path)
    assert len(loaded) == 4 and loaded.finite().all()
    assert loaded.opacities[:2].tolist() == [1, 0]
    assert loaded.scales[2, 0] > 0
    assert loaded.quaternions[3].tolist() == [1, 0, 0, 0]


def test_ply_colours_and_sizes_stay_in_range(tmp_path: Path) -> None:
    columns = foreign_columns(random_gaussians(3))
    columns["f_dc_0"][:] = [-50, 0, 50]
    columns["scale_0"][:] = [-300, 0, 300]
    loaded = load(write_ply(tmp_path / "a.ply", columns))
    assert loaded.colors[:, 0].tolist() == [0, 0.5, 1]
    assert loaded.finite().all()


def test_splat_keeps_what_eight_bits_can(tmp_path: Path) -> None:
    gaussians = random_gaussians()
    save(gaussians, tmp_path / "a.splat")
    loaded = load(tmp_path / "a.splat")
    assert (tmp_path / "a.splat").stat().st_size == 32 * len(gaussians)
    torch.testing.assert_close(loaded.means, gaussians.means, atol=0, rtol=0)
    torch.testing.assert_close(loaded.scales, gaussians.scales, atol=0, rtol=1e-6)
    torch.testing.assert_close(loaded.colors, gaussians.colors, atol=0.5 / 255 + 1e-6, rtol=0)
    torch.testing.assert_close(loaded.opacities, gaussians.opacities, atol=0.5 / 255 + 1e-6, rtol=0)
    torch.testing.assert_close(loaded.quaternions, gaussians.quaternions, atol=0.015, rtol=0)


def test_splat_record(tmp_path: Path) -> None:
    save(
        Gaussians(
            means=torch.tensor([[1.0, -2, 3]]),
            quaternions=torch.tensor([[1.0, 0, 0, 0]]),
            scales=torch.tensor([[0.5, 0.25, 0.125]]),
            opacities=torch.tensor([0.2]),
            colors=torch.tensor([[1.0, 0.4, 0]]),
        ),
        tmp_path / "a.splat",
    )
    expected = struct.pack("<6f8B", 1, -2, 3, 0.5, 0.25, 0.125, 255, 102, 0, 51, 255, 128, 128, 128)
    assert (tmp_path / "a.splat").read_bytes() == expected


def test_spz_keeps_what_its_bits_can(tmp_path: Path) -> None:
    gaussians = random_gaussians()
    save(gaussians, tmp_path / "a.spz")
    loaded = load(tmp_path / "a.spz")
    torch.testing.assert_close(loaded.means, gaussians.means, atol=2**-17 + 1e-7, rtol=0)
    torch.testing.assert_close(loaded.scales, gaussians.scales, atol=0, rtol=0.033)
    torch.testing.assert_close(loaded.opacities, gaussians.opacities, atol=0.5 / 255 + 1e-6, rtol=0)
    torch.testing.assert_close(loaded.colors, gaussians.colors, atol=0.5 * SH_C0 / (0.15 * 255) + 1e-6, rtol=0)
    # The rotation of an ellipsoid is only defined up to half turns: compare the ellipsoids, at the written sizes.
    exact = gaussians.replace(scales=loaded.scales).covariances()
    error = (loaded.covariances() - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    assert error.max() < 0.03


def test_spz_is_reproducible_and_adapts_its_fixed_point(tmp_path: Path) -> None:
    gaussians = random_gaussians(20)
    save(gaussians, tmp_path / "a.spz")
    save(gaussians, tmp_path / "b.spz")
    assert (tmp_path / "a.spz").read_bytes() == (tmp_path / "b.spz").read_bytes()
    large = gaussians.replace(means=gaussians.means * 1e5)
    save(large, tmp_path / "large.spz")
    torch.testing.assert_close(load(tmp_path / "large.spz").means, large.means, atol=0.01, rtol=0)
    with pytest.raises(InputError, match="does not fit"):
        save(gaussians.replace(means=gaussians.means * 1e9), tmp_path / "huge.spz")


def test_spz_and_ply_against_gsply(tmp_path: Path) -> None:
    """Another implementation reads our files; it copies .spz axes where Niantic's library turns them about X."""
    gsply = pytest.importorskip("gsply")
    gaussians = random_gaussians()
    save(gaussians, tmp_path / "a.ply")
    save(gaussians, tmp_path / "a.spz")
    turn = np.array([1, -1, -1], dtype=np.float32)
    for data, ours, signs in (
        (gsply.plyread(tmp_path / "a.ply"), load(tmp_path / "a.ply"), 1),
        (gsply.read_spz(tmp_path / "a.spz"), load(tmp_path / "a.spz"), turn),
    ):
        theirs = Gaussians(
            means=torch.from_numpy(data.means * signs),
            quaternions=torch.nn.functional.normalize(torch.from_numpy(data.quats * np.append(1, signs * np.ones(3)).astype("f4")), dim=1),
            scales=torch.from_numpy(np.exp(data.scales)),
            opacities=torch.from_numpy(1 / (1 + np.exp(-data.opacities.reshape(-1)))),
            colors=torch.from_numpy(0.5 + SH_C0 * data.sh0.reshape(-1, 3).astype("f4")),
        )
        assert_close(theirs.to(torch.float32), ours)


def test_spz_version_3_of_gsply(tmp_path: Path) -> None:
    gsply = pytest.importorskip("gsply")
    gaussians = random_gaussians()
    save(gaussians, tmp_path / "a.ply")
    gsply.write_spz(tmp_path / "a.spz", gsply.plyread(tmp_path / "a.ply"), version=3)
    loaded = load(tmp_path / "a.spz")
    half_turn = torch.tensor([1.0, -1, -1])
    torch.testing.assert_close(loaded.means * half_turn, gaussians.means, atol=2e-4, rtol=0)
    quaternions = loaded.quaternions * torch.tensor([1.0, 1, -1, -1])
    assert ((quaternions * gaussians.quaternions).sum(1).abs() > 1 - 1e-4).all()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_damaged_files_give_one_clear_line(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    save(random_gaussians(100), path)
    content = path.read_bytes()
    damaged = {
        "empty": b"",
        "cut in the header": content[:11],
        "cut in the data": content[: len(content) // 2 + 1],
        "text": b"this is not a splat file" * 4 + b"\n",
        "zeros": bytes(33),
    }
    for name, bad in damaged.items():
        path.write_bytes(bad)
        with pytest.raises(InputError) as error:
            load(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value), name


POINT_PROPERTIES = "property float x\nproperty float y\nproperty float z\n"


def header(count: object, properties: str = POINT_PROPERTIES, form: str = "binary_little_endian") -> bytes:
    return f"ply\nformat {form} 1.0\nelement vertex {count}\n{properties}end_header\n".encode()


GAUSSIAN_PROPERTIES = "".join(f"property float {name}\n" for name in FULL_HEADER)


@pytest.mark.parametrize(
    "content",
    [
        header(10**12, GAUSSIAN_PROPERTIES),
        header(10**12, GAUSSIAN_PROPERTIES, "ascii"),
        header(10**30, GAUSSIAN_PROPERTIES),
        header(-5, GAUSSIAN_PROPERTIES),
        header("many", GAUSSIAN_PROPERTIES),
        header(0, GAUSSIAN_PROPERTIES),
        header(10**12, GAUSSIAN_PROPERTIES + "property list uchar int vertex_indices\n"),
        header(1) + bytes(12),
        header(1, GAUSSIAN_PROPERTIES.replace("float x", "list uchar float x")) + bytes(65),
        header(1, GAUSSIAN_PROPERTIES, "ascii") + b"1 2 three\n",
        header(1, GAUSSIAN_PROPERTIES, "binary_middle_endian") + bytes(68),
        header(1, GAUSSIAN_PROPERTIES + "property quaternion q\n") + bytes(68),
        header(1, GAUSSIAN_PROPERTIES + "property float x\n") + bytes(72),
        header(1, GAUSSIAN_PROPERTIES) + struct.pack("<17f", *[float("nan")] * 17),
        b"ply\nformat ascii 1.0\nend_header\n",
        b"ply\n\xff\xfe\nend_header\n",
        b"ply\n" + b"comment x\n" * 100_000,
        b"plywood",
    ],
)
def test_absurd_plys_give_one_clear_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.ply"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_compressed_ply_of_supersplat(tmp_path: Path) -> None:
    """Another program's writer; 600 Gaussians fill two chunks and part of a third."""
    gsply = pytest.importorskip("gsply")
    gaussians = random_gaussians(600)
    save(gaussians, tmp_path / "a.ply")
    gsply.plywrite(str(tmp_path / "a.compressed.ply"), gsply.plyread(tmp_path / "a.ply"), compressed=True)
    (written,) = tmp_path.glob("*.compressed.ply")
    loaded = load(written)
    # The writer sorts along a space-filling curve: match by position.
    nearest = torch.cdist(loaded.means, gaussians.means).argmin(1)
    assert len(set(nearest.tolist())) > 590
    expected = gaussians[nearest]
    torch.testing.assert_close(loaded.means, expected.means, atol=1.1e-3, rtol=0)
    torch.testing.assert_close(loaded.colors, expected.colors, atol=0.01, rtol=0)
    torch.testing.assert_close(loaded.opacities, expected.opacities, atol=0.01, rtol=0)
    torch.testing.assert_close(loaded.scales.log(), expected.scales.log(), atol=0.01, rtol=0)
    assert ((loaded.quaternions * expected.quaternions).sum(1).abs() > 1 - 1e-4).all()


def test_incomplete_compressed_ply_is_one_clear_line(tmp_path: Path) -> None:
    path = tmp_path / "a.compressed.ply"
    path.write_bytes(header(1, "property uint packed_position\nproperty uint packed_rotation\n") + bytes(8))
    with pytest.raises(InputError, match="compressed PLY: it lacks packed_scale"):
        load(path)


@pytest.mark.parametrize("name", ["f_rest_0", "red", "opacity"])
def test_a_property_that_is_a_list_is_named(tmp_path: Path, name: str) -> None:
    properties = GAUSSIAN_PROPERTIES.replace("float opacity", "float transparency").replace("f_dc_0", "f_dc")
    properties += "".join(f"property {'list uchar float' if color == name else 'float'} {color}\n" for color in ("red", "green", "blue"))
    properties += f"property list uchar float {name}\n" if name != "red" else ""
    (tmp_path / "a.ply").write_bytes(
        header(1, properties, "ascii") + b"0.5 " * 17 + (b"1 1 1 1" if name == "red" else b"1 1 1 1 1") + b"\n"
    )
    with pytest.raises(InputError, match=f"the property {name} is a list"):
        load(tmp_path / "a.ply")


@pytest.mark.parametrize("name", ["min_x", "max_scale_z", "min_r"])
def test_a_limit_that_is_a_list_is_named(tmp_path: Path, name: str) -> None:
    limits = [f"{end}_{axis}" for axis in ("x", "y", "z", "scale_x", "scale_y", "scale_z", "r", "g", "b") for end in ("min", "max")]
    kinds = "".join(f"property {'list uchar float' if limit == name else 'float'} {limit}\n" for limit in limits)
    packed = "".join(f"property uint packed_{which}\n" for which in ("position", "rotation", "scale", "color"))
    values = " ".join("1 0.5" if limit == name else "0.5" for limit in limits)
    text = f"ply\nformat ascii 1.0\nelement chunk 1\n{kinds}element vertex 1\n{packed}end_header\n{values}\n1 2 3 4\n"
    (tmp_path / "a.ply").write_text(text)
    with pytest.raises(InputError, match=f"the property {name} is a list"):
        load(tmp_path / "a.ply")


def test_a_mesh_is_named_as_one(tmp_path: Path) -> None:
    path = tmp_path / "mesh.ply"
    faces = "element face 1\nproperty list uchar int vertex_indices\n"
    path.write_bytes(header(3, POINT_PROPERTIES + faces, "ascii") + b"0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n")
    with pytest.raises(InputError, match=r"is a mesh \(1 faces\)"):
        load(path)


def six_sides() -> Gaussians:
    """A ball of six caps of splats, each side with a colour of its own, flat along the outward axis; right is +X, front is -Y."""
    colors = {"right": (1, 0, 0), "left": (0, 1, 1), "back": (0, 1, 0), "front": (1, 0, 1), "top": (0, 0, 1), "bottom": (1, 1, 0)}
    normals = torch.tensor([[1.0, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1]])
    half = 0.5**0.5
    to_x, to_y, to_z = [half, 0, half, 0], [half, -half, 0, 0], [1.0, 0, 0, 0]  # turn a splat's thin Z to the side's axis
    return Gaussians(
        means=0.5 * normals,
        quaternions=torch.tensor([to_x, to_x, to_y, to_y, to_z, to_z]),
        scales=torch.tensor([[0.2, 0.1, 0.01]]).repeat(6, 1),
        opacities=torch.full((6,), 0.8),
        colors=torch.tensor([list(map(float, color)) for color in colors.values()]),
    )


# Where +X, -X, +Y, -Y, +Z, -Z of an object (right, left, back, front, top, bottom) lie in each world.
WORLDS = {
    "Z": "right left back front top bottom",
    "-Y": "right left bottom top back front",  # Y down, Z into the picture
    "Y": "right left top bottom front back",  # Y up, Z towards the viewer
}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("up", axes.UP)
def test_each_side_is_where_the_axes_put_it(tmp_path: Path, suffix: str, up: str) -> None:
    sides = ["right", "left", "back", "front", "top", "bottom"]
    ball = six_sides()
    path = tmp_path / f"ball{suffix}"
    save(ball, path, up=up)
    held = load(path, up="Z")
    for axis, side in enumerate(WORLDS[up].split()):
        expected = ball[torch.tensor([sides.index(side)])]
        direction = torch.zeros(3)
        direction[axis // 2] = 0.5 - axis % 2
        row = (held.means - direction).norm(dim=1).argmin()
        torch.testing.assert_close(held.means[row], direction, atol=1e-4, rtol=0)
        torch.testing.assert_close(held.colors[row], expected.colors[0], atol=0.02, rtol=0)
        assert held.covariances()[row, axis // 2, axis // 2] < 0.015**2, f"the splat of the {side} lies flat on it"
    again = load(path, up=None if suffix == ".ply" else up)
    assert load_metadata(path) is None
    torch.testing.assert_close(again.means, ball.means, atol=1e-4, rtol=0)
    torch.testing.assert_close(again.covariances(), ball.covariances(), atol=2e-3, rtol=0)
    with pytest.raises(InputError, match="axes"):
        save(ball, path, up="up")


def test_spz_has_its_own_axes(tmp_path: Path) -> None:
    """What viewers of .spz show upright has Y up and Z towards the viewer in the file, whatever the .ply's axes are."""
    gsply = pytest.importorskip("gsply")
    save(six_sides(), tmp_path / "ball.spz", up="-Y")
    stored = gsply.read_spz(tmp_path / "ball.spz").means
    top, front = 4, 3
    np.testing.assert_allclose(stored[[top, front]], [[0, 0.5, 0], [0, 0, 0.5]], atol=1e-4)


@pytest.mark.parametrize("version", [3, 4])
def test_spz_of_newer_versions_against_gsply(tmp_path: Path, version: int) -> None:
    gsply = pytest.importorskip("gsply")
    gaussians = random_gaussians()
    turn = torch.tensor([1.0, -1, -1])
    save(gaussians, tmp_path / "ours.spz", spz_version=version)
    theirs = gsply.read_spz(tmp_path / "ours.spz")
    torch.testing.assert_close(torch.from_numpy(theirs.means) * turn, gaussians.means, atol=2**-17 + 1e-7, rtol=0)
    save(gaussians, tmp_path / "a.ply")
    gsply.write_spz(tmp_path / "theirs.spz", gsply.plyread(tmp_path / "a.ply"), version=version)
    for path, axis in ((tmp_path / "ours.spz", torch.ones(3)), (tmp_path / "theirs.spz", turn)):
        loaded = load(path)
        torch.testing.assert_close(loaded.means * axis, gaussians.means, atol=2e-4, rtol=0)
        quaternions = loaded.quaternions * torch.cat([torch.ones(1), axis])
        assert ((quaternions * gaussians.quaternions).sum(1).abs() > 1 - 1e-4).all()
        torch.testing.assert_close(loaded.opacities, gaussians.opacities, atol=0.5 / 255 + 1e-6, rtol=0)
    with pytest.raises(InputError, match="version 5"):
        save(gaussians, tmp_path / "b.spz", spz_version=5)


def test_damaged_spz_of_version_4_gives_one_clear_line(tmp_path: Path) -> None:
    path = tmp_path / "a.spz"
    save(random_gaussians(50), path, spz_version=4)
    content = path.read_bytes()
    bad_streams = content[:32] + struct.pack("<Q", 2**60) + content[40:]
    bad_count = content[:8] + struct.pack("<I", 2**32 - 1) + content[12:]
    for damaged in (
        content[:20],
        content[:60],
        content[:-30],
        content[:-1],
        bad_streams,
        bad_count,
        content[:140] + bytes(20) + content[160:],
    ):
        path.write_bytes(damaged)
        with pytest.raises(InputError) as error:
            load(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("stated", [True, False])
def test_a_small_spz_of_version_4_does_not_fill_the_memory(tmp_path: Path, stated: bool) -> None:
    """Ten million Gaussians that are all alike are a few kilobytes; frames need not state what they hold, and may state anything."""
    zstandard = pytest.importorskip("zstandard")

    def write(count: int, lies: int = 0) -> Path:
        streams = []
        for width in (9, 1, 3, 3, 4):
            packer = zstandard.ZstdCompressor().compressobj(size=count * width if stated else -1)
            streams.append(packer.compress(bytes(count * width)) + packer.flush())
        if lies:
            streams[0] = streams[0][:4] + bytes([0xE0]) + struct.pack("<Q", lies) + b"\1\0\0"
        table = b"".join(struct.pack("<QQ", len(each), count * width) for each, width in zip(streams, (9, 1, 3, 3, 4), strict=True))
        path = tmp_path / "a.spz"
        path.write_bytes(struct.pack("<4sIIBBBBI12x", b"NGSP", 4, count, 0, 12, 0, 5, 32) + table + b"".join(streams))
        return path

    assert len(load(write(20_000))) == 20_000, "our own files of Gaussians that are all alike are read"
    with pytest.raises(InputError, match="promises 10000000 Gaussians"):
        load(write(10_000_000))
    if stated:
        with pytest.raises(InputError, match="not of 9000 bytes"):
            load(write(1000, lies=2**40))


def test_a_file_that_does_not_fit_in_memory_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(random_gaussians(3), tmp_path / "a.spz")

    def full(*_args: object) -> None:
        raise MemoryError

    monkeypatch.setattr("generator.formats.spz.read", full)
    with pytest.raises(InputError, match=r"a\.spz: it does not fit in this computer's memory"):
        load(tmp_path / "a.spz")


def test_spz_of_version_4_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(random_gaussians(3), tmp_path / "a.spz", spz_version=4)
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(WorkError, match="needs the Python package zstandard"):
        load(tmp_path / "a.spz")
    with pytest.raises(WorkError, match="versions 2 and 3 do not"):
        save(random_gaussians(3), tmp_path / "b.spz", spz_version=4)
    save(random_gaussians(3), tmp_path / "b.spz", spz_version=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.spz", "b.spz"]


def test_the_records_of_an_spz_are_walked_once() -> None:
    """Bytes that count how many of them are copied; a walk that cuts off what it has seen copies the rest each time."""

    class Counted(bytes):
        copied = 0

        def __getitem__(self, key: object) -> bytes:
            found = super().__getitem__(key)
            if isinstance(key, slice):
                Counted.copied += len(found)
                return Counted(found)
            return found

    records = Counted(struct.pack("<II", 0xADBE0002, 0) * 1000 + struct.pack("<III", 0xADBE0003, 4, 7))
    assert spz._stated_axes(Path("a.spz"), records) == 7
    assert Counted.copied <= len(records)


def test_spz_of_version_4_may_state_other_axes(tmp_path: Path) -> None:
    """A record names (left, up, front), glTF's in Niantic's words; an unknown record before it is passed over."""
    ball = six_sides()
    save(ball, tmp_path / "a.spz", spz_version=4)
    content = (tmp_path / "a.spz").read_bytes()
    records = struct.pack("<II5s", 0xADBE0002, 5, b"hello") + struct.pack("<III", 0xADBE0003, 4, 7)
    stated = content[:14] + bytes([2]) + content[15:16] + struct.pack("<I", 32 + len(records)) + content[20:32] + records + content[32:]
    (tmp_path / "stated.spz").write_bytes(stated)
    held = load(tmp_path / "stated.spz")
    torch.testing.assert_close(held.means, ball.means * torch.tensor([-1.0, 1, -1]), atol=1e-4, rtol=0)
    unknown = stated.replace(struct.pack("<III", 0xADBE0003, 4, 7), struct.pack("<III", 0xADBE0003, 4, 17))
    (tmp_path / "unknown.spz").write_bytes(unknown)
    with pytest.raises(InputError, match="are not known"):
        load(tmp_path / "unknown.spz")


def test_colour_that_depends_on_the_view_is_left_out_with_a_warning(tmp_path: Path) -> None:
    gaussians = random_gaussians(5)
    columns = foreign_columns(gaussians)
    columns |= {f"f_rest_{i}": np.full(5, 0.1, np.float32) for i in range(45)}
    with pytest.warns(UserWarning, match="depends on the view .spherical harmonics of degree 3. is left out"):
        load(write_ply(tmp_path / "a.ply", columns))
    columns |= {f"f_rest_{i}": np.zeros(5, np.float32) for i in range(45)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_close(load(write_ply(tmp_path / "b.ply", columns)), gaussians)


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that nobody can write")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot write /proc/"):
        save(random_gaussians(3), "/proc/a.ply")


@pytest.mark.parametrize(
    ("magic", "version", "count", "degree", "bits"),
    [
        (b"NGSP", 2, 2**32 - 1, 0, 12),
        (b"NGSP", 9, 1, 0, 12),
        (b"NGSP", 2, 1, 200, 12),
        (b"NGSP", 2, 1, 0, 255),
        (b"NGSP", 2, 0, 0, 12),
        (b"XXXX", 2, 1, 0, 12),
    ],
)
def test_absurd_spz_headers(tmp_path: Path, magic: bytes, version: int, count: int, degree: int, bits: int) -> None:
    path = tmp_path / "a.spz"
    path.write_bytes(gzip.compress(struct.pack("<4sIIBBBB", magic, version, count, degree, bits, 0, 0) + bytes(100)))
    with pytest.raises(InputError) as error:
        load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_paths(tmp_path: Path) -> None:
    gaussians = random_gaussians(3)
    named = tmp_path / "mit Leerzeichen" / "grüner Stuhl 椅子.SPZ"
    named.parent.mkdir()
    save(gaussians, named)
    assert len(load(named)) == 3
    for bad in (tmp_path / "none.ply", tmp_path, tmp_path / "a.obj"):
        with pytest.raises(InputError):
            load(bad)
    with pytest.raises(InputError, match=r"\.ply, \.splat, \.spz"):
        save(gaussians, tmp_path / "a.obj")
    with pytest.raises(InputError, match="does not exist"):
        save(gaussians, tmp_path / "missing" / "a.ply")
    save(gaussians, str(tmp_path / "A.PLY"))
    assert_close(load(tmp_path / "A.PLY"), gaussians)


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.ply"
    save(random_gaussians(3), path)
    before = path.read_bytes()

    def full_disk(*_args: object, **_kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("generator.formats.ply.PlyData.write", full_disk)
    with pytest.raises(InputError, match="No space left"):
        save(random_gaussians(9), path)
    bad = random_gaussians(3).replace(opacities=torch.tensor([0.1, float("nan"), 0.2]))
    with pytest.raises(InputError, match="1 of 3"):
        save(bad, path)
    with pytest.raises(InputError, match="no Gaussians"):
        save(bad[:0], path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.ply"]


def test_a_loaded_file_can_be_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.ply"
    save(random_gaussians(3), path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an open file handle would warn
        loaded = load(path)
        save(loaded, path)
    assert json.dumps(loaded.means.tolist()) == json.dumps(load(path).means.tolist())
