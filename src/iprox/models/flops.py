"""FLOPs of each kind of work: 2 per multiply-add of the linear layers and the head.

The products of attention, norms and activations are left out: at the length of chat examples they are a few percent of
the total. P below is the number of parameters of the layers used per token.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from iprox.errors import InputError
from iprox.models.experts import SplitExperts
from iprox.models.layers import (
    LowRankLinear,
    compressible_layers,
    influence_layers,
    low_rank_layers,
    output_head,
    weight_shape,
)
from iprox.models.quantized import parameters_of


def forward_flops(model: nn.Module) -> float:
    """Return the FLOPs of one token through the compressible layers: 2P, counting the share of experts it uses."""
    return _pass_flops(model, {**compressible_layers(model), **low_rank_layers(model)})


def backward_flops(model: nn.Module) -> float:
    """Return the FLOPs of one token's gradient back to the lowest layer whose gradients are compared: 2P."""
    return _pass_flops(model, influence_layers(model))


def _pass_flops(model: nn.Module, layers: Mapping[str, nn.Module]) -> float:
    shares, total = layer_shares(model, layers), 0.0
    for name, layer in layers.items():
        m, n = weight_shape(layer)
        parameters = layer.rank * (m + n) if isinstance(layer, LowRankLinear) else m * n
        total += parameters * shares[name]
    return 2.0 * total


def layer_shares(model: nn.Module, names: Iterable[str]) -> dict[str, float]:
    """Return the share of tokens that use each layer: k/E for experts, as if all were used equally, otherwise 1."""
    shares: dict[str, float] = {}
    for name, module in model.named_modules():
        if isinstance(module, SplitExperts):
            config = model.config.get_text_config()  # pyright: ignore
            chosen = getattr(config, "num_experts_per_tok", None) or getattr(config, "top_k_experts", None)  # Gemma 4
            if not isinstance(chosen, int):
                raise InputError(f"{type(config).__name__}: does not say how many experts a token uses")
            share = chosen / len(module.gate_up)
            for child in ("gate_up", "down"):
                shares.update({f"{name}.{child}.{i}": share for i in range(len(module.gate_up))})
    return {name: shares.get(name, 1.0) for name in names}


def layers_of(model: nn.Module) -> list[tuple[int, int, float]]:
    """Return (m, n) of each layer whose gradients make up influence, and the share of tokens that use it."""
    layers = influence_layers(model)
    shares = layer_shares(model, layers)
    return [(*weight_shape(layer), shares[name]) for name, layer in layers.items()]


def head_flops(model: nn.Module) -> float:
    """Return the FLOPs of one token through the output head: 2·V·d; 0 for a model without a head."""
    weight = getattr(output_head(model), "weight", None)
    return 0.0 if weight is None else 2.0 * weight.numel()


def contraction_flops(model: nn.Module) -> float:
    """Return the FLOPs of contracting one token's δ and h with one task's dense gradient: 2mn per layer."""
    return sum(2.0 * m * n * share for m, n, share in layers_of(model))


def scoring_flops(model: nn.Module, tokens: int, supervised: int, contraction: float) -> float:
    """Return the FLOPs of scoring: forward and backward to activations, head on supervised tokens, contraction.

    Args:
        model: model that candidates are scored on.
        tokens: number of tokens of the candidates.
        supervised: number of supervised tokens among them.
        contraction: FLOPs of contracting all tokens with all tasks: measured for low-rank queries,
            `tokens * tasks * contraction_flops(...)` for dense ones.
    """
    passes = tokens * (forward_flops(model) + backward_flops(model))
    return passes + supervised * 2 * head_flops(model) + contraction


def forward_pass_flops(model: nn.Module, tokens: int, supervised: int) -> float:
    """Return the FLOPs of one forward pass over some examples, with the head on supervised tokens."""
    return tokens * forward_flops(model) + supervised * head_flops(model)


def parameters(model: nn.Module) -> int:
    """Return the number of parameters of a model, tied ones once."""
    return sum(map(parameters_of, model.parameters()))


def linear_parameters(model: nn.Module) -> int:
    """Return the number of parameters of the compressible layers, dense or low-rank."""
    dense = sum(m * n for m, n in map(weight_shape, compressible_layers(model).values()))
    return dense + sum(x.rank * (x.in_features + x.out_features) for x in low_rank_layers(model).values())


def training_flops(model: nn.Module, tokens: int, supervised: int, lora_rank: int | None = None) -> float:
    """Return the FLOPs of training: 6P per token, or 4P + 6r(m+n) with adapters, with the head on supervised tokens."""
    forward = forward_pass_flops(model, tokens, supervised)
    if lora_rank is None:
        return 3 * forward
    return 2 * forward + 3 * tokens * 2.0 * lora_parameters(model, lora_rank)


def lora_parameters(model: nn.Module, rank: int) -> int:
    """Return the number of parameters of adapters on every linear layer except the head: r(m+n) each."""
    return sum(rank * sum(weight_shape(layer)) for layer in compressible_layers(model).values())


def compression_flops(model: nn.Module, tokens: int, supervised: int, passes: int = 1) -> float:
    """Return the FLOPs of compression.

    Each pass over the probe is a forward pass, a backward pass to activations, and 2n² + 2m² per token and layer; then
    follow Cholesky factorizations and a thin SVD of W [m, n], 4mnk + 9k³ with k = min(m, n). Methods without moments
    take 0 passes; for methods with the moments of one side only, and for sketches, this is an upper bound.
    """
    shapes = [weight_shape(layer) for layer in compressible_layers(model).values()]
    moments = sum(2.0 * (m**2 + n**2) * share for m, n, share in layers_of(model))
    roots = sum((m**3 + n**3) / 3 for m, n in shapes)
    factorize = sum(4 * m * n * min(m, n) + 9 * min(m, n) ** 3 for m, n in shapes)
    reading = 2 * forward_pass_flops(model, tokens, supervised)
    return passes * reading + (tokens * moments + roots if passes else 0.0) + factorize


def alignment_flops(
    model: nn.Module, proxy: nn.Module, tokens: int, supervised: int, *, gradients: bool = True, asked: float = 1.0
) -> float:
    """Return the FLOPs of alignment: the target's weight gradients (6P), the proxy's and the backward of both (16P′).

    With logits only: the target forward (2P), the proxy forward and backward (6P′).

    Args:
        model: target.
        proxy: proxy that is aligned.
        tokens: number of tokens in all steps.
        supervised: number of supervised tokens among them.
        gradients: whether gradients are matched.
        asked: share of the steps that ran the target; the others read its signals from disk.
    """
    on_target, on_proxy = (3, 8) if gradients else (1, 3)
    heads = (2 * asked + 6) if gradients else (asked + 3)
    linear = asked * on_target * forward_flops(model) + on_proxy * forward_flops(proxy)
    return tokens * linear + supervised * heads * head_flops(model)
