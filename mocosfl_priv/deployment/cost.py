"""The costs of clients on devices: measured, or computed where that is possible, each with its method.

The paper's own accounting (Li et al., ICLR 2023) is listed in addition.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mocosfl_priv.deployment.reception import Account
from mocosfl_priv.device.accounting import paper_traffic
from mocosfl_priv.models.footprint import participation_flops, tensor_bytes, training_flops
from mocosfl_priv.models.split import SplitModel, count_parameters, forward_flops

NOT_MEASURED = "not measured"
COLUMNS = ["client", "quantity", "value", "unit", "method"]
EVERYBODY, PAPER = "mean", "paper"  # values of the column `client`: mean over devices; the paper's accounting
CLIENT_OF_THE_TABLE = (EVERYBODY, PAPER)  # lines that the terminal shows
PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class ClientFigures:
    """The figures of a client that can be computed without running it on a device.

    parameters: number of parameters.
    smashed_elements: numbers in the smashed data of one image.
    forward_flops: FLOPs of the forward pass of one image.
    training_flops: FLOPs of the forward and backward pass of one image.
    tensor_bytes: computed memory of a training step with one image; of encoding it, if the client is frozen.
    rows_per_image: queries per image; there are as many keys.
    frozen: whether the client only encodes.
    images, epochs: images per epoch and epochs of an average client.
    """

    parameters: int
    smashed_elements: int
    forward_flops: int
    training_flops: int
    tensor_bytes: int
    rows_per_image: int
    frozen: bool
    images: int
    epochs: int

    @classmethod
    def of(cls, model: SplitModel, *, rows_per_image: int, frozen: bool, images: int, epochs: int) -> ClientFigures:
        """Compute the figures from the server's copy of the client."""
        client, shape = model.client, model.image_shape
        return cls(
            parameters=count_parameters(client),
            smashed_elements=int(np.prod(model.smashed_shape)),
            forward_flops=forward_flops(client, shape),
            training_flops=training_flops(client, shape),
            tensor_bytes=tensor_bytes(client, shape, frozen),
            rows_per_image=rows_per_image,
            frozen=frozen,
            images=images,
            epochs=epochs,
        )

    def flops(self, drawn: int) -> int:
        """Return the FLOPs of a client that has drawn `drawn` images."""
        return participation_flops(
            self.forward_flops, self.training_flops, rows=self.rows_per_image * drawn, frozen=self.frozen
        )


