"""The evaluation: what counts as failed, which files belong to which prompt, what stands beside the numbers, and the report itself."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from generator.atlas import Atlas, AtlasLayout, from_atlas, pack
from generator.errors import InputError
from generator.formats import save
from generator.gaussians import Gaussians
from generator.model.text import TextEncoder
from tests.test_judge import PAINTS, ellipsoid
from trainer.captions import dominant_colour, recolour
from trainer.dataset import write_shards
from trainer.evaluate import Protocol, evaluate, fixed_prompts, own_prompts, read_prompts, summary_line
from trainer.evaluate.clip import Clip
from trainer.evaluate.failures import failure
from trainer.evaluate.judge import Judge, draw, look, protocol_cameras
from trainer.evaluate.made import made_by_files, to_unit_box
from trainer.evaluate.prompts import Prompt, plain_noun
from trainer.evaluate.references import References

ROOT = Path(__file__).resolve().parent.parent
FULL = torch.tensor([0.3, 0.2])


# Failed samples


def test_an_object_is_no_failure():
    assert failure(ellipsoid("ball", "red", 0), FULL) is None
    assert failure(None, FULL) is None


def test_each_way_to_fail_has_its_name():
    ball = ellipsoid("ball", "red", 0)
    means, scales = ball.means.clone(), ball.scales.clone()
    means[:6] += 1.5  # 1.5 % of it far off
    assert failure(ball.replace(means=means), FULL) == "exploded"
    means[3:] = ball.means[3:]  # less than 1 %: a stray, not an explosion
    assert failure(ball.replace(means=means), FULL) is None
    scales[7, 1] = 0.2
    assert failure(ball.replace(scales=scales), FULL) == "spikes"
    opacities = ball.opacities.clone()
    opacities[7] = 0.05  # a spike that nobody sees
    assert failure(ball.replace(scales=scales, opacities=opacities), FULL) is None
    colors = ball.colors.clone()
    colors[0, 0] = float("nan")
    assert failure(ball.replace(colors=colors), FULL) == "not finite"
    assert failure(ball, torch.tensor([0.001, 0.004])) == "empty" and failure(None, torch.zeros(2)) == "empty"
    assert failure(ball, torch.tensor([0.0, 0.1])) is None, "a plate seen from its edge is no failure"


# Prompts


def test_the_fixed_prompts_are_many_different_and_of_every_kind():
    prompts = fixed_prompts()
    assert len(prompts) >= 100 and len({prompt.text for prompt in prompts}) == len(prompts)
    assert {prompt.kind for prompt in prompts} == {"colour", "material", "words"}
    for prompt in prompts:
        assert (prompt.colour is not None) == (prompt.kind == "colour"), prompt
        assert prompt.kind != "colour" or plain_noun(prompt.text) == prompt.noun


def test_own_prompts_come_from_a_file_once_each(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("# mine\na red  chair\n\na lamp\na red chair\nthe black and white cat\n")
    found = read_prompts(path)
    assert found[:2] == [Prompt("a red chair", "colour", "chair"), Prompt("a lamp", "plain", "lamp")]
    assert [(prompt.text, prompt.colour) for prompt in found[2:]] == [("the black and white cat", None)]
    path.write_text("# nothing\n")
    with pytest.raises(InputError, match="no prompts"):
        read_prompts(path)
    with pytest.raises(InputError, match="missing.txt"):
        read_prompts(tmp_path / "missing.txt")


# Files of any method


def test_files_are_found_by_the_names_of_prompts(tmp_path):
    ball = ellipsoid("ball", "red", 0)
    for name in ("A_red_chair.ply", "a-red-chair-2.spz", "lamp.splat", "other.ply", "a-10-euro-banknote.ply", "table-top-1a2b3c-7.ply"):
        save(ball, tmp_path / name)
    prompts = own_prompts(["a red chair", "lamp", "a 10 euro banknote", "a sofa", "table top"])
    found, missing = made_by_files(tmp_path, prompts)
    assert [(one.prompt.text, one.seed) for one in found] == [
        ("a red chair", 0), ("a red chair", 1), ("lamp", 0), ("a 10 euro banknote", 0), ("table top", 0)
    ]  # fmt: skip
    assert missing == ["a sofa"]
    named, _ = made_by_files(tmp_path)
    assert {one.prompt.text for one in named} == {"a red chair", "lamp", "other", "a 10 euro banknote", "table top"}
    with pytest.raises(InputError, match="a-zebra.ply"):
        made_by_files(tmp_path, own_prompts(["a zebra"]))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match="holds no .ply"):
        made_by_files(empty)


def test_the_size_and_place_of_others_objects_do_not_matter():
    """Neither do a few strays far off."""
    pole = ellipsoid("pole", "blue", 3, 2000)
    moved = pole.replace(means=7 * pole.means + torch.tensor([3.0, -2.0, 10.0]), scales=7 * pole.scales)
    means = moved.means.clone()
    means[:3] += 500
    one, two = to_unit_box(pole), to_unit_box(moved.replace(means=means))
    torch.testing.assert_close(one.means[3:], two.means[3:], atol=2e-2, rtol=0)
    torch.testing.assert_close(one.scales, two.scales, rtol=2e-2, atol=0)
    assert 0.95 < (one.means.amax(0) - one.means.amin(0)).max() < 1.1


def test_a_mesh_is_drawn_as_its_splats_are(tmp_path):
    pytest.importorskip("bpy")
    import numpy as np

    from generator import glb

    side = np.array([-0.5, 0.5])
    vertices = np.array([(x * 0.3, y * 0.6, z) for x in side for y in side for z in side])
    faces = np.array(
        [(0, 1, 3), (0, 3, 2), (4, 6, 7), (4, 7, 5), (0, 4, 5), (0, 5, 1), (2, 3, 7), (2, 7, 6), (0, 2, 6), (0, 6, 4), (1, 5, 7), (1, 7, 3)]
    )
    glb.write(tmp_path / "a-red-box.glb", "box", vertices, faces, np.tile([0.5, 0.01, 0.01], (8, 1)))
    # In a Blender of its own: drawing a mesh empties the one that it runs in, which other tests need.
    script = (
        "import sys, numpy; from trainer.evaluate.made import made_by_files; from trainer.evaluate.judge import protocol_cameras; "
        "(mesh,), _ = made_by_files(sys.argv[1]); rgb, alpha = mesh.pictures(protocol_cameras(2, 64)); "
        "numpy.savez(sys.argv[1] + '/drawn.npz', rgb=rgb.numpy(), alpha=alpha.numpy())"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    with np.load(tmp_path / "drawn.npz") as drawn:
        rgb, alpha = torch.from_numpy(drawn["rgb"]), torch.from_numpy(drawn["alpha"])
    points = torch.rand(4000, 3) - 0.5
    axis = torch.randint(3, (4000,))
    points[torch.arange(4000), axis] = points[torch.arange(4000), axis].sign() * 0.5
    points *= torch.tensor([0.3, 0.6, 1.0])
    quaternions, colors = torch.tensor([1.0, 0, 0, 0]).repeat(4000, 1), torch.tensor(PAINTS["red"]).repeat(4000, 1)
    splats = Gaussians(points, quaternions, torch.full((4000, 3), 0.008), torch.full((4000,), 0.98), colors)
    turned = splats.replace(means=splats.means[:, [1, 0, 2]])
    agree, disagree = (((alpha > 0.5) == (draw(one, protocol_cameras(2, 64))[1] > 0.5)).float().mean() for one in (splats, turned))
    assert agree > 0.95 and agree > disagree + 0.03
    covered = rgb.permute(0, 2, 3, 1)[alpha > 0.9]
    assert (covered[:, 0] > covered[:, 1] + 0.2).all()


# Training objects


def shards(folder: Path) -> Path:
    """A red and a green ball, a blue pole; the red ball also painted yellow."""
    layout = AtlasLayout.load_default(32)
    samples = []
    for identifier, shape, colour in (("ball-1", "ball", "red"), ("ball-2", "ball", "green"), ("pole-1", "pole", "blue")):
        gaussians = ellipsoid(shape, colour, len(samples), 1024)
        record = {"object": identifier, "colour": colour, "captions": [shape, f"a {shape}", f"{colour} {shape}", f"a {colour} {shape}"]}
        samples.append((identifier, pack(gaussians, layout), record))
    painted = recolour(from_atlas(Atlas.decode(samples[0][1].encode()), layout), "red", "yellow")
    record = {"object": "ball-1", "colour": "yellow", "captions": ["yellow ball", "a yellow ball"]}
    samples.append(("ball-1-yellow", pack(painted, layout), record))
    write_shards(samples, folder)
    return folder


@pytest.fixture(scope="module")
def references(tmp_path_factory) -> References:
    return References(shards(tmp_path_factory.mktemp("shards")), TextEncoder.default(), views=2, size=48)


def test_the_ceiling_is_a_real_object_painted_as_asked(references):
    own, painted, other = own_prompts(["a green ball", "a purple ball", "a red pole"])
    assert references.fit(own).object == "ball-2" and dominant_colour(references.fit(own).gaussians) == "green"
    assert dominant_colour(references.fit(painted).gaussians) == "purple"
    pole = references.fit(other)
    assert pole.object == "pole-1" and dominant_colour(pole.gaussians) == "red"
    extent = pole.gaussians.means.amax(0) - pole.gaussians.means.amin(0)
    assert extent[2] > 4 * extent[0], "painted, it is still a pole"
    assert references.fit(own_prompts(["a blue elephant"])[0]) is None


def test_retrieval_takes_the_most_similar_caption_repainted_ones_too(references):
    found = references.retrieve(own_prompts(["a yellow sphere ball", "a long blue pole"]))
    assert [(one.object, one.caption) for one in found] == [("ball-1", "a yellow ball"), ("pole-1", "a blue pole")]
    assert dominant_colour(found[0].gaussians) == "yellow"


def test_a_copy_is_nearer_than_another_object(references):
    copied, new = references.gaussians(references.originals[2]), ellipsoid("plate", "yellow", 9)
    identifiers, distances = references.nearest(look([copied, new], 2, 48, seed=50))
    assert identifiers[0] == "pole-1" and distances[0] < 0.5 * distances[1]
    apart = references.distances()
    assert 0 <= apart["same_object"] <= apart["copy"] < apart["between_objects"]


# The report


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> tuple[dict, Path]:
    """Of a folder in which one file shows what was asked for, one shows something else, and one is empty."""
    folder = tmp_path_factory.mktemp("report")
    made = folder / "method"
    made.mkdir()
    save(ellipsoid("ball", "red", 77), made / "a-red-ball-0.ply")
    save(ellipsoid("ball", "blue", 78), made / "a-red-ball-1.ply")
    dust = ellipsoid("pole", "green", 79)
    save(dust.replace(opacities=torch.full((400,), 0.004)), made / "a-green-pole.ply")
    prompts = own_prompts(["a red ball", "a green pole", "a yellow plate"])
    found = evaluate(made, folder / "out", prompts, shards(folder / "shards"), Protocol(views=2, size=48))
    return found, folder / "out"


def test_the_report_tells_good_from_bad(report):
    found, folder = report
    assert json.loads((folder / "report.json").read_text()) == json.loads(json.dumps(found))
    assert found["missing"] == ["a yellow plate"] and found["prompts"] == 2 and len(found["objects"]) == 3
    good, painted, empty = found["objects"]
    assert good["colour_right"] == 1 and painted["colour_right"] == 0 and good["score"] > painted["score"]
    assert (good["failed"], empty["failed"]) == (None, "empty") and found["failed_share"] == round(1 / 3, 4)
    assert found["training_captions"] == ["a red ball"] and found["training_objects"] == 3
    assert good["nearest"].startswith("ball")
    scores = found["scores"]
    assert scores["fits"]["all"]["prompts"] == 2 and scores["retrieval"]["all"]["prompts"] == 2
    assert scores["fits"]["all"]["colour_accuracy"] == 1
    assert scores["made"]["all"]["diversity"] > 0 and scores["made"]["all"]["kernel_distance"] is not None
    assert summary_line(found).startswith("3 objects of 2 prompts, 33.3% failed; offline judge")


def test_the_page_needs_nothing_else_and_marks_the_papers_rows(report):
    found, folder = report
    text = (folder / "report.html").read_text()
    assert text.count("data:image/jpeg;base64,") == 2 and "http" not in text and "<script" not in text
    assert "GaussianCube" in text and "22.31" in text and "Printed from the paper" in text
    assert "offline judge" in text and "no CLIP score" in text


def test_prompts_are_no_code_on_the_page(tmp_path):
    save(ellipsoid("ball", "red", 1), tmp_path / "b-script-alert.ply")
    evaluate(tmp_path, tmp_path / "out", own_prompts(["b <script> alert"]), None, Protocol(views=2, size=48))
    text = (tmp_path / "out" / "report.html").read_text()
    assert "<script" not in text and "&lt;script&gt;" in text


def test_clip_where_there_is_one(tmp_path):
    """A small CLIP with random weights, against its own forward pass; its name says which it was."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    both = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text, vision = both | {"vocab_size": 40000, "eos_token_id": 102}, both | {"image_size": 32, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        if (path := TextEncoder.default().tokenizer_folder / name).is_file():
            shutil.copy(path, tmp_path)
    clip = Clip(str(tmp_path))
    pictures = torch.rand(3, 3, 32, 32)
    mean, deviation = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    pixels = (pictures - mean[:, None, None]) / deviation[:, None, None]
    tokens = clip.tokenizer(["a red chair"], return_tensors="pt")
    with torch.no_grad():
        logits = model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], pixel_values=pixels).logits_per_text
    expected = 100 * (logits / model.logit_scale.exp()).mean().item()
    assert clip.score(pictures, "a red chair") == pytest.approx(expected, abs=1e-3)
    assert tmp_path.name in clip.name and "sha256" in clip.name and "transformers" in clip.name and str(tmp_path.parent) not in clip.name
    with pytest.raises(InputError, match="--clip .*nowhere"):
        Clip(str(tmp_path / "nowhere"))


def test_the_judge_that_comes_with_the_package_knows_red_from_blue():
    judge = Judge.default()
    assert judge.record["unseen"]["score"] > 0.5 and abs(judge.record["unseen"]["shuffled"]) < 0.05
    looks = look([ellipsoid("ball", "red", 0, 2000)], 4)
    red, blue = judge.similarities(looks, ["a red box", "a blue box"]).mean(0)[0]
    assert red > blue + 0.1
