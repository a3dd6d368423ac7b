"""What only an atlas can do: variations, in-painting, mixed prompts, objects back to their atlas, morphing."""

from __future__ import annotations

import base64
import json
import threading
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from generator.__main__ import main
from generator.atlas import CHANNELS, Atlas, AtlasLayout, ChannelSpec, from_atlas, in_cells, morph
from generator.errors import Cancelled, InputError
from generator.formats import load, load_metadata, save
from generator.gaussians import Gaussians
from generator.model.folding import fold, unfold
from generator.model.pipeline import GaussianAtlasPipeline
from generator.records import describe, of_edit, of_morph, parse_edit
from tests.test_pipeline import exact_pipeline
from tests.tiny_bundle import INFO, layout, normalization, write_tiny_bundle

COUNT = 32 * 32


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture(scope="module")
def pipeline(tiny: Path) -> GaussianAtlasPipeline:
    return GaussianAtlasPipeline.from_pretrained(tiny, device="cpu")


@pytest.fixture(scope="module")
def lamp(pipeline: GaussianAtlasPipeline) -> Atlas:
    return pipeline("a lamp", seed=1).atlases[0]


@pytest.fixture(scope="module")
def mask() -> torch.Tensor:
    # Not along the folded blocks: a mask is of cells.
    mask = torch.zeros(32, 32, dtype=torch.bool)
    mask[5:18, 3:22] = True
    return mask


def distance(a: Atlas, b: Atlas) -> float:
    return (normalization().normalize(a.values) - normalization().normalize(b.values)).square().mean().sqrt().item()


# Variations -----------------------------------------------------------------------------------------------------------


def test_strength_leads_from_the_object_to_a_plain_generation(pipeline: GaussianAtlasPipeline, lamp: Atlas) -> None:
    plain = pipeline("a lamp", seed=9).atlases[0]
    strengths = (0, 0.002, 0.02, 0.2, 1)
    found = [pipeline("a lamp", seed=9, init_atlas=lamp, strength=strength).atlases[0] for strength in strengths]
    # At the ends nothing is approximate: the object itself, and noise alone.
    assert torch.equal(found[0].values, lamp.values) and torch.equal(found[-1].values, plain.values)
    distances = [distance(atlas, lamp) for atlas in found]
    assert distances == sorted(distances) and distances[1] < 0.1 < distances[-1]
    assert torch.equal(pipeline("a lamp", seed=9, init_atlas=lamp, strength=0.2).atlases[0].values, found[3].values)
    other = pipeline("a lamp", seed=10, init_atlas=lamp, strength=0.2).atlases[0]
    assert distance(other, found[3]) > 0.01, "another seed is another variation"


@pytest.mark.parametrize("kind", ["sample", "v_prediction", "epsilon"])
@pytest.mark.parametrize("strength", [0.05, 0.5])
def test_whatever_the_network_predicts_a_variation_is_solved_to_its_end(kind: str, strength: float) -> None:
    # This network knows one atlas only, so every solution ends there, but for the share of its error that is taken off:
    # it gives the source back as `clean`, so it lacks `source - clean`.
    pipe = exact_pipeline(kind)
    clean = 2 * pipe.unet.clean
    source = Atlas(normalization().denormalize(unfold(clean + 0.3, 2))[0], layout().id, ChannelSpec())
    found = pipe("any", num_inference_steps=7, guidance_scale=1, init_atlas=source, strength=strength).atlases[0]
    raw = fold(normalization().normalize(found.values)[None], 2)
    torch.testing.assert_close(raw, clean + (1 - strength) * 0.3, atol=3e-3, rtol=0)


def test_steps_are_steps_at_any_strength(pipeline: GaussianAtlasPipeline, lamp: Atlas) -> None:
    for strength, steps, expected in ((0.5, 6, 6), (0.004, 6, 4), (0.0001, 6, 1), (0.999, 6, 6)):
        seen = []
        output = pipeline(
            "a lamp",
            num_inference_steps=steps,
            init_atlas=lamp,
            strength=strength,
            num_samples_per_prompt=2,
            batch_size=1,
            callback=lambda step, total, preview, seen=seen: seen.append((step, total)),
        )
        assert seen == [(step + 1, 2 * expected) for step in range(2 * expected)]
        assert output.num_inference_steps == steps and all(g.finite().all() for g in output.gaussians)


