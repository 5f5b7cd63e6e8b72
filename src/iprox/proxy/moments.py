"""Second moments of each linear layer's inputs and output gradients over probe tokens, in one pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from iprox.data.batching import Batch
from iprox.models.flops import active_shares
from iprox.models.layers import weight_shape
from iprox.models.loss import LossFn, causal_lm_logits, causal_lm_losses
from iprox.models.observe import frozen, watched_backward
from iprox.proxy.second_moment import ExactMoment, SecondMoment, SketchedMoment

Labels = Literal["data", "sampled"]
Tokens = Literal["all", "supervised"]

# Wider layers than this are sketched: at 4,096 an exact moment is 64 MiB.
EXACT_WIDTH = 4096
# Directions of a sketch. Moments of gradients are of much lower rank than this.
SKETCH_DIRECTIONS = 1024


@dataclass(frozen=True, slots=True)
class Moments:
    """Second moments of one layer.

    Attributes:
        inputs: C_h = E[h hᵀ] [n, n]; the same object for layers that read the same input.
        gradients: C_δ = E[δ δᵀ] [m, m], δ the gradient of the example's own mean loss, by default times the root of
            its number of supervised tokens.
    """

    inputs: SecondMoment
    gradients: SecondMoment

    @property
    def reached(self) -> bool:
        """Whether any probe token moved this layer."""
        return self.inputs.trace > 0 and self.gradients.trace > 0


@dataclass(frozen=True, slots=True)
class MomentSettings:
    """How moments are measured.

    Attributes:
        labels: `data`, the labels that training uses (empirical Fisher), or `sampled` from the model's own
            predictions at the same tokens (true Fisher).
        tokens: `all`, or only those at which a supervised token is predicted.
        exact_width: widest layer whose moments are exact; wider ones are sketched.
        directions: of a sketch.
        balanced: scale each example's δ by the root of its number of supervised tokens. The gradient of a mean over k
            tokens has a variance of about 1/k, so without this the few examples with one or two supervised tokens
            are nearly all of C_δ, and the others, which are ranked too, count for nothing.
        seed: of sampled labels.
    """

    labels: Labels = "data"
    tokens: Tokens = "all"
    exact_width: int = EXACT_WIDTH
    directions: int = SKETCH_DIRECTIONS
    balanced: bool = True
    seed: int = 0

    def numbers(self, width: int) -> int:
        """Floats that one moment of this width takes."""
        return width**2 if width <= self.exact_width else 2 * self.directions * width


def collect_moments(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Iterable[Any],
    settings: MomentSettings | None = None,
    loss_fn: LossFn = causal_lm_losses,
) -> tuple[dict[str, Moments], int]:
    """Moments of some layers over the probe set, in float32 or better.

    Per token and layer 2n² + 2m² FLOPs on top of a backward pass without weight gradients, and about as much
    again in Gram matrices of long examples; C_h is made once where layers share an input (q/k/v, gate/up). Memory:
    n² + m² floats a layer (see `MomentSettings.numbers`). Padding has δ = 0 and h ≠ 0, so it is left out of C_h by
    the batch's lengths.

    Args:
        model: the target; left as it was.
        layers: the layers wanted, from `compressible_layers(model)`.
        batches: probe batches; their labels should be the training labels.
        settings: how.
        loss_fn: per-example losses of a model that is no language model.

    Returns:
        Moments by layer name, and the number of probe tokens counted.

    Raises:
        FloatingPointError: a moment is not finite (the layer is named).
        ValueError: no probe tokens, or settings that need a language model without one.
    """
    settings = settings or MomentSettings()
    if loss_fn is not causal_lm_losses and (settings.labels, settings.tokens) != ("data", "all"):
        raise ValueError("sampled labels and supervised tokens need a language model, not a loss_fn")
    inputs: dict[str, SecondMoment] = {}
    gradients: dict[str, SecondMoment] = {}
    owner: dict[str, str] = {}  # layer -> the layer whose C_h it shares, itself if none
    routed = active_shares(model)  # experts: they see some of the tokens only
    rows: dict[str, int] = {}  # tokens that reached each of them
    generator = torch.Generator().manual_seed(settings.seed)
    tokens = 0
    counted: Tensor | None = None
    scale: Tensor | None = None

    def moment(width: int, like: Tensor) -> SecondMoment:
        dtype = torch.promote_types(like.dtype, torch.float32)
        if width <= settings.exact_width:
            return ExactMoment(width, like.device, dtype)
        return SketchedMoment(width, settings.directions, like.device, dtype)

    def add(moments: dict[str, SecondMoment], name: str, x: Tensor) -> None:
        if name not in moments:
            moments[name] = moment(x.shape[-1], x)
        moments[name].add(x.to(torch.promote_types(x.dtype, torch.float32)))

    def sink(name: str, h: Tensor, delta: Tensor) -> None:
        add(gradients, name, delta if scale is None else delta * scale[:, None, None].to(delta.dtype))
        if owner[name] == name:
            add(inputs, name, h)
            if name in routed:
                rows[name] = rows.get(name, 0) + int((h != 0).any(-1).sum())

    with frozen(model):
        for batch in batches:
            if isinstance(batch, Batch):
                if settings.labels == "sampled":
                    batch = sampled_labels(model, batch, generator)
                counted = counted_tokens(batch, settings.tokens)
                tokens += int(counted.sum())
                if settings.balanced:
                    scale = (batch.labels[:, 1:] != -100).sum(1).sqrt()
            with _noting_owners(layers, owner):
                losses = watched_backward(model, layers, _losses(model, batch, loss_fn), sink, counted)
            if not isinstance(batch, Batch):
                tokens += len(losses)
    if tokens == 0:
        raise ValueError("the probe set holds no supervised example")
    result: dict[str, Moments] = {}
    for name, layer in layers.items():
        m, n = weight_shape(layer)
        like = next(layer.parameters())
        # A layer that no token reached (an expert never routed to) has moments of zero.
        own = inputs.get(owner.get(name, name)) or moment(n, like)
        result[name] = Moments(own, gradients.get(name) or moment(m, like))
    # Inputs first: a fault of the forward pass shows at the layer after it, and spoils the gradients of all.
    for side in ("inputs", "gradients"):
        for name, moments in result.items():
            each: SecondMoment = getattr(moments, side)
            # The squared change of the loss is a mean over all tokens; of those that an expert sees, a share p, it is
            # p · E[δ δᵀ] ⊗ E[h hᵀ]: one of the two moments is of all tokens, the other of its own.
            each.finish(rows.get(name, tokens) if side == "inputs" else tokens)
            if not math.isfinite(each.squared_norm()):
                raise FloatingPointError(f"the second moments of {name} are not finite; try --dtype float32")
    return result, tokens


@contextmanager
def _noting_owners(layers: Mapping[str, nn.Module], owner: dict[str, str]) -> Iterator[None]:
    """Note, in a forward pass, which layers are given the very same tensor: the first of them owns its moment."""
    # Holding every input until the pass is over keeps its address its own.
    seen: dict[int, tuple[str, Tensor]] = {}

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            first, tensor = seen.setdefault(inputs[0].data_ptr(), (name, inputs[0]))
            owner.setdefault(name, first if tensor.shape == inputs[0].shape else name)

        return hook

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(note(name)).remove)
        yield


def _losses(model: nn.Module, batch: Any, loss_fn: LossFn) -> Callable[[], Tensor]:
    return lambda: loss_fn(model, batch)


def counted_tokens(batch: Batch, tokens: Tokens) -> Tensor:
    """Which positions of a batch count, bool [B, L]: all but padding, or those that predict a supervised token."""
    if tokens == "supervised":
        following = torch.roll(batch.labels, -1, dims=1) != -100
        following[:, -1] = False
        return following
    positions = torch.arange(batch.input_ids.shape[1], device=batch.lengths.device)
    return positions[None, :] < batch.lengths[:, None]


@torch.no_grad()
def sampled_labels(model: nn.Module, batch: Batch, generator: torch.Generator) -> Batch:
    """The batch with every supervised label drawn from the model's own prediction (Martens 2020: the true Fisher).

    Raises:
        FloatingPointError: a prediction is not finite.
    """
    logits, _, _ = causal_lm_logits(model, batch)
    if not torch.isfinite(logits).all():
        raise FloatingPointError("the model's logits are not finite, so no label can be drawn; try --dtype float32")
    probabilities = torch.softmax(logits.float(), dim=-1).cpu()
    drawn = torch.multinomial(probabilities, 1, generator=generator)[:, 0].to(batch.labels.device)
    labels = batch.labels.clone()
    labels[:, 1:][labels[:, 1:] != -100] = drawn
    return replace(batch, labels=labels)