def device_record(
    accounts: Mapping[int, Account], drawn: Sequence[int], figures: ClientFigures, terms: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the record of a run's devices for ``run.json``, from which :func:`cost_table` can be made at any time.

    Args:
        accounts: Traffic, reports and latencies by client.
        drawn: Number of images that each client has drawn.
        figures: Computed figures of a client.
        terms: Settings of the run, such as codecs and deadline.

    """
    return {
        "terms": dict(terms),
        "figures": asdict(figures),
        "clients": [
            {
                "client": client,
                "name": account.name,
                "drawn": int(drawn[client]),
                "traffic": asdict(account.traffic),
                "report": asdict(account.report),
                "latency": _percentiles(account.latencies),
                "conversations": account.conversations,
                "refusals": account.refusals,
                "steps_missed": account.steps_missed,
            }
            for client, account in accounts.items()
        ],
    }


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    return {f"p{p}": float(np.percentile(seconds, p)) for p in PERCENTILES} if seconds else {}


def cost_table(record: Mapping[str, Any]) -> pd.DataFrame:
    """Return the cost table: a line per device and quantity, their means, and the paper's accounting.

    record: from :func:`device_record`. In the column ``value``, NaN stands for "not measured".
    """
    figures = ClientFigures(**record["figures"])
    lines = [line for device in record["clients"] for line in _device_lines(device, figures)]
    values: dict[tuple[str, str, str], list[float]] = {}
    for _, quantity, value, unit, how in lines:
        values.setdefault((quantity, unit, how), []).append(value)
    means = [(EVERYBODY, quantity, float(np.mean(v)), unit, how) for (quantity, unit, how), v in values.items()]
    return pd.DataFrame([*lines, *means, *_paper_lines(figures)], columns=COLUMNS)


Line = tuple[str, str, float, str, str]


def _device_lines(device: Mapping[str, Any], figures: ClientFigures) -> list[Line]:
    name, traffic, report = device["name"], device["traffic"], device["report"]
    tensors = "tensors and program at the transport, counted by the server"
    tcp = "TCP_INFO of the server's sockets: TLS and framing included, TCP and IP headers not"
    process = "the device's own /proc, last report"
    lines: list[tuple[str, float | None, str, str]] = [
        ("payload_up", traffic["payload_received"], "bytes", tensors),
        ("payload_down", traffic["payload_sent"], "bytes", tensors),
        ("wire_up", traffic["wire_received"], "bytes", tcp),
        ("wire_down", traffic["wire_sent"], "bytes", tcp),
        ("messages_up", traffic["messages_received"], "messages", "counted by the server"),
        ("messages_down", traffic["messages_sent"], "messages", "counted by the server"),
        ("cpu", report["cpu_seconds"] or None, "s", "process time since the imports, last report"),
        ("encode", report["encode_seconds"], "s", "wall clock on the device"),
        ("learn", report["learn_seconds"], "s", "wall clock on the device"),
        ("flops", figures.flops(device["drawn"]), "FLOPs", "torch's counter on the server's copy, times images drawn"),
        ("tensor_memory", figures.tensor_bytes, "bytes", "analytic: parameters, copies, kept activations, one image"),
        (
            "resident_above_baseline",
            _above(report, "resident_bytes"),
            "bytes",
            f"VmRSS less imports'; {process}",
        ),
        ("resident_peak_above_baseline", _above(report, "peak_bytes"), "bytes", f"VmHWM less imports'; {process}"),
        ("resident_peak", report["peak_bytes"] or None, "bytes", f"VmHWM; {process}"),
        ("cgroup_peak", report["cgroup_peak_bytes"] or None, "bytes", "memory.peak of its control group"),
        *(
            (f"latency_{name}", value, "s", "from the server's request to the device's smashed data")
            for name, value in device["latency"].items()
        ),
        ("energy", report["joules"] if report["energy_method"] else None, "J", _energy(report)),
        ("steps_missed", device["steps_missed"], "steps", "not answered before the deadline"),
        ("conversations", device["conversations"], "connections", "counted by the server"),
    ]
    return [
        (name, quantity, float("nan"), unit, NOT_MEASURED)
        if value is None
        else (name, quantity, float(value), unit, how)
        for quantity, value, unit, how in lines
    ]


def _above(report: Mapping[str, Any], field: str) -> float | None:
    return max(0, report[field] - report["baseline_bytes"]) if report[field] and report["baseline_bytes"] else None


def _energy(report: Mapping[str, Any]) -> str:
    idle, seconds = report["idle_watts"], report["energy_seconds"]
    return f"{report['energy_method']}; {seconds:.0f} s, idle {idle:.2f} W"


def _paper_lines(figures: ClientFigures) -> list[Line]:
    """The paper's accounting for an average client of this run."""
    paper = paper_traffic(
        figures.parameters,
        figures.smashed_elements,
        images=figures.images,
        epochs=figures.epochs,
        frozen=figures.frozen,
    )
    how = "Li et al. (ICLR 2023): two vectors per image and epoch (one if frozen), one copy of the weights per epoch"
    return [
        (PAPER, "communication", paper.total, "MB (2^20)", how),
        (PAPER, "smashed", paper.smashed, "MB (2^20)", how),
        (PAPER, "weights", paper.weights, "MB (2^20)", how),
    ]


def cost_lines(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the lines of single devices for JSON, without means; ``value`` is None if it was not measured."""
    figures = ClientFigures(**record["figures"])
    lines = [line for device in record["clients"] for line in _device_lines(device, figures)]
    return [
        dict(zip(COLUMNS, (name, quantity, None if math.isnan(value) else value, unit, how), strict=True))
        for name, quantity, value, unit, how in lines
    ]


def write_costs(record: Mapping[str, Any], path: Path) -> None:
    """Write the cost table of `record` as CSV to `path`."""
    cost_table(record).to_csv(path, index=False)
