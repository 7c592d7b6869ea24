"""Projectors: the heads that map pooled features to the embeddings that the contrastive loss compares.

They are MoCo v2's two-layer head (Chen et al., 2020) and variants of it. None has a BatchNorm. MocoSFL's published code
has one in its large head, but that makes an embedding depend on the other images of the batch.
"""

from __future__ import annotations

from torch import nn

from mocosfl_priv.config import ModelConfig

HEADS: dict[str, tuple[int | None, int]] = {"v1": (None, 1024), "v2": (1024, 1024), "large_v2": (4096, 2048)}
"""Hidden size (None: no hidden layer) and output size of each head."""


def build_projector(model: ModelConfig, features: int) -> nn.Sequential:
    """Build the head that `model` names, which maps (n, features) to (n, projector_out)."""
    hidden, out = HEADS[model.head]
    out = model.projector_out or out
    if hidden is None:
        return nn.Sequential(nn.Linear(features, out))
    hidden = model.projector_hidden or hidden
    return nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, out))
