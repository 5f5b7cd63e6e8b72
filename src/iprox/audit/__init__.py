"""Audit: does the proxy rank as the target does?"""

from iprox.audit.fidelity import AuditReport, compare_scores

__all__ = ["AuditReport", "compare_scores"]
