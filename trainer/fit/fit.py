"""The fit of one object: a fixed number of Gaussians, from the seen surface, optimised against the views."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from generator.errors import WorkError
from generator.gaussians import Gaussians
from generator.render import cpu
from trainer.views import Views

from .initialize import initialize
from .losses import ssim
from .rasterize import rasterize


@dataclass(frozen=True)
class FitConfig:
    """How one object is fitted. Rates are per Adam step."""

    count: int = 4096  # Gaussians; a bound and an aim at once, so that every atlas cell holds a live one
    steps: int = 150  # optimisation steps, one view each; 0 keeps the surface initialisation
    means_rate: float = 4e-4  # object lengths
    quaternions_rate: float = 2e-3
    scales_rate: float = 1.5e-2  # log units
    opacities_rate: float = 4e-2  # logit units
    colors_rate: float = 1e-2  # display values
    ssim_weight: float = 0.2  # share of 1 - SSIM in the photometric loss (Kerbl et al. 2023, eq. 7)
    alpha_weight: float = 0.5  # L1 on the coverage
    scale_weight: float = 0.02  # on the mean scale over the initial one: keeps Gaussians from growing needles
    opacity_weight: float = 0.002  # pulls towards opaque: a surface of few, solid splats is easier to learn
    seed: int = 0


@dataclass(frozen=True)
class FitResult:
    """A fit and how well it shows the views that it has not seen."""

    gaussians: Gaussians
    psnr: float  # dB over held-out views, whole picture on white
    psnr_foreground: float  # dB over held-out pixels that the object covers
    seconds: float


def fit(views: Views, config: FitConfig = FitConfig()) -> FitResult:  # noqa: B008 - frozen, so sharing it is safe
    """Fit `config.count` Gaussians to the training views; score on the held-out ones.

    Raises:
        InputError: the views show too little.
        WorkError: the optimisation diverged.
    """
    start = time.perf_counter()
    initial = initialize(views, config.count, config.seed)
    train = [view for view, split in enumerate(views.split) if split == "train"]
    targets = [_target(views, view) for view in train]
    raw = _Parameters(initial)
    optimizer = torch.optim.Adam(
        [
            {"params": [raw.means], "lr": config.means_rate},
            {"params": [raw.quaternions], "lr": config.quaternions_rate},
            {"params": [raw.log_scales], "lr": config.scales_rate},
            {"params": [raw.logit_opacities], "lr": config.opacities_rate},
            {"params": [raw.colors], "lr": config.colors_rate},
        ],
        eps=1e-15,
    )
    rates = [group["lr"] for group in optimizer.param_groups]
    generator = torch.Generator().manual_seed(config.seed)
    queue: list[int] = []
    largest = initial.scales.amax(1)
    for step in range(config.steps):
        # Half a cosine to a tenth of the rate: the last steps settle.
        decay = 0.1 + 0.9 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / config.steps)).item())
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * decay
        queue = queue or torch.randperm(len(train), generator=generator).tolist()
        index = queue.pop()
        target_rgb, target_alpha = targets[index]
        cameras, view = views.cameras, train[index]
        gaussians = raw.gaussians()
        rgb, alpha = rasterize(gaussians, cameras.viewmats[view], cameras.Ks[view], cameras.width, cameras.height)
        # A random background makes the coverage visible to the colour loss.
        background = torch.rand(3, generator=generator)
        picture = rgb + (1 - alpha[..., None]) * background
        target = target_rgb + (1 - target_alpha[..., None]) * background
        loss = (1 - config.ssim_weight) * (picture - target).abs().mean()
        if config.ssim_weight:
            loss = loss + config.ssim_weight * (1 - ssim(picture, target))
        loss = loss + config.alpha_weight * (alpha - target_alpha).abs().mean()
        loss = loss + config.scale_weight * (gaussians.scales.amax(1) / largest - 1).clamp_min(0).mean()
        loss = loss + config.opacity_weight * (1 - gaussians.opacities).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    gaussians = raw.gaussians().detach()
    if not gaussians.finite().all():
        raise WorkError("the fit diverged: some Gaussians are not finite; lower the learning rates")
    return FitResult(gaussians, *held_out_psnr(gaussians, views), seconds=time.perf_counter() - start)


class _Parameters:
    """Raw, unbounded leaves of the optimisation."""

    def __init__(self, gaussians: Gaussians) -> None:
        self.means = gaussians.means.clone().requires_grad_()
        self.quaternions = gaussians.quaternions.clone().requires_grad_()
        self.log_scales = torch.log(gaussians.scales).requires_grad_()
        self.logit_opacities = torch.logit(gaussians.opacities, eps=1e-4).requires_grad_()
        self.colors = gaussians.colors.clone().requires_grad_()

    def gaussians(self) -> Gaussians:
        return Gaussians(
            means=self.means,
            quaternions=torch.nn.functional.normalize(self.quaternions, dim=-1),
            scales=torch.exp(self.log_scales.clamp(-9.0, -1.5)),
            opacities=torch.sigmoid(self.logit_opacities),
            # The gradient passes the clamp as if it were not there: a colour at its bound can come back.
            colors=self.colors + (self.colors.clamp(0, 1) - self.colors).detach(),
        )


def _target(views: Views, view: int) -> tuple[Tensor, Tensor]:
    """Premultiplied rgb [H, W, 3] and alpha [H, W] of a view."""
    rgba = torch.from_numpy(views.rgba[view]).float() / 255
    return rgba[..., :3] * rgba[..., 3:], rgba[..., 3]


def held_out_psnr(gaussians: Gaussians, views: Views) -> tuple[float, float]:
    """PSNR in dB on the views that are not in the training split, on white: whole picture, covered pixels only.

    Where every view is a training view, those are scored.
    """
    held_out = [view for view, split in enumerate(views.split) if split != "train"] or list(range(len(views.cameras)))
    errors, covered = [], []
    with torch.no_grad():
        for view in held_out:
            rgb, alpha, _ = cpu.render_view(gaussians, views.cameras, view)
            target_rgb, target_alpha = _target(views, view)
            error = (rgb + (1 - alpha[..., None]) - target_rgb - (1 - target_alpha[..., None])).square()
            errors.append(error.mean())
            covered.append(error[target_alpha > 0].mean() if (target_alpha > 0).any() else error.mean())
    return psnr(torch.stack(errors).mean()), psnr(torch.stack(covered).mean())


def psnr(mean_squared_error: Tensor | float) -> float:
    """Peak signal-to-noise ratio in dB for values in 0..1."""
    return float(-10 * torch.log10(torch.as_tensor(mean_squared_error).clamp_min(1e-10)))
