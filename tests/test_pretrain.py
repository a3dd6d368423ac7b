"""The small 2D base: pictures from views, a run that resumes, and a folder that is widened like any other base."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from generator.errors import InputError
from generator.model.widen import widen_unet
from tests.sphere import sphere_views
from tests.test_base import four_copies_agree
from tests.test_finetune import CONFIG, UNET
from trainer.base import load_base, text_encoder
from trainer.finetune import FinetuneConfig, build_unet
from trainer.pretrain import draw, pictures, pretrain
from trainer.sources.pictures import name_of, read_picture
from trainer.views import RECORDS, views_path

BASE = replace(CONFIG, unet={**UNET, "sample_size": 16}, max_steps=4, checkpoint_every=2)


@pytest.fixture(scope="module")
def views(tmp_path_factory):
    folder = tmp_path_factory.mktemp("views")
    made = sphere_views(48)
    credit = {"creator": "Ada", "licence": "CC-BY-3.0", "library": "Balls", "status": "ok"}
    with open(folder / RECORDS, "w") as file:
        for name in ("red", "blue"):
            made.save(views_path(folder, name))
            file.write(json.dumps({"id": name, "name": name, "captions": [f"a {name} ball", "a ball"], **credit}) + "\n")
        file.write(json.dumps({"id": "lost", "name": "lost", "captions": ["nothing"], "status": "failed"}) + "\n")
    return folder


def test_pictures_are_the_views_averaged_and_premultiplied(views):
    found = pictures(views, 16, BASE)
    rgba = sphere_views(48).rgba.astype(np.float64) / 255
    assert found.channels == 4 and len(found.atlases) == 2 * len(rgba) and found.ids[0] == "red" and found.ids[-1] == "blue"
    block = rgba[3, 9:12, 15:18]  # the pixels under row 3 and column 5 of the small picture
    expected = np.append((block[..., :3] * block[..., 3:]).mean((0, 1)), block[..., 3].mean())
    assert (found.atlases[3, :, 3, 5].float().numpy() + 1) / 2 == pytest.approx(expected, abs=1e-3)
    assert found.captions[0] == [0, 1] and found.captions[-1] == [2, 1]


def test_a_base_of_our_own_is_widened_as_any_other(views, tmp_path):
    pretrain(replace(BASE, max_steps=2), views, 16, tmp_path)
    folder = pretrain(BASE, views, 16, tmp_path, prompts=["a red ball"])  # goes on
    base = load_base(folder)
    assert base.prediction_type == "v_prediction" and base.licence == "CC-BY-3.0" and base.text_width == 384
    card = (folder / "README.md").read_text()
    assert "Balls" in card and "Ada" in card and "4 steps of 4" in card and str(tmp_path) not in card
    assert four_copies_agree(base.load_unet().eval(), widen_unet(base.load_unet().eval())) < 1e-4
    assert text_encoder("", base, "zeros").width == 384, "without an encoder of its own it knows MiniLM"
    wide = build_unet(FinetuneConfig(base=str(folder)), 384)
    assert wide.config.in_channels == 16
    assert torch.equal(
        wide.state_dict()["mid_block.resnets.0.conv1.weight"], base.load_unet().state_dict()["mid_block.resnets.0.conv1.weight"]
    )


def test_a_base_draws_what_it_has_learned(views, tmp_path):
    """A network that gives its one training picture back whatever the noise must be sampled to that picture."""
    from trainer.schedule import scheduler_config

    data = pictures(views, 16, BASE)
    wanted = data.atlases[0].float()

    class Knows(torch.nn.Module):
        device, dtype = torch.device("cpu"), torch.float32

        def forward(self, x, timestep, encoder_hidden_states, return_dict):
            asked = (encoder_hidden_states.abs().sum((1, 2)) > 0).float().reshape(-1, 1, 1, 1)
            return (asked * wanted + (1 - asked) * -wanted,)

    drawn = draw(Knows(), scheduler_config("sample", 1.0, True), data.encoder, ["a ball", "a cube"], 16, guidance=1.0)
    assert drawn.shape == (2, 4, 16, 16) and torch.allclose(drawn, ((wanted + 1) / 2).expand(2, -1, -1, -1), atol=1e-3)
    guided = draw(Knows(), scheduler_config("sample", 1.0, True), data.encoder, ["a ball"], 16, guidance=0.0)
    assert torch.allclose(guided[0], (1 - wanted) / 2, atol=1e-3), "no guidance at all is what stands for no prompt"


def test_missing_and_too_small_views_are_named(views, tmp_path):
    with pytest.raises(InputError, match="run `python -m trainer views` first"):
        pictures(tmp_path, 16, BASE)
    with pytest.raises(InputError, match="views of 48 pixels: pictures of 64"):
        pictures(views, 64, BASE)


@pytest.mark.parametrize(
    ("stem", "name"),
    [
        ("red-apple_02", "red apple"),
        ("1fa91", "chair"),
        ("1F6CF-fe0f", "bed"),
        ("1f1e9-1f1ea", ""),  # a flag
        ("1f170-fe0f", ""),  # a letter
        ("0023-fe0f-20e3", ""),
        ("23-fe0f-20e3", ""),
        ("bed", "bed"),  # is hexadecimal
        ("facade-decade", "facade decade"),
        ("IMG_0042", "img"),
        ("0042", ""),
    ],
)
def test_names_of_pictures(stem, name):
    assert name_of(stem) == name


def test_named_pictures_are_centred_on_a_transparent_square(tmp_path):
    red = np.zeros((20, 40, 4), np.uint8)
    red[...] = (255, 0, 0, 255)
    Image.fromarray(red).save(tmp_path / "red-brick.png")
    value = read_picture(tmp_path / "red-brick.png", 16)
    assert value.shape == (4, 16, 16) and torch.allclose(value[:, 8, 8], torch.tensor([1.0, 0, 0, 1])) and value[:, 1].abs().max() == 0
    small = read_picture(tmp_path / "red-brick.png", 64)
    assert small[3].sum() == 20 * 40, "a picture that is smaller is not enlarged"
    (tmp_path / "broken-cup.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match="broken-cup.png: not a readable picture"):
        read_picture(tmp_path / "broken-cup.png", 16)


def test_a_base_learns_from_named_pictures_and_says_so(views, tmp_path):
    (tmp_path / "set").mkdir()
    for name in ("blue-cup", "0042"):
        Image.new("RGBA", (24, 24), (0, 0, 255, 255)).save(tmp_path / "set" / f"{name}.png")
    with pytest.raises(InputError, match="need their licence"):
        pretrain(BASE, views, 16, tmp_path, folders=[tmp_path / "set"])
    data = pictures(views, 16, BASE, [tmp_path / "set"])
    assert data.ids[-1] == "picture-blue-cup" and data.ids.count("picture-blue-cup") == 1
    assert [data.features.captions[row] for row in data.captions[-1]] == ["blue cup", "a blue cup"]
    folder = pretrain(replace(BASE, max_steps=1), views, 16, tmp_path, folders=[tmp_path / "set"], folders_licence="MIT")
    assert "1 named pictures (MIT)" in (folder / "README.md").read_text() and "MIT" in load_base(folder).licence
    with pytest.raises(InputError, match="no such folder of pictures"):
        pictures(views, 16, BASE, [tmp_path / "none"])
