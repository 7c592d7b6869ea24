"""Summarise an audit: per checkpoint, what its authors logged and what our attacks reach, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from mocosfl_priv.evaluation.statistics import Finding, Interval, leak_finding, leak_ratio_interval, mean_interval
from mocosfl_priv.results import METRICS, PUBLISHED_VICTIMS, RELEASE, TEST_VICTIMS, RunRecord
from reports.analysis.findings_text import flagged, percent, undecided
from reports.analysis.linkage import LinkageRates, beside_looks, linkage_columns, linkage_notes, linkage_rates
from reports.analysis.mosaics import Mosaic, comparison, mosaic_scale
from reports.analysis.per_image import bootstrap_options, closest_attacks, groups, per_seed
from reports.analysis.summary import WORST_CASE, ensembles, labels_of

DECODER = "attacks.decoder:DecoderAttack"  # with `preset: paper` it is the authors' attack, run by us
NEARLY_BLIND = 0.1  # an attack that removes less than this share of a blind guess's error saw next to nothing


@dataclass(frozen=True)
class AuditRow:
    """One attack on one checkpoint, over all victims of a set and all seeds.

    metrics: as they were measured. is_ensemble: it is the ensemble; is_paper: it is the attack of the authors, run by
    us; both whatever its label. is_worst_case: it takes for every victim the attack that came closest.
    """

    attack: str
    blind: bool
    is_ensemble: bool
    is_paper: bool
    is_worst_case: bool
    seeds: int
    leak_ratio: Interval
    metrics: dict[str, Interval]
    mse_floor: float


@dataclass(frozen=True)
class AuditedCheckpoint:
    """A checkpoint before one set of victims.

    published: its entry in ``info["audit"]``. rows: our attacks. on_released: whether the victims are the images of the
    release, on which the logged values were measured. worst: the one with the higher leak ratio of the ensemble, which
    chose without looking at the victims, and the best attack per victim; None if no attack that uses the smashed data
    finished. scale: what leak ratios on these victims are compared with. linkage: how many messages are matched with
    their own image, None where that was not measured.
    """

    label: str
    victims: str
    on_released: bool
    published: dict[str, Any]
    rows: list[AuditRow]
    worst: AuditRow | None
    scale: list[Mosaic]
    linkage: LinkageRates | None = None

    @property
    def name(self) -> str:
        """The checkpoint's unique name."""
        return str(self.published["name"])

    @property
    def where(self) -> str:
        """The victims in words."""
        return victims_title(self.victims, self.on_released)

    @property
    def logged(self) -> dict[str, float | None]:
        """What the authors logged: mse, ssim and psnr on their images, and accuracies; None if not logged."""
        values: dict[str, float | None] = self.published["logged"]
        return values

    @property
    def paper(self) -> AuditRow | None:
        """The authors' attack, run by us."""
        return next((row for row in self.rows if row.is_paper), None)

    @property
    def mse_floor(self) -> float:
        """MSE of the blind guess on these victims."""
        return self.rows[0].mse_floor

    @property
    def beside_looks(self) -> list[str]:
        """What it looks like, and whose photo it is: the cells of a table."""
        row = self.worst if self.worst is not None else self.rows[0]
        similarity = row.metrics.get("ssim", row.metrics["ssim_zeropad"])
        return [self.label, *beside_looks(row.leak_ratio, similarity, row.metrics["mse"], self.linkage)]

    @property
    def finding(self) -> Finding:
        """Whether any single attack does better than a blind guess; the worst case over attacks is not used."""
        return leak_finding(self.informed)

    @property
    def informed(self) -> list[Interval]:
        """The leak ratios of all attacks that use the smashed data."""
        return [row.leak_ratio for row in self.rows if not row.blind]

    @property
    def best_single(self) -> AuditRow | None:
        """The informed attack with the lowest MSE, the ensemble aside."""
        informed = [row for row in self.rows if not row.blind and not row.is_ensemble]
        return min(informed, key=lambda row: row.metrics["mse"].value, default=None)


