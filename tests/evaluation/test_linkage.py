"""Matching of messages against independent oracles: slow loops, NumPy, Pillow, torchvision and scikit-learn."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import roc_curve
from torch import Tensor
from torchvision.transforms.v2 import functional as oracle

from mocosfl_priv.evaluation.linkage import (
    COPIES,
    FALSE_POSITIVES,
    SCORES,
    Matches,
    Moments,
    Score,
    Views,
    accepted,
    choose_score,
    compare,
    compare_in_chunks,
    jpeg_copies,
)
from mocosfl_priv.evaluation.recognition import own_is_best

SEEDS = st.integers(0, 2**32 - 1)
SIZES = st.tuples(st.integers(1, 9), st.integers(0, 12), st.integers(1, 7))  # victims, bystanders, width


def messages(seed: int, count: int, width: int, whole: bool = False) -> Tensor:
    """Of different means and deviations; whole: of few different values, so that there are ties."""
    rng = np.random.default_rng(seed)
    if whole:
        return torch.from_numpy(rng.integers(0, 3, (count, width)).astype(float))
    return torch.from_numpy(rng.normal(rng.normal(0, 3, width), rng.uniform(0.1, 2, width), (count, width)))


def slow_score(
    score: Score, query: np.ndarray, candidate: np.ndarray, mean: np.ndarray, deviation: np.ndarray
) -> float:
    if score == "distance":
        return -sum((float(a) - float(b)) ** 2 for a, b in zip(query, candidate, strict=True))
    a, b = (
        [(v - m) / s if s > 0 else 0.0 for v, m, s in zip(x, mean, deviation, strict=True)] for x in (query, candidate)
    )
    lengths = sum(v * v for v in a) ** 0.5 * sum(v * v for v in b) ** 0.5
    return sum(v * w for v, w in zip(a, b, strict=True)) / lengths if lengths > 0 else 0.0


@given(SEEDS, SIZES, st.integers(1, 5))
def test_moments_are_those_of_numpy_whatever_the_batches(seed: int, sizes: tuple[int, int, int], batch: int) -> None:
    n, m, width = sizes
    found = messages(seed, n + m + 2, width)
    moments = Moments.of(found.split(batch))
    torch.testing.assert_close(moments.mean, torch.from_numpy(found.numpy().mean(0)), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(moments.scale, torch.from_numpy(1 / found.numpy().std(0)), rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e6, -3.3e-5])
def test_what_never_varies_counts_for_nothing(value: float) -> None:
    constant = torch.full((70, 3), value, dtype=torch.float64)
    moments = Moments.of(constant.split(32))
    assert torch.equal(moments.mean, constant[0]) and not moments.scale.any()
    for score in SCORES:
        prepared = moments.prepare(score, constant)
        assert not prepared.any() and not compare(score, prepared, prepared).any()
    varied = torch.cat([constant, messages(0, 70, 2)], 1)
    assert (Moments.of([varied]).scale > 0).tolist() == [False] * 3 + [True] * 2


@given(SEEDS, SIZES, st.sampled_from(SCORES), st.booleans())
def test_scores_are_those_of_a_slow_double_loop(
    seed: int, sizes: tuple[int, int, int], score: Score, whole: bool
) -> None:
    n, m, width = sizes
    queries, candidates = messages(seed, n, width, whole), messages(seed + 1, n + m, width, whole)
    moments = Moments.of([candidates])
    found = compare(score, moments.prepare(score, queries), moments.prepare(score, candidates))
    spread = candidates.numpy().std(0)
    spread[moments.scale.numpy() == 0] = 0
    expected = [
        [slow_score(score, q, c, candidates.numpy().mean(0), spread) for c in candidates.numpy()]
        for q in queries.numpy()
    ]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-7, atol=1e-8)


@given(SEEDS, SIZES, st.sampled_from(SCORES), st.integers(1, 6), st.integers(1, 6))
def test_in_chunks_the_scores_are_the_same(
    seed: int, sizes: tuple[int, int, int], score: Score, batch: int, chunk: int
) -> None:
    n, m, width = sizes
    queries, candidates = messages(seed, n, width).float(), messages(seed + 1, n + m, width)
    moments = Moments.of([candidates])
    direct = compare(score, moments.prepare(score, queries.double()), moments.prepare(score, candidates))
    pieces = compare_in_chunks(score, moments, queries, candidates.split(batch), chunk)
    torch.testing.assert_close(pieces, direct, rtol=1e-12, atol=1e-12)


@given(SEEDS, st.integers(1, 9), st.integers(0, 12), st.booleans())
def test_rank_1_is_that_of_a_slow_loop_and_ties_fail(seed: int, n: int, m: int, whole: bool) -> None:
    scores = messages(seed, n, n + m, whole)
    expected = [all(scores[i, i] > scores[i, j] for j in range(n + m) if j != i) for i in range(n)]
    assert own_is_best(scores).tolist() == expected


@given(SEEDS, st.integers(2, 12), st.integers(0, 60), st.sampled_from([0.5, 0.1, 0.02, FALSE_POSITIVES]), st.booleans())
def test_verification_is_that_of_the_roc_curve(seed: int, n: int, m: int, rate: float, whole: bool) -> None:
    scores = messages(seed, n, n + m, whole)
    scores.diagonal().add_(1)
    own = torch.eye(n, n + m, dtype=torch.bool)
    found = accepted(scores, rate)
    if n * (n + m - 1) < round(1 / rate):
        assert found is None
        return
    labels = own.flatten().numpy()
    false, true, _ = roc_curve(labels, scores.flatten().numpy(), drop_intermediate=False)
    assert found is not None
    assert found.float().mean().item() == pytest.approx(true[false <= rate + 1e-12].max())


def test_verification_counts_the_very_share_that_is_allowed() -> None:
    """3,000 other pairs: three may be accepted, the fourth not."""
    scores = torch.zeros(3, 1001)
    scores[0, 5:8], scores[1, 9] = torch.tensor([9.0, 8.0, 7.0]), 6.0
    scores[torch.arange(3), torch.arange(3)] = torch.tensor([6.5, 6.0, 5.0])
    found = accepted(scores)
    assert found is not None and found.tolist() == [True, False, False]
    assert accepted(scores[:1, :1000]) is None  # 999 pairs cannot show one in a thousand
    assert bool(Matches.of(scores[:1, :1000]).verified.isnan().all())


def test_what_says_nothing_is_never_accepted() -> None:
    matches = Matches.of(torch.zeros(20, 200))
    assert not matches.first.any() and matches.verified.tolist() == [0.0] * 20


def test_random_scores_are_at_chance() -> None:
    matches = Matches.of(messages(0, 2000, 2000))
    assert matches.first.float().mean() < 0.004
    assert matches.verified.mean().item() == pytest.approx(FALSE_POSITIVES, abs=0.003)


@pytest.mark.parametrize(("channels", "side"), [(3, 32), (1, 28), (3, 9)])
def test_jpeg_copies_are_those_of_pillow(channels: int, side: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, channels, side, side + 3), dtype=np.uint8)
    found = jpeg_copies(torch.from_numpy(pixels).float() / 255)
    for image, copy in zip(pixels, found, strict=True):
        file = io.BytesIO()
        shown = Image.fromarray(image.transpose(1, 2, 0) if channels == 3 else image[0])
        shown.save(file, "JPEG", quality=75)
        expected = np.asarray(Image.open(io.BytesIO(file.getvalue()))).reshape(side, side + 3, channels)
        assert np.array_equal((copy * 255).round().byte().numpy().transpose(1, 2, 0), expected)
        assert not np.array_equal(expected.transpose(2, 0, 1), image)


def test_views_are_torchvisions_and_do_not_depend_on_batches() -> None:
    images = torch.rand(40, 3, 24, 20, generator=torch.Generator().manual_seed(0))
    views = Views.draw(40, 24, 20, torch.Generator().manual_seed(1))
    whole = views(images, 0)
    assert torch.equal(whole, torch.cat([views(part, 7 * place) for place, part in enumerate(images.split(7))]))
    assert 0 < views.mirrored.sum() < 40
    for image, view, box, mirrored in zip(images, whole, views.boxes.tolist(), views.mirrored, strict=True):
        expected = oracle.resized_crop(image, *box, size=[24, 20], antialias=False)
        expected = oracle.horizontal_flip(expected) if mirrored else expected
        torch.testing.assert_close(view, expected, rtol=0, atol=1e-5)


def test_the_score_that_matches_more_is_chosen_and_ties_go_to_the_first() -> None:
    good, bad = torch.eye(6, 9), torch.zeros(6, 9)
    assert choose_score(lambda score: [good, bad] if score == "distance" else [bad, bad]) == "distance"
    assert choose_score(lambda score: [good, bad] if score == "cosine" else [bad, bad]) == "cosine"
    assert choose_score(lambda _: [good, bad]) == SCORES[0]
    assert COPIES == ("same", "jpeg", "view")
