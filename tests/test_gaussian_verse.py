"""Fits in the format of GaussianVerse: read back against hand-computed values, then through the atlas stage to shards."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from plyfile import PlyData, PlyElement

from generator.atlas import Atlas, AtlasLayout, ChannelSpec, from_atlas
from generator.errors import InputError
from generator.formats import load
from generator.formats.raw import SH_C0
from generator.gaussians import quaternions_to_matrices
from trainer.__main__ import main
from trainer.dataset import read_shards
from trainer.sources.gaussian_verse import Outliers, gaussian_verse, import_fits, read_captions, read_fit

# The 59 features of a released file, in the order of 3D Gaussian splatting; f_rest holds SH degrees 1 to 3.
FEATURES = ["x", "y", "z", "f_dc_0", "f_dc_1", "f_dc_2", *(f"f_rest_{i}" for i in range(45)), "opacity"]
FEATURES += [*(f"scale_{i}" for i in range(3)), *(f"rot_{i}" for i in range(4))]
X, DC, REST, OPACITY, SCALE, ROT = 0, 3, 6, 51, 52, 55


def vertices(count: int = 400, seed: int = 0) -> np.ndarray:
    """Raw features [count, 59] of a box 2 x 1 x 0.5 in size about (0.1, 0.2, 0.3), with the traps of the released files."""
    rng = np.random.default_rng(seed)
    table = np.zeros((count, 59), dtype=np.float32)
    table[:, X : X + 3] = rng.uniform((-0.9, -0.3, 0.05), (1.1, 0.7, 0.55), (count, 3))
    # Corners repeated, so that the box without its outermost 0.1 % is the box.
    table[:16, X : X + 3] = np.repeat([(-0.9, -0.3, 0.05), (1.1, 0.7, 0.55)], 8, axis=0)
    table[:, DC : DC + 3] = rng.normal(0, 1, (count, 3))
    table[:, REST : REST + 45] = rng.normal(0, 0.1, (count, 45))
    table[:, OPACITY] = rng.uniform(-2, 4, count)
    table[:, SCALE : SCALE + 3] = rng.uniform(-6, -3, (count, 3))
    table[:, ROT : ROT + 4] = rng.normal(0, 3, (count, 4))
    return table


def write(table: np.ndarray, path: Path, names: list[str] = FEATURES, text: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = np.ascontiguousarray(table.astype("<f4")).view([(name, "<f4") for name in names])[:, 0]
    PlyData([PlyElement.describe(rows, "vertex")], text=text).write(path)
    return path


def test_every_feature_is_what_the_hand_computes(tmp_path):
    table = vertices()
    gaussians, outliers = read_fit(write(table, tmp_path / "point_cloud.ply"))
    raw = torch.from_numpy(table).double()
    assert len(gaussians) == 400 and outliers == Outliers(400, 0, 0, 0, 0, 0, 0, 0)
    # The box is 2 long and centred at (0.1, 0.2, 0.3): the longest side becomes 1.
    torch.testing.assert_close(gaussians.means.double(), (raw[:, :3] - torch.tensor([0.1, 0.2, 0.3])) / 2, atol=1e-6, rtol=0)
    assert gaussians.means[:, 0].min() == pytest.approx(-0.5, abs=1e-6) and gaussians.means[:, 0].max() == pytest.approx(0.5, abs=1e-6)
    torch.testing.assert_close(gaussians.colors.double(), (0.5 + SH_C0 * raw[:, DC : DC + 3]).clamp(0, 1), atol=1e-6, rtol=0)
    torch.testing.assert_close(gaussians.opacities.double(), 1 / (1 + torch.exp(-raw[:, OPACITY])), atol=1e-6, rtol=0)
    torch.testing.assert_close(gaussians.scales.double(), raw[:, SCALE : SCALE + 3].exp() / 2, atol=0, rtol=1e-6)
    assert (gaussians.quaternions.norm(dim=1) - 1).abs().max() < 1e-6 and (gaussians.quaternions[:, 0] >= 0).all()
    turns = quaternions_to_matrices(raw[:, ROT:])
    torch.testing.assert_close(quaternions_to_matrices(gaussians.quaternions.double()), turns, atol=1e-5, rtol=0)


def test_normals_and_text_change_nothing_and_view_dependence_is_left_out(tmp_path):
    table = vertices(40)
    plain, _ = read_fit(write(table, tmp_path / "plain.ply"))
    with_normals = np.insert(table, [3, 3, 3], 7.0, axis=1)
    names = [*FEATURES[:3], "nx", "ny", "nz", *FEATURES[3:]]
    normals, _ = read_fit(write(with_normals, tmp_path / "normals.ply", names))
    text, _ = read_fit(write(table, tmp_path / "text.ply", text=True))
    flat = np.delete(table, np.s_[REST : REST + 45], axis=1)
    degree_0, _ = read_fit(write(flat, tmp_path / "degree_0.ply", [name for name in FEATURES if not name.startswith("f_rest")]))
    for other in (normals, text, degree_0):
        torch.testing.assert_close(other.means, plain.means, atol=1e-6, rtol=0)
        torch.testing.assert_close(other.covariances(), plain.covariances(), atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(other.colors, plain.colors, atol=1e-6, rtol=0)


def test_traps_are_dropped_or_mended_and_counted(tmp_path):
    table = vertices()
    trapped = table.copy()
    trapped[20:23, X] = (np.nan, np.inf, -np.inf)
    trapped[23, SCALE + 1] = np.nan
    trapped[24:29, X + 2] = (3.1, -40, 1e20, 1e30, -3.01)
    trapped[29:35, OPACITY] = (-17, -6, -np.inf, -1e30, -5.6, -8)
    trapped[35:37, ROT:] = ((0, 0, 0, 0), (1e-9, 0, 0, 0))
    trapped[37:41, SCALE] = (-30, -12, -np.inf, -200)
    trapped[41:43, SCALE + 2] = (2.0, np.inf)
    trapped[43:48, OPACITY] = (17, 9, np.inf, 1e30, 6.3)
    trapped[48, OPACITY] = np.nan
    gaussians, outliers = read_fit(write(trapped, tmp_path / "point_cloud.ply"))
    assert outliers == Outliers(400, not_finite=5, stray=5, invisible=6, degenerate=2, thin=4, thick=2, saturated=5)
    kept = np.r_[0:20, 35:48, 49:400]
    assert len(gaussians) == len(kept) == 400 - 16 and gaussians.finite().all()
    # Floaters and holes have not moved the frame.
    expected = (torch.from_numpy(table[kept, :3]) - torch.tensor([0.1, 0.2, 0.3])) / 2
    torch.testing.assert_close(gaussians.means, expected, atol=1e-5, rtol=0)
    spec = ChannelSpec()
    assert gaussians.scales.min() == pytest.approx(spec.min_scale) and gaussians.scales.max() == pytest.approx(spec.max_scale)
    mended = gaussians[20:33]
    assert torch.equal(mended.quaternions[:2], torch.tensor([[1.0, 0, 0, 0]]).repeat(2, 1))
    assert mended.scales[2:6, 0].tolist() == pytest.approx([spec.min_scale] * 4)
    assert mended.opacities[8:11].tolist() == pytest.approx([1 / (1 + math.exp(-17)), 1 / (1 + math.exp(-9)), 1.0])


def test_a_floater_does_not_shrink_the_object(tmp_path):
    """One in a thousand may lie outside of the box; what lies beyond three object lengths goes altogether."""
    table = vertices(3000)
    table[0:2, X : X + 3] = (2.9, 0, 0)
    gaussians, outliers = read_fit(write(table, tmp_path / "floater.ply"))
    assert outliers.stray == 0 and gaussians.means[2:].abs().max() < 0.51 and gaussians.means[0, 0] > 1.3
    small = vertices(3000)
    small[:, X : X + 3] *= 0.1
    small[:, SCALE : SCALE + 3] += math.log(0.1)
    small[0, X : X + 3] = (2.9, 0, 0)
    gaussians, outliers = read_fit(write(small, tmp_path / "small.ply"))
    assert outliers.stray == 1 and len(gaussians) == 2999 and gaussians.means.abs().max() < 0.51


def test_y_up_is_turned_with_its_ellipsoids(tmp_path):
    """What is up (Y) comes to lie up (Z), what is in front (+Z) in front (-Y); covariances turn along."""
    path = write(vertices(60), tmp_path / "point_cloud.ply")
    z_up, _ = read_fit(path)
    y_up, _ = read_fit(path, up="y")
    turn = torch.tensor([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]])
    assert torch.linalg.det(turn) == 1
    torch.testing.assert_close(y_up.means, z_up.means @ turn.T, atol=1e-6, rtol=0)
    torch.testing.assert_close(y_up.covariances(), turn @ z_up.covariances() @ turn.T, atol=1e-6, rtol=1e-4)
    assert (y_up.quaternions[:, 0] >= 0).all()
    with pytest.raises(InputError, match="up must be"):
        read_fit(path, up="x")


def test_bad_files_are_one_line(tmp_path):
    table = vertices(30)
    whole = write(table, tmp_path / "whole.ply").read_bytes()
    (tmp_path / "cut.ply").write_bytes(whole[:-100])
    (tmp_path / "header.ply").write_bytes(whole[:200])
    (tmp_path / "other.ply").write_text("solid cube\n")
    (tmp_path / "empty.ply").write_bytes(b"")
    write(table[:, 3:], tmp_path / "nowhere.ply", FEATURES[3:])
    write(np.delete(table, OPACITY, 1), tmp_path / "no-opacity.ply", [name for name in FEATURES if name != "opacity"])
    write(np.full_like(table, np.nan), tmp_path / "nan.ply")
    point = table.copy()
    point[:, :3] = 1.0
    write(point, tmp_path / "point.ply")
    for name, words in [
        ("cut", "not a readable PLY"),
        ("header", "header has no end"),
        ("other", 'does not start with "ply"'),
        ("empty", "is empty"),
        ("nowhere", "lacks the vertex properties x, y, z"),
        ("no-opacity", "lacks the vertex properties opacity"),
        ("nan", "none of its 30 Gaussians can be seen"),
        ("point", "lie in one point"),
        ("missing", "cannot read"),
    ]:
        with pytest.raises(InputError, match=words) as caught:
            read_fit(tmp_path / f"{name}.ply")
        assert f"{name}.ply" in str(caught.value) and "\n" not in str(caught.value)


def release(root: Path) -> Path:
    """Two objects and a damaged one as the data set unpacks, with the authors' files beside them."""
    for number, place in enumerate(("1871/9349845", "1923/9611649")):
        write(vertices(1100, number), root / place / "point_cloud.ply")
        # Neither the authors' own order nor the points a fit began with are the object.
        np.save(root / place / "gs2sphere.npy", np.arange(1100)[::-1])
        write(vertices(50), root / place / "input.ply")
    (root / "1923" / "9611650").mkdir()
    (root / "1923" / "9611650" / "point_cloud.ply").write_bytes((root / "1871/9349845/point_cloud.ply").read_bytes()[:5000])
    return root


