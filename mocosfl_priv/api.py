"""The Python face of the toolkit: an experiment in a few lines.

from mocosfl_priv import Experiment
run = Experiment.from_yaml("configs/demo.yaml", {"defenses": ["none", "my_defense.py:Mine"]}).run()
run.table()          # a pandas frame
run.report("out/")   # results.csv, per_image.parquet, report.html, figures/

A grid that is too long for one sitting is a sweep: `Sweep.from_yaml(...).run("out/", resume=True)`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn

from mocosfl_priv.config import ExperimentConfig, load_config, parse_config
from mocosfl_priv.data.image_set import ImageSet
from mocosfl_priv.data.own_data import read_images
from mocosfl_priv.errors import ConfigurationError, RunFailedError
from mocosfl_priv.evaluation.reliability import BOUND_VIOLATED
from mocosfl_priv.experiment.attack_again import AgainPlan, plan_again, run_again
from mocosfl_priv.experiment.audit import AuditPlan, plan_audit, run_audit
from mocosfl_priv.experiment.disk import result_bytes
from mocosfl_priv.experiment.own_audit import OwnAuditPlan, image_shape_of, limited, plan_own_audit, run_own_audit
from mocosfl_priv.experiment.plan import Plan, lay_out, plan
from mocosfl_priv.experiment.run import run_plan
from mocosfl_priv.models.own_model import OwnSplit, own_splits
from mocosfl_priv.plugins import DEFENSES
from mocosfl_priv.results import (
    Destination,
    RunRecord,
    StoredRun,
    read_record,
    read_runs,
    replace_files,
    require_room,
    run_folders,
    variant_name,
    write_record,
)
from mocosfl_priv.runtime.imports import own_package
from mocosfl_priv.runtime.progress import Progress
from mocosfl_priv.sweep.directory import SweepDirectory
from mocosfl_priv.sweep.document import SweepDocument, Variant, load_sweep
from mocosfl_priv.sweep.processes import local_engine
from mocosfl_priv.sweep.run_cache import as_written, note_written, run_key
from mocosfl_priv.sweep.schedule import Engine, SilentSweepProgress, SweepProgress, run_tasks
from mocosfl_priv.sweep.stored_record import stored_record
from mocosfl_priv.sweep.tasks import TaskPlanner

MOST_VICTIMS = 128  # of an audit, unless more are asked for


@dataclass(frozen=True)
class Experiment:
    """A validated configuration that can be run."""

    config: ExperimentConfig

    @classmethod
    def from_yaml(cls, path: Path | str, overrides: Sequence[str] | Mapping[str, Any] = ()) -> Experiment:
        """Read a YAML file; overrides are ``a.b=c`` strings or a mapping of dotted paths to values."""
        return cls(load_config(path, overrides))

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Experiment:
        """The same from an already loaded document."""
        return cls(parse_config(document))

    def plan(self) -> Plan:
        """Check everything that can be checked before training; raises ConfigurationError."""
        return plan(self.config)

    def checked(self) -> Plan | AuditPlan:
        """The same for any configuration: one with `audit_models` is an audit, which trains nothing."""
        return self.plan() if self.config.audit_models is None else plan_audit(self.config)

    def run(self, progress: Progress | None = None, resume_dir: Path | str | None = None) -> RunResult:
        """Train, attack, score. Raises ConfigurationError before, RunFailedError while it runs.

        resume_dir: folder for the checkpoints of trainings; after an interruption the same call resumes from them.
        """
        return run_planned(self.checked(), progress, Path(resume_dir) if resume_dir is not None else None)


def audit(
    client: nn.Module,
    server: nn.Module | None = None,
    *,
    victims: Any,
    auxiliary: Any,
    cuts: Sequence[str] = (),
    build_untrained: Callable[[], nn.Module] | None = None,
    defense: str | Mapping[str, Any] | None = None,
    attacks: Sequence[str | Mapping[str, Any]] = ("ensemble",),
    labels: Any = None,
    threat: Mapping[str, Any] | None = None,
    size: int | tuple[int, int] | None = None,
    limit: int | None = MOST_VICTIMS,
    seed: int = 0,
    name: str = "audit",
    progress: Progress | None = None,
) -> RunResult:
    """Measure what a split model of your own leaks. Nothing is trained but the attacks' own networks.

    Args:
        client: The layers that a device runs, or with `cuts` a whole network: images float (n, c, h, w) in [0, 1] to
            smashed data (n, ...). Normalisation belongs to it. It is used in eval mode, and is not changed.
        server: The layers that the server runs, if it is known: smashed data to features or class scores.
        victims: The images under attack: an array, tensor, path or data set; see docs/tasks/own-data.md. The model was
            best not trained on them, unless the question is what it leaks of its training images.
        auxiliary: The attacker's images, likewise. The closer they are to the victims, the stronger is the attacker.
        cuts: Names of modules of a whole network: it is cut after each, and every cut is attacked.
        build_untrained: Makes a client with new weights; by default, the weights of `client` are drawn anew.
        defense: A defense that changes messages, by name or as a mapping with parameters; it is compared with none.
        attacks: Attacks by name, or as mappings with parameters. The blind guess is always among them.
        labels: Classes of the victims, (n,), or a CSV file; for accuracies, cross-validated among the victims.
        threat: The keys of the configuration's section `threat`, such as ``{"seconds": 60}``.
        size: Pixels per side, or (height, width), to which images are resized; None leaves them as they are.
        limit: At most this many victims, drawn by `seed`; None for all.
        seed: Of all draws.
        name: In the report.
        progress: What is told how far the audit is.

    Returns:
        The result, with one system per cut and defense.

    Raises:
        ConfigurationError: The model, the images or the settings do not fit, before anything is computed.
        RunFailedError: While the audit runs.

    >>> from torch import nn
    >>> images = torch.rand(60, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    >>> found = audit(nn.Conv2d(3, 8, 3, padding=1), victims=images[:8], auxiliary=images[8:], attacks=["floor"])
    >>> found.table()["attack"].tolist()
    ['floor']
    """
    read = {"size": size}
    attacked, _ = read_images(victims, labels=labels, **read)
    known, _ = read_images(auxiliary, channels=attacked.images.shape[1], **read)
    splits = own_splits(client if server is None else (client, server), image_shape_of(attacked), cuts)
    planned = plan_model_audit(
        splits, limited(attacked, limit, seed), known, build_untrained=build_untrained, defense=defense,
        settings={"name": name, "seeds": [seed], "attacks": list(attacks), "threat": dict(threat or {})},
    )  # fmt: skip
    return RunResult(run_own_audit(planned, progress))


def attack_again(
    folder: Path | str,
    attacks: Sequence[str] = ("ensemble",),
    *,
    victims: Any = None,
    limit: int | None = None,
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
    tell: Callable[[AgainPlan], None] = lambda _: None,
) -> list[tuple[dict[str, str], RunResult]]:
    """Attack the trained systems of a finished run or sweep again. Nothing is trained but the attacks' own networks.

    Args:
        folder: A run directory, or the folder of a sweep.
        attacks: Names or references. The blind guess is always among them.
        victims: Other images to attack, of the same size; see docs/tasks/own-data.md. None for the run's own.
        limit: At most so many of `victims`.
        overrides: ``key=value`` texts for threat model, metrics and machine, and for `attacks` with parameters.
        progress: What is told how far it is.
        tell: Called with every plan before anything is computed.

    Returns:
        The results, a run each, with its labels on the axes of the sweep; none for a single run. Their rows identify
        the systems as the rows of the run do, and repeat what was measured of them.

    Raises:
        ConfigurationError: Before anything is computed: the runs hold no trained systems, or what was asked for does
            not fit them.
        RunFailedError: While attacks run.

    """
    others = None
    plans = []
    for place, labels in run_folders(Path(folder)):
        record = read_record(place)
        if victims is not None and others is None:
            pixels = next(iter(record.images.values())).shape
            others, _ = read_images(victims, size=(pixels[2], pixels[3]), channels=pixels[1])
            others = limited(others, limit, 0)
        plans.append((labels, plan_again(place, record, _with_floor(attacks), overrides, others)))
    for _, planned in plans:
        tell(planned)
    return [(labels, RunResult(run_again(planned, progress))) for labels, planned in plans]


def write_attacks(results: Sequence[tuple[dict[str, str], RunResult]], destination: Destination) -> Path:
    """Write what :func:`attack_again` returned as a run directory, or as the folder of a sweep; returns the report."""
    if len(results) == 1:
        return results[0][1].report_to(destination)
    own_package("reports")
    from reports import write_report, write_reports

    def write(folder: Path) -> None:
        for labels, result in results:
            place = folder / "runs" / variant_name(labels)
            place.mkdir(parents=True)
            write_record(result.record, place)
            write_report(result.record, place)
        _joint_table(results).to_csv(folder / "results.csv", index=False)
        write_reports([StoredRun(labels, result.record) for labels, result in results], folder)

    return destination.commit(write) / "report.html"


def _joint_table(results: Sequence[tuple[Mapping[str, str], RunResult]]) -> pd.DataFrame:
    """The rows of all variants, with a column for every axis in front."""
    tables = []
    for labels, result in results:
        table = result.table()
        for place, (axis, label) in enumerate(labels.items()):
            table.insert(place, axis, label)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def plan_model_audit(
    splits: Sequence[OwnSplit],
    victims: ImageSet,
    auxiliary: ImageSet,
    *,
    settings: Mapping[str, Any],
    overrides: Sequence[str] = (),
    build_untrained: Callable[[], nn.Module] | None = None,
    defense: str | Mapping[str, Any] | None = None,
) -> OwnAuditPlan:
    """Check an audit of a model of one's own; see :func:`audit`. settings: sections of a configuration."""
    document = {
        **settings,
        "attacks": _with_floor(settings["attacks"]),
        "defenses": ["none"] if defense is None else ["none", defense],
        "cut_layers": list(range(1, len(splits) + 1)),
        "data": {"dataset": victims.name, "source": auxiliary.name, "victims": len(victims)},
        "evaluation": {"recognition_epochs": 0, "label_fractions": []},
    }
    config = parse_config(document, overrides)
    defenses = [DEFENSES.create(spec) for spec in config.defenses]
    return plan_own_audit(config, splits, victims, auxiliary, defenses, build_untrained)


def _with_floor(attacks: Sequence[str | Mapping[str, Any]]) -> list[str | Mapping[str, Any]]:
    names = [entry if isinstance(entry, str) else entry.get("name") for entry in attacks]
    return [*([] if "floor" in names else ["floor"]), *attacks]


def run_planned(
    checked: Plan | AuditPlan, progress: Progress | None = None, resume_dir: Path | None = None
) -> RunResult:
    """Run a plan that was made before, so that its data is not read twice."""
    if isinstance(checked, AuditPlan):
        if resume_dir is not None:
            raise ConfigurationError("--resume-dir keeps the state of trainings, and an audit trains nothing")
        return RunResult(run_audit(checked, progress))
    return RunResult(run_plan(checked, progress, resume_dir))


@dataclass(frozen=True)
class RunResult:
    """A finished run."""

    record: RunRecord

    def table(self) -> pd.DataFrame:
        """One row per (defense, attack, cut_layer, target_fraction, seed)."""
        return self.record.cells.copy()

    def require_success(self) -> None:
        """Raise RunFailedError if an attack failed, or did better than a defense promised; all other rows stand."""
        cells = self.record.cells
        failed = cells[cells["failure"] != ""]
        wrong = [flag["sentence"] for flag in self.record.info["flags"] if flag["name"] == BOUND_VIOLATED]
        if len(failed):
            first = failed.iloc[0]
            wrong.append(
                f"{len(failed)} of {len(cells)} attacks failed; the first: {first['attack']!r} on {first['defense']}, "
                f"cut {first['cut_layer']}, seed {first['seed']}: {first['failure']}"
            )
        if wrong:
            raise RunFailedError(" ".join(wrong))

    def report(self, out: Path | str, overwrite: bool = False) -> Path:
        """Write results and report to the folder `out`, as a whole or not at all; returns the HTML's path."""
        with Destination(Path(out), overwrite) as destination:
            return self.report_to(destination)

    def report_to(self, destination: Destination) -> Path:
        """The same to a destination that was opened before the run."""
        failure: list[Exception] = []

        def write(folder: Path) -> None:
            write_record(self.record, folder)
            try:
                own_package("reports")
                from reports import write_report  # results flow into reports; only this façade and the CLI look up

                write_report(self.record, folder)
            except OSError:
                raise
            except Exception as error:  # hours of results must not be lost to a fault in the page
                failure.append(error)

        folder = destination.commit(write)
        if failure:
            raise RunFailedError(
                f"results are kept in {folder}, but their report failed: {type(failure[0]).__name__}: {failure[0]}"
            ) from failure[0]
        return folder / "report.html"


@dataclass(frozen=True)
class Sweep:
    """A validated sweep."""

    document: SweepDocument

    @classmethod
    def from_yaml(
        cls,
        path: Path | str,
        overrides: Sequence[str] | Mapping[str, Any] = (),
        defenses: Sequence[str] = (),
        attacks: Sequence[str] = (),
        scale: str | None = None,
    ) -> Sweep:
        """Read a YAML file, an experiment's or one with axes; see :func:`mocosfl_priv.sweep.document.load_sweep`."""
        return cls(load_sweep(path, overrides, defenses, attacks, scale))

    def run(
        self,
        out: Path | str,
        engine: Engine | None = None,
        progress: SweepProgress | None = None,
        *,
        resume: bool = False,
    ) -> SweepResult:
        """Compute what the store in `out` lacks, then write a run directory per variant and the table of all.

        engine: what runs it, closed in any case; as many processes as suit this machine if left out.
        A cell that fails leaves a row that says why. Raises ConfigurationError before
        anything is computed; StorageError, and whatever interrupts, when it stops early: what is complete is kept.
        """
        progress = progress or SilentSweepProgress()
        engine = engine or local_engine(self.document.compute)
        with (
            closing(engine),
            SweepDirectory(Path(out), resume) as folder,
            closing(engine),
        ):  # before the lock is let go of
            missing, keys = TaskPlanner(folder.store), {}
            lines: list[str] = []
            sizes: list[int] = []
            for variant in self.document.variants:
                checked = plan(variant.config)
                missing.add(checked, variant.name if variant.labels else "")
                keys[variant.name] = run_key(checked)
                if not resume:
                    sizes.append(result_bytes(checked))
                lines += [*checked.context.roles.reading, *(f"warning: {warning}" for warning in checked.warnings)]
            if not resume:  # in the store, and in the run directories
                require_room(folder.folder, 2 * sum(sizes), f"--out {folder.folder}")
            progress.has_read(list(dict.fromkeys(lines)))
            tasks = missing.in_order
            progress.planned(tasks, len(missing.cells), missing.cached)
            failures = run_tasks(tasks, engine, progress)
            results = {}
            for place, variant in enumerate(self.document.variants, start=1):
                progress.reporting(variant.name, place, len(self.document.variants))
                results[variant.name] = self._report(variant, keys[variant.name], folder, failures)
            return SweepResult(folder.folder, self._write_table(folder, results), results)

    def _report(self, variant: Variant, key: str, folder: SweepDirectory, failures: dict[str, str]) -> RunResult:
        """The run directory of `variant`, written unless it is there and would be the same."""
        place = folder.runs / variant.name
        written = as_written(folder.store, key, place)
        if written is not None:
            return RunResult(written)
        record = stored_record(lay_out(variant.config), folder.store, failures)
        result = RunResult(record)
        with Destination(place, overwrite=True) as destination:
            if (record.cells["failure"] == "").any():
                result.report_to(destination)
            else:
                destination.commit(lambda staging: write_record(record, staging))
        if (record.cells["failure"] == "").all():  # else another attempt may end otherwise
            note_written(folder.store, key, record, place)
        return RunResult(replace(record, images={}, models={}))  # on the disk; a grid's would fill the memory

    def _write_table(self, folder: SweepDirectory, results: Mapping[str, RunResult]) -> pd.DataFrame:
        table = _joint_table([(variant.labels, results[variant.name]) for variant in self.document.variants])
        replace_files(folder.folder, lambda staging: table.to_csv(staging / "results.csv", index=False))
        return table


@dataclass(frozen=True)
class SweepResult:
    """A sweep that came to its end.

    cells: the rows of all variants, with a column for every axis. runs: by the name of the variant.
    """

    folder: Path
    cells: pd.DataFrame
    runs: Mapping[str, RunResult]

    def report(self) -> Path:
        """Write one report of all variants into the folder of the sweep; returns the HTML's path."""
        return report_stored(self.folder)

    def require_success(self) -> None:
        """See :meth:`RunResult.require_success`, of all variants."""
        for run in self.runs.values():
            run.require_success()


def report_stored(folder: Path) -> Path:
    """Write the report of a run directory, or of a sweep's folder, into it again; returns the HTML's path."""
    own_package("reports")
    from reports import write_reports

    runs = read_runs(folder)
    replace_files(folder, lambda staging: write_reports(runs, staging))
    return folder / "report.html"
