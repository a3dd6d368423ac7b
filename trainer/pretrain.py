"""A small 2D base of our own: a latent-diffusion UNet of 4 channels, pretrained on captioned renders.

It stands where Stable Diffusion's UNet stands in the paper, so that what the paper claims of a pretrained 2D model can be tried on
a CPU: an RGBA picture plays the part of the latent, and the folder that comes out is widened as any other base.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from generator.errors import InputError
from generator.files import replacing_folder
from generator.model.text import TextEncoder

from .base import text_encoder
from .finetune import FinetuneConfig, Trainer, checkpoints, trained_unet
from .schedule import scheduler_config
from .sources import SourceObject, credits
from .sources.pictures import named_pictures, read_picture
from .training_data import CaptionFeatures, TrainingData
from .views import Views, deselected, read_records, views_path

# Red, green and blue times alpha, and alpha, in -1..1: what a latent has in channels.
CHANNELS = 4


def pictures(directory: str | Path, size: int, config: FinetuneConfig, folders: Sequence[str | Path] = ()) -> TrainingData:
    """All views of a folder as pictures [4, size, size], with the captions of their objects; then named pictures.

    Args:
        directory: of `trainer.views`.
        size: pixels, image side; the views are averaged down to it.
        folders: of named pictures, see `trainer.sources.pictures`.

    Raises:
        InputError: there are no views, they are smaller than `size`, or a named picture cannot be read.
    """
    records = _rendered(directory)
    if not records:
        raise InputError(f"no views in {directory}: run `python -m trainer views` first")
    texts: dict[str, int] = {}
    parts, captions, ids = [], [], []
    for record in records:
        rgba = Views.load(views_path(directory, record["id"])).rgba
        if rgba.shape[1] < size:
            raise InputError(f"{record['id']} has views of {rgba.shape[1]} pixels: pictures of {size} need as many at least")
        parts.append(_picture(torch.from_numpy(rgba), size))
        rows = [texts.setdefault(caption, len(texts)) for caption in record["captions"]]
        captions += [rows] * len(rgba)
        ids += [record["id"]] * len(rgba)
    for folder in folders:
        for picture in named_pictures(folder):
            parts.append((2 * read_picture(picture.path, size) - 1).half()[None])
            captions.append([texts.setdefault(caption, len(texts)) for caption in picture.captions])
            ids.append(f"picture-{picture.path.stem}")
    encoder = text_encoder(config.text_encoder, None, config.unconditional)
    features = CaptionFeatures(encoder, list(texts))
    return TrainingData(torch.cat(parts), captions, features, ids, encoder.unconditional(1).hidden[0], encoder=encoder, channels=CHANNELS)


def _rendered(directory: str | Path) -> list[dict]:
    left_out = deselected(directory)
    found = [record for record in read_records(directory) if record["id"] not in left_out]
    return [record for record in found if views_path(directory, record["id"]).is_file()]


def _picture(rgba: Tensor, size: int) -> Tensor:
    """[V, 4, size, size] float16 of views [V, H, W, 4] in 0..255."""
    values = rgba.permute(0, 3, 1, 2).float() / 255
    values = torch.cat([values[:, :3] * values[:, 3:], values[:, 3:]], dim=1)
    return (2 * adaptive_avg_pool2d(values, size) - 1).half()


@torch.no_grad()
def draw(
    unet, schedule: dict, encoder: TextEncoder, prompts: Sequence[str], size: int, seed: int = 0, steps: int = 20, guidance: float = 3.5
) -> Tensor:
    """What a base draws: [P, 4, size, size] in 0..1, colour times alpha, and alpha; sampled as atlases are.

    Args:
        schedule: configuration of the solver, see `trainer.schedule.scheduler_config`.
    """
    from diffusers import DPMSolverMultistepScheduler

    solver = DPMSolverMultistepScheduler.from_config(schedule)
    solver.set_timesteps(steps, device=unet.device)
    text = torch.cat([encoder.encode(list(prompts)).hidden, encoder.unconditional(len(prompts)).hidden]).to(unet.device, unet.dtype)
    x = torch.randn(len(prompts), CHANNELS, size, size, generator=torch.Generator().manual_seed(seed)).to(unet.device)
    for timestep in solver.timesteps:
        found = unet(torch.cat([x, x]).to(unet.dtype), timestep, encoder_hidden_states=text, return_dict=False)[0].float()
        wanted, plain = found.chunk(2)
        x = solver.step(plain + guidance * (wanted - plain), timestep, x, return_dict=False)[0]
    return ((x + 1) / 2).clamp(0, 1).cpu()


def _logged(trainer: Trainer, size: int, prompts: Sequence[str]) -> Tensor:
    """Drawings of the averaged network on white, side by side: [size, P size, 3]."""
    config, encoder = trainer.config, trainer.data.encoder
    assert encoder is not None  # `pictures` gives it
    with trainer.averaged():
        schedule = scheduler_config(config.prediction_type, config.shift, config.zero_terminal_snr)
        drawn = draw(trainer.unet.eval(), schedule, encoder, prompts, size)
    return torch.cat(list((drawn[:, :3] + 1 - drawn[:, 3:]).permute(0, 2, 3, 1)), dim=1)


def pretrain(
    config: FinetuneConfig,
    directory: str | Path,
    size: int,
    run: Path,
    device: str = "cpu",
    prompts: Sequence[str] = (),
    folders: Sequence[str | Path] = (),
    folders_licence: str = "",
) -> Path:
    """Train on the views of a folder, go on where an earlier call stopped, and write the base to `run`/base in diffusers' layout.

    Args:
        prompts: drawn at every checkpoint, into the logs.
        folders: of named pictures to learn from as well, whose licence must be said.

    Raises:
        InputError: no views, named pictures without a licence, or other settings than those of the checkpoints there.
        WorkError: the run is lost.
    """
    if folders and not folders_licence:
        raise InputError("named pictures need their licence, which the base inherits: give --pretrain-licence, such as MIT")
    data = pictures(directory, size, config, folders)
    trainer = Trainer(config, data, run / "pretrain", device, (lambda trainer: _logged(trainer, size, prompts)) if prompts else None)
    trainer.resume()
    for _ in trainer.run():
        pass
    if trainer.accelerator.is_main_process:
        unet = trained_unet(config, checkpoints(run / "pretrain")[-1], data.text_width, CHANNELS)
        with replacing_folder(run / "base") as folder:
            unet.save_pretrained(folder / "unet")
            (folder / "scheduler").mkdir()
            schedule = scheduler_config(config.prediction_type, config.shift, config.zero_terminal_snr)
            (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(schedule, indent=1) + "\n")
            (folder / "README.md").write_text(_card(_rendered(directory), data, config, size, folders_licence), encoding="utf-8")
    trainer.accelerator.wait_for_everyone()
    return run / "base"


def _card(records: list[dict], data: TrainingData, config: FinetuneConfig, size: int, folders_licence: str) -> str:
    named = sum(identifier.startswith("picture-") for identifier in data.ids)
    licences = sorted({record.get("licence") or "unknown" for record in records} | ({folders_licence} if folders_licence else set()))
    kept = [licence for licence in licences if not licence.startswith("CC0")] or ["CC0-1.0"]
    known = [
        SourceObject(
            id=record["id"],
            name=record.get("name") or "",
            path=Path(),
            creator=record.get("creator") or "",
            licence=record.get("licence") or "",
            library=record.get("library") or "",
        )
        for record in records
    ]
    beside = f" and {named} named pictures ({folders_licence})" if named else ""
    return (
        f"---\nlicense: {'-and-'.join(kept).replace(' ', '-')}\n---\n\n# A small 2D base\n\n"
        f"A UNet of {CHANNELS} channels (colour times alpha, alpha) that draws pictures of {size} x {size} pixels from text, trained for "
        f"{config.max_steps} steps of {config.batch_size} on {len(data.ids) - named} renders of {len(records)} objects{beside}.\n\n"
        f"{credits(known)}\n"
    )
