"""Closing gaps between generated splats."""

from __future__ import annotations

import pytest
import torch
from scipy.spatial import cKDTree

from generator.coverage import NEIGHBOUR, close_gaps, coverage, spacing
from generator.gaussians import Gaussians
from generator.model.pipeline import GaussianAtlasPipeline
from generator.render import Cameras, render
from tests.tiny_bundle import write_tiny_bundle


def sheet(side: int = 24, scale: float = 0.4) -> Gaussians:
    """Flat splats on a square grid in the XZ plane, seen from the front; their scales in shares of the grid's step."""
    step = 0.8 / (side - 1)
    x, z = torch.meshgrid(*[torch.linspace(-0.4, 0.4, side)] * 2, indexing="ij")
    means = torch.stack((x.flatten(), torch.zeros(side**2), z.flatten()), -1)
    scales = torch.tensor([scale * step, 0.001, scale * step]).repeat(side**2, 1)
    return Gaussians(means, torch.tensor([[1.0, 0, 0, 0]]).repeat(side**2, 1), scales, torch.ones(side**2), torch.zeros(side**2, 3))


def test_spacing_is_what_a_tree_says():
    means = torch.rand(3000, 3, generator=torch.Generator().manual_seed(0))
    expected = torch.from_numpy(cKDTree(means.numpy()).query(means.numpy(), k=NEIGHBOUR + 1)[0][:, -1]).float()
    torch.testing.assert_close(spacing(means), expected, atol=1e-4, rtol=1e-3)


def test_splats_that_became_too_small_cover_the_surface_again():
    whole = sheet()
    share = coverage(whole)
    assert share == pytest.approx(0.4, abs=0.01)
    factor = 0.3 + 0.7 * torch.rand(len(whole), 1, generator=torch.Generator().manual_seed(0))
    holed = whole.replace(scales=whole.scales * torch.cat((factor, torch.ones_like(factor), factor), 1))
    closed = close_gaps(holed, share)
    camera = Cameras.orbit(8, 256)[:1]
    objects = {"whole": whole, "holed": holed, "closed": closed}
    least = {name: render(each, camera).alpha[0, 96:160, 96:160].min().item() for name, each in objects.items()}
    assert least["holed"] < 0.7 * least["whole"] and least["closed"] > 0.95 * least["whole"]
    assert torch.equal(closed.scales[:, 1], holed.scales[:, 1]), "a sheet stays as thin as it was"
    assert (closed.scales >= holed.scales).all()


def test_what_has_no_gaps_and_what_is_closed_stays_as_it_is():
    whole = sheet()
    inside = (whole.means.abs() < 0.39).all(1)  # a corner's third neighbour is further away
    assert torch.equal(close_gaps(whole, 0.9 * coverage(whole)).scales[inside], whole.scales[inside])
    closed = close_gaps(whole, 0.7)
    assert torch.equal(close_gaps(closed, 0.7).scales, closed.scales) and not torch.equal(closed.scales, whole.scales)
    assert close_gaps(whole, 0.0) is whole


def test_lone_and_invisible_splats_become_no_blots():
    whole = sheet()
    means, opacities = whole.means.clone(), whole.opacities.clone()
    means[0], opacities[300] = torch.tensor([0.4, 3.0, 0.4]), 0.0
    closed = close_gaps(whole.replace(means=means, opacities=opacities), 0.5)
    typical = spacing(whole.means).median()
    assert closed.scales[0].max() <= 2 * 0.5 * typical * 1.01
    assert torch.equal(closed.scales[300], whole.scales[300])
    assert close_gaps(whole[:3], 0.5) is not None and torch.equal(close_gaps(whole[:3], 0.5).scales, whole.scales[:3]), (
        "too few to have neighbours"
    )


def test_only_chosen_splats_are_widened():
    whole = sheet()
    chosen = torch.arange(len(whole)) < 100
    closed = close_gaps(whole, 0.7, chosen)
    assert torch.equal(closed.scales[100:], whole.scales[100:]) and (closed.scales[:100, 0] > whole.scales[:100, 0]).all()


def test_a_bundle_says_how_far_gaps_are_closed_and_kept_cells_stay(tmp_path):
    plain = GaussianAtlasPipeline.from_pretrained(write_tiny_bundle(tmp_path / "plain"))
    pipeline = GaussianAtlasPipeline.from_pretrained(write_tiny_bundle(tmp_path / "closed", coverage=2.0))
    ours, theirs = pipeline("a chair"), plain("a chair")
    assert torch.equal(ours.atlases[0].values, theirs.atlases[0].values), "the atlas is what the network painted"
    assert (ours.gaussians[0].scales > theirs.gaussians[0].scales).any()
    mask = torch.zeros(32, 32, dtype=torch.bool)
    mask[:10] = True
    atlas = pipeline.encode(ours.gaussians[0])
    edited = pipeline("a lamp", seed=3, init_atlas=atlas, mask=mask).gaussians[0]
    kept = pipeline("a lamp", init_atlas=atlas, strength=0.0).gaussians[0]
    torch.testing.assert_close(kept.scales, ours.gaussians[0].scales, atol=1e-5, rtol=1e-3)
    assert torch.equal(edited.scales[320:], plain("a lamp", init_atlas=atlas, mask=mask).gaussians[0].scales[320:])
