"""The findings of a run as sentences: what leaks, what defenses guarantee, and the limits of the numbers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from math import isnan
from typing import Any

from mocosfl_priv.evaluation.statistics import Finding, Interval, leak_finding
from mocosfl_priv.results import RunRecord
from reports.analysis.linkage import linkage_notes
from reports.analysis.mosaics import Mosaic, comparison
from reports.analysis.summary import VACUOUS, SummaryRow, by_system, headline_rows, system_name

UNMEASURED = "No labels: utility not measurable"


def finding(rows: list[SummaryRow], system: str) -> Finding:
    """Return whether any single attack on `system` does better than a blind guess; the worst case is not used."""
    return leak_finding([row.leak_ratio for row in _single(rows) if row.system == system])


def _single(rows: list[SummaryRow]) -> list[SummaryRow]:
    """The rows of attacks that use the smashed data, without the worst case."""
    return [row for row in rows if not row.blind and not row.is_worst_case]


def undecided(leak_ratios: Sequence[Interval]) -> str:
    """Return the sentence for attacks that are neither shown to beat a blind guess nor shown not to."""
    return f"a leak is neither shown nor excluded: R may be up to {max(leak.high for leak in leak_ratios):.2f}"


def sentences(rows: list[SummaryRow], scale: list[Mosaic]) -> list[str]:
    """Return the findings in words, a text per system: leakage, linkage, linear-probe and kNN accuracy.

    scale: of mosaics of the victims, which says in words how much a leak ratio shows.
    """
    said = []
    for row in headline_rows(rows):
        if row.blind:
            leak = "no attack that uses the smashed data succeeded, so its leakage is unknown"
        elif (found := finding(rows, row.system)) == "blind":
            leak = "no attack does better than a blind guess"
        elif found == "undecided":
            leak = undecided([one.leak_ratio for one in _single(rows) if one.system == row.system])
        else:
            leak = (
                f"the attacks remove {percent(row.leak_ratio)} of a blind guess's error"
                f"{comparison(row.leak_ratio.value, scale)}, and reach a mean SSIM of {row.similarity.value:.2f}"
            )
        parts = [
            leak,
            _against(row.linear, "Linear probe", row.linear_gain, "the untrained network", row.linear_untrained),
            _against(row.knn, "kNN", row.knn_gain, "raw pixels", row.knn_raw_pixels),
        ]
        if isnan(row.linear.value):
            parts = [leak, UNMEASURED]
        elif row.linear_against_none is not None:
            parts.append(f"Against no defense the linear probe changes by {points(row.linear_against_none)}")
        if row.linkage is not None:
            parts.insert(1, row.linkage.sentence)
        said.append(f"{row.system}: {'. '.join(parts)}.")
    return said


def promises(record: RunRecord, rows: list[SummaryRow]) -> list[str]:
    """Return a text per system with a guarantee: the guaranteed MSE, and the lowest MSE of a single attack."""
    said = []
    for system, mine in by_system(rows).items():
        single = [row for row in mine if row.guarantee and not row.blind]
        if not single:
            continue
        best = min(single, key=lambda row: row.metrics["mse"].value)
        training = [entry["guarantee"] for entry in _trained(record, system) if entry["guarantee"]]
        vacuous = f", vacuous: it allows R = {1 - VACUOUS:g}" if best.is_vacuous else ""
        said.append(
            f"{system}: any attacker: MSE >= {best.mse_bound:.2g} ({best.guarantee}{vacuous}); measured "
            f"{best.metrics['mse'].value:.4f} ({best.attack}). Whole training: "
            + " and ".join(dict.fromkeys(entry["claim"] for entry in training))
            + "."
        )
    return said


def _trained(record: RunRecord, system: str) -> list[dict[str, Any]]:
    """The entries of run.json on the trainings of `system`, one per seed."""
    return [
        entry
        for entry in record.info["systems"]
        if system_name(entry["defense"], entry["cut_layer"], entry["target_fraction"]) == system
    ]


def caveats(record: RunRecord, rows: list[SummaryRow]) -> list[str]:
    """Return the sentences that limit what the numbers mean, for the box at the top of the page."""
    found = flagged(record)
    for system, mine in by_system(rows).items():
        single = [row for row in mine if not row.blind and not row.is_worst_case]
        if not any(row.is_ensemble for row in single):
            continue
        best = max(single, key=lambda row: row.leak_ratio.value)
        if not best.is_ensemble:
            together = max(row.leak_ratio.value for row in single if row.is_ensemble)
            found.append(
                f"{system}: the ensemble is weaker than {best.attack} alone (R {together:.3f} against "
                f"{best.leak_ratio.value:.3f}), so its choice among attacks or its budget was wrong here. The headline "
                "is the worst case, which has both."
            )
    for system in by_system(rows):
        if any(entry["guarantee"] and not entry["frozen_client"] for entry in _trained(record, system)):
            found.append(
                f"{system}: the guarantee for the whole training covers an image's own messages only. Clients that "
                "train also leave traces of the image in their weights, which are averaged without protection and "
                "shape later messages."
            )
    if not any(row.is_ensemble for row in rows):
        found.append(
            "The ensemble did not run: headlines are the worst case over the attacks that did, with their settings."
        )
    informed = {row.attack: row.is_ensemble for row in rows if not row.blind and not row.is_worst_case}
    if len(informed) < 2 and not any(informed.values()):
        found.append("Fewer than two attacks that use the smashed data: the worst case may be far from the worst.")
    if record.info["config"]["evaluation"]["probe_selection"] == "test":
        found.append(
            "Probes were selected on the test images (probe_selection: test), as some published protocols do: "
            "linear-probe and semi-supervised accuracies are optimistic."
        )
    if record.info["config"]["training"]["select_on"] == "test":
        found.append(
            "The kept checkpoint was selected on the test images (select_on: test), as MocoSFL's research code does: "
            "all accuracies are optimistic."
        )
        if any(map(_chooses_its_expert, record.info["config"]["defenses"])):
            found.append(
                "A defense's expert was selected on the test images, too (checkpoint: best_knn, select_on: test), as "
                "the public code of TAResSFL does."
            )
    codecs = [record.info["config"]["training"].get(key, "fp32") for key in ("codec", "gradient_codec")]
    if codecs != ["fp32", "fp32"]:
        found.append(
            f"Smashed data are sent as {codecs[0]}, gradients as {codecs[1]} (training.codec, "
            "training.gradient_codec): accuracy and leakage are those of the decoded messages, bytes those of the "
            "encoded messages."
        )
    if record.info["lpips"].startswith("LPIPS not measured"):
        found.append(record.info["lpips"] + ".")
    if "not measured" in record.info["recognition"]["note"]:
        found.append(record.info["recognition"]["note"] + ".")
    found += linkage_notes(record)
    return found


def _chooses_its_expert(plugin: dict[str, Any]) -> bool:
    """Whether a defense of a configuration, or a part of it, trains an expert and takes its best kNN checkpoint."""
    preset = "best_knn" if plugin["name"] in ("taressfl", "ressfl") and plugin.get("preset") == "paper" else "last"
    chosen = plugin.get("checkpoint") or preset
    return chosen == "best_knn" or any(map(_chooses_its_expert, _parts(plugin)))


def _parts(plugin: dict[str, Any]) -> list[dict[str, Any]]:
    """The parts of a composition as a configuration names them; none of another defense."""
    return [{"name": part} if isinstance(part, str) else part for part in plugin.get("parts", ())]


FLAGS_SHOWN = 4


def flagged(record: RunRecord) -> list[str]:
    """Return the sentences of the run's flags, without repetitions, at most `FLAGS_SHOWN` of each kind."""
    found = []
    for name, flags in groupby(record.info["flags"], key=lambda flag: flag["name"]):
        sentences_of = list(dict.fromkeys(f"{flag['sentence']} [{name}]" for flag in flags))
        found += sentences_of[:FLAGS_SHOWN]
        if len(sentences_of) > FLAGS_SHOWN:
            found.append(f"{len(sentences_of) - FLAGS_SHOWN} more of the kind {name} are in run.json.")
    return found


