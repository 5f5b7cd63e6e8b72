"""Second moments of each linear layer's inputs and output gradients over probe tokens, in one pass."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from iprox.models.layers import compressible_layers
from iprox.models.loss import LossFn, causal_lm_losses
from iprox.models.observe import frozen, watched_backward
from iprox.models.precision import accumulation_dtype


@dataclass(frozen=True, slots=True)
class Moments:
    """Second moments of one layer over probe tokens, in float32.

    Attributes:
        inputs: C_h = E[h hᵀ] [n, n]; the same tensor object for layers that read the same input.
        gradients: C_δ = E[δ δᵀ] [m, m], δ the gradient of the example's own mean loss.
    """

    inputs: Tensor
    gradients: Tensor


def collect_moments(
    model: nn.Module, batches: Iterable[Any], loss_fn: LossFn = causal_lm_losses
) -> tuple[dict[str, Moments], int]:
    """Moments of every compressible layer over the probe set.

    Per token and layer 2n² + 2m² FLOPs on top of a backward pass without weight gradients; C_h is made once
    where layers share an input (q/k/v, gate/up). Memory: n² + m² floats a layer. Padding has δ = 0 and
    h ≠ 0, so it is left out of C_h by the batch's lengths.

    Args:
        model: the target; left as it was.
        batches: probe batches; their labels should be the training labels.
        loss_fn: per-example losses of a model that is no language model.

    Returns:
        Moments by layer name, and the number of probe tokens.

    Raises:
        FloatingPointError: a moment is not finite (the layer is named).
        ValueError: no probe tokens.
    """
    layers = compressible_layers(model)
    sums_in: dict[str, Tensor] = {}
    sums_out: dict[str, Tensor] = {}
    shared: dict[str, str] = {}  # layer -> the layer whose C_h it shares
    seen: dict[int, tuple[str, Tensor]] = {}  # storage address of an input in this batch -> its first layer
    tokens = 0
    real: Tensor | None = None

    def sink(name: str, h: Tensor, delta: Tensor) -> None:
        add_second_moment(sums_out, name, delta.reshape(-1, delta.shape[-1]))
        first = seen.setdefault(h.data_ptr(), (name, h))
        if first[0] != name and first[1].shape == h.shape and shared.setdefault(name, first[0]) == first[0]:
            return
        rows = h[real] if real is not None and h.shape[:2] == real.shape else h.reshape(-1, h.shape[-1])
        add_second_moment(sums_in, name, rows)

    with frozen(model):
        for batch in batches:
            lengths = getattr(batch, "lengths", None)
            if lengths is not None:
                width = batch.input_ids.shape[1]
                real = torch.arange(width, device=lengths.device)[None, :] < lengths[:, None]
                tokens += int(lengths.sum())
            else:
                tokens += len(batch[0])
            # Holding every input until the batch ends keeps its address its own.
            seen.clear()
            watched_backward(model, layers, lambda batch=batch: loss_fn(model, batch), sink)
    seen.clear()
    if tokens == 0:
        raise ValueError("the probe set holds no supervised example")
    for sums in (sums_in, sums_out):
        for name, total in sums.items():
            total /= tokens
            if not torch.isfinite(total).all():
                raise FloatingPointError(f"the second moments of {name} are not finite; try --dtype float32")
    return {name: Moments(sums_in[shared.get(name, name)], sums_out[name]) for name in layers}, tokens


def add_second_moment(sums: dict[str, Tensor], name: str, rows: Tensor) -> None:
    """sums[name] += rowsᵀ rows, for rows [T, d], in float32 or better."""
    rows = rows.to(accumulation_dtype(rows))
    if name in sums:
        sums[name].addmm_(rows.mT, rows)
    else:
        sums[name] = rows.mT @ rows
