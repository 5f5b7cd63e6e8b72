"""The report: one self-contained HTML page about one run."""

from iprox.report.build import build_report, shown_rows

__all__ = ["build_report", "shown_rows"]