def test_objects_and_captions_of_a_release(tmp_path):
    root = release(tmp_path / "verse")
    captions = tmp_path / "captions.json"
    captions.write_text(json.dumps({"1871/9349845": "A Wooden  Chair.", "1923-9611649": ["a red car", "a toy car."]}))
    objects, without = gaussian_verse(root, captions)
    assert [(entry.id, entry.name, entry.captions) for entry in objects] == [
        ("1871-9349845", "1871/9349845", ["a wooden chair"]),
        ("1923-9611649", "1923/9611649", ["a red car", "a toy car"]),
    ]
    assert without == [f"1923/9611650: no caption for 1923/9611650 in {captions}"]
    # One chunk and one object alone still go by the names in the captions file.
    assert [entry.captions for entry in gaussian_verse(root / "1871", captions)[0]] == [["a wooden chair"]]
    assert gaussian_verse(root / "1871" / "9349845", captions)[0][0].id == "9349845"
    assert gaussian_verse(root / "1871" / "9349845" / "point_cloud.ply", captions)[0][0].captions == ["a wooden chair"]
    assert gaussian_verse(root)[0][0].captions[:2] == ["object", "an object"]


def test_links_of_a_hub_s_cache_keep_their_names(tmp_path):
    blob = write(vertices(20), tmp_path / "blobs" / "0123abcd")
    link = tmp_path / "snapshot" / "1871" / "9349845" / "point_cloud.ply"
    link.parent.mkdir(parents=True)
    link.symlink_to(blob)
    assert [entry.id for entry in gaussian_verse(tmp_path / "snapshot")[0]] == ["1871-9349845"]


