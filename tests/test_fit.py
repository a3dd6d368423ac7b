"""Fitting: the similarity measure against its definition, the surface initialisation, and a whole fit of drawn views."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from generator.errors import InputError
from generator.gaussians import Gaussians, quaternions_to_matrices
from generator.render import Cameras, render
from trainer.fit import FitConfig, fit
from trainer.fit.initialize import farthest_points, initialize, normals_to_quaternions
from trainer.fit.losses import ssim
from trainer.views import Views


def test_ssim_equals_its_definition_by_convolution():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(20, 24, 3, generator=generator), torch.rand(20, 24, 3, generator=generator)
    offsets = torch.arange(11) - 5.0
    line = torch.exp(-(offsets**2) / (2 * 1.5**2))
    kernel = (line[:, None] * line / line.sum() ** 2)[None, None]

    def blur(image):
        return torch.nn.functional.conv2d(image.permute(2, 0, 1)[:, None], kernel, padding=5)[:, 0]

    mx, my = blur(a), blur(b)
    vx, vy, cov = blur(a * a) - mx**2, blur(b * b) - my**2, blur(a * b) - mx * my
    expected = ((2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))).mean()
    assert ssim(a, b).item() == pytest.approx(expected.item(), abs=1e-5)
    assert ssim(a, a).item() == pytest.approx(1.0, abs=1e-5)


def sphere_views(size: int = 64, radius: float = 0.4) -> Views:
    """A sphere whose upper half is red and lower half blue, ray-traced here."""
    train, held_out = Cameras.around(12, size), Cameras.orbit(2, size)
    cameras = Cameras(torch.cat([train.viewmats, held_out.viewmats]), torch.cat([train.Ks, held_out.Ks]), size, size)
    rgba = np.zeros((14, size, size, 4), np.uint8)
    depth = np.zeros((14, size, size), np.float16)
    normals = np.zeros((14, size, size, 3), np.int8)
    columns, rows = np.meshgrid(np.arange(size) + 0.5, np.arange(size) + 0.5)
    for view in range(14):
        K, viewmat = cameras.Ks[view].numpy(), cameras.viewmats[view].numpy()
        rays = np.stack([(columns - K[0, 2]) / K[0, 0], (rows - K[1, 2]) / K[1, 1], np.ones_like(rows)], -1)
        origin = cameras.positions[view].numpy()
        world = rays @ viewmat[:3, :3]
        a, b, c = (world**2).sum(-1), 2 * world @ origin, origin @ origin - radius**2
        discriminant = b * b - 4 * a * c
        hit = discriminant > 0
        z = np.where(hit, (-b - np.sqrt(np.maximum(discriminant, 0))) / (2 * a), 0)
        points = origin + z[..., None] * world
        rgba[view][hit] = np.where(points[hit][:, 2:] > 0, (220, 30, 30, 255), (30, 30, 220, 255))
        depth[view] = z
        normals[view][hit] = np.round(127 * points[hit] / radius)
    return Views("sphere", rgba, depth, normals, cameras, np.array(["train"] * 12 + ["held_out"] * 2))


def test_initial_gaussians_lie_flat_on_the_surface():
    gaussians = initialize(sphere_views(), 500)
    assert len(gaussians) == 500
    radii = gaussians.means.norm(dim=1)
    assert (radii - 0.4).abs().max() < 5e-3
    thin = quaternions_to_matrices(gaussians.quaternions)[:, :, 2]
    assert (thin * gaussians.means / radii[:, None]).sum(1).abs().min() > 0.99
    assert (gaussians.scales[:, 2] < gaussians.scales[:, 0]).all()


def test_rotations_of_normals_are_the_smallest():
    normals = torch.nn.functional.normalize(torch.randn(100, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    quaternions = normals_to_quaternions(normals)
    turned = quaternions_to_matrices(quaternions)[:, :, 2]
    torch.testing.assert_close((turned * normals).sum(1).abs(), torch.ones(100))
    assert (quaternions[:, 0] >= 0.5**0.5 - 1e-5).all(), "more than 90 degrees"


def test_farthest_points_are_distinct_and_even():
    points = np.random.default_rng(0).random((2000, 3)).astype(np.float32)
    chosen = points[farthest_points(points, 200)]
    gaps = np.linalg.norm(chosen[:, None] - chosen[None], axis=-1) + np.eye(200)
    random = points[:200]
    random_gaps = np.linalg.norm(random[:, None] - random[None], axis=-1) + np.eye(200)
    assert gaps.min() > 3 * random_gaps.min() and gaps.min() > 0.05


def test_fit_improves_on_its_start_and_sees_new_views():
    views = sphere_views()
    start = fit(views, FitConfig(count=400, steps=0))
    result = fit(views, FitConfig(count=400, steps=150))
    assert result.psnr > start.psnr + 4
    red = render(result.gaussians, Cameras.orbit(1, 32, elevation=80)).rgb[0, 16, 16]
    assert red[0] > 0.7 and red[2] < 0.3


def test_fit_is_deterministic_and_stays_bounded():
    views = sphere_views(48)
    a, b = (fit(views, FitConfig(count=200, steps=20)).gaussians for _ in range(2))
    assert isinstance(a, Gaussians) and torch.equal(a.means, b.means) and torch.equal(a.colors, b.colors)
    assert len(a) == 200 and a.finite().all() and a.colors.min() >= 0 and a.colors.max() <= 1


def test_too_few_surface_samples_are_named():
    with pytest.raises(InputError, match="surface samples"):
        initialize(sphere_views(16), 100_000)
