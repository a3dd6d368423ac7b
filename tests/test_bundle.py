"""Model bundles: what is written reads back, and whatever is wrong with a bundle is said in one line."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from generator.atlas import ChannelSpec
from generator.errors import InputError
from generator.model.bundle import find_bundle, load_bundle, save_bundle
from generator.model.text import TextEncoder, TextEncoderConfig, sha256
from tests.tiny_bundle import FOLD, INFO, SCHEDULER, layout, normalization, text_encoder, tiny_unet, write_tiny_bundle


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny", files={"CREDITS.csv": b"name,licence\n"})


@pytest.fixture
def bundle(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original, tmp_path / "tiny")
    return tmp_path / "tiny"


def one_line(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text and len(text) < 500
    return text


def test_round_trip(original: Path) -> None:
    bundle = load_bundle(original)
    assert bundle.layout.id == layout().id and bundle.fold == FOLD and bundle.name == "tiny 0.0.1"
    torch.testing.assert_close(bundle.normalization.mean, normalization().mean)
    assert bundle.channels == ChannelSpec()
    assert bundle.text_encoder.config == text_encoder().config
    assert {key: bundle.info[key] for key in INFO} == INFO
    assert bundle.scheduler_config == SCHEDULER
    expected, unet = tiny_unet(16 * FOLD**2).state_dict(), bundle.load_unet()
    assert not unet.training and not any(p.requires_grad for p in unet.parameters())
    for name, value in unet.state_dict().items():
        torch.testing.assert_close(value, expected[name].half().float(), msg=name)


def test_the_unet_is_a_plain_diffusers_one(original: Path) -> None:
    from diffusers import DPMSolverMultistepScheduler, UNet2DConditionModel

    theirs = UNet2DConditionModel.from_pretrained(original, subfolder="unet", torch_dtype=torch.float32)
    ours = load_bundle(original).load_unet()
    assert all(torch.equal(value, ours.state_dict()[name]) for name, value in theirs.state_dict().items())
    assert DPMSolverMultistepScheduler.from_pretrained(original, subfolder="scheduler").config.prediction_type == "v_prediction"
    assert json.loads((original / "model_index.json").read_text())["unet"] == ["diffusers", "UNet2DConditionModel"]


def test_every_file_is_listed_and_none_is_a_pickle(original: Path) -> None:
    files = {path.relative_to(original).as_posix() for path in original.rglob("*") if path.is_file()}
    assert files - {"bundle.json"} == load_bundle(original).info["files"].keys()
    assert "CREDITS.csv" in files
    assert {Path(name).suffix for name in files} <= {".json", ".safetensors", ".csv"}
    assert (original / "unet" / "config.json").stat().st_mode & 0o077 == (original / "bundle.json").stat().st_mode & 0o077


def test_the_same_model_is_the_same_bytes(original: Path, tmp_path: Path) -> None:
    again = write_tiny_bundle(tmp_path / "again", files={"CREDITS.csv": b"name,licence\n"})
    for path in original.rglob("*"):
        assert path.is_dir() or path.read_bytes() == (again / path.relative_to(original)).read_bytes(), path


def test_bundles_of_the_first_version_keep_their_channels(bundle: Path) -> None:
    """Their channels.json knows no margin of the opacities."""
    path = bundle / "atlas" / "channels.json"
    first = {"opacity": "identity", "rotation": "canonical"}
    values = {key: value for key, value in (json.loads(path.read_text()) | first).items() if key != "opacity_margin"}
    path.write_text(json.dumps(values))
    info = json.loads((bundle / "bundle.json").read_text())
    info["files"]["atlas/channels.json"] = {"size": path.stat().st_size, "sha256": sha256(path)}
    (bundle / "bundle.json").write_text(json.dumps(info))
    assert load_bundle(bundle).channels == ChannelSpec(**first)


def test_the_hash_names_the_model(original: Path, tmp_path: Path) -> None:
    shutil.copytree(original, tmp_path / "copy")
    other = write_tiny_bundle(tmp_path / "other", unet=tiny_unet(16 * FOLD**2, seed=1))
    assert load_bundle(tmp_path / "copy").hash == load_bundle(original).hash != load_bundle(other).hash


@pytest.mark.parametrize(
    "name",
    [
        "bundle.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "atlas/layout.safetensors",
        "atlas/normalization.safetensors",
        "atlas/channels.json",
        "CREDITS.csv",
    ],
)
def test_missing_truncated_and_altered_files(bundle: Path, name: str) -> None:
    path = bundle / name
    content = path.read_bytes()
    damaged = {"missing": None, "empty": b"", "truncated": content[: len(content) // 2]}
    if name != "bundle.json":  # which has no record of itself
        damaged["altered"] = content[:-1] + bytes([content[-1] ^ 1])
    for kind, bad in damaged.items():
        path.unlink()
        if bad is not None:
            path.write_bytes(bad)
        with pytest.raises(InputError) as error:
            load_bundle(bundle)
        assert str(bundle) in one_line(error), kind
        path.write_bytes(content)
    load_bundle(bundle)


@pytest.mark.parametrize("name", ["bundle.json", "unet/config.json", "text_encoder/config.json", "atlas/channels.json"])
def test_json_of_many_brackets(bundle: Path, name: str) -> None:
    """Python's own parser ends in a RecursionError."""
    (bundle / name).write_text("[" * 100_000)
    if name != "bundle.json":
        info = json.loads((bundle / "bundle.json").read_text())
        info["files"][name] = {"size": 100_000, "sha256": sha256(bundle / name)}
        (bundle / "bundle.json").write_text(json.dumps(info))
    with pytest.raises(InputError, match="nested too deeply"):
        load_bundle(bundle)


