from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from defenses.nopeek import NoPeek, bias_corrected, distance_correlation
from mocosfl_priv.api import Experiment
from mocosfl_priv.config import ComputeConfig, TrainingConfig
from mocosfl_priv.errors import ConfigurationError
from mocosfl_priv.plugins.defense_checks import small_context
from mocosfl_priv.runtime.compute import Compute
from mocosfl_priv.training.clients import ClientBank
from mocosfl_priv.training.participants import Simulated
from mocosfl_priv.training.sampling import ClientBatch

Array = NDArray[np.float64]


def by_the_definition(some: Array, others: Array) -> float:
    """Szekely, Rizzo and Bakirov (2007), definition 4: loops over pairs, in float64."""

    def centred(rows: Array) -> Array:
        n = len(rows)
        distances = np.array([[np.linalg.norm(rows[i] - rows[j]) for j in range(n)] for i in range(n)])
        return np.array(
            [
                [distances[i, j] - distances[i, :].mean() - distances[:, j].mean() + distances.mean() for j in range(n)]
                for i in range(n)
            ]
        )

    a, b = centred(some), centred(others)
    return float(np.sqrt((a * b).mean() / np.sqrt((a * a).mean() * (b * b).mean())))


@given(st.integers(0, 10**6), st.integers(2, 12), st.integers(1, 5), st.integers(1, 5), st.floats(0, 1))
def test_distance_correlation_is_that_of_the_definition(seed: int, n: int, d: int, e: int, share: float) -> None:
    random = np.random.default_rng(seed)
    some = random.normal(size=(n, d))
    others = share * some[:, :1] + (1 - share) * random.normal(size=(n, e))
    found = float(distance_correlation(torch.from_numpy(some), torch.from_numpy(others)))
    assert found == pytest.approx(by_the_definition(some, others), abs=1e-4)


def unbiased_by_the_definition(some: Array, others: Array) -> float:
    """Szekely and Rizzo (2014), definitions 2 and 3: loops over pairs, in float64."""

    def centred(rows: Array) -> Array:
        n = len(rows)
        distances = np.array([[np.linalg.norm(rows[i] - rows[j]) for j in range(n)] for i in range(n)])
        found = np.zeros((n, n))
        for i in range(n):
            for j in range(n):
                if i != j:
                    found[i, j] = (
                        distances[i, j]
                        - distances[i, :].sum() / (n - 2)
                        - distances[:, j].sum() / (n - 2)
                        + distances.sum() / ((n - 1) * (n - 2))
                    )
        return found

    def product(a: Array, b: Array) -> float:
        n = len(a)
        return sum(a[i, j] * b[i, j] for i in range(n) for j in range(n) if i != j) / (n * (n - 3))

    a, b = centred(some), centred(others)
    return float(product(a, b) / np.sqrt(product(a, a) * product(b, b)))


@given(st.integers(0, 10**6), st.integers(4, 12), st.integers(1, 5), st.integers(1, 5), st.floats(0, 1))
def test_the_bias_corrected_one_is_that_of_its_definition(seed: int, n: int, d: int, e: int, share: float) -> None:
    random = np.random.default_rng(seed)
    some = random.normal(size=(n, d))
    others = share * some[:, :1] + (1 - share) * random.normal(size=(n, e))
    found = float(bias_corrected(torch.from_numpy(some), torch.from_numpy(others)))
    assert found == pytest.approx(unbiased_by_the_definition(some, others), abs=1e-4)


def test_only_the_bias_corrected_one_is_about_zero_for_few_independent_rows() -> None:
    random = torch.Generator().manual_seed(0)
    samples = [torch.randn(2, 8, 20, generator=random, dtype=torch.float64) for _ in range(400)]
    published, corrected = (
        torch.stack([measure(*sample) for sample in samples]) for measure in (distance_correlation, bias_corrected)
    )
    assert float(published.mean()) > 0.9
    assert abs(float(corrected.mean())) < 4 * float(corrected.std()) / 20 and float(corrected.std()) < 0.3


