from __future__ import annotations

import copy
import math
from dataclasses import replace
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from mocosfl_priv.config import ModelConfig, TrainingConfig
from mocosfl_priv.data.partitions import iid
from mocosfl_priv.errors import ConfigurationError, RunFailedError
from mocosfl_priv.models.split import SplitModel, build_split_model, count_parameters
from mocosfl_priv.runtime.compute import Compute
from mocosfl_priv.runtime.seeding import generator
from mocosfl_priv.training import participants
from mocosfl_priv.training.clients import KERNELS
from mocosfl_priv.training.hooks import NoHooks
from mocosfl_priv.training.loop import TrainedModel, train_mocosfl
from mocosfl_priv.training.sampling import PooledClients, PoolShape, data_weights, total_steps
from mocosfl_priv.training.server import info_nce

IMAGES = torch.randint(0, 256, (60, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def model(bottleneck: str = "none") -> SplitModel:
    torch.manual_seed(0)
    config = ModelConfig(backbone="resnet8", width=4, bottleneck=bottleneck, projector_hidden=8, projector_out=8)
    return build_split_model(config, 1, 16, [0.5] * 3, [0.25] * 3)


def train(split: SplitModel, compute: Compute, steps: int = 6, **options: Any) -> TrainedModel:
    settings: dict[str, Any] = {
        "clients": 3,
        "server_batch": 6,
        "queue_size": 16,
        "sync_period": 2,
        "epochs": 2,
        "monitor_every": 1,
    }
    settings |= {k: options.pop(k) for k in list(options) if k in TrainingConfig.model_fields}
    training = TrainingConfig(**settings)
    shape = PoolShape.of(training)
    batches = PooledClients(IMAGES, iid(60, training.clients, generator(0, "p")), shape, generator(0, "b"))
    return train_mocosfl(split, batches, training, steps=steps, compute=compute, seed=0, **options)


def state(split: SplitModel) -> list[Tensor]:
    return [p.detach().clone() for part in (split.client, split.trunk, split.projector) for p in part.parameters()]


def test_same_seed_same_model(compute: Compute) -> None:
    first, second = model(), model()
    train(first, compute)
    train(second, compute)
    assert all(torch.equal(a, b) for a, b in zip(state(first), state(second), strict=True))


def test_training_lowers_the_loss_on_a_fixed_task(compute: Compute) -> None:
    # a memory of two keys and strong learning: the positives must win
    outcome = train(model(), compute, steps=60, epochs=6, queue_size=2, temperature=1.0)
    assert outcome.history[-1]["loss"] < 2 * math.log(3)
    losses = [entry["loss"] for entry in outcome.history]
    assert losses[-1] < losses[0] or len(losses) == 1


def test_frozen_means_frozen(compute: Compute) -> None:
    split = model("C4S2")
    client = [p.detach().clone() for p in split.client.parameters()]
    trunk = [p.detach().clone() for p in split.trunk.parameters()]

    class NoGradientMayArrive(NoHooks):
        def filter_gradient(self, gradient: Tensor, rng: torch.Generator) -> Tensor:
            raise AssertionError("a frozen client received a gradient")

        def client_loss(self, images: Tensor, smashed: Tensor) -> Tensor:
            raise AssertionError("a frozen client was asked for a loss")

        joint_loss = client_loss

    outcome = train(split, compute, frozen_client=True, hooks=NoGradientMayArrive())
    assert all(torch.equal(a, b) for a, b in zip(client, split.client.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(trunk, split.trunk.parameters(), strict=True))
    assert outcome.traffic.gradient_down == outcome.traffic.weights_up == outcome.traffic.weights_down == 0
    assert outcome.traffic.smashed_up > 0


@pytest.mark.parametrize(("symmetric", "models"), [(True, 2), (False, 2), (True, 1)])
def test_traffic_is_three_vectors_per_view_and_weights_at_syncs(compute: Compute, symmetric: bool, models: int) -> None:
    split = model()
    outcome = train(split, compute, steps=6, symmetric=symmetric, average_momentum_models=models == 2)
    per_view = 4 * math.prod(split.smashed_shape) * 6 * 6 * (2 if symmetric else 1)  # 6 steps of 6 images
    assert outcome.traffic.smashed_up == 2 * per_view
    assert outcome.traffic.gradient_down == per_view
    assert outcome.traffic.weights_up == outcome.traffic.weights_down
    assert outcome.traffic.weights_up == models * 3 * 3 * 4 * count_parameters(split.client)


@pytest.mark.parametrize(
    ("options", "up", "down"),
    [
        ({"paper_gradient": "one_sided"}, 2, 1),
        ({"paper_gradient": "one_sided", "symmetric": False}, 2, 1),
        ({"frozen_client": True}, 2, 0),
        ({"frozen_client": True, "symmetric": False}, 2, 0),
    ],
)
def test_a_single_encoding_of_each_view_moves_two_vectors_up(
    compute: Compute, options: dict[str, Any], up: int, down: int
) -> None:
    split = model()
    outcome = train(split, compute, steps=6, **options)
    vector = 4 * math.prod(split.smashed_shape) * 6 * 6  # 6 steps of 6 images
    assert (outcome.traffic.smashed_up, outcome.traffic.gradient_down) == (up * vector, down * vector)


@pytest.mark.parametrize("kernel", ["grouped", "matmul", "loop", "measure"])
def test_kernels_agree_and_the_chosen_one_is_recorded(compute: Compute, kernel: Any) -> None:
    one, other = model(), model()
    train(one, compute)
    outcome = train(other, replace(compute, client_kernel=kernel))
    assert outcome.kernel == kernel or (kernel == "measure" and outcome.kernel in KERNELS)
    for a, b in zip(state(one), state(other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("backbone", ["resnet8", "vit_tiny", "mobilenetv2"])
def test_clients_of_every_kind_train_in_bfloat16(compute: Compute, backbone: str, kernel: Any) -> None:
    """Mixed types under vmap: the client's convolutions, norms and bottleneck all see bfloat16."""
    torch.manual_seed(0)
    config = ModelConfig(backbone=backbone, width=12, bottleneck="C4S2", projector_hidden=8, projector_out=8)
    split = build_split_model(config, 2, 16, [0.5] * 3, [0.25] * 3)
    mixed, full = copy.deepcopy(split), copy.deepcopy(split)
    low = train(mixed, replace(compute, bfloat16=True, client_kernel=kernel), steps=2, learning_rate=1e-3)
    high = train(full, compute, steps=2, learning_rate=1e-3)
    assert low.history[-1]["loss"] == pytest.approx(high.history[-1]["loss"], rel=0.05)
    assert all(not torch.equal(a, b) for a, b in zip(state(split), state(mixed), strict=True))


def test_the_number_of_rows_in_a_pass_changes_nothing(compute: Compute) -> None:
    with patch.object(participants, "moco_v2_view", lambda images, _: images.float() / 255):
        one, other = model(), model()
        train(one, compute, clients=6)
        train(other, replace(compute, rows_per_pass=4), clients=6)
    for a, b in zip(state(one), state(other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_rich_clients_bring_more_images_and_hold_more_data() -> None:
    training = TrainingConfig(clients=10, micro_batch=1, heterogeneity={"clients": 0.2, "data": 0.8, "micro_batch": 16})
    shape = PoolShape.of(training)
    weights = data_weights(training)
    assert [shape.size_of(client) for client in range(10)] == [16, 16] + [1] * 8
    assert (shape.images_per_client, shape.images) == (4.0, 40)
    assert weights is not None
    partition = iid(60, 10, generator(0, "p"), weights)
    assert sum(map(len, partition[:2])) == 48
    batch = PooledClients(IMAGES, partition, shape, generator(0, "b")).next()
    assert batch.sizes == (16, 16) + (1,) * 8 and len(batch.images) == 40
    parts = list(batch.chunks(17))
    assert [part.sizes for part in parts] == [(16,), (16, 1), (1,) * 7]
    assert torch.equal(torch.cat([part.images for part in parts]), batch.images)
    assert torch.equal(torch.cat([part.pool for part in parts]), batch.pool)


def test_partial_micro_batches_are_carried_or_dropped() -> None:
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 3, 2, 2).contiguous()
    for drop in (False, True):
        batches = PooledClients(images, [torch.arange(5)], PoolShape(1, 2), generator(0, "b"), drop)
        drawn = [batches.next().images[:, 0, 0, 0].tolist() for _ in range(5)]
        passes = [drawn[0] + drawn[1], drawn[2] + drawn[3]]
        assert all(len(set(one_pass)) == 4 for one_pass in passes[: 1 + drop])
        everything = sorted(image for one in drawn for image in one)
        assert (everything == sorted([*range(5), *range(5)])) is not drop


def test_checkpoint_with_the_best_validation_is_kept(compute: Compute) -> None:
    scores = iter([0.2, 0.9, 0.1, 0.3])
    seen: list[list[Tensor]] = []

    def validate(split: SplitModel) -> float:
        seen.append(state(split))
        return next(scores)

    split = model()
    outcome = train(split, compute, steps=8, epochs=4, validate=validate)
    assert len(outcome.history) == 4
    assert outcome.selected_step == 4
    assert all(torch.equal(a, b) for a, b in zip(state(split), seen[1], strict=True))


def stacked(copies: tuple[dict[str, Tensor], ...]) -> dict[str, Tensor]:
    return {name: torch.stack([copy[name] for copy in copies]) for name in copies[0]}


def test_two_participants_copies_are_kept_as_they_were_before_averaging(compute: Compute) -> None:
    split = model()
    train(split, compute, steps=5, clients=2, server_batch=6, sync_period=1000)
    learning = stacked(split.participants)
    just_averaged = model()
    train(just_averaged, compute, steps=5, clients=2, server_batch=6, sync_period=6)  # after the fifth step
    for name, parameter in split.client.named_parameters():
        first, second = learning[name]
        assert not torch.equal(first, second)
        torch.testing.assert_close((first + second) / 2, parameter.detach())
        assert torch.equal(stacked(just_averaged.participants)[name], learning[name])


def test_the_copies_kept_are_those_of_the_chosen_checkpoint(compute: Compute) -> None:
    scores, seen = iter([0.1, 0.9, 0.2, 0.3]), []

    def validate(split: SplitModel) -> float:
        seen.append(stacked(split.participants))
        return next(scores)

    split = model()
    train(split, compute, steps=8, epochs=4, sync_period=1000, validate=validate)
    kept = stacked(split.participants)
    assert all(torch.equal(kept[name], seen[1][name]) for name in kept)
    assert not any(torch.equal(kept[name], seen[3][name]) for name in kept)


@pytest.mark.parametrize("options", [{"frozen_client": True}, {"sync_period": 1, "average_momentum_models": True}])
def test_clients_that_cannot_differ_have_equal_copies(compute: Compute, options: dict[str, Any]) -> None:
    split = model()
    train(split, compute, **options)
    for name, (first, second) in stacked(split.participants).items():
        assert torch.equal(first, second) and torch.equal(first, split.client.get_parameter(name))


def test_diverging_training_says_so(compute: Compute) -> None:
    with pytest.raises(RunFailedError, match="training diverged"):
        train(model(), compute, learning_rate=1e30)


def test_hooks_sit_where_they_should(compute: Compute) -> None:
    calls: list[str] = []

    class Recorder(NoHooks):
        def protect(self, smashed: Tensor, rng: torch.Generator, kind: object = None) -> Tensor:
            calls.append("protect" if smashed.requires_grad else "protect keys")
            return 2 * smashed

        def filter_gradient(self, gradient: Tensor, rng: torch.Generator) -> Tensor:
            calls.append("gradient")
            return torch.zeros_like(gradient)

        def client_loss(self, images: Tensor, smashed: Tensor) -> Tensor:
            calls.append("loss")
            assert float(images.min()) >= 0 and float(images.max()) <= 1
            assert len(images) == len(smashed) == 4  # both views of the two images of one client
            return 0 * smashed.sum()

        def joint_loss(self, images: Tensor, smashed: Tensor) -> None:
            calls.append("joint loss")
            assert len(images) == len(smashed) == 12

    split = model()
    before = [p.detach().clone() for p in split.client.parameters()]
    train(split, compute, steps=1, hooks=Recorder(), weight_decay=0.0)
    assert calls == ["protect", "protect keys", "gradient", "joint loss", *["loss"] * 3]
    # the filter removed the server's gradient and the loss is flat: the client has not moved
    for a, b in zip(before, split.client.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("settings", "pool", "micro_batch"),
    [
        ({"clients": 5}, 5, 20),
        ({"clients": 20}, 20, 5),
        ({"clients": 100}, 100, 1),
        ({"clients": 150}, 150, 1),
        ({"clients": 1000}, 100, 1),
        ({"clients": 1000, "pool": 10}, 10, 10),
        ({"clients": 4, "micro_batch": 3}, 4, 3),
    ],
)
def test_server_batch_is_made_up_as_in_the_paper(settings: dict[str, int], pool: int, micro_batch: int) -> None:
    shape = PoolShape.of(TrainingConfig(**settings))
    assert (shape.pool, shape.micro_batch) == (pool, micro_batch)


def test_clients_draw_their_own_images_and_all_of_them() -> None:
    images = torch.arange(30, dtype=torch.uint8).view(30, 1, 1, 1).expand(30, 3, 2, 2).contiguous()
    partition = iid(30, 3, generator(0, "p"))
    batches = PooledClients(images, partition, PoolShape(3, 2), generator(0, "b"))
    drawn: list[set[int]] = [set(), set(), set()]
    for _ in range(5):  # 5 steps of 2 images: one pass over 10 images each
        batch = batches.next()
        for client in range(3):
            drawn[client] |= set(batch.images[2 * client : 2 * client + 2, 0, 0, 0].tolist())
    assert drawn == [set(part.tolist()) for part in partition]


def test_pools_are_redrawn_each_round() -> None:
    partition = iid(40, 20, generator(0, "p"))
    batches = PooledClients(IMAGES[:40], partition, PoolShape(4, 1), generator(0, "b"))
    pools = [tuple(batches.next().pool.tolist()) for _ in range(20)]
    assert all(len(set(pool)) == 4 for pool in pools)
    assert pools[0] == pools[1]  # two images per client: a round has two steps
    assert len(set(pools)) > 5


def test_a_pool_is_averaged_before_another_takes_over() -> None:
    partition = iid(40, 20, generator(0, "p"))
    batches = PooledClients(IMAGES[:40], partition, PoolShape(4, 1), generator(0, "b"))
    drawn = [batches.next() for _ in range(12)]
    for now, following in pairwise(drawn):
        assert now.pool_changes or torch.equal(now.pool, following.pool)
    everybody = PooledClients(IMAGES[:40], partition, PoolShape(20, 1), generator(0, "b"))
    assert not any(everybody.next().pool_changes for _ in range(12))


def test_what_a_sampled_pool_learned_survives_the_next_pool(compute: Compute) -> None:
    """Two images per client, pools of two: without averaging at the change every update would be overwritten."""
    split = model()
    before = [p.detach().clone() for p in split.client.parameters()]
    outcome = train(split, compute, steps=8, clients=30, pool=2, micro_batch=1, sync_period=10_000, weight_decay=0.0)
    both = 2 * 4 * count_parameters(split.client)  # bytes of an online and a momentum model
    assert outcome.traffic.weights_up == 4 * 2 * both  # four rounds of two steps
    assert outcome.traffic.weights_down == 4 * 30 * both
    assert any(not torch.equal(a, b) for a, b in zip(before, split.client.parameters(), strict=True))


def test_a_client_without_images_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="got no image"):
        PooledClients(IMAGES, [torch.arange(3), torch.empty(0, dtype=torch.long)], PoolShape(2, 1), generator(0))


def test_an_epoch_of_less_than_a_step_is_a_step() -> None:
    assert total_steps(10, 100, 1) == 1


def test_info_nce_by_hand() -> None:
    q = torch.nn.functional.normalize(torch.randn(4, 5, dtype=torch.float64), dim=1)
    k = torch.nn.functional.normalize(torch.randn(4, 5, dtype=torch.float64), dim=1)
    memory = torch.nn.functional.normalize(torch.randn(7, 5, dtype=torch.float64), dim=1)
    expected = 0.0
    for row in range(4):
        positive = math.exp(float(q[row] @ k[row]) / 0.2)
        negatives = sum(math.exp(float(q[row] @ m) / 0.2) for m in memory)
        expected -= math.log(positive / (positive + negatives)) / 4
    assert float(info_nce(q, k, memory, 0.2)) == pytest.approx(expected, rel=1e-12)
