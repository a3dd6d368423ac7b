"""2D base models: Stable Diffusion's own file layout, diffusers folders, text encoders, and what widening keeps of them."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace

import psutil
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UNet2DConditionModel
from safetensors.torch import save_file

from generator.errors import InputError
from generator.model.bundle import load_bundle
from generator.model.text import TextEncoder
from generator.model.widen import widen_unet
from tests.tiny_bundle import write_tiny_bundle
from trainer.base import load_base, text_encoder
from trainer.finetune import FinetuneConfig, build_unet, going_on
from trainer.fit import FitConfig
from trainer.presets import PRESETS, following_base
from trainer.schedule import schedule_of, scheduler_config

# The topology of Stable Diffusion: four levels of two blocks, attention in all but the last.
DOWN = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
UP = ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")


def stable_diffusion(version: int, width: int = 32, text: int = 24) -> UNet2DConditionModel:
    """A UNet built as Stable Diffusion 1.x or 2.x, as narrow as wanted."""
    torch.manual_seed(version)
    widths = (width, 2 * width, 4 * width, 4 * width)
    kind = (
        {"attention_head_dim": [max(1, w // 64) for w in widths], "use_linear_projection": True}
        if version == 2
        else {"attention_head_dim": 8}
    )
    return UNet2DConditionModel(
        sample_size=16, block_out_channels=widths, down_block_types=DOWN, up_block_types=UP, cross_attention_dim=text, **kind
    ).eval()


def original_layout(unet: UNet2DConditionModel) -> dict[str, torch.Tensor]:
    """The weights under the names of Stable Diffusion's own files, written from their structure: blocks numbered through."""
    resnet = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
              "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}  # fmt: skip
    single = {"conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
              "conv_norm_out": "out.0", "conv_out": "out.2"}  # fmt: skip

    def name(ours: str) -> str:
        module, leaf = ours.rsplit(".", 1)
        if module in single:
            return f"{single[module]}.{leaf}"
        kind, block, part, index, rest = re.fullmatch(r"(?:(down|up)_blocks\.(\d)|mid_block)\.(\w+)\.(\d)(?:\.(.*))?", module).groups()
        rest = resnet.get(rest, rest) if part == "resnets" else rest
        if kind is None:
            return f"middle_block.{2 * int(index) + (part == 'attentions')}.{rest}.{leaf}"
        if part == "downsamplers":
            return f"input_blocks.{3 * (int(block) + 1)}.0.op.{leaf}"
        if part == "upsamplers":
            return f"output_blocks.{3 * int(block) + 2}.{1 if UP[int(block)] == 'UpBlock2D' else 2}.conv.{leaf}"
        place = 3 * int(block) + int(index)
        which = f"input_blocks.{place + 1}" if kind == "down" else f"output_blocks.{place}"
        return f"{which}.{int(part == 'attentions')}.{rest}.{leaf}"

    return {f"model.diffusion_model.{name(key)}": value.contiguous() for key, value in unet.state_dict().items()}


def four_copies_agree(narrow: UNet2DConditionModel, wide: UNet2DConditionModel, text_length: int = 5) -> float:
    """The largest difference between the widened output on four copies of a latent and four copies of the old output."""
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(2, 4, 16, 16, generator=generator)
    text = torch.randn(2, text_length, narrow.config.cross_attention_dim, generator=generator)
    timesteps = torch.tensor([17, 803])
    with torch.no_grad():
        old = narrow(latent, timesteps, encoder_hidden_states=text, return_dict=False)[0]
        new = wide(latent.repeat(1, 4, 1, 1), timesteps, encoder_hidden_states=text, return_dict=False)[0]
    assert new.shape == (2, 16, 16, 16) and old.abs().max() > 0.1
    return (new - old.repeat(1, 4, 1, 1)).abs().max().item()


@pytest.mark.parametrize("version", [1, 2])
def test_a_file_in_stable_diffusions_own_layout_is_widened_and_gives_four_copies(tmp_path, version):
    narrow = stable_diffusion(version)
    others = {"first_stage_model.decoder.conv_in.weight": torch.zeros(3), "cond_stage_model.transformer.x": torch.zeros(3)}
    # Half the weights in half precision, as many of the files are.
    save_file({name: value.half() for name, value in original_layout(narrow).items()} | others, tmp_path / "sd.safetensors")
    narrow.load_state_dict({name: value.half().float() for name, value in narrow.state_dict().items()})
    base = load_base(tmp_path / "sd.safetensors")
    assert base.text is None and base.text_width == 24 and len(base.sha256) == 64
    loaded = base.load_unet().eval()
    for name, value in narrow.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert four_copies_agree(narrow, widen_unet(loaded)) < 1e-4


@pytest.mark.parametrize("version", [1, 2])
def test_shapes_alone_tell_the_full_size_configurations(version, monkeypatch):
    """Without memory: the real widths of Stable Diffusion 1.x and 2.x, compared with what diffusers' own folders say of them."""
    from trainer import base

    widths, text = (320, 640, 1280, 1280), {1: 768, 2: 1024}[version]
    with torch.device("meta"):
        unet = stable_diffusion(version, 320, text)
    shapes = {name.removeprefix("model.diffusion_model."): tuple(value.shape) for name, value in original_layout(unet).items()}
    config = base._config_of(shapes)
    assert tuple(config["block_out_channels"]) == widths and config["cross_attention_dim"] == text and config["layers_per_block"] == 2
    assert config["attention_head_dim"] == {1: 8, 2: [5, 10, 20, 20]}[version] and config["use_linear_projection"] == (version == 2)
    assert tuple(config["down_block_types"]) == DOWN and tuple(config["up_block_types"]) == UP
    with torch.device("meta"):
        again = UNet2DConditionModel.from_config(config)
    assert {n: v.shape for n, v in again.state_dict().items()} == {n: v.shape for n, v in unet.state_dict().items()}


