"""An expert: the model that a defender trains at the server, before there are clients, to hand out its client side."""

from __future__ import annotations

import torch
from torch import Tensor

from mocosfl_priv.errors import ConfigurationError, RunFailedError
from mocosfl_priv.models.split import SplitModel
from mocosfl_priv.plugins import DefenderContext
from mocosfl_priv.seeding import generator
from mocosfl_priv.training.hooks import ClientHooks
from mocosfl_priv.training.mocosfl import TrainedModel, train_mocosfl
from mocosfl_priv.training.sampling import ClientBatch, total_steps

# The expert is trained by one party: what concerns many clients and their traffic has no meaning for it.
ONE_CLIENT = {"clients": 1, "pool": None, "heterogeneity": None, "client_learning_rate": None, "replay": None,
              "divergence_aware": None}  # fmt: skip


def expert_steps(target: Tensor, source: Tensor, batch_size: int, epochs: int) -> int:
    """Steps of `epochs` passes over target plus source images; raises ConfigurationError where there are none."""
    if len(source) + len(target) == 0:
        raise ConfigurationError("the defender has neither source nor target images to train an expert on")
    return total_steps(len(source) + len(target), batch_size, epochs)


def train_expert(
    expert: SplitModel,
    target: Tensor,
    source: Tensor,
    hooks: ClientHooks,
    context: DefenderContext,
    *,
    batch_size: int,
    epochs: int,
    learning_rate: float,
) -> TrainedModel:
    """Train `expert` in place with MoCo's loss and that of `hooks`, for :func:`expert_steps`.

    target, source: uint8 (n, 3, h, w), see :class:`HalfTargetBatches`. Raises RunFailedError when it diverges.
    """
    steps = expert_steps(target, source, batch_size, epochs)
    batches = HalfTargetBatches(target, source, batch_size, generator(context.seed, "expert batches"))
    settings = context.training.model_copy(update={**ONE_CLIENT, "epochs": epochs})
    context.progress.begin("expert", steps)
    try:
        return train_mocosfl(
            expert, batches, settings, steps=steps, compute=context.compute, seed=context.seed, hooks=hooks,
            learning_rate=learning_rate, checkpoints=context.checkpoints, progress=context.progress,
        )  # fmt: skip
    except RunFailedError as error:
        raise RunFailedError(f"the defender's expert: {error}") from error
    finally:
        context.progress.end()


class HalfTargetBatches:
    """Batches of one "client", half target images (over-sampled) and half source images; all source if no target."""

    clients = 1

    def __init__(self, target: Tensor, source: Tensor, batch_size: int, rng: torch.Generator) -> None:
        self.images_per_epoch = len(target) + len(source)
        self._parts = [(source, batch_size - batch_size // 2), (target, batch_size // 2)]
        if len(target) == 0:
            self._parts = [(source, batch_size)]
        if len(source) == 0:
            self._parts = [(target, batch_size)]
        self._rng = rng

    def next(self) -> ClientBatch:
        """The next batch, drawn with replacement: a one-percent target share is repeated within a batch."""
        chosen = [images[torch.randint(len(images), (count,), generator=self._rng)] for images, count in self._parts]
        images = torch.cat(chosen)
        return ClientBatch(torch.zeros(1, dtype=torch.long), (len(images),), images)

    def state(self) -> dict[str, Tensor]:
        """The generator's state; nothing else decides about the next batch."""
        return {"generator": self._rng.get_state()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on where :meth:`state` was taken."""
        self._rng.set_state(state["generator"])
