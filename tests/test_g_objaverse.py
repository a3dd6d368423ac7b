"""G-Objaverse's folders: a sphere written in their format, read back against what the hand computes, then fitted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import OpenEXR
import pytest
import torch
from PIL import Image

from generator.errors import InputError
from generator.render import Cameras
from trainer.__main__ import main
from trainer.dataset import read_shards
from trainer.fit import FitConfig, fit
from trainer.sources.g_objaverse import FOCAL, g_objaverse, import_views, read_views
from trainer.views import Views, read_records

SIDE, RADIUS, DISTANCE = 128, 0.4, 1.6
CENTRE = np.array([0.05, -0.1, 0.08])


def write_object(root: Path, views: int = 12) -> Cameras:
    """A sphere off the centre, red above and blue below, seen from `views` cameras all round, as the data set stores it."""
    cameras = Cameras.around(views, SIDE, radius=DISTANCE)
    columns, rows = np.meshgrid(np.arange(SIDE) + 0.5 - SIDE / 2, np.arange(SIDE) + 0.5 - SIDE / 2)
    for view, viewmat in enumerate(cameras.viewmats.double().numpy()):
        folder = root / "campos_512_v4" / f"{view:05d}"
        folder.mkdir(parents=True)
        to_world, place = viewmat[:3, :3].T, -viewmat[:3, :3].T @ viewmat[:3, 3]
        rays = np.stack([columns / (FOCAL * SIDE), rows / (FOCAL * SIDE), np.ones_like(rows)], -1) @ to_world.T
        start = place - CENTRE
        a, b, c = (rays**2).sum(-1), 2 * rays @ start, start @ start - RADIUS**2
        hit = b * b > 4 * a * c
        z = np.where(hit, (-b - np.sqrt(np.maximum(b * b - 4 * a * c, 0))) / (2 * a), 0)
        above = (place + z[..., None] * rays)[..., 2] > CENTRE[2]
        color = np.where(above[..., None], (220, 30, 30, 255), (30, 30, 220, 255)) * hit[..., None]
        Image.fromarray(color.astype(np.uint8)).save(folder / f"{view:05d}.png")
        # Their normals follow another engine's axes: garbage here, since nothing may depend on them.
        pixels = np.concatenate([np.full((SIDE, SIDE, 3), 7.0), z[..., None]], -1).astype(np.float32)
        OpenEXR.File({}, {"RGBA": pixels}).write(str(folder / f"{view:05d}_nd.exr"))
        axes = {key: to_world[:, axis].tolist() for axis, key in enumerate("xyz")}
        camera = {"origin": place.tolist(), **axes, "x_fov": 0.69, "y_fov": 0.69, "bbox": [[-0.5] * 3, [0.5] * 3]}
        (folder / f"{view:05d}.json").write_text(json.dumps(camera))
    return cameras


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("gobjaverse")
    write_object(root / "10" / "1234")
    write_object(root / "10" / "1235", views=2)
    (root / "10" / "1235" / "campos_512_v4" / "00001" / "00001.png").write_bytes(b"no picture")
    return root


@pytest.mark.parametrize("size", [SIDE, SIDE // 2])
def test_views_are_the_sphere(release, size):
    views = read_views(release / "10" / "1234" / "campos_512_v4", "10-1234", size)
    expected = Cameras.around(12, SIDE, radius=DISTANCE)
    torch.testing.assert_close(views.cameras.viewmats, expected.viewmats, atol=1e-5, rtol=0)
    assert views.cameras.width == size and views.split.tolist().count("held_out") == 1
    inside = 0
    for view in range(len(views)):
        K, viewmat = views.cameras.Ks[view].numpy(), views.cameras.viewmats[view].numpy()
        seen = (views.depth[view] > 0) & (views.rgba[view, ..., 3] == 255)
        depth = views.depth[view][seen].astype(np.float64)
        rows, columns = (axis + 0.5 for axis in np.nonzero(seen))
        # A smaller view takes one of the larger one's samples: up to half of its pixel aside.
        camera = np.stack([(columns - K[0, 2]) / K[0, 0] * depth, (rows - K[1, 2]) / K[1, 1] * depth, depth], 1)
        points = (camera - viewmat[:3, 3]) @ viewmat[:3, :3] - CENTRE
        assert np.abs(np.linalg.norm(points, axis=1) - RADIUS).mean() < (0.002 if size == SIDE else 0.006)
        normals = views.normals[view][seen] / 127.0
        there = np.linalg.norm(normals, axis=1) > 0.5
        assert there.mean() > 0.95
        alike = (normals * points).sum(1)[there] / RADIUS
        assert np.median(alike) > 0.998 and (alike > 0.9).mean() > 0.97
        red = views.rgba[view][seen][:, 0] > 128
        sure = np.abs(points[:, 2]) > 2 / size
        assert (red == (points[:, 2] > 0))[sure].mean() > 0.995  # at the rim a pixel spans much of the sphere
        inside += seen.sum()
    assert inside > 1000
    empty = views.rgba[..., 3] == 0
    assert empty.any() and not views.rgba[empty].any() and not views.depth[empty].any()


def test_a_fit_of_them_sees_new_views(release):
    views = read_views(release / "10" / "1234" / "campos_512_v4", "10-1234", 64)
    start, result = (fit(views, FitConfig(count=400, steps=steps)) for steps in (0, 60))
    assert start.psnr > 15 and result.psnr > start.psnr + 2
    assert (result.gaussians.means.double().numpy() - CENTRE).mean(0) == pytest.approx(0, abs=0.03)


def test_colours_are_averaged_as_light(tmp_path):
    write_object(tmp_path / "a", views=1)
    stem = tmp_path / "a" / "campos_512_v4" / "00000" / "00000"
    pixels = np.zeros((SIDE, SIDE, 4), np.uint8)
    pixels[..., 3] = 255
    pixels[::2, :, :3] = 255  # white and black lines: half the light is 188 on a display, not 128
    Image.fromarray(pixels).save(stem.with_suffix(".png"))
    views = read_views(tmp_path / "a" / "campos_512_v4", "a", SIDE // 2)
    assert np.unique(views.rgba[..., :3]).tolist() == [188]


def test_depths_nearer_than_the_box_are_none(tmp_path):
    write_object(tmp_path / "a", views=1)
    path = tmp_path / "a" / "campos_512_v4" / "00000" / "00000_nd.exr"
    pixels = np.full((SIDE, SIDE, 4), 0.2, np.float32)
    OpenEXR.File({}, {"RGBA": pixels}).write(str(path))
    views = read_views(tmp_path / "a" / "campos_512_v4", "a", SIDE)
    assert not views.depth.any() and not views.normals.any()


def test_import_names_what_failed_and_keeps_the_rest(release, tmp_path):
    captions = tmp_path / "captions.json"
    captions.write_text(json.dumps({"10/1234": "A Red and  blue ball.", "10/1235": "a broken ball"}))
    objects, without = g_objaverse(release, captions)
    assert [(entry.id, entry.captions) for entry in objects] == [("10-1234", ["a red and blue ball"]), ("10-1235", ["a broken ball"])]
    assert without == []
    failures = import_views(objects, tmp_path / "views", SIDE // 2, workers=1)
    assert list(failures) == ["10-1235"] and "00001.png: not a readable picture" in failures["10-1235"]
    records = {record["id"]: record for record in read_records(tmp_path / "views")}
    assert records["10-1234"]["status"] == "ok" and records["10-1235"]["status"] == "failed"
    assert not any(str(tmp_path) in str(value) or str(release) in str(value) for value in records["10-1234"].values())
    path = tmp_path / "views" / "10-1234.npz"
    before = path.stat().st_mtime_ns
    import_views(objects[:1], tmp_path / "views", SIDE // 2, workers=1)
    assert path.stat().st_mtime_ns == before and len(Views.load(path)) == 12


def test_bad_folders_are_one_line(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="no such folder"):
        g_objaverse(tmp_path / "none")
    with pytest.raises(InputError, match="campos_512_v4"):
        g_objaverse(tmp_path)
    write_object(tmp_path / "a", views=1)
    folder = tmp_path / "a" / "campos_512_v4"
    with pytest.raises(InputError, match="multiple of 100"):
        read_views(folder, "a", 100)
    camera = folder / "00000" / "00000.json"
    entry = json.loads(camera.read_text())
    for content, words in (({}, "not a camera"), ({"x": [1, 0, 0]}, "not a camera"), ({**entry, "y": entry["x"]}, "axes")):
        camera.write_text(json.dumps(content))
        with pytest.raises(InputError, match=words):
            read_views(folder, "a", SIDE)
    camera.write_text("[" * 200_000)
    with pytest.raises(InputError, match="not a camera"):
        read_views(folder, "a", SIDE)
    camera.write_text(json.dumps(entry))
    picture = folder / "00000" / "00000.png"
    whole = picture.read_bytes()
    picture.write_bytes(whole.replace(b"IDAT", b")\x08\x95\x1b", 1))
    with pytest.raises(InputError, match="not a readable picture"):
        read_views(folder, "a", SIDE)
    picture.write_bytes(whole)
    with monkeypatch.context() as patched, pytest.raises(InputError, match="does not fit in this computer's memory"):
        patched.setattr(Image.Image, "convert", lambda *_: (_ for _ in ()).throw(MemoryError))
        read_views(folder, "a", SIDE)
    (folder / "00000" / "00000_nd.exr").write_bytes(b"no depth")
    with pytest.raises(InputError, match="no depth"):
        read_views(folder, "a", SIDE)
    (folder / "00000" / "00000_nd.exr").unlink()
    with pytest.raises(InputError, match="no such file"):
        read_views(folder, "a", SIDE)


def test_the_command_goes_from_renders_to_atlases(release, tmp_path, capsys):
    runs = ["--preset", "tiny", "--name", "verse", "--runs", str(tmp_path / "runs")]
    assert main(["import-views", str(release), *runs, "--size", "64"]) == 0
    out = capsys.readouterr().out
    assert "1 of 2 objects" in out and "10-1235: InputError" in out
    small = ["--fit.count", "500", "--fit.steps", "5", "--minimum-psnr", "5"]
    assert main(["fit", *runs, *small]) == 0 and main(["atlas", *runs, *small]) == 0
    (sample,) = [sample for sample, _ in read_shards(tmp_path / "runs" / "verse" / "shards") if sample.id == sample.record["object"]]
    assert sample.id == "10-1234" and sample.record["library"] == "G-Objaverse" and sample.record["psnr"] > 5
    assert main(["import-views", str(release / "10" / "1235"), *runs]) == 1
    assert "failed for every object" in capsys.readouterr().err
