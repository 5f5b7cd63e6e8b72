"""The second moments of each linear layer's inputs and output gradients, measured on a sample in one pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from iprox.kronecker.sample import Counts, Labels, Tokens, read_sample
from iprox.kronecker.second_moment import ExactMoment, SecondMoment, SketchedMoment
from iprox.models.layers import has_bias, weight_shape
from iprox.models.loss import LossFn, causal_lm_losses
from iprox.models.precision import accumulation_dtype

# Wider layers than this are sketched: at 4,096 an exact moment is 64 MiB.
EXACT_WIDTH = 4096
# Directions of a sketch. Moments of gradients are of much lower rank than this.
SKETCH_DIRECTIONS = 1024


@dataclass(frozen=True, slots=True)
class Moments:
    """Second moments of one layer.

    Attributes:
        inputs: C_h = E[h hᵀ] [n, n], a mean over the tokens that reached the layer; the same object for layers that
            read the same input. With `MomentSettings.bias` the bias's input, 1, is the last entry of h.
        gradients: C_δ = E[δ δᵀ] [m, m], δ the gradient of the example's own mean loss.
    """

    inputs: SecondMoment
    gradients: SecondMoment

    @property
    def reached(self) -> bool:
        """Whether any token of the sample moved this layer."""
        return self.inputs.trace > 0 and self.gradients.trace > 0


@dataclass(frozen=True, slots=True)
class MomentSettings:
    """How moments are measured.

    Attributes:
        labels: `data`, the labels that training uses (empirical Fisher), or `sampled` from the model's own
            predictions at the same tokens (true Fisher).
        tokens: `all`, or only those at which a supervised token is predicted.
        exact_width: widest layer whose moments are exact; wider ones are sketched. None measures all exactly.
        directions: directions of a sketch.
        balanced: whether each example's δ is scaled by the root of its number of supervised tokens. The gradient of a
            mean over k tokens has a variance of about 1/k, so without this the few examples with one or two supervised
            tokens make up nearly all of C_δ.
        bias: whether the input of a layer with a bias has one more entry, which is 1.
        gradients_per: `token`, C_δ is a mean over tokens; or `example`, a mean over examples of the sum over their
            tokens, which C_δ ⊗ C_h has the scale of the Fisher with.
        blocks: whether to measure what `SecondMoment.shrinkage` needs.
        seed: seed for sampled labels.
    """

    labels: Labels = "data"
    tokens: Tokens = "all"
    exact_width: int | None = EXACT_WIDTH
    directions: int = SKETCH_DIRECTIONS
    balanced: bool = True
    bias: bool = False
    gradients_per: Literal["token", "example"] = "token"
    blocks: bool = True
    seed: int = 0

    def is_exact(self, width: int) -> bool:
        """Return whether a moment of this width is exact."""
        return self.exact_width is None or width <= self.exact_width

    def numbers(self, width: int) -> int:
        """Return the number of floats that one moment of this width takes."""
        return width**2 if self.is_exact(width) else 2 * self.directions * width

    def moment(self, width: int, device: torch.device, dtype: torch.dtype) -> SecondMoment:
        """Return an empty moment of this width."""
        if self.is_exact(width):
            return ExactMoment(width, device, dtype, self.blocks)
        return SketchedMoment(width, self.directions, device, dtype)


def collect_moments(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Iterable[Any],
    settings: MomentSettings | None = None,
    loss_fn: LossFn = causal_lm_losses,
) -> tuple[dict[str, Moments], Counts]:
    """Measure the moments of some layers over a sample, in float32 or better.

    Per token and layer 2n² + 2m² FLOPs on top of a backward pass without weight gradients, and about as much
    again in Gram matrices of long examples; C_h is made once where layers share an input (q/k/v, gate/up). Memory:
    n² + m² floats per layer (see `MomentSettings.numbers`).

    Args:
        model: model to run; left as it was.
        layers: layers to measure, by name.
        batches: batches of the sample; their labels should be the training labels.
        settings: how moments are measured.
        loss_fn: per-example losses of a model that is not a language model.

    Returns:
        Moments by layer name, and the size of the sample.

    Raises:
        FloatingPointError: a moment is not finite (the layer is named).
        ValueError: no example, or settings that need a language model without one.
    """
    settings = settings or MomentSettings()
    if loss_fn is not causal_lm_losses and (settings.labels, settings.tokens) != ("data", "all"):
        raise ValueError("sampled labels and supervised tokens need a language model, not a loss_fn")
    inputs: dict[str, SecondMoment] = {}
    gradients: dict[str, SecondMoment] = {}
    owner: dict[str, str] = {}  # layer -> the layer whose C_h it shares, itself if none
    seen: dict[tuple[int, bool], tuple[str, Tensor]] = {}
    with_ones = {name: settings.bias and has_bias(layer) for name, layer in layers.items()}

    def add(moments: dict[str, SecondMoment], name: str, x: Tensor) -> None:
        if name not in moments:
            moments[name] = settings.moment(x.shape[-1], x.device, accumulation_dtype(x))
        moments[name].add(x.to(accumulation_dtype(x)))

    def sink(name: str, h: Tensor, delta: Tensor) -> None:
        seen.clear()  # the forward pass is over
        add(gradients, name, delta)
        if owner[name] == name:
            add(inputs, name, append_ones(h, with_ones[name]))

    with _noting_owners(layers, with_ones, owner, seen):
        read = read_sample(
            *(model, layers, batches, sink, loss_fn),
            labels=settings.labels,
            tokens=settings.tokens,
            balanced=settings.balanced,
            seed=settings.seed,
        )
    if read.tokens == 0:
        raise ValueError("the probe set holds no supervised example")
    result: dict[str, Moments] = {}
    for name, layer in layers.items():
        m, n = weight_shape(layer)
        like = next(layer.parameters())
        # A layer that no token reached (an expert that no token was routed to) has moments of zero.
        sides = inputs.get(owner.get(name, name)), gradients.get(name)
        widths = n + with_ones[name], m
        result[name] = Moments(
            *(
                side or settings.moment(width, like.device, accumulation_dtype(like))
                for side, width in zip(sides, widths, strict=True)
            )
        )
    # The squared change of the loss is a mean over all tokens. Of those that reach an expert, a share p, it is
    # p · E[δ δᵀ] ⊗ E[h hᵀ]: C_δ is a mean over all tokens, C_h over the layer's own.
    count = read.tokens if settings.gradients_per == "token" else read.examples
    # Inputs first: an error of the forward pass shows at the layer after it, and spoils the gradients of all layers.
    for side in ("inputs", "gradients"):
        for name, moments in result.items():
            each: SecondMoment = getattr(moments, side)
            each.finish(each.rows if side == "inputs" else count)
            if not math.isfinite(each.squared_norm()):
                raise FloatingPointError(f"the second moments of {name} are not finite; try --dtype float32")
    return result, read


def append_ones(h: Tensor, bias: bool) -> Tensor:
    """Return inputs [B, L, n] with the bias's own input as one more column if there is a bias: 1 at every token."""
    return torch.cat([h, (h != 0).any(-1, keepdim=True).to(h.dtype)], dim=-1) if bias else h


@contextmanager
def _noting_owners(
    layers: Mapping[str, nn.Module],
    with_ones: Mapping[str, bool],
    owner: dict[str, str],
    seen: dict[tuple[int, bool], tuple[str, Tensor]],
) -> Iterator[None]:
    """Note, in forward passes with gradients, which layers are given the very same tensor.

    Args:
        layers: layers to watch, by name.
        with_ones: layers whose input has one more column in its moment, which the others cannot share.
        owner: filled in: the first of the layers with the same input owns its moment.
        seen: inputs of one pass, held so that no other tensor takes the address of one; the caller clears it.
    """

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if torch.is_grad_enabled():
                first, tensor = seen.setdefault((inputs[0].data_ptr(), with_ones[name]), (name, inputs[0]))
                owner.setdefault(name, first if tensor.shape == inputs[0].shape else name)

        return hook

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(note(name)).remove)
        yield
