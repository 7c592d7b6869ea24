"""Defenses that send a part of a message: dropout and top-k pruning."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from defenses.dropout import DropoutDefense
from defenses.topk_prune import TopKPruning


@given(seed=st.integers(0, 10**6), keep=st.floats(0.01, 1.0), n=st.integers(1, 4))
def test_pruning_is_per_message_and_by_magnitude(seed: int, keep: float, n: int) -> None:
    smashed = torch.randn(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    sent = TopKPruning(keep).protect(smashed, torch.Generator())
    for message, original in zip(sent.flatten(1).tolist(), smashed.flatten(1).tolist(), strict=True):
        count = max(1, math.ceil(keep * len(original)))
        ranked = sorted(range(len(original)), key=lambda i: -abs(original[i]))
        wanted = [value if i in ranked[:count] else 0.0 for i, value in enumerate(original)]
        assert message == wanted


def test_pruning_keeps_negative_values_and_does_not_mix_images() -> None:
    smashed = torch.tensor([[-5.0, 1.0, 2.0], [0.3, 0.1, -0.2]]).view(2, 3, 1, 1)
    sent = TopKPruning(0.3).protect(smashed, torch.Generator()).view(2, 3)
    assert sent.tolist() == [[-5.0, 0.0, 0.0], [pytest.approx(0.3), 0.0, 0.0]]


@pytest.mark.parametrize("unit", ["element", "channel"])
def test_dropout_loses_its_share_and_keeps_the_mean(unit: str) -> None:
    smashed = torch.ones(200, 16, 4, 4)
    sent = DropoutDefense(0.3, unit).protect(smashed, torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    lost = sent == 0
    assert float(lost.float().mean()) == pytest.approx(0.3, abs=0.02)
    assert float(sent.mean()) == pytest.approx(1, abs=0.03)
    assert bool(torch.isin(sent, torch.tensor([0.0, 1 / 0.7])).all())
    whole = lost.flatten(2).float().mean(2)
    assert bool(((whole == 0) | (whole == 1)).all()) == (unit == "channel")


def test_dropout_draws_a_mask_for_every_message() -> None:
    sent = DropoutDefense(0.5).protect(torch.ones(2, 4, 8, 8), torch.Generator().manual_seed(0))
    assert not torch.equal(sent[0], sent[1])
