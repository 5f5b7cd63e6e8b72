"""Selection: from scores to the chosen rows."""

from iprox.selection.strategies import Selection, select_rows

__all__ = ["Selection", "select_rows"]
