"""Fitting: the similarity measure against its definition, the surface initialisation, and a whole fit of drawn views."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from generator.errors import InputError
from generator.gaussians import Gaussians, quaternions_to_matrices
from generator.render import Cameras, render
from tests.sphere import sphere_views
from trainer.fit import FitConfig, fit, losses, score
from trainer.fit.initialize import carved_points, farthest_points, initialize, normals_to_quaternions, surface_points
from trainer.fit.losses import photometric, ssim
from trainer.views import Views


def slow_ssim(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    offsets = torch.arange(11) - 5.0
    line = torch.exp(-(offsets**2) / (2 * 1.5**2)).to(a)
    kernel = (line[:, None] * line / line.sum() ** 2)[None, None]

    def blur(image):
        return torch.nn.functional.conv2d(image.permute(2, 0, 1)[:, None], kernel, padding=5)[:, 0]

    mx, my = blur(a), blur(b)
    vx, vy, cov = blur(a * a) - mx**2, blur(b * b) - my**2, blur(a * b) - mx * my
    return ((2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))).mean()


@pytest.mark.parametrize("shape", [(20, 24, 3), (7, 40, 1), (33, 3, 2)])
def test_ssim_equals_its_definition(shape):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(*shape, generator=generator), torch.rand(*shape, generator=generator)
    b = 0.6 * a + 0.4 * b
    assert ssim(a, b).item() == pytest.approx(slow_ssim(a.double(), b.double()).item(), abs=1e-6)
    assert ssim(a, a).item() == pytest.approx(1.0, abs=1e-5)


# Where the object is in the picture: inside, all of it, at two borders, nowhere.
@pytest.mark.parametrize(
    "size, covered", [((60, 70), (20, 35, 18, 50)), ((40, 30), (0, 40, 0, 30)), ((33, 20), (5, 33, 0, 6)), ((9, 9), (4, 4, 5, 5))]
)
@pytest.mark.parametrize("ssim_weight", [0.2, 0.0])
@pytest.mark.parametrize("loss", [photometric, losses._plain_photometric])  # the second is what runs on CUDA
def test_photometric_loss_and_its_gradients_equal_their_definition(size, covered, ssim_weight, loss):
    generator = torch.Generator().manual_seed(1)
    top, bottom, left, right = covered

    def picture(rows, columns):
        alpha = torch.zeros(size)
        alpha[rows, columns] = torch.rand(alpha[rows, columns].shape, generator=generator)
        return torch.rand(*size, 3, generator=generator) * alpha[..., None], alpha

    rgb, alpha = picture(slice(top, bottom), slice(left, right))
    target, cover = picture(slice(top, bottom), slice(left + (right - left) // 3, right))
    background = torch.rand(3, generator=generator)
    fast = [value.clone().requires_grad_() for value in (rgb, alpha)]
    slow = [value.double().requires_grad_() for value in (rgb, alpha)]
    value = loss(*fast, target, cover, background, ssim_weight, 0.5)
    a, b = (color.double() + (1 - through.double()[..., None]) * background for color, through in (slow, (target, cover)))
    expected = (1 - ssim_weight) * (a - b).abs().mean() + 0.5 * (slow[1] - cover).abs().mean() + ssim_weight * (1 - slow_ssim(a, b))
    assert value.item() == pytest.approx(expected.item(), abs=1e-6)
    (3 * value).backward()
    (3 * expected).backward()
    for ours, theirs in zip(fast, slow, strict=True):
        assert (ours.grad - theirs.grad).abs().max() <= 1e-3 * theirs.grad.abs().max() + 1e-7


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


def test_farthest_points_equal_the_greedy_definition():
    points = np.random.default_rng(1).random((3000, 3)).astype(np.float32)
    expected, nearest = [0], np.full(len(points), np.inf)
    for _ in range(399):
        nearest = np.minimum(nearest, ((points - points[expected[-1]]) ** 2).sum(1))
        expected.append(int(nearest.argmax()))
    assert farthest_points(points, 400).tolist() == expected


def test_the_start_does_not_see_held_out_views():
    views = sphere_views(48)
    spoiled = views.rgba.copy()
    spoiled[views.split == "held_out", ..., :3] = 0
    other = Views(views.id, spoiled, views.depth, views.normals, views.cameras, views.split)
    a, b = (fit(each, FitConfig(count=100, steps=2)) for each in (views, other))
    assert torch.equal(a.gaussians.colors, b.gaussians.colors) and a.psnr > b.psnr + 3


def test_views_without_training_views_are_named():
    with pytest.raises(InputError, match="training view"):
        fit(sphere_views(48).select("held_out"), FitConfig(count=50, steps=1))


def test_scores_of_a_perfect_and_of_an_empty_picture():
    views = sphere_views(48)
    good = score(fit(views, FitConfig(count=300, steps=60)).gaussians, views)
    nothing = score(initialize(views, 100)[:0], views)
    assert nothing.psnr < 15 and nothing.psnr_foreground < nothing.psnr
    assert good.psnr > nothing.psnr + 10 and good.ssim > nothing.ssim and good.perceptual < nothing.perceptual


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


def test_a_pole_two_pixels_wide_has_a_surface():
    """Its pixels have nothing but air beside them, which is no jump to another surface."""
    views = sphere_views()
    rgba, depth = np.zeros_like(views.rgba), np.zeros_like(views.depth)
    rgba[:, 5:60, 31:33], depth[:, 5:60, 31:33] = (90, 90, 90, 255), views.cameras.positions.norm(dim=1)[0]
    points = surface_points(replace(views, rgba=rgba, depth=depth))[0]
    assert len(points) == len(views) * 55 * 2


def test_a_glass_is_fitted_too():
    """Half transparent all over: there is no opaque pixel to start from."""
    views = sphere_views()
    rgba = views.rgba.copy()
    rgba[..., 3] //= 2
    views = replace(views, rgba=rgba)
    start, result = (fit(views, FitConfig(count=400, steps=steps)) for steps in (0, 60))
    assert result.psnr > start.psnr + 2
    assert render(result.gaussians, Cameras.orbit(1, 32)).alpha[0, 14:18, 14:18].mean() == pytest.approx(0.5, abs=0.2)


def test_outlines_carve_the_sphere():
    views = sphere_views()
    points, normals, colors = carved_points(views)
    radii = np.linalg.norm(points, axis=1)
    # Twelve outlines leave a little more than the sphere, and no less than a voxel of it.
    assert 0.375 < radii.min() and radii.max() < 0.47 and np.median(radii) == pytest.approx(0.4, abs=0.015)
    alike = (normals * points).sum(1) / radii
    assert np.median(alike) > 0.98 and (alike > 0.7).mean() > 0.99
    away = np.abs(points[:, 2]) > 0.05
    assert ((colors[:, 0] > colors[:, 2]) == (points[:, 2] > 0))[away].mean() > 0.98


def test_views_without_depth_are_fitted_from_their_outlines():
    views = sphere_views()
    blind = replace(views, depth=np.zeros_like(views.depth), normals=np.zeros_like(views.normals))
    start, result = (fit(blind, FitConfig(count=400, steps=steps)) for steps in (0, 150))
    assert result.psnr > start.psnr + 3 and result.psnr > fit(views, FitConfig(count=400, steps=150)).psnr - 2
    same = fit(views, FitConfig(count=400, steps=0, start="outline"))
    assert torch.equal(same.gaussians.means, start.gaussians.means)


def test_more_gaussians_than_samples_share_their_pixels():
    views = sphere_views(16)
    gaussians = initialize(views, 3000)
    assert len(gaussians) == 3000 and len({tuple(row) for row in gaussians.means.tolist()}) == 3000
    assert (gaussians.means.norm(dim=1) - 0.4).abs().max() < 0.03


def test_too_few_surface_samples_are_named():
    with pytest.raises(InputError, match="surface samples"):
        initialize(sphere_views(16), 100_000)
    views = sphere_views(16)
    with pytest.raises(InputError, match="surface samples"):
        initialize(replace(views, rgba=np.zeros_like(views.rgba), depth=np.zeros_like(views.depth)), 10)
    with pytest.raises(InputError, match="depth, outline"):
        FitConfig(start="mesh")
