"""The client signature: how well a server can tell clients apart when all of them send the same images.

A contrastive loss can fall without learning anything about images. If queries and keys carry a signature of their
client, the server can use it to tell a query's own key from the keys of all other clients. docs/LEARNING.md has the
measurements.
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

COMPARED_CLIENTS = 8  # at most so many clients are compared with each other
COMPARED_IMAGES = 16  # at most so many images are sent through each client
FEWEST = 2  # a comparison needs at least so many clients, and so many images


@dataclass(frozen=True)
class ClientCopies:
    """Models of c clients, copied just before they were averaged, and m images of their training data.

    online, key: the online and the momentum models, as stacked parameters (c, *shape) by name.
    images: uint8 (m, 3, h, w).
    """

    online: State
    key: State
    images: Tensor

    @property
    def enough(self) -> bool:
        """Whether there are at least `FEWEST` clients and `FEWEST` images."""
        clients = len(next(iter(self.online.values()))) if self.online else 0
        return clients >= FEWEST and len(self.images) >= FEWEST

    def state(self) -> State:
        """Return all tensors by name, for a checkpoint."""
        return {
            **under("online", self.online),
            **under("key", self.key),
            "images": self.images,
        }

    @classmethod
    def of_state(cls, state: State, device: torch.device) -> ClientCopies | None:
        """Restore what :meth:`state` returned, with the models on `device`; None if `state` holds no copies."""
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
    """Measure by how many nats keys of a query's own client score higher than other clients' keys of the same images.

    Each of c clients sends each of m images. Let q[a, i] be the unit embedding of image i as a query of client a, and
    k[b, j] that of image j as a key of client b. Over all i != j, the result is the mean of q[a, i] · k[a, j] minus the
    mean of q[a, i] · k[b, j] for a != b, divided by the temperature. It is 0 where clients cannot be told apart. Since
    all clients send the same images, only differences between the clients' weights can raise it.

    client: the module whose parameters `copies` holds.
    online, key: the server's trunk and projector, and their momentum model.
    Raises ValueError when there are fewer than two clients or images.
    """
    if not copies.enough:
        raise ValueError(f"a client signature needs at least {FEWEST} clients and {FEWEST} images")
    images = copies.images.to(compute.device).float() / 255
    queries = _embed(copies.online, client, online, images, compute)
    keys = _embed(copies.key, client, key, images, compute)
    scores = torch.einsum("aid,bjd->abij", queries, keys) / temperature
    clients, count = queries.shape[:2]
    own = torch.eye(clients, dtype=torch.bool, device=scores.device)[:, :, None, None]
    different = ~torch.eye(count, dtype=torch.bool, device=scores.device)
    return float(scores[(own & different)].mean() - scores[(~own & different)].mean())


def _embed(stacked: State, client: nn.Module, server: nn.Module, images: Tensor, compute: Compute) -> Tensor:
    """Embed the same m images as sent by each of c clients: float32 (c, m, d), of unit length."""
    embeddings = []
    for index in range(len(next(iter(stacked.values())))):
        with compute.autocast():
            smashed = functional_call(client, {name: value[index] for name, value in stacked.items()}, (images,))
            embedded = server(in_fast_layout(smashed.float(), server))
        embeddings.append(F.normalize(embedded.float(), dim=1))
    return torch.stack(embeddings)
