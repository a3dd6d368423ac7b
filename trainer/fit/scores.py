"""How well a fit shows views that it has not seen."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from generator.gaussians import Gaussians
from generator.render import render
from trainer.views import Views

from .losses import ssim
from .perceptual import perceptual


@dataclass(frozen=True)
class Scores:
    """Means over held-out views on white; over all views where none is held out."""

    psnr: float  # dB, whole picture
    psnr_foreground: float  # dB, pixels that the object covers
    ssim: float
    perceptual: float | None = None  # distance, 0 for equal pictures; None where nothing can measure it
    perceptual_name: str = ""  # what measured it: lpips or st_lpips


@torch.no_grad()
def score(gaussians: Gaussians, views: Views, with_perceptual: bool = True) -> Scores:
    """Render the held-out views and compare."""
    held_out = views.select("held_out") if (views.split == "held_out").any() else views
    targets, covered = torch.from_numpy(held_out.composite()), torch.from_numpy(held_out.rgba[..., 3] > 0)
    pictures = render(gaussians, held_out.cameras).rgb
    errors = (pictures - targets).square()
    foreground = [error[mask].mean() if mask.any() else error.mean() for error, mask in zip(errors, covered, strict=True)]
    similarity = [ssim(picture, target) for picture, target in zip(pictures, targets, strict=True)]
    model = perceptual() if with_perceptual and min(targets.shape[1:3]) >= 32 else None
    distance = [model(*(each.permute(2, 0, 1)[None] for each in pair)) for pair in zip(pictures, targets, strict=True)] if model else []
    return Scores(
        psnr=psnr(errors.mean()),
        psnr_foreground=psnr(torch.stack(foreground).mean()),
        ssim=float(torch.stack(similarity).mean()),
        perceptual=float(torch.cat(distance).mean()) if model else None,
        perceptual_name=model.name if model else "",
    )


def psnr(mean_squared_error: Tensor | float) -> float:
    """Peak signal-to-noise ratio in dB for values in 0..1."""
    return float(-10 * torch.log10(torch.as_tensor(mean_squared_error).clamp_min(1e-10)))


def held_out_psnr(gaussians: Gaussians, views: Views) -> tuple[float, float]:
    """The PSNR of `score` in dB: whole picture, covered pixels."""
    scores = score(gaussians, views, with_perceptual=False)
    return scores.psnr, scores.psnr_foreground
