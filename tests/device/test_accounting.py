from __future__ import annotations

import subprocess
import sys

import pytest

from mocosfl_priv.device.accounting import paper_traffic, protocol_smashed


@pytest.mark.parametrize(
    ("parameters", "elements", "frozen", "weights", "total"),
    [
        (1_856, 64 * 32 * 32, False, 1.4, 5001.4),
        (75_840, 64 * 32 * 32, False, 57.9, 5057.9),
        (4_164, 4 * 16 * 16, True, 0.0, 39.1),
    ],
)
def test_the_papers_table(parameters: int, elements: int, frozen: bool, weights: float, total: float) -> None:
    traffic = paper_traffic(parameters, elements, images=50, epochs=200, frozen=frozen)
    assert traffic.weights == pytest.approx(weights, abs=0.05)
    assert traffic.total == pytest.approx(total, abs=0.05)


def test_what_the_protocol_really_moves() -> None:
    assert protocol_smashed(64 * 32 * 32, images=50, epochs=200, frozen=False) == 7500
    assert protocol_smashed(4 * 16 * 16, images=50, epochs=200, frozen=True) == pytest.approx(78.1, abs=0.05)


def test_the_device_side_does_not_import_torch() -> None:
    code = "import sys, mocosfl_priv, mocosfl_priv.device.accounting; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
