"""The number of messages that clients send.

Training, devices and privacy guarantees all use these functions, so that their counts agree.
"""

from __future__ import annotations

import torch

from mocosfl_priv.config import TrainingConfig
from mocosfl_priv.training.sampling import Batches


def encodes_once(training: TrainingConfig, frozen_client: bool) -> bool:
    """Whether each view is encoded once, and the result serves as query and as key.

    This holds with `paper_gradient: one_sided`, and for frozen clients, whose online and momentum models are the same.
    Otherwise queries are encoded by the online model and keys by the momentum model; with a symmetric loss, each view
    is then encoded twice.
    """
    return training.paper_gradient == "one_sided" or frozen_client


def rows_per_image(training: TrainingConfig, frozen_client: bool) -> int:
    """Number of queries that a client sends for each image of a step; it sends as many keys."""
    return 2 if training.symmetric and not encodes_once(training, frozen_client) else 1


def messages_per_draw(training: TrainingConfig, frozen_client: bool) -> int:
    """Number of messages (queries and keys) that a client sends each time an image is drawn for a step."""
    return 2 * rows_per_image(training, frozen_client)


def most_draws(batches: Batches, images: int, steps: int) -> int:
    """Return the largest number of times that any of `images` images is drawn in `steps` steps of `batches`.

    batches: an unused source that yields the images' indices, int64 (B,), in place of the images. Where clients have
        unequal amounts of data, or pools are drawn at random, some images are drawn more than once per epoch.
    """
    drawn = torch.zeros(images, dtype=torch.long)
    for _ in range(steps):
        chosen = batches.next().images
        drawn.index_add_(0, chosen, torch.ones_like(chosen))
    return int(drawn.max())
