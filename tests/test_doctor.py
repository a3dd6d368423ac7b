"""The doctor passes good atlases, calls every wrong one sick and says why, in the table, in JSON and in the picture alike."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from generator.atlas import Atlas, AtlasLayout, from_atlas, pack
from generator.errors import InputError
from generator.formats import save
from generator.gaussians import Gaussians
from generator.render import Cameras, render
from trainer import doctor
from trainer.__main__ import main
from trainer.atlas import filling_order, order_by_cell, to_atlas
from trainer.dataset import write_shards
from trainer.transport import assign
from trainer.views import Views

SIZE = 32
LAYOUT = AtlasLayout.load_default(SIZE)


def table_with_legs(count: int = SIZE**2, seed: int = 0) -> Gaussians:
    """Gaussians on a table top and four legs, coloured by place, in no order."""
    rng = np.random.default_rng(seed)
    share = rng.uniform(size=count)
    means = rng.uniform((-0.5, -0.4, 0.25), (0.5, 0.4, 0.3), (count, 3))
    legs = share > 0.6
    means[legs, :2] = rng.choice([-1, 1], (legs.sum(), 2)) * (0.42, 0.32) + rng.uniform(-0.03, 0.03, (legs.sum(), 2))
    means[legs, 2] = rng.uniform(-0.3, 0.3, legs.sum())
    means = torch.from_numpy(means).float()
    generator = torch.Generator().manual_seed(seed)
    return Gaussians(
        means=means,
        quaternions=torch.nn.functional.normalize(torch.randn(count, 4, generator=generator), dim=1),
        scales=torch.exp(torch.rand(count, 3, generator=generator) - 4.5),
        opacities=torch.rand(count, generator=generator) * 0.2 + 0.8,
        colors=(means + 0.5).clamp(0.02, 0.98),
    )


@pytest.fixture(scope="module")
def gaussians() -> Gaussians:
    return table_with_legs()


@pytest.fixture(scope="module")
def atlas(gaussians) -> Atlas:
    return to_atlas(gaussians, LAYOUT)


def views_of(gaussians: Gaussians) -> Views:
    cameras = Cameras.orbit(3, 48)
    drawn = render(gaussians, cameras, background=(0, 0, 0))
    straight = drawn.rgb / drawn.alpha[..., None].clamp_min(1e-6)
    rgba = (torch.cat([straight, drawn.alpha[..., None]], dim=3).clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    empty = np.zeros(rgba.shape[:3], np.float16), np.zeros((*rgba.shape[:3], 3), np.int8)
    return Views("table", rgba, *empty, cameras, np.array(["train", "held_out", "held_out"]))


VIEWS = views_of(table_with_legs())


def examined(atlas: Atlas, **case) -> doctor.AtlasReport:
    """The report with scores against small views, which are quicker than renders from four sides."""
    return doctor.examine(doctor.Case("table", atlas, LAYOUT, **{"views": VIEWS, **case}))


def changed(atlas: Atlas, change) -> Atlas:
    values = atlas.values.clone()
    change(values)
    return replace(atlas, values=values)


def store(atlas: Atlas, path: Path) -> Path:
    """An atlas file, of values that float16 holds too: then no storage loss is rendered."""
    path.write_bytes(atlas.encode(torch.float16))
    return path


def test_a_good_atlas_is_healthy(atlas):
    report = examined(atlas)
    assert report.healthy and report.reasons == []
    assert 0 <= report.transport.gap < 0.03 and report.transport.saving > 0.98
    assert report.locality == pytest.approx(report.possible_locality, rel=0.02)
    assert 0 < report.neighbours.poles <= 1 and 0 < report.neighbours.seam <= 1 and report.neighbours.interior > 0.2
    assert report.cells == doctor.Cells(0, 0, 0, 0, 0, 0, 0)


def test_float16_is_healthy_too(atlas):
    assert examined(replace(atlas, values=atlas.values.half().float())).healthy


def test_cost_and_bound_are_those_of_transport(gaussians, atlas):
    exact = assign(gaussians.means.numpy(), LAYOUT.sphere.numpy(), "exact")
    stored = doctor.transport_of_cells(from_atlas(atlas, LAYOUT).means, LAYOUT)[0]
    assert stored.lower_bound <= exact.cost * (1 + 1e-6) <= stored.cost * (1 + 2e-6)
    assert stored.cost == pytest.approx(float((from_atlas(atlas, LAYOUT).means - LAYOUT.cell_sphere).square().sum(1).mean()), rel=1e-4)
    best = pack(gaussians[order_by_cell(torch.from_numpy(exact.indices), LAYOUT)], LAYOUT)
    assert doctor.transport_of_cells(from_atlas(best, LAYOUT).means, LAYOUT)[0].cost == pytest.approx(exact.cost, rel=1e-5)


def test_random_order_saves_nothing(gaussians):
    stored, fresh = doctor.transport_of_cells(gaussians.means, LAYOUT)
    assert abs(stored.saving) < 0.1
    assert torch.equal(fresh.sort().values, torch.arange(LAYOUT.count))
    assert doctor.transport_of_cells(gaussians.means[fresh], LAYOUT)[0].saving > 0.98


def wrong_orders(gaussians: Gaussians) -> dict[str, torch.Tensor]:
    """Compositions of the sphere's and the plane's permutation that all read back perfectly."""
    points = torch.from_numpy(assign(gaussians.means.numpy(), LAYOUT.sphere.numpy()).indices)
    inverse, cell, point = torch.argsort(points), LAYOUT.cell_of_point, LAYOUT.point_of_cell
    return {
        "the order of the sphere": inverse,
        "the order of the input": torch.arange(LAYOUT.count),
        "no inverse": cell[points],
        "plane inverted": torch.argsort(point[points]),
        "sphere inverted": torch.argsort(cell[inverse]),
        "both inverted": torch.argsort(point[inverse]),
        "plane first": torch.argsort(points[cell]),
        "plane first, inverted": torch.argsort(points[point]),
    }


def test_every_wrong_composition_is_sick(gaussians):
    for name, order in wrong_orders(gaussians).items():
        report = examined(pack(gaussians[order], LAYOUT))
        assert len(report.reasons) == 1, name
        assert report.reasons[0].startswith("cells are not neighbours in space: sphere and plane indices are composed wrongly"), name
        assert report.neighbours.everywhere < 0.15 and report.transport.gap > 0.05, name


@pytest.mark.parametrize("change", [lambda x: x.roll(SIZE // 4, 1), lambda x: x.flip(0), lambda x: x.transpose(0, 1)])
def test_a_turned_image_is_sick_although_neighbours_stay(gaussians, change):
    right = order_by_cell(torch.from_numpy(assign(gaussians.means.numpy(), LAYOUT.sphere.numpy()).indices), LAYOUT)
    report = examined(pack(gaussians[change(right.reshape(SIZE, SIZE)).flatten()], LAYOUT))
    assert len(report.reasons) == 1 and "not at their places on the sphere" in report.reasons[0]
    assert report.locality > 0.9 * report.possible_locality


@pytest.mark.parametrize(
    ("change", "count", "reason"),
    [
        (lambda values: values[5, 2].fill_(torch.nan), {"not_finite": SIZE}, "NaN or infinity in 32 of 1024 cells"),
        (lambda values: values[0, 2, 3].fill_(torch.inf), {"not_finite": 1}, "NaN or infinity in 1 of 1024 cells"),
        (lambda values: values[4, 2].fill_(1.5), {"clipped": SIZE}, "in 32 of 1024 cells"),
        (lambda values: values[8:11, 2, 4:6].fill_(3.0), {"clipped": 2}, "in 2 of 1024 cells"),
        (lambda values: values[7, 3].sub_(0.3), {"clipped": SIZE}, "copies of the opacity that differ"),
        (lambda values: values[1, 3, 3].add_(4), {"stray": 1}, "beyond 3 object lengths in 1 of 1024 cells"),
        (lambda values: values[3:12:4, :4].fill_(-8), {"transparent": 4 * SIZE}, "128 of 1024 cells show nothing"),
    ],
)
def test_damage_is_found_and_counted(atlas, change, count, reason):
    report = examined(changed(atlas, change))
    assert any(reason in line for line in report.reasons), report.reasons
    for name, value in count.items():
        assert getattr(report.cells, name) == value


def test_points_and_few_transparent_cells_are_counted_but_no_illness(gaussians):
    scales, opacities = gaussians.scales.clone(), gaussians.opacities.clone()
    scales[:5], opacities[3:10] = 1e-9, 0.001
    report = examined(to_atlas(gaussians.replace(scales=scales, opacities=opacities), LAYOUT))
    assert report.healthy and (report.cells.points, report.cells.transparent) == (5, 7)


@pytest.mark.parametrize("count", [300, 653, 1023])
def test_empty_cells_are_no_illness(count):
    """Fewer Gaussians than cells: the empty ones are told from dead ones, and transport is judged without them."""
    original = table_with_legs(count)
    small = to_atlas(original, LAYOUT)
    report = examined(small, original=original, views=None)
    assert report.healthy and report.cells == doctor.Cells(SIZE**2 - count, 0, 0, 0, 0, 0, 0)
    assert 0 <= report.transport.gap < 0.03 and report.transport.saving > 0.98
    assert [stage.name for stage in report.stages] == ["fit", "atlas", "atlas in float16"] and report.stages[1].psnr > 60
    assert f"{SIZE**2 - count} empty" in doctor.table(report)
    order, filled = torch.arange(SIZE**2), filling_order(SIZE)[:count].sort().values
    order[filled] = filled.flip(0)
    turned = examined(pack(from_atlas(small, LAYOUT)[order], LAYOUT))
    assert turned.cells.empty == SIZE**2 - count and turned.transport.saving < 0.9 and not turned.healthy


def test_duplicates_are_found_through_float16(gaussians):
    copies = torch.arange(LAYOUT.count)
    copies[:200] = torch.arange(300, 500)
    atlas = to_atlas(gaussians[copies], LAYOUT)
    for stored in (atlas, replace(atlas, values=atlas.values.half().float())):
        report = examined(stored)
        assert report.cells.duplicates == 400 and "400 of 1024 cells repeat another cell" in report.reasons[0]


def test_channel_statistics_are_numpy_s(atlas):
    for channel, values in zip(doctor.channel_statistics(atlas), atlas.values.double().flatten(1).numpy(), strict=True):
        centred = values - values.mean()
        assert channel.minimum == values.min() and channel.maximum == values.max()
        assert channel.mean == pytest.approx(values.mean(), abs=1e-9) and channel.std == pytest.approx(values.std(), rel=1e-9)
        assert channel.skewness == pytest.approx((centred**3).mean() / values.std() ** 3, rel=1e-6, abs=1e-9)
    assert [channel.name for channel in doctor.channel_statistics(atlas)] == list(atlas.spec.names)


def test_clamped_shares_and_roughness():
    values = torch.rand(16, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    values[4] = values[4].clamp(0.25, 0.75)
    values[5] = torch.linspace(0, 1, SIZE)[None]
    values[6] = 0.3
    channels = {channel.name: channel for channel in doctor.channel_statistics(Atlas(values, LAYOUT.id))}
    assert channels["color_r"].at_ends == pytest.approx(0.5, abs=0.05) and channels["offset_x"].at_ends == 0
    assert channels["offset_x"].roughness == pytest.approx(1, abs=0.1) and channels["color_g"].roughness < 0.1
    assert (channels["color_b"].std, channels["color_b"].skewness, channels["color_b"].roughness) == (pytest.approx(0, abs=1e-6), 0, 0)
    assert channels["color_b"].at_ends == 1


def test_neighbours_of_a_known_grid():
    """On a flat grid every touching pair is a nearest neighbour, and the first and last column are far apart."""
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    means = torch.stack([columns, rows, torch.zeros_like(rows)], dim=2).reshape(-1, 3)
    assert doctor.neighbour_preservation(means, 16) == doctor.Neighbours(1.0, 1.0, 1.0, 0.0)
    angle = columns / 16 * 2 * torch.pi
    tube = torch.stack([angle.cos(), angle.sin(), rows / 3], dim=2).reshape(-1, 3)
    assert doctor.neighbour_preservation(tube, 16).seam == 1.0
    shuffled = means[torch.randperm(256, generator=torch.Generator().manual_seed(1))]
    assert doctor.neighbour_preservation(shuffled, 16).everywhere < 0.1
    assert doctor.locality(means, 16) > 0.8 > 0.1 > abs(doctor.locality(shuffled, 16))


def test_what_each_stage_loses(gaussians, atlas):
    """Against views of the fit itself: the fit is best, and leaving out Gaussians costs where storing them does not."""
    large = table_with_legs(3 * SIZE**2)
    small = to_atlas(large, LAYOUT)
    stages = examined(small, original=large, views=views_of(large)).stages
    assert [stage.name for stage in stages] == ["fit", "merged to 1024", "atlas", "atlas in float16"]
    fit, resized, packed, half = (stage.psnr for stage in stages)
    assert fit > 35 > resized + 5 and packed == pytest.approx(resized, abs=0.01) and half == pytest.approx(resized, abs=0.5)
    assert all(stage.psnr_foreground <= stage.psnr for stage in stages)
    reference, *others = examined(small, original=large, views=None).stages
    assert reference.psnr is None and [stage.name for stage in others] == ["merged to 1024", "atlas", "atlas in float16"]
    assert 15 < others[0].psnr < 40
    assert [stage.name for stage in examined(atlas).stages] == ["atlas", "atlas in float16"]
    assert examined(replace(atlas, values=atlas.values.half().float()), views=None).stages == []


def test_another_or_an_unknown_layout_is_sick(atlas):
    other = AtlasLayout(SIZE, "equirectangular", LAYOUT.sphere, LAYOUT.cell_of_point.flip(0))
    report = doctor.examine(doctor.Case("table", atlas, other))
    assert not report.healthy and atlas.layout_id in report.reasons[0] and other.id in report.reasons[0]
    assert report.transport is None and len(report.channels) == 16
    report = doctor.examine(doctor.Case("table", replace(atlas, layout_id="0" * 32), None))
    assert not report.healthy and "none of the stored ones" in report.reasons[0]
    assert "SICK" in doctor.table(report)


def run(capsys, *arguments) -> tuple[int, str, str]:
    status = main(["atlas", "doctor", *map(str, arguments)])
    out = capsys.readouterr()
    return status, out.out, out.err


def test_the_command_writes_the_same_in_table_and_json(gaussians, atlas, tmp_path, capsys):
    save(gaussians, tmp_path / "table.ply")
    (tmp_path / "views").mkdir()
    views_of(gaussians).save(tmp_path / "views" / "table.npz")
    views = ("--views", tmp_path / "views")
    status, out, _ = run(capsys, tmp_path / "table.ply", *views, "--json", tmp_path / "f.json", "--layout", f"equirectangular_{SIZE}")
    assert status == 0 and "table: healthy (32 x 32 cells, equirectangular" in out
    found = json.loads((tmp_path / "f.json").read_text())
    (report,) = found["objects"]
    assert report["healthy"] and report["layout_id"] == LAYOUT.id and found["unreadable"] == []
    words = out.split()
    assert f"{report['transport']['cost']:.5f}," in words and f"{report['transport']['gap']:.3%};" in words
    assert f"{report['locality']:.3f}," in words
    for channel in report["channels"]:
        line = next(line for line in out.splitlines() if line.split()[:1] == [channel["name"]])
        values = [channel[key] for key in ("minimum", "mean", "maximum", "std", "skewness")]
        assert line.split()[1:] == [*(f"{value:.3f}" for value in values), f"{channel['at_ends']:.1%}", f"{channel['roughness']:.3f}"]
    for stage in report["stages"]:
        assert any(stage["name"] in line and f"{stage['psnr']:.2f}" in line for line in out.splitlines())


def test_shards_are_summed_up_and_the_worst_are_named(gaussians, atlas, tmp_path, capsys):
    wrong = pack(gaussians[wrong_orders(gaussians)["plane inverted"]], LAYOUT)
    samples = [(f"good-{number}", atlas, {"captions": ["a table"]}) for number in range(8)] + [("bad", wrong, {"captions": ["a table"]})]
    write_shards(samples, tmp_path / "shards")
    status, out, _ = run(capsys, tmp_path / "shards", "--json", tmp_path / "f.json", "--picture", tmp_path / "f.png")
    assert status == 1 and "9 atlases, 1 must not be trained on" in out and "bad: cells are not neighbours" in out
    found = json.loads((tmp_path / "f.json").read_text())
    lines = {line["measure"]: line for line in found["summary"]}
    assert lines["transport gap"]["name"] == lines["locality"]["name"] == "bad"
    assert lines["locality"]["worst"] < 0.5 < lines["locality"]["median"]
    assert [report["name"] for report in found["objects"]] == [name for name, _, _ in samples]
    with Image.open(tmp_path / "f.png") as image:
        assert image.height > 8 * 256


def test_one_shard_and_its_repainted_variants(gaussians, atlas, tmp_path, capsys):
    """A variant is another object to look at: the views of its original do not judge it."""
    red = pack(from_atlas(atlas, LAYOUT).replace(colors=torch.tensor([[1.0, 0, 0]]).repeat(LAYOUT.count, 1)), LAYOUT)
    record = {"object": "table", "captions": ["a table"]}
    (shard,) = write_shards([("table", atlas, record), ("table-red", red, record)], tmp_path)
    views_of(gaussians).save(tmp_path / "table.npz")
    status, out, _ = run(capsys, shard, "--views", tmp_path, "--json", tmp_path / "f.json")
    assert status == 0 and out.count(": healthy") == 2
    first, second = json.loads((tmp_path / "f.json").read_text())["objects"]
    assert first["stages"][0]["psnr"] > 35 and second["stages"] == []


def test_the_picture_shows_the_values_of_the_cells(atlas):
    found = doctor.panels(atlas, LAYOUT)
    assert list(found) == ["position", "colour", "opacity", "scale", "rotation"]
    gaussians = from_atlas(atlas, LAYOUT)
    images = {name: image for name, (_, image) in found.items()}
    assert all(image.shape == (SIZE, SIZE, 3) and image.min() >= 0 and image.max() <= 1 for image in images.values())
    assert torch.equal(images["colour"].reshape(-1, 3), gaussians.colors)
    torch.testing.assert_close(images["position"].reshape(-1, 3), (gaussians.means + 0.5).clamp(0, 1))
    grey = images["opacity"].reshape(-1, 3) @ torch.tensor([0.299, 0.587, 0.114])
    assert (grey[gaussians.opacities.argsort()].diff() >= -1e-6).all(), "more opaque is brighter"
    # Every panel is on the canvas, each cell 8 x 8 pixels.
    report = examined(atlas)
    canvas = np.asarray(doctor.picture([(report, doctor.Case("table", atlas, LAYOUT))])).astype(int)
    for name, image in images.items():
        pixels = (image * 255).round().numpy().astype(int).repeat(8, 0).repeat(8, 1)
        corners = np.argwhere((canvas[: 1 - 256, : 1 - 256] == pixels[0, 0]).all(2))
        assert any(np.array_equal(canvas[row : row + 256, column : column + 256], pixels) for row, column in corners), name


def test_unreadable_paths_are_one_line_each_and_the_others_are_examined(atlas, tmp_path, capsys):
    good = store(atlas, tmp_path / "good.safetensors")
    (tmp_path / "noise.safetensors").write_bytes(b"noise" * 100)
    (tmp_path / "broken.ply").write_text("ply\nnothing")
    (tmp_path / "atlases-000000.tar").write_bytes(good.read_bytes()[:700])
    (tmp_path / "empty").mkdir()
    names = ["noise.safetensors", "broken.ply", "atlases-000000.tar", "empty", "missing.ply", "missing.safetensors"]
    status, out, err = run(capsys, *(tmp_path / name for name in names), good)
    assert status == 2 and "good: healthy" in out
    assert len(err.strip().splitlines()) == len(names)
    for name, line in zip(names, err.splitlines(), strict=False):
        assert line.startswith("trainer: error: ") and name in line
    status, out, _ = run(capsys, good)
    assert status == 0


def test_bad_options_are_one_line(atlas, tmp_path, capsys):
    good = store(atlas, tmp_path / "good.safetensors")
    for arguments, words in [
        (("--layout", "mercator_32"), "stored are"),
        (("--layout", good), "layout"),
        (("--views", tmp_path / "none"), "--views"),
        (("--json", tmp_path / "no" / "f.json"), "does not exist"),
        (("--picture", tmp_path), "is a folder"),
    ]:
        status, out, err = run(capsys, good, *arguments)
        assert status == 2 and words in err and len(err.strip().splitlines()) == 1 and out == ""


def test_a_layout_file_serves_atlases_that_name_it(gaussians, tmp_path, capsys):
    # The stored layout with the image turned by a quarter.
    rows, columns = LAYOUT.cell_of_point // SIZE, LAYOUT.cell_of_point % SIZE
    own = AtlasLayout(SIZE, "equirectangular", LAYOUT.sphere, rows * SIZE + (columns + SIZE // 4) % SIZE)
    own.save(tmp_path / "own.safetensors")
    atlas = store(to_atlas(gaussians, own), tmp_path / "atlas.safetensors")
    status, out, _ = run(capsys, atlas)
    assert status == 1 and "none of the stored ones" in out
    status, out, _ = run(capsys, atlas, "--layout", tmp_path / "own.safetensors")
    assert status == 0 and own.id[:8] in out


def test_a_picture_needs_a_layout(atlas):
    case = doctor.Case("table", replace(atlas, layout_id="0" * 32), None)
    with pytest.raises(InputError, match="--layout"):
        doctor.picture([(doctor.examine(case), case)])
