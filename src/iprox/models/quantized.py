"""Quantized weights: what a config says of them, and linear layers of bitsandbytes, with weights of 4 or 8 bits.

These layers run as they are. Only the inputs and output gradients of a layer make up influence, so weights are read for
compression alone, and are dequantized one layer at a time.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from iprox.errors import InputError, cut

QUANTIZATION_KEYS = ("quantization_config", "compression_config")
# Modules that each quantization method needs, and the arguments of pip to install them.
_PACKAGES: dict[str, tuple[tuple[str, ...], str]] = {
    "bitsandbytes": (("bitsandbytes", "accelerate"), "bitsandbytes accelerate"),
    "gptq": (("optimum", "gptqmodel"), "optimum gptqmodel"),
    "awq": (("gptqmodel",), "gptqmodel"),
    "auto-round": (("auto_round",), "auto-round"),
    "aqlm": (("aqlm",), "'aqlm[gpu,cpu]'"),
    "quanto": (("optimum.quanto",), "optimum-quanto"),
    "quark": (("quark",), "amd-quark"),
    "fouroversix": (("fouroversix",), "fouroversix"),
    "fp_quant": (("fp_quant",), "fp_quant"),
    "eetq": (("kernels",), "kernels"),
    "higgs": (("flute",), "flute-kernel fast_hadamard_transform"),
    "hqq": (("hqq",), "hqq"),
    "vptq": (("vptq",), "vptq"),
    "spqr": (("spqr_quant",), "'spqr_quant[gpu]'"),
    "torchao": (("torchao",), "torchao"),
    "fbgemm_fp8": (("fbgemm_gpu",), "fbgemm-gpu"),
    "compressed-tensors": (("compressed_tensors",), "compressed-tensors"),
    "sinq": (("sinq",), "sinq"),
    "mxfp4": (("kernels",), "kernels"),
    "metal": (("kernels",), "kernels"),
    "nvfp4": ((), ""),
    "fp8": ((), ""),
    "mxfp8": ((), ""),
    "bitnet": ((), ""),
    "gguf": (("gguf",), "gguf"),
}
# Methods that iprox reads, and those whose weights transformers can dequantize on loading; weights that stay quantized
# after that are refused when layers are read.
_READ = {"bitsandbytes", "compressed-tensors", "fp8", "mxfp8", "mxfp4"}


def quantization_of(config: PretrainedConfig) -> dict[str, Any] | None:
    """Return the quantization in a config; None if there is none."""
    for key in QUANTIZATION_KEYS:
        found = getattr(config, key, None)
        if found is not None:
            return found if isinstance(found, dict) else found.to_dict()
    return None


def quantization_method(config: PretrainedConfig) -> str | None:
    """Return the name of the method that quantized a model's weights, from its config; None if they are not."""
    found = quantization_of(config)
    if not found:
        return None
    method = found.get("quant_method")
    if method is None and (found.get("load_in_4bit") or found.get("load_in_8bit")):
        method = "bitsandbytes"
    if method is None and getattr(config, "compression_config", None) is not None:
        method = "compressed-tensors"
    return str(getattr(method, "value", method))


def bytes_per_weight(config: PretrainedConfig, width: int) -> float:
    """Return the bytes of a weight of a linear layer, of `width` bytes where it is not quantized.

    Weights of 4 bits have 0.06 bytes more, for a scale in float32 per 64 of them.
    """
    if quantization_method(config) != "bitsandbytes":
        return width
    return 0.56 if (quantization_of(config) or {}).get("load_in_4bit") else 1.0


def check_quantization(config: PretrainedConfig, name: str) -> None:
    """Refuse quantized weights, but those of bitsandbytes and those that transformers dequantizes."""
    method = quantization_method(config)
    if method in (None, "iprox"):
        return
    modules, packages = _PACKAGES.get(method, ((), ""))
    absent = [module for module in modules if not _installed(module)]
    if method in _READ:
        if absent:
            raise InputError(
                f"{name}: its weights are quantized ({method}); they need {absent[0]}: pip install {packages}, or "
                "give the model that it was made from"
            )
        return
    how = f"first: pip install {packages}, then " if absent else ""
    raise InputError(
        f"{name}: its weights are quantized ({cut(method, 40)}); iprox reads weights of 16 or 32 bits, and those that "
        f"bitsandbytes quantized; give the model that it was made from, or convert this one ({how}"
        "AutoModelForCausalLM.from_pretrained(...).dequantize() and save_pretrained)"
    )


