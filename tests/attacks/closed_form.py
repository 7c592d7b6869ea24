"""Clients whose best attack is known in closed form, and views on them."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mocosfl_priv.data.augmentation import moco_v2_view
from mocosfl_priv.data.datasets import load_split
from mocosfl_priv.evaluation.utility import to_unit_range
from mocosfl_priv.plugins import Attack, AttackerView, AuxiliaryData, Capability, StreamView
from mocosfl_priv.runtime.compute import Compute
from mocosfl_priv.training.hooks import Message, ServerHooks

ALL = frozenset(Capability)


class ColourMixClient(nn.Module):
    """Rotates the colours of every pixel and scales the rotated axes by `gains`; invertible if none is zero."""

    def __init__(self, gains: tuple[float, float, float] = (1.0, 1.0, 1.0), seed: int = 0) -> None:
        super().__init__()
        random = torch.randn((2, 3, 3), generator=torch.Generator().manual_seed(seed))
        left, right = torch.linalg.qr(random).Q
        self.register_buffer("matrix", left @ torch.diag(torch.tensor(gains)) @ right)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("dc,nchw->ndhw", self.matrix, x)


class ConstantClient(nn.Module):
    """Destroys everything: the same smashed data whatever the image; still differentiable."""

    def forward(self, x: Tensor) -> Tensor:
        return 0 * x + 0.25


def photo_patches(count: int, split: str = "train") -> Tensor:
    """Real image content at 16x16 pixels, in [0, 1]: every other pixel of evenly spaced photo patches."""
    images = load_split("photos", "test" if split == "test" else "train").images
    chosen = images[torch.linspace(0, len(images) - 1, count).long()]
    return to_unit_range(chosen)[:, :, ::2, ::2].contiguous()


def make_view(
    client: nn.Module, victims: Tensor, auxiliary: Tensor, compute: Compute, noise: float = 0.0,
    visible: frozenset[Capability] = ALL, colluder: nn.Module | None = None, server: nn.Module | None = None,
    listener: ServerHooks | None = None, clone: Callable[[], nn.Module] | None = None,
) -> AttackerView:  # fmt: skip
    """The view on `victims` through `client` and additive Gaussian noise of deviation `noise`.

    Without a `colluder` of its own, another participant holds the same client. An untrained client is any linear
    mix of colours, if not a `clone`.
    """
    rng = torch.Generator().manual_seed(7)

    def protect(smashed: Tensor) -> Tensor:
        return smashed + noise * torch.randn(smashed.shape, generator=rng) if noise else smashed

    with torch.no_grad():
        smashed = protect(client(victims))
    return AttackerView(
        smashed=smashed,
        image_shape=(victims.shape[1], victims.shape[2], victims.shape[3]),
        compute=compute,
        visible=visible,
        client=client,
        protect=protect,
        auxiliary=AuxiliaryData(auxiliary, torch.ones(len(auxiliary), dtype=torch.bool)),
        build_client=clone or untrained_mix,
        server=server or colour_server(),
        colluder=colluder or copy.deepcopy(client),
        listener=listener,
    )


def untrained_mix() -> nn.Conv2d:
    """The architecture of :class:`ColourMixClient` with weights to be trained."""
    mix = nn.Conv2d(3, 3, 1, bias=False)
    nn.init.normal_(mix.weight, std=0.5, generator=torch.Generator().manual_seed(11))
    return mix


def colour_server() -> nn.Module:
    """A server's frozen trunk and projector: colours of the quarters of smashed data (n, 3, h, w), projected."""
    projector = nn.Linear(12, 8)
    for parameter in projector.parameters():
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(12))
    trunk = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
    return nn.Sequential(OrderedDict(trunk=trunk, projector=projector)).requires_grad_(False)


def attend(
    attack: Attack, client: nn.Module, images: Tensor, auxiliary: Tensor, compute: Compute,
    visible: frozenset[Capability] = ALL, messages: int = 3, noise: float = 0.0,
) -> ServerHooks | None:  # fmt: skip
    """The listener of `attack` after messages of `client`, which stays as it is, about augmented `images`.

    The attacker takes the client for a convolution over single pixels. The server is a fixed random one.
    """
    rng, views_rng = torch.Generator().manual_seed(8), torch.Generator().manual_seed(9)
    torch.manual_seed(0)
    server = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.LazyLinear(16))
    with torch.no_grad():
        server(client(images))

    def protect(smashed: Tensor) -> Tensor:
        return smashed + noise * torch.randn_like(smashed)

    with torch.no_grad():
        shape = tuple(client(images[:1]).shape[1:])
    stream = StreamView(
        smashed_shape=shape,
        image_shape=(images.shape[1], images.shape[2], images.shape[3]),
        compute=compute,
        visible=visible,
        server=server,
        protect=protect,
        auxiliary=AuxiliaryData(auxiliary, torch.ones(len(auxiliary), dtype=torch.bool)),
        build_client=lambda: nn.Conv2d(3, shape[0], 1),
    )
    listener = attack.attend(stream, 0)
    if listener is None:
        return None
    for step in range(messages):
        with torch.no_grad():
            first, second = (client(moco_v2_view(images, views_rng)) for _ in range(2))
            sent, keys = (z + noise * torch.randn(z.shape, generator=rng) for z in (first, second))
        message = Message(step, messages, torch.zeros(len(images), dtype=torch.long), sent, keys)
        listener.received(message)
        listener.returned(message, torch.randn(sent.shape, generator=rng))
    return listener


def white_images(n: int, size: int, deviation: float, seed: int) -> Tensor:
    """White Gaussian noise around mid-grey, (n, 3, size, size): a distribution whose best estimator is linear."""
    rng = torch.Generator().manual_seed(seed)
    return 0.5 + deviation * torch.randn((n, 3, size, size), generator=rng)


def wiener_error(client: ColourMixClient, deviation: float, noise: float) -> float:
    """MSE per element of the Wiener filter for white images of `deviation` through `client` plus `noise`.

    trace((A'A / noise^2 + I / deviation^2)^-1) / 3: no estimator does better on average.
    """
    matrix = client.get_buffer("matrix").double()
    precision = matrix.T @ matrix / noise**2 + torch.eye(3, dtype=torch.float64) / deviation**2
    return float(torch.linalg.inv(precision).trace()) / 3
