"""Selection: from scores to the chosen rows."""

from iprox.selection.select import Selection, SelectionSettings, Strategy, select_rows

__all__ = ["Selection", "SelectionSettings", "Strategy", "select_rows"]
