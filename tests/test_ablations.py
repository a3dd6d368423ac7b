"""The ablations: what a variant changes, runs that go on, and intervals that are Student's."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import scipy.stats
import torch

from generator.atlas import Atlas, AtlasLayout, from_atlas
from generator.errors import InputError
from generator.formats import save
from generator.gaussians import Gaussians
from tests.sphere import sphere_views
from tests.test_finetune import UNET
from trainer import ablation_report, ablations
from trainer.ablation_report import Interval
from trainer.atlas import to_atlas
from trainer.dataset import read_shards, write_shards
from trainer.finetune import Trainer
from trainer.views import RECORDS, views_path

TINY = replace(
    ablations.PRESET,
    steps=2,
    pretrain=replace(ablations.PRESET.pretrain, unet={**UNET, "sample_size": 16}, max_steps=2, batch_size=2, checkpoint_every=2),
    pretrain_size=16,
    finetune=replace(ablations.PRESET.finetune, max_steps=2, batch_size=2, validation_share=0.5, checkpoint_every=1, decay_steps=0),
)


def blob(seed: int, count: int = 1024) -> Gaussians:
    """A crowd of Gaussians, longer along an axis of its own."""
    generator = torch.Generator().manual_seed(seed)
    stretch = torch.tensor([0.1, 0.2, 0.4])[torch.randperm(3, generator=generator)]
    return Gaussians(
        means=torch.randn(count, 3, generator=generator) * stretch,
        quaternions=torch.nn.functional.normalize(torch.randn(count, 4, generator=generator), dim=1),
        scales=0.01 + 0.02 * torch.rand(count, 3, generator=generator),
        opacities=torch.full((count,), 0.9),
        colors=torch.rand(count, 3, generator=generator),
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What the farm would have left of four objects."""
    folder = tmp_path_factory.mktemp("ablations")
    (folder / "views").mkdir()
    (folder / "fits").mkdir()
    layout, samples = AtlasLayout.load_default(32), []
    with open(folder / "views" / RECORDS, "w") as file:
        for seed, name in enumerate(("red", "blue", "green", "white")):
            record = {"id": name, "name": name, "captions": [f"a {name} lamp"], "creator": "Ada", "licence": "CC0", "library": "Balls"}
            sphere_views(48).save(views_path(folder / "views", name))
            file.write(json.dumps({**record, "status": "ok"}) + "\n")
            save(blob(seed), folder / "fits" / f"{name}.ply")
            samples.append((name, to_atlas(blob(seed), layout, spec=TINY.channels), {**record, "object": name}))
    write_shards(samples, folder / "shards")
    ablations.prepare(TINY, folder)
    return folder


def test_an_object_flattened_by_itself_keeps_its_gaussians_and_is_smooth_and_has_other_cells(run):
    layout = AtlasLayout.load_default(32)
    own, usual = (
        {sample.id: from_atlas(Atlas(sample.values, layout.id, sample.spec), layout) for sample, _ in read_shards(run / folder)}
        for folder in ("shards-own", "shards-sphere")
    )
    for name in usual:
        apart = torch.cdist(own[name].means, usual[name].means)  # stored in half precision
        assert apart.amin(0).max() < 2e-3 and apart.amin(1).max() < 2e-3, "the same Gaussians"
        grid = own[name].means.reshape(32, 32, 3)
        shuffled = own[name].means[torch.randperm(1024, generator=torch.Generator().manual_seed(0))].reshape(32, 32, 3)
        assert grid.diff(dim=1).norm(dim=2).mean() < 0.6 * shuffled.diff(dim=1).norm(dim=2).mean(), "neighbours are near"
    assert not torch.allclose(own["red"].means, usual["red"].means, atol=0.05)
    with pytest.raises(InputError, match="do not fill 1024 cells"):
        ablations.flattened(blob(0, 100), layout)


def test_a_run_that_was_killed_goes_on_and_a_finished_one_is_kept(run, monkeypatch):
    whole = ablations.train("transferred", 0, TINY, run)
    first = ablations.made(whole, TINY)
    assert [point["step"] for point in ablations.curve_of(run, "transferred", 0)] == [2]
    assert {prompt for prompt, _ in first} <= {f"a {name} lamp" for name in ("red", "blue", "green", "white")} and len(first[0][1]) == 1024
    before = (whole / "made.safetensors").read_bytes()

    # The same seed in another folder, killed after its first checkpoint.
    other = run / "transferred-1"
    original, calls = Trainer.train_step, []

    def dies(self):
        calls.append(self.step)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self)

    monkeypatch.setattr(Trainer, "train_step", dies)
    with pytest.raises(KeyboardInterrupt):
        ablations.train("transferred", 1, TINY, run)
    assert not (other / "made.safetensors").exists()
    calls.append(None)
    ablations.train("transferred", 1, TINY, run)
    assert calls == [0, 1, None, 1], "only the step that was missing"
    ablations.train("transferred", 0, TINY, run)
    assert (whole / "made.safetensors").read_bytes() == before and len(calls) == 4, "nothing is trained twice"


def test_variants_change_one_thing():
    for name, variant in ablations.VARIANTS.items():
        changes = [bool(variant.finetune), not variant.transferred, variant.flattening != "sphere", variant.normalization != "cell"]
        assert sum(changes) == (name != ablations.BASELINE)


def test_intervals_are_students():
    values = [1.0, 1.4, 0.9, 1.2]
    low, high = scipy.stats.t.interval(0.95, 3, loc=1.125, scale=scipy.stats.sem(values))
    found = Interval.of(values)
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high))
    assert Interval.of([2.0]).text(1) == "2.0" and not Interval.of([2.0]).clear
    assert Interval.of([1.0, 1.1]).clear != Interval.of([-1.0, 1.1]).clear
    assert Interval(0.123, 0.01).text(2, sign=True) == "+0.12 ± 0.01"


def test_differences_are_taken_seed_by_seed():
    """A spread that all variants share must not hide what is the same in every seed."""
    metrics = {metric.key: 0.0 for metric in ablation_report.METRICS}
    scores = {
        "transferred": {seed: {**metrics, "score": 0.1 * seed, "held_out_loss": 1.0} for seed in range(3)},
        "scratch": {seed: {**metrics, "score": 0.1 * seed - 0.02 + 0.001 * seed, "held_out_loss": 2.0} for seed in range(4)},
        "own": {seed: {**metrics, "held_out_loss": 0.1} for seed in range(3)},
    }
    text = ablation_report.differences(scores)
    scratch, own = (next(line for line in text.splitlines() if ablations.VARIANTS[name].title in line) for name in ("scratch", "own"))
    assert "**-0.019 ± 0.002** (worse)" in scratch and "**+1.000 ± 0.000** (worse)" in scratch
    assert own.split("|")[2].strip() == "", "a loss over other values is no comparison"


def test_the_head_start_is_read_off_the_curves(tmp_path):
    for name, losses in (("transferred", (0.9, 0.5, 0.4)), ("scratch", (1.0, 0.8, 0.6))):
        for seed, factor in ((0, 1.0), (1, 0.1)):
            folder = tmp_path / f"{name}-{seed}"
            folder.mkdir()
            scaled = [loss * (factor if name == "scratch" else 1.0) for loss in losses]
            points = [{"step": 50 * (i + 1), "train": 1.0, "held_out": loss} for i, loss in enumerate(scaled)]
            (folder / "curve.json").write_text(json.dumps(points))
    assert ablation_report.head_start(tmp_path, "scratch", [0, 1]) == [100, None]
