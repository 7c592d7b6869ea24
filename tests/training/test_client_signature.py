from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mocosfl_priv.runtime.compute import Compute
from mocosfl_priv.training.client_signature import ClientCopies, client_signature
from tests.training.test_mocosfl import model, train

IMAGES = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


class Tint(nn.Module):
    """A client that adds a colour of its own to every image."""

    def __init__(self) -> None:
        super().__init__()
        self.colour = nn.Parameter(torch.zeros(3))

    def forward(self, images: Tensor) -> Tensor:
        return images + self.colour.view(1, 3, 1, 1)


def tinted(online: Tensor, key: Tensor, images: Tensor = IMAGES) -> ClientCopies:
    return ClientCopies({"colour": online}, {"colour": key}, images)


def test_equal_clients_have_no_signature(compute: Compute) -> None:
    server = nn.Flatten()
    same = torch.rand(1, 3).expand(5, 3)
    assert abs(client_signature(tinted(same, same), Tint(), server, server, 0.1, compute)) < 1e-4


def test_queries_alone_are_no_signature(compute: Compute) -> None:
    """What queries carry of their client helps the loss only where the keys carry it, too."""
    server, colours = nn.Flatten(), torch.rand(5, 3)
    apart = client_signature(tinted(colours, colours), Tint(), server, server, 0.1, compute)
    averaged = colours.mean(0).expand(5, 3)
    assert apart > 0.05
    assert abs(client_signature(tinted(colours, averaged), Tint(), server, server, 0.1, compute)) < 1e-4


def test_signature_equals_a_loop(compute: Compute) -> None:
    server, temperature = nn.Flatten(), 0.2
    online, key = torch.randn(3, 3), torch.randn(3, 3)
    own: list[float] = []
    other: list[float] = []
    images = IMAGES.float() / 255
    for a in range(3):
        for b in range(3):
            for i in range(4):
                for j in range(4):
                    query = (images[i] + online[a].view(3, 1, 1)).flatten()
                    answer = (images[j] + key[b].view(3, 1, 1)).flatten()
                    if i != j:
                        (own if a == b else other).append(float(query @ answer / query.norm() / answer.norm()))
    expected = (sum(own) / len(own) - sum(other) / len(other)) / temperature
    found = client_signature(tinted(online, key), Tint(), server, server, temperature, compute)
    assert math.isclose(found, expected, abs_tol=1e-4)


@pytest.mark.parametrize(("clients", "images"), [(1, 4), (3, 1)])
def test_nothing_to_compare_is_refused(clients: int, images: int, compute: Compute) -> None:
    copies = tinted(torch.rand(clients, 3), torch.rand(clients, 3), IMAGES[:images])
    with pytest.raises(ValueError, match="at least 2"):
        client_signature(copies, Tint(), nn.Flatten(), nn.Flatten(), 0.1, compute)


@pytest.mark.parametrize(
    ("options", "measured"),
    [({}, True), ({"sync_period": 1}, False), ({"frozen_client": True}, False), ({"clients": 1}, False)],
)
def test_history_has_a_signature_where_clients_can_differ(
    options: dict[str, Any], measured: bool, compute: Compute
) -> None:
    """Not of clients that are computed as one, have a frozen model, or are alone."""
    history = train(model(), compute, **options).history
    assert all(("client_signature" in entry) == measured for entry in history)
