"""Scoring on Ray workers gives the scores of scoring here (to rounding: a worker may use other threads)."""

import numpy as np
import pytest

from iprox.scores import read_scores, score_matrix

pytest.importorskip("ray", reason="the ray extra is not installed")


def test_a_run_on_ray_scores_the_same(copied):
    """By TracIn of mean gradients: the eigenbases of EK-FAC, which a worker finds itself, magnify rounding."""
    plain = ["--set", "influence.estimator=tracin", "influence.per_example=false", "--stop-after", "score"]
    assert copied.run(*plain) == 0
    before = read_scores(copied.output)
    (copied.output / "scores.parquet").unlink()
    assert copied.run(*plain, "--set", "ray_workers=1") == 0
    after = read_scores(copied.output)
    assert after["id"].equals(before["id"])
    scale = np.nanstd(score_matrix(before), axis=0)
    # In bfloat16, and with another number of threads, sums are taken in another order.
    np.testing.assert_allclose(score_matrix(after) / scale, score_matrix(before) / scale, rtol=5e-3, atol=1e-3)
