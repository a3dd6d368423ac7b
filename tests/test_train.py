"""All stages of `make train` on a folder of meshes, through the command line, down to a bundle that generates."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from generator.atlas import Atlas, AtlasLayout, NormalizationAccumulator, from_atlas
from generator.coverage import close_gaps
from generator.errors import InputError, WorkError
from generator.formats import save
from generator.gaussians import Gaussians
from generator.model.pipeline import GaussianAtlasPipeline
from generator.model.text import TextEncoder
from tests import tiny_bundle
from tests.sphere import sphere_views
from tests.test_prior import random_prior
from trainer import stages, views
from trainer.__main__ import main
from trainer.atlas import to_atlas
from trainer.captions import dominant_colour, from_oklab, recolour, to_oklab
from trainer.dataset import read_shards, write_shards
from trainer.presets import PRESETS, following_base
from trainer.sources import SourceObject, with_article
from trainer.training_data import from_shards
from trainer.views import add_records, deselected, read_records, select_records

ROOT = Path(__file__).resolve().parent.parent


def box(path: Path, size: tuple[float, float, float], color: tuple[float, float, float]) -> None:
    x, y, z = (side / 2 for side in size)
    corners = [(i * x, j * y, k * z) for i in (-1, 1) for j in (-1, 1) for k in (-1, 1)]
    faces = [(1, 2, 4, 3), (5, 7, 8, 6), (1, 5, 6, 2), (3, 4, 8, 7), (1, 3, 7, 5), (2, 6, 8, 4)]
    path.with_suffix(".mtl").write_text("newmtl paint\nKd {} {} {}\n".format(*color))
    lines = [f"mtllib {path.stem}.mtl", "usemtl paint"]
    lines += ["v {} {} {}".format(*corner) for corner in corners] + ["f {} {} {} {}".format(*face) for face in faces]
    path.write_text("\n".join(lines) + "\n")


def trainer(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "trainer", *arguments], cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("train")
    meshes = directory / "meshes"
    meshes.mkdir()
    box(meshes / "plank.obj", (2.0, 0.3, 0.5), (0.8, 0.05, 0.05))
    box(meshes / "tower.obj", (0.5, 2.0, 0.5), (0.05, 0.1, 0.8))
    box(meshes / "dice.obj", (1.0, 1.0, 1.0), (0.1, 0.6, 0.1))
    (meshes / "broken.obj").write_text("this is no mesh\n")
    (meshes / "captions.csv").write_text("file,caption\nplank.obj,a plank\ntower.obj,a tower\ndice.obj,a dice\nbroken.obj,a ghost\n")
    settings = (
        "--preset tiny --include= --views.train 6 --views.held-out 1 --views.size 48 --views.samples 2 --fit.count 600 --fit.steps 15 "
        "--minimum-psnr 5 --recolour 1 --finetune.max-steps 2 --finetune.decay-steps 0 --finetune.batch-size 2 "
        "--finetune.mixed-precision no --steps 2"
    ).split()
    result = trainer("train", *settings, "--sources", str(meshes), "--prompts", "a plank", "--runs", str(directory / "runs"))
    assert result.returncode == 0, result.stderr[-3000:]
    (directory / "log.txt").write_text(result.stdout)
    return directory / "runs" / "tiny"


def test_one_broken_object_does_not_stop_the_others(run):
    log = (run.parent.parent / "log.txt").read_text()
    assert "3 of 4 objects rendered" in log and "broken" in log
    assert len(list((run / "fits").glob("*.ply"))) == 3


def test_shards_hold_captions_colours_and_scores(run):
    samples = {sample.id: sample for sample, _ in read_shards(run / "shards")}
    assert {sample.record["object"] for sample in samples.values()} == {"plank", "tower", "dice"} and len(samples) == 6
    painted = next(sample for identifier, sample in samples.items() if identifier.startswith("plank-"))
    assert painted.record["colour"] != "red" and all(painted.record["colour"] in caption for caption in painted.record["captions"])
    record = samples["plank"].record
    assert record["colour"] == "red" and "a red plank" in record["captions"] and record["psnr"] > 5
    assert not any(str(value).startswith("/") for value in record.values()), "a record must hold no path of this machine"


def test_the_bundle_generates_and_says_what_it_is(run):
    pipeline = GaussianAtlasPipeline.from_pretrained(run / "bundle")
    out = pipeline("a plank", seed=1)
    assert len(out.gaussians[0]) == 32 * 32 and out.gaussians[0].finite().all()
    low_pass = pipeline.info["low_pass"]
    raw = from_atlas(out.atlases[0], pipeline.layout)
    assert 0.1 < pipeline.info["coverage"] < 2, "how far the splats of the fits reach towards their neighbours"
    widened = close_gaps(raw.replace(scales=torch.sqrt(raw.scales**2 + low_pass**2)), pipeline.info["coverage"])
    torch.testing.assert_close(out.gaussians[0].scales, widened.scales)
    focal = 48 / 2 / math.tan(math.radians(39.6) / 2)
    assert low_pass == pytest.approx(0.3**0.5 * 1.9 / focal, rel=1e-3), "the renderer's filter of 0.3 pixels squared at 48 pixels"
    assert pipeline.info["trained_on"]["objects"] == 3 and pipeline.info["fold"] == 2
    assert "plank" in (run / "bundle" / "CREDITS.md").read_text()


def test_evaluation_draws_and_scores(run):
    report = json.loads((run / "evaluation" / "report.json").read_text())
    assert len(report["objects"]) == 2 and report["training_objects"] == 3
    assert report["training_captions"] == ["a plank"], "what was asked is what was learned, and the report says so"
    assert report["scores"]["fits"]["all"]["prompts"] == 1
    assert (run / "evaluation" / "report.html").stat().st_size > 5000


def test_the_logs_show_samples(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "finetune" / "logs")).Reload()
    assert "loss/train" in events.Tags()["scalars"] and len(events.Images("samples")) == 1
    image = events.Images("samples")[0]
    assert (image.step, image.width, image.height) == (2, 192, 192)


def test_a_bundle_is_gone_on_from_with_ones_own_objects(run, tmp_path):
    """LoRA on the bundle that the run made: its statistics and text encoder stay, its network changes a little."""
    own = tmp_path / "own"
    shutil.copytree(run / "shards", own / "shards")
    preset = PRESETS["tiny"]
    config = replace(
        preset.finetune,
        base=str(run / "bundle"),
        lora_rank=2,
        max_steps=2,
        decay_steps=0,
        warmup_steps=0,
        batch_size=2,
        mixed_precision="no",
    )
    preset = replace(preset, finetune=config, prompts=("a plank",), steps=2)
    for stage in (stages.stats, stages.finetune, stages.pack):
        stage(preset, own)
    before, after = (GaussianAtlasPipeline.from_pretrained(folder / "bundle") for folder in (run, own))
    assert torch.equal(before.normalization.mean, after.normalization.mean)
    assert after.info["trained_on"]["base"]["sha256"] == before.info["files"]["unet/diffusion_pytorch_model.safetensors"]["sha256"]
    assert after.info["trained_on"]["base"]["name"] == before.name and str(tmp_path) not in json.dumps(after.info)
    assert after.info["trained_on"]["base"]["trained_on"] == before.info["trained_on"], "no link of the chain is lost"
    licences = after.info["licence"].split(" AND ")
    assert len(set(licences)) == len(licences), "each licence once"
    old, new = before.unet.state_dict(), after.unet.state_dict()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed and all(".attn" in name for name in changed)
    assert after("a plank").gaussians[0].finite().all()


def test_guidance_is_distilled_into_a_bundle(run, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(run / "shards", own / "shards")
    preset = PRESETS["tiny"]
    changes = {"max_steps": 2, "decay_steps": 0, "warmup_steps": 0, "batch_size": 2, "mixed_precision": "no"}
    config = replace(preset.finetune, base=str(run / "bundle"), distill_guidance=6.0, **changes)
    preset = replace(preset, finetune=config, prompts=("a plank",), steps=2)
    for stage in (stages.stats, stages.finetune, stages.pack):
        stage(preset, own)
    pipeline = GaussianAtlasPipeline.from_pretrained(own / "bundle", device="cpu")
    assert pipeline.distilled_guidance == 6
    batches = []
    pipeline.unet.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    assert pipeline("a plank", num_inference_steps=2, guidance_scale=5.0).gaussians[0].finite().all()
    assert batches == [1, 1]


def test_a_prior_is_taken_from_the_atlases_and_goes_with_the_bundle(run, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(run / "shards", own / "shards")
    preset = PRESETS["tiny"]
    changes = {"max_steps": 2, "decay_steps": 0, "warmup_steps": 0, "batch_size": 2, "mixed_precision": "no", "prior": True}
    preset = replace(preset, finetune=replace(preset.finetune, base=str(run / "bundle"), **changes), prompts=("a plank",), steps=2)
    with pytest.raises(InputError, match="python -m trainer stats"):
        (own / "normalization.safetensors").write_bytes((run / "normalization.safetensors").read_bytes())
        stages.finetune(preset, own)
    assert following_base(preset).regression is None
    preset = replace(preset, regression=True, regression_variety=0.0)
    for stage in (stages.stats, stages.finetune, stages.pack):
        stage(preset, own)
    # Neither other settings nor statistics made anew under the network become a bundle that draws noise.
    for other, message in (({"shift": 1.0}, "was trained with shift 3.0, not 1.0"), ({"fold": 1}, "was trained with fold 2, not 1")):
        with pytest.raises(InputError, match=message):
            stages.pack(replace(preset, finetune=replace(preset.finetune, **other)), own)
    before = (own / "normalization.safetensors").read_bytes()
    stages.stats(replace(preset, relearn=True, normalization="channel"), own)
    with pytest.raises(InputError, match="was trained with another normalization, prior"):
        stages.pack(preset, own)
    (own / "normalization.safetensors").write_bytes(before)
    stages.stats(preset, own)
    pipeline = GaussianAtlasPipeline.from_pretrained(own / "bundle", device="cpu")
    assert pipeline("a plank", num_inference_steps=2).gaussians[0].finite().all()
    data = stages.training_data(preset, own)
    values = data.atlases[list(range(len(data.atlases)))]
    known = data.prior.filter(values[:1], torch.zeros(1), torch.ones(1))
    torch.testing.assert_close(known.error[0, :, 0, 0], values.square().mean((0, 2, 3)).sqrt(), atol=1e-3, rtol=1e-2)
    assert torch.equal(pipeline.prior.covariance, data.prior.covariance)
    told = [sample.record["captions"] for sample, _ in read_shards(own / "shards")]
    assert len(pipeline.regression.rows) == len(told) and pipeline.info["regression"]["variety"] == 0
    further = following_base(replace(PRESETS["tiny"], finetune=replace(preset.finetune, base=str(own / "bundle"), prior=False)))
    shutil.copytree(run / "shards", tmp_path / "further" / "shards")
    stages.stats(further, tmp_path / "further")
    assert further.finetune.prior and torch.equal(
        stages.training_data(further, tmp_path / "further").prior.covariance, data.prior.covariance
    )

    assert further.regression and further.regression_variety == 0
    # What is said on the command line goes before what the base has.
    config = further.finetune
    assert not following_base(replace(PRESETS["tiny"], finetune=config, regression=False)).regression
    assert following_base(replace(PRESETS["tiny"], finetune=config, regression=True)).regression_variety == 1
    with pytest.raises(InputError, match="regression needs finetune.prior"):
        following_base(replace(PRESETS["tiny"], regression=True))


def test_the_plainest_caption_of_each_atlas_is_its_key():
    plain = ["sofa", "a sofa", "a 3d model of a sofa", "a sofa for the living room"]
    told = [plain, ["red sofa", "a red sofa", "a sofa made of leather"], ["x1"]]
    asked = []
    encoder = SimpleNamespace(sentences=lambda texts: asked.extend(texts) or torch.eye(len(texts), 8))
    samples = [(SimpleNamespace(values=torch.rand(16, 32, 32), record={"captions": c, "object": c[0]}), "") for c in told]
    found = stages.regression_of(samples, tiny_bundle.normalization(), random_prior(32), encoder)
    assert asked == ["a sofa", "a red sofa", "x1"] and found.rows.tolist() == [0, 1, 2]


def test_stages_that_come_too_early_say_what_to_run(tmp_path):
    for stage, missing in (("fit", "views"), ("atlas", "fit"), ("stats", "atlas"), ("finetune", "stats"), ("pack", "finetune")):
        result = trainer(stage, "--preset", "tiny", "--runs", str(tmp_path))
        assert result.returncode == 2 and f"python -m trainer {missing}" in result.stderr, result.stderr
        assert len(result.stderr.strip().splitlines()) == 1


def fits(run: Path, *names: str, psnr: float | None = 30.0) -> None:
    """What views and fits of some objects leave, without the pixels."""
    identity = torch.tensor([[1.0, 0, 0, 0]]).repeat(50, 1)
    for seed, name in enumerate(names):
        generator = torch.Generator().manual_seed(seed)
        means, colors = torch.rand(50, 3, generator=generator) - 0.5, torch.rand(50, 3, generator=generator)
        (run / "fits").mkdir(parents=True, exist_ok=True)
        save(Gaussians(means, identity, torch.full((50, 3), 0.02), torch.ones(50), colors), run / "fits" / f"{name}.ply")
        (run / "fits" / f"{name}.json").write_text(json.dumps({"psnr": psnr}))
    (run / "views").mkdir(exist_ok=True)
    add_records(run / "views", [{"id": name, "captions": [f"a {name}"]} for name in names])
    for name in names:
        (run / "views" / f"{name}.npz").write_bytes(b"damaged")


def test_objects_that_are_not_chosen_any_more_are_not_learned(tmp_path, capsys):
    preset = replace(PRESETS["tiny"], recolour=0, workers=1)
    fits(tmp_path, "chair", "lamp", "car")
    # As they are where they were rendered here.
    records = [{key: value for key, value in record.items() if key != "imported"} for record in read_records(tmp_path / "views")]
    views._write_records(tmp_path / "views", records)
    select_records(tmp_path / "views", ["chair", "car"])
    stages.atlas(preset, tmp_path)
    assert "atlas: 1 objects of earlier runs are left out" in capsys.readouterr().out
    assert {sample.id for sample, _ in read_shards(tmp_path / "shards")} == {"chair", "car"}
    assert not any({"selected", "imported"} & set(sample.record) for sample, _ in read_shards(tmp_path / "shards"))
    # What others have rendered or fitted no source chooses.
    add_records(tmp_path / "views", [{"id": "lamp", "captions": ["a lamp"]}])
    select_records(tmp_path / "views", ["car"])
    stages.atlas(preset, tmp_path)
    assert {sample.id for sample, _ in read_shards(tmp_path / "shards")} == {"lamp", "car"}
    select_records(tmp_path / "views", [])
    (tmp_path / "fits" / "lamp.ply").unlink()
    with pytest.raises(InputError, match="objects that are chosen now: run `python -m trainer fit` first"):
        stages.atlas(preset, tmp_path)


def test_the_views_stage_notes_what_it_chose(tmp_path, monkeypatch):
    objects = [SourceObject(id=name, name=name, path=tmp_path, captions=[name]) for name in ("chair", "lamp")]
    monkeypatch.setattr(stages, "open_source", lambda *_: objects)
    (tmp_path / "views").mkdir()
    for source in objects:
        (tmp_path / "views" / f"{source.id}.npz").write_bytes(b"rendered")
    preset = replace(PRESETS["tiny"], include="")
    for exclude, left_out in (("", set()), ("lamp", {"lamp"}), ("chair", {"chair"})):
        stages.views(replace(preset, exclude=exclude), tmp_path)
        assert deselected(tmp_path / "views") == left_out and len(read_records(tmp_path / "views")) == 2


def test_atlases_are_made_again_for_another_quality_of_transport(tmp_path):
    preset = replace(PRESETS["tiny"], recolour=0, workers=1)
    fits(tmp_path, "chair")
    stages.atlas(preset, tmp_path)
    path = tmp_path / "atlases" / "chair.safetensors"
    made = path.stat().st_mtime_ns
    stages.atlas(preset, tmp_path)
    assert path.stat().st_mtime_ns == made
    stages.atlas(replace(preset, transport="exact"), tmp_path)
    assert path.stat().st_mtime_ns > made
    # An atlas from before the quality was kept was made with the default.
    path.write_bytes(Atlas.decode(path.read_bytes()).encode())
    made = path.stat().st_mtime_ns
    stages.atlas(preset, tmp_path)
    assert path.stat().st_mtime_ns == made
    stages.atlas(replace(preset, transport="high"), tmp_path)
    assert path.stat().st_mtime_ns > made


def test_half_a_fit_does_not_stop_the_others(tmp_path):
    preset = replace(PRESETS["tiny"], recolour=0, workers=1)
    fits(tmp_path, "chair", "lamp", "car")
    (tmp_path / "fits" / "lamp.json").unlink()
    (tmp_path / "fits" / "car.json").write_text("{}")  # its PSNR was no number
    stages.atlas(preset, tmp_path)
    assert [sample.id for sample, _ in read_shards(tmp_path / "shards")] == ["chair"]
    (tmp_path / "views" / "views.jsonl").unlink()
    with pytest.raises(InputError, match="chair has no captions in .*views.jsonl"):
        stages.atlas(preset, tmp_path)


def test_a_fit_stage_that_fails_says_so_and_removes_what_is_damaged(tmp_path):
    """Fits of an earlier run are no success of this one; views that cannot be read are out of the way of the next."""
    fits(tmp_path, "chair", "lamp")
    (tmp_path / "views" / "unread.npz").mkdir()
    for name in ("chair", "lamp"):
        (tmp_path / "fits" / f"{name}.json").write_text(json.dumps({"psnr": 30.0, "settings": "others"}))
    with pytest.raises(WorkError, match="fit failed for every object; .*not a file of views"):
        stages.fit(replace(PRESETS["tiny"], workers=1), tmp_path)
    assert sorted(path.name for path in (tmp_path / "views").glob("*.npz")) == ["unread.npz"]


def test_a_fit_is_there_when_its_scores_are(tmp_path, monkeypatch):
    """A run that is killed between the two files leaves nothing that passes for the new fit."""
    fits(tmp_path, "chair")
    output, config = tmp_path / "fits" / "chair.ply", replace(PRESETS["tiny"].fit, count=60, steps=0)
    sphere_views(48).save(tmp_path / "views" / "chair.npz")

    def killed(*_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        stages._fit_one("chair", tmp_path / "views" / "chair.npz", output, config)
    assert not stages._is_fitted(output, config)


def test_bad_usage_is_one_line(tmp_path):
    result = trainer("views", "--preset", "huge")
    assert result.returncode == 2 and result.stderr.strip() == (
        "trainer: error: --preset huge: no such preset; choose one of tiny, starter, everyday, paper"
    )
    result = trainer("views", "--preset", "tiny", "--sources", str(tmp_path / "nothing"), "--runs", str(tmp_path))
    assert result.returncode == 2 and "nothing" in result.stderr and len(result.stderr.strip().splitlines()) == 1


def test_shards_survive_a_failed_rewrite_and_name_damage(tmp_path):
    layout = AtlasLayout.load_default(32)
    atlas = Atlas(torch.rand(16, 32, 32), layout.id)
    write_shards([("one", atlas, {"captions": ["a"]})], tmp_path)

    def failing():
        yield "two", atlas, {"captions": ["b"]}
        raise OSError("disk full")

    with pytest.raises(OSError):
        write_shards(failing(), tmp_path)
    samples = list(read_shards(tmp_path))
    assert [sample.id for sample, _ in samples] == ["one"] and samples[0][1] == layout.id
    torch.testing.assert_close(samples[0][0].values, atlas.values, atol=1e-3, rtol=0)
    path = next(tmp_path.glob("*.tar"))
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(InputError, match="damaged"):
        list(read_shards(tmp_path))


@pytest.mark.parametrize(
    "rgb,word", [((0.8, 0.05, 0.05), "red"), ((0.1, 0.1, 0.6), "blue"), ((0.97, 0.97, 0.97), "white"), ((0.4, 0.25, 0.12), "brown")]
)
def test_dominant_colours(rgb, word):
    count = 50
    gaussians = Gaussians(
        torch.zeros(count, 3), torch.tensor([[1.0, 0, 0, 0]]).repeat(count, 1), torch.full((count, 3), 0.01), torch.ones(count),
        torch.tensor([rgb]).repeat(count, 1),
    )  # fmt: skip
    assert dominant_colour(gaussians) == word
    rainbow = gaussians.replace(
        colors=torch.tensor([[0.8, 0.1, 0.1], [0.1, 0.5, 0.1], [0.1, 0.2, 0.7], [0.9, 0.9, 0.9], [0.05, 0.05, 0.05]]).repeat(10, 1)
    )
    assert dominant_colour(rainbow) is None


def test_oklab_round_trip():
    colors = torch.rand(200, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(from_oklab(to_oklab(colors)), colors, atol=1e-4, rtol=0)


def test_recolouring_paints_one_part_and_keeps_the_rest():
    colors = torch.cat([torch.tensor([[0.8, 0.1, 0.1]]).repeat(30, 1) * torch.linspace(0.8, 1, 30)[:, None], torch.full((10, 3), 0.05)])
    identity = torch.tensor([[1.0, 0, 0, 0]]).repeat(40, 1)
    gaussians = Gaussians(torch.rand(40, 3), identity, torch.full((40, 3), 0.01), torch.ones(40), colors)
    painted = recolour(gaussians, "red", "blue")
    assert dominant_colour(painted) == "blue"
    assert torch.equal(painted.colors[30:], colors[30:]) and torch.equal(painted.means, gaussians.means)
    lightness = to_oklab(painted.colors[:30])[:, 0]
    assert (lightness.diff() > 0).all(), "the shading must survive"


def test_repainted_variants_say_their_colours_and_are_held_out_with_their_object(tmp_path):
    layout = AtlasLayout.load_default(32)
    colors = torch.cat([torch.tensor([[0.75, 0.1, 0.1]]).repeat(800, 1), torch.full((200, 3), 0.05)])
    identity = torch.tensor([[1.0, 0, 0, 0]]).repeat(1000, 1)
    means = torch.rand(1000, 3, generator=torch.Generator().manual_seed(0)) - 0.5
    gaussians = Gaussians(means, identity, torch.full((1000, 3), 0.01), torch.ones(1000), colors)
    original = to_atlas(gaussians, layout)
    preset = replace(PRESETS["tiny"], recolour=3)
    captions = ["chair", "a chair with metal legs", "a red wooden chair with black metal legs", "a chair with black legs"]
    samples = []
    for number in range(60):
        record = {"id": f"chair-{number}", "captions": captions, "psnr": 30.0}
        samples += stages._variants(original, layout, record, preset)
    first = dict((identifier, record) for identifier, _, record in samples[:4])
    assert list(first)[0] == "chair-0" and all(identifier.startswith("chair-0-") for identifier in list(first)[1:])
    assert "a red chair with metal legs" in first["chair-0"]["captions"]
    for identifier, record in list(first.items())[1:]:
        colour = identifier.removeprefix("chair-0-")
        wanted = with_article(f"{colour} wooden chair with black metal legs")
        assert wanted in record["captions"], "the legs were not painted, and still are black"
        assert not any("red" in caption.split() for caption in record["captions"])
        # What names only a part's colour would not say what was painted.
        assert "a chair with black legs" not in record["captions"]
    write_shards(iter(samples), tmp_path)
    accumulator = NormalizationAccumulator(layout.id)
    for sample, _ in read_shards(tmp_path):
        accumulator.update(sample.values)
    data = from_shards(tmp_path, accumulator.result("channel"), TextEncoder.default(), layout)
    train, held_out = ({data.ids[i] for i in rows.tolist()} for rows in data.split(0.1))
    assert len(data.ids) == 240 and len(train | held_out) == 60 and held_out and not train & held_out


def test_what_the_evaluation_asks_for_is_not_trained_on():
    """ "a purple barrel" is a fixed prompt: a barrel is painted in every other colour, and a purple one says nothing of its colour."""
    layout = AtlasLayout.load_default(32)
    identity = torch.tensor([[1.0, 0, 0, 0]]).repeat(1000, 1)
    means = torch.rand(1000, 3, generator=torch.Generator().manual_seed(0)) - 0.5
    brown = Gaussians(means, identity, torch.full((1000, 3), 0.01), torch.ones(1000), torch.tensor([[0.45, 0.25, 0.1]]).repeat(1000, 1))
    preset, record = replace(PRESETS["tiny"], recolour=20), {"id": "barrel-1", "captions": ["barrel", "an old barrel"], "psnr": 30.0}
    painted = [identifier for identifier, *_ in stages._variants(to_atlas(brown, layout), layout, record, preset)]
    assert "barrel-1-purple" not in painted and "barrel-1-green" in painted
    purple = to_atlas(recolour(brown, "brown", "purple"), layout)
    assert dominant_colour(from_atlas(purple, layout)) == "purple"
    _, _, original = next(stages._variants(purple, layout, record, preset))
    assert original["captions"] == ["barrel", "an old barrel"]


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"include": "("}, "include must be a regular expression"),
        ({"exclude": "*"}, "exclude must be a regular expression"),
        ({"never_recolour": "["}, "never_recolour must be a regular expression"),
        ({"transport": "quick"}, "transport must be one of fast, high, exact"),
        ({"projection": "mercator"}, "projection must be one of equirectangular, equal_area"),
        ({"normalization": "row"}, "normalization must be one of cell, channel"),
        ({"limit": -1}, "limit must be at least 0"),
        ({"steps": 0}, "steps must be at least 1"),
    ],
)
def test_bad_settings_of_a_preset_are_named_at_once(changes, message):
    with pytest.raises(InputError, match=message):
        replace(PRESETS["tiny"], **changes)


def test_stages_that_need_no_base_do_not_ask_for_it(tmp_path, monkeypatch, capsys):
    """Neither a hub's model, of which a machine without a network has nothing, nor a folder that is not there yet."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for base in ("nobody/nothing", str(tmp_path / "later")):
        preset = replace(PRESETS["paper"], finetune=replace(PRESETS["paper"].finetune, base=base))
        assert following_base(preset, needed=False) is preset
        with pytest.raises(InputError):
            following_base(preset)
        assert main(["fit", "--preset", "paper", "--finetune.base", base, "--runs", str(tmp_path)]) == 2
        assert "run `python -m trainer views` first" in capsys.readouterr().err, "what fits need is all that is missed"
    bundle = tiny_bundle.write_tiny_bundle(tmp_path / "bundle")
    preset = replace(PRESETS["tiny"], finetune=replace(PRESETS["tiny"].finetune, base=str(bundle)))
    assert following_base(preset, needed=False) == following_base(preset) != preset


def test_presets_are_consistent():
    assert PRESETS["paper"].finetune.fold == 1 and PRESETS["paper"].size == 128, "the paper's plain 128 x 128 input"
    assert PRESETS["paper"].finetune.text_dropout == 0.2 and PRESETS["paper"].finetune.learning_rate == 5e-5


def test_everyday_takes_objects_and_leaves_parts_of_houses():
    names = "armchair,wall shelf,swimming pool,wall type g plug,tv stand,parking slot,kitchen sink,double door,pool lounge,tools box"
    objects = [SourceObject(id=name, name=name, path=Path(), captions=[name]) for name in names.split(",")]
    kept = [source.id for source in PRESETS["everyday"].select(objects)]
    assert kept == ["armchair", "wall shelf", "tv stand", "kitchen sink", "double door", "pool lounge"]
    natural = PRESETS["everyday"].never_recolour
    assert re.search(rf"\b(?:{natural})\b", "maple leaf") and not re.search(rf"\b(?:{natural})\b", "wooden chair")
