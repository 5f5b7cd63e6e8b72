"""What every chart shares: colors by name, the base layout, and JSON that is safe inside HTML.

Colors are never fixed here. A trace says `meta={"color": "accent"}`, and report.js looks the color up in the
page's style, so that charts follow the light and the dark theme.
"""

import html
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
from markupsafe import Markup

ACCENT = {"color": "accent"}
NEUTRAL = {"color": "neutral"}
FAINT = {"color": "faint"}
INK = {"color": "ink"}

MARGIN = {"l": 8, "r": 12, "t": 10, "b": 8}


@dataclass(frozen=True, slots=True)
class Key:
    """One entry of a legend: a swatch (a CSS class of style.css) and what it stands for."""

    swatch: str
    text: str


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart as the template shows it.

    Attributes:
        id: unique in the page.
        title: plain text above the chart.
        caption: what is to be seen, in a sentence or two.
        label: text alternative that stands in for the drawing.
        spec: the figure as JSON, escaped for a script element.
        height: in pixels, so that the page does not jump while charts are drawn.
        keys: the legend.
    """

    id: str
    title: str
    caption: str
    label: str
    spec: Markup
    height: int
    keys: tuple[Key, ...] = ()


def escape_label(text: str) -> str:
    """Returns text for a chart's label: Plotly reads a subset of HTML in labels, so user text is escaped."""
    return html.escape(text, quote=False)


def safe_json(text: str) -> Markup:
    """Returns JSON that cannot close the script element it stands in.

    `<`, `>` and `&` occur in JSON only inside strings, where the \\u form means the same character.
    """
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def axis(title: str = "", **options: Any) -> dict[str, Any]:
    """Returns an axis with a title. Zooming is off: a drag on a touch screen has to scroll the page."""
    return {"title": {"text": escape_label(title), "standoff": 8}, "fixedrange": True, "automargin": True} | options


def make_chart(
    traces: list[Any],
    *,
    id: str,
    title: str,
    caption: str,
    label: str,
    height: int,
    keys: tuple[Key, ...] = (),
    **layout: Any,
) -> Chart:
    """Builds a chart from Plotly traces.

    Args:
        traces: Plotly traces with their color's name in `meta`.
        id: unique in the page.
        title: plain text above the chart.
        caption: what is to be seen.
        label: the text alternative.
        height: in pixels.
        keys: the legend, shown in HTML above the chart, where it wraps on narrow screens.
        **layout: Plotly layout, e.g. `xaxis=axis("tokens")`.

    Returns:
        The chart, its figure serialized.
    """
    base = {
        # The default template is 6 kB a chart and would fix colors; report.js sets them.
        "template": go.layout.Template(),
        "margin": MARGIN,
        "height": height,
        "showlegend": False,
        "dragmode": False,
        "separators": ".,",
    }
    figure = go.Figure(traces, layout=go.Layout(**(base | layout)))
    return Chart(id, title, caption, label, safe_json(str(figure.to_json())), height, keys)