def victims_title(victims: str, released: bool) -> str:
    """A set of victims in words; released: its images are those of the public release."""
    return "the 128 published images" if released else "test images" if victims == TEST_VICTIMS else victims


def released_victims(record: RunRecord) -> set[str]:
    """The sets of victims whose images are those of the release. Runs of before November 2026 do not say it."""
    said = record.info.get("victims", {PUBLISHED_VICTIMS: RELEASE})
    return {name for name, origin in said.items() if origin == RELEASE}


def paper_attacks(record: RunRecord) -> set[str]:
    """The labels under which the authors' attack ran: the decoder attack with the preset of the paper."""
    decoders = set(labels_of(record, "attacks", DECODER))
    entries = record.info["config"]["attacks"]
    paper = {entry["label"] or entry["name"] for entry in entries if entry.get("preset") == "paper"}
    return decoders & paper


def summarise_audit(record: RunRecord) -> dict[str, list[AuditedCheckpoint]]:
    """Summarise every checkpoint on every set of victims, by set, in the order of the results.

    An attack that failed with any seed is left out.
    """
    options = bootstrap_options(record)
    blind = {plugin["label"] for plugin in record.info["plugins"]["attacks"] if plugin["blind"]}
    labels, released = checkpoint_labels(record.info["audit"]), released_victims(record)
    ensemble, paper = ensembles(record), paper_attacks(record)
    found: dict[str, list[AuditedCheckpoint]] = {}
    for victims, seen in record.per_image.groupby("victims", sort=False):
        scale = mosaic_scale(record, str(victims))
        for published in record.info["audit"]:
            cells = record.cells[(record.cells["defense"] == published["name"]) & (record.cells["victims"] == victims)]
            failed = set(_failures(cells)["attack"])
            values = seen[(seen["defense"] == published["name"]) & ~seen["attack"].isin(failed)]
            by_attack = {str(name): rows for name, rows in values.groupby("attack", sort=False)}
            rows = [
                _row(name, rows, options, blind=name in blind, is_ensemble=name in ensemble, is_paper=name in paper)
                for name, rows in by_attack.items()
            ]
            if not rows:
                continue
            informed = values[~values["attack"].isin(blind)]
            headline = [row for row in rows if row.is_ensemble]
            if len(informed):
                headline.append(_row(WORST_CASE, closest_attacks(informed), options, is_worst_case=True))
            # the ensemble where both are equal
            worst = max(headline, key=lambda row: (row.leak_ratio.value, row.is_ensemble), default=None)
            checkpoint = AuditedCheckpoint(
                labels[published["name"]], str(victims), str(victims) in released, published, rows, worst, scale,
                linkage_rates(_linked(record, published["name"], str(victims)), options),
            )  # fmt: skip
            found.setdefault(str(victims), []).append(checkpoint)
    return found


def _linked(record: RunRecord, checkpoint: str, victims: str) -> pd.DataFrame:
    lines = record.linkage
    return lines[(lines["defense"] == checkpoint) & (lines["victims"] == victims)]


def _row(
    attack: str, values: pd.DataFrame, options: dict[str, Any], *,
    blind: bool = False, is_ensemble: bool = False, is_paper: bool = False, is_worst_case: bool = False,
) -> AuditRow:  # fmt: skip
    places = groups(values)
    return AuditRow(
        attack=attack,
        blind=blind,
        is_ensemble=is_ensemble,
        is_paper=is_paper,
        is_worst_case=is_worst_case,
        seeds=int(values["seed"].nunique()),
        leak_ratio=leak_ratio_interval(
            per_seed(values, "mse"), per_seed(values, "mse_floor"), groups=places, **options
        ),
        metrics={
            name: mean_interval(per_seed(values, name), groups=places, **options)
            for name in METRICS
            if not bool(values[name].isna().any())
        },
        mse_floor=float(values["mse_floor"].mean()),
    )


def _failures(cells: pd.DataFrame) -> pd.DataFrame:
    """The cells whose attack failed."""
    return cells[cells["failure"] != ""]


