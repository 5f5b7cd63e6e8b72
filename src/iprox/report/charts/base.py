"""The parts that all charts share: colors by name, axes, JSON that is safe inside HTML, and figures for notebooks.

A trace names its color in `meta`. report.js looks the color up in the page's style, so that charts follow the light and
the dark theme; `figures` takes it from `COLORS`.
"""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
from markupsafe import Markup
from plotly.subplots import make_subplots

# The light theme of style.css.
COLORS = {"accent": "#1565c0", "neutral": "#88909a", "faint": "#dde1e5", "ink": "#1a1e23"}
ACCENT, NEUTRAL, FAINT, INK = ({"color": name} for name in COLORS)

MARGIN = {"l": 8, "r": 12, "t": 10, "b": 8}


@dataclass(frozen=True, slots=True)
class Key:
    """One entry of a legend: a swatch (a CSS class of style.css) and its meaning."""

    swatch: str
    text: str


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart and the text around it.

    Attributes:
        id: id of the chart, unique in the page.
        title: plain text above the chart.
        caption: one or two sentences that say what the chart shows.
        label: text alternative to the drawing, for screen readers.
        figure: Plotly figure, its colors named in the `meta` of its traces.
        keys: legend, shown in HTML above the chart, where it wraps on narrow screens.
    """

    id: str
    title: str
    caption: str
    label: str
    figure: go.Figure
    keys: tuple[Key, ...] = ()

    @property
    def spec(self) -> Markup:
        """The figure as JSON, escaped for a script element."""
        return safe_json(str(self.figure.to_json()))

    @property
    def height(self) -> int:
        """Height in pixels, so that the page does not jump while charts are drawn."""
        return self.figure.layout.height  # pyright: ignore[reportAttributeAccessIssue]


def escape_label(text: str) -> str:
    """Return user text for a chart's label, escaped, because Plotly reads a subset of HTML in labels."""
    return html.escape(text, quote=False)


def safe_json(text: str) -> Markup:
    """Return JSON that cannot close the script element around it.

    `<`, `>` and `&` occur in JSON only inside strings, where the \\u form means the same character.
    """
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def axis(title: str = "", **options: Any) -> dict[str, Any]:
    """Return an axis with a title. Zooming is off, because a drag on a touch screen has to scroll the page."""
    return {"title": {"text": escape_label(title), "standoff": 8}, "fixedrange": True, "automargin": True} | options


def make_chart(
    traces: Sequence[Any],
    *,
    id: str,
    title: str,
    caption: str,
    label: str,
    height: int,
    keys: Sequence[Key] = (),
    **layout: Any,
) -> Chart:
    """Build a chart from Plotly traces with the name of their color in `meta`.

    The caption is added to `label`, the text alternative. `layout` is Plotly's, e.g. `xaxis=axis("tokens")`.
    """
    base = {
        # The default template has 6 kB per chart and would fix the colors.
        "template": go.layout.Template(),
        "margin": MARGIN,
        "height": height,
        "showlegend": False,
        "dragmode": False,
        "separators": ".,",
    }
    figure = go.Figure(list(traces), layout=go.Layout(**(base | layout)))
    return Chart(id, title, caption, f"{label} {caption}".strip(), figure, tuple(keys))


def figures(charts: Sequence[Chart], columns: int = 3) -> go.Figure:
    """Return charts as one Plotly figure for a notebook, in lines of at most `columns` charts.

    Several charts must have one pair of axes each.
    """
    heads = [_head(chart) for chart in charts]
    if len(charts) == 1:
        figure = go.Figure(charts[0].figure)
        figure.update_layout(title_text=heads[0], margin={"t": 130}, height=charts[0].height + 180)
    else:
        columns = min(columns, len(charts))
        lines = -(-len(charts) // columns)
        figure = make_subplots(lines, columns, subplot_titles=heads)
        for number, chart in enumerate(charts):
            place: dict[str, Any] = {"row": number // columns + 1, "col": number % columns + 1}
            figure.add_traces(chart.figure.data, rows=place["row"], cols=place["col"])
            layout = chart.figure.layout.to_plotly_json()
            figure.update_xaxes(layout.get("xaxis"), **place)
            figure.update_yaxes(layout.get("yaxis"), **place)
            figure.update_layout(barmode=layout.get("barmode"))
        figure.update_layout(height=max(chart.height for chart in charts) * lines + 80, showlegend=False)
    figure.for_each_trace(_colored)
    axes = {"fixedrange": False, "exponentformat": "power"}
    return figure.update_layout(template="plotly_white").update_xaxes(axes).update_yaxes(axes)


def _head(chart: Chart) -> str:
    """Return the title of a chart with its caption and its legend."""
    colors = [COLORS[key.swatch.split()[0]] for key in chart.keys]
    legend = [f'<span style="color:{c}">■</span> {key.text}' for c, key in zip(colors, chart.keys, strict=True)]
    lines = [escape_label(chart.caption), " ".join(legend)]
    return "<br>".join([escape_label(chart.title), *(f"<sub>{line}</sub>" for line in lines if line)])


def _colored(trace: Any) -> None:
    """Color a trace as report.js does."""
    color = COLORS[trace.meta["color"]]
    if trace.type == "bar" or trace.mode == "markers":
        trace.marker.color = color
        if trace.type != "bar":
            trace.marker.line.color = color
    else:
        trace.line.color = color
        if trace.fill:
            trace.fillcolor = color
