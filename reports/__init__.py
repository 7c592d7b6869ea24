"""Reports: tables, figures and one HTML page, made from stored results only."""

from reports.html import write_report as write_report

__all__ = ["write_report"]
