"""The second moments of each linear layer's inputs and output gradients, measured on a sample in one pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from iprox.kronecker.sample import Counts, SampleSettings, read_sample
from iprox.kronecker.second_moment import ExactMoment, SecondMoment, SketchedMoment
from iprox.models.flops import active_shares
from iprox.models.layers import has_bias, weight_shape
from iprox.models.loss import LossFn, causal_lm_losses
from iprox.models.precision import accumulation_dtype

# Wider layers than this are sketched: at 4,096 an exact moment is 64 MiB.
EXACT_WIDTH = 4096
# Directions of a sketch. Moments of gradients are of much lower rank than this.
SKETCH_DIRECTIONS = 1024


@dataclass(frozen=True, slots=True)
class LayerMoments:
    """Second moments of one layer.

    Attributes:
        inputs: C_h = E[h hᵀ] [n, n], over tokens, of an expert over those that reached it; the same object for layers
            that read the same input. For K-FAC each layer has its own (`MomentSettings.kfac`).
        gradients: C_δ = E[δ δᵀ] [m, m], δ the gradient of the example's own mean loss.
    """

    inputs: SecondMoment
    gradients: SecondMoment

    @property
    def reached(self) -> bool:
        """Whether any token of the sample moved this layer."""
        return self.inputs.trace > 0 and self.gradients.trace > 0


@dataclass(frozen=True, slots=True)
class MomentSettings(SampleSettings):
    """How moments are measured.

    Attributes:
        exact_width: widest layer whose moments are exact; wider ones are sketched.
        directions: directions of a sketch.
        kfac: whether the moments are those of K-FAC, so that C_δ ⊗ C_h is the Fisher of the layer. All are exact, the
            input of a layer with a bias has one more entry, which is 1, and C_δ is a mean over examples of the sum over
            their tokens, not a mean over tokens. What only `SecondMoment.shrinkage` needs is left out.
    """

    exact_width: int = EXACT_WIDTH
    directions: int = SKETCH_DIRECTIONS
    kfac: bool = False

    def is_exact(self, width: int) -> bool:
        """Return whether a moment of this width is exact."""
        return self.kfac or width <= self.exact_width

    def numbers(self, width: int) -> int:
        """Return the number of floats that one moment of this width takes."""
        return width**2 if self.is_exact(width) else 2 * self.directions * width

    def moment(self, width: int, like: Tensor) -> SecondMoment:
        """Return an empty moment of this width, in float32 or better."""
        dtype = accumulation_dtype(like)
        if self.is_exact(width):
            return ExactMoment(width, like.device, dtype, blocks=not self.kfac)
        return SketchedMoment(width, self.directions, like.device, dtype)


def collect_moments(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Iterable[Any],
    settings: MomentSettings | None = None,
    loss_fn: LossFn = causal_lm_losses,
) -> tuple[dict[str, LayerMoments], Counts]:
    """Measure the moments of some layers over a sample, in float32 or better.

    Per token and layer 2n² + 2m² FLOPs on top of a backward pass without weight gradients, and about as much
    again in Gram matrices of long examples; C_h is made once where layers share an input (q/k/v, gate/up). Memory:
    n² + m² floats per layer (see `MomentSettings.numbers`).

    Args:
        model: model to run; left as it was.
        layers: layers to measure, by name.
        batches: batches of the sample; their labels should be the training labels.
        settings: settings of the measurement.
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
    seen: dict[int, tuple[str, Tensor]] = {}

    def add(moments: dict[str, SecondMoment], name: str, x: Tensor) -> None:
        if name not in moments:
            moments[name] = settings.moment(x.shape[-1], x)
        moments[name].add(x.to(accumulation_dtype(x)))

    def sink(name: str, h: Tensor, delta: Tensor) -> None:
        seen.clear()  # the forward pass is over
        add(gradients, name, delta)
        if owner.get(name, name) == name:
            add(inputs, name, append_ones(h, settings.kfac and has_bias(layers[name])))

    # With the bias's input in it, a layer's moment is its own.
    with nullcontext() if settings.kfac else _noting_owners(layers, owner, seen):
        read = read_sample(model, layers, batches, sink, loss_fn, settings)
    if read.tokens == 0:
        raise ValueError("the probe set holds no supervised example")
    result: dict[str, LayerMoments] = {}
    for name, layer in layers.items():
        m, n = weight_shape(layer)
        like = next(layer.parameters())
        # A layer that no token reached (an expert that no token was routed to) has moments of zero.
        C_h = inputs.get(owner.get(name, name)) or settings.moment(n + (settings.kfac and has_bias(layer)), like)
        result[name] = LayerMoments(C_h, gradients.get(name) or settings.moment(m, like))
    routed = active_shares(model)
    # Inputs first: an error of the forward pass shows at the layer after it, and spoils the gradients of all layers.
    for name, moments in result.items():
        # The squared change of the loss is a mean over all tokens. Of those that reach an expert, a share p, it is
        # p · E[δ δᵀ] ⊗ E[h hᵀ]: C_δ is a mean over all tokens, C_h over the layer's own.
        _finish(name, moments.inputs, moments.inputs.rows if settings.kfac or name in routed else read.tokens)
    for name, moments in result.items():
        _finish(name, moments.gradients, read.examples if settings.kfac else read.tokens)
    return result, read


def _finish(name: str, moment: SecondMoment, count: int) -> None:
    """Make a moment a mean, and refuse one that is not finite."""
    moment.finish(count)
    if not math.isfinite(moment.squared_norm()):
        raise FloatingPointError(f"the second moments of {name} are not finite; try --set dtype=float32")


def append_ones(h: Tensor, bias: bool) -> Tensor:
    """Return inputs [B, L, n] with the bias's own input as one more column if there is a bias: 1 at every token."""
    return torch.cat([h, (h != 0).any(-1, keepdim=True).to(h.dtype)], dim=-1) if bias else h


@contextmanager
def _noting_owners(
    layers: Mapping[str, nn.Module], owner: dict[str, str], seen: dict[int, tuple[str, Tensor]]
) -> Iterator[None]:
    """Note, in forward passes with gradients, which layers are given the very same tensor.

    Args:
        layers: layers to watch, by name.
        owner: filled in: the first of the layers with the same input owns its moment.
        seen: inputs of one pass, held so that no other tensor takes the address of one; the caller clears it.
    """

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if torch.is_grad_enabled():
                first, tensor = seen.setdefault(inputs[0].data_ptr(), (name, inputs[0]))
                owner.setdefault(name, first if tensor.shape == inputs[0].shape else name)

        return hook

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(note(name)).remove)
        yield
