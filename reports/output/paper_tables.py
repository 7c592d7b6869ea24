"""Tables in the layout of the MocoSFL and TAResSFL papers, with our numbers beside the published ones."""

from __future__ import annotations

from collections.abc import Sequence

from mocosfl_priv.evaluation.statistics import Interval
from mocosfl_priv.results import UNDEFENDED, RunRecord, StoredRun
from reports.analysis import published
from reports.analysis.client_costs import HEADINGS, client_costs, methods_of
from reports.analysis.comparison import TARESSFL
from reports.analysis.published import Published
from reports.analysis.summary import SummaryRow, headline_rows, key_of, summarise
from reports.output.markup import Table

NOT_PUBLISHED = "–"


def paper_tables(runs: Sequence[StoredRun]) -> list[Table]:
    """Return the tables on accuracy, attacks, defenses, communication and costs of a client; empty ones are left out.

    runs: one run, or the variants of a sweep, which share each table with a column per axis.
    """
    of_runs = [(list(run.labels.values()), _of_run(run.record)) for run in runs]
    merged = []
    for kind in zip(*(tables for _, tables in of_runs), strict=True):
        lines = [[*labels, *line] for (labels, _), table in zip(of_runs, kind, strict=True) for line in table.lines]
        notes = " ".join(dict.fromkeys(table.note for table in kind if table.lines))
        if lines:
            merged.append(Table(kind[0].title, [*runs[0].labels, *kind[0].headings], lines, notes))
    return merged


def _of_run(record: RunRecord) -> list[Table]:
    rows = headline_rows(summarise(record))
    return [
        _accuracies(record, rows),
        _attacks(record, rows),
        _defenses(record, rows),
        _communication(record, rows),
        _client(record, rows),
    ]


def _accuracies(record: RunRecord, rows: list[SummaryRow]) -> Table:
    """Undefended systems, like the papers' tables on IID and non-IID clients."""
    dataset, clients = record.info["config"]["data"]["dataset"], record.info["config"]["training"]["clients"]
    partition = _partition(record)
    lines = [
        [
            _method(row),
            dataset,
            partition,
            str(clients),
            _interval(row.linear, 100, 2),
            _printed(published.accuracy(row.cut_layer, dataset, partition, clients), 2),
            str(row.seeds),
        ]
        for row in rows
        if _is_plain(record, row)
    ]
    return Table(
        "Linear-probe accuracy (%) without a defense",
        ["method", "data set", "partition", "clients", "ours", "published", "seeds"],
        lines,
        f"{_brackets(record)} Published: Li et al., ICLR 2023, selected on test images.",
    )


def _attacks(record: RunRecord, rows: list[SummaryRow]) -> Table:
    """TAResSFL, like the paper's table on target-aware pre-training, with an additional column for the MSE floor."""
    on_cifar = record.info["config"]["data"]["dataset"] == "cifar10"
    lines = []
    for row in rows:
        if _origin(record, row) != TARESSFL:
            continue
        key = (_method(row), row.target_fraction)
        accuracy, error = published.TARESSFL.get(key, (None, None)) if on_cifar else (None, None)
        lines.append(
            [
                row.defense,
                _method(row),
                f"{100 * row.target_fraction:.3g}",
                _interval(row.linear, 100, 2),
                _printed(accuracy, 2),
                _interval(row.metrics["mse"], 1, 4),
                _printed(error, 3),
                f"{row.mse_floor:.4f}",
                _interval(row.leak_ratio, 1, 3),
                row.attack,
            ]
        )
    return Table(
        "TAResSFL: accuracy (%) and MSE of the attack",
        ["defense", "method", "target data (%)", "accuracy, ours", "published", "MSE, ours", "published", "MSE floor",
         "R", "our attack"],
        lines,
        f"{_brackets(record)} Published MSEs were measured on other images, with four fifths of the contrast of real "
        "images. A blind guess scores 0.0405 on those, so compare published MSEs with 0.0405 and not with our floor.",
    )  # fmt: skip