def test_variations_of_a_batch_are_those_of_single_runs(pipeline: GaussianAtlasPipeline, lamp: Atlas, mask: torch.Tensor) -> None:
    for edit in ({"strength": 0.4}, {"mask": mask}):
        output = pipeline(["a lamp", "a car"], seed=4, init_atlas=lamp, **edit)
        for prompt, seed, atlas in zip(output.prompts, output.seeds, output.atlases, strict=True):
            single = pipeline(prompt, seed=seed, init_atlas=lamp, **edit).atlases[0]
            torch.testing.assert_close(atlas.values, single.values, atol=2e-4, rtol=0)


# In-painting ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [None, 0.3])
def test_kept_cells_stay_bit_for_bit(pipeline: GaussianAtlasPipeline, lamp: Atlas, mask: torch.Tensor, strength: float | None) -> None:
    previews = []
    output = pipeline(
        "a red car", seed=3, init_atlas=lamp, mask=mask, strength=strength, callback=lambda step, total, preview: previews.append(preview())
    )
    atlas = output.atlases[0]
    assert torch.equal(atlas.values[:, ~mask], lamp.values[:, ~mask])
    assert (atlas.values[:, mask] != lamp.values[:, mask]).float().mean() > 0.9
    source, kept = from_atlas(lamp, layout()), ~mask.flatten()
    for gaussians in (output.gaussians[0], previews[0][0]):
        assert torch.equal(gaussians.means[kept], source.means[kept]) and torch.equal(gaussians.quaternions[kept], source.quaternions[kept])


def test_all_cells_anew_is_a_plain_generation(pipeline: GaussianAtlasPipeline, lamp: Atlas) -> None:
    everything = torch.ones(32, 32, dtype=torch.bool)
    anew = pipeline("a car", seed=3, init_atlas=lamp, mask=everything).atlases[0]
    assert torch.equal(anew.values, pipeline("a car", seed=3).atlases[0].values)


def test_the_network_sees_the_kept_cells_at_every_level(mask: torch.Tensor) -> None:
    pipe = exact_pipeline("sample", factor=1)
    seen = []
    inner = pipe.unet.forward
    pipe.unet.forward = lambda x, timestep, **rest: (seen.append((int(timestep), x.clone())), inner(x, timestep, **rest))[1]
    source = Atlas(normalization().denormalize(torch.full((1, CHANNELS, 32, 32), 0.7))[0], layout().id, ChannelSpec())
    found = pipe("any", num_inference_steps=5, guidance_scale=1, init_atlas=source, mask=mask).atlases[0]
    noise = torch.randn(CHANNELS, 32, 32, generator=torch.Generator().manual_seed(0))
    for timestep, x in seen:
        alpha2 = pipe.scheduler.alphas_cumprod[timestep]
        expected = alpha2.sqrt() * 0.7 + (1 - alpha2).sqrt() * noise
        torch.testing.assert_close(x[0][:, ~mask], expected[:, ~mask], atol=1e-3, rtol=0)
    # And the others end where the network leads them.
    raw = normalization().normalize(found.values)
    torch.testing.assert_close(raw[:, mask], (2 * pipe.unet.clean[0])[:, mask], atol=2e-3, rtol=0)


@pytest.mark.parametrize("edit", ["strength", "mask", "mix"])
def test_cancel_is_seen_at_the_next_step(pipeline: GaussianAtlasPipeline, lamp: Atlas, mask: torch.Tensor, edit: str) -> None:
    arguments = {
        "strength": {"init_atlas": lamp, "strength": 0.5},
        "mask": {"init_atlas": lamp, "mask": mask},
        "mix": {"mix_prompt": "a car"},
    }[edit]
    cancel, steps = threading.Event(), []

    def callback(step: int, _total: int, _preview: object) -> None:
        steps.append(step)
        if step == 2:
            cancel.set()

    with pytest.raises(Cancelled):
        pipeline("a lamp", num_inference_steps=10, callback=callback, cancel=cancel, **arguments)
    assert steps == [1, 2]


