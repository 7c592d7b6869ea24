"""Audit a small vision transformer of torchvision, cut after its second block: smashed data is tokens (n, 65, 96).

uv run python examples/audit_torchvision_vit.py VICTIMS AUXILIARY runs/vit [ATTACK ...]
"""

import sys

from torch import nn
from torchvision.models import VisionTransformer

from mocosfl_priv import RunResult, audit

CUTS = ("encoder.layers.encoder_layer_1",)


def split() -> nn.Module:
    """Return the whole network, for images of 64 pixels, with random weights."""
    return VisionTransformer(
        image_size=64, patch_size=8, num_layers=4, num_heads=3, hidden_dim=96, mlp_dim=192, num_classes=10
    )


def main(victims: str, auxiliary: str, out: str, *attacks: str) -> RunResult:
    """Audit the network and write the report to the folder `out`."""
    run = audit(split(), victims=victims, auxiliary=auxiliary, cuts=CUTS, size=64, attacks=attacks or ["ensemble"])
    run.report(out)
    return run


if __name__ == "__main__":
    print(main(*sys.argv[1:]).table()[["attack", "leak_ratio"]])
