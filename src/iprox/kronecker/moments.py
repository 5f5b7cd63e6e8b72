"""The second moments of each linear layer's inputs and output gradients, measured on a sample in one pass."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from iprox.kronecker.sample import Counts, SampleSettings, read_sample
from iprox.kronecker.second_moment import ExactMoment, SecondMoment, SketchedMoment
from iprox.models.experts import expert_layers
from iprox.models.layers import has_bias, signal_like, unfolding, weight_shape
from iprox.models.loss import LossFn, causal_lm_losses
from iprox.models.precision import accumulation_dtype

# Bytes that moments may take at once. If they would take more, the sample is read once per group of layers.
MEMORY = 4 << 30
# Wider layers are sketched; an exact moment of this width takes 64 MiB.
EXACT_WIDTH = 4096
# Directions of a sketch. Moments of gradients have a much lower rank.
SKETCH_DIRECTIONS = 1024


@dataclass(frozen=True, slots=True)
class LayerMoments:
    """Second moments of one layer.

    Attributes:
        inputs: C_h = E[h hᵀ] [n, n] over tokens (for an expert, over those routed to it). Layers with the same input
            share one object, except for K-FAC (`MomentSettings.kfac`).
        gradients: C_δ = E[δ δᵀ] [m, m], where δ is the gradient of the example's mean loss.
    """

    inputs: SecondMoment
    gradients: SecondMoment

    @property
    def reached(self) -> bool:
        """Whether the sample has nonzero inputs and gradients for this layer."""
        return self.inputs.trace > 0 and self.gradients.trace > 0


@dataclass(frozen=True, slots=True)
class MomentSettings(SampleSettings):
    """Settings of measuring moments.

    Attributes:
        exact_width: width of the widest layer with exact moments; wider ones are sketched.
        directions: number of directions of a sketch.
        kfac: whether the moments are those of K-FAC, so that C_δ ⊗ C_h is the Fisher of the layer. All are exact, the
            input of a layer with a bias has one more entry, which is 1, and C_δ is a mean over examples of the sum over
            their tokens, not a mean over tokens. The sums that only `SecondMoment.shrinkage` needs are skipped.
    """

    exact_width: int = EXACT_WIDTH
    directions: int = SKETCH_DIRECTIONS
    kfac: bool = False

    def is_exact(self, width: int) -> bool:
        """Return whether a moment of this width is exact."""
        return self.kfac or width <= self.exact_width

    def numbers(self, width: int) -> int:
        """Return the number of floats in one moment of this width."""
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

    2n² + 2m² FLOPs per token and layer, in addition to a backward pass without weight gradients, and about as much
    again for Gram matrices of long examples; layers with the same input (q/k/v, gate/up) share C_h. Memory: n² + m²
    floats per layer (see `MomentSettings.numbers`).

    Args:
        model: model to run; unchanged afterwards.
        layers: layers to measure, by name.
        batches: batches of the sample; their labels should be the training labels.
        settings: settings of the measurement.
        loss_fn: per-example losses, for a model that is not a language model.

    Returns:
        Moments by layer name, and the size of the sample.

    Raises:
        FloatingPointError: a moment is not finite (the message names the layer).
        ValueError: there is no example, or the settings need a language model.
    """
    settings = settings or MomentSettings()
    if loss_fn is not causal_lm_losses and settings.labels != "data":
        raise ValueError("sampled labels need a language model, not a loss_fn")
    inputs: dict[str, SecondMoment] = {}
    gradients: dict[str, SecondMoment] = {}
    owner: dict[str, str] = {}  # layer -> the layer whose C_h it uses, which may be itself
    seen: dict[Any, tuple[str, Tensor]] = {}
    rows: Counter[str] = Counter()

    def add(moments: dict[str, SecondMoment], name: str, x: Tensor) -> None:
        if name not in moments:
            moments[name] = settings.moment(x.shape[-1], x)
        moments[name].add(x.to(accumulation_dtype(x)))

    def sink(name: str, h: Tensor, delta: Tensor) -> None:
        seen.clear()  # the forward pass is over
        rows[name] += h.shape[:2].numel()
        add(gradients, name, delta)
        if owner.get(name, name) == name:
            add(inputs, name, append_ones(h, delta, settings.kfac and has_bias(layers[name])))

    # With the bias's input in it, a moment cannot be shared.
    with nullcontext() if settings.kfac else _noting_owners(layers, owner, seen):
        read = read_sample(model, layers, batches, sink, loss_fn, settings)
    if read.tokens == 0:
        raise ValueError("the probe set has no supervised example")
    result: dict[str, LayerMoments] = {}
    for name, layer in layers.items():
        m, n = weight_shape(layer)
        like = signal_like(layer)
        # The moments of a layer without tokens (an unused expert) are zero.
        C_h = inputs.get(owner.get(name, name)) or settings.moment(n + (settings.kfac and has_bias(layer)), like)
        result[name] = LayerMoments(C_h, gradients.get(name) or settings.moment(m, like))
    routed = expert_layers(model)
    # Inputs first: an error in the forward pass shows in the next layer's input, but in the gradients of all layers.
    for name, moments in result.items():
        # The squared change of the loss is a mean over all tokens. For an expert with a share p of them it is
        # p · E[δ δᵀ] ⊗ E[h hᵀ]: C_δ is a mean over all tokens, C_h over those of the expert.
        # So it is for a layer of a model without tokens, which has its own number of rows per example.
        own = rows[owner.get(name, name)] if not read.text else moments.inputs.rows
        _finish(name, moments.inputs, own if settings.kfac or name in routed or not read.text else read.tokens)
    for name, moments in result.items():
        _finish(name, moments.gradients, read.examples if settings.kfac else read.tokens)
    return result, read


