"""What a client takes of a device: memory, time and bytes, for ResNet-18 cut after its stem.

    uv run python -m benchmarks.device --json

Every client lives in a fresh process that imports the device package and nothing of torch; its micro-batch is one
image, encoded as the settings say, on one thread. Memory is the kernel's own count (VmRSS, VmHWM). With `--import grpc`
the process also has what a client that talks imports.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

STEPS = 50
BOTTLENECKS = ("none", "C4S2")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--cut", type=int, default=1)
    parser.add_argument("--import", dest="imported", help="a module that every client imports first, as in grpc")
    parser.add_argument("--program", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.program is not None:
        print(json.dumps(run_client(options.program, options.steps, options.imported)))
        return
    result = measure(options.steps, options.cut, options.imported)
    print(json.dumps(result, indent=None if options.json else 2))


def measure(steps: int, cut: int, imported: str | None) -> dict[str, Any]:
    """Every client in a process of its own."""
    clients = {}
    with tempfile.TemporaryDirectory() as folder:
        for bottleneck in BOTTLENECKS:
            for trainable in (True, False):
                path = Path(folder) / "client.program"
                path.write_bytes(export(bottleneck, cut, trainable))
                command = [sys.executable, "-m", "benchmarks.device", "--program", str(path), "--steps", str(steps)]
                command += ["--import", imported] if imported else []
                done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603 - our own code
                name = f"cut {cut}, {bottleneck}, {'training' if trainable else 'frozen'}"
                clients[name] = {"program_bytes": path.stat().st_size, **json.loads(done.stdout)}
    return {"machine": platform.machine(), "steps": steps, "imported": imported, "clients": clients}


def export(bottleneck: str, cut: int, trainable: bool) -> bytes:
    """The program of a fresh ResNet-18 client, as a server would hand it out."""
    from mocosfl_priv.config import ModelConfig, TrainingConfig
    from mocosfl_priv.deployment.export import client_settings, export_client
    from mocosfl_priv.models.split import build_split_model

    model = build_split_model(ModelConfig(bottleneck=bottleneck), cut, 32, [0.5] * 3, [0.25] * 3)
    return export_client(model.client, model.image_shape, client_settings(TrainingConfig(), trainable)).to_bytes()


def run_client(path: Path, steps: int, imported: str | None) -> dict[str, Any]:
    """So many steps of one client: augment, encode, and learn where gradients come back."""
    import time

    import numpy as np

    if imported:
        importlib.import_module(imported)

    from mocosfl_priv.device.augmentation import two_views
    from mocosfl_priv.device.codecs import encode
    from mocosfl_priv.device.meters import ProcessMeter
    from mocosfl_priv.device.program import ClientProgram
    from mocosfl_priv.device.runtime import DeviceClient

    meter = ProcessMeter()
    client = DeviceClient(ClientProgram.from_bytes(path.read_bytes()))
    rng = np.random.default_rng(0)
    seconds: dict[str, list[float]] = {"augment": [], "encode": [], "learn": []}
    sent = 0
    for _ in range(steps):
        image = rng.integers(0, 256, (1, *client.program.image_shape), dtype=np.uint8)
        started = time.perf_counter()
        first, second = two_views(image, rng)
        augmented = time.perf_counter()
        once = client.settings.encodes_once
        queries = client.encode_queries(first if once else np.concatenate([first, second]))
        keys = client.encode_keys(second if once else np.concatenate([second, first]))
        encoded = time.perf_counter()
        sent = encode(queries, "fp32").nbytes + encode(keys, "fp32").nbytes
        if client.trainable:
            client.learn(rng.normal(0, 1e-4, queries.shape).astype(np.float32), 0.06)
        learned = time.perf_counter()
        for name, duration in zip(seconds, (augmented - started, encoded - augmented, learned - encoded), strict=True):
            seconds[name].append(duration)
    usage = meter.usage()
    assert "torch" not in sys.modules
    return {
        "imported_megabytes": meter.baseline_bytes / 1e6,
        "peak_megabytes": usage.peak_resident_bytes / 1e6,
        "above_imports_megabytes": (usage.peak_resident_bytes - meter.baseline_bytes) / 1e6,
        "cpu_milliseconds_per_step": 1e3 * usage.cpu_seconds / steps,
        "median_milliseconds": {name: 1e3 * float(np.median(values)) for name, values in seconds.items()},
        "payload_bytes_up_per_step": sent,
    }


if __name__ == "__main__":
    main()
