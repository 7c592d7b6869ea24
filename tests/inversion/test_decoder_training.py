from __future__ import annotations

import time

import torch
from torch import Tensor

from mocosfl_priv import Budget
from mocosfl_priv.inversion.decoder_training import affordable


def test_where_the_clock_ends_a_training_a_slow_client_encodes_what_that_time_allows() -> None:
    images, asked = torch.rand(500, 3, 4, 4), list[int]()

    def slow(batch: Tensor) -> Tensor:
        asked.append(len(batch))
        time.sleep(0.02)
        return batch.mean((2, 3))

    found = affordable(slow, images, Budget(seconds=0.1))
    assert len(found) == 64 and torch.equal(found, images[:64].mean((2, 3)))
    assert len(affordable(slow, images, Budget(seconds=1e6))) == 500
    asked.clear()
    assert len(affordable(slow, images, Budget(steps=3))) == 500 and asked == [500]
