"""What a benchmark says of the machine it ran on."""

from __future__ import annotations

import importlib.metadata
import platform
import sys


def processor() -> str:
    """Its name, and which of the instructions that matter here it has."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as info:  # noqa: PTH123 - a pseudo-file
            lines = [line for line in info if line.startswith(("model name", "flags"))]
    except OSError:
        return platform.processor()
    name = lines[0].split(":", 1)[1].strip() if lines else platform.processor()
    flags = set(lines[1].split()) if len(lines) > 1 else set()
    return f"{name} ({', '.join(sorted(flags & {'amx_bf16', 'avx512_bf16', 'avx512f', 'avx2'}))})"


def version(package: str) -> str:
    """Of an installed package, and of Python."""
    return f"{package} {importlib.metadata.version(package)}, python {sys.version_info.major}.{sys.version_info.minor}"
