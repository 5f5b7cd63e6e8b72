"""Audit: does the proxy rank as the target does?"""

from iprox.audit.comparison import Comparison, compare
from iprox.audit.fidelity import AuditReport, compare_scores

__all__ = ["AuditReport", "Comparison", "compare", "compare_scores"]
