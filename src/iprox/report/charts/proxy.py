"""Charts of a proxy's layers: the rank that each layer kept, and what its truncation lost."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from iprox.report import formats
from iprox.report.charts.base import ACCENT, FAINT, MARGIN, NEUTRAL, Chart, Key, axis, escape_label, make_chart

# More kinds of layers than this (experts, unusual models) share one row instead of having one each.
MOST_KINDS = 12

# Name of a layer -> its `shape` [m, n], its `rank` (None: kept dense) and, if measured, the `tail` that it lost.
Layers = Mapping[str, Mapping[str, Any]]


def layers_by_kind(names: Sequence[str]) -> dict[str, list[str]]:
    """Group layers, given by name in model order, that play the same part in successive blocks.

    The key is the rest of the name after the block's number (`self_attn.q_proj`), with `*` for other numbers. More than
    `MOST_KINDS` groups become a single one, `all layers`.
    """
    kinds: dict[str, list[str]] = {}
    for name in names:
        parts = re.split(r"\.\d+\.", name, maxsplit=1)
        kinds.setdefault(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", parts[-1]), []).append(name)
    return kinds if len(kinds) <= MOST_KINDS else {"all layers": list(names)}


def _hover(name: str, layer: Mapping[str, Any]) -> str:
    (rows, columns), rank, tail = layer["shape"], layer.get("rank"), layer.get("tail")
    full = min(rows, columns)
    kept = "kept dense" if rank is None else f"rank {rank:,} of {full:,} ({formats.percent(rank / full, 0)})"
    lost = "" if tail is None else f"<br>energy lost: {formats.percent(tail)}"
    return f"<b>{escape_label(formats.shorten(name, 60))}</b><br>{rows:,} × {columns:,}<br>{kept}{lost}"


def _rows_of_bars(
    layers: Layers,
    y_title: str,
    heights: Sequence[tuple[dict[str, str], Callable[[Mapping[str, Any]], float]]],
    **words: Any,
) -> Chart:
    """Draw one row of bars per kind of layer, all with the same vertical scale.

    `heights` has the color and the height of each layer's bars; later bars are drawn over earlier ones. `words` are the
    id, title, caption, label and keys of the chart.
    """
    kinds = layers_by_kind(list(layers))
    figure = make_subplots(
        rows=len(kinds),
        shared_xaxes=True,
        vertical_spacing=0.36 / len(kinds) if len(kinds) > 1 else 0,
        subplot_titles=[escape_label(kind) for kind in kinds],
    )
    highest = 0.0
    for row, names in enumerate(kinds.values(), start=1):
        common = {"x": list(range(len(names))), "width": 0.78, "hoverinfo": "text"}
        hover = [_hover(name, layers[name]) for name in names]
        for color, height in heights:
            y = [height(layers[name]) for name in names]
            if any(y) or color is ACCENT:
                figure.add_trace(go.Bar(y=y, meta=color, hovertext=hover, **common), row=row, col=1)
                highest = max(highest, *y)
    layout = figure.to_plotly_json()["layout"]
    layout.pop("template", None)
    longest = max(len(names) for names in kinds.values())
    for row in range(1, len(kinds) + 1):
        number = "" if row == 1 else str(row)
        # Whole blocks, at most eight numbers.
        blocks = {"tick0": 0, "dtick": -(-longest // 8), "range": [-0.6, longest - 0.4], "zeroline": False}
        layout[f"xaxis{number}"] |= axis("block" if row == len(kinds) else "", **blocks)
        # One vertical scale, so that rows can be compared; its title stands in the middle.
        middle = y_title if row == (len(kinds) + 1) // 2 else ""
        layout[f"yaxis{number}"] |= axis(middle, nticks=3, range=[0, 1.05 * (highest or 1.0)])
    for title in layout.get("annotations", ()):
        # Subplot titles are centered by default; next to short bars a title at the left reads better.
        title.update(x=0, xanchor="left", font={"size": 12})
    size = {"height": 70 + 74 * len(kinds), "margin": MARGIN | {"t": 24}}
    return make_chart(list(figure.data), hovermode="closest", barmode="overlay", **size, **layout, **words)


def rank_chart(layers: Layers) -> Chart:
    """Draw the rank that each layer kept, in front of its full rank."""
    ranks = [(layer["rank"], min(layer["shape"])) for layer in layers.values() if layer.get("rank") is not None]
    dense = len(layers) - len(ranks)
    caption = f"{len(ranks):,} layers became low-rank" + (f", {dense:,} kept dense." if dense else ".")
    if ranks:
        shares = [rank / full for rank, full in ranks]
        caption += f" They keep {formats.percent(min(shares), 0)} to {formats.percent(max(shares), 0)} of full rank."
    keys = [Key("accent", "rank kept"), Key("faint", "full rank"), *([Key("neutral", "kept dense")] if dense else [])]
    return _rows_of_bars(
        layers,
        "rank",
        [
            (FAINT, lambda layer: min(layer["shape"])),
            (ACCENT, lambda layer: layer.get("rank") or 0),
            (NEUTRAL, lambda layer: min(layer["shape"]) if layer.get("rank") is None else 0),
        ],
        id="chart-ranks",
        title="Rank per layer",
        caption=caption,
        label=f"Bars: rank kept by each of {len(layers):,} layers.",
        keys=keys,
    )


def tail_chart(layers: Layers) -> Chart:
    """Draw the share of the weighted squared norm that each layer lost; at least one layer has a `tail`."""
    tails = {name: layer["tail"] for name, layer in layers.items() if layer.get("tail") is not None}
    worst = max(tails, key=lambda name: tails[name])
    return _rows_of_bars(
        layers,
        "energy lost (%)",
        [(ACCENT, lambda layer: 100 * (layer.get("tail") or 0.0))],
        id="chart-tails",
        title="Weighted energy lost per layer",
        caption="Share of the weighted squared norm removed: "
        f"{formats.percent(sum(tails.values()) / len(tails))} on average, {formats.percent(tails[worst])} in {worst}.",
        label=f"Bars: energy lost by each of {len(tails):,} layers.",
        keys=(Key("accent", "energy lost"),),
    )
