"""The layout: stored, hashed, and refused when anything in it was changed."""

from __future__ import annotations

import hashlib

import pytest
import torch

from generator.atlas import PROJECTIONS, AtlasLayout
from generator.atlas.layout import cell_centres, default_path, fibonacci_sphere, project
from generator.errors import InputError
from generator.tensors import load_tensors, save_tensors
from trainer.atlas import compute_layout

STORED = [(size, projection) for size in (32, 64, 128) for projection in PROJECTIONS]


@pytest.mark.parametrize(("size", "projection"), STORED)
def test_stored_layouts_are_permutations_of_the_spiral(size, projection):
    layout = AtlasLayout.load_default(size, projection)
    everyone = torch.arange(layout.count)
    assert layout.count == size**2
    assert torch.equal(layout.cell_of_point[layout.point_of_cell], everyone)
    assert torch.equal(layout.point_of_cell[layout.cell_of_point], everyone)
    assert torch.allclose(layout.sphere, fibonacci_sphere(layout.count), atol=1e-6)
    assert torch.equal(layout.cell_sphere[layout.cell_of_point], layout.sphere)


@pytest.mark.parametrize(("size", "projection"), STORED)
def test_directions_on_the_image(size, projection):
    """North above south, the front in the middle, +X to the right of it."""
    image = AtlasLayout.load_default(size, projection).cell_sphere.reshape(size, size, 3)
    assert image[0, :, 2].mean() > 0.8 and image[-1, :, 2].mean() < -0.8
    middle = image[size // 2]
    assert middle[size // 2, 1] < -0.9 and middle[0, 1] > 0.9
    assert middle[3 * size // 4, 0] > 0.9 and middle[size // 4, 0] < -0.9


@pytest.mark.parametrize(("size", "projection"), STORED)
def test_neighbouring_cells_are_neighbours_on_the_sphere(size, projection):
    image = AtlasLayout.load_default(size, projection).cell_sphere.reshape(size, size, 3)
    spacing = (4 * torch.pi / size**2) ** 0.5
    steps = torch.cat([(image[1:] - image[:-1]).norm(dim=2).flatten(), (image[:, 1:] - image[:, :-1]).norm(dim=2).flatten()])
    assert steps.mean() < 2 * spacing


def test_spiral_is_uniform():
    sphere = fibonacci_sphere(2048)
    assert torch.allclose(sphere.norm(dim=1), torch.ones(2048), atol=1e-6)
    assert sphere.mean(0).abs().max() < 1e-3
    distances = (2 - 2 * sphere.double() @ sphere.double().T).clamp_min(0).fill_diagonal_(9).sqrt()
    nearest = distances.min(1).values / (4 * torch.pi / 2048) ** 0.5
    assert nearest.min() > 0.8 and nearest.max() < 1.2


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_projection_stays_in_the_image(projection):
    flat = project(fibonacci_sphere(1000), 10, projection)
    assert flat.min() >= 0 and flat.max() <= 10
    if projection == "equal_area":
        counts = torch.histc(flat[:, 1], bins=10, min=0, max=10)
        assert torch.equal(counts, torch.full((10,), 100.0, dtype=counts.dtype))


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_stored_layout_is_what_compute_layout_makes(projection):
    stored, made = AtlasLayout.load_default(32, projection), compute_layout(32, projection)
    centres = cell_centres(32)

    def cost(layout):
        return (project(layout.sphere, 32, projection) - centres[layout.cell_of_point]).square().sum(1).mean().item()

    assert cost(stored) == pytest.approx(cost(made), rel=1e-6)


def test_id_depends_on_everything():
    layout = compute_layout(4, "equal_area")
    swapped = layout.cell_of_point.clone()
    swapped[[0, 1]] = swapped[[1, 0]]
    others = [
        AtlasLayout(4, "equirectangular", layout.sphere, layout.cell_of_point),
        AtlasLayout(4, "equal_area", layout.sphere, swapped),
        AtlasLayout(4, "equal_area", layout.sphere.flip(0), layout.cell_of_point),
    ]
    assert len({layout.id, *(other.id for other in others)}) == 4
    assert compute_layout(4, "equal_area").id == layout.id


def test_round_trip(tmp_path):
    layout = compute_layout(5, "equirectangular")
    layout.save(tmp_path / "layout.safetensors")
    loaded = AtlasLayout.load(tmp_path / "layout.safetensors")
    assert loaded.id == layout.id and loaded.projection == "equirectangular"
    assert torch.equal(loaded.cell_of_point, layout.cell_of_point) and torch.equal(loaded.sphere, layout.sphere)
    assert [path.name for path in tmp_path.iterdir()] == ["layout.safetensors"]
    before = (tmp_path / "layout.safetensors").read_bytes()
    loaded.save(tmp_path / "layout.safetensors")
    assert (tmp_path / "layout.safetensors").read_bytes() == before


@pytest.mark.parametrize("damage", ["swap", "twice", "out_of_range", "sphere", "not_unit", "missing", "id", "projection", "size", "format"])
def test_damaged_layouts_do_not_load(tmp_path, damage):
    path = tmp_path / "layout.safetensors"
    compute_layout(5, "equal_area").save(path)
    tensors, record = load_tensors(path)
    cells = tensors["cell_of_point"]
    if damage == "swap":
        cells[[0, 1]] = cells[[1, 0]]
    elif damage == "twice":
        cells[0] = cells[1]
    elif damage == "out_of_range":
        cells[0] = 25
    elif damage == "sphere":
        tensors["sphere"] = tensors["sphere"].flip(0)
    elif damage == "not_unit":
        tensors["sphere"] = tensors["sphere"] * 2
    elif damage == "missing":
        del tensors["sphere"]
    else:
        record[damage] = {"id": "0" * 32, "projection": "mercator", "size": "x", "format": "other"}[damage]
    save_tensors(path, tensors, record)
    with pytest.raises(InputError, match="layout.safetensors"):
        AtlasLayout.load(path)


def test_unreadable_files_are_named(tmp_path):
    whole = default_path(32, "equal_area").read_bytes()
    (tmp_path / "short.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.safetensors").write_text("no tensors here")
    for name in ("short.safetensors", "text.safetensors", "absent.safetensors"):
        with pytest.raises(InputError, match=name):
            AtlasLayout.load(tmp_path / name)


def test_only_stored_defaults_load():
    with pytest.raises(InputError, match="32, 64, 128"):
        AtlasLayout.load_default(48)
    with pytest.raises(InputError, match="equirectangular, equal_area"):
        AtlasLayout.load_default(64, "mercator")


def test_identical_layouts_hash_the_same_bytes():
    """The id is specified: readers in other languages can compute it."""
    layout = compute_layout(3, "equal_area")
    digest = hashlib.sha256(b"gaussian-atlas-layout-1:3:equal_area:")
    digest.update(layout.sphere.numpy().astype("<f4").tobytes() + layout.cell_of_point.numpy().astype("<i4").tobytes())
    assert layout.id == digest.hexdigest()[:32]
