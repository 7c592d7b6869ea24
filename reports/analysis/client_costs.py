"""The costs of a client, each with its method: measured on devices if the run had any, or else computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from mocosfl_priv.results import RunRecord
from reports.analysis.findings_text import compact
from reports.analysis.per_image import GROUP, Key

NOT_MEASURED = "not measured"
QUANTITIES = {  # name in run.json: (heading for readers, column of files)
    "payload_up": ("payload up", "client_payload_up_bytes"),
    "payload_down": ("payload down", "client_payload_down_bytes"),
    "wire_up": ("wire up", "client_wire_up_bytes"),
    "wire_down": ("wire down", "client_wire_down_bytes"),
    "messages_up": ("messages up", "client_messages_up"),
    "messages_down": ("messages down", "client_messages_down"),
    "cpu": ("CPU", "client_cpu_seconds"),
    "flops": ("FLOPs", "client_participation_flops"),
    "tensor_memory": ("tensor memory", "client_tensor_bytes"),
    "resident_above_baseline": ("resident above imports", "client_resident_above_imports_bytes"),
    "resident_peak_above_baseline": ("peak above imports", "client_peak_above_imports_bytes"),
    "cgroup_peak": ("cgroup peak", "client_cgroup_peak_bytes"),
    "latency_p50": ("step, median", "client_step_p50_seconds"),
    "latency_p90": ("step, 90 %", "client_step_p90_seconds"),
    "latency_p99": ("step, 99 %", "client_step_p99_seconds"),
    "energy": ("energy", "client_energy_joules"),
}
HEADINGS = [heading for heading, _ in QUANTITIES.values()]
PREFIXED = {"bytes": "B", "FLOPs": "FLOPs", "messages": ""}  # units that are printed with the prefixes k, M and G


@dataclass(frozen=True)
class Cost:
    """One quantity of an average client over the whole training.

    value: None if it was neither measured nor computed.
    method: how it was measured or computed.
    """

    value: float | None
    unit: str
    method: str

    @property
    def text(self) -> str:
        """Value and unit, for readers."""
        if self.value is None:
            return NOT_MEASURED
        if self.unit not in PREFIXED:
            return f"{self.value:,.3g} {self.unit}" if self.value < 1000 else f"{self.value:,.0f} {self.unit}"
        number, unit = compact(self.value), PREFIXED[self.unit]
        return f"{number}{unit}" if number[-1].isalpha() else f"{number} {unit}".strip()


NOTHING = Cost(None, "", NOT_MEASURED)


def client_costs(record: RunRecord, system: Key) -> dict[str, Cost]:
    """Return the costs of an average client of `system`, by the names of `QUANTITIES`.

    If the run had devices, a cost is the mean over the devices that measured it; otherwise it is what a simulation can
    compute.
    """
    lines = record.info.get("device_costs")
    found = _measured(lines) if lines else _counted(record, system)
    return {name: found.get(name, NOTHING) for name in QUANTITIES}


def _measured(lines: Sequence[dict[str, Any]]) -> dict[str, Cost]:
    """The mean over devices; a run with devices has one system."""
    devices = {line["client"] for line in lines}
    found = {}
    for name in dict.fromkeys(line["quantity"] for line in lines):
        mine = [line for line in lines if line["quantity"] == name and line["value"] is not None]
        if mine:
            methods = "; ".join(dict.fromkeys(str(line["method"]) for line in mine))
            of = f" ({len(mine)} of {len(devices)} devices)" if len(mine) < len(devices) else ""
            found[name] = Cost(float(np.mean([line["value"] for line in mine])), str(mine[0]["unit"]), methods + of)
    return found


def _counted(record: RunRecord, system: Key) -> dict[str, Cost]:
    """The costs that a simulation can compute, as a mean over clients and seeds."""
    trained = [
        entry for entry in record.info.get("systems", []) if tuple(entry[name] for name in GROUP) == tuple(system)
    ]
    clients = record.info["config"]["training"]["clients"]
    found = {}
    traffic = [entry["traffic_bytes"] for entry in trained if "traffic_bytes" in entry]
    if traffic:
        how = "simulated: size of the messages of all clients, divided by their number"
        ways = {"payload_up": ("smashed_up", "weights_up"), "payload_down": ("gradient_down", "weights_down")}
        for name, parts in ways.items():
            total = float(np.mean([sum(entry[part] for part in parts) for entry in traffic]))
            found[name] = Cost(total / clients, "bytes", how)
    analytic = [entry["analytic_cost"] for entry in trained if "analytic_cost" in entry]
    for name, key, unit, how in (
        ("flops", "participation_flops", "FLOPs", "analytic: torch's counter, times the images of an average client"),
        ("tensor_memory", "client_tensor_bytes", "bytes", "analytic: parameters, their copies, activations, one image"),
    ):
        if analytic:
            found[name] = Cost(float(np.mean([entry[key] for entry in analytic])), unit, how)
    return found


def methods_of(costs: Sequence[dict[str, Cost]]) -> dict[str, list[str]]:
    """Return the methods of each quantity by its heading, for the quantities that some system has."""
    found: dict[str, list[str]] = {}
    for name, (heading, _) in QUANTITIES.items():
        methods = dict.fromkeys(cost[name].method for cost in costs if cost[name].value is not None)
        if methods:
            found[heading] = list(methods)
    return found


def cost_columns(record: RunRecord, systems: pd.DataFrame) -> pd.DataFrame:
    """Return the costs of each row's system as columns, in bytes, seconds, FLOPs and joules, or "not measured".

    systems: a table with the columns ``defense``, ``cut_layer`` and ``target_fraction``.
    """
    keys = [tuple(key) for key in systems.itertuples(index=False, name=None)]
    known = {key: client_costs(record, key) for key in dict.fromkeys(keys)}
    return pd.DataFrame(
        {
            column: [NOT_MEASURED if (value := known[key][name].value) is None else value for key in keys]
            for name, (_, column) in QUANTITIES.items()
        },
        index=systems.index,
    )
