"""The fast engine against the loop, in float64."""

from __future__ import annotations

import math
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mocosfl_priv.config import ModelConfig, TrainingConfig
from mocosfl_priv.models.split import SplitModel, build_split_model
from mocosfl_priv.runtime.compute import Compute
from mocosfl_priv.training import participants
from mocosfl_priv.training.clients import ClientBank, EqualClients
from mocosfl_priv.training.mocosfl import MocoSFL
from mocosfl_priv.training.sampling import ClientBatch, PoolShape
from mocosfl_priv.training.server import FeatureMemory
from tests.oracle.naive_mocosfl import NaiveMocoSFL

STEPS, SIZE = 5, 12


class GivenBatches:
    """Steps with the pools that the test has chosen; their images are ignored."""

    images_per_epoch = 1

    def __init__(self, clients: int, sizes: list[int], pools: list[list[int]]) -> None:
        self.clients, self.sizes, self.pools = clients, sizes, pools

    def next(self) -> ClientBatch:
        pool = self.pools.pop(0)
        sizes = tuple(self.sizes[client] for client in pool)
        return ClientBatch(torch.tensor(pool), sizes, torch.zeros(sum(sizes), 3, SIZE, SIZE, dtype=torch.uint8))

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None: ...


def double_model(seed: int, cut: int, **options: Any) -> SplitModel:
    torch.manual_seed(seed)
    config = ModelConfig(backbone="resnet8", width=4, projector_hidden=6, projector_out=5, **options)
    model = build_split_model(config, cut, SIZE, [0.5] * 3, [0.25] * 3)
    for part in (model.client, model.trunk, model.projector):
        part.double()
    return model


def compare(
    model: SplitModel, training: TrainingConfig, sizes: list[int], pools: list[list[int]], rows_per_pass: int = 256,
    kernel: Any = "auto",
) -> MocoSFL:  # fmt: skip
    """Run both on the same views; assert that losses and all parameters agree."""
    compute = Compute(torch.device("cpu"), False, 2, rows_per_pass, kernel)
    batches = GivenBatches(training.clients, sizes, [list(pool) for pool in pools])
    engine = MocoSFL(model, batches, training, steps=STEPS, compute=compute, seed=0)
    engine.server.memory.keys = engine.server.memory.keys.double()
    naive = NaiveMocoSFL(model, training, engine.server.memory.keys, STEPS)
    for pool in pools:
        views = [[torch.rand(sizes[c], 3, SIZE, SIZE, dtype=torch.float64) for c in pool] for _ in range(2)]
        flat = [torch.cat(view) for view in views]
        drawn = {"turn": 0, "start": 0}

        def next_view(images: Tensor, *_: Any, flat: list[Tensor] = flat, drawn: dict[str, int] = drawn) -> Tensor:
            """The engine asks for the first and then the second view of each part of the batch."""
            view = flat[drawn["turn"]][drawn["start"] : drawn["start"] + len(images)]
            drawn["start"] += len(images) * drawn["turn"]
            drawn["turn"] = 1 - drawn["turn"]
            return view

        with patch.object(participants, "moco_v2_view", next_view):
            loss = engine.step()
        expected = naive.step(pool, views[0], views[1])
        assert math.isclose(float(loss), expected, rel_tol=1e-9)
    bank = engine.clients
    assert isinstance(bank, ClientBank)
    for client in range(training.clients):
        row = 0 if isinstance(bank, EqualClients) else client
        for stacked, model_of in ((bank.online, naive.clients), (bank.key, naive.client_keys)):
            for name, parameter in model_of[client].named_parameters():
                torch.testing.assert_close(stacked[name][row], parameter.detach(), rtol=1e-9, atol=1e-10)
    for ours, theirs in ((engine.server.online, naive.server), (engine.server.key, naive.server_key)):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-9, atol=1e-10)
    return engine


