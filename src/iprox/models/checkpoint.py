"""Proxies as transformers checkpoints, whose `quantization_config` has the rank of each low-rank layer.

In transformers, a quantization method may replace modules before weights are loaded, which is what a proxy needs. After
`import iprox`, a proxy folder loads with `AutoModelForCausalLM.from_pretrained`.

A proxy that keeps its target's weights as bitsandbytes quantized them has that method, and its own description in the
config as `iprox`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from iprox.errors import InputError, cut, shown
from iprox.models.experts import split_experts
from iprox.models.layers import compressible_layers, decoder_layers, low_rank_like, replace_module, weight_shape
from iprox.models.quantized import quantization_method

# Types of the values of a description; the other values are strings or null.
KINDS = {"sparsity": (int, float), "depth": (int, float), "method": (str,)}


class IproxConfig(QuantizationConfigMixin):
    """The description of a proxy: the rank of every low-rank layer, and how it was made.

    Args:
        ranks: rank by module name; the other layers are dense.
        method: method that made the factors (`ipsvd`, `svd`, ...).
        sparsity: share of the compressible parameters that was removed.
        target: model that the proxy was derived from.
        target_fingerprint: fingerprint of that model's weights, to refuse another target.
        depth: fraction of the decoder layers, from the top, whose gradients are compared.

    Raises:
        InputError: a value has the wrong type, or a rank is below 1.
    """

    def __init__(
        self,
        ranks: Mapping[str, int] = MappingProxyType({}),
        method: str = "ipsvd",
        sparsity: float = 0.0,
        target: str | None = None,
        target_fingerprint: str | None = None,
        depth: float = 1.0,
        **_: Any,
    ) -> None:
        self.quant_method = "iprox"  # pyright: ignore[reportAttributeAccessIssue]
        others = {"method": method, "sparsity": sparsity, "target": target, "target_fingerprint": target_fingerprint}
        _check_description(ranks, {**others, "depth": depth})
        self.ranks = dict(ranks)
        self.method = method
        self.sparsity = sparsity
        self.target = target
        self.target_fingerprint = target_fingerprint
        self.depth = depth


def _check_description(ranks: object, others: Mapping[str, object]) -> None:
    """Refuse values that iprox does not write, as in a config that was edited by hand."""
    if not isinstance(ranks, Mapping):
        raise InputError(f"the proxy's config has the ranks {shown(ranks)}; it must have a rank per layer name")
    for layer, rank in ranks.items():
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise InputError(
                f"the proxy's config has the rank {shown(rank)} for {cut(str(layer))}; give a positive integer"
            )
    for key, value in others.items():
        kinds = KINDS.get(key, (str, type(None)))
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise InputError(f"the proxy's config has the {key} {shown(value)}, which has the wrong type")
    if not 0 < others["depth"] <= 1:  # pyright: ignore[reportOperatorIssue]
        raise InputError(f"the proxy's config has the depth {shown(others['depth'])}; give one in (0, 1]")


def proxy_description(config: PretrainedConfig, name: str) -> IproxConfig | None:
    """Return the checked description of a proxy from its config; None for the config of another model.

    Raises:
        InputError: the description is not valid; the message starts with `name`.
    """
    described = getattr(config, "iprox", None) or getattr(config, "quantization_config", None)
    if isinstance(described, IproxConfig):
        return described
    if not isinstance(described, dict) or described.get("quant_method") != "iprox":
        return None
    try:
        return IproxConfig(**{str(key): value for key, value in described.items()})
    except InputError as error:
        raise InputError(f"{name}: {error}") from error


class IproxQuantizer(HfQuantizer):
    """Replaces the layers that have a rank in the config by low-rank layers, before the weights are read."""

    requires_calibration = True  # loads proxies only; iprox.compress makes them
    quantization_config: IproxConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        split_experts(model)
        make_low_rank(model, self.quantization_config.ranks)
        return model

    def is_serializable(self) -> bool:
        """Return True: proxies can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether proxies can be trained: factors are ordinary parameters."""
        return True


def make_low_rank(model: nn.Module, ranks: Mapping[str, int]) -> None:
    """Replace dense layers by empty low-rank layers of these ranks, by module name.

    Raises:
        InputError: the model lacks a layer, or a layer is too small for its rank.
    """
    layers = compressible_layers(model)
    for name, rank in ranks.items():
        dense = layers.get(name)
        if dense is None:
            raise InputError(f"the proxy names the layer {cut(name)}, which {type(model).__name__} does not have")
        m, n = weight_shape(dense)
        if rank > min(m, n):
            raise InputError(f"the proxy's config has the rank {rank:,} for {name}, which is {m} by {n}")
        replace_module(model, name, low_rank_like(dense, rank))


def mark_as_proxy(model: PreTrainedModel, config: IproxConfig) -> None:
    """Mark a model as a proxy, so that `save_pretrained` writes it as one."""
    if not config.ranks and quantization_method(model.config) == "bitsandbytes":
        model.config.iprox = config.to_dict()
        return
    model.config.quantization_config = config  # pyright: ignore[reportAttributeAccessIssue]
    model.hf_quantizer = IproxQuantizer(config, pre_quantized=True)  # pyright: ignore
    setattr(model, "is_quantized", True)  # noqa: B010  (not a parameter or module, whatever nn.Module types say)
    setattr(model, "quantization_method", "iprox")  # noqa: B010


def limit_depth(proxy: PreTrainedModel, depth: float) -> None:
    """Set in a proxy's description the fraction of the decoder layers whose gradients are compared.

    Raises:
        InputError: it is not a transformers model, or has no list of decoder layers.
    """
    description = proxy_config(proxy)
    if description is None:
        raise InputError(
            f"{type(proxy).__name__} is not a transformers model, so its proxy needs a size (sparsity=0.7)"
        )
    if depth < 1:
        decoder_layers(proxy)
    description.depth = depth
    mark_as_proxy(proxy, description)


def proxy_config(model: nn.Module) -> IproxConfig | None:
    """Return the description of a proxy, or None for another model."""
    config = getattr(model, "config", None)
    return proxy_description(config, type(model).__name__) if isinstance(config, PretrainedConfig) else None
