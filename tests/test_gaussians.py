"""The container refuses what is not N activated Gaussians, and its geometry is that of the equations."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from generator.errors import InputError
from generator.gaussians import Gaussians, concatenate, matrices_to_quaternions, quaternions_to_matrices


def some(count: int = 5) -> Gaussians:
    generator = torch.Generator().manual_seed(0)
    quaternions = torch.nn.functional.normalize(torch.randn(count, 4, generator=generator), dim=1)
    return Gaussians(
        torch.randn(count, 3, generator=generator),
        quaternions,
        torch.rand(count, 3, generator=generator) + 0.01,
        torch.rand(count, generator=generator),
        torch.rand(count, 3, generator=generator),
    )


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Gaussians)])
def test_wrong_shapes_dtypes_and_counts_are_named(name):
    good = some()
    value = getattr(good, name)
    for wrong in (value[:-1], value.unsqueeze(-1), value.double(), value.long(), value.tolist()):
        with pytest.raises(InputError, match=r"Gaussians\."):
            good.replace(**{name: wrong})


def test_covariances_are_those_of_samples():
    one = some(1)
    rotation = quaternions_to_matrices(one.quaternions)[0].double()
    noise = torch.randn(200_000, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    samples = (noise * one.scales.double()) @ rotation.T
    torch.testing.assert_close(one.covariances()[0].double(), torch.cov(samples.T), atol=2e-2, rtol=2e-2)


def test_rotation_matrices_are_rotations_and_turn_as_the_quaternion_says():
    matrices = quaternions_to_matrices(some(20).quaternions)
    torch.testing.assert_close(matrices @ matrices.transpose(1, 2), torch.eye(3).expand(20, 3, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.linalg.det(matrices), torch.ones(20))
    quarter_about_z = torch.tensor([0.5**0.5, 0.0, 0.0, 0.5**0.5])
    turned = quaternions_to_matrices(quarter_about_z) @ torch.tensor([1.0, 0.0, 0.0])
    torch.testing.assert_close(turned, torch.tensor([0.0, 1.0, 0.0]), atol=1e-6, rtol=0)


def test_quaternions_of_matrices_are_the_rotations_again():
    # Among them each half turn, where three of the four components are 0, and near ones.
    half_turns = torch.eye(4) + 1e-4 * torch.tensor([[0.0], [0.0], [0.0], [1.0]])
    quaternions = torch.nn.functional.normalize(torch.cat([some(200).quaternions, torch.eye(4), half_turns]).double(), dim=1)
    again = matrices_to_quaternions(quaternions_to_matrices(quaternions))
    sign = (again * quaternions).sum(1, keepdim=True).sign()
    torch.testing.assert_close(sign * again, quaternions, atol=1e-9, rtol=0)


def test_selection_and_finite_mask():
    gaussians = some()
    broken = gaussians.replace(scales=gaussians.scales.index_fill(0, torch.tensor([2]), float("nan")))
    assert broken.finite().tolist() == [True, True, False, True, True]
    assert len(broken[broken.finite()]) == 4 and len(broken[:0]) == 0 and broken[:0].finite().shape == (0,)


def test_parts_of_a_set_make_the_set_again():
    whole = some(7)
    again = concatenate([whole[:2], whole[2:2], whole[2:]])
    for field in dataclasses.fields(Gaussians):
        assert torch.equal(getattr(again, field.name), getattr(whole, field.name))
