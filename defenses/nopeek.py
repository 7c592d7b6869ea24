"""NoPeek: less statistical dependence between images and messages (Vepakomma et al., ICDM Workshops 2020).

"NoPeek: Information leakage reduction to share activations in distributed deep learning",
https://arxiv.org/abs/2008.09161
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from mocosfl_priv import ConfigurationError, DefenderContext, Defense

SMALLEST = 1e-12
CONSTANT = 1e-5  # distances below this are none
# of two rows the published statistic is 1, whatever they are; the bias-corrected one is not defined for three
LEAST_ROWS = {"v": 3, "u": 4}


class NoPeek(Defense):
    """The loss of each client grows by alpha times the distance correlation of its own images and messages of a step.

    Distance correlation (Szekely et al., Annals of Statistics 2007, "Measuring and testing dependence by correlation of
    distances", https://doi.org/10.1214/009053607000000505) is 0 for independent variables and 1 for similar ones. It
    looks at how images of a batch stand to each other, not at whether one of them can be reconstructed.

    A client has only the rows of its own micro-batch: with a symmetric loss, two views of each of its images. Of two
    rows the distance correlation is always 1, so its gradient is 0: fewer than three rows per client are refused. The
    published statistic, a V-statistic, has a large bias where rows are few: photographs and the messages of other
    photographs have .93 for four rows and .31 for two hundred, photographs and their own messages .97 and .78
    (docs/DEFENSES.md). Values of different micro-batches are therefore not to be compared, and a strength that was
    found with one of them does not carry over to another. The bias-corrected statistic (Szekely and Rizzo, Annals of
    Statistics 2014, "Partial distance correlation with methods for dissimilarities",
    https://doi.org/10.1214/14-AOS1255) has a covariance of mean 0 for independent samples of any size. It estimates the
    square of the distance correlation, may be negative, and varies a lot for few rows. NoPeek's authors minimise the
    V-statistic.

    alpha: weight beside the contrastive loss. statistic: v as published, or u, which is bias-corrected.
    """

    def __init__(self, alpha: Annotated[float, Field(ge=0)] = 1.0, statistic: Literal["v", "u"] = "v") -> None:
        self.alpha = alpha
        self.statistic = statistic

    def check(self, context: DefenderContext) -> None:
        """Refuse micro-batches of which the distance correlation cannot change."""
        rows, least = context.fewest_rows, LEAST_ROWS[self.statistic]
        if rows < least:
            raise ConfigurationError(
                f"nopeek: a client sends {rows} quer{'ies' if rows > 1 else 'y'} in a step, whose distance correlation "
                f"(statistic {self.statistic}) is constant or undefined; it takes {least}, so use a larger "
                "training.micro_batch, a larger training.server_batch or fewer training.clients"
            )

    def client_loss(self, images: Tensor, smashed: Tensor) -> Tensor | None:
        if len(images) < LEAST_ROWS[self.statistic]:
            return None
        measure = distance_correlation if self.statistic == "v" else bias_corrected
        return self.alpha * measure(images, smashed)


def distance_correlation(some: Tensor, others: Tensor) -> Tensor:
    """Of two samples in rows (n, ...), n >= 2; scalar in [0, 1], differentiable. The V-statistic of the definition.

    0 where one of the samples is constant.
    """
    first, second = (_centred(_distances(rows.flatten(1))) for rows in (some, others))
    covariance = (first * second).mean().clamp(min=0)
    spreads = torch.stack([first.square().mean(), second.square().mean()]).sqrt()
    # the outer root has no gradient at zero
    squared = covariance / spreads.clamp(min=CONSTANT).prod()
    return squared.clamp(min=SMALLEST).sqrt() * (spreads.min() > CONSTANT)


def bias_corrected(some: Tensor, others: Tensor) -> Tensor:
    """The bias-corrected square of the distance correlation of two samples in rows (n, ...), n >= 4.

    Scalar in [-1, 1], differentiable; 0 where one of the samples is constant.
    """
    first, second = (_u_centred(_distances(rows.flatten(1))) for rows in (some, others))
    spreads = torch.stack([matrix.square().mean() for matrix in (first, second)]).clamp(min=SMALLEST).sqrt()
    return (first * second).mean() / spreads.clamp(min=CONSTANT).prod() * (spreads.min() > CONSTANT)


def _distances(rows: Tensor) -> Tensor:
    """Euclidean distances of all pairs, (n, n)."""
    rows = rows.float() if rows.dtype in (torch.bfloat16, torch.float16) else rows
    # from products instead of differences, which would take n times the memory; around the mean, for precision
    rows = rows - rows.mean(0)
    products = rows @ rows.T
    squares = products.diagonal()
    squared = (squares[:, None] + squares[None, :] - 2 * products).clamp(min=0)
    off_diagonal = 1 - torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
    return (squared + SMALLEST).sqrt() * off_diagonal


def _centred(distances: Tensor) -> Tensor:
    """With the means of rows and columns taken off."""
    return distances - distances.mean(0, keepdim=True) - distances.mean(1, keepdim=True) + distances.mean()


def _u_centred(distances: Tensor) -> Tensor:
    """The same, for an unbiased product: zero on the diagonal (Szekely and Rizzo 2014, definition 2)."""
    n = len(distances)
    rows = distances.sum(0, keepdim=True) / (n - 2)
    centred = distances - rows - rows.T + distances.sum() / ((n - 1) * (n - 2))
    return centred * (1 - torch.eye(n, dtype=distances.dtype, device=distances.device))
