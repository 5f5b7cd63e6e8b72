"""Refit the norms of a compressed model: one scalar each, in closed form, from the probe.

What truncation leaves of a hidden state is the target's plus noise of about the same length, and a norm scales the sum
to the length that the target's alone would have. So all that reads from it, the head most of all, is too sure of it:
the logits are too steep, and p - y, which the backward pass starts from, is wrong. The scalar g that minimizes
Σ_t ‖g·x_t - y_t‖², x the proxy's and y the target's outputs of the same norm, is Σ x·y / Σ x·x (Wiener's gain); it goes
into the norm's weight, so the proxy has not one parameter more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from iprox.data import Batch
from iprox.models.loss import LossFn
from iprox.models.observe import frozen
from iprox.models.precision import accumulation_dtype

# Each sweep fits every norm given all others as the last one left them; the second takes up what the first moved.
SWEEPS = 2
# Tokens at a time: what every norm of the target says of them is held.
AT_ONCE = 1024


def norm_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layer and RMS norms of a model that carry a weight, by name.

    Each family of transformers has an RMS norm of its own, so they are told by the name of their class. Norms over a
    batch or a group of channels are left alone: their outputs do not hang on one token.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__.endswith(("RMSNorm", "LayerNorm"))
        and isinstance(getattr(module, "weight", None), nn.Parameter)
        and module.weight.ndim == 1
    }


@torch.no_grad()
def refit_norms(
    proxy: nn.Module, target: nn.Module, batches: Iterable[Any], loss_fn: LossFn, sweeps: int = SWEEPS
) -> dict[str, float]:
    """Scale every norm of a proxy, in place, so that its outputs come closest to the target's.

    Forward passes of both models over the probe, twice: 2·2(P + P′) FLOPs a token.

    Args:
        proxy: its norms are named as the target's.
        target: left as it was.
        batches: the probe; read `sweeps` times.
        loss_fn: what runs a model on a batch.
        sweeps: how often every norm is fitted.

    Returns:
        The factor that each norm was multiplied by.

    Raises:
        FloatingPointError: an output is not finite (the norm is named).
    """
    batches = [part for batch in batches for part in _parts(batch)]
    norms, wanted = norm_layers(proxy), norm_layers(target)
    scales = dict.fromkeys(norms, 1.0)
    for _ in range(sweeps):
        sums = {name: torch.zeros(2, dtype=torch.float64) for name in norms}
        for batch in batches:
            with frozen(target), frozen(proxy):  # dropout off
                theirs = _outputs(target, wanted, batch, loss_fn)
                ours = _outputs(proxy, norms, batch, loss_fn)
            for name, output in ours.items():
                x, y = (each.to(accumulation_dtype(output)) for each in (output, theirs[name]))
                sums[name] += torch.stack([(x * y).sum(dtype=torch.float64), (x * x).sum(dtype=torch.float64)]).cpu()
        for name, (cross, square) in ((name, pair.tolist()) for name, pair in sums.items()):
            if not 0 <= square < float("inf"):
                raise FloatingPointError(f"the outputs of {name} are not finite; try --dtype float32")
            # A norm that no token reached stays; one that came out against the target's has nothing left to scale.
            if cross > 0 and square > 0:
                scale_norm(norms[name], cross / square)
                scales[name] *= cross / square
    return scales


@torch.no_grad()
def scale_norm(norm: nn.Module, factor: float) -> None:
    """Multiply the outputs of a norm; some multiply by their weight, some (Gemma) by one plus it."""
    weight, bias = norm.weight, getattr(norm, "bias", None)
    assert isinstance(weight, Tensor)
    saved = weight.clone()
    sample = torch.linspace(-1, 2, saved.shape[-1], device=saved.device, dtype=saved.dtype)
    weight.zero_()
    nothing = norm(sample) if bias is None else norm(sample) - bias
    offset = 1.0 if nothing.abs().max() > 0 else 0.0
    weight.copy_((saved + offset) * factor - offset)
    if isinstance(bias, Tensor):
        bias.mul_(factor)


def _outputs(model: nn.Module, norms: Mapping[str, nn.Module], batch: Any, loss_fn: LossFn) -> dict[str, Tensor]:
    """What each norm gives on a batch; padding left out."""
    counted: Tensor | None = None
    if isinstance(batch, Batch):
        positions = torch.arange(batch.input_ids.shape[1], device=batch.lengths.device)
        counted = positions[None, :] < batch.lengths[:, None]
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            outputs[name] = output if counted is None else _of_positions(output, counted)

        return hook

    with ExitStack() as stack:
        for name, norm in norms.items():
            stack.callback(norm.register_forward_hook(keep(name)).remove)
        loss_fn(model, batch)
    return outputs


def _of_positions(output: Tensor, counted: Tensor) -> Tensor:
    """The outputs at some positions [B, L]; norms inside attention may have the heads before or behind them."""
    if output.shape[:2] == counted.shape:
        return output[counted]
    if output.ndim == 4 and (output.shape[0], output.shape[2]) == counted.shape:
        return output.transpose(1, 2)[counted]
    return output


def _parts(batch: Any) -> list[Any]:
    """A batch of token rows in parts of at most `AT_ONCE` tokens; any other as it is."""
    if not isinstance(batch, Batch):
        return [batch]
    rows = max(1, AT_ONCE // batch.input_ids.shape[1])
    parts = []
    for start in range(0, len(batch.indices), rows):
        some = slice(start, start + rows)
        parts.append(Batch(batch.input_ids[some], batch.labels[some], batch.lengths[some], batch.indices[some]))
    return parts
