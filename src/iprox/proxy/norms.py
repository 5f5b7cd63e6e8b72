"""Refit the norms of a compressed model: one scalar each, in closed form, from the probe.

A proxy's hidden state is the target's plus noise of about the same length, and a norm scales the sum to the length that
the target's state alone would have. The outputs of the next layers are then too large, above all those of the head: the
logits are too confident, and p - y, where the backward pass starts, is wrong. The scalar g that minimizes
Σ_t ‖g·x_t - y_t‖², with x the proxy's and y the target's outputs of the norm, is Σ x·y / Σ x·x (the Wiener gain). It is
multiplied into the norm's weight, so the proxy gets no more parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from iprox.data import Batch
from iprox.kronecker.sample import counted_tokens
from iprox.models.loss import LossFn
from iprox.models.observe import frozen
from iprox.models.precision import accumulation_dtype

# Each sweep fits every norm with the others as the previous sweep left them.
SWEEPS = 2
# Tokens per batch; the outputs of all norms are kept for them.
AT_ONCE = 1024


def norm_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layer norms and RMS norms of a model that have a weight, by name.

    Every family in transformers has its own RMS norm, so they are found by class name. Batch and group norms are left
    out, as their outputs do not depend on one token only.
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
    """Scale every norm of a proxy, in place, to bring its outputs closest to the target's.

    Each sweep takes a forward pass of both models over the probe: 2(P + P′) FLOPs per token.

    Args:
        proxy: proxy; its norms have the same names as the target's.
        target: target; unchanged.
        batches: probe; read `sweeps` times.
        loss_fn: per-example losses, used to run a model on a batch.
        sweeps: number of times to fit every norm.

    Returns:
        The factor of each norm.

    Raises:
        FloatingPointError: an output is not finite (the message names the norm).
    """
    batches = [part for batch in batches for part in _parts(batch)]
    norms, wanted = norm_layers(proxy), norm_layers(target)
    scales = dict.fromkeys(norms, 1.0)
    for _ in range(sweeps):
        sums = {name: torch.zeros(2, dtype=torch.float64) for name in norms}
        for batch in batches:
            with frozen(target), frozen(proxy):
                theirs = _outputs(target, wanted, batch, loss_fn)
                ours = _outputs(proxy, norms, batch, loss_fn)
            for name, output in ours.items():
                x, y = (each.to(accumulation_dtype(output)) for each in (output, theirs[name]))
                sums[name] += torch.stack([(x * y).sum(dtype=torch.float64), (x * x).sum(dtype=torch.float64)]).cpu()
        for name, (cross, square) in ((name, pair.tolist()) for name, pair in sums.items()):
            if not 0 <= square < float("inf"):
                raise FloatingPointError(f"the outputs of {name} are not finite; try --set dtype=float32")
            # A norm is unchanged if no token reached it, or if its outputs point away from the target's.
            if cross > 0 and square > 0:
                scale_norm(norms[name], cross / square)
                scales[name] *= cross / square
    return scales


@torch.no_grad()
def scale_norm(norm: nn.Module, factor: float) -> None:
    """Scale the outputs of a norm. Most norms multiply by their weight, some (Gemma) by one plus their weight."""
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
    """Return the outputs of each norm on a batch, without padding."""
    counted = counted_tokens(batch) if isinstance(batch, Batch) else None
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
    """Return the outputs at some positions [B, L]; norms in attention have the dimension of heads before or after L."""
    if output.shape[:2] == counted.shape:
        return output[counted]
    if output.ndim == 4 and (output.shape[0], output.shape[2]) == counted.shape:
        return output.transpose(1, 2)[counted]
    return output


def _parts(batch: Any) -> list[Any]:
    """Return a batch of token rows in parts of at most `AT_ONCE` tokens, and any other batch unchanged."""
    if not isinstance(batch, Batch):
        return [batch]
    examples = max(1, AT_ONCE // (batch.rows_each * batch.input_ids.shape[1]))
    return [batch.part(start, start + examples) for start in range(0, len(batch.indices), examples)]
