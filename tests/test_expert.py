from __future__ import annotations

import torch

from mocosfl_priv.expert import HalfTargetBatches


def test_batches_are_half_target() -> None:
    target, source = torch.zeros(3, 3, 8, 8, dtype=torch.uint8), torch.ones(50, 3, 8, 8, dtype=torch.uint8)
    batch = HalfTargetBatches(target, source, 16, torch.Generator().manual_seed(0)).next()
    assert batch.images.shape == (16, 3, 8, 8) and batch.sizes == (16,)
    assert batch.images[:, 0, 0, 0].tolist() == [1] * 8 + [0] * 8
    none = HalfTargetBatches(target[:0], source, 16, torch.Generator().manual_seed(0)).next()
    assert none.images.min() == 1
