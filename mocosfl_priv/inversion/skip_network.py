"""Deep image prior: skip networks whose structure is an image prior (Ulyanov et al., CVPR 2018), many in parallel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from mocosfl_priv.models.convolution import zeroed

SLOPE = 0.2  # of the leaky ReLUs, as in the paper


class SkipNetwork(nn.Module):
    """An hourglass network from noise (n, channels, h, w) to images (n, colours, h, w) in (0, 1).

    Each of `scales` levels halves the map, processes it in the level below, doubles the result bilinearly, and
    concatenates `skip_channels` channels of its input. Norms are per sample. The weights of the last layer are zero, so
    that the network initially returns mid-grey. Height and width must be divisible by 2^scales.
    """

    def __init__(self, channels: int, scales: int, skip_channels: int = 4, colours: int = 3) -> None:
        super().__init__()
        self.down = nn.ModuleList()
        self.skip = nn.ModuleList()
        self.up = nn.ModuleList()
        for _ in range(scales):
            self.down.append(nn.Sequential(_layer(channels, channels, 3, stride=2), _layer(channels, channels, 3)))
            self.skip.append(_layer(channels, skip_channels, 1))
            self.up.append(nn.Sequential(_layer(channels + skip_channels, channels, 3), _layer(channels, channels, 1)))
        self.last = zeroed(nn.Conv2d(channels, colours, 1))

    def forward(self, noise: Tensor) -> Tensor:
        return torch.sigmoid(self.last(self._level(noise, 0)))

    def _level(self, x: Tensor, level: int) -> Tensor:
        if level == len(self.down):
            return x
        below = self._level(self.down[level](x), level + 1)
        below = F.interpolate(below, scale_factor=2, mode="bilinear", align_corners=False)
        return self.up[level](torch.cat([self.skip[level](x), below], 1))


def _layer(in_channels: int, channels: int, kernel: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, kernel, stride, kernel // 2),
        nn.GroupNorm(channels // 4, channels),
        nn.LeakyReLU(SLOPE),
    )


class StackedSkipNetworks:
    """Skip networks with weights of their own, computed together; network i draws image i.

    Their structure alone is an image prior: Ulyanov et al., "Deep Image Prior", CVPR 2018.

    Args:
        count: how many.
        channels: of every layer, a multiple of four.
        scales: how often maps are halved; height and width must be divisible by 2**scales.
        device: where their weights are.
        colours: channels of the images.

    >>> networks = StackedSkipNetworks(2, channels=4, scales=1, device=torch.device("cpu"))
    >>> networks(torch.rand(2, 4, 8, 8)).shape
    torch.Size([2, 3, 8, 8])
    """

    def __init__(self, count: int, channels: int, scales: int, device: torch.device, colours: int = 3) -> None:
        networks = [SkipNetwork(channels, scales, colours=colours) for _ in range(count)]
        stacked, _ = stack_module_state(networks)
        self._parameters = {name: value.to(device).detach().requires_grad_(True) for name, value in stacked.items()}
        self._network = networks[0]  # its structure; the weights are replaced in every call

    @property
    def parameters(self) -> list[Tensor]:
        """The parameters to optimise, tensors (count, *shape)."""
        return list(self._parameters.values())

    def __call__(self, noise: Tensor) -> Tensor:
        """Return images (count, colours, h, w) in (0, 1) for noise (count, channels, h, w)."""

        def one(parameters: dict[str, Tensor], its_noise: Tensor) -> Tensor:
            return functional_call(self._network, parameters, (its_noise[None],))[0]

        return vmap(one)(self._parameters, noise)
