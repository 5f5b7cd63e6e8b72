"""The parts that all charts share: colors by name, axes, and JSON that is safe inside HTML.

A trace names its color in `meta`. report.js looks the color up in the page's style, so that charts follow the light and
the dark theme.
"""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
from markupsafe import Markup

# Colors of style.css.
ACCENT, NEUTRAL, FAINT, INK = ({"color": name} for name in ("accent", "neutral", "faint", "ink"))

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
