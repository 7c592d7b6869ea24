"""How fast MocoSFL trains here, against a loop with the structure of its research code.

    uv run python -m benchmarks.training --json

Every contestant lives in a process of its own and they take turns, one step each, so that a noisy machine disturbs all
alike; ratios are medians over the rounds. A step is a real one: sampling, augmentation, clients, server, optimisers;
the synchronisation, timed apart, is spread over `sync_period` steps. ResNet-18 cut at 1, micro-batch 1.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.machine import processor, version

THREADS = 2
CLIENTS, MANY_CLIENTS = 100, 1000
IMAGES_EACH = 50
IMAGE_SIZE = 32
ROUNDS = 7
WARM_UP = 3
MANY_EVERY = 2  # the step of a thousand clients is long: every second round


@dataclass(frozen=True)
class Contestant:
    """A process that trains: who, with how many clients, how precisely, on which device."""

    naive: bool
    clients: int
    precision: str
    device: str


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args()
    result = measure(options.rounds, options.device)
    print(json.dumps(result, indent=None if options.json else 2))


def measure(rounds: int, device: str) -> dict[str, Any]:
    """All ratios, and the seconds behind them."""
    contestants = {
        "naive": Contestant(True, CLIENTS, "float32", device),
        "fp32": Contestant(False, CLIENTS, "float32", device),
        "bf16": Contestant(False, CLIENTS, "bfloat16", device),
        "many": Contestant(False, MANY_CLIENTS, "bfloat16", device),
    }
    context = multiprocessing.get_context("spawn")
    workers: dict[str, Connection] = {}
    processes = []
    for name, contestant in contestants.items():
        here, there = context.Pipe()
        process = context.Process(target=_work, args=(there, contestant), daemon=True)
        process.start()
        processes.append(process)
        workers[name] = here
        here.recv()  # ready: models built, warmed up; one after the other, so that nobody warms up beside another
    memory = {}
    for name, worker in workers.items():  # after whole steps and nothing else
        worker.send("memory")
        memory[name] = worker.recv()
    seconds: dict[str, list[float]] = {}

    def take(name: str, what: str) -> None:
        workers[name].send(what)
        seconds.setdefault(f"{name}_{what}", []).append(workers[name].recv())

    for turn in range(rounds):
        for what in ("step", "clients", "augmentation", "sync"):
            for name in ("naive", "fp32", "bf16"):
                take(name, what)
        take("bf16", "trunk")
        if turn % MANY_EVERY == 0:
            take("many", "step")
            take("many", "sync")
    for worker in workers.values():
        worker.send("stop")
    for process in processes:
        process.join()

    def step(name: str) -> list[float]:
        """Whole steps, each with its share of a synchronisation."""
        sync = statistics.median(seconds[f"{name}_sync"]) / 50
        return [s + sync for s in seconds[f"{name}_step"]]

    def ratio(slow: list[float], fast: list[float]) -> float:
        return round(statistics.median(a / b for a, b in zip(slow, fast, strict=True)), 3)

    paired = step("bf16")[::MANY_EVERY]
    return {
        "ratio_fp32": ratio(step("naive"), step("fp32")),
        "ratio_bf16": ratio(step("naive"), step("bf16")),
        "ratio_client_side": ratio(seconds["naive_clients"], seconds["fp32_clients"]),
        "ratio_augmentation": ratio(seconds["naive_augmentation"], seconds["fp32_augmentation"]),
        "ratio_1000_vs_100_per_image": round(ratio(step("many"), paired) * CLIENTS / MANY_CLIENTS, 3),
        "memory_1000_vs_100": round(memory["many"] / memory["bf16"], 3),
        "ratio_step_vs_trunk": ratio(step("bf16"), seconds["bf16_trunk"]),
        "median_seconds": {name: round(statistics.median(values), 4) for name, values in sorted(seconds.items())},
        "peak_megabytes": {name: round(value) for name, value in memory.items()},
        "setting": {
            "model": "resnet18, cut 1, 32 px, micro-batch 1, symmetric, no bottleneck",
            "threads": THREADS,
            "device": device,
            "rounds": rounds,
            "cpu": processor(),
            "torch": version("torch"),
        },
    }


def _work(pipe: Connection, contestant: Contestant) -> None:
    """A contestant's process: get ready, then do as told and say how long it took."""
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # waiting contestants must not keep the cores busy
    import torch

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    tasks = _naive_tasks(contestant) if contestant.naive else _engine_tasks(contestant)
    for _ in range(WARM_UP):
        tasks["step"]()
    pipe.send("ready")
    while (what := pipe.recv()) != "stop":
        if what == "memory":
            on_gpu = contestant.device == "cuda"
            peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else 0.0
            pipe.send(peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
            continue
        started = time.perf_counter()
        tasks[what]()
        if contestant.device == "cuda":
            torch.cuda.synchronize()
        pipe.send(time.perf_counter() - started)


def _images(clients: int) -> Any:
    import torch

    return torch.randint(0, 256, (clients * IMAGES_EACH, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8)


def _split_model() -> Any:
    from mocosfl_priv.config import ModelConfig
    from mocosfl_priv.models.split import build_split_model

    return build_split_model(ModelConfig(backbone="resnet18"), 1, IMAGE_SIZE, [0.5] * 3, [0.25] * 3)


def _naive_tasks(contestant: Contestant) -> dict[str, Callable[[], object]]:
    from torch import Tensor, randn_like

    from benchmarks.naive_training import NaiveMocoSFL
    from mocosfl_priv.config import TrainingConfig

    loop = NaiveMocoSFL(
        _split_model(), _images(contestant.clients), contestant.clients, 1, TrainingConfig(), contestant.device
    )
    views = [client.views() for client in loop.clients]
    gradients: list[Tensor] = []

    def clients() -> None:
        def server(directions: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
            if not gradients:
                gradients.extend(randn_like(queries) for queries, _ in directions)
            return gradients

        loop.client_step(server, views)

    return {
        "step": loop.step,
        "clients": clients,
        "augmentation": lambda: [client.views() for client in loop.clients],
        "sync": loop.average,
    }


def _engine_tasks(contestant: Contestant) -> dict[str, Callable[[], object]]:
    import torch
    from torch import Tensor

    from mocosfl_priv.config import ComputeConfig, TrainingConfig
    from mocosfl_priv.data.augmentation import moco_v2_view
    from mocosfl_priv.data.partitions import iid
    from mocosfl_priv.runtime.compute import Compute
    from mocosfl_priv.runtime.seeding import generator
    from mocosfl_priv.training.mocosfl import MocoSFL
    from mocosfl_priv.training.sampling import PooledClients, PoolShape

    count = contestant.clients
    settings = {"device": contestant.device, "precision": contestant.precision, "threads": THREADS}
    compute = Compute.resolve(ComputeConfig.model_validate(settings))
    training = TrainingConfig(clients=count, pool=count)
    images = _images(count)
    partition = iid(len(images), count, generator(0, "partition"))
    batches = PooledClients(images, partition, PoolShape.of(training), generator(0, "batches"))
    run = MocoSFL(_split_model(), batches, training, steps=10_000, compute=compute, seed=0)
    rng = generator(0, "benchmark", device=compute.device)
    pool, rows = torch.arange(count), [2] * count
    views = torch.rand(2 * count, 3, IMAGE_SIZE, IMAGE_SIZE, device=compute.device)
    rates = torch.full((count,), 0.01, dtype=torch.float64)
    gradients: list[Tensor] = []

    def clients() -> None:
        with compute.autocast():
            smashed = run.clients.encode_queries(pool, rows, views)
            run.clients.encode_keys(pool, rows, views)
        if not gradients:
            gradients.append(torch.randn_like(smashed))
        smashed.backward(gradients[0])
        run.clients.learn(pool, rates)

    def augmentation() -> None:
        """Everything that the loop's loaders do: draw images, and make two views of each on the device."""
        drawn = batches.next().images.to(compute.device)
        for _ in range(2):
            moco_v2_view(drawn, rng)

    smashed = torch.rand(2 * min(count, CLIENTS), 64, IMAGE_SIZE, IMAGE_SIZE, device=compute.device)

    def trunk() -> None:
        """The server alone, as far as its networks and optimiser go."""
        run.server.score(smashed, smashed, pool.repeat_interleave(2), 0.01, True)
        run.server.learn(0.01)

    return {
        "step": run.step,
        "clients": clients,
        "augmentation": augmentation,
        "sync": lambda: run.clients.average(pool),
        "trunk": trunk,
    }


if __name__ == "__main__":
    main()
