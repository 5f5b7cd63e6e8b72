"""Charts of the training before scoring: warm-up and alignment."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from iprox.report import formats
from iprox.report.charts.base import ACCENT, FAINT, INK, NEUTRAL, Chart, Key, axis, make_chart

# A browser draws this many points of a curve without lag.
MOST_POINTS = 1000

# Key in alignment.json, name, color, dash and swatch of each part of the alignment loss; the loss is drawn last.
PARTS = (
    ("gradient", "gradient term", NEUTRAL, "dash", "neutral line"),
    ("kl", "KL term", INK, "dot", "ink line"),
    ("hidden", "hidden-state term", FAINT, "solid", "faint"),
    ("loss", "loss", ACCENT, "solid", "accent line"),
)


def thin(x: np.ndarray, y: np.ndarray, most: int = MOST_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """Average neighboring points of a long curve [K], so that at most `most` points remain."""
    if len(x) <= most:
        return x, y
    starts = np.arange(0, len(x), -(-len(x) // most))
    sizes = np.diff(np.append(starts, len(x)))
    return np.add.reduceat(x, starts) / sizes, np.add.reduceat(y, starts) / sizes


def _curve(points: Sequence[Mapping[str, Any]], key: str, name: str, color: dict[str, str], dash: str) -> Any:
    known = [p for p in points if p.get(key) is not None and p.get("step") is not None]
    if not known:
        return None
    x, y = thin(np.array([p["step"] for p in known], float), np.array([p[key] for p in known], float))
    return go.Scatter(
        x=x,
        y=y,
        name=name,
        mode="lines" if len(x) > 1 else "markers",
        line={"width": 2, "dash": dash},
        meta=color,
        hoverinfo="text",
        hovertext=[f"step {a:,.0f}<br>{name} {b:.4g}" for a, b in zip(x, y, strict=True)],
    )


def _rings(x: list[Any], y: list[Any], hover: list[str]) -> go.Scatter:
    marker = {"size": 12, "symbol": "circle-open", "line": {"width": 2}}
    return go.Scatter(x=x, y=y, mode="markers", marker=marker, meta=INK, hoverinfo="text", hovertext=hover)


def _chart(
    traces: Sequence[Any], y_title: str, keys: Sequence[Key], y: dict[str, Any] | None = None, **words: str
) -> Chart:
    return make_chart(
        traces,
        height=290,
        keys=keys,
        hovermode="closest",
        xaxis=axis("step", tickformat=",", nticks=7),
        yaxis=axis(y_title, nticks=6, **(y or {})),
        **words,
    )


def warmup_chart(history: Sequence[Mapping[str, Any]], checkpoints: Sequence[Mapping[str, Any]]) -> Chart | None:
    """Draw the warm-up loss (history.json) and the checkpoints that are scored; return None if there is no loss."""
    curve = _curve(history, "loss", "loss", ACCENT, "solid")
    if curve is None:
        return None
    traces, keys = [curve], [Key("accent line", "training loss")]
    marks = [c for c in checkpoints if c.get("loss") is not None and c.get("step") is not None]
    if marks:
        keys.append(Key("ink ring", "checkpoint"))
        hover = [
            f"checkpoint at step {c['step']:,}<br>loss {c['loss']:.4g}<br>"
            f"learning rate {formats.learning_rate(c.get('learning_rate'))}"
            for c in marks
        ]
        traces.append(_rings([c["step"] for c in marks], [c["loss"] for c in marks], hover))
    losses = [p["loss"] for p in history if p.get("loss") is not None]
    return _chart(
        traces,
        "loss (nats per token)",
        keys,
        id="chart-warmup",
        title="Warm-up loss",
        caption=f"From {losses[0]:.2f} to {losses[-1]:.2f} nats per supervised token.",
        label="Curve of the training loss of the target during warm-up.",
    )


def alignment_chart(steps: Sequence[Mapping[str, Any]]) -> Chart | None:
    """Draw the alignment loss and its parts (`steps` of alignment.json); return None if there is no loss."""
    drawn = [(curve, Key(s, n)) for k, n, c, d, s in PARTS if (curve := _curve(steps, k, n, c, d)) is not None]
    losses = [p["loss"] for p in steps if p.get("loss") is not None]
    if not losses:
        return None
    return _chart(
        [curve for curve, _ in drawn],
        "loss",
        [key for _, key in reversed(drawn)],
        {"rangemode": "tozero"},
        id="chart-alignment",
        title="Alignment loss",
        caption=f"From {losses[0]:.3g} to {losses[-1]:.3g}; lower means closer to the target.",
        label="Curve of the alignment loss of the proxy.",
    )


def held_out_chart(points: Sequence[Mapping[str, Any]], best_step: int | None) -> Chart | None:
    """Draw the fidelity on held-out rows during alignment, and the step that was kept; return None if not measured."""
    curve = _curve(points, "fidelity", "Spearman", ACCENT, "solid")
    if curve is None:
        return None
    curve.mode = "lines+markers"
    kept = next((point for point in points if point["step"] == best_step), points[-1])
    first, best = (formats.decimal(each["fidelity"], 3) for each in (points[0], kept))
    ring = _rings([kept["step"]], [kept["fidelity"]], [f"kept: step {kept['step']:,}<br>Spearman {best}"])
    return _chart(
        [curve, ring],
        "Spearman",
        (Key("accent line", "Spearman"), Key("ink ring", "kept")),
        id="chart-held-out",
        title="Fidelity on held-out rows",
        caption=f"{first} before alignment, {best} at the step that was kept.",
        label="Curve of the mean Spearman correlation with the target's scores on held-out rows.",
    )
