"""Ridge regression against the normal equations and against what it must leave alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mocosfl_priv.inversion.ridge import Ridge, fit_convolution


def test_the_dual_is_the_penalised_least_squares() -> None:
    rng = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(30, 2, 3, generator=rng) + 4, torch.randn(30, 5, generator=rng)
    rows = (inputs - inputs.mean(0)).flatten(1).double()
    penalty = 0.3 * rows.square().sum(1).mean() * torch.eye(6, dtype=torch.float64)
    weights = torch.linalg.solve(rows.T @ rows + penalty, rows.T @ (targets - targets.mean(0)).double())
    new = torch.randn(4, 2, 3, generator=rng)
    expected = targets.mean(0) + (new - inputs.mean(0)).flatten(1).double() @ weights
    assert torch.allclose(Ridge(inputs, targets)(new, 0.3).double(), expected, atol=1e-5)


def test_an_affine_map_is_found() -> None:
    rng = torch.Generator().manual_seed(1)
    inputs, weights = torch.rand(40, 6, generator=rng), torch.randn(6, 3, generator=rng)
    regression = Ridge(inputs, inputs @ weights + 2)
    new = torch.rand(9, 6, generator=rng)
    assert torch.allclose(regression(new, 1e-7), new @ weights + 2, atol=1e-3)


@pytest.mark.parametrize("examples", [1, 7])
def test_inputs_that_say_nothing_give_the_mean(examples: int) -> None:
    targets = torch.rand(examples, 3, 4, 4)
    found = Ridge(torch.ones(examples, 2, 8, 8), targets)(torch.ones(2, 2, 8, 8), 0.1)
    assert torch.allclose(found, targets.mean(0).expand(2, 3, 4, 4), atol=1e-5)


def test_a_convolution_is_fitted_where_the_gradient_of_its_objective_is_zero() -> None:
    rng = torch.Generator().manual_seed(2)
    maps, targets = torch.randn(70, 3, 6, 5, generator=rng) + 1, torch.randn(70, 4, 3, 3, generator=rng)
    convolution = nn.Conv2d(3, 4, 3, stride=2, padding=1).double()
    strength, patches = 0.2, torch.nn.functional.unfold(maps.double(), 3, padding=1, stride=2)
    fit_convolution(convolution, maps.double(), targets.double(), strength)
    penalty = strength * patches.square().sum((0, 2)).mean() * convolution.weight.square().sum()
    objective = (convolution(maps.double()) - targets).square().sum() + penalty
    before = targets.square().sum()
    for gradient in torch.autograd.grad(objective, list(convolution.parameters())):
        assert float(gradient.abs().max()) < 1e-8 * float(before)


def test_a_convolution_is_found_again() -> None:
    rng = torch.Generator().manual_seed(3)
    maps, truth, fitted = torch.randn(20, 2, 8, 8, generator=rng), *(nn.Conv2d(2, 3, 3, padding=1) for _ in range(2))
    fit_convolution(fitted, maps, truth(maps), 1e-8)
    for found, wanted in zip(fitted.parameters(), truth.parameters(), strict=True):
        assert torch.allclose(found, wanted, atol=1e-4)
