"""Audit a client and a server as SplitFed saves them: two state dicts in one file, each from a parallel module.

SPLITFED_CHECKPOINT=splitfed.pth uv run python examples/audit_splitfed.py VICTIMS AUXILIARY runs/splitfed [ATTACK ...]
"""

import os
import sys
from pathlib import Path

from torch import nn

from mocosfl_priv import RunResult, audit, load_weights

CHECKPOINT = Path(os.environ.get("SPLITFED_CHECKPOINT", "splitfed.pth"))


def client() -> nn.Module:
    """Build the client: images (n, 3, 32, 32) to smashed data (n, 16, 16, 16)."""
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2))


def server() -> nn.Module:
    """Build the server: smashed data to ten logits."""
    return nn.Sequential(
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)
    )


def split() -> tuple[nn.Module, nn.Module]:
    """Return both with the weights in the file ``{"client": ..., "server": ...}``."""
    mine, theirs = client(), server()
    load_weights(mine, CHECKPOINT, prefix="client.module.")
    load_weights(theirs, CHECKPOINT, prefix="server.module.")
    return mine, theirs


def main(victims: str, auxiliary: str, out: str, *attacks: str) -> RunResult:
    """Audit the client, with the server known to the attacker, and write the report to the folder `out`."""
    run = audit(*split(), victims=victims, auxiliary=auxiliary, size=32, attacks=attacks or ["ensemble"])
    run.report(out)
    return run


if __name__ == "__main__":
    print(main(*sys.argv[1:]).table()[["attack", "leak_ratio"]])
