"""Several devices in one process, for tests with more devices than this machine has memory for processes.

``python -m tests.deployment.several_devices HOST:PORT CERTIFICATES CLIENTS FIRST COUNT``: each of COUNT clients from
FIRST on has a thread, a connection and a certificate of its own; CLIENTS is how many the training has.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

from mocosfl_priv.deployment.deployment import device_name
from mocosfl_priv.device.grpc_transport import Certificates, connect
from mocosfl_priv.device.participant import Device, stay
from tests.deployment.devices import IMAGES_PER_CLIENT, shard_views


def take_part(server: str, folder: Path, clients: int, client: int) -> None:
    own = Certificates.read(folder / device_name(client), "device")
    make = shard_views(clients)
    device = Device(device_name(client), IMAGES_PER_CLIENT, lambda program, welcome: make(client, program, welcome))
    stay(device, lambda: connect(server, own))


def main() -> None:
    server, folder, clients, first, count = sys.argv[1:]
    threads = [
        threading.Thread(target=take_part, args=(server, Path(folder), int(clients), client))
        for client in range(int(first), int(first) + int(count))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
