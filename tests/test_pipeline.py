"""Sampling: widening, folding, the solver against closed forms, seeds, guidance, cancel and bad arguments."""

from __future__ import annotations

import subprocess
import sys
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from generator.atlas import CHANNELS, ChannelSpec, from_atlas
from generator.errors import Cancelled, InputError, WorkError
from generator.model.folding import fold, unfold
from generator.model.pipeline import MAX_SEED, GaussianAtlasPipeline
from generator.model.text import TextEncoder
from generator.model.widen import widen_unet
from tests.tiny_bundle import INFO, SCHEDULER, layout, normalization, text_encoder, tiny_unet, write_tiny_bundle

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture(scope="module")
def pipeline(directory: Path) -> GaussianAtlasPipeline:
    return GaussianAtlasPipeline.from_pretrained(directory, device="cpu")


# Folding and widening -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_fold_and_unfold_are_inverse(factor: int) -> None:
    values = torch.randn(3, 16, 8, 12)
    folded = fold(values, factor)
    assert folded.shape == (3, 16 * factor**2, 8 // factor, 12 // factor)
    assert torch.equal(unfold(folded, factor), values)


def test_fold_keeps_a_block_of_cells_together() -> None:
    values = torch.arange(2 * 4 * 4).reshape(1, 2, 4, 4)
    folded = fold(values, 2)
    assert folded[0, :, 1, 0].tolist() == values[0, :, 2:4, 0:2].flatten().tolist()


def test_fold_refuses_sides_that_do_not_fit() -> None:
    with pytest.raises(InputError, match="5 x 4"):
        fold(torch.zeros(1, 16, 5, 4), 2)
    with pytest.raises(InputError, match="6 channels"):
        unfold(torch.zeros(1, 6, 2, 2), 2)


def test_a_widened_unet_gives_copies_of_the_old_output() -> None:
    narrow = tiny_unet(4, width=32)
    before = {name: value.clone() for name, value in narrow.state_dict().items()}
    wide = widen_unet(narrow)
    assert wide.config.in_channels == wide.config.out_channels == 16
    latent, text, step = torch.randn(2, 4, 16, 16), torch.randn(2, 5, 32), torch.tensor(300)
    with torch.no_grad():
        expected = narrow(latent, step, encoder_hidden_states=text).sample
        output = wide(latent.repeat(1, 4, 1, 1), step, encoder_hidden_states=text).sample
    torch.testing.assert_close(output, expected.repeat(1, 4, 1, 1), atol=1e-4, rtol=0)
    # The base stays as it was and shares no memory.
    with torch.no_grad():
        for value in wide.parameters():
            value.add_(1)
    assert narrow.config.in_channels == 4
    assert all(torch.equal(value, before[name]) for name, value in narrow.state_dict().items())


def test_widening_keeps_training_possible() -> None:
    wide = widen_unet(tiny_unet(4, width=32).train())
    assert wide.training and all(value.requires_grad for value in wide.parameters())
    wide(torch.randn(1, 16, 16, 16), 10, encoder_hidden_states=torch.randn(1, 5, 32)).sample.sum().backward()
    assert all(value.grad is not None and value.device.type == "cpu" for value in wide.parameters())


# The text encoder -----------------------------------------------------------------------------------------------------


def test_text_features() -> None:
    encoder = text_encoder()
    hidden, mask = encoder.encode(["a red wooden chair", "a crimson timber seat", "a small sports car"])
    assert hidden.shape == (3, 32, encoder.width) and encoder.width == 384 and mask.shape == (3, 32)
    assert (hidden[mask == 0] == 0).all() and (hidden[mask == 1].abs().sum(1) > 0).all()
    mean = torch.nn.functional.normalize(hidden.sum(1) / mask.sum(1, keepdim=True), dim=1)
    assert mean[0] @ mean[1] > 0.5 > 0.3 > mean[0] @ mean[2]
    # Padding must not leak into a prompt's features: alone or in a batch, they are the same.
    torch.testing.assert_close(encoder.encode(["a small sports car"]).hidden[0], hidden[2], atol=1e-5, rtol=0)
    nothing = encoder.unconditional(2)
    assert nothing.hidden.shape == (2, 32, 384) and not nothing.hidden.any()


def test_long_prompts_are_cut_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="left out"):
        hidden, mask = text_encoder().encode(["a chair", "chair " * 40])
    assert hidden.shape == (2, 32, 384) and mask.sum(1).tolist() == [4, 32]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text_encoder().encode(["chair " * 30])  # with its two marks exactly the 32 tokens


