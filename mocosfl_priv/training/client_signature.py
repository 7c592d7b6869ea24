"""How well a server can tell clients apart by what they send of the same images.

A contrastive loss can be lowered without learning anything about images: where a query and its key carry a signature
of their client, all negatives of other clients are told apart by it. docs/LEARNING.md has the measurements.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from mocosfl_priv.models.convolution import in_fast_layout
from mocosfl_priv.runtime.compute import Compute
from mocosfl_priv.training.state import State, under, within

COMPARED_CLIENTS = 8  # compared with each other
COMPARED_IMAGES = 16  # sent through each of them
FEWEST = 2  # clients, and images, below which there is nothing to compare


@dataclass(frozen=True)
class ClientCopies:
    """Models of several clients as they were just before they were averaged, and images of theirs.

    online, key: stacked parameters (c, *shape) by name. images: uint8 (m, 3, h, w).
    """

    online: State
    key: State
    images: Tensor

    @property
    def enough(self) -> bool:
        """Whether there are two clients and two images to compare."""
        clients = len(next(iter(self.online.values()))) if self.online else 0
        return clients >= FEWEST and len(self.images) >= FEWEST

    def state(self) -> State:
        """Everything, by name, for a checkpoint."""
        return {
            **under("online", self.online),
            **under("key", self.key),
            "images": self.images,
        }

    @classmethod
    def of_state(cls, state: State, device: torch.device) -> ClientCopies | None:
        """Restore what :meth:`state` returned; None where `state` holds no copies."""
        if "images" not in state:
            return None
        online, key = (
            {name: value.to(device) for name, value in within(state, kind).items()} for kind in ("online", "key")
        )
        return cls(online, key, state["images"])


@torch.no_grad()
def client_signature(
    copies: ClientCopies, client: nn.Module, online: nn.Module, key: nn.Module, temperature: float, compute: Compute
) -> float:
    """By how many nats a key of the query's own client outscores another client's key of the same image.

    Each of c clients sends each of m images; q[a, i] is the embedding of image i as a query of client a, k[b, j] that
    of image j as a key of client b. With i != j, the result is the mean of q[a, i] k[a, j] less the mean of
    q[a, i] k[b, j] for a != b, divided by the temperature. It is 0 where clients cannot be told apart: the images are
    the same for all, so nothing but the clients' own weights can raise it.

    client: the module that `copies` are parameters of. online, key: the server's trunk and projector, and their
    momentum model. Raises ValueError where there are fewer than two clients or images.
    """
    if not copies.enough:
        raise ValueError(f"a signature is compared between at least {FEWEST} clients on {FEWEST} images")
    images = copies.images.to(compute.device).float() / 255
    queries = _embed(copies.online, client, online, images, compute)
    keys = _embed(copies.key, client, key, images, compute)
    scores = torch.einsum("aid,bjd->abij", queries, keys) / temperature
    clients, count = queries.shape[:2]
    own = torch.eye(clients, dtype=torch.bool, device=scores.device)[:, :, None, None]
    different = ~torch.eye(count, dtype=torch.bool, device=scores.device)
    return float(scores[(own & different)].mean() - scores[(~own & different)].mean())


def _embed(stacked: State, client: nn.Module, server: nn.Module, images: Tensor, compute: Compute) -> Tensor:
    """Unit embeddings float32 (c, m, d) of the same images, sent by each of c clients."""
    embeddings = []
    for index in range(len(next(iter(stacked.values())))):
        with compute.autocast():
            smashed = functional_call(client, {name: value[index] for name, value in stacked.items()}, (images,))
            embedded = server(in_fast_layout(smashed.float(), server))
        embeddings.append(F.normalize(embedded.float(), dim=1))
    return torch.stack(embeddings)
