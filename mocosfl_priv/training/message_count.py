"""How many messages clients send: the one place that counts them, for training, devices and guarantees."""

from __future__ import annotations

import torch

from mocosfl_priv.config import TrainingConfig
from mocosfl_priv.training.sampling import Batches


def encodes_once(training: TrainingConfig, frozen_client: bool) -> bool:
    """Whether a single encoding of each view serves as query and as key; else both models of a client encode it.

    That is so one-sided, and for frozen clients, whose two models are one.
    """
    return training.paper_gradient == "one_sided" or frozen_client


def rows_per_image(training: TrainingConfig, frozen_client: bool) -> int:
    """Queries, and as many keys, that a client sends for an image of a step."""
    return 2 if training.symmetric and not encodes_once(training, frozen_client) else 1


def messages_per_draw(training: TrainingConfig, frozen_client: bool) -> int:
    """Messages that an image gives rise to each time that it is drawn for a step."""
    return 2 * rows_per_image(training, frozen_client)


def most_draws(batches: Batches, images: int, steps: int) -> int:
    """How often the most often drawn of `images` images is drawn in `steps` steps of `batches`.

    batches: a source that was not used yet, whose "images" are their own indices. Where clients have unequal data, or
    pools are drawn, some images come more often than once per epoch.
    """
    drawn = torch.zeros(images, dtype=torch.long)
    for _ in range(steps):
        chosen = batches.next().images
        drawn.index_add_(0, chosen, torch.ones_like(chosen))
    return int(drawn.max())
