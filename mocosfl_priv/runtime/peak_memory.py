"""Peak memory of a block of code: resident memory on the host, allocated memory on a GPU."""

from __future__ import annotations

import ctypes
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

MEBIBYTE = 2**20
RESET_PEAK = "5"  # written to /proc/self/clear_refs, resets the process's peak of resident memory, see proc(5)
SAMPLE_SECONDS = 0.01
STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class PeakMemory:
    """Memory in MiB, known when the block has ended; NaN where the system does not tell.

    resident_before, resident_peak: resident memory of the whole process, at the start of the block and at its peak.
    device_before, device_peak: memory of torch's tensors on the GPU; 0 on a CPU.
    """

    resident_before: float = float("nan")
    resident_peak: float = float("nan")
    device_before: float = 0.0
    device_peak: float = 0.0

    @property
    def resident_added(self) -> float:
        """By how many MiB the peak of the resident memory exceeded that at the start of the block."""
        return self.resident_peak - self.resident_before

    @property
    def device_added(self) -> float:
        """By how many MiB the peak of the GPU memory exceeded that at the start of the block."""
        return self.device_peak - self.device_before


@contextmanager
def peak_memory(device: torch.device | None = None) -> Iterator[PeakMemory]:
    """Measure the peak memory of the block. Blocks must not be nested, since the kernel keeps one peak per process.

    Freed memory that the C library has kept is returned to the system first; otherwise it would count for this block.
    If the kernel's peak cannot be reset, a thread samples the resident memory instead, which can miss peaks shorter
    than `SAMPLE_SECONDS`.
    """
    measured = PeakMemory()
    on_gpu = device is not None and device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        measured.device_before = torch.cuda.memory_allocated(device) / MEBIBYTE
    _return_freed_memory()
    resets = _reset_kernel_peak()
    measured.resident_before = _resident("VmRSS")
    sampler = None if resets else _Sampler()
    try:
        yield measured
    finally:
        if on_gpu:
            torch.cuda.synchronize(device)
            measured.device_peak = torch.cuda.max_memory_allocated(device) / MEBIBYTE
        peak = _resident("VmHWM") if sampler is None else sampler.stop()
        measured.resident_peak = max(peak, measured.resident_before)  # the kernel's two counts differ by some pages


def _return_freed_memory() -> None:
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _reset_kernel_peak() -> bool:
    """Reset the kernel's peak of this process's resident memory; return whether that succeeded."""
    try:
        CLEAR_REFS.write_text(RESET_PEAK, encoding="ascii")
    except OSError:  # not Linux, or a sandbox that forbids it
        return False
    return True


def _resident(field: str) -> float:
    """A memory field of /proc/self/status, in MiB; NaN if it does not exist."""
    try:
        lines = STATUS.read_text(encoding="ascii").splitlines()
    except OSError:
        return float("nan")
    kibibytes = next((line.split()[1] for line in lines if line.startswith(f"{field}:")), "nan")
    return float(kibibytes) / 1024


class _Sampler(threading.Thread):
    """A thread that samples the resident memory from its creation until :meth:`stop`."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._peak = _resident("VmRSS")
        self._over = threading.Event()
        self.start()

    def run(self) -> None:
        """Sample, and keep the largest value."""
        while not self._over.wait(SAMPLE_SECONDS):
            self._peak = max(self._peak, _resident("VmRSS"))

    def stop(self) -> float:
        """End the thread and return the peak in MiB."""
        self._over.set()
        self.join()
        return max(self._peak, _resident("VmRSS"))