def test_a_missing_text_model_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model\.safetensors"):
        TextEncoder.from_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"kind": "transformers"}')
    with pytest.raises(InputError, match="cannot be loaded"):
        TextEncoder.load(tmp_path).encode(["a chair"])
    with pytest.raises(InputError, match="not a readable configuration"):
        _ = TextEncoder.load(tmp_path).width


# The sampler against closed forms -------------------------------------------------------------------------------------


class ExactUNet(torch.nn.Module):
    """The perfect network for a data set of one atlas: whatever the noise, the clean atlas is `clean`.

    With text it is `clean * text[0, 0]`, so that guidance has something to extrapolate.
    """

    def __init__(self, clean: torch.Tensor, scheduler: object, kind: str) -> None:
        super().__init__()
        self.clean, self.alphas, self.kind = clean, scheduler.alphas_cumprod, kind
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.batches: list[int] = []

    def forward(self, x, timestep, encoder_hidden_states, return_dict):
        self.batches.append(len(x))
        clean = self.clean * (1 + encoder_hidden_states[:, :1, :1, None])
        alpha, sigma = self.alphas[int(timestep)].sqrt(), (1 - self.alphas[int(timestep)]).sqrt()
        noise = (x - alpha * clean) / sigma
        return ({"sample": clean, "epsilon": noise, "v_prediction": alpha * noise - sigma * clean}[self.kind].expand_as(x),)


class FixedText:
    """Encodes every prompt as ones, and no prompt as zeros."""

    def encode(self, prompts):
        return SimpleNamespace(hidden=torch.ones(len(prompts), 4, 8))

    def left_out(self, prompts):
        return []

    def unconditional(self, count):
        return SimpleNamespace(hidden=torch.zeros(count, 4, 8))


def exact_pipeline(kind: str, factor: int = 2) -> GaussianAtlasPipeline:
    from diffusers import DPMSolverMultistepScheduler

    # Without zero terminal SNR: at pure noise an epsilon says nothing of the clean atlas.
    config = SCHEDULER | {"prediction_type": kind, "rescale_betas_zero_snr": kind != "epsilon"}
    scheduler = DPMSolverMultistepScheduler.from_config(config)
    clean = fold(0.4 * torch.randn(1, CHANNELS, 32, 32, generator=torch.Generator().manual_seed(5)), factor)
    unet = ExactUNet(clean, scheduler, kind)
    return GaussianAtlasPipeline(unet, scheduler, FixedText(), layout(), normalization(), ChannelSpec(), INFO | {"fold": factor})


