"""Communication of one client, computed analytically in two ways.

The paper's accounting (Li et al., ICLR 2023) counts two vectors per image (smashed data up, gradient down) and one copy
of the weights per epoch; for a frozen client, one vector and no weights. The paper's protocol actually transfers three
vectors (query, key, gradient), or two for a frozen client. The traffic of a real training is measured elsewhere, at its
messages.
"""

from __future__ import annotations

from dataclasses import dataclass

FLOAT_BYTES = 4
MEBIBYTE = 2**20


@dataclass(frozen=True)
class ClientTraffic:
    """Megabytes (2^20 bytes) that one client sends and receives over a whole training, for weights and vectors."""

    weights: float
    smashed: float

    @property
    def total(self) -> float:
        """Megabytes of weights and vectors together."""
        return self.weights + self.smashed


def paper_traffic(
    client_parameters: int, smashed_elements: int, *, images: int, epochs: int, frozen: bool
) -> ClientTraffic:
    """Return the traffic of a client with `images` images over `epochs` epochs, in float32, as the paper counts it.

    smashed_elements: numbers in the smashed data of one image.
    """
    vectors = 1 if frozen else 2
    return ClientTraffic(
        weights=0.0 if frozen else client_parameters * FLOAT_BYTES * epochs / MEBIBYTE,
        smashed=vectors * smashed_elements * FLOAT_BYTES * images * epochs / MEBIBYTE,
    )


def protocol_smashed(smashed_elements: int, *, images: int, epochs: int, frozen: bool) -> float:
    """Return the megabytes of vectors that MocoSFL's protocol transfers per client: query and key up, gradient down."""
    vectors = 2 if frozen else 3
    return vectors * smashed_elements * FLOAT_BYTES * images * epochs / MEBIBYTE
