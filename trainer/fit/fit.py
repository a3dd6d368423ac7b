"""The fit of one object: Gaussians from the seen surface, optimised against the views."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from generator.errors import InputError, WorkError
from generator.gaussians import Gaussians
from generator.model.pipeline import resolve_device
from generator.render import Rendering, render
from trainer.views import Views

from .config import FitConfig
from .initialize import initialize
from .losses import photometric, volume
from .perceptual import perceptual
from .scores import held_out_psnr, psnr, score

__all__ = ["FitConfig", "FitResult", "fit", "held_out_psnr", "psnr"]

# Random training views whose blended weights tell how visible a Gaussian is.
_WEIGHED_VIEWS = 8


@dataclass(frozen=True)
class FitResult:
    """A fit and how well it shows the views that it has not seen."""

    gaussians: Gaussians
    psnr: float  # dB over held-out views, whole picture on white
    psnr_foreground: float  # dB over held-out pixels that the object covers
    seconds: float  # of the fit, without the scores
    ssim: float = float("nan")  # mean over held-out views
    perceptual: float | None = None  # mean distance over held-out views; None where nothing can measure it
    perceptual_name: str = ""  # what measured it: lpips or st_lpips


def fit(
    views: Views,
    config: FitConfig = FitConfig(),  # noqa: B008 - frozen, so sharing it is safe
    observe: Callable[[int, Gaussians], None] | None = None,
    device: str = "auto",
) -> FitResult:
    """Fit Gaussians to the training views; score on the held-out ones.

    Args:
        observe: called with the number of steps done and the Gaussians, at the start and after each step.
        device: where it is optimised: "auto" (CUDA where there is one), "cpu" or "cuda". Start and scores are the CPU's.

    Raises:
        InputError: the views show too little, or the device is not there.
        WorkError: the optimisation diverged, or a perceptual loss is asked for and cannot be had.
    """
    start = time.perf_counter()
    # Everything is drawn from one seed, and the caller's random numbers stay as they were.
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        gaussians = _optimise(views.select("train"), config, observe, resolve_device(device)).to("cpu")
    seconds = time.perf_counter() - start
    if not gaussians.finite().all():
        raise WorkError("the fit diverged: some Gaussians are not finite; lower the learning rates")
    return FitResult(gaussians, seconds=seconds, **vars(score(gaussians, views, config.perceptual_score)))


def _optimise(views: Views, config: FitConfig, observe: Callable[[int, Gaussians], None] | None, device: torch.device) -> Gaussians:
    if not len(views):
        raise InputError("the views hold no training view: nothing can be fitted")
    initial = initialize(views, config.count, config.seed, config.start).to(device)
    params, optimizers = _parameters(initial), {}
    for name, rate in _rates(config).items():
        optimizers[name] = torch.optim.Adam([params[name]], lr=rate, eps=1e-15, fused=True)
    strategy: Any = None  # gsplat's, which has no types
    if config.strategy != "fixed":
        from .strategies import strategy_for

        strategy = strategy_for(config, lambda: _weights(activate(params).detach(), views))
        strategy.check_sanity(params, optimizers)
        state = strategy.initialize_state()
    targets = [_target(views, view, device) for view in range(len(views))]
    losses = _Losses(config, initial)
    queue: list[int] = []
    if observe:
        observe(0, initial)
    for step in range(config.steps):
        # Half a cosine to a tenth of the rate: the last steps settle.
        decay = 0.1 + 0.9 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / config.steps)).item())
        for name, rate in _rates(config).items():
            optimizers[name].param_groups[0]["lr"] = rate * decay
        queue = queue or torch.randperm(len(views)).tolist()
        view = queue.pop()
        gaussians = activate(params)
        # A random background makes the coverage visible to the colour loss.
        background = torch.rand(3).to(device)
        drawn = render(gaussians, views.cameras[view : view + 1], background=None)
        info = {
            "means2d": drawn.means2d,
            "radii": drawn.radii[..., None].expand(-1, -1, 2),
            "width": views.cameras.width,
            "height": views.cameras.height,
            "n_cameras": 1,
            "gaussian_ids": None,
        }
        if strategy:
            strategy.step_pre_backward(params, optimizers, state, step, info)
        loss = losses(gaussians, drawn, *targets[view], background, step)
        if hasattr(strategy, "regularizer"):
            loss = loss + strategy.regularizer(gaussians.opacities, gaussians.scales)
        loss.backward()
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if strategy:
            strategy.step_post_backward(params, optimizers, state, step, info)
        if observe:
            observe(step + 1, activate(params).detach())
    gaussians = activate(params).detach()
    return gaussians[gaussians.opacities >= config.minimum_opacity] if strategy else gaussians


def _rates(config: FitConfig) -> dict[str, float]:
    return {
        "means": config.means_rate,
        "quats": config.quaternions_rate,
        "scales": config.scales_rate,
        "opacities": config.opacities_rate,
        "colors": config.colors_rate,
    }


def _parameters(gaussians: Gaussians) -> dict[str, torch.nn.Parameter]:
    """Raw, unbounded leaves under gsplat's names."""
    raw = {
        "means": gaussians.means.clone(),
        "quats": gaussians.quaternions.clone(),
        "scales": torch.log(gaussians.scales),
        "opacities": torch.logit(gaussians.opacities, eps=1e-4),
        "colors": gaussians.colors.clone(),
    }
    return {name: torch.nn.Parameter(value) for name, value in raw.items()}


