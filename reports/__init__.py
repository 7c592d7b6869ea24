"""Reports: tables, figures and one HTML page, made from stored results only."""

from __future__ import annotations

from pathlib import Path

from mocosfl_priv.results import RunRecord
from reports.audit import write_audit_report
from reports.export import export_tables
from reports.html import write_training_report
from reports.run_comparison import compare_runs

__all__ = ["compare_runs", "export_tables", "write_report"]


def write_report(record: RunRecord, folder: Path) -> Path:
    """Write the page that suits `record`, its summary and its figures into `folder`; returns the page's path."""
    return write_audit_report(record, folder) if "audit" in record.info else write_training_report(record, folder)