def test_similar_samples_have_one_and_independent_ones_little() -> None:
    some = torch.randn(400, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    turned = -3 * some.flip(1) + 5
    assert float(distance_correlation(some, turned)) == pytest.approx(1, abs=1e-6)
    other = torch.randn(400, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert float(distance_correlation(some, other)) < 0.2
    # what Pearson's correlation misses
    assert float(distance_correlation(some[:, :1], some[:, :1].square())) > 0.4


@pytest.mark.parametrize("statistic", ["v", "u"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_messages_have_a_finite_gradient(dtype: torch.dtype, statistic: Literal["v", "u"]) -> None:
    images = torch.rand(6, 3, 8, 8)
    smashed = torch.ones(6, 4, 4, 4, dtype=dtype, requires_grad=True)
    defense = NoPeek(2.0, statistic)
    loss = defense.client_loss(images, smashed)
    assert loss is not None
    loss.backward()
    assert float(loss.detach()) == 0
    assert smashed.grad is not None and bool(smashed.grad.isfinite().all())
    least = 3 if statistic == "v" else 4
    assert defense.client_loss(images[: least - 1], smashed[: least - 1]) is None
    assert defense.client_loss(images[:least], smashed[:least]) is not None


def test_it_falls_during_training_of_a_client() -> None:
    torch.manual_seed(0)
    images = torch.rand(48, 3, 1, 1).expand(
        -1, -1, 6, 6
    )  # one colour each: independent rows of many columns look alike
    client = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.ReLU())
    defense, optimiser = NoPeek(1.0), torch.optim.Adam(client.parameters(), lr=0.02)
    found = []
    for _ in range(60):
        loss = defense.client_loss(images, client(images))
        assert loss is not None
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        found.append(float(loss.detach()))
    assert found[0] > 0.7 and found[-1] < found[0] - 0.1


def loop_over_pairs(some: Tensor, others: Tensor) -> Tensor:
    """The definition again, number by number and differentiable; float64 rows, none equal."""

    def centred(rows: Tensor) -> list[list[Tensor]]:
        n = len(rows)
        zero = torch.zeros((), dtype=rows.dtype)
        distances = [[(rows[i] - rows[j]).norm() if i != j else zero for j in range(n)] for i in range(n)]
        means = [torch.stack(row).mean() for row in distances]
        total = torch.stack(means).mean()
        return [[distances[i][j] - means[i] - means[j] + total for j in range(n)] for i in range(n)]

    a, b = centred(some.flatten(1)), centred(others.flatten(1))
    pairs = [(i, j) for i in range(len(some)) for j in range(len(some))]
    covariance = torch.stack([a[i][j] * b[i][j] for i, j in pairs]).sum()
    variances = [torch.stack([matrix[i][j] ** 2 for i, j in pairs]).sum() for matrix in (a, b)]
    return (covariance / (variances[0] * variances[1]).sqrt()).sqrt()


class Encoder(nn.Module):
    """A small client, nonlinear and smooth."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 2, 3, stride=2)

    def forward(self, images: Tensor) -> Tensor:
        return torch.tanh(3 * self.layer(images))


def moved_by_the_penalty(first: Tensor, second: Tensor, sizes: tuple[int, ...], **options: Any) -> list[Tensor]:
    """What one step with rate 1 takes off the weights (clients, 2, 3, 3, 3), where the server's gradient is zero."""
    torch.manual_seed(0)
    training = TrainingConfig(
        clients=len(sizes), server_batch=sum(sizes), momentum=0.0, weight_decay=0.0, **options,
    )  # fmt: skip
    bank = ClientBank(Encoder().double(), len(sizes), training, "loop")
    bank.online["layer.weight"] += torch.randn(
        bank.online["layer.weight"].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    before = {name: value.clone() for name, value in bank.online.items()}
    compute = Compute.resolve(ComputeConfig(device="cpu", precision="float32"))
    clients = Simulated(bank, NoPeek(2.0), training, compute, torch.Generator(), torch.Generator())
    part = ClientBatch(torch.arange(len(sizes)), sizes, torch.empty(sum(sizes), 0))
    sent = clients.send_views(part, first, second, 0, True)
    clients.receive(part, torch.zeros_like(sent.queries), 1.0, torch.ones(len(sizes), dtype=torch.float64))
    return [before["layer.weight"], before["layer.weight"] - bank.online["layer.weight"]]


def views(seed: int, images: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    first, second = (torch.rand(images, 3, 7, 7, dtype=torch.float64, generator=random) for _ in range(2))
    return first, second


@given(seed=st.integers(0, 10**6), sizes=st.lists(st.integers(2, 4), min_size=1, max_size=3), symmetric=st.booleans())
@settings(max_examples=10, deadline=None)
def test_each_client_pays_for_its_own_images_as_a_loop_over_clients_says(
    seed: int, sizes: list[int], symmetric: bool
) -> None:
    """Against clients one by one, with an independent distance correlation; the penalty is a mean over the step."""
    sizes = sizes if symmetric else [size + 1 for size in sizes]
    first, second = views(seed, sum(sizes))
    weights, found = moved_by_the_penalty(first, second, tuple(sizes), symmetric=symmetric)
    start = 0
    for client, size in enumerate(sizes):
        torch.manual_seed(0)
        encoder = Encoder().double()
        encoder.layer.weight.data.copy_(weights[client])
        own = [first[start : start + size], *([second[start : start + size]] if symmetric else [])]
        images = torch.cat(own)
        loss = 2.0 * loop_over_pairs(images, encoder(images)) * size / sum(sizes)
        (expected,) = torch.autograd.grad(loss, encoder.layer.weight)
        torch.testing.assert_close(found[client], expected, rtol=1e-5, atol=1e-9)
        start += size


@given(seed=st.integers(0, 10**6), changed=st.integers(0, 2))
@settings(max_examples=10, deadline=None)
def test_other_clients_images_do_not_change_a_client(seed: int, changed: int) -> None:
    sizes = (2, 3, 2)
    first, second = views(seed, 7)
    _, before = moved_by_the_penalty(first, second, sizes)
    start = sum(sizes[:changed])
    for view in (first, second):
        view[start : start + sizes[changed]] = view[start : start + sizes[changed]].flip(3) ** 2
    _, after = moved_by_the_penalty(first, second, sizes)
    assert [torch.equal(one, other) for one, other in zip(before, after, strict=True)] == [
        client != changed for client in range(3)
    ]


@given(seed=st.integers(0, 10**6))
def test_of_two_rows_it_is_one_and_has_no_gradient_and_of_three_it_has(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    images, smashed = (torch.randn(3, 4, dtype=torch.float64, generator=random) for _ in range(2))
    smashed.requires_grad_(True)
    for rows in (2, 3):
        found = distance_correlation(images[:rows], smashed[:rows])
        (gradient,) = torch.autograd.grad(found, smashed)
        assert (float(found.detach()) == pytest.approx(1, abs=1e-9)) == (rows == 2)
        assert (float(gradient.abs().max()) < 1e-9) == (rows == 2)


@pytest.mark.parametrize(
    ("training", "rows"),
    [
        ({"clients": 10, "server_batch": 10}, 2),
        ({"clients": 10, "server_batch": 20}, 4),
        ({"clients": 10, "server_batch": 20, "symmetric": False}, 2),
        ({"clients": 10, "server_batch": 20, "paper_gradient": "one_sided"}, 2),
        ({"clients": 10, "server_batch": 30, "paper_gradient": "one_sided"}, 3),
        ({"clients": 10, "micro_batch": 1}, 2),
        ({"clients": 1000, "micro_batch": 1, "symmetric": False}, 1),
        ({"clients": 10, "micro_batch": 1, "heterogeneity": {"micro_batch": 8}}, 2),
        ({"clients": 10, "micro_batch": 4, "heterogeneity": {"micro_batch": 1}}, 2),
    ],
)
def test_micro_batches_without_a_gradient_are_refused(training: dict[str, Any], rows: int, compute: Compute) -> None:
    defense = NoPeek()
    context = replace(small_context(defense, compute), training=TrainingConfig(**training))
    assert context.fewest_rows == rows
    if rows >= 3:
        defense.check(context)
        return
    with pytest.raises(ConfigurationError, match=rf"nopeek: a client sends {rows} quer.* larger training.micro_batch"):
        defense.check(context)


def test_the_bias_corrected_one_takes_four_rows(compute: Compute) -> None:
    defense = NoPeek(statistic="u")
    for size, rows in ((2, 4), (1, 2)):
        context = replace(small_context(defense, compute), training=TrainingConfig(clients=2, micro_batch=size))
        assert context.fewest_rows == rows
        if rows == 4:
            defense.check(context)
            continue
        with pytest.raises(ConfigurationError, match=r"statistic u.*it takes 4"):
            defense.check(context)


def test_the_default_of_100_clients_is_refused_before_anything_is_trained(tiny: dict[str, Any]) -> None:
    tiny["defenses"] = [["bottleneck", "nopeek"]]
    tiny["training"] |= {"clients": 16, "server_batch": 16}
    with pytest.raises(ConfigurationError, match="nopeek: a client sends 2 queries"):
        Experiment.from_dict(tiny).plan()
