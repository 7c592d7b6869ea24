"""Several devices in one process, for tests with more devices than a machine has memory for processes.

``python -m tests.deployment.several_devices HOST:PORT FOLDER FIRST COUNT``: each of COUNT clients from FIRST on has a
thread, a connection, and in FOLDER a certificate and a shard of its own. As a real device it imports no torch.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

from mocosfl_priv.device.client import run


def main() -> None:
    server, folder, first, count = sys.argv[1:]
    names = [f"client-{client:04d}" for client in range(int(first), int(first) + int(count))]
    threads = [
        threading.Thread(target=run, args=(server, Path(folder, name), Path(folder, f"{name}.shard"))) for name in names
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