def activate(params: dict[str, torch.nn.Parameter]) -> Gaussians:
    """The Gaussians that raw parameters stand for; differentiable."""
    return Gaussians(
        means=params["means"],
        quaternions=torch.nn.functional.normalize(params["quats"], dim=-1),
        scales=torch.exp(params["scales"].clamp(-9.0, -1.5)),
        opacities=torch.sigmoid(params["opacities"]),
        # The gradient passes the clamp as if it were not there: a colour at its bound can come back.
        colors=params["colors"] + (params["colors"].clamp(0, 1) - params["colors"]).detach(),
    )


def _weights(gaussians: Gaussians, views: Views) -> Tensor:
    """Mean blended weight [N] of each Gaussian in random views: the slope of all pixels' colour in its colour."""
    chosen = torch.randperm(len(views))[:_WEIGHED_VIEWS]
    with torch.enable_grad():
        colors = gaussians.colors.clone().requires_grad_()
        red = render(gaussians.replace(colors=colors), views.cameras[chosen]).rgb[..., 0].sum()
        return torch.autograd.grad(red, colors)[0][:, 0] / len(chosen)


class _Losses:
    """What a step minimises."""

    def __init__(self, config: FitConfig, initial: Gaussians) -> None:
        self.config = config
        largest = initial.scales.amax(1)
        # A set that changes has no initial scale for each of its Gaussians: their mean serves.
        self.largest = largest if config.strategy == "fixed" else largest.mean()
        model = perceptual() if config.perceptual_weight else None
        self.perceptual = model and copy.deepcopy(model).to(initial.means.device)
        if config.perceptual_weight and self.perceptual is None:
            raise WorkError("fit.perceptual_weight needs lpips or stlpips-pytorch: install one, or set it to 0")

    def __call__(self, gaussians: Gaussians, drawn: Rendering, rgb: Tensor, alpha: Tensor, background: Tensor, step: int) -> Tensor:
        """The loss of one view over a background [3] against its target; both premultiplied rgb [H, W, 3] and alpha [H, W]."""
        config = self.config
        loss = photometric(drawn.rgb[0], drawn.alpha[0], rgb, alpha, background, config.ssim_weight, config.alpha_weight)
        loss = loss + config.scale_weight * (gaussians.scales.amax(1) / self.largest - 1).clamp_min(0).mean()
        if config.volume_weight:
            loss = loss + config.volume_weight * volume(gaussians.scales)
        if config.strategy == "fixed":
            loss = loss + config.opacity_weight * (1 - gaussians.opacities).mean()
        if self.perceptual is not None and step % config.perceptual_every == 0:
            window = _crop(alpha, config.perceptual_crop)
            pictures = (color + (1 - cover[..., None]) * background for color, cover in ((drawn.rgb[0], drawn.alpha[0]), (rgb, alpha)))
            pair = (each[window].permute(2, 0, 1)[None] for each in pictures)
            loss = loss + config.perceptual_weight * self.perceptual(*pair)[0]
        return loss


def _crop(alpha: Tensor, side: int) -> tuple[slice, slice]:
    """A random square window of the picture with a covered pixel of alpha [H, W] as near its middle as the border allows."""
    covered = alpha.nonzero()
    middle = covered[torch.randint(len(covered), ())].tolist() if len(covered) else [length // 2 for length in alpha.shape]
    starts = [max(0, min(at - side // 2, length - side)) for at, length in zip(middle, alpha.shape, strict=True)]
    top, left = starts
    return slice(top, top + side), slice(left, left + side)


def _target(views: Views, view: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Premultiplied rgb [H, W, 3] and alpha [H, W] of a view."""
    rgba = torch.from_numpy(views.rgba[view]).to(device).float() / 255
    return rgba[..., :3] * rgba[..., 3:], rgba[..., 3]
