"""The weighted kNN classifier (Wu et al., CVPR 2018) that self-supervised papers use to monitor training."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

QUERY_CHUNK = 512


def weighted_knn(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, *, classes: int, neighbours: int = 200, temperature: float = 0.1
) -> Tensor:
    """Predict each query's class by a vote of its nearest bank features.

    A neighbour's vote has the weight exp(cosine similarity / temperature).

    bank: float (n, d). bank_labels: int64 (n,), below `classes`. queries: float (m, d). Features need not have unit
    length. At most n neighbours are used. Returns int64 (m,).
    """
    bank = F.normalize(bank, dim=1)
    neighbours = min(neighbours, len(bank))
    predictions = []
    for chunk in F.normalize(queries, dim=1).split(QUERY_CHUNK):
        similarity, index = (chunk @ bank.T).topk(neighbours, dim=1)
        # relative to the nearest neighbour, so that nothing overflows; the ranking of classes is the same
        weights = torch.exp((similarity - similarity[:, :1]) / temperature)
        votes = torch.zeros(len(chunk), classes, device=bank.device, dtype=weights.dtype)
        votes.scatter_add_(1, bank_labels[index], weights)
        predictions.append(votes.argmax(1))
    return torch.cat(predictions)
