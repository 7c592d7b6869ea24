"""The Python face of the toolkit: an experiment in a few lines.

from mocosfl_priv import Experiment
run = Experiment.from_yaml("configs/demo.yaml", {"defenses": ["none", "my_defense.py:Mine"]}).run()
run.table()          # a pandas frame
run.report("out/")   # results.csv, per_image.parquet, report.html, figures/

A grid that is too long for one sitting is a sweep: `Sweep.from_yaml(...).run("out/", resume=True)`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from mocosfl_priv.config import ExperimentConfig, load_config, parse_config
from mocosfl_priv.data.given import read_given
from mocosfl_priv.errors import ConfigurationError, RunFailedError
from mocosfl_priv.evaluation.reliability import BOUND_VIOLATED
from mocosfl_priv.experiment.audit import AuditPlan, plan_audit, run_audit
from mocosfl_priv.experiment.disk import result_bytes
from mocosfl_priv.experiment.plan import Plan, lay_out, plan
from mocosfl_priv.experiment.run import run_plan
from mocosfl_priv.results import (
    Destination,
    RunRecord,
    StoredRun,
    read_runs,
    replace_files,
    require_room,
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
from mocosfl_priv.sweep.stages import linkages_of
from mocosfl_priv.sweep.stored_record import stored_record
from mocosfl_priv.sweep.tasks import TaskPlanner


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

    def checked(self, data: Any = None, source: Any = None) -> Plan | AuditPlan:
        """The same for any configuration: one with `audit_models` is an audit, which trains nothing.

        data, source: as in :meth:`run`.
        """
        section, given = read_given(self.config.data, data, source)
        config = self.config.model_copy(update={"data": section})
        return plan(config, given) if config.audit_models is None else plan_audit(config, given)

    def run(
        self,
        progress: Progress | None = None,
        resume_dir: Path | str | None = None,
        *,
        data: Any = None,
        source: Any = None,
    ) -> RunResult:
        """Train, attack, score. Raises ConfigurationError before, RunFailedError while it runs.

        Args:
            progress: is told how far the run is.
            resume_dir: folder for the checkpoints of trainings; after an interruption the same call resumes from
                them.
            data: target data as an object, instead of `data.dataset`: images as uint8 or floats in [0, 1], (n, h, w),
                (n, h, w, 3) or (n, 3, h, w), as an array or tensor; (images, labels) or (images, labels, groups); a
                mapping of ``train`` and ``test`` to any of these; or a data set of torch or Hugging Face. Without
                splits one image in five, or one group in five, is a test image. The configuration that the run records
                names the data by the SHA-256 of its content.
            source: source data likewise, instead of `data.source`.

        """
        return run_planned(self.checked(data, source), progress, Path(resume_dir) if resume_dir is not None else None)


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
        planned = lay_out(variant.config)
        record = stored_record(planned, folder.store, failures)
        result = RunResult(record)
        with Destination(place, overwrite=True) as destination:
            if (record.cells["failure"] == "").any():
                result.report_to(destination)
            else:
                destination.commit(lambda staging: write_record(record, staging))
        linking = any(True for _ in linkages_of(planned))
        unlinked = linking and any(entry["refusal"] for entry in record.info["linkage"]["systems"])
        if (record.cells["failure"] == "").all() and not unlinked:  # else another attempt may end otherwise
            note_written(folder.store, key, record, place)
        return RunResult(replace(record, images={}, models={}))  # on the disk; a grid's would fill the memory

    def _write_table(self, folder: SweepDirectory, results: Mapping[str, RunResult]) -> pd.DataFrame:
        table = joint_table([(variant.labels, results[variant.name]) for variant in self.document.variants])
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


def write_results(results: Sequence[tuple[dict[str, str], RunResult]], destination: Destination) -> Path:
    """Write results, each with its labels by axis, as a run directory or the folder of a sweep; returns the report."""
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
        joint_table(results).to_csv(folder / "results.csv", index=False)
        write_reports([StoredRun(labels, result.record) for labels, result in results], folder)

    return destination.commit(write) / "report.html"


def joint_table(results: Sequence[tuple[Mapping[str, str], RunResult]]) -> pd.DataFrame:
    """The rows of all variants, with a column for every axis in front."""
    tables = []
    for labels, result in results:
        table = result.table()
        for place, (axis, label) in enumerate(labels.items()):
            table.insert(place, axis, label)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def report_stored(folder: Path) -> Path:
    """Write the report of a run directory, or of a sweep's folder, into it again; returns the HTML's path."""
    own_package("reports")
    from reports import write_reports

    runs = read_runs(folder)
    replace_files(folder, lambda staging: write_reports(runs, staging))
    return folder / "report.html"
