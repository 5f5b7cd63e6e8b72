"""Selection: from scores to the chosen rows."""

from iprox.selection.feasible import check_feasible
from iprox.selection.select import Selection, best_rows, select_rows
from iprox.selection.settings import SelectionSettings, Strategy, rows_in_share

__all__ = [
    "Selection",
    "SelectionSettings",
    "Strategy",
    "best_rows",
    "check_feasible",
    "rows_in_share",
    "select_rows",
]
