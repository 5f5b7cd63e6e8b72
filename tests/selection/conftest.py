import numpy as np
import pytest

from iprox.scores import scores_table


@pytest.fixture
def scores_of():
    """A scores table of one task."""

    def make(values, sources=None, tokens=None):
        matrix = np.array(values, dtype=np.float64)[:, None]
        rows = len(values)
        return scores_table(
            [str(i) for i in range(rows)], sources or [None] * rows, tokens or [1] * rows, matrix, ["task"]
        )

    return make
