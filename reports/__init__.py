"""Reports: tables, figures and one HTML page, made from stored results only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mocosfl_priv.errors import RunFailedError
from mocosfl_priv.results import RunRecord, StoredRun
from reports.analysis.run_comparison import compare_runs
from reports.analysis.run_section import sections_of, variant_title
from reports.audit.page import write_audit_report
from reports.output.export import export_tables
from reports.output.html import write_training_report

__all__ = ["compare_runs", "export_tables", "write_report", "write_reports"]


def write_report(record: RunRecord, folder: Path) -> Path:
    """Write the report of a run into `folder`: the HTML page, its summary tables and figures.

    Returns the page's path. A run that audits published clients gets the audit's page. Raises RunFailedError if no
    attack succeeded.
    """
    return write_reports([StoredRun({}, record)], folder)


def write_reports(runs: Sequence[StoredRun], folder: Path) -> Path:
    """Write one report of all variants of a sweep into `folder`, or of a single run; returns the page's path.

    Raises RunFailedError if no attack succeeded.
    """
    if "audit" in runs[0].record.info:
        return write_audit_report(runs[0].record, folder)
    sections = sections_of(runs)
    if not sections:
        raise RunFailedError("no attack succeeded, so there is nothing to report")
    there = [section.labels for section in sections]
    missing = [variant_title(run.labels) for run in runs if run.labels not in there]
    return write_training_report(sections, folder, missing)