def checkpoint_labels(audit: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Return a short label by checkpoint name.

    A label holds the cut layer, the SSIM threshold, and the properties in which checkpoints differ. Where that is not
    unique, or there is no threshold, it is the name.
    """
    parts = [_label_parts(entry) for entry in audit]
    varying = [index for index, column in enumerate(zip(*parts, strict=True)) if index < 2 or len(set(column)) > 1]
    labels = [", ".join(part for index in varying if (part := own[index]) is not None) for own in parts]
    names = [str(entry["name"]) for entry in audit]
    return {
        name: label if labels.count(label) == 1 and own[1] is not None else name
        for name, label, own in zip(names, labels, parts, strict=True)
    }


def _label_parts(entry: dict[str, Any]) -> list[str | None]:
    fraction = entry["target_fraction"]
    return [
        f"cut {entry['cut_layer']}",
        f"t {entry['ssim_threshold']:g}" if entry["ssim_threshold"] is not None else None,
        f"{100 * fraction:.3g} % target" if fraction is not None else None,
        f"α {entry['alpha']:g}" if entry["alpha"] is not None else None,
        entry["bottleneck"],
        f"with {entry['source']}" if entry["source"] is not None else None,
    ]


def audit_frame(found: dict[str, list[AuditedCheckpoint]]) -> pd.DataFrame:
    """Return the summary as a table with a row per checkpoint and attack: logged values, then ours.

    An interval has three columns: ``name``, ``name_low`` and ``name_high``.
    """
    flat = []
    for checkpoint in (checkpoint for same in found.values() for checkpoint in same):
        added = [checkpoint.worst] if checkpoint.worst is not None and checkpoint.worst.is_worst_case else []
        for row in [*checkpoint.rows, *added]:
            entry: dict[str, object] = {
                "checkpoint": checkpoint.name,
                "cut_layer": checkpoint.published["cut_layer"],
                "victims": checkpoint.victims,
                "attack": row.attack,
                "seeds": row.seeds,
                **{f"logged_{name}": value for name, value in checkpoint.logged.items()},
                "mse_floor": row.mse_floor,
            }
            for name, interval in {"leak_ratio": row.leak_ratio, **row.metrics}.items():
                entry |= {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
            flat.append(entry | linkage_columns(checkpoint.linkage))
    return pd.DataFrame(flat)


def audit_sentences(found: dict[str, list[AuditedCheckpoint]]) -> list[str]:
    """Return the findings in words, one text per checkpoint: first on the published images, then on the others."""
    said: dict[str, list[str]] = {}
    for checkpoints in sorted(found.values(), key=lambda several: not several[0].on_released):
        for checkpoint in checkpoints:
            parts = said.setdefault(checkpoint.name, [f"{checkpoint.label}: "])
            if checkpoint.on_released:
                parts.append(f"{_logged(checkpoint)}{_ours(checkpoint)}. ")
            else:
                parts.append(_elsewhere(checkpoint))
                if checkpoint.linkage is not None:
                    parts.append(f"{checkpoint.linkage.sentence}. ")
    return ["".join(parts).strip() for parts in said.values()]


def _logged(checkpoint: AuditedCheckpoint) -> str:
    """What the authors' number means, compared with the floor on the same images."""
    mse, floor = checkpoint.logged["mse"], checkpoint.mse_floor
    if mse is None:
        return "its authors logged no attack; "
    removed = 1 - mse / floor
    if removed < NEARLY_BLIND:
        return f"logged MSE {mse:.4f} is at the floor {floor:.4f}: the published attack recovered almost nothing; "
    share = f"{100 * removed:.0f} %"
    return (
        f"logged MSE {mse:.4f} is {share} below the floor {floor:.4f}: the published attack recovered image content; "
    )


def _ours(checkpoint: AuditedCheckpoint) -> str:
    paper, worst = checkpoint.paper, checkpoint.worst
    rerun = f"the published attack, run by us, reaches {paper.metrics['mse'].value:.4f}; " if paper is not None else ""
    if worst is None:
        return f"{rerun}none of our attacks finished"
    if checkpoint.finding == "blind":
        return f"{rerun}none of our attacks does better than a blind guess"
    if checkpoint.finding == "undecided":
        return f"{rerun}of our attacks {undecided(checkpoint.informed)}"
    return (
        f"{rerun}our worst case reaches {worst.metrics['mse'].value:.4f}, which removes {percent(worst.leak_ratio)} "
        f"of a blind guess's error{comparison(worst.leak_ratio.value, checkpoint.scale)}"
    )


def _elsewhere(checkpoint: AuditedCheckpoint) -> str:
    """The finding on victims that the logged value says nothing about."""
    return f"On {checkpoint.where} (floor {checkpoint.mse_floor:.4f}) {_ours(checkpoint)}. "


def audit_caveats(record: RunRecord, found: dict[str, list[AuditedCheckpoint]]) -> list[str]:
    """Return the sentences that limit what the numbers mean, for the box at the top of the page."""
    every = [checkpoint for same in found.values() for checkpoint in same]
    said = flagged(record)
    if any(checkpoint.on_released for checkpoint in every):
        said.append(
            "The 128 published images are augmented CIFAR-10 training images with four fifths of the contrast of real "
            "images. They are not distributed like the images that a defense must protect, and an attacker's auxiliary "
            "data may contain some of their originals. Use them to compare with the logged values only, and draw "
            "conclusions from test images."
        )
    if all(checkpoint.on_released for checkpoint in every):
        said.append("No test images were attacked: nothing on this page says how much other victims leak.")
    if len(record.info["seeds"]) < 3:
        said.append(
            f"{len(record.info['seeds'])} attack seed{'s' if len(record.info['seeds']) > 1 else ''} on clients that "
            "were each trained once: intervals cover the choice of images, little of the randomness of the attacks, "
            "and nothing of the variation between trainings."
        )
    said += [
        f"{checkpoint.label}: on {checkpoint.where} no attack beats the floor. Whether the client is well protected or "
        "the attacks are weak can only be seen from what the same attacks reach on other clients."
        for checkpoint in every
        if checkpoint.finding == "blind"
    ]
    for checkpoint in every:
        if not checkpoint.on_released:
            continue
        logged, paper = checkpoint.logged["mse"], checkpoint.paper
        if logged is None or paper is None:
            continue
        again = paper.metrics["mse"].value
        if abs(again - logged) > NEARLY_BLIND * checkpoint.mse_floor:
            said.append(
                f"{checkpoint.label}: the published attack, run by us, reaches {again:.4f} where {logged:.4f} was "
                "logged: its settings or its auxiliary data differ."
            )
    for checkpoint in every:
        best = checkpoint.best_single
        ensemble = next((row for row in checkpoint.rows if row.is_ensemble), None)
        if best is None or ensemble is None:
            continue
        alone, together = best.metrics["mse"].value, ensemble.metrics["mse"].value
        if alone < together:
            said.append(
                f"{checkpoint.label}: on {checkpoint.where} {best.attack} alone has a lower MSE ({alone:.4f}) than the "
                f"ensemble ({together:.4f}), so the ensemble's choice among attacks or its budget was wrong here."
            )
    if chosen := [
        checkpoint for checkpoint in every if checkpoint.worst is not None and checkpoint.worst.is_worst_case
    ]:
        where = "; ".join(f"{checkpoint.label} on {checkpoint.where}" for checkpoint in chosen)
        said.append(
            f"No ensemble ran, or another attack came closer to some victims: {where}. The worst case takes for "
            "every victim the attack with the lowest MSE. That choice uses the victim itself, so it is an upper bound "
            "on what one attacker gets from these attacks."
        )
    if bool(record.cells["attack_out_of_time"].fillna(False).astype(bool).any()):
        said.append("An attack reached its time limit: with more time it may reconstruct more.")
    said += linkage_notes(record)
    if not record.info["threat_model"]["adaptive"]:
        said.append("The attacker was not adaptive: it did not know the defense. A real attacker may reconstruct more.")
    return said