@pytest.mark.parametrize("kind", ["v_prediction", "epsilon", "sample"])
@pytest.mark.parametrize("steps", [1, 2, 7, 20])
def test_the_solver_reaches_the_only_atlas(kind: str, steps: int) -> None:
    pipeline = exact_pipeline(kind)
    values = pipeline("any", num_inference_steps=steps, guidance_scale=1).atlases[0].values
    expected = normalization().denormalize(unfold(2 * pipeline.unet.clean, 2))[0]
    torch.testing.assert_close(values, expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("kind", ["v_prediction", "epsilon", "sample"])
def test_the_estimate_of_a_perfect_network_is_the_clean_atlas(kind: str) -> None:
    pipeline = exact_pipeline(kind)
    clean = unfold(2 * pipeline.unet.clean, 2).expand(3, -1, -1, -1)
    alpha2 = pipeline.scheduler.alphas_cumprod[400]
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    found = pipeline.estimate(alpha2.sqrt() * clean + (1 - alpha2).sqrt() * noise, ["any"] * 3, 400)
    torch.testing.assert_close(found, clean, atol=1e-3, rtol=0)
    assert pipeline.unet.batches == [3] and found.dtype == torch.float32, "without guidance"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompts": ["any", ""]}, "prompt 1 is empty"),
        ({"prompts": ["any"]}, r"noisy must be \[1, 16, 32, 32\]"),
        ({"noisy": torch.zeros(2, CHANNELS, 16, 16)}, "noisy must be"),
        ({"timestep": 1000}, "timestep must be a whole number from 0 to 999"),
    ],
)
def test_what_cannot_be_estimated_is_named(change: dict, words: str) -> None:
    arguments = {"noisy": torch.zeros(2, CHANNELS, 32, 32), "prompts": ["any", "other"], "timestep": 5}
    with pytest.raises(InputError, match=words):
        exact_pipeline("sample").estimate(**(arguments | change))


def test_guidance_extrapolates_from_the_unconditional_prediction() -> None:
    pipeline = exact_pipeline("sample")
    clean = pipeline.unet.clean
    for guidance, factor in ((3.5, 1 + 3.5), (2, 1 + 2), (1, 2), (0, 2)):
        pipeline.unet.batches.clear()
        values = pipeline("any", num_inference_steps=3, guidance_scale=guidance).atlases[0].values
        expected = normalization().denormalize(unfold(factor * clean, 2))[0]
        torch.testing.assert_close(values, expected, atol=1e-3, rtol=0)
        # Guided steps run both predictions in one call; without guidance there is only one.
        assert pipeline.unet.batches == [2 if guidance > 1 else 1] * 3


def test_a_negative_prompt_replaces_the_unconditional_input() -> None:
    pipeline = exact_pipeline("sample")
    # Both sides encode to the same here, so guidance has nothing to lead away from.
    values = pipeline("any", negative_prompt="other", num_inference_steps=3, guidance_scale=5.0).atlases[0].values
    expected = normalization().denormalize(unfold(2 * pipeline.unet.clean, 2))[0]
    torch.testing.assert_close(values, expected, atol=1e-3, rtol=0)


def test_callback_counts_and_previews() -> None:
    pipeline = exact_pipeline("sample")
    seen = []
    output = pipeline(
        "any",
        num_inference_steps=3,
        guidance_scale=1,
        num_samples_per_prompt=3,
        batch_size=2,
        callback=lambda step, total, preview: seen.append((step, total, preview())),
    )
    assert [(step, total, len(preview)) for step, total, preview in seen] == [(i + 1, 6, 2 if i < 3 else 1) for i in range(6)]
    # A network that always knows the answer previews the result.
    torch.testing.assert_close(seen[0][2][0].means, output.gaussians[0].means, atol=1e-3, rtol=0)


def test_a_network_that_diverges_is_reported() -> None:
    pipeline = exact_pipeline("sample")
    pipeline.unet.clean = pipeline.unet.clean * float("nan")
    with pytest.raises(WorkError, match="not finite"):
        pipeline("any", num_inference_steps=2)


# The whole pipeline ---------------------------------------------------------------------------------------------------


def test_from_prompt_to_gaussians(pipeline: GaussianAtlasPipeline) -> None:
    output = pipeline("a red armchair", seed=3)
    assert output.seeds == [3] and output.prompts == ["a red armchair"]
    assert output.num_inference_steps == 4 and output.guidance_scale == 2.0  # the model's own defaults
    (gaussians,), (atlas,) = output.gaussians, output.atlases
    assert len(gaussians) == 32 * 32 and gaussians.finite().all()
    assert gaussians.means.device.type == "cpu" and gaussians.means.dtype == torch.float32
    torch.testing.assert_close(gaussians.quaternions.norm(dim=1), torch.ones(1024))
    torch.testing.assert_close(from_atlas(atlas, layout()).means, gaussians.means)
    assert output.seconds.keys() == {"text", "sample", "decode"} and all(value >= 0 for value in output.seconds.values())
    gaussians.means.clone().requires_grad_().sum().backward()  # ordinary tensors, not inference-only ones


