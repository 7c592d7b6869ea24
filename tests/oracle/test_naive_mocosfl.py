"""The fast engine against the loop, in float64."""

from __future__ import annotations

import math
from unittest.mock import patch

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mocosfl_priv.compute import Compute
from mocosfl_priv.config import ModelConfig, TrainingConfig
from mocosfl_priv.models.split import build_split_model
from mocosfl_priv.seeding import generator
from mocosfl_priv.training import mocosfl
from mocosfl_priv.training.clients import ClientBank
from mocosfl_priv.training.hooks import NoHooks
from mocosfl_priv.training.server import FeatureMemory, MocoServer
from tests.oracle.naive_mocosfl import NaiveMocoSFL

STEPS = 5


@settings(max_examples=12)
@given(
    clients=st.integers(1, 4),
    pool_size=st.integers(1, 4),
    micro_batch=st.integers(1, 3),
    cut=st.integers(1, 2),
    bottleneck=st.sampled_from(["none", "C4S2"]),
    symmetric=st.booleans(),
    sync_period=st.integers(1, 3),
    average_momentum_models=st.booleans(),
    seed=st.integers(0, 3),
)
def test_engine_equals_the_loop(
    clients: int, pool_size: int, micro_batch: int, cut: int, bottleneck: str, symmetric: bool, sync_period: int,
    average_momentum_models: bool, seed: int,
) -> None:  # fmt: skip
    training = TrainingConfig(
        clients=clients, symmetric=symmetric, sync_period=sync_period, queue_size=7,
        average_momentum_models=average_momentum_models, learning_rate=0.1,
    )  # fmt: skip
    torch.manual_seed(seed)
    config = ModelConfig(backbone="resnet8", width=4, bottleneck=bottleneck, projector_hidden=6, projector_out=5)
    model = build_split_model(config, cut, 12, [0.5] * 3, [0.25] * 3)
    for part in (model.client, model.trunk, model.projector):
        part.double()
    compute = Compute(torch.device("cpu"), bfloat16=False, threads=2)
    server = MocoServer(model.trunk, model.projector, training, compute, generator(seed, "memory"))
    server.memory.keys = server.memory.keys.double()
    naive = NaiveMocoSFL(model, training, server.memory.keys, STEPS)
    bank = ClientBank(model.client, clients, training)

    for step in range(STEPS):
        pool = torch.randperm(clients)[: min(pool_size, clients)].sort().values
        views = torch.rand(2, len(pool), micro_batch, 3, 12, 12, dtype=torch.float64)
        rate = mocosfl.cosine_rate(training.learning_rate, step, STEPS)
        flat_views = iter([views[0].flatten(0, 1), views[1].flatten(0, 1)])
        with patch.object(mocosfl, "moco_v2_view", lambda *_, given=flat_views: next(given)):
            loss = mocosfl._train_step(
                pool, torch.zeros(len(pool), micro_batch, 3, 12, 12, dtype=torch.uint8), bank, server, NoHooks(), rate,
                symmetric, compute, generator(0), generator(0), mocosfl.Traffic(),
            )  # fmt: skip
        if (step + 1) % sync_period == 0:
            bank.average(pool)
        expected = naive.step(pool.tolist(), views[0], views[1])
        assert math.isclose(float(loss), expected, rel_tol=1e-9)

    for client in range(clients):
        for stacked, model_of in ((bank.online, naive.clients), (bank.key, naive.client_keys)):
            for name, parameter in model_of[client].named_parameters():
                torch.testing.assert_close(stacked[name][client], parameter.detach(), rtol=1e-9, atol=1e-11)
    for ours, theirs in ((server.online, naive.server), (server.key, naive.server_key)):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-9, atol=1e-11)


@given(size=st.integers(1, 9), batches=st.lists(st.integers(0, 12), max_size=5))
def test_feature_memory_keeps_the_newest_keys(size: int, batches: list[int]) -> None:
    memory = FeatureMemory(size, 1, torch.Generator().manual_seed(0))
    seen = memory.keys.flatten().tolist()
    counter = 10.0
    for count in batches:
        fresh = [counter + i for i in range(count)]
        counter += count
        memory.enqueue(torch.tensor(fresh).view(-1, 1))
        seen += fresh
    assert sorted(memory.keys.flatten().tolist()) == sorted(seen[-size:])