def _against(accuracy: Interval, what: str, gain: Interval, whom: str, floor: float) -> str:
    """A sentence that compares an accuracy with its floor, judged by the interval of the paired difference."""
    if isnan(floor):
        return f"{what} {100 * accuracy.value:.1f} %"
    relation = "above" if gain.low > 0 else "below" if gain.high < 0 else "not shown to differ from"
    return f"{what} {100 * accuracy.value:.1f} %, {relation} {whom} ({100 * floor:.1f} %)"


def tenths(share: float) -> str:
    """Format a share (0 to 1) in percent with one decimal; NaN as "not measurable"."""
    return f"{100 * share:.1f} %" if not isnan(share) else "not measurable"


def points(difference: Interval) -> str:
    """Format a difference of accuracies in percentage points with its interval."""
    if isnan(difference.value):
        return "not measurable"
    low, high = 100 * difference.low, 100 * difference.high
    return f"{100 * difference.value:+.1f} points [{low:+.1f}, {high:+.1f}]"


def number(value: float, form: str) -> str:
    """Format a number; a dash where there is none, as of the training of a model that was trained elsewhere."""
    return "–" if isnan(value) else format(value, form)


def compact(value: float) -> str:
    """Format a number with three digits and a unit prefix, such as 1234567 as 1.23 M."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g} {unit}"
    return f"{value:.3g}"


def percent(interval: Interval) -> str:
    """Format a share (0 to 1) and its interval in percent."""
    return f"{100 * interval.value:.0f} % [{100 * interval.low:.0f}, {100 * interval.high:.0f}]"
