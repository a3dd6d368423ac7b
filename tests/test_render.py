"""The CPU renderer against a dense, slow twin; the fitting rasteriser against both, forward and backward."""

from __future__ import annotations

import math

import pytest
import torch

from generator.gaussians import Gaussians, quaternions_to_matrices
from generator.render import Cameras, cpu, render
from trainer.fit.rasterize import rasterize


def cloud(count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Gaussians:
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    return Gaussians(
        means=uniform(count, 3) - 0.5,
        quaternions=torch.nn.functional.normalize(uniform(count, 4) - 0.5, dim=1),
        scales=0.01 + 0.06 * uniform(count, 3),
        opacities=uniform(count),
        colors=uniform(count, 3),
    ).to(dtype)


def dense_reference(g: Gaussians, cameras: Cameras, view: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Every Gaussian at every pixel, straight from the equations: rgb (premultiplied) and alpha."""
    viewmat, K = cameras.viewmats[view].to(g.means), cameras.Ks[view].to(g.means)
    points = g.means @ viewmat[:3, :3].T + viewmat[:3, 3]
    rows = torch.arange(cameras.height, dtype=g.means.dtype) + 0.5
    columns = torch.arange(cameras.width, dtype=g.means.dtype) + 0.5
    rgb = torch.zeros(cameras.height, cameras.width, 3, dtype=g.means.dtype)
    through = torch.ones(cameras.height, cameras.width, dtype=g.means.dtype)
    for i in torch.argsort(points[:, 2]).tolist():
        x, y, z = points[i]
        jacobian = torch.zeros(2, 3, dtype=g.means.dtype)
        jacobian[0, 0], jacobian[1, 1] = K[0, 0] / z, K[1, 1] / z
        jacobian[0, 2], jacobian[1, 2] = -K[0, 0] * x / z**2, -K[1, 1] * y / z**2
        rotation = quaternions_to_matrices(g.quaternions[i])
        covariance = rotation @ torch.diag(g.scales[i] ** 2) @ rotation.T
        transform = jacobian @ viewmat[:3, :3]
        inverse = torch.linalg.inv(transform @ covariance @ transform.T + 0.3 * torch.eye(2, dtype=g.means.dtype))
        dx = columns[None, :] - (K[0, 0] * x / z + K[0, 2])
        dy = rows[:, None] - (K[1, 1] * y / z + K[1, 2])
        distance = inverse[0, 0] * dx**2 + 2 * inverse[0, 1] * dx * dy + inverse[1, 1] * dy**2
        alpha = (g.opacities[i] * torch.exp(-0.5 * distance)).clamp_max(0.999)
        alpha = torch.where(alpha < 1 / 255, torch.zeros_like(alpha), alpha)
        rgb = rgb + (through * alpha)[..., None] * g.colors[i]
        through = through * (1 - alpha)
    return rgb, 1 - through


@pytest.mark.parametrize("count,size", [(1, 32), (60, 40), (300, 64)])
def test_cpu_renderer_equals_the_dense_reference(count, size):
    gaussians, cameras = cloud(count), Cameras.orbit(2, size, radius=2.4)
    for view in range(2):
        rgb, alpha, _ = cpu.render_view(gaussians, cameras, view)
        expected_rgb, expected_alpha = dense_reference(gaussians.to(torch.float64), cameras, view)
        # The 1/255 cut is a step: rounding may decide it differently for single pairs.
        assert (rgb - expected_rgb).abs().max() < 5e-3 and (rgb - expected_rgb).abs().mean() < 1e-5
        assert (alpha - expected_alpha).abs().max() < 5e-3


def test_bands_do_not_change_the_picture(monkeypatch):
    gaussians, cameras = cloud(200), Cameras.orbit(1, 48)
    whole = render(gaussians, cameras)
    monkeypatch.setattr(cpu, "PAIRS_AT_ONCE", 500)
    banded = render(gaussians, cameras)
    for a, b in zip(whole, banded, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_background_shows_where_nothing_is_and_depth_is_the_distance():
    one = cloud(1).replace(means=torch.zeros(1, 3), scales=torch.full((1, 3), 0.1), opacities=torch.ones(1))
    view = render(one, Cameras.orbit(1, 65, radius=2.0), background=(0.2, 0.4, 0.6))
    assert torch.allclose(view.rgb[0, 0, 0], torch.tensor([0.2, 0.4, 0.6]))
    assert torch.allclose(view.rgb[0, 32, 32], one.colors[0], atol=2e-3)
    assert view.depth[0, 32, 32] == pytest.approx(2.0, abs=1e-3) and view.depth[0, 0, 0] == 0


def test_behind_the_camera_and_empty_sets_render_nothing():
    behind = cloud(20)
    cameras = Cameras.orbit(1, 16)
    shifted = behind.replace(means=behind.means + 10 * cameras.positions[0])
    assert render(shifted, cameras).alpha.max() == 0
    assert render(behind[:0], cameras).alpha.max() == 0


def test_cameras_look_at_the_origin_with_z_up():
    cameras = Cameras.orbit(3, 100, elevation=15)
    homogeneous = cameras.viewmats @ torch.tensor([0.0, 0.0, 0.0, 1.0])
    assert torch.allclose(homogeneous[:, :2], torch.zeros(3, 2), atol=1e-6) and (homogeneous[:, 2] > 0).all()
    above = cameras.viewmats @ torch.tensor([0.0, 0.0, 0.1, 1.0])
    assert (above[:, 1] < 0).all(), "+Z of the object must point up in the picture (-Y of the camera)"
    front = Cameras.orbit(1, 10, start=0.0).positions[0]
    assert front[1] < 0 and abs(front[0]) < 1e-6, "azimuth 0 looks at the front, which is -Y"
    assert math.isclose(front.norm(), Cameras.orbit(1, 10).positions[0].norm(), rel_tol=1e-6)


def test_fitting_rasteriser_equals_the_renderer():
    gaussians, cameras = cloud(400, seed=3), Cameras.orbit(1, 64)
    rgb, alpha = rasterize(gaussians, cameras.viewmats[0], cameras.Ks[0], 64, 64)
    expected_rgb, expected_alpha, _ = cpu.render_view(gaussians, cameras, 0)
    assert (rgb - expected_rgb).abs().max() < 4e-3 and (alpha - expected_alpha).abs().max() < 4e-3


def test_gradients_of_the_fitting_rasteriser_equal_the_dense_reference():
    gaussians, cameras = cloud(40, seed=5), Cameras.orbit(1, 32)
    weights_rgb = torch.rand(32, 32, 3, generator=torch.Generator().manual_seed(1))
    weights_alpha = torch.rand(32, 32, generator=torch.Generator().manual_seed(2))
    names = ("means", "quaternions", "scales", "opacities", "colors")

    def gradients(dtype, draw):
        leaves = {name: getattr(gaussians, name).detach().to(dtype).requires_grad_() for name in names}
        rgb, alpha = draw(Gaussians(**leaves))
        ((rgb * weights_rgb.to(dtype)).sum() + (alpha * weights_alpha.to(dtype)).sum()).backward()
        return {name: leaf.grad.double() for name, leaf in leaves.items()}

    fast = gradients(torch.float32, lambda g: rasterize(g, cameras.viewmats[0], cameras.Ks[0], 32, 32))
    exact = gradients(torch.float64, lambda g: dense_reference(g, cameras))
    for name in names:
        error = (fast[name] - exact[name]).norm() / exact[name].norm()
        assert error < 2e-3, f"gradient of {name} is off by {error:.2e}"
