"""Curves of the training that a run does before it scores: warm-up and alignment."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from iprox.report import formats
from iprox.report.charts import ACCENT, INK, NEUTRAL, Chart, Key, axis, make_chart

# A browser draws this many points of a curve without lag.
MOST_POINTS = 1000


def thin(x: np.ndarray, y: np.ndarray, most: int = MOST_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """Averages neighboring points of a long curve, so that at most `most` are left.

    Args:
        x: [K].
        y: [K].
        most: the most points to keep.

    Returns:
        Shorter x and y, each point the mean of a run of neighbors.
    """
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
        mode="lines" if len(x) > 1 else "markers",
        line={"width": 2, "dash": dash},
        meta=color,
        hoverinfo="text",
        hovertext=[f"step {a:,.0f}<br>{name} {b:.4g}" for a, b in zip(x, y, strict=True)],
    )


def warmup_chart(history: Sequence[Mapping[str, Any]], checkpoints: Sequence[Mapping[str, Any]]) -> Chart | None:
    """Draws the warm-up loss, with the checkpoints that influence is summed over.

    Args:
        history: history.json.
        checkpoints: checkpoints.json.

    Returns:
        The chart, or None where no loss was logged.
    """
    curve = _curve(history, "loss", "loss", ACCENT, "solid")
    if curve is None:
        return None
    traces = [curve]
    keys = [Key("accent line", "training loss")]
    marks = [c for c in checkpoints if c.get("loss") is not None and c.get("step") is not None]
    if marks:
        keys.append(Key("ink ring", "checkpoint"))
        traces.append(
            go.Scatter(
                x=[c["step"] for c in marks],
                y=[c["loss"] for c in marks],
                mode="markers",
                marker={"size": 10, "symbol": "circle-open", "line": {"width": 2}},
                meta=INK,
                hoverinfo="text",
                hovertext=[
                    f"checkpoint at step {c['step']:,}<br>loss {c['loss']:.4g}<br>"
                    f"learning rate {formats.learning_rate(c.get('learning_rate'))}"
                    for c in marks
                ],
            )
        )
    losses = [p["loss"] for p in history if p.get("loss") is not None]
    caption = f"From {losses[0]:.2f} to {losses[-1]:.2f} nats per supervised token."
    return make_chart(
        traces,
        id="chart-warmup",
        title="Warm-up loss",
        caption=caption,
        label=f"Curve of the training loss of the target during warm-up. {caption}",
        height=290,
        keys=tuple(keys),
        hovermode="closest",
        xaxis=axis("step", tickformat=",", nticks=7),
        yaxis=axis("loss (nats per token)", nticks=6),
    )


def alignment_chart(steps: Sequence[Mapping[str, Any]]) -> Chart | None:
    """Draws the alignment loss and its two parts.

    Args:
        steps: `steps` of alignment.json.

    Returns:
        The chart, or None where no loss was logged.
    """
    parts = [
        ("gradient", "gradient term", NEUTRAL, "dash", "neutral line"),
        ("kl", "KL term", INK, "dot", "ink line"),
        ("loss", "loss", ACCENT, "solid", "accent line"),
    ]
    drawn = [(curve, Key(s, n)) for k, n, c, d, s in parts if (curve := _curve(steps, k, n, c, d)) is not None]
    losses = [p["loss"] for p in steps if p.get("loss") is not None]
    if not losses:
        return None
    caption = f"The loss goes from {losses[0]:.3g} to {losses[-1]:.3g}; lower means closer to the target's gradients."
    return make_chart(
        [curve for curve, _ in drawn],
        id="chart-alignment",
        title="Alignment loss",
        caption=caption,
        label=f"Curve of the alignment loss of the proxy. {caption}",
        height=290,
        keys=tuple(key for _, key in reversed(drawn)),
        hovermode="closest",
        xaxis=axis("step", tickformat=",", nticks=7),
        yaxis=axis("loss", nticks=6, rangemode="tozero"),
    )


def held_out_chart(points: Sequence[Mapping[str, Any]], best_step: int | None) -> Chart | None:
    """Draws the fidelity on held-out rows while the proxy was aligned, with the step that was kept.

    Args:
        points: `held_out` of alignment.json.
        best_step: the step whose factors were kept.

    Returns:
        The chart, or None where it was not measured.
    """
    curve = _curve(points, "fidelity", "Spearman", ACCENT, "solid")
    if curve is None:
        return None
    curve.mode = "lines+markers"
    first = points[0]["fidelity"]
    kept = next((point for point in points if point["step"] == best_step), points[-1])
    ring = go.Scatter(
        x=[kept["step"]],
        y=[kept["fidelity"]],
        mode="markers",
        marker={"size": 14, "symbol": "circle-open", "line": {"width": 2}},
        meta=INK,
        hoverinfo="skip",
    )
    caption = f"From {formats.decimal(first, 3)} before alignment to {formats.decimal(kept['fidelity'], 3)}, kept."
    return make_chart(
        [curve, ring],
        id="chart-held-out",
        title="Fidelity on held-out rows",
        caption=caption,
        label=f"Curve of the mean Spearman correlation with the target's scores on held-out rows. {caption}",
        height=290,
        keys=(Key("accent line", "Spearman"), Key("ink ring", "kept")),
        hovermode="closest",
        xaxis=axis("step", tickformat=",", nticks=7),
        yaxis=axis("Spearman", nticks=6),
    )
