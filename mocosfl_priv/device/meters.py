"""Measure what a client uses of its device: energy, with the meter that the board has, processor time, and memory.

A `Sampler` reads a meter at intervals, and the meter converts readings to joules. Every result comes with its method,
the number of readings, and the idle power. Without a meter the result is "not measured" with the reason, and never an
estimate.
"""

from __future__ import annotations

import csv
import math
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol

import numpy as np

from .errors import DeviceError

PERIOD = 0.1  # seconds between two readings
VCGENCMD_TIMEOUT = 2.0
POWERCAP = Path("/sys/class/powercap")
PMIC_LINE = re.compile(r"\s*(\w+)_([AV])\s+(?:current|volt)\(\d+\)=(\d+(?:\.\d+)?)[AV]\s*")
I2C_SLAVE = 0x0703  # ioctl of Linux's i2c-dev that sets the address of the chip
SIGN_BIT = 1 << 15


@dataclass(frozen=True)
class Energy:
    """A measurement of energy, or the reason why there is none.

    method: how it was measured, or why it was not.
    joules: energy over `seconds`; None if not measured.
    readings: number of readings.
    idle_watts: power of the idle device with the same meter; None if not measured.
    """

    method: str
    joules: float | None = None
    seconds: float = 0.0
    readings: int = 0
    idle_watts: float | None = None

    @property
    def watts(self) -> float | None:
        """Mean power; None if not measured."""
        return None if self.joules is None or self.seconds <= 0 else self.joules / self.seconds

    @property
    def readings_per_second(self) -> float | None:
        """How often per second the meter was read; None if not measured."""
        return None if self.joules is None or self.seconds <= 0 else (self.readings - 1) / self.seconds

    @property
    def joules_above_idle(self) -> float | None:
        """Energy above that of the idle device; None without an idle baseline."""
        if self.joules is None or self.idle_watts is None:
            return None
        return self.joules - self.idle_watts * self.seconds


def not_measured(reason: str) -> Energy:
    """Return an :class:`Energy` without a value, and with the reason."""
    return Energy(f"not measured: {reason}")


class Meter(Protocol):
    """A source of energy readings."""

    @property
    def method(self) -> str:
        """What is measured and how, to print beside the number."""

    def read(self) -> float:
        """Return the current reading, in watts or as a counter of joules; raises DeviceError if it cannot be read."""

    def joules(self, times: np.ndarray, readings: np.ndarray) -> float:
        """Return the energy between the first and the last of `readings`, taken at `times` in seconds."""


class PowerMeter:
    """A meter that reads watts; energy is their integral by the trapezoid rule."""

    def joules(self, times: np.ndarray, readings: np.ndarray) -> float:
        """See :class:`Meter`."""
        return trapezoid(times, readings)


def trapezoid(times: np.ndarray, watts: np.ndarray) -> float:
    """Integrate `watts` over `times` in seconds by the trapezoid rule; returns joules."""
    return float(((watts[1:] + watts[:-1]) / 2 * np.diff(times)).sum())