def test_all_of_stable_diffusion_2_is_widened():
    """The real configuration, 866 M parameters, with random weights."""
    if psutil.virtual_memory().available < 12e9:
        pytest.skip("needs 12 GB of free memory")
    narrow = stable_diffusion(2, 320, 1024)
    wide = widen_unet(narrow)
    assert sum(p.numel() for p in narrow.parameters()) == 865_910_724
    assert four_copies_agree(narrow, wide) < 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A diffusers folder as Stable Diffusion's: UNet, CLIP text encoder and tokenizer, scheduler, card."""
    from transformers import CLIPTextConfig, CLIPTextModel

    path = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    stable_diffusion(2).save_pretrained(path / "unet")
    config = CLIPTextConfig(vocab_size=40000, hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    CLIPTextModel(config).save_pretrained(path / "text_encoder")
    shutil.copytree(
        TextEncoder.default().tokenizer_folder, path / "tokenizer", ignore=shutil.ignore_patterns("*.safetensors", "config.json")
    )
    (path / "scheduler").mkdir()
    (path / "scheduler" / "scheduler_config.json").write_text(json.dumps({"prediction_type": "v_prediction"}))
    (path / "README.md").write_text("---\nlicense: openrail++\ntags:\n- x\n---\n# A model\n")
    return path


def test_a_folder_gives_unet_text_encoder_prediction_and_licence(folder):
    base = load_base(folder)
    assert (base.prediction_type, base.licence) == ("v_prediction", "openrail++")
    assert four_copies_agree(stable_diffusion(2), widen_unet(base.load_unet().eval())) < 1e-4
    encoder = text_encoder("", base, "empty")
    assert encoder.width == base.text_width == 24 and (encoder.config.padding, encoder.config.unconditional) == ("kept", "empty")
    hidden = encoder.encode(["a chair"]).hidden
    assert hidden.shape == (1, 77, 24) and hidden[0, -1].abs().max() > 0, "padding is not zeroed"


def test_text_encoders_are_chosen_and_must_fit(folder, tmp_path):
    base = load_base(folder)
    assert text_encoder("", None, "zeros").width == text_encoder("minilm", None, "zeros").width == 384
    assert text_encoder(str(folder), None, "zeros").width == 24
    with pytest.raises(InputError, match="attends to text of width 24, the text encoder gives 384"):
        text_encoder("minilm", base, "zeros")
    with pytest.raises(InputError, match="no model.safetensors"):
        text_encoder(str(tmp_path), None, "zeros")


def test_what_is_no_base_is_named(tmp_path):
    with pytest.raises(InputError, match="no unet/config.json"):
        load_base(tmp_path)
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(3)}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="not laid out as Stable Diffusion"):
        load_base(tmp_path / "x.safetensors")
    (tmp_path / "y.safetensors").write_bytes(b"no tensors")
    with pytest.raises(InputError, match="cannot read base"):
        load_base(tmp_path / "y.safetensors")
    for changes, message in (({"in_channels": 9}, "9 channels in and 4 out"), ({"cross_attention_dim": None}, "does not attend to text")):
        (tmp_path / "unet").mkdir(exist_ok=True)
        unet = stable_diffusion(1)
        unet.save_pretrained(tmp_path / "unet")
        config = json.loads((tmp_path / "unet" / "config.json").read_text())
        (tmp_path / "unet" / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(InputError, match=message):
            load_base(tmp_path)
    (tmp_path / "unet" / "config.json").write_text(json.dumps(config))
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({"conv_in.weight": torch.zeros(3)}, weights)
    with pytest.raises(InputError, match="cannot read a UNet from base"):
        load_base(tmp_path).load_unet()
    weights.unlink()
    with pytest.raises(InputError, match="save it as safetensors"):
        load_base(tmp_path)


def test_a_bundle_is_gone_on_from_with_its_own_schedule_and_text(tmp_path):
    bundle = write_tiny_bundle(tmp_path / "bundle")
    config = FinetuneConfig(base=str(bundle), fold=4)
    base = load_base(bundle)
    assert base.licence == "CC0-1.0" and base.prediction_type == "v_prediction"
    assert text_encoder("", base, "zeros").config == TextEncoder.default().config
    unet, stored = build_unet(config, 384), load_bundle(bundle).load_unet()
    assert all(torch.equal(value, stored.state_dict()[name]) for name, value in unet.state_dict().items())
    assert all(parameter.requires_grad for parameter in unet.parameters())
    for changes in ({"fold": 2}, {"prediction_type": "sample"}, {"shift": 3.0}):
        with pytest.raises(InputError, match="another fold, prediction or noise"):
            build_unet(replace(config, **changes), 384)
        assert going_on(replace(config, **changes), load_bundle(bundle)) == config
    preset = following_base(replace(PRESETS["starter"], size=32, fit=FitConfig(count=100), finetune=FinetuneConfig(base=str(bundle))))
    assert preset.finetune == config and preset.size == 32 and preset.channels == load_bundle(bundle).channels


@pytest.mark.parametrize("expected", [(1.0, True), (3.0, True), (2.5, False)])
def test_a_schedule_is_found_again_from_what_a_bundle_stores(expected):
    stored = DPMSolverMultistepScheduler.from_config(scheduler_config("sample", *expected)).alphas_cumprod
    assert schedule_of(stored) == expected
    assert schedule_of(torch.linspace(0.99, 0.01, 1000)) is None