@pytest.mark.filterwarnings("ignore:the model reads")
def test_a_prompt_that_was_cut_is_noted_once(pipeline: GaussianAtlasPipeline) -> None:
    """A warning in a thread that works for a window reaches nobody."""
    long, other = "a lamp " * 40, "a red chair " * 40
    assert pipeline("a lamp", num_inference_steps=1).notes == []
    (note,) = pipeline([long, "a lamp", long], num_inference_steps=1, num_samples_per_prompt=2).notes
    assert note.startswith("the model reads 32 tokens") and "a lamp a lamp" in note
    notes = pipeline("a lamp", negative_prompt=long, mix_prompt=other, num_inference_steps=1).notes
    assert len(notes) == 2 and "red chair" in notes[0]
    assert pipeline("a lamp", negative_prompt=long, guidance_scale=1, num_inference_steps=1).notes == [], "it is not read"


def test_seeds_reproduce_bit_for_bit(pipeline: GaussianAtlasPipeline, directory: Path) -> None:
    torch.manual_seed(1)
    first = pipeline("a lamp", seed=5).atlases[0].values
    torch.manual_seed(2)  # the global generator plays no part
    torch.rand(7)
    again = pipeline("a lamp", seed=5).atlases[0].values
    fresh = GaussianAtlasPipeline.from_pretrained(str(directory), device="cpu")("a lamp", seed=5).atlases[0].values
    assert torch.equal(first, again) and torch.equal(first, fresh)
    assert not torch.allclose(first, pipeline("a lamp", seed=6).atlases[0].values, atol=1e-2)
    state = torch.get_rng_state()
    pipeline("a lamp", seed=5)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_objects_of_a_batch_are_those_of_single_runs(pipeline: GaussianAtlasPipeline, batch_size: int) -> None:
    output = pipeline(["a lamp", "a car"], seed=10, num_samples_per_prompt=2, batch_size=batch_size)
    assert output.seeds == [10, 11, 12, 13]
    assert output.prompts == ["a lamp", "a lamp", "a car", "a car"]
    for prompt, seed, atlas in zip(output.prompts, output.seeds, output.atlases, strict=True):
        single = pipeline(prompt, seed=seed).atlases[0]
        torch.testing.assert_close(atlas.values, single.values, atol=1e-4, rtol=0)


def test_prompt_negative_prompt_and_guidance_matter(pipeline: GaussianAtlasPipeline) -> None:
    def sample(*args: object, **kwargs: object) -> torch.Tensor:
        return pipeline(*args, **kwargs).atlases[0].values

    base = sample("a lamp")
    for other in (sample("a red car"), sample("a lamp", negative_prompt="a red car"), sample("a lamp", guidance_scale=4.0)):
        assert (other - base).abs().max() > 1e-3
    assert torch.equal(sample("a lamp", negative_prompt=""), base)


