"""LPIPS (Zhang et al., CVPR 2018), if the weights of its backbone are on this machine.

The `lpips` package contains its linear layers, but not the weights of the torchvision backbone below them. Without
these, distances would come from a random network; so LPIPS is then not measured, and a message says how to get them.
"""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

MINIMUM_SIZE = 64  # smaller images are enlarged, since AlexNet's pooling reduces maps of 32-pixel images to nothing
BATCH = 64

WEIGHT_FILES = {
    "alex": ("alexnet", "alexnet-owt-7be5be79.pth"),
    "vgg": ("vgg16", "vgg16-397923af.pth"),
    "squeeze": ("squeezenet1_1", "squeezenet1_1-b8a52dc0.pth"),
}


@dataclass(frozen=True)
class Lpips:
    """A loaded LPIPS metric. description: its network and resizing, for the result's record."""

    network: nn.Module
    description: str

    @torch.no_grad()
    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the distance per image, (n,), of images (n, c, h, w) in [0, 1], grey or colour, without gradient."""
        return torch.cat([self.distance(x, y) for x, y in zip(a.split(BATCH), b.split(BATCH), strict=True)])

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the same distances, computed in one batch and differentiable, for use in a loss."""
        distance: Tensor = self.network(_prepare(a), _prepare(b)).flatten()
        return distance


def _prepare(images: Tensor) -> Tensor:
    """Scale images from [0, 1] to [-1, 1], as lpips expects, and enlarge small ones to `MINIMUM_SIZE`.

    Grey images are repeated as three equal colours, as the backbone was trained on colour images only.
    """
    images = images.clamp(0, 1) * 2 - 1
    if images.shape[1] == 1:
        images = images.expand(-1, 3, -1, -1)
    if min(images.shape[-2:]) < MINIMUM_SIZE:
        images = nn.functional.interpolate(images, size=(MINIMUM_SIZE, MINIMUM_SIZE), mode="bilinear")
    return images


def weights_path(network: str) -> Path:
    """Return the path at which torchvision caches the backbone's weights."""
    return Path(torch.hub.get_dir()) / "checkpoints" / WEIGHT_FILES[network][1]


def load_lpips(network: str) -> tuple[Lpips | None, str]:
    """The metric LPIPS: Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", CVPR
    2018.

    Its weights are never downloaded here. The file's SHA-256 must start with the digits in its name, as torchvision's
    do.

    Args:
        network: alex, vgg or squeeze.

    Returns:
        The metric and a line about it; where the weights are missing or are not the real ones, None and how to get
        them.

    >>> lpips, note = load_lpips("alex")
    >>> lpips is None or lpips.distance(torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32)).shape == (2,)
    True
    """
    path = weights_path(network)
    constructor = WEIGHT_FILES[network][0]
    remedy = (
        f"on a machine with internet access run torchvision.models.{constructor}(weights='IMAGENET1K_V1') "
        f"and copy the file it caches to {path}"
    )
    if not path.is_file():
        return None, f"LPIPS not measured: the {network} backbone is not cached; {remedy}"
    expected = path.stem.rsplit("-", 1)[-1]
    if not hashlib.sha256(path.read_bytes()).hexdigest().startswith(expected):
        return None, f"LPIPS not measured: {path} is damaged (its checksum is not {expected}...); {remedy}"
    backbone = torch.load(path, map_location="cpu", weights_only=True)
    return build_lpips(network, backbone), f"LPIPS ({network}) with weights {path.name}"


def build_lpips(network: str, backbone: dict[str, Tensor]) -> Lpips:
    """Build the metric with the backbone weights in `backbone`, a state dict of torchvision's model."""
    import lpips  # imports torchvision, which takes seconds

    # pnet_rand keeps lpips from downloading weights; all of its random weights are replaced below
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lpips calls torchvision by deprecated names
        metric = lpips.LPIPS(net=network, pnet_rand=True, verbose=False)
    parameters = {name.removeprefix("features."): value for name, value in backbone.items() if "features." in name}
    for name, parameter in metric.net.named_parameters():
        index = name.split(".", 1)[1]  # of slice1.0.weight, 0.weight is torchvision's name
        parameter.data.copy_(parameters[index])
    metric.eval().requires_grad_(False)
    return Lpips(metric, f"lpips {network} v0.1, images enlarged to at least {MINIMUM_SIZE} pixels")