class Pi5Pmic(PowerMeter):
    """The power management chip (PMIC) of a Raspberry Pi 5. A Pi 4B has no current sensors."""

    method = (
        "sum of voltage x current over the rails of the Pi 5's PMIC (vcgencmd pmic_read_adc), without losses of its "
        "regulators and parts connected to 5 V directly"
    )

    def __init__(self, command: str = "vcgencmd") -> None:
        self._command = command

    def read(self) -> float:
        """See :class:`Meter`."""
        try:
            done = subprocess.run(  # noqa: S603 - a fixed command without a shell
                [self._command, "pmic_read_adc"], capture_output=True, text=True, timeout=VCGENCMD_TIMEOUT, check=True
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise DeviceError(f"{self._command} pmic_read_adc failed: {type(error).__name__}") from error
        return parse_pmic(done.stdout)


def parse_pmic(text: str) -> float:
    """Return the watts in the output of ``vcgencmd pmic_read_adc``, summed over rails with voltage and current.

    Lines are matched by the rail's name, since their channel numbers differ; EXT5V and BATT have a voltage only. Raises
    DeviceError if there is no such rail.
    """
    found: dict[str, dict[str, float]] = {"A": {}, "V": {}}
    for line in text.splitlines():
        if match := PMIC_LINE.fullmatch(line):
            rail, unit, value = match.groups()
            found[unit][rail] = float(value)
    rails = found["A"].keys() & found["V"].keys()
    if not rails:
        raise DeviceError("vcgencmd pmic_read_adc shows no rail with voltage and current; only a Pi 5 has them")
    return math.fsum(found["A"][rail] * found["V"][rail] for rail in rails)


def i2c_words(bus: int, address: int) -> Callable[[int], int]:
    """Return a function that reads a 16-bit register (big endian) of the chip at `address` of an I2C bus.

    Raises DeviceError if the bus cannot be opened; so does the function if the register cannot be read.
    """
    import fcntl

    try:
        handle = os.open(f"/dev/i2c-{bus}", os.O_RDWR)
        fcntl.ioctl(handle, I2C_SLAVE, address)
    except OSError as error:
        raise DeviceError(f"I2C bus {bus}, address {address:#04x}: {error.strerror}") from error

    def read_word(register: int) -> int:
        try:
            os.write(handle, bytes([register]))
            return int.from_bytes(os.read(handle, 2), "big")
        except OSError as error:
            raise DeviceError(f"I2C address {address:#04x}, register {register}: {error.strerror}") from error

    return read_word


class Ina219(PowerMeter):
    """TI INA219 power monitor (data sheet SBOS448G) in its default mode, which needs no calibration register.

    Shunt voltage, register 1: two's complement, 10 uV per step. Bus voltage, register 2: bits 15 to 3, 4 mV per step.
    """

    def __init__(self, read_word: Callable[[int], int], shunt_ohms: float) -> None:
        self._read_word = read_word
        self._shunt_ohms = _positive(shunt_ohms)
        self.method = f"INA219 over I2C, shunt {shunt_ohms:g} ohm: bus voltage x shunt voltage / resistance"

    def read(self) -> float:
        """See :class:`Meter`."""
        amperes = _signed(self._read_word(1)) * 10e-6 / self._shunt_ohms
        return (self._read_word(2) >> 3) * 4e-3 * amperes


class Ina3221(PowerMeter):
    """TI INA3221 power monitor (data sheet SBOS576C): the sum over some of its three channels.

    For channel k, register 2k - 1 holds the shunt voltage (40 uV per step) and register 2k the bus voltage (8 mV per
    step), each as two's complement in bits 15 to 3.
    """

    def __init__(self, read_word: Callable[[int], int], shunt_ohms: float, channels: Sequence[int] = (1,)) -> None:
        if not channels or not set(channels) <= {1, 2, 3}:
            raise DeviceError(f"an INA3221 has channels 1 to 3, not {list(channels)}")
        self._read_word = read_word
        self._shunt_ohms = _positive(shunt_ohms)
        self._channels = tuple(channels)
        listed = ", ".join(map(str, channels))
        self.method = f"INA3221 over I2C, channels {listed}, shunt {shunt_ohms:g} ohm: bus x shunt voltage / resistance"

    def read(self) -> float:
        """See :class:`Meter`."""
        return math.fsum(self._channel(number) for number in self._channels)

    def _channel(self, number: int) -> float:
        shunt = (_signed(self._read_word(2 * number - 1)) >> 3) * 40e-6
        bus = (_signed(self._read_word(2 * number)) >> 3) * 8e-3
        return bus * shunt / self._shunt_ohms


class Rapl:
    """RAPL energy counters of Intel and AMD processors, from Linux's powercap files, summed over packages.

    Wrap-around of counters is handled. The domain `psys` is left out, since it includes the packages.
    """

    method = "RAPL package energy counters (powercap): processor and, if it is in the package, memory controller"

    def __init__(self, root: Path = POWERCAP) -> None:
        zones = sorted(path for path in root.glob("*-rapl:*") if path.name.count(":") == 1)
        self._zones = [zone for zone in zones if _text(zone / "name") != "psys"]
        if not self._zones:
            raise DeviceError(f"there are no RAPL packages under {root}")
        self._ranges = [_whole(zone / "max_energy_range_uj") for zone in self._zones]
        self._last = [_whole(zone / "energy_uj") for zone in self._zones]
        self._total = 0

    def read(self) -> float:
        """Return the joules since this meter was made. Read it before a counter wraps around twice (after minutes)."""
        now = [_whole(zone / "energy_uj") for zone in self._zones]
        for before, after, largest in zip(self._last, now, self._ranges, strict=True):
            self._total += after - before if after >= before else after - before + largest
        self._last = now
        return self._total / 1e6

    def joules(self, times: np.ndarray, readings: np.ndarray) -> float:  # noqa: ARG002
        """See :class:`Meter`."""
        return float(readings[-1] - readings[0])


def open_meter(name: str) -> Meter:
    """Open the meter `name`; raises DeviceError if it does not exist here.

    name: ``auto`` (the Pi 5's PMIC, or else RAPL), ``pmic``, ``rapl``, ``ina219:BUS:ADDRESS:SHUNT`` or
        ``ina3221:BUS:ADDRESS:SHUNT:CHANNELS`` with the shunt in ohms, such as ``ina219:1:0x40:0.1`` and
        ``ina3221:1:0x40:0.1:1,2``.
    """
    kind, *parts = name.split(":")
    try:
        if kind == "ina219" and len(parts) == 3:
            return Ina219(i2c_words(int(parts[0]), int(parts[1], 0)), float(parts[2]))
        if kind == "ina3221" and len(parts) == 4:
            channels = [int(number) for number in parts[3].split(",")]
            return Ina3221(i2c_words(int(parts[0]), int(parts[1], 0)), float(parts[2]), channels)
    except ValueError as error:
        raise DeviceError(f"meter {name!r}: {error}") from error
    if parts or kind not in ("auto", "pmic", "rapl"):
        raise DeviceError(f"unknown meter {name!r}; known: auto, pmic, rapl, ina219:..., ina3221:...")
    if kind == "pmic" or (kind == "auto" and shutil.which("vcgencmd")):
        pmic = Pi5Pmic()
        try:
            pmic.read()
            return pmic
        except DeviceError:
            if kind == "pmic":
                raise
    return Rapl()


class Sampler:
    """A context manager that reads a meter at intervals (seconds) in its own thread."""

    def __init__(self, meter: Meter, period: float = PERIOD) -> None:
        self._meter = meter
        self._period = period
        self._readings: list[
            tuple[float, float]
        ] = []  # (time, reading); one list, because the thread may append at any moment
        self._failure = ""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="energy meter", daemon=True)

    def __enter__(self) -> Sampler:
        self._read()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()
        self._read()

    def energy(self, idle_watts: float | None = None) -> Energy:
        """Return what was measured so far; "not measured" with the reason if a reading failed."""
        if self._failure:
            return not_measured(self._failure)
        times, readings = np.array(list(self._readings)).T
        return Energy(
            self._meter.method,
            self._meter.joules(times, readings),
            float(times[-1] - times[0]),
            len(times),
            idle_watts,
        )

    def _run(self) -> None:
        while not self._failure and not self._ended.wait(self._period):
            self._read()

    def _read(self) -> None:
        try:
            reading = self._meter.read()
        except DeviceError as error:
            self._failure = str(error)
            return
        self._readings.append((time.monotonic(), reading))


