"""Reports: tables, figures and one HTML page, made from stored results only."""

from reports.audit import write_audit_report as write_audit_report
from reports.html import write_report as write_report

__all__ = ["write_audit_report", "write_report"]
