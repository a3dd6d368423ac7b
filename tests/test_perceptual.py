"""The perceptual distance: what a distance of pictures must do, the published example, and its use in a fit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from generator.errors import WorkError
from tests.sphere import sphere_views
from trainer.fit import FitConfig, fit, perceptual


@pytest.fixture(scope="module")
def distance():
    return perceptual.st_lpips()


@pytest.fixture(scope="module")
def picture():
    """Discs of different colours on a gradient [1, 3, 64, 64]."""
    rows, columns = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    image = torch.stack([rows / 64, columns / 64, torch.full_like(rows, 0.5)])
    for row, column, radius, shade in ((16, 20, 9, 0.9), (40, 44, 12, 0.1), (44, 14, 6, 0.7)):
        image[:, (rows - row) ** 2 + (columns - column) ** 2 < radius**2] = torch.tensor([[shade], [1 - shade], [shade / 2]])
    return image[None]


def blurred(picture: torch.Tensor, sigma: float) -> torch.Tensor:
    line = torch.exp(-0.5 * (torch.arange(-9.0, 10.0) / sigma) ** 2)
    padded = torch.nn.functional.pad(picture, (9, 9, 9, 9), mode="reflect")
    kernel = (line[:, None] * line / line.sum() ** 2).expand(3, 1, 19, 19)
    return torch.nn.functional.conv2d(padded, kernel, groups=3)


def test_equal_pictures_have_no_distance_and_others_are_symmetric(distance, picture):
    other = blurred(picture, 2.0)
    assert distance(picture, picture).item() == 0
    assert distance(picture, other).item() == pytest.approx(distance(other, picture).item(), rel=1e-5)
    assert distance(torch.cat([picture, other]), torch.cat([picture, picture])).shape == (2,)


def test_distance_grows_with_blur_and_with_noise(distance, picture):
    noise = torch.randn(picture.shape, generator=torch.Generator().manual_seed(0))
    for spoil in (lambda much: blurred(picture, much), lambda much: (picture + 0.05 * much * noise).clamp(0, 1)):
        found = [distance(picture, spoil(much)).item() for much in (0.5, 1.0, 2.0, 4.0)]
        assert found == sorted(found) and found[0] > 0


def test_a_shift_matters_less_than_to_pixels(distance, picture):
    # A shift by one pixel and a blur that costs as much in squared pixels.
    shifted = picture.roll(1, -1)
    wanted = (shifted - picture).square().mean()
    blurs = [blurred(picture, sigma) for sigma in torch.linspace(0.3, 6.0, 40).tolist()]
    alike = min(blurs, key=lambda each: abs((each - picture).square().mean() - wanted))
    assert (alike - picture).square().mean() == pytest.approx(wanted.item(), rel=0.2)
    assert distance(picture, shifted).item() < 0.5 * distance(picture, alike).item()


def test_the_gradient_is_finite_and_leads_to_the_target(distance, picture):
    start = blurred(picture, 2.0)
    moving = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([moving], lr=5e-3)
    target = distance.features(picture)
    for _ in range(15):
        optimizer.zero_grad()
        distance(moving, target).sum().backward()
        assert torch.isfinite(moving.grad).all()
        optimizer.step()
    assert distance(moving, target).item() < 0.7 * distance(start, target).item()
    # Equal pictures are the kink of a norm: the gradient there must not be NaN either.
    same = picture.clone().requires_grad_()
    distance(same, picture).sum().backward()
    assert torch.isfinite(same.grad).all()


def test_missing_or_damaged_weights_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(perceptual.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(WorkError, match="stlpips-pytorch"):
        perceptual.st_lpips.__wrapped__()

    class Found:
        submodule_search_locations = [str(tmp_path)]

    (tmp_path / perceptual.WEIGHTS).parent.mkdir(parents=True)
    (tmp_path / perceptual.WEIGHTS).write_bytes(b"no weights")
    monkeypatch.setattr(perceptual.importlib.util, "find_spec", lambda name: Found)
    with pytest.raises(WorkError, match="install stlpips-pytorch"):
        perceptual.st_lpips.__wrapped__()


def test_a_fit_reports_the_distance_under_its_own_name_and_the_loss_lowers_it():
    views = sphere_views(64)
    few = FitConfig(count=200, steps=30)
    plain, seen = fit(views, few), fit(views, replace(few, perceptual_weight=0.2, perceptual_every=1, perceptual_crop=64))
    assert plain.perceptual_name in ("st_lpips", "lpips") and 0 < seen.perceptual < plain.perceptual
    assert fit(views, replace(few, steps=0, perceptual_score=False)).perceptual is None


def test_a_perceptual_loss_without_any_network_is_refused(monkeypatch):
    from trainer.fit import scores

    for module in (perceptual, scores):
        monkeypatch.setattr(module, "perceptual", lambda: None)
    import sys

    monkeypatch.setattr(sys.modules["trainer.fit.fit"], "perceptual", lambda: None)
    views = sphere_views(48)
    assert fit(views, FitConfig(count=50, steps=1)).perceptual is None
    with pytest.raises(WorkError, match="perceptual_weight"):
        fit(views, FitConfig(count=50, steps=1, perceptual_weight=0.1))