def test_flat_folders_go_by_uid(tmp_path):
    write(vertices(20), tmp_path / "flat" / "80d9caaa1fa0.ply")
    captions = tmp_path / "cap3d.csv"
    captions.write_text('80d9caaa1fa0,"3D model of a chair, with arms"\n28d43a218cd8,A tree\n')
    (source,), without = gaussian_verse(tmp_path / "flat", captions)
    assert (source.id, source.captions, without) == ("80d9caaa1fa0", ["3d model of a chair, with arms"], [])
    captions.write_text("uid,caption\n80d9caaa1fa0,A chair\n80d9caaa1fa0,A seat\n")
    assert gaussian_verse(tmp_path / "flat", captions)[0][0].captions == ["a chair", "a seat"]


def test_bad_folders_and_captions_are_one_line(tmp_path):
    with pytest.raises(InputError, match="no such file or folder"):
        gaussian_verse(tmp_path / "none")
    with pytest.raises(InputError, match="no .ply below"):
        gaussian_verse(tmp_path)
    write(vertices(20), tmp_path / "a.ply")
    for name, text, words in [
        ("c.csv", "a,b,c\n", "needs CSV lines uid,caption"),
        ("c.csv", "a chair\n", "needs CSV lines uid,caption"),
        ("c.csv", "", "no captions inside"),
        ("c.csv", "a, \n", "no captions inside"),
        ("c.json", "{", "not readable as JSON"),
        ("c.json", "[1, 2]", "needs CSV lines"),
        ("c.json", "3", "needs CSV lines .*, got 3$"),
        ("c.json", "[" * 200_000, "not readable as JSON"),
        ("c.json", '["a\\nb"]', "needs CSV lines .*, got a b$"),
        ("c.json", '{"a": 3}', "needs CSV lines"),
        ("c.json", '{"b": "a chair"}', "captions none of the 1 objects"),
    ]:
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match=words):
            gaussian_verse(tmp_path / "a.ply", tmp_path / name)
    with pytest.raises(InputError, match="cannot be read"):
        read_captions(tmp_path / "none.csv")


