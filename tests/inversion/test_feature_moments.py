"""First two moments of maps, against a loop over all pairs of places."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mocosfl_priv.inversion.feature_moments import CELLS, OFFSETS, moment_distance, moments


def maps(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covered(cell: int, size: int) -> slice:
    """The places of a side of `size` that lie in a cell of the grid, in whole or in part."""
    return slice(cell * size // CELLS, math.ceil((cell + 1) * size / CELLS))


@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(1, 5))
def test_moments_are_those_of_a_slow_loop(seed: int, n: int, channels: int, height: int, width: int) -> None:
    some = maps(seed, n, channels, height, width)
    values = some.numpy()
    found = moments(some).numpy()
    half = math.ceil(n / 2)
    wanted = [values.mean((0, 2, 3))[None]]
    for mine in (values[:half], values[n - half :]):
        for y in range(CELLS):
            for x in range(CELLS):
                rows, columns = covered(y, height), covered(x, width)
                wanted.append(mine[:, :, rows, columns].mean((0, 2, 3))[None])
    for offset in OFFSETS:
        down, right = min(offset[0], height - 1), min(offset[1], width - 1)
        products = [
            np.outer(values[i, :, y, x], values[i, :, y + down, x + right])
            for i in range(n)
            for y in range(height - down)
            for x in range(width - right)
        ]
        wanted.append(np.mean(products, axis=0))
    np.testing.assert_allclose(found, np.concatenate(wanted), atol=1e-12)


def test_means_of_places_are_those_of_cells_in_either_half() -> None:
    some = maps(9, 6, 2, 8, 8)
    rows = moments(some)[1 : 1 + 2 * CELLS**2].view(2, CELLS, CELLS, 2)
    for half, mine in enumerate((some[:3], some[3:])):
        for y in range(CELLS):
            for x in range(CELLS):
                cell = mine[:, :, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2]
                torch.testing.assert_close(rows[half, y, x], cell.mean((0, 2, 3)))


def test_means_of_results_are_results_for_all_maps() -> None:
    some, others = maps(0, 6, 3, 5, 5), maps(10, 6, 3, 5, 5)
    together = torch.cat([some[:3], others[:3], some[3:], others[3:]])
    torch.testing.assert_close((moments(some) + moments(others)) / 2, moments(together))


def test_distance_is_none_to_oneself_and_does_not_depend_on_units() -> None:
    some, others = moments(maps(1, 8, 3, 6, 6)), moments(maps(2, 8, 3, 6, 6) + 1)
    assert float(moment_distance(some, some)) <= 0 < float(moment_distance(some, others))
    louder = torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64).view(1, 3, 1, 1)
    rescaled = [moments(louder * (maps(seed, 8, 3, 6, 6) + seed - 1)) for seed in (1, 2)]
    assert float(moment_distance(*rescaled)) == pytest.approx(float(moment_distance(some, others)), rel=1e-9)


def test_distance_tells_a_filter_from_its_opposite_direction() -> None:
    """Equal variances, equal means: only what neighbours have in common differs."""
    white = maps(3, 64, 1, 9, 9)
    smooth, rough = white[..., 1:] + white[..., :-1], white[..., 1:] - white[..., :-1]
    again = maps(4, 64, 1, 9, 9)
    alike = again[..., 1:] + again[..., :-1]
    assert moment_distance(moments(rough), moments(smooth)) > 20 * moment_distance(moments(alike), moments(smooth))


def test_distance_tells_a_filter_from_its_negative_by_where_it_is_light() -> None:
    lighter_above = torch.linspace(0.3, -0.3, 8, dtype=torch.float64).view(1, 1, 8, 1)
    wanted = moments(maps(11, 64, 1, 8, 8) + lighter_above)
    same, negative = maps(12, 64, 1, 8, 8) + lighter_above, -(maps(12, 64, 1, 8, 8) + lighter_above)
    assert moment_distance(moments(negative), wanted) > 5 * moment_distance(moments(same), wanted).abs()


def test_a_dead_channel_leaves_the_distance_finite() -> None:
    some, others = maps(5, 8, 2, 4, 4), maps(6, 8, 2, 4, 4)
    others[:, 1] = 0.5
    some.requires_grad_(True)
    distance = moment_distance(moments(some), moments(others))
    distance.backward()
    assert bool(distance.isfinite()) and some.grad is not None and bool(some.grad.isfinite().all())
