"""Audit: does the proxy rank as the target does?"""

from iprox.audits.comparison import Comparison, compare
from iprox.audits.fidelity import AuditReport, compare_scores

__all__ = ["AuditReport", "Comparison", "compare", "compare_scores"]
