"""The command on a device: ``mocosfl-priv-client --server HOST:PORT --certs DIR --data SHARD``.

Exit codes: 0 the server has finished; 2 the request cannot be carried out as written; 130 interrupted.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from .errors import DeviceError
from .grpc_transport import Certificates, connect, require_loopback
from .messages import Report, Welcome
from .participant import Device, ShardViews, Views, stay
from .program import ClientProgram
from .shard import Shard
from .transport import Conversation

EXIT_UNUSABLE, EXIT_INTERRUPTED = 2, 130
STATUS = Path("/proc/self/status")
CGROUP, CGROUP_ROOT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def main(arguments: Sequence[str] | None = None) -> int:
    """Take part in a training until the server has finished; returns the exit code."""
    options = _parser().parse_args(arguments)
    level = logging.DEBUG if options.debug else logging.INFO
    logging.basicConfig(level=level, format="%(asctime)s %(name)s: %(message)s", stream=sys.stderr)
    try:
        run(options.server, options.certs, options.data, options.plain, options.name, options.image_size,
            options.patience)  # fmt: skip
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
) -> None:
    """The same with its options as arguments; raises DeviceError."""
    if plain == (certs is not None):
        raise DeviceError("give the folder with the device's certificate (--certs), or --plain on this machine only")
    if plain:
        require_loopback(server)
    certificates = None if certs is None else Certificates.read(certs, "device")
    measure = Measure()
    shard = open_data(data, image_size)
    device = Device(name, len(shard), lambda program, welcome: _views(shard, program, welcome), measure)

    def open_conversation() -> Conversation:
        return connect(server, certificates)

    stay(device, open_conversation, patience)


def open_data(data: Path, image_size: int | None) -> Shard:
    """A shard file; or a folder of images, which needs the size that the model takes."""
    if not data.is_dir():
        return Shard.read(data)
    if image_size is None:
        raise DeviceError(f"{data} is an image folder: say its images' size with --image-size")
    return Shard.from_folder(data, image_size)


def _views(shard: Shard, program: ClientProgram, welcome: Welcome) -> Views:
    if shard.image_shape != program.image_shape:
        raise DeviceError(f"images are {shard.image_shape}, and the server's model takes {program.image_shape}")
    return ShardViews(shard, program.settings, welcome.seed, welcome.client, welcome.drop_partial)


class Measure:
    """What this process takes, from when it is made on: memory counts from there, after the imports."""

    def __init__(self) -> None:
        self._baseline = _status_bytes("VmRSS")
        self._cpu = time.process_time()

    def __call__(self) -> Report:
        """Zeros where the system does not tell."""
        return Report(
            cpu_seconds=time.process_time() - self._cpu,
            resident_bytes=_status_bytes("VmRSS"),
            baseline_bytes=self._baseline,
            peak_bytes=_status_bytes("VmHWM"),
            cgroup_peak_bytes=_cgroup_peak(),
        )


def _status_bytes(field: str) -> int:
    try:
        lines = STATUS.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), 0)


def _cgroup_peak() -> int:
    """memory.peak of this process's control group (version 2); 0 where there is none."""
    try:
        path = CGROUP.read_text(encoding="ascii").rpartition("::")[2].strip()
        return int((CGROUP_ROOT / path.lstrip("/") / "memory.peak").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mocosfl-priv-client", description="Take part in a training as a client.")
    parser.add_argument("--server", required=True, metavar="HOST:PORT")
    parser.add_argument("--data", required=True, type=Path, metavar="SHARD|FOLDER", help="this client's images")
    parser.add_argument("--certs", type=Path, metavar="FOLDER", help="with ca.pem, device.pem and device.key")
    parser.add_argument("--image-size", type=int, metavar="PIXELS", help="of an image folder's images, as in the model")
    parser.add_argument("--patience", type=float, default=float("inf"), metavar="SECONDS",
                        help="give up after so long without a server [default: never]")  # fmt: skip
    parser.add_argument("--plain", action="store_true", help="no encryption: loopback addresses only")
    parser.add_argument("--name", default="", help="with --plain: which client this is, as in client-0003")
    parser.add_argument("--debug", action="store_true", help="log more")
    return parser


if __name__ == "__main__":
    # ONNX Runtime and numpy would start threads of their own that a small client only waits for
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
