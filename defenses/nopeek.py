"""NoPeek: less statistical dependence between images and messages (Vepakomma et al., ICDM Workshops 2020)."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from mocosfl_priv import Defense

SMALLEST = 1e-12
CONSTANT = 1e-5  # distances below this are none


class NoPeek(Defense):
    """The clients' loss grows by alpha times the distance correlation of a batch's images and messages.

    Distance correlation (Szekely et al., Annals of Statistics 2007) is 0 for independent variables and 1 for similar
    ones. It looks at how images of a batch stand to each other, not at whether one of them can be reconstructed.

    alpha: weight beside the contrastive loss.
    """

    def __init__(self, alpha: Annotated[float, Field(ge=0)] = 1.0) -> None:
        self.alpha = alpha

    def client_loss(self, images: Tensor, smashed: Tensor) -> Tensor | None:
        if len(images) < 2:
            return None
        return self.alpha * distance_correlation(images, smashed)


def distance_correlation(some: Tensor, others: Tensor) -> Tensor:
    """Of two samples in rows (n, ...), n >= 2; scalar in [0, 1], differentiable. The V-statistic of the definition.

    0 where one of the samples is constant.
    """
    first, second = _centred_distances(some.flatten(1)), _centred_distances(others.flatten(1))
    covariance = (first * second).mean().clamp(min=0)
    spreads = torch.stack([first.square().mean(), second.square().mean()]).sqrt()
    # the outer root has no gradient at zero
    squared = covariance / spreads.clamp(min=CONSTANT).prod()
    return squared.clamp(min=SMALLEST).sqrt() * (spreads.min() > CONSTANT)


def _centred_distances(rows: Tensor) -> Tensor:
    """Euclidean distances of all pairs, with the means of rows and columns taken off, (n, n)."""
    rows = rows.float() if rows.dtype in (torch.bfloat16, torch.float16) else rows
    # from products instead of differences, which would take n times the memory; around the mean, for precision
    rows = rows - rows.mean(0)
    products = rows @ rows.T
    squares = products.diagonal()
    squared = (squares[:, None] + squares[None, :] - 2 * products).clamp(min=0)
    off_diagonal = 1 - torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
    distances = (squared + SMALLEST).sqrt() * off_diagonal
    return distances - distances.mean(0, keepdim=True) - distances.mean(1, keepdim=True) + distances.mean()