# Mixed prompts --------------------------------------------------------------------------------------------------------


def test_the_ends_of_a_mix_are_its_prompts(pipeline: GaussianAtlasPipeline) -> None:
    def sample(prompt: str, **mix: object) -> torch.Tensor:
        return pipeline(prompt, seed=2, **mix).atlases[0].values

    lamp, car = sample("a lamp"), sample("a red car")
    assert torch.equal(sample("a lamp", mix_prompt="a red car", mix_weight=0), lamp)
    assert torch.equal(sample("a lamp", mix_prompt="a red car", mix_weight=1), car)
    half = sample("a lamp", mix_prompt="a red car")
    whole = (lamp - car).abs().mean()
    assert (half - lamp).abs().mean() < whole and (half - car).abs().mean() < whole and not torch.equal(half, lamp)
    torch.testing.assert_close(sample("a red car", mix_prompt="a lamp", mix_weight=0.5), half, atol=1e-3, rtol=0)


@pytest.mark.parametrize("guidance", [1, 2.5])
def test_predictions_are_averaged_before_guidance(guidance: float) -> None:
    pipe = exact_pipeline("sample")
    pipe.text_encoder = SimpleNamespace(
        encode=lambda prompts: SimpleNamespace(hidden=torch.stack([torch.full((4, 8), float(prompt)) for prompt in prompts])),
        unconditional=lambda count: SimpleNamespace(hidden=torch.zeros(count, 4, 8)),
        left_out=lambda prompts: [],
    )
    values = pipe("1", mix_prompt="3", mix_weight=0.25, num_inference_steps=3, guidance_scale=guidance).atlases[0].values
    expected = normalization().denormalize(unfold((1 + guidance * 1.5) * pipe.unet.clean, 2))[0]
    torch.testing.assert_close(values, expected, atol=1e-3, rtol=0)
    assert pipe.unet.batches == [2 if guidance == 1 else 3] * 3


# Objects back to their atlas ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide(pipeline: GaussianAtlasPipeline) -> GaussianAtlasPipeline:
    """The tiny model with the low-pass of the starter."""
    parts = (pipeline.unet, pipeline.scheduler, pipeline.text_encoder, pipeline.layout, pipeline.normalization, pipeline.channels)
    return GaussianAtlasPipeline(*parts, INFO | {"low_pass": 0.005854})


def test_encode_undoes_what_generating_did(wide: GaussianAtlasPipeline) -> None:
    output = wide("a lamp", seed=1)
    atlas, gaussians = output.atlases[0], output.gaussians[0]
    again = wide.encode(gaussians)
    assert again.layout_id == atlas.layout_id and again.spec == atlas.spec
    narrow, back = from_atlas(atlas, layout()), from_atlas(again, layout())
    assert (gaussians.scales > narrow.scales).all()
    torch.testing.assert_close(back.scales, narrow.scales, atol=1e-7, rtol=1e-4)
    torch.testing.assert_close(back.means, narrow.means, atol=1e-6, rtol=0)
    torch.testing.assert_close(back.opacities, narrow.opacities, atol=1e-3, rtol=0)
    torch.testing.assert_close(back.colors, narrow.colors)
    torch.testing.assert_close(back.covariances(), narrow.covariances(), atol=1e-7, rtol=1e-4)
    twice = wide.encode(wide("a lamp", init_atlas=again, strength=0).gaussians[0])
    torch.testing.assert_close(twice.values, again.values, atol=2e-4, rtol=0)
    # Another model may have widened by another amount, or by none.
    torch.testing.assert_close(from_atlas(wide.encode(narrow, low_pass=0.0), layout()).scales, narrow.scales, atol=1e-7, rtol=1e-4)


