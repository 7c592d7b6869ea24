"""Communication of one client, counted analytically.

Two counts stand side by side. The paper's (Li et al., ICLR 2023) counts two vectors per image (smashed data up,
gradient down) and one copy of the weights per epoch; one vector and no weights for a frozen client. What the
paper's protocol moves is three vectors (query, key, gradient), two for a frozen client. What a training moved is
counted at its messages.
"""

from __future__ import annotations

from dataclasses import dataclass

FLOAT_BYTES = 4
MEBIBYTE = 2**20


@dataclass(frozen=True)
class ClientTraffic:
    """Megabytes (2^20 bytes) of one client over a whole training."""

    weights: float
    smashed: float

    @property
    def total(self) -> float:
        """Weights and vectors together."""
        return self.weights + self.smashed


def paper_traffic(
    client_parameters: int, smashed_elements: int, *, images: int, epochs: int, frozen: bool
) -> ClientTraffic:
    """The paper's accounting for a client with `images` images over `epochs` epochs, in float32."""
    vectors = 1 if frozen else 2
    return ClientTraffic(
        weights=0.0 if frozen else client_parameters * FLOAT_BYTES * epochs / MEBIBYTE,
        smashed=vectors * smashed_elements * FLOAT_BYTES * images * epochs / MEBIBYTE,
    )


def protocol_smashed(smashed_elements: int, *, images: int, epochs: int, frozen: bool) -> float:
    """Megabytes of vectors that MocoSFL's protocol moves for one client: query and key up, gradient down."""
    vectors = 2 if frozen else 3
    return vectors * smashed_elements * FLOAT_BYTES * images * epochs / MEBIBYTE
