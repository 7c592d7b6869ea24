"""The command-line program on a device: ``mocosfl-priv-client --server HOST:PORT --certs FOLDER --data SHARD``.

Exit codes: 0 the server has finished; 2 the request cannot be carried out as written; 130 interrupted.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .address import parse
from .errors import DeviceError
from .grpc_transport import Certificates, connect, require_loopback
from .messages import LONGEST_TEXT, Report, Welcome
from .meters import ProcessMeter, Sampler, idle_watts, open_meter
from .participant import Device, ShardViews, Views, stay
from .program import ClientProgram
from .shard import Shard
from .transport import Conversation

EXIT_UNUSABLE, EXIT_INTERRUPTED = 2, 130
IDLE_SECONDS = 10.0
LARGEST_SIDE = 512  # pixels, as `data.image_size` allows


def main(arguments: Sequence[str] | None = None) -> int:
    """Take part in a training until the server has finished; returns the exit code."""
    options = _parser().parse_args(arguments)
    level = logging.DEBUG if options.debug else logging.INFO
    logging.basicConfig(level=level, format="%(asctime)s %(name)s: %(message)s", stream=sys.stderr)
    try:
        run(options.server, options.certs, options.data, options.plain, options.name, options.image_size,
            options.patience, options.meter, options.idle, options.noise_seed)  # fmt: skip
    except DeviceError as error:
        print(f"mocosfl-priv-client: {error}", file=sys.stderr)
        return EXIT_UNUSABLE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return 0


def run(
    server: str,
    certs: Path | None,
    data: Path,
    plain: bool = False,
    name: str = "",
    image_size: int | None = None,
    patience: float = float("inf"),
    meter: str | None = None,
    idle: float = IDLE_SECONDS,
    noise_seed: int | None = None,
) -> None:
    """Take part in a training until the server has finished.

    Args:
        server: HOST:PORT of the server.
        certs: Folder with ca.pem, device.pem and device.key; None with `plain`.
        data: A shard file, or an image folder.
        plain: Whether to connect without encryption, on a loopback address only.
        name: With `plain`, the name of this client.
        image_size: With an image folder, pixels per side of the model's images.
        patience: Seconds without a server after which to give up.
        meter: Name of the energy meter (see :func:`open_meter`); None for none.
        idle: Seconds for which the meter first measures the idle device.
        noise_seed: Seed of a defense's noise, for repeatable experiments.

    Raises:
        DeviceError: An option is invalid, data or certificates cannot be used, or the server refuses this device.

    """
    if noise_seed is not None and noise_seed < 0:
        raise DeviceError(f"--noise-seed must be 0 or larger, not {noise_seed}")
    if plain == (certs is not None):
        raise DeviceError("give either --certs FOLDER with the device's certificate, or --plain (this machine only)")
    parse(server, "--server")
    if image_size is not None and not 1 <= image_size <= LARGEST_SIDE:
        raise DeviceError(f"--image-size must lie between 1 and {LARGEST_SIDE}, not {image_size}")
    if not patience > 0:
        raise DeviceError(f"--patience must be a number of seconds above 0, not {patience:g}")
    if not 0 <= idle < float("inf"):
        raise DeviceError(f"--idle must be a number of seconds, 0 or more, not {idle:g}")
    if plain:
        require_loopback(server)
    certificates = None if certs is None else Certificates.read(certs, "device")
    shard = open_data(data, image_size)

    def open_conversation() -> Conversation:
        return connect(server, certificates)

    with Measure(meter, idle) as measure:
        device = Device(name, len(shard), lambda program, welcome: _views(shard, program, welcome), measure, noise_seed)
        stay(device, open_conversation, patience)


def open_data(data: Path, image_size: int | None) -> Shard:
    """Read a shard file, or a folder of images, which needs `image_size`; raises DeviceError if it cannot be read."""
    try:
        is_folder = data.is_dir()
    except OSError as error:  # a folder above it may not be looked into
        raise DeviceError(f"{data} cannot be opened: {error.strerror}") from error
    if not is_folder:
        return Shard.read(data)
    if image_size is None:
        raise DeviceError(f"{data} is an image folder: give the size of the model's images with --image-size")
    return Shard.from_folder(data, image_size)


def _views(shard: Shard, program: ClientProgram, welcome: Welcome) -> Views:
    if shard.image_shape != program.image_shape:
        raise DeviceError(f"images have shape {shard.image_shape}, but the server's model takes {program.image_shape}")
    return ShardViews(shard, program.settings, welcome.seed, welcome.client, welcome.drop_partial)


class Measure:
    """Measures CPU time and memory of this process from now on; as a context manager it also reads an energy meter.

    Args:
        meter: Name of the meter (see :func:`open_meter`); None for none.
        idle: Seconds for which the meter first measures the idle device.

    """

    def __init__(self, meter: str | None = None, idle: float = IDLE_SECONDS) -> None:
        self._process = ProcessMeter()
        self._meter = None if meter is None else open_meter(meter)
        self._idle_watts = None if self._meter is None or idle <= 0 else idle_watts(self._meter, idle)
        self._sampler = None if self._meter is None else Sampler(self._meter)

    def __enter__(self) -> Measure:
        if self._sampler is not None:
            self._sampler.__enter__()
        return self

    def __exit__(self, *ended: Any) -> None:
        if self._sampler is not None:
            self._sampler.__exit__(*ended)

    def __call__(self) -> Report:
        """Return what was measured so far; zeros stand for quantities that are not measured."""
        usage = self._process.usage()
        energy = None if self._sampler is None else self._sampler.energy(self._idle_watts)
        measured = energy is not None and energy.joules is not None
        return Report(
            cpu_seconds=usage.cpu_seconds,
            resident_bytes=usage.resident_bytes,
            baseline_bytes=self._process.baseline_bytes,
            peak_bytes=usage.peak_resident_bytes,
            cgroup_peak_bytes=usage.cgroup_peak_bytes or 0,
            joules=energy.joules if energy is not None and energy.joules is not None else 0.0,
            idle_watts=self._idle_watts or 0.0,
            energy_seconds=energy.seconds if energy is not None else 0.0,
            energy_method=energy.method[:LONGEST_TEXT] if energy is not None and measured else "",
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mocosfl-priv-client", description="Take part in a training as a client.")
    parser.add_argument("--server", required=True, metavar="HOST:PORT", help="address of the server")
    parser.add_argument("--data", required=True, type=Path, metavar="SHARD|FOLDER",
                        help="this client's images: a shard file or an image folder")  # fmt: skip
    parser.add_argument("--certs", type=Path, metavar="FOLDER",
                        help="folder with ca.pem, device.pem and device.key")  # fmt: skip
    parser.add_argument("--image-size", type=int, metavar="PIXELS",
                        help="with an image folder: pixels per side of the model's images")  # fmt: skip
    parser.add_argument("--patience", type=float, default=float("inf"), metavar="SECONDS",
                        help="give up after this long without a server [default: never]")  # fmt: skip
    parser.add_argument(
        "--meter", help="energy meter: auto, pmic, rapl, ina219:BUS:ADDRESS:SHUNT, ina3221:... [default: none]"
    )
    parser.add_argument("--idle", type=float, default=IDLE_SECONDS, metavar="SECONDS",
                        help="how long the meter first measures the idle device [default: %(default)g]")  # fmt: skip
    parser.add_argument("--noise-seed", type=int, metavar="N",
                        help="seed of a defense's noise, for repeatable experiments; anyone who knows it can remove "
                             "the noise [default: randomness of the operating system]")  # fmt: skip
    parser.add_argument("--plain", action="store_true", help="no encryption; only allowed on loopback addresses")
    parser.add_argument("--name", default="", help="with --plain: the name of this client, such as client-0003")
    parser.add_argument("--debug", action="store_true", help="log more")
    return parser


if __name__ == "__main__":
    # threads of ONNX Runtime and NumPy slow a small client down
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