def test_encode_of_what_an_artist_left(wide: GaussianAtlasPipeline) -> None:
    gaussians = wide("a lamp", seed=1).gaussians[0]
    kept = torch.ones(COUNT, dtype=torch.bool)
    kept[[0, 37, 500]] = False
    order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(0))
    order = order[kept[order]]
    changed = gaussians.replace(means=gaussians.means + torch.tensor([0.0, 0.0, 0.25]), colors=1 - gaussians.colors)
    # Two splats that are in no cell come along.
    extra = torch.cat([order, order[:2]])
    cells = torch.cat([order, torch.tensor([-1, -1])])
    back = from_atlas(wide.encode(changed[extra], cells), layout())
    torch.testing.assert_close(back.means[kept], changed.means[kept], atol=1e-6, rtol=0)
    torch.testing.assert_close(back.colors[kept], changed.colors[kept])
    assert (back.opacities[~kept] < 2e-3).all() and (back.opacities[kept] > 2e-3).all()
    # An empty cell repeats a neighbour: the network must not meet what it never saw.
    near = (layout().cell_sphere[37] @ layout().cell_sphere[kept].T).argmax()
    torch.testing.assert_close(back.scales[37], back.scales[kept][near])


def test_cells_that_are_none_are_refused(wide: GaussianAtlasPipeline) -> None:
    gaussians = wide("a lamp", seed=1, num_inference_steps=1).gaussians[0]
    cells = torch.arange(COUNT)
    with pytest.raises(InputError, match="joined"):
        wide.encode(gaussians, cells.clamp(max=900))
    with pytest.raises(InputError, match="cell 1033"):
        wide.encode(gaussians, cells + 10)
    with pytest.raises(InputError, match="none of the Gaussians"):
        wide.encode(gaussians, torch.full((COUNT,), -1))
    with pytest.raises(InputError, match="one a Gaussian"):
        wide.encode(gaussians, cells[:5])
    with pytest.raises(InputError, match="NaN"):
        wide.encode(gaussians.replace(means=gaussians.means * float("nan")))


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"strength": 0.5}, "init_atlas"),
        ({"mask": torch.ones(32, 32, dtype=torch.bool)}, "init_atlas"),
        ({"init_atlas": "lamp.ply"}, "init_atlas"),
        ({"init_atlas": True, "strength": 1.2}, "strength"),
        ({"init_atlas": True, "strength": -0.1}, "strength"),
        ({"init_atlas": True, "strength": float("nan")}, "strength"),
        ({"init_atlas": True, "strength": "half"}, "strength"),
        ({"init_atlas": True, "mask": torch.ones(16, 16, dtype=torch.bool)}, "mask"),
        ({"init_atlas": True, "mask": torch.ones(32, 32)}, "mask"),
        ({"init_atlas": True, "mask": torch.zeros(32, 32, dtype=torch.bool)}, "mask"),
        ({"mix_prompt": ""}, "mix_prompt"),
        ({"mix_prompt": 3}, "mix_prompt"),
        ({"mix_prompt": "a car", "mix_weight": 2}, "mix_weight"),
        ({"mix_prompt": "a car", "mix_weight": None}, "mix_weight"),
    ],
)
def test_bad_arguments_are_named(pipeline: GaussianAtlasPipeline, lamp: Atlas, arguments: dict, name: str) -> None:
    if arguments.get("init_atlas") is True:
        arguments = arguments | {"init_atlas": lamp}
    with pytest.raises(InputError, match=name):
        pipeline("a lamp", **arguments)


def test_an_atlas_of_another_layout_or_other_channels_is_refused(pipeline: GaussianAtlasPipeline, lamp: Atlas) -> None:
    other = AtlasLayout.load_default(32, "equal_area")
    with pytest.raises(InputError, match=f"layout {other.id}"):
        pipeline("a lamp", init_atlas=Atlas(lamp.values, other.id, lamp.spec))
    with pytest.raises(InputError, match="channels"):
        pipeline("a lamp", init_atlas=Atlas(lamp.values, lamp.layout_id, ChannelSpec(rotation="canonical")))
    with pytest.raises(InputError, match="NaN"):
        pipeline("a lamp", init_atlas=Atlas(lamp.values * float("nan"), lamp.layout_id, lamp.spec))


