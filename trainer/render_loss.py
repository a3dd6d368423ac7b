"""Losses on renders of denoised atlases: colour, coverage and a perceptual distance (section 5 of the paper)."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from generator.atlas import Atlas, from_atlas
from generator.errors import WorkError
from generator.gaussians import Gaussians
from generator.render import Cameras, render
from generator.render.cameras import RADIUS

from .training_data import Decoding


class RenderLoss:
    """Renders of an atlas against renders of the one that it should be, from cameras all round.

    Args:
        weights: of L1 on colours over a random background, of L1 on coverage, of the perceptual distance.
        size: pixels, image side.
        perceptual: looked up by `fit.perceptual` unless its weight is 0.
    """

    def __init__(self, decoding: Decoding, weights: tuple[float, float, float], size: int, device: torch.device) -> None:
        self.decoding, self.weights, self.size, self.device = decoding, weights, size, device
        self.model = None
        if weights[2]:
            from .fit.perceptual import perceptual

            found = perceptual()
            if found is None:
                raise WorkError("finetune.lpips_weight needs lpips or stlpips-pytorch: install one, or set it to 0")
            self.model = copy.deepcopy(found).to(device)

    def gaussians(self, values: Tensor) -> Gaussians:
        """The Gaussians of a normalised atlas [16, H, W]; differentiable."""
        raw = self.decoding.normalization.denormalize(values)
        return from_atlas(Atlas(raw, self.decoding.layout.id, self.decoding.channels), self.decoding.layout)

    def __call__(self, predicted: Tensor, clean: Tensor, directions: Tensor, backgrounds: Tensor) -> Tensor:
        """The loss [B] of normalised atlases [B, 16, H, W].

        Args:
            directions: [B, 2] in 0..1, where each object's camera stands: round the object, and up or down.
            backgrounds: [B, 3] display sRGB in 0..1.
        """
        losses = []
        of_rgb, of_mask, of_perceptual = self.weights
        for made, wanted, direction, background in zip(predicted, clean, directions, backgrounds, strict=True):
            cameras = self._camera(direction)
            ours = render(self.gaussians(made), cameras, background)
            with torch.no_grad():
                theirs = render(self.gaussians(wanted), cameras, background)
            loss = of_rgb * (ours.rgb - theirs.rgb).abs().mean() + of_mask * (ours.alpha - theirs.alpha).abs().mean()
            if self.model is not None:
                pair = (each.rgb.clamp(0, 1).permute(0, 3, 1, 2) for each in (ours, theirs))
                loss = loss + of_perceptual * self.model(*pair)[0]
            losses.append(loss)
        return torch.stack(losses)

    def _camera(self, direction: Tensor) -> Cameras:
        """Somewhere round the object, even over the sphere but for the last tenth towards either pole."""
        azimuth, height = 2 * torch.pi * direction[0].cpu(), 1.8 * direction[1].cpu() - 0.9
        ring = torch.sqrt(1 - height**2)
        return Cameras.look_at(RADIUS * torch.stack([ring * torch.sin(azimuth), -ring * torch.cos(azimuth), height])[None], self.size)
