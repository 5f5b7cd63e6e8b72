"""Proxies as transformers checkpoints: a `quantization_config` names the rank of each low-rank layer.

transformers lets a quantisation method replace modules before weights are loaded; that is exactly what a
proxy needs, so after `import iprox` a proxy folder loads with `AutoModelForCausalLM.from_pretrained`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from iprox.errors import InputError
from iprox.models.experts import split_experts
from iprox.models.layers import (
    LowRankLinear,
    compressible_layers,
    dense_weight,
    layer_bias,
    replace_module,
    weight_shape,
)


class IproxConfig(QuantizationConfigMixin):
    """What a proxy is: the rank of every low-rank layer and how it was made.

    Args:
        ranks: rank by module name; layers not named are dense.
        method: how the factors were found (`ipsvd`, `svd`, ...).
        sparsity: share of the compressible parameters removed, as achieved.
        target: the model it was derived from.
        target_fingerprint: fingerprint of that model's weights, so that another target is refused.
    """

    def __init__(
        self,
        ranks: dict[str, int] | None = None,
        method: str = "ipsvd",
        sparsity: float = 0.0,
        target: str | None = None,
        target_fingerprint: str | None = None,
        **_: Any,
    ) -> None:
        self.quant_method = "iprox"  # pyright: ignore[reportAttributeAccessIssue]
        self.ranks = ranks or {}
        self.method = method
        self.sparsity = sparsity
        self.target = target
        self.target_fingerprint = target_fingerprint


class IproxQuantizer(HfQuantizer):
    """Puts `LowRankLinear` modules where the config names a rank, before the weights are read."""

    requires_calibration = True  # "load only what is already made": a proxy is made by iprox.compress
    quantization_config: IproxConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        split_experts(model)
        make_low_rank(model, self.quantization_config.ranks)
        return model

    def is_serializable(self) -> bool:
        """Proxies can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Factors are ordinary parameters."""
        return True


def make_low_rank(model: nn.Module, ranks: Mapping[str, int]) -> None:
    """Put empty low-rank layers of these ranks where the dense ones are, by module name.

    Raises:
        InputError: the model has no such layer.
    """
    layers = compressible_layers(model)
    for name, rank in ranks.items():
        dense = layers.get(name)
        if dense is None:
            raise InputError(f"the proxy names the layer {name}, which {type(model).__name__} does not have")
        weight = dense_weight(dense)
        m, n = weight_shape(dense)
        biased = layer_bias(dense) is not None
        layer = LowRankLinear(n, m, rank, biased, device=weight.device, dtype=weight.dtype)
        replace_module(model, name, layer)


def mark_as_proxy(model: PreTrainedModel, config: IproxConfig) -> None:
    """Tell transformers that `model` is a proxy, so that `save_pretrained` writes it as one."""
    model.config.quantization_config = config  # pyright: ignore[reportAttributeAccessIssue]
    model.hf_quantizer = IproxQuantizer(config, pre_quantized=True)  # pyright: ignore
    setattr(model, "is_quantized", True)  # noqa: B010  (not a parameter or module, whatever nn.Module types say)
    setattr(model, "quantization_method", "iprox")  # noqa: B010


def proxy_config(model: nn.Module) -> IproxConfig | None:
    """The proxy description of a model, or None for a model that is no proxy."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    return config if isinstance(config, IproxConfig) else None
