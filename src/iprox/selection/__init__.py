"""Selection: from scores to the chosen rows."""

from iprox.selection.feasible import check_feasible
from iprox.selection.select import Selection, select_rows
from iprox.selection.settings import BY_TASK, SelectionSettings, Strategy

__all__ = ["BY_TASK", "Selection", "SelectionSettings", "Strategy", "check_feasible", "select_rows"]
