"""Device, precision and threads of a run; chosen once per run, and recorded in its result."""

from __future__ import annotations

import ctypes
import os
import platform
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch

from mocosfl_priv.config import ComputeConfig
from mocosfl_priv.errors import ConfigurationError


@dataclass(frozen=True)
class Compute:
    """A :class:`ComputeConfig` in which every "auto" is replaced by a choice for this machine.

    bfloat16: whether network passes use bfloat16 autocast. rows_per_pass: most views that clients encode at a time.
    client_kernel: how passes of many clients are computed, see :class:`mocosfl_priv.training.clients.ClientBank`.
    """

    device: torch.device
    bfloat16: bool
    threads: int
    rows_per_pass: int = 200
    client_kernel: Literal["auto", "measure", "grouped", "matmul", "loop"] = "auto"

    @classmethod
    def resolve(cls, config: ComputeConfig) -> Compute:
        """Choose for this machine, and set torch's number of threads; raises ConfigurationError for a missing GPU."""
        if config.device == "cuda" and not torch.cuda.is_available():
            raise ConfigurationError("compute.device: cuda was asked for, but torch sees no GPU")
        use_cuda = config.device != "cpu" and torch.cuda.is_available()
        device = torch.device("cuda" if use_cuda else "cpu")
        bfloat16 = config.precision == "bfloat16" or (config.precision == "auto" and _has_bfloat16(device))
        if use_cuda:  # by default, torch rounds the inputs of float32 convolutions to ten mantissa bits (TF32)
            torch.backends.cudnn.allow_tf32 = False
        threads = config.threads or usable_cores()
        torch.set_num_threads(threads)
        _keep_freed_memory()
        return cls(device, bfloat16, threads, config.rows_per_pass, config.client_kernel)

    def autocast(self) -> AbstractContextManager[None]:
        """Return a context for network passes: bfloat16 autocast if this run uses it, otherwise no change."""
        context: AbstractContextManager[None] = torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.bfloat16
        )
        return context

    def describe(self) -> dict[str, str | int]:
        """Return the settings that a result records."""
        return {
            "device": str(self.device),
            "precision": "bfloat16 autocast" if self.bfloat16 else "float32",
            "threads": self.threads,
            "rows_per_pass": self.rows_per_pass,
            "client_kernel": self.client_kernel,
        }


M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h
HEAP_STEP = 64 << 20  # bytes


@cache
def _keep_freed_memory() -> None:
    """Make glibc keep large freed blocks of memory instead of returning them to the system.

    Every training step allocates the same activations again, and the resulting page faults took a quarter of its time.
    Does nothing with other C libraries.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        for parameter, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, HEAP_STEP)):
            mallopt(parameter, value)


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    flags = _cpu_flags()
    return "avx512_bf16" in flags or "amx_bf16" in flags


def _cpu_flags() -> set[str]:
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as cpuinfo:
            return next((set(line.split()) for line in cpuinfo if line.startswith("flags")), set())
    except OSError:
        return set()


def usable_cores() -> int:
    """Return the number of cores on which this process may run; all cores if the system does not tell."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