def test_without_verification_sizes_are_still_checked(bundle: Path) -> None:
    path = bundle / "CREDITS.csv"
    path.write_bytes(b"Name,licence\n")
    load_bundle(bundle, verify=False)
    path.write_bytes(b"name\n")
    with pytest.raises(InputError, match="truncated"):
        load_bundle(bundle, verify=False)


def test_a_git_lfs_pointer_is_recognised(bundle: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (bundle / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(pointer)
    with pytest.raises(InputError, match="Git LFS"):
        load_bundle(bundle)


@pytest.mark.parametrize(
    "change",
    [
        {"format": "gaussian-atlas-bundle-99"},
        {"files": []},
        {"files": {}},
        {"name": ""},
        {"fold": 3},
        {"fold": "2"},
        {"fold": 2},
        {"atlas": {"layout_id": "0" * 32}},
        {"inference": {"dtype": "int8"}},
        {"defaults": {"guidance_scale": "much"}},
        {"defaults": [2.0]},
        {"defaults": {"guidance_scale": 10**400}},
        {"defaults": {"num_inference_steps": 2.5}},
        {"atlas": [1]},
        {"low_pass": "x"},
        {"low_pass": -1},
        {"coverage": "x"},
        {"coverage": float("nan")},
        {"vocabulary": 5},
        {"vocabulary": ["a lamp", 5]},
    ],
)
def test_a_contradictory_bundle_json(bundle: Path, change: dict) -> None:
    info = json.loads((bundle / "bundle.json").read_text())
    (bundle / "bundle.json").write_text(json.dumps(info | change))
    with pytest.raises(InputError) as error:
        load_bundle(bundle)
    assert str(bundle) in one_line(error)


@pytest.mark.parametrize(
    "change",
    [
        {"num_train_timesteps": 10**11},
        {"num_train_timesteps": 0},
        {"num_train_timesteps": "many"},
        {"prediction_type": "flow"},
        {"beta_schedule": ["linear"]},
        {"beta_start": None},
    ],
)
def test_a_schedule_that_is_none(bundle: Path, change: dict) -> None:
    from generator.model.pipeline import GaussianAtlasPipeline

    path = bundle / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    info = json.loads((bundle / "bundle.json").read_text())
    info["files"]["scheduler/scheduler_config.json"] = {"size": path.stat().st_size, "sha256": sha256(path)}
    (bundle / "bundle.json").write_text(json.dumps(info))
    with pytest.raises(InputError, match="scheduler") as error:
        GaussianAtlasPipeline.from_pretrained(bundle, device="cpu")
    assert str(bundle) in one_line(error)


@pytest.mark.parametrize("change", [{"norm_num_groups": 0}, {"block_out_channels": []}, {"down_block_types": ["Pickle"]}])
def test_a_network_that_is_none(original: Path, change: dict) -> None:
    bundle = load_bundle(original)
    with pytest.raises(InputError, match="weights cannot be loaded"):
        replace(bundle, unet_config=bundle.unet_config | change).load_unet()


@pytest.mark.parametrize("name", ["text_encoder/model/modeling.py", "unet/weights.bin", "setup"])
def test_only_plain_data_is_listed(bundle: Path, name: str) -> None:
    info = json.loads((bundle / "bundle.json").read_text())
    (bundle / name).parent.mkdir(exist_ok=True)
    (bundle / name).write_bytes(b"x")
    info["files"][name] = {"size": 1, "sha256": sha256(bundle / name)}
    (bundle / "bundle.json").write_text(json.dumps(info))
    with pytest.raises(InputError, match="no plain data"):
        load_bundle(bundle)


@pytest.mark.parametrize("name", ["../secret.json", "/etc/hostname", "a\\b"])
def test_files_outside_the_bundle_are_refused(bundle: Path, name: str) -> None:
    info = json.loads((bundle / "bundle.json").read_text())
    info["files"][name] = {"size": 1, "sha256": "0"}
    (bundle / "bundle.json").write_text(json.dumps(info))
    with pytest.raises(InputError, match="not a name of a file inside a bundle"):
        load_bundle(bundle)


def test_names_that_no_file_can_have_are_missing_files(bundle: Path) -> None:
    text = (bundle / "bundle.json").read_text()
    for name in ("a\0b.json", f"{'x' * 300}.json"):
        info = json.loads(text)
        info["files"][name] = {"size": 1, "sha256": "0"}
        (bundle / "bundle.json").write_text(json.dumps(info))
        with pytest.raises(InputError, match="is missing") as error:
            load_bundle(bundle)
        one_line(error)
    for source in ("x" * 300, f"{'x' * 5000}/y"):
        with pytest.raises(InputError):
            load_bundle(find_bundle(source, allow_download=False))


@pytest.mark.parametrize("name", ["bundle.json", "atlas/channels.json", "text_encoder/config.json", "unet/config.json"])
def test_json_that_is_nested_too_deeply(bundle: Path, name: str) -> None:
    assert (bundle / name).is_file()
    (bundle / name).write_text("[" * 200_000)
    info = json.loads((bundle / "bundle.json").read_text()) if name != "bundle.json" else None
    if info:
        info["files"][name]["size"] = 200_000
        (bundle / "bundle.json").write_text(json.dumps(info))
    with pytest.raises(InputError) as error:
        load_bundle(bundle, verify=False)
    one_line(error)


def test_weights_that_do_not_fit_the_configuration(tmp_path: Path) -> None:
    write_tiny_bundle(tmp_path / "a")
    bundle = load_bundle(tmp_path / "a")
    with pytest.raises(InputError) as error:
        replace(bundle, unet_config=bundle.unet_config | {"block_out_channels": [16, 64]}).load_unet()
    assert "weights" in one_line(error)


def test_save_refuses_parts_that_do_not_fit_and_leaves_the_old_bundle(tmp_path: Path) -> None:
    target = write_tiny_bundle(tmp_path / "tiny")
    before = load_bundle(target).hash
    diverged = tiny_unet(16 * FOLD**2)
    diverged.conv_in.weight.data[0, 0, 0, 0] = float("nan")
    too_large = tiny_unet(16 * FOLD**2)
    too_large.conv_in.weight.data[0, 0, 0, 0] = 1e6
    for change, words in (
        ({"unet": tiny_unet(4)}, "in_channels"),
        ({"normalization": normalization("0" * 32)}, "layout"),
        ({"licence": ""}, "licence"),
        ({"unet": diverged}, "not finite"),
        ({"unet": too_large}, "float16"),
        ({"files": {"atlas/channels.json": b""}}, "file"),
        ({"files": {"../up.txt": b""}}, "inside a bundle"),
    ):
        with pytest.raises(InputError, match=words):
            write_tiny_bundle(target, **change)
    assert load_bundle(target).hash == before
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_save_replaces_a_bundle_as_a_whole(tmp_path: Path) -> None:
    target = write_tiny_bundle(tmp_path / "tiny", files={"CREDITS.csv": b"old"})
    write_tiny_bundle(target)
    assert not (target / "CREDITS.csv").exists()
    load_bundle(target)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        write_tiny_bundle(tmp_path / "file")


def test_places_that_hold_no_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no such folder"):
        load_bundle(tmp_path / "none")
    with pytest.raises(InputError, match=r"no bundle\.json"):
        load_bundle(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    # A folder named like a hub id is a folder.
    assert find_bundle("models/none") == Path("models/none")


def test_a_hub_id_is_only_fetched_when_allowed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    calls = []

    def snapshot(repo: str, local_files_only: bool, **_: object) -> str:
        calls.append((repo, local_files_only))
        if local_files_only:
            raise LocalEntryNotFoundError("not in the cache")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert find_bundle("owner/gaussian-atlas-base") == tmp_path
    with pytest.raises(InputError, match="not allowed"):
        find_bundle("owner/gaussian-atlas-base", allow_download=False)
    assert calls == [("owner/gaussian-atlas-base", False), ("owner/gaussian-atlas-base", True)]


@pytest.mark.parametrize("wanted", [None, ["unet/config.json", "tokenizer/*"]])
def test_only_plain_data_is_fetched_from_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wanted: list[str] | None) -> None:
    """By the hub library's own reading of the patterns."""
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    plain = ["unet/config.json", "tokenizer/tokenizer.json", "tokenizer/merges.txt", "README.md", "unet/a.safetensors"]
    other = ["tokenizer/tokenization.py", "text_encoder/model/modeling.py", "unet/a.bin", "tokenizer/a.pkl", "unet/a.msgpack", "run.sh"]
    fetched = []

    def snapshot(repo: str, allow_patterns: list[str] | None = None, ignore_patterns: list[str] | None = None, **_: object) -> str:
        fetched.extend(filter_repo_objects(plain + other, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    find_bundle("owner/gaussian-atlas-base", wanted=wanted)
    assert fetched == (plain if wanted is None else plain[:3])


def clip(folder: Path) -> Path:
    """A folder with a tiny text model and its tokenizer."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(vocab_size=40000, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    CLIPTextModel(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        shutil.copyfile(text_encoder().tokenizer_folder / name, folder / name)
    return folder


@pytest.mark.parametrize("what", ["configuration", "model", "tokenizer", "attention", "adapter", "damaged"])
def test_python_beside_a_text_encoder_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Even where somebody answers yes on the console."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, ran = clip(tmp_path / "clip"), tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Evil: pass\n")
    changes = {
        "configuration": ("config.json", {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}}),
        "model": ("config.json", {"auto_map": {"AutoModel": "evil.Evil"}}),
        "tokenizer": ("tokenizer_config.json", {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}),
        "attention": ("config.json", {"attn_implementation": "somebody/kernel"}),
        "adapter": ("adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": "somebody/model"}),
        "damaged": ("config.json", {"hidden_size": "wide"}),
    }
    name, change = changes[what]
    path = folder / name
    path.write_text(json.dumps((json.loads(path.read_text()) if path.is_file() else {}) | change))
    with pytest.raises(InputError) as error:
        TextEncoder.from_folder(folder, max_length=16).encode(["a chair"])
    assert str(folder) in one_line(error)
    assert not ran.exists()


def test_a_text_encoder_with_other_weights_is_refused(bundle: Path, tmp_path: Path) -> None:
    encoder = TextEncoder(replace(text_encoder().config, sha256="0" * 64), (Path("unused"), Path("unused")))
    encoder.save(tmp_path / "text")
    with pytest.raises(InputError, match="other weights"):
        TextEncoder.load(tmp_path / "text")
    with pytest.raises(InputError, match="the package must be"):
        TextEncoderConfig("package", "os")


def test_a_text_encoder_inside_the_bundle(tmp_path: Path) -> None:
    """A CLIP text model and its tokenizer travel with the bundle and encode the same from there."""
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    config = CLIPTextConfig(vocab_size=40000, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    model = CLIPTextModel(config)
    model.save_pretrained(tmp_path / "clip")
    source = TextEncoder.from_folder(tmp_path / "clip", tokenizer=text_encoder().tokenizer_folder, max_length=16)
    assert source.width == 32
    parts = {"scheduler_config": SCHEDULER, "layout": layout(), "normalization": normalization(), "channels": ChannelSpec(), "info": INFO}
    save_bundle(tmp_path / "bundle", tiny_unet(16 * FOLD**2, width=32), text_encoder=source, **parts)
    shutil.rmtree(tmp_path / "clip")
    loaded = load_bundle(tmp_path / "bundle").text_encoder
    features = loaded.encode(["a red armchair", "car"])
    assert features.hidden.shape == (2, 16, 32) and features.mask.sum(1).tolist() == [5, 3]
    tokens = torch.tensor([[101, 2482, 102]])
    torch.testing.assert_close(features.hidden[1, :3], model.eval()(tokens).last_hidden_state[0].detach(), atol=1e-5, rtol=1e-4)


def test_a_text_encoder_like_stable_diffusions_keeps_padding_and_takes_the_empty_prompt_for_none(tmp_path: Path) -> None:
    """Against CLIPTextModel called as Stable Diffusion's pipeline calls it: no mask, everything that comes out."""
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    config = CLIPTextConfig(vocab_size=40000, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    model = CLIPTextModel(config).eval()
    model.save_pretrained(tmp_path / "clip")
    tokenizer = text_encoder().tokenizer_folder
    source = TextEncoder.from_folder(tmp_path / "clip", tokenizer, max_length=8, unconditional="empty", padding="kept")
    source.save(tmp_path / "saved")
    loaded = TextEncoder.load(tmp_path / "saved")
    car, empty = (torch.tensor([tokens + [0] * (8 - len(tokens))]) for tokens in ([101, 2482, 102], [101, 102]))
    torch.testing.assert_close(loaded.encode(["car"]).hidden, model(car).last_hidden_state.detach(), atol=1e-5, rtol=1e-4)
    nothing = loaded.unconditional(2).hidden
    torch.testing.assert_close(nothing, model(empty).last_hidden_state.detach().expand(2, -1, -1), atol=1e-5, rtol=1e-4)
    for name in ("unconditional", "padding"):
        with pytest.raises(InputError, match=f"{name} must be one of"):
            TextEncoderConfig("transformers", **{name: "others"})
