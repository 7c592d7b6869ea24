"""NoPeek: less statistical dependence between images and messages (Vepakomma et al., ICDM Workshops 2020).

"NoPeek: Information leakage reduction to share activations in distributed deep learning",
https://arxiv.org/abs/2008.09161
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from mocosfl_priv import ConfigurationError, DefenderContext, Defense

SMALLEST = 1e-12
CONSTANT = 1e-5  # distances below this are none
LEAST_ROWS = 3  # of two, the distance correlation is 1, whatever they are


class NoPeek(Defense):
    """The loss of each client grows by alpha times the distance correlation of its own images and messages of a step.

    Distance correlation (Szekely et al., Annals of Statistics 2007, "Measuring and testing dependence by correlation of
    distances", https://doi.org/10.1214/009053607000000505) is 0 for independent variables and 1 for similar ones. It
    looks at how images of a batch stand to each other, not at whether one of them can be reconstructed.

    A client has only the rows of its own micro-batch: with a symmetric loss, two views of each of its images. Of two
    rows the distance correlation is always 1, so its gradient is 0: fewer than three rows per client are refused. The
    published statistic has a large bias where rows are few: independent normal numbers have .83 on average for three
    rows, .68 for four, .50 for ten and .35 for twenty, and independent vectors of thousands of elements have .99 even
    for a hundred. Values of different micro-batches are therefore not to be compared, and a strength that was found
    with one of them does not carry over to another. The bias-corrected statistic (Szekely and Rizzo, Annals of
    Statistics 2014, "Partial distance correlation with methods for dissimilarities",
    https://doi.org/10.1214/14-AOS1255) is not what NoPeek minimises, and it needs four rows.

    alpha: weight beside the contrastive loss.
    """

    def __init__(self, alpha: Annotated[float, Field(ge=0)] = 1.0) -> None:
        self.alpha = alpha

    def check(self, context: DefenderContext) -> None:
        """Refuse micro-batches of which the distance correlation cannot change."""
        rows = context.fewest_rows
        if rows < LEAST_ROWS:
            raise ConfigurationError(
                f"nopeek: a client sends {rows} quer{'ies' if rows > 1 else 'y'} in a step, whose distance correlation "
                f"is constant; it takes {LEAST_ROWS}, so use a larger training.micro_batch, a larger "
                "training.server_batch or fewer training.clients"
            )

    def client_loss(self, images: Tensor, smashed: Tensor) -> Tensor | None:
        if len(images) < LEAST_ROWS:
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
