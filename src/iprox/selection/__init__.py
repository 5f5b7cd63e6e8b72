"""Selection: from scores to the chosen rows."""

from iprox.selection.limits import check_feasible
from iprox.selection.select import Selection, best_rows, select_rows

__all__ = ["Selection", "best_rows", "check_feasible", "select_rows"]