def _defenses(record: RunRecord, rows: list[SummaryRow]) -> Table:
    """All systems, like ResSFL's table of baselines; empty if all of them are in the other tables."""
    others = [row for row in rows if _origin(record, row) != TARESSFL and not _is_plain(record, row)]
    lines = [
        [
            row.defense,
            _method(row),
            f"{100 * row.target_fraction:.3g}",
            _interval(row.linear, 100, 2),
            _interval(row.metrics["mse"], 1, 4),
            f"{row.mse_floor:.4f}",
            _interval(row.similarity, 1, 3),
            _interval(row.leak_ratio, 1, 3),
            row.attack,
        ]
        for row in rows
        if others
    ]
    return Table(
        "Defenses: accuracy (%), MSE and SSIM of the attack",
        ["defense", "method", "target data (%)", "accuracy", "MSE", "MSE floor", "SSIM", "R", "our attack"],
        lines,
        f"{_brackets(record)} The published numbers of ResSFL's table of baselines (CVPR 2022) are not included; its "
        "clients train with labels.",
    )


def _communication(record: RunRecord, rows: list[SummaryRow]) -> Table:
    """Traffic of training, like the paper's table on communication."""
    lines = []
    for row in rows:
        aware = _origin(record, row) == TARESSFL
        known = published.MEGABYTES.get((_method(row), aware)) if aware or _is_plain(record, row) else None
        measured = f"{row.cost['training_megabytes']:,.1f}"
        lines.append([row.system, f"{row.cost['paper_megabytes_per_client']:,.1f}", _printed(known, 1), measured])
    return Table(
        "Communication of training (MB)",
        ["system", "one client, paper's accounting", "published", "all clients, counted at the messages"],
        lines,
        "Published: for 200 epochs and 50 images per client; runs with other settings have other numbers.",
    )


def _client(record: RunRecord, rows: list[SummaryRow]) -> Table:
    """All costs of a client, measured or not; the papers have no such table."""
    costs = {row.system: client_costs(record, key_of(row)) for row in rows}
    methods = [f"{heading}: {'; '.join(how)}" for heading, how in methods_of(list(costs.values())).items()]
    return Table(
        "Cost of an average client, whole training",
        ["system", *HEADINGS],
        [[system, *(cost.text for cost in mine.values())] for system, mine in costs.items()],
        f"{'. '.join(methods)}.",
    )


def _partition(record: RunRecord) -> str:
    """The paper's name of the partition if the paper has it, or else the name in the configuration."""
    training, dataset = record.info["config"]["training"], record.info["config"]["data"]["dataset"]
    if training["partition"] == "iid":
        return published.IID
    classes = training["classes_per_client"]
    if training["partition"] == "classes_per_client" and classes == published.CLASSES_PER_CLIENT.get(dataset):
        return published.NON_IID
    return str(training["partition"])


def _origin(record: RunRecord, row: SummaryRow) -> str:
    return next(str(p["origin"]) for p in record.info["plugins"]["defenses"] if p["label"] == row.defense)


def _is_plain(record: RunRecord, row: SummaryRow) -> bool:
    """Whether the system has neither a defense nor a bottleneck."""
    return _origin(record, row) == UNDEFENDED and record.info["config"]["model"]["bottleneck"] == "none"


def _method(row: SummaryRow) -> str:
    return published.METHODS.get(row.cut_layer, f"cut {row.cut_layer}")


def _interval(interval: Interval, scale: float, digits: int) -> str:
    value, low, high = (f"{scale * end:.{digits}f}" for end in (interval.value, interval.low, interval.high))
    return f"{value} [{low}, {high}]"


def _printed(number: Published | None, digits: int) -> str:
    return number.text(digits) if number is not None else NOT_PUBLISHED


def _brackets(record: RunRecord) -> str:
    return f"Brackets: {100 * record.info['config']['evaluation']['confidence']:.0f} % intervals over seeds and images."