def check_trainable(config: PretrainedConfig, name: str) -> None:
    """Refuse to train a model whose weights bitsandbytes quantized: iprox scores on it, and makes proxies of it."""
    if quantization_method(config) == "bitsandbytes":
        raise InputError(
            f"{name}: its weights are quantized, so it is not trained here; set warmup and finetune to false, or give "
            "the model that it was made from"
        )


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def is_quantized(layer: nn.Module) -> bool:
    """Return whether a layer is one of bitsandbytes."""
    return isinstance(layer, nn.Linear) and type(layer).__module__.startswith("bitsandbytes.")


def quantized_layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers of bitsandbytes in a model."""
    return [module for module in model.modules() if is_quantized(module)]


def check_scales(model: nn.Module, name: str) -> None:
    """Refuse weights without scales, and weights of 4 bits whose scales or codes are not theirs.

    bitsandbytes would read past scales that are too few.
    """
    for layer_name, layer in model.named_modules():
        if not is_quantized(layer):
            continue
        state = getattr(layer.weight, "quant_state", None)
        if state is None and getattr(layer.weight, "SCB", None) is None:
            raise InputError(
                f"{name}: {layer_name}.weight has no scales, so bitsandbytes did not quantize it, as its config says; "
                "remove quantization_config from config.json"
            )
        if state is not None and not _fits(state, state.shape.numel(), codes=16):
            raise InputError(f"{name}: the scales of {layer_name}.weight do not belong to it; quantize the model again")


def _fits(state: Any, numbers: int, codes: int) -> bool:
    """Return whether a state of bitsandbytes has a scale per block of so many numbers, and so many codes."""
    scales, code = state.absmax, state.code
    if scales.numel() != -(-numbers // state.blocksize) or code.numel() != codes or not code.isfinite().all():
        return False
    if state.nested:
        return _fits(state.state2, scales.numel(), codes=256)
    return scales.is_floating_point() and bool(scales.isfinite().all())


def dequantized(layer: nn.Module) -> Tensor:
    """Return the weight [m, n] of a layer of bitsandbytes, in float32."""
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    return dequantize_bnb_weight(weight, state=getattr(layer, "state", None)).float()


@torch.no_grad()
def plain(layer: nn.Module, dtype: torch.dtype) -> nn.Linear:
    """Return an ordinary linear layer with the dequantized weight and the bias of a layer of bitsandbytes."""
    weight, bias = dequantized(layer), layer.bias
    made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device=weight.device, dtype=dtype)
    made.weight.copy_(weight)
    if isinstance(bias, Tensor):
        made.bias.copy_(bias)
    return made


def parameters_of(parameter: nn.Parameter) -> int:
    """Return the number of weights in a parameter; bitsandbytes packs two of 4 bits in a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast what is not quantized to a dtype, in place, and let quantized layers multiply in it."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    multiply_in_own_dtype(model)
    # transformers 5 cannot save a model with these, which have no reverse; the layers write what they read themselves.
    conversions: Any = getattr(model, "_weight_conversions", None) or []
    own = [
        each
        for each in conversions
        if not any("bitsandbytes" in type(operation).__module__ for operation in getattr(each, "operations", ()))
    ]
    model.__dict__["_weight_conversions"] = own


def multiply_in_own_dtype(model: nn.Module) -> None:
    """Let quantized layers multiply in the dtype of the embeddings, in place, forward and backward.

    Inputs of weights of 8 bits are rounded to 8 bits, whatever the dtype.
    """
    if not (layers := quantized_layers(model)):
        return
    dtype = next(each.dtype for each in model.parameters() if each.is_floating_point())
    for layer in cast("list[Any]", layers):
        layer.compute_dtype = dtype
        layer.compute_type_is_set = True  # or the first batch sets another
        layer.support_avx512bf16_for_cpu = False  # it would pack the weights in place, and compute in bfloat16
        if hasattr(layer.weight, "quant_state"):
            layer.weight.quant_state.dtype = dtype  # or the backward pass rounds weights to that of their model before
    logging.getLogger("bitsandbytes.autograd").setLevel(logging.ERROR)  # at each product: it rounds inputs


def products_in(layer: nn.Module) -> torch.dtype:
    """Return the dtype that a quantized layer multiplies in."""
    dtype = layer.compute_dtype
    assert isinstance(dtype, torch.dtype)
    return dtype
