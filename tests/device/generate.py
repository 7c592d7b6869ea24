"""Make Python code of the protocol's schema: ``python -m tests.device.generate``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import mocosfl_priv.device

WIRE = Path(mocosfl_priv.device.__file__).parent / "wire"


def generate(out: Path = WIRE) -> None:
    """Write split_pb2.py and split_pb2.pyi, in a process of its own: protoc's module registers what it reads."""
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{WIRE}", f"--python_out={out}", f"--pyi_out={out}"]
    subprocess.run([*command, "split.proto"], check=True)


if __name__ == "__main__":
    generate()