# Morphing -------------------------------------------------------------------------------------------------------------


def some(count: int, seed: int) -> Gaussians:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator)

    quaternions = torch.nn.functional.normalize(random(count, 4) - 0.5, dim=1)
    return Gaussians(random(count, 3) - 0.5, quaternions, random(count, 3) * 0.1 + 1e-3, random(count), random(count, 3))


def test_morph_ends_at_its_objects_and_is_even_between() -> None:
    first, second = some(50, 0), some(50, 1)
    assert morph(first, second, 0) is first and morph(first, second, 1) is second
    half = morph(first, second, 0.5)
    torch.testing.assert_close(half.means, (first.means + second.means) / 2)
    torch.testing.assert_close(half.scales**2, first.scales * second.scales)
    torch.testing.assert_close(half.quaternions.norm(dim=1), torch.ones(50))
    # As far from one end as from the other, and by the shorter way: at most 45 degrees of the hypersphere.
    to = [(half.quaternions * end.quaternions).sum(1).abs() for end in (first, second)]
    torch.testing.assert_close(*to)
    assert (to[0] >= 0.5**0.5 - 1e-5).all()
    # The signs of quaternions mean nothing.
    flipped = second.replace(quaternions=-second.quaternions)
    torch.testing.assert_close(morph(first, flipped, 0.3).covariances(), morph(first, second, 0.3).covariances())


def test_morph_refuses_what_does_not_correspond() -> None:
    with pytest.raises(InputError, match="50 and 49"):
        morph(some(50, 0), some(49, 0), 0.5)
    with pytest.raises(InputError, match="factor"):
        morph(some(5, 0), some(5, 1), 1.5)


def test_in_cells_sorts() -> None:
    gaussians = some(COUNT, 0)
    order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(1))
    assert torch.equal(in_cells(gaussians[order], order, layout()).means, gaussians.means)


# The command line -----------------------------------------------------------------------------------------------------


def test_edits_from_the_command_line(tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: object) -> int:
        return main([*map(str, arguments), "--model", str(tiny), "--steps", "3"])

    lamp, car, again = tmp_path / "lamp.ply", tmp_path / "car.ply", tmp_path / "again.ply"
    assert run("a lamp", "--output", lamp, "--mix", "a red car", "--mix-weight", 0.2) == 0
    metadata = load_metadata(lamp)
    assert (metadata["mix_prompt"], metadata["mix_weight"], metadata["layout_id"]) == ("a red car", 0.2, layout().id)
    assert run("a red car", "--output", car, "--init", lamp, "--seed", 7, "--box", -2, -2, 0, 2, 2, 2) == 0
    before, after = load(lamp), load(car)
    inside = before.means[:, 2] >= 0
    assert 0 < inside.sum() < COUNT
    torch.testing.assert_close(after.means[~inside], before.means[~inside], atol=1e-5, rtol=0)
    torch.testing.assert_close(after.covariances()[~inside], before.covariances()[~inside], atol=1e-6, rtol=1e-3)
    assert ((after.means - before.means)[inside].abs().amax(1) > 1e-3).float().mean() > 0.9
    source, strength, cells = parse_edit(load_metadata(car)["edit"])
    assert (source["prompt"], strength) == ("a lamp", 1.0) and torch.equal(torch.from_numpy(cells), inside.nonzero()[:, 0])
    # An edited object can be edited again.
    assert run("a lamp", "--output", again, "--init", car, "--strength", 0) == 0
    torch.testing.assert_close(load(again).means, after.means, atol=1e-5, rtol=0)
    assert describe(load_metadata(again)["edit"]) == "Variation, strength 0, of \u201ca red car\u201d, seed 7"

    save(before, tmp_path / "plain.ply")
    save(before, tmp_path / "width.ply", metadata | {"low_pass": "abc"})
    save(before[1:], tmp_path / "cut.ply", metadata)  # as a conversion leaves an atlas with a row that is not finite
    for arguments, message in (
        (("--strength", 0.5), "need --init"),
        (("--init", tmp_path / "plain.ply"), "does not say which cells"),
        (("--init", tmp_path / "cut.ply"), f"holds {COUNT - 1} usable Gaussians where its atlas has {COUNT} cells"),
        (("--init", tmp_path / "width.ply"), 'its low_pass is not a number of at least 0 but "abc"'),
        (("--init", tmp_path / "no.ply"), "does not exist"),
        (("--init", lamp, "--strength", 1.5), "--strength must be"),
        (("--init", lamp, "--box", 9, 9, 9, 10, 10, 10), "--box holds none"),
        (("--mix", ""), "--mix must be"),
    ):
        capsys.readouterr()
        assert run("a lamp", "--output", tmp_path / "none.ply", *arguments) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert message in error and not (tmp_path / "none.ply").exists()


