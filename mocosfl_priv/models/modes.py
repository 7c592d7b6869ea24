"""Training and evaluation mode of networks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def in_eval_mode(*networks: nn.Module) -> Iterator[None]:
    """Put networks into evaluation mode, and every one of their modules back into its own mode afterwards.

    A look at a network must not change it: in training mode, a BatchNorm would learn from the images that are sent
    through it, and a Dropout would draw random numbers.
    """
    modes = [(module, module.training) for network in networks for module in network.modules()]
    for network in networks:
        network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
