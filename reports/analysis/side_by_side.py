"""Compare each system across the variants of a sweep: how an axis changes accuracy, leakage and message size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mocosfl_priv.evaluation.multiple_comparisons import family_wise_statement
from reports.analysis.comparison import Comparison, compare
from reports.analysis.families import adjusted_p_values, is_shown
from reports.analysis.findings_text import points
from reports.analysis.per_image import GROUP, Key, bootstrap_options
from reports.analysis.run_section import Section
from reports.analysis.summary import SummaryRow, key_of

SAME_DATA = ("client_private", "victims", "probe_test")  # roles that must have the same images for a pairing
SAME_CLIENTS = ("partition", "classes_per_client", "dirichlet_alpha", "heterogeneity", "clients")
HEADINGS = [
    "defense", "cut", "target data", "linear probe", "leak ratio R", "under", "MSE", "SSIM", "bytes per image",
    "training MB", "compared with", "difference of R", "finding", "difference of the linear probe",
]  # fmt: skip


@dataclass(frozen=True)
class Line:
    """A system in one variant, under its headline attack.

    reference: the first variant that has the system with the same images and clients; None if there is none before.
    comparison: the system in this variant compared with `reference`; None without one.
    shown: whether a difference of R may be claimed after adjustment over the whole table.
    """

    section: Section
    row: SummaryRow
    reference: Section | None
    comparison: Comparison | None
    shown: bool = False

    @property
    def finding(self) -> str:
        """The result of the comparison in words."""
        if self.comparison is None:
            return "–"
        if self.comparison.leak is None:
            return "not compared: no attack succeeded on both"
        if not self.shown:
            return "no difference shown"
        return "leaks less" if self.comparison.leak.value < 0 else "leaks more"

    def cells(self) -> list[str]:
        """Return the cells under the axes and `HEADINGS`, for readers."""
        row, leak, compared = self.row, self.row.leak_ratio, self.comparison
        difference = compared.leak if compared else None
        return [
            *self.section.labels.values(),
            row.defense,
            str(row.cut_layer),
            f"{100 * row.target_fraction:.3g} %" if row.target_fraction else "–",
            f"{100 * row.linear.value:.1f} % [{100 * row.linear.low:.1f}, {100 * row.linear.high:.1f}]",
            f"{leak.value:.3f} [{leak.low:.3f}, {leak.high:.3f}]",
            row.attack,
            f"{row.metrics['mse'].value:.4f}",
            f"{row.similarity.value:.3f}",
            f"{row.cost['smashed_bytes_per_image']:,.0f}",
            f"{row.cost['training_megabytes']:,.1f}",
            self.reference.name if self.reference else "–",
            f"{difference.value:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]" if difference else "–",
            self.finding,
            points(compared.linear) if compared else "–",
        ]


@dataclass(frozen=True)
class SideBySide:
    """All systems of a sweep in all variants. statement: the joint result of the comparisons in words."""

    lines: list[Line]
    statement: str


def side_by_side(sections: Sequence[Section]) -> SideBySide:
    """Compare every system in every variant with its reference; p-values are adjusted over all comparisons (Holm)."""
    rows = {(place, key_of(row)): row for place, section in enumerate(sections) for row in section.headlines}
    lines = [
        _line(sections, place, key, rows)
        for key in dict.fromkeys(key for _, key in rows)
        for place in range(len(sections))
        if (place, key) in rows
    ]
    confidence = bootstrap_options(sections[0].record)["confidence"]
    adjusted = iter(adjusted_p_values([line.comparison for line in lines if line.comparison is not None]))
    judged = [
        replace(line, shown=is_shown(line.comparison, next(adjusted), confidence)) if line.comparison else line
        for line in lines
    ]
    tested = [line for line in judged if line.comparison is not None and line.comparison.leak is not None]
    return SideBySide(judged, family_wise_statement(sum(line.shown for line in tested), len(tested), confidence))


def _line(sections: Sequence[Section], place: int, key: Key, rows: dict[tuple[int, Key], SummaryRow]) -> Line:
    section = sections[place]
    earlier = (sections[other] for other in range(place) if (other, key) in rows)
    reference = next((other for other in earlier if comparable(section, other, key)), None)
    comparison = compare(section.record, key, key, reference.record) if reference is not None else None
    return Line(section, rows[place, key], reference, comparison)


def comparable(one: Section, other: Section, key: Key) -> bool:
    """Whether a system can be paired across two variants: same images, same images per client, a seed in common."""
    images = [[s.record.info["roles"].get(role, {}).get("content_sha256") for role in SAME_DATA] for s in (one, other)]
    clients = [[s.record.info["config"]["training"].get(name) for name in SAME_CLIENTS] for s in (one, other)]
    seeds = [_seeds(section, key) for section in (one, other)]
    return None not in images[0] and images[0] == images[1] and clients[0] == clients[1] and bool(seeds[0] & seeds[1])


def _seeds(section: Section, key: Key) -> set[int]:
    """The seeds with which an attack on the system succeeded."""
    cells = section.record.cells
    same = (cells[GROUP] == list(key)).all(axis=1)
    return set(cells["seed"][same & (cells["failure"] == "")])
