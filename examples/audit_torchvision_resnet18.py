"""Audit torchvision's ResNet-18 at two cuts, on images of your own at 64 pixels.

uv run python examples/audit_torchvision_resnet18.py VICTIMS AUXILIARY runs/resnet18 [ATTACK ...]
"""

import sys

from torch import nn
from torchvision.models import resnet18

from mocosfl_priv import RunResult, audit

CUTS = ("layer1", "layer2")


def split() -> nn.Module:
    """Return the whole network; load your own weights into it instead of these random ones."""
    return resnet18(weights=None, num_classes=10)


def main(victims: str, auxiliary: str, out: str, *attacks: str) -> RunResult:
    """Audit the network and write the report to the folder `out`."""
    run = audit(split(), victims=victims, auxiliary=auxiliary, cuts=CUTS, size=64, attacks=attacks or ["ensemble"])
    run.report(out)
    return run


if __name__ == "__main__":
    print(main(*sys.argv[1:]).table()[["cut_layer", "attack", "leak_ratio"]])
