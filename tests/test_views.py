"""What a notebook shows: the figures are those of the table or model, and no name is markup."""

import numpy as np
import pyarrow as pa
import pytest

import iprox
from iprox.errors import InputError
from iprox.models.layers import low_rank_layers
from iprox.proxy.compress import derive_proxy
from iprox.proxy.size import Size
from iprox.scores import scores_table


@pytest.fixture
def scores():
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(50, 2))
    matrix[7] = np.nan
    matrix[3, 0] = 9.0
    return scores_table([f"<i>{i}</i>" for i in range(50)], ["a"] * 50, [10] * 50, matrix, ["math", "<b>code</b>"])


def test_scores_show_their_spread_and_best_row(scores):
    html = iprox.view(scores)._repr_html_()
    assert "<td>49</td>" in html
    assert "&lt;i&gt;3&lt;/i&gt;" in html
    assert "<b>" not in html


def test_histograms_hold_every_scored_row(scores):
    figure = iprox.view(scores).plot()
    assert [sum(trace.y) for trace in figure.data] == [49, 49]
    assert len(iprox.view(scores).plot("math").data) == 1
    with pytest.raises(InputError, match="the tasks are math"):
        iprox.view(scores).plot("history")


def test_a_proxy_shows_its_ranks(tiny):
    proxy, _ = derive_proxy(tiny.model("qwen3"), [tiny.batch([9, 7, 12])], Size(0.4), target="models/<b>")
    shown = iprox.view(proxy)
    assert "models/&lt;b&gt;" in shown._repr_html_()
    bars = [
        (text, height) for trace in shown.plot().data for text, height in zip(trace.hovertext, trace.y, strict=True)
    ]
    for name, layer in low_rank_layers(proxy).items():
        heights = [
            height for text, height in bars if height and f"<b>{name}</b>" in text and f"rank {layer.rank} of" in text
        ]
        assert sorted(heights) == [layer.rank, min(layer.in_features, layer.out_features)]


def test_what_is_neither_is_refused(tiny):
    with pytest.raises(InputError, match="no column influence"):
        iprox.view(pa.table({"id": ["a"]}))
    with pytest.raises(InputError, match="no iprox proxy"):
        iprox.view(tiny.model("qwen3"))
    with pytest.raises(InputError, match="not list"):
        iprox.view([1])