def test_imports_resume_and_follow_their_captions(tmp_path):
    root = tmp_path / "flat"
    write(vertices(30), root / "a.ply")
    fits = tmp_path / "fits"
    assert import_fits(gaussian_verse(root)[0], fits, workers=1) == {}
    before = (fits / "a.ply").stat().st_mtime_ns
    (tmp_path / "captions.csv").write_text("a,a new name\nb,a second\n")
    write(vertices(30, 1), root / "b.ply")
    assert import_fits(gaussian_verse(root, tmp_path / "captions.csv")[0], fits, workers=1) == {}
    assert (fits / "a.ply").stat().st_mtime_ns == before, "what is there is not read again"
    record = json.loads((fits / "a.json").read_text())
    assert record["captions"] == ["a new name"] and record["psnr"] is None and record["outliers"]["total"] == 30
    assert not any(str(tmp_path) in str(value) for value in record.values()), "a record must hold no path of this machine"
    torch.testing.assert_close(load(fits / "b.ply").means, read_fit(root / "b.ply")[0].means)


def test_a_release_becomes_shards(tmp_path, capsys):
    """Through the commands: import, then the atlas stage as it is; the damaged object is named and stops nothing."""
    root = release(tmp_path / "verse")
    captions = tmp_path / "captions.json"
    captions.write_text(json.dumps({"1871/9349845": "a chair", "1923/9611649": "a car", "1923/9611650": "a ghost"}))
    runs = ["--preset", "tiny", "--name", "verse", "--runs", str(tmp_path / "runs")]
    assert main(["import-fits", str(root), "--captions", str(captions), *runs]) == 0
    out = capsys.readouterr().out
    assert "2 of 3 objects" in out and "1923-9611650: InputError" in out and "not a readable PLY" in out
    assert main(["atlas", *runs]) == 0
    layout = AtlasLayout.load_default(32)
    samples = {sample.id: sample for sample, layout_id in read_shards(tmp_path / "runs" / "verse" / "shards") if layout_id == layout.id}
    assert {key: sample.record["captions"][0] for key, sample in samples.items()} == {"1871-9349845": "a chair", "1923-9611649": "a car"}
    record = samples["1871-9349845"].record
    assert record["object"] == "1871-9349845" and record["library"] == "GaussianVerse" and record["psnr"] is None
    back = from_atlas(Atlas(samples["1871-9349845"].values, layout.id), layout)
    original = read_fit(root / "1871/9349845/point_cloud.ply")[0]
    unmoved = torch.cdist(back.means, original.means).amin(1) < 2e-3
    # 1,100 Gaussians become 1,024: 76 pairs are merged, the 948 others are stored as they were.
    assert len(back) == 1024 and unmoved.sum() >= 948, "every cell holds a Gaussian of the object, or two of them merged"
    assert (back.means.amin(0) - original.means.amin(0)).abs().max() < 2e-3, "the box of the object stays"
    assert main(["atlas", "doctor", str(tmp_path / "runs" / "verse" / "shards")]) == 0
    (root / "1871/9349845/point_cloud.ply").unlink()
    assert main(["import-fits", str(root / "1923" / "9611650"), *runs]) == 1
    assert "failed for every object" in capsys.readouterr().err
