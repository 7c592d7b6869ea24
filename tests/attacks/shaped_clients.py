"""Small clients whose smashed data has each of the shapes that a split model may have, and views on them."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mocosfl_priv.config import ComputeConfig
from mocosfl_priv.plugins import AttackerView, AuxiliaryData, Capability
from mocosfl_priv.runtime.compute import Compute
from mocosfl_priv.runtime.seeding import global_seed

ImageShape = tuple[int, int, int]
PATCH = 4
GREY, COLOUR = 1, 3


class TinyTransformer(nn.Module):
    """Patches of four pixels as tokens (n, t, d) through one layer; a class token stands before them if asked for."""

    def __init__(self, image_shape: ImageShape, width: int = 16, class_token: bool = False) -> None:
        super().__init__()
        channels, height, breadth = image_shape
        tokens = (height // PATCH) * (breadth // PATCH)
        self.embed = nn.Conv2d(channels, width, PATCH, PATCH)
        self.first = nn.Parameter(torch.randn(1, int(class_token), width))
        self.positions = nn.Parameter(0.1 * torch.randn(1, tokens + int(class_token), width))
        self.layer = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.embed(images).flatten(2).transpose(1, 2)
        return self.layer(torch.cat([self.first.expand(len(images), -1, -1), tokens], 1) + self.positions)


def conv_stack(image_shape: ImageShape) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(image_shape[0], 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1), nn.ReLU()
    )


def perceptron(image_shape: ImageShape) -> nn.Module:
    numbers = image_shape[0] * image_shape[1] * image_shape[2]
    return nn.Sequential(nn.Flatten(), nn.Linear(numbers, 48), nn.ReLU(), nn.Linear(48, 32))


def one_pixel(image_shape: ImageShape) -> nn.Module:
    return nn.Sequential(perceptron(image_shape), nn.Unflatten(1, (32, 1, 1)))


CLIENTS: dict[str, Callable[[ImageShape], nn.Module]] = {
    "map": conv_stack,
    "pixel": one_pixel,
    "tokens": TinyTransformer,
    "class": lambda image_shape: TinyTransformer(image_shape, class_token=True),
    "vector": perceptron,
}


class Orthogonal(nn.Module):
    """An orthogonal linear map of the numbers of an image, or of each of its patches, in any arrangement; it loses
    nothing.
    """

    def __init__(self, kind: str, image_shape: ImageShape) -> None:
        super().__init__()
        channels, height, breadth = image_shape
        self.kind = kind
        local = kind in ("map", "tokens", "class")
        numbers = channels * (PATCH**2 if local else height * breadth)
        self.register_buffer("matrix", turned(numbers))

    def forward(self, images: Tensor) -> Tensor:
        matrix = self.get_buffer("matrix")
        if self.kind == "map":
            return torch.einsum("dc,nchw->ndhw", matrix, F.pixel_unshuffle(images, PATCH))
        if self.kind in ("tokens", "class"):
            tokens = F.pixel_unshuffle(images, PATCH).flatten(2).transpose(1, 2) @ matrix.T
            return tokens if self.kind == "tokens" else torch.cat([tokens.mean(1, keepdim=True), tokens], 1)
        vector = images.flatten(1) @ matrix.T
        return vector if self.kind == "vector" else vector[:, :, None, None]


class Constant(nn.Module):
    """Sends the same whatever the image, in the shape of `client`; differentiable."""

    def __init__(self, client: nn.Module) -> None:
        super().__init__()
        self.client = client

    def forward(self, images: Tensor) -> Tensor:
        return 0 * self.client(images) + 0.25


def turned(numbers: int) -> Tensor:
    """A random orthogonal matrix."""
    random = torch.randn((numbers, numbers), generator=torch.Generator().manual_seed(3))
    return torch.linalg.qr(random).Q


def smooth_images(count: int, image_shape: ImageShape, seed: int) -> Tensor:
    """Smooth random images, lighter above, in [0, 1]; what is above is independent of what is below."""
    channels, height, breadth = image_shape
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.rand((count, channels, 4, 4), generator=rng)
    smooth = F.interpolate(coarse, size=(height, breadth), mode="bilinear", align_corners=False)
    return 0.7 * smooth + 0.3 * torch.linspace(1, 0, height).view(1, 1, height, 1)


def view_on(
    client: nn.Module,
    image_shape: ImageShape,
    visible: frozenset[Capability] = frozenset(Capability),
    victims: Tensor | None = None,
    known: int = 40,
) -> AttackerView:
    """A view on `victims`, by default six smooth images, through `client`, of which all but a training is granted."""
    client = client.eval().requires_grad_(False)
    victims = smooth_images(6, image_shape, seed=1) if victims is None else victims
    with torch.no_grad():
        smashed = client(victims)
    with global_seed(0, "server of the shapes"):
        head = nn.Linear(smashed[0].numel(), 8)
        server = nn.Sequential(OrderedDict(trunk=nn.Flatten(), projector=head)).requires_grad_(False)

    def untrained() -> nn.Module:
        return copy.deepcopy(client).train().requires_grad_(True)

    return AttackerView(
        smashed=smashed,
        image_shape=image_shape,
        compute=Compute.resolve(ComputeConfig(device="cpu", precision="float32", threads=1)),
        visible=visible - {Capability.TRAINING_STREAM, Capability.GRADIENT_CHANNEL},
        client=client,
        auxiliary=AuxiliaryData(smooth_images(known, image_shape, seed=2), torch.ones(known, dtype=torch.bool)),
        build_client=untrained,
        server=server,
        colluder=copy.deepcopy(client),
    )