@settings(max_examples=25)
@given(
    data=st.data(),
    clients=st.integers(1, 4),
    cut=st.integers(1, 2),
    norm=st.sampled_from(["group", "layer", "instance"]),
    bottleneck=st.sampled_from(["none", "C4S2", "noReLUC2S1"]),
    client_residuals=st.booleans(),
    symmetric=st.booleans(),
    paper_gradient=st.sampled_from(["both", "one_sided"]),
    feature_memory=st.sampled_from(["shared", "per_client"]),
    ema_update=st.sampled_from(["after_step", "before_encoding"]),
    sync_period=st.integers(1, 3),
    average_base=st.sampled_from(["pool", "client_0"]),
    average_momentum_models=st.booleans(),
    divergence_aware=st.sampled_from([None, 0.3, 1.0]),
    schedules=st.sampled_from([("per_step", "cosine"), ("per_epoch", "oscillating")]),
    client_learning_rate=st.sampled_from([None, 0.03]),
    rows_per_pass=st.sampled_from([1, 4, 256]),
    kernel=st.sampled_from(["auto", "grouped", "matmul", "loop"]),
    seed=st.integers(0, 3),
)
def test_engine_equals_the_loop(
    data: st.DataObject, clients: int, cut: int, norm: Any, bottleneck: str, client_residuals: bool,
    schedules: tuple[Any, Any], rows_per_pass: int, kernel: str, seed: int, **options: Any,
) -> None:  # fmt: skip
    pool = st.lists(st.integers(0, clients - 1), min_size=1, unique=True).map(sorted)
    pools = data.draw(st.lists(pool, min_size=STEPS, max_size=STEPS))
    sizes = data.draw(st.lists(st.integers(1, 3), min_size=clients, max_size=clients))
    smallest = min(len(pool) for pool in pools)
    training = TrainingConfig(
        clients=clients, pool=smallest, queue_size=8, learning_rate=0.1, epochs=2, server_schedule=schedules[0],
        client_schedule=schedules[1], **options,
    )  # fmt: skip
    model = double_model(seed, cut, norm=norm, bottleneck=bottleneck, client_residuals=client_residuals)
    compare(model, training, sizes, pools, rows_per_pass, kernel)


@given(clients=st.integers(1, 3), micro_batch=st.integers(1, 2), rows_per_pass=st.sampled_from([2, 256]))
@settings(max_examples=5)
def test_clients_that_cannot_differ_are_computed_as_one(clients: int, micro_batch: int, rows_per_pass: int) -> None:
    training = TrainingConfig(
        clients=clients, queue_size=7, learning_rate=0.1, sync_period=1, average_momentum_models=True
    )
    pools = [list(range(clients))] * STEPS
    engine = compare(double_model(0, 1), training, [micro_batch] * clients, pools, rows_per_pass)
    assert isinstance(engine.clients, EqualClients)


def test_sampled_clients_are_never_computed_as_one() -> None:
    """Averaged after every step, momentum models too, but only one of them takes part in a step."""
    training = TrainingConfig(
        clients=2, pool=1, queue_size=8, learning_rate=0.1, sync_period=1, average_momentum_models=True
    )
    engine = compare(double_model(0, 1), training, [1, 1], [[0], [1], [0], [1], [0]])
    assert not isinstance(engine.clients, EqualClients)
    by_rule = TrainingConfig(clients=300, sync_period=1, average_momentum_models=True)
    assert not EqualClients.fits(by_rule, PoolShape.of(by_rule).pool)


@pytest.mark.parametrize("backbone", ["mobilenetv2", "vgg11", "vit_tiny"])
def test_other_families_equal_the_loop(backbone: str) -> None:
    torch.manual_seed(0)
    width = {"mobilenetv2": 8, "vgg11": 8, "vit_tiny": 12}[backbone]
    config = ModelConfig(backbone=backbone, width=width, projector_hidden=6, projector_out=5)
    model = build_split_model(config, 2, 32, [0.5] * 3, [0.25] * 3)
    for part in (model.client, model.trunk, model.projector):
        part.double()
    training = TrainingConfig(clients=2, queue_size=8, learning_rate=0.01, sync_period=2)
    with patch("tests.oracle.test_naive_mocosfl.SIZE", 32):
        compare(model, training, [1, 2], [[0, 1], [1], [0, 1]])


@given(size=st.integers(1, 9), batches=st.lists(st.integers(0, 12), max_size=5))
def test_feature_memory_keeps_the_newest_keys(size: int, batches: list[int]) -> None:
    memory = FeatureMemory(1, size, 1, torch.Generator().manual_seed(0))
    seen = memory.keys.flatten().tolist()
    counter = 10.0
    for count in batches:
        fresh = [counter + i for i in range(count)]
        counter += count
        memory.enqueue(torch.tensor(fresh).view(-1, 1), torch.arange(count) // 2)
        seen += fresh
    assert sorted(memory.keys.flatten().tolist()) == sorted(seen[-size:])


@given(size=st.integers(1, 4), batches=st.lists(st.lists(st.integers(0, 2), max_size=9).map(sorted), max_size=5))
def test_clients_keep_memories_of_their_own(size: int, batches: list[list[int]]) -> None:
    memory = FeatureMemory(3, size, 1, torch.Generator().manual_seed(0))
    seen = [ring.flatten().tolist() for ring in memory.keys]
    counter = 10.0
    for client_ids in batches:
        keys = [counter + i for i in range(len(client_ids))]
        counter += len(client_ids)
        memory.enqueue(torch.tensor(keys).view(-1, 1), torch.tensor(client_ids, dtype=torch.long))
        for key, owner in zip(keys, client_ids, strict=True):
            seen[owner].append(key)
    for ring, expected in zip(memory.keys, seen, strict=True):
        assert sorted(ring.flatten().tolist()) == sorted(expected[-size:])
    picked = memory.of(torch.tensor([2, 0]))
    assert torch.equal(picked, memory.keys[[2, 0]])
