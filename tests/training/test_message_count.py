"""How many messages an image gives rise to: what an accountant of privacy needs to know."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from mocosfl_priv.config import ModelConfig, TrainingConfig
from mocosfl_priv.models.split import build_split_model
from mocosfl_priv.runtime.compute import Compute
from mocosfl_priv.training.hooks import NoHooks
from mocosfl_priv.training.loop import train_mocosfl
from mocosfl_priv.training.message_count import messages_per_draw, most_draws
from mocosfl_priv.training.sampling import PooledClients, PoolShape


class Counting(NoHooks):
    """Counts the messages that leave a client."""

    def __init__(self) -> None:
        self.messages = 0

    def protect(self, smashed: Tensor, rng: torch.Generator, kind: object = None) -> Tensor:
        self.messages += len(smashed)
        return smashed


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(("symmetric", "sides"), [(True, "both"), (True, "one_sided"), (False, "both")])
def test_messages_per_draw_are_those_that_training_sends(
    frozen: bool, symmetric: bool, sides: Literal["both", "one_sided"], compute: Compute
) -> None:
    training = TrainingConfig(
        clients=2, server_batch=4, queue_size=8, epochs=1, symmetric=symmetric, paper_gradient=sides
    )
    model = build_split_model(
        ModelConfig(backbone="resnet8", width=4, projector_hidden=4, projector_out=4), 1, 16, [0.5] * 3, [0.25] * 3
    )
    images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    batches = PooledClients(
        images, [torch.arange(4), torch.arange(4, 8)], PoolShape.of(training), torch.Generator().manual_seed(0)
    )
    hooks = Counting()
    train_mocosfl(model, batches, training, steps=2, compute=compute, seed=0, hooks=hooks, frozen_client=frozen)
    assert hooks.messages == 8 * messages_per_draw(training, frozen)  # each image is drawn once


def clients(sizes: list[int], **training: Any) -> PooledClients:
    shape = PoolShape.of(TrainingConfig(clients=len(sizes), **training))
    parts = list(torch.arange(sum(sizes)).split(sizes))
    return PooledClients(torch.arange(sum(sizes)), parts, shape, torch.Generator().manual_seed(3))


def test_equal_clients_draw_each_image_once_per_epoch() -> None:
    assert most_draws(clients([8, 8], server_batch=4), 16, steps=3 * 4) == 3


def test_a_client_with_little_data_draws_it_more_often() -> None:
    """Every client brings two images to a step: in eight steps the small one walks through its four images 4 times."""
    assert most_draws(clients([28, 4], server_batch=4), 32, steps=8) == 4


def test_draws_of_random_pools_are_those_of_the_training() -> None:
    sizes: list[int] = [4] * 6
    real, drawn = clients(sizes, server_batch=4, pool=2), [0] * 24
    for _ in range(30):
        for image in real.next().images.tolist():
            drawn[image] += 1
    assert most_draws(clients(sizes, server_batch=4, pool=2), 24, steps=30) == max(drawn) > 30 * 4 / 24