def _finish(name: str, moment: SecondMoment, count: int) -> None:
    """Turn a moment's sum into a mean, and refuse one that is not finite."""
    moment.finish(count)
    if not math.isfinite(moment.squared_norm()):
        raise FloatingPointError(f"the second moments of {name} are not finite; try --set dtype=float32")


def layer_groups(numbers: Mapping[str, int], memory: int) -> list[list[str]]:
    """Return layers in order, in groups of at least one layer whose float32 numbers fit in memory together.

    Args:
        numbers: numbers per layer.
        memory: bytes per group.
    """
    groups: list[list[str]] = []
    room = 0
    for name, count in numbers.items():
        if not groups or 4 * count > room:
            groups.append([])
            room = memory
        groups[-1].append(name)
        room -= 4 * count
    return groups


def append_ones(h: Tensor, delta: Tensor, bias: bool) -> Tensor:
    """Return inputs [B, L, n], with a column of ones (the input of the bias) if there is a bias; zeros on padding."""
    if not bias:
        return h
    there = (h != 0).any(-1, keepdim=True) | (delta != 0).any(-1, keepdim=True)
    return torch.cat([h, there.to(h.dtype)], dim=-1)


@contextmanager
def _noting_owners(
    layers: Mapping[str, nn.Module], owner: dict[str, str], seen: dict[Any, tuple[str, Tensor]]
) -> Iterator[None]:
    """Record which layers get the same input tensor and unfold it alike, in forward passes with gradients.

    Args:
        layers: layers to watch, by name.
        owner: mapping to fill in, from each layer to the first layer with the same input.
        seen: inputs of one pass, kept so that their addresses are not reused; the caller clears it.
    """

    def note(name: str, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if torch.is_grad_enabled():
            key = inputs[0].data_ptr(), unfolding(layers[name])
            first, tensor = seen.setdefault(key, (name, inputs[0]))
            owner.setdefault(name, first if tensor.shape == inputs[0].shape else name)

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.enter_context(layer.register_forward_pre_hook(partial(note, name)))
        yield
