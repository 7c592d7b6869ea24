"""Audit a client that adds noise to its smashed data by itself, in eval mode too.

uv run python examples/audit_noisy_client.py VICTIMS AUXILIARY runs/noisy [ATTACK ...]
"""

import sys

import torch
from torch import Tensor, nn

from mocosfl_priv import RunResult, audit


class GaussianNoise(nn.Module):
    """Add Gaussian noise of standard deviation `sigma`."""

    def __init__(self, sigma: float) -> None:
        super().__init__()
        self.sigma = sigma

    def forward(self, smashed: Tensor) -> Tensor:
        """Return `smashed` of any shape with noise from torch's global generator."""
        return smashed + self.sigma * torch.randn_like(smashed)


def split() -> nn.Module:
    """Return the client: images (n, 3, 32, 32) to smashed data (n, 8, 16, 16), with random weights."""
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), GaussianNoise(0.1))


def main(victims: str, auxiliary: str, out: str, *attacks: str) -> RunResult:
    """Audit the client and write the report to the folder `out`.

    An attacker who knows of the noise takes the mean of several messages of an image, see `threat`.
    """
    threat = {"messages_per_victim": 8}
    run = audit(split(), victims=victims, auxiliary=auxiliary, size=32, attacks=attacks or ["ensemble"], threat=threat)
    run.report(out)
    return run


if __name__ == "__main__":
    print(main(*sys.argv[1:]).table()[["attack", "leak_ratio"]])
