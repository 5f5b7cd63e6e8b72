"""Charts of the proxy's layers: the rank each one kept, and what that lost."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from iprox.report import formats
from iprox.report.charts import ACCENT, FAINT, MARGIN, NEUTRAL, Chart, Key, axis, escape_label, make_chart

# More kinds of layers than this (experts, unusual models) share one row instead of one each.
MOST_KINDS = 12


def layers_by_kind(names: Sequence[str]) -> dict[str, list[str]]:
    """Groups layers that play the same part in successive blocks.

    Args:
        names: module names in model order, e.g. `model.layers.0.self_attn.q_proj`.

    Returns:
        What follows the block's number (`self_attn.q_proj`; numbers in it become `*`) to its layers, in model order;
        one group `all layers` where there would be more than `MOST_KINDS`.
    """
    kinds: dict[str, list[str]] = {}
    for name in names:
        parts = re.split(r"\.\d+\.", name, maxsplit=1)
        kinds.setdefault(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", parts[-1]), []).append(name)
    return kinds if len(kinds) <= MOST_KINDS else {"all layers": list(names)}


def full_rank(layer: Mapping[str, Any]) -> int:
    """Returns the largest rank a layer of this shape can have."""
    return min(layer["shape"])


def _hover(name: str, layer: Mapping[str, Any]) -> str:
    rows, columns = layer["shape"]
    full = full_rank(layer)
    rank = layer.get("rank")
    kept = "kept dense" if rank is None else f"rank {rank:,} of {full:,} ({formats.percent(rank / full, 0)})"
    tail = layer.get("tail")
    lost = "" if tail is None else f"<br>energy lost: {formats.percent(tail)}"
    return f"<b>{escape_label(formats.shorten(name, 60))}</b><br>{rows:,} × {columns:,}<br>{kept}{lost}"


def _rows_of_bars(kinds: Mapping[str, Sequence[str]], draw: Any, y_title: str, **options: Any) -> Chart:
    """Lays out one row of bars a kind of layer, all with the same vertical scale."""
    figure = make_subplots(
        rows=len(kinds),
        shared_xaxes=True,
        vertical_spacing=0.36 / max(len(kinds), 1) if len(kinds) > 1 else 0,
        subplot_titles=[escape_label(kind) for kind in kinds],
    )
    highest = 0.0
    for row, names in enumerate(kinds.values(), start=1):
        for bars in draw(list(range(len(names))), names):
            figure.add_trace(bars, row=row, col=1)
            highest = max(highest, *bars.y)
    layout = figure.to_plotly_json()["layout"]
    longest = max(len(names) for names in kinds.values())
    for key, value in layout.items():
        if key.startswith(("xaxis", "yaxis")):
            last = key == ("xaxis" if len(kinds) == 1 else f"xaxis{len(kinds)}")
            middle = key == ("yaxis" if len(kinds) <= 2 else f"yaxis{(len(kinds) + 1) // 2}")
            extra: dict[str, Any] = {
                "tick0": 0,
                "dtick": -(-longest // 8),  # whole blocks, at most eight numbers
                "range": [-0.6, longest - 0.4],
                "zeroline": False,
            }
            if key.startswith("y"):
                # One vertical scale for all rows, or they could not be compared.
                extra = {"nticks": 3, "range": [0, 1.05 * (highest or 1.0)]}
            title = "block" if last else y_title if middle else ""
            layout[key] = value | axis(title, **extra)
    for title in layout.get("annotations", ()):
        # Subplot titles are centered by default; beside short bars a title at the left reads better.
        title.update(x=0, xanchor="left", font={"size": 12})
    layout.pop("template", None)
    return make_chart(
        list(figure.data),
        height=70 + 74 * len(kinds),
        hovermode="closest",
        margin=MARGIN | {"t": 24},
        barmode="overlay",
        **layout,
        **options,
    )


def rank_chart(layers: Mapping[str, Mapping[str, Any]]) -> Chart:
    """Draws the rank each layer kept before its full rank.

    Args:
        layers: `layers` of compression.json.

    Returns:
        The chart.
    """
    dense = [name for name, layer in layers.items() if layer.get("rank") is None]

    def draw(places: list[int], names: Sequence[str]) -> list[go.Bar]:
        full = [full_rank(layers[n]) for n in names]
        kept = [layers[n].get("rank") for n in names]
        hover = [_hover(n, layers[n]) for n in names]
        common = {"x": places, "width": 0.78, "hovertext": hover, "hoverinfo": "text"}
        bars = [
            go.Bar(y=full, meta=FAINT, **common),
            go.Bar(y=[rank or 0 for rank in kept], meta=ACCENT, **common),
        ]
        if any(rank is None for rank in kept):
            stays = [f if rank is None else 0 for f, rank in zip(full, kept, strict=True)]
            bars.append(go.Bar(y=stays, meta=NEUTRAL, **common))
        return bars

    shares = [layer["rank"] / full_rank(layer) for layer in layers.values() if layer.get("rank") is not None]
    caption = f"{len(layers) - len(dense):,} layers became low-rank"
    caption += f", {len(dense):,} kept dense." if dense else "."
    if shares:
        caption += (
            f" They keep between {formats.percent(min(shares), 0)} and {formats.percent(max(shares), 0)} "
            "of their full rank."
        )
    keys = [Key("accent", "rank kept"), Key("faint", "full rank")]
    if dense:
        keys.append(Key("neutral", "kept dense"))
    return _rows_of_bars(
        layers_by_kind(list(layers)),
        draw,
        "rank",
        id="chart-ranks",
        title="Rank per layer",
        caption=caption,
        label=f"Bars: rank kept by each of {len(layers):,} layers. {caption}",
        keys=tuple(keys),
    )


def tail_chart(layers: Mapping[str, Mapping[str, Any]]) -> Chart:
    """Draws the share of the weighted squared norm that each layer lost.

    Args:
        layers: `layers` of compression.json, at least one with a `tail`.

    Returns:
        The chart.
    """
    tails = {name: layer["tail"] for name, layer in layers.items() if layer.get("tail") is not None}
    worst = max(tails, key=lambda name: tails[name])

    def draw(places: list[int], names: Sequence[str]) -> list[go.Bar]:
        return [
            go.Bar(
                x=places,
                y=[100 * tails.get(n, 0.0) for n in names],
                width=0.78,
                meta=ACCENT,
                hovertext=[_hover(n, layers[n]) for n in names],
                hoverinfo="text",
            )
        ]

    caption = (
        f"Share of the weighted squared norm that the cut-off singular values held: "
        f"{formats.percent(sum(tails.values()) / len(tails))} on average, "
        f"most ({formats.percent(tails[worst])}) in {worst}."
    )
    return _rows_of_bars(
        layers_by_kind(list(layers)),
        draw,
        "energy lost (%)",
        id="chart-tails",
        title="Weighted energy lost per layer",
        caption=caption,
        label=f"Bars: energy lost by each of {len(tails):,} layers. {caption}",
        keys=(Key("accent", "energy lost"),),
    )