def idle_watts(meter: Meter, seconds: float) -> float | None:
    """Wait for `seconds`, and return the mean power meanwhile; None if a reading fails."""
    with Sampler(meter) as sampler:
        time.sleep(seconds)
    return sampler.energy().watts


def usb_meter_energy(path: Path, begin: float, end: float, idle: tuple[float, float] | None = None) -> Energy:
    """Return the energy between two times in the log of a USB power meter.

    Args:
        path: The log; see :func:`read_usb_meter`.
        begin: Start in seconds of the log's clock, often since the epoch.
        end: End in seconds of the log's clock.
        idle: Begin and end of an interval of the same log in which the device was idle.

    Raises:
        DeviceError: The log cannot be read, or does not cover these times.

    """
    times, watts = read_usb_meter(path)
    inside, power = _between(times, watts, begin, end)
    idle_power = None
    if idle is not None:
        idle_power = trapezoid(*_between(times, watts, *idle)) / (idle[1] - idle[0])
    return Energy(
        f"USB meter in the supply line, log {path.name}: voltage x current",
        trapezoid(inside, power),
        end - begin,
        len(inside),
        idle_power,
    )


def read_usb_meter(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read the log of a USB power meter; returns times in seconds, ascending, and watts.

    The log has a header, and columns separated by comma, semicolon, tab or space. Columns are recognised by the
    beginning of their names: time or timestamp; voltage and current, or power. Units ms, mV, mA and mW after an
    underscore or in brackets are converted. Raises DeviceError if a column or number is missing or invalid.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DeviceError(f"USB meter log {path} cannot be read: {error}") from error
    if len(lines) < 3:
        raise DeviceError(f"USB meter log {path} holds fewer than two readings")
    delimiter = next((sign for sign in ",;\t" if sign in lines[0]), " ")
    rows = list(csv.reader((re.sub(" +", " ", line.strip()) for line in lines), delimiter=delimiter))
    columns = [name.strip().lower() for name in rows[0]]
    try:
        table = np.array([[float(cell or "nan") for cell in row] for row in rows[1:]])
        times = _column(columns, table, "time")
        if any(name.startswith("power") for name in columns):
            watts = _column(columns, table, "power")
        else:
            watts = _column(columns, table, "volt") * _column(columns, table, "curr")
    except (ValueError, IndexError) as error:
        raise DeviceError(f"USB meter log {path}: {error}") from error
    if not (np.isfinite(times).all() and np.isfinite(watts).all()):
        raise DeviceError(f"USB meter log {path}: a reading is missing")
    order = np.argsort(times, kind="stable")  # loggers write packets whose times overlap by milliseconds
    return times[order], watts[order]


def _column(names: Sequence[str], table: np.ndarray, beginning: str) -> np.ndarray:
    place = next((index for index, name in enumerate(names) if name.startswith(beginning)), None)
    if place is None:
        raise ValueError(f"there is no column that begins with {beginning!r}")
    unit = re.split(r"[_\s(\[]+", names[place].rstrip(")]"))[-1]
    column: np.ndarray = table[:, place] * (1e-3 if unit in ("ms", "mv", "ma", "mw") else 1.0)
    return column


def _between(times: np.ndarray, watts: np.ndarray, begin: float, end: float) -> tuple[np.ndarray, np.ndarray]:
    """The readings between two times, with interpolated readings at both ends."""
    if not times[0] <= begin < end <= times[-1]:
        raise DeviceError(
            f"the USB meter's log covers {times[0]:.3f} to {times[-1]:.3f}, which does not include {begin} to {end}"
        )
    inner = (times > begin) & (times < end)
    stretch = np.concatenate([[begin], times[inner], [end]])
    return stretch, np.interp(stretch, times, watts)


@dataclass(frozen=True)
class ProcessUsage:
    """Resources that this process has used since its `ProcessMeter` was made.

    cpu_seconds: processor time.
    resident_bytes: current resident memory.
    above_baseline_bytes: resident memory above that when the meter was made, after all imports.
    peak_resident_bytes: largest resident memory of the process ever (VmHWM).
    cgroup_peak_bytes: peak of the control group, page cache included; None if not available.
    """

    cpu_seconds: float
    resident_bytes: int
    above_baseline_bytes: int
    peak_resident_bytes: int
    cgroup_peak_bytes: int | None


class ProcessMeter:
    """Measures processor time and memory of this process, as Linux counts them. Create it after all imports."""

    def __init__(self, process: Path = Path("/proc/self"), cgroups: Path = Path("/sys/fs/cgroup")) -> None:
        self._process, self._cgroups = process, cgroups
        self._cpu_seconds = time.process_time()
        self.baseline_bytes = self._status("VmRSS")

    def usage(self) -> ProcessUsage:
        """Return the resources used so far."""
        resident = self._status("VmRSS")
        return ProcessUsage(
            time.process_time() - self._cpu_seconds,
            resident,
            resident - self.baseline_bytes,
            self._status("VmHWM"),
            self._cgroup_peak(),
        )

    def _status(self, field: str) -> int:
        for line in _text(self._process / "status").splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024  # the kernel's kB are KiB
        raise DeviceError(f"{self._process / 'status'} has no {field}")

    def _cgroup_peak(self) -> int | None:
        try:
            for line in _text(self._process / "cgroup").splitlines():
                if line.startswith("0::/"):
                    return _whole(self._cgroups / line.removeprefix("0::/") / "memory.peak")
        except DeviceError:
            pass
        return None


def _signed(word: int) -> int:
    """Interpret a 16-bit word as two's complement."""
    return word - 2 * SIGN_BIT if word & SIGN_BIT else word


def _positive(shunt_ohms: float) -> float:
    if not (math.isfinite(shunt_ohms) and shunt_ohms > 0):
        raise DeviceError(f"a shunt resistance is a number of ohms above 0, not {shunt_ohms!r}")
    return shunt_ohms


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise DeviceError(f"{path} cannot be read: {reason}") from error


def _whole(path: Path) -> int:
    text = _text(path)
    if not text.isdecimal():
        raise DeviceError(f"{path} holds no whole number")
    return int(text)
