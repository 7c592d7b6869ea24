"""Costs of a client: measured, counted, or said not to be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from mocosfl_priv.api import RunResult
from mocosfl_priv.cli import main
from mocosfl_priv.results import RunRecord, StoredRun, read_runs
from reports.analysis.client_costs import HEADINGS, NOT_MEASURED, Cost, client_costs, cost_columns, methods_of
from reports.analysis.per_image import GROUP
from reports.output.paper_tables import paper_tables

SYSTEM = ("none", 1, 0.0)


def line(client: str, quantity: str, value: float | None, unit: str, method: str) -> dict[str, Any]:
    return {"client": client, "quantity": quantity, "value": value, "unit": unit, "method": method}


def served(record: RunRecord) -> RunRecord:
    """The same run, as if two devices had taken part, of which one has a meter."""
    lines = [
        line("client-0000", "wire_up", 1000.0, "bytes", "TCP_INFO"),
        line("client-0001", "wire_up", 3000.0, "bytes", "TCP_INFO"),
        line("client-0000", "energy", 12.0, "J", "INA219; 60 s, idle 2.10 W"),
        line("client-0001", "energy", None, "J", NOT_MEASURED),
        line("client-0000", "cgroup_peak", None, "bytes", NOT_MEASURED),
        line("client-0001", "cgroup_peak", None, "bytes", NOT_MEASURED),
    ]
    return replace(record, info={**record.info, "device_costs": lines})


def test_a_simulation_counts_what_it_can_and_measures_nothing(tiny_run: RunResult) -> None:
    record = tiny_run.record
    costs = client_costs(record, SYSTEM)
    traffic = record.info["systems"][0]["traffic_bytes"]
    assert costs["payload_up"].value == (traffic["smashed_up"] + traffic["weights_up"]) / 4  # clients
    assert costs["payload_down"].value == (traffic["gradient_down"] + traffic["weights_down"]) / 4
    both = (costs["payload_up"].value or 0) + (costs["payload_down"].value or 0)
    assert 4 * both / 2**20 == pytest.approx(record.cells["training_megabytes"][0])
    images = record.info["roles"]["client_private"]["images"] / 4
    forward = record.cells["client_flops"][0]
    # two queries and two keys of each image; gradients cost more than nothing and less than three passes
    assert 6 * forward * images < (costs["flops"].value or 0) < 12 * forward * images
    assert (costs["tensor_memory"].value or 0) > 16 * record.cells["client_parameters"][0]
    measured = {name for name, cost in costs.items() if cost.value is not None}
    assert measured == {"payload_up", "payload_down", "flops", "tensor_memory"}
    assert all("simulated" in cost.method or "analytic" in cost.method for cost in costs.values() if cost.value)


def test_devices_are_averaged_over_those_that_measured(tiny_run: RunResult) -> None:
    costs = client_costs(served(tiny_run.record), SYSTEM)
    assert costs["wire_up"].value == 2000 and costs["wire_up"].text == "2 kB"
    assert costs["energy"].text == "12 J" and costs["cgroup_peak"].text == NOT_MEASURED
    assert methods_of([costs]) == {
        "wire up": ["TCP_INFO"],
        "energy": ["INA219; 60 s, idle 2.10 W (1 of 2 devices)"],
    }


def test_files_say_what_was_not_measured(tiny_run: RunResult) -> None:
    record = served(tiny_run.record)
    columns = cost_columns(record, record.cells[GROUP])
    assert len(columns) == len(record.cells) and len(columns.columns) == len(HEADINGS)
    assert set(columns["client_energy_joules"]) == {12.0} and set(columns["client_cpu_seconds"]) == {NOT_MEASURED}
    table = paper_tables([StoredRun({}, record)])[-1]
    assert table.title.startswith("Cost of an average client") and table.lines[0][3] == "2 kB"
    assert "idle 2.10 W" in table.note


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(1.5e9, "FLOPs", "1.5 GFLOPs"), (512.0, "bytes", "512 B"), (12345.0, "s", "12,345 s"), (0.0123, "s", "0.0123 s"),
     (1200.0, "messages", "1.2 k"), (7.0, "messages", "7")],
)  # fmt: skip
def test_numbers_carry_their_unit(value: float, unit: str, text: str) -> None:
    assert Cost(value, unit, "counted").text == text


def test_the_page_has_a_section_of_costs(sweep_page: Path) -> None:
    text = sweep_page.read_text(encoding="utf-8")
    assert "<h3>On the client</h3>" in text and "<th>cgroup peak</th>" in text and "<td>not measured</td>" in text


@pytest.mark.slow
def test_what_devices_measured_stands_in_the_report(tmp_path: Path) -> None:
    """Two real clients over real connections, each a process."""
    out = tmp_path / "loopback"
    with pytest.raises(SystemExit) as ended:
        main(["loopback", "device/loopback", "--clients", "2", "--out", str(out), "--set", "training.epochs=1"])
    assert not ended.value.code
    measured = pd.read_csv(out / "cost.csv")
    devices = measured[measured["client"].str.startswith("client-")]
    (system,) = pd.read_csv(out / "summary.csv")[GROUP].drop_duplicates().itertuples(index=False, name=None)
    (run,) = read_runs(out)
    costs = client_costs(run.record, system)
    for name, cost in costs.items():
        values = devices["value"][devices["quantity"] == name].dropna()
        assert (cost.value is None) == values.empty
        if not values.empty:
            assert cost.value == pytest.approx(values.mean()) and cost.method != NOT_MEASURED
    assert costs["wire_up"].value >= costs["payload_up"].value > 0 and costs["messages_up"].value > 0  # type: ignore[operator]
    assert costs["cpu"].value and costs["resident_above_baseline"].value and costs["latency_p99"].value
    text = (out / "report.html").read_text(encoding="utf-8")
    assert costs["wire_up"].text in text and "TCP_INFO" in text and "VmRSS less imports" in text
    written = pd.read_csv(out / "summary.csv")
    assert written["client_wire_up_bytes"].iloc[0] == pytest.approx(costs["wire_up"].value)