def test_concurrent_runs_do_not_disturb_each_other(pipeline: GaussianAtlasPipeline) -> None:
    alone = {seed: pipeline("a lamp", seed=seed, num_inference_steps=6).atlases[0].values for seed in (1, 2)}
    together: dict[int, torch.Tensor] = {}

    def run(seed: int) -> None:
        together[seed] = pipeline("a lamp", seed=seed, num_inference_steps=6).atlases[0].values

    threads = [threading.Thread(target=run, args=(seed,)) for seed in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, values in alone.items():
        torch.testing.assert_close(together[seed], values, atol=1e-5, rtol=0)


def test_cancel_is_seen_at_the_next_step(pipeline: GaussianAtlasPipeline) -> None:
    cancel, steps = threading.Event(), []

    def callback(step: int, _total: int, _preview: object) -> None:
        steps.append(step)
        if step == 2:
            cancel.set()

    with pytest.raises(Cancelled):
        pipeline("a lamp", num_inference_steps=10, callback=callback, cancel=cancel)
    assert steps == [1, 2]
    with pytest.raises(Cancelled):
        pipeline("a lamp", callback=callback, cancel=cancel)
    assert steps == [1, 2]
    cancel.clear()
    pipeline("a lamp", cancel=cancel)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": " \n"}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a lamp", ""]}, "prompt 1"),
        ({"prompt": None}, "prompt"),
        ({"prompt": ["a lamp", 3]}, "prompt"),
        ({"negative_prompt": 3}, "negative_prompt"),
        ({"seed": -1}, "seed"),
        ({"seed": MAX_SEED + 1}, "seed"),
        ({"seed": MAX_SEED, "num_samples_per_prompt": 2}, "seed"),
        ({"seed": 0.5}, "seed"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_inference_steps": 1001}, "num_inference_steps"),
        ({"num_inference_steps": True}, "num_inference_steps"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"guidance_scale": float("inf")}, "guidance_scale"),
        ({"guidance_scale": 10**400}, "guidance_scale"),
        ({"guidance_scale": "high"}, "guidance_scale"),
        ({"num_samples_per_prompt": 0}, "num_samples_per_prompt"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_bad_arguments_are_named(pipeline: GaussianAtlasPipeline, arguments: dict, name: str) -> None:
    with pytest.raises(InputError, match=f"^{name} "):
        pipeline(**({"prompt": "a lamp"} | arguments))


def test_the_largest_seed_works(pipeline: GaussianAtlasPipeline) -> None:
    assert pipeline("a lamp", seed=MAX_SEED, num_inference_steps=1).seeds == [MAX_SEED]


def test_save_pretrained_round_trip(pipeline: GaussianAtlasPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path / "copy")
    copy = GaussianAtlasPipeline.from_pretrained(tmp_path / "copy", device="cpu")
    assert torch.equal(copy("a lamp").atlases[0].values, pipeline("a lamp").atlases[0].values)
    assert copy.name == pipeline.name == "tiny 0.0.1" and copy.model_hash


def test_half_precision_stays_close(directory: Path, pipeline: GaussianAtlasPipeline) -> None:
    half = GaussianAtlasPipeline.from_pretrained(directory, device="cpu", dtype=torch.bfloat16)
    assert half.unet.dtype == torch.bfloat16
    difference = half("a lamp").atlases[0].values - pipeline("a lamp").atlases[0].values
    assert difference.abs().mean() < 0.02


def test_devices(directory: Path) -> None:
    with pytest.raises(InputError, match="device"):
        GaussianAtlasPipeline.from_pretrained(directory, device="gpu")
    for absent in ("meta", "xpu", "mps" if sys.platform == "linux" else "hpu", "xla", "vulkan"):
        with pytest.raises(InputError, match=f"device {absent}.* is not available"):
            GaussianAtlasPipeline.from_pretrained(directory, device=absent)
    if torch.cuda.is_available():
        with pytest.raises(InputError, match="device cuda:99 is not available"):
            GaussianAtlasPipeline.from_pretrained(directory, device="cuda:99")
    else:
        with pytest.raises(InputError, match="cuda"):
            GaussianAtlasPipeline.from_pretrained(directory, device="cuda")


def test_importing_the_generator_is_cheap() -> None:
    code = "import sys, generator; print([m for m in ('torch', 'diffusers', 'transformers', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip() == "[]"
    code = (
        "import sys; from generator import GaussianAtlasPipeline;"
        "print([m for m in ('diffusers', 'transformers', 'bpy', 'numba', 'ot') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip() == "[]"