def test_records_survive_and_damage_is_told() -> None:
    cells = torch.randperm(4096, generator=torch.Generator().manual_seed(0))[:1500].sort().values.numpy()
    source, strength, found = parse_edit(of_edit({"prompt": "a lamp"}, 0.25, cells))
    assert (source, strength) == ({"prompt": "a lamp"}, 0.25) and (found == cells).all()
    assert parse_edit(of_edit({}, 0.5))[2] is None
    for text in ("", "no JSON", "[]", '{"kind": "variation"}', '{"kind": "inpainting", "source": {}, "strength": 1, "cells": "?"}'):
        with pytest.raises(InputError, match="edit"):
            parse_edit(text)
    with pytest.raises(InputError, match="morph"):
        parse_edit(of_morph({}, {}))
    assert describe("[" * 100_000) == "", "Python's parser ends in a RecursionError"


@pytest.mark.parametrize("size", [1 << 17, 12_000_000])
def test_a_record_is_unpacked_no_further_than_an_atlas_goes(size: int) -> None:
    """A few kilobytes may hold the bits of a hundred million cells."""

    def record(packed: bytes) -> str:
        return json.dumps({"kind": "inpainting", "source": {}, "strength": 1, "cells": base64.b64encode(packed).decode()})

    zipped = zlib.compress(bytes(size - 1) + b"\1", 9)
    assert len(record(zipped)) < 16_000
    if size > 1 << 17:
        with pytest.raises(InputError, match="damaged"):
            parse_edit(record(zipped))
    else:
        assert parse_edit(record(zipped))[2].tolist() == [2**20 - 1]
    with pytest.raises(InputError, match="damaged"):
        parse_edit(record(zipped[:-1]))


def test_a_record_is_described_or_nothing_is_said() -> None:
    lamp, car = {"prompt": "a lamp", "seed": 3}, {"prompt": "a car"}
    assert describe(of_edit(lamp, 0.25)) == "Variation, strength 0.25, of \u201ca lamp\u201d, seed 3"
    assert describe(of_edit(lamp, 1.0, np.arange(3))) == "Some cells anew, strength 1, in \u201ca lamp\u201d, seed 3"
    assert describe(of_morph(lamp, car)) == "Morph of \u201ca lamp\u201d and \u201ca car\u201d"
    for kind, damage in (
        ("variation", {"strength": 0.5, "source": "x"}),
        ("variation", {"strength": "x", "source": {}}),
        ("variation", {"strength": 10**400, "source": {}}),
        ("inpainting", {"strength": [1], "source": {}}),
        ("inpainting", {"source": {}}),
        ("morph", {"first": "x", "second": {}}),
        ("morph", {"first": {}, "second": 7}),
        (["variation"], {}),
    ):
        assert describe(json.dumps({"kind": kind, **damage})) == ""
