"""The charts of the report; each function returns a `Chart`."""

from iprox.report.charts.audit import FIDELITY_KEYS, fidelity_chart
from iprox.report.charts.base import Chart, safe_json
from iprox.report.charts.proxy import rank_chart, tail_chart
from iprox.report.charts.scores import (
    SHARE_KEYS,
    answer_length_chart,
    score_histogram,
    source_chart,
    source_counts,
    task_histogram,
)
from iprox.report.charts.training import alignment_chart, held_out_chart, warmup_chart

__all__ = [
    "FIDELITY_KEYS",
    "SHARE_KEYS",
    "Chart",
    "alignment_chart",
    "answer_length_chart",
    "fidelity_chart",
    "held_out_chart",
    "rank_chart",
    "safe_json",
    "score_histogram",
    "source_chart",
    "source_counts",
    "tail_chart",
    "task_histogram",
    "warmup_chart",
]
