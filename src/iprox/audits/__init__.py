"""Audits: how well a proxy's scores agree with its target's."""

from iprox.audits.comparison import Comparison, compare
from iprox.audits.fidelity import AuditReport, compare_scores

__all__ = ["AuditReport", "Comparison", "compare", "compare_scores"]
