"""Check a model by its config: whether iprox can score it, its longest input, and whether its attention runs here."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.utils.import_utils import is_flash_attn_2_available, is_flash_attn_3_available

from iprox.errors import InputError, cut, shown
from iprox.models.flops import parameters
from iprox.models.quantized import QUANTIZATION_KEYS, check_quantization

# Encoders that also have a class for causal language modeling; they are causal only with `is_decoder`.
_ENCODERS = {*MODEL_FOR_MASKED_LM_MAPPING_NAMES, "bert-generation"}
# Models that are bidirectional whatever their config says (without permutation masks).
_BIDIRECTIONAL = {"xlnet"}
_OTHER_TASK = re.compile(
    r"For(SequenceClassification|TokenClassification|QuestionAnswering|MultipleChoice|NextSentencePrediction|PreTraining"
    r"|MaskedLM|MaskedDiffusion|ConditionalGeneration|Seq2SeqLM|TextEncoding)$|RewardModel$"
)
_ADVICE = "iprox scores causal language models (each token sees those before it only), such as Qwen3ForCausalLM"

# Keys of a config that are counts, and the largest plausible values.
_COUNTS = (
    *("hidden_size", "n_embd", "num_hidden_layers", "n_layer", "num_attention_heads", "n_head", "num_key_value_heads"),
    *("intermediate_size", "ffn_dim", "head_dim", "vocab_size", "max_position_embeddings"),
    *("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size"),
)
_LAYERS, _MOST_LAYERS = ("num_hidden_layers", "n_layer"), 10_000
_EXPERTS, _MOST_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts"), 100_000
_MOST = 2**40
# Other counts may be 0.
_NEVER_ZERO = {*_LAYERS, "hidden_size", "n_embd", "vocab_size"}

_FLASH = {"flash_attention_2": is_flash_attn_2_available, "flash_attention_3": is_flash_attn_3_available}


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """The longest input and the vocabulary size of a model, or of several models that read the same input.

    Attributes:
        positions: longest input in tokens; None if the config sets no limit.
        vocabulary: number of embeddings; None if the config has none.
    """

    positions: int | None = None
    vocabulary: int | None = None

    @classmethod
    def of(cls, *configs: PretrainedConfig) -> ModelLimits:
        """Return the smallest limits of some models, from their configs."""
        texts = [config.get_text_config() for config in configs]
        return cls(_least(texts, "max_position_embeddings"), _least(texts, "vocab_size"))


def _least(configs: list[PretrainedConfig], name: str) -> int | None:
    found = [getattr(config, name, None) for config in configs]
    return min((value for value in found if isinstance(value, int) and value > 0), default=None)


def check_config(config: PretrainedConfig, name: str) -> None:
    """Refuse a model that iprox cannot score, before its weights are read.

    Args:
        config: config of the model.
        name: name of the model, for messages.
    """
    _check_causal(config, name)
    check_quantization(config, name)


def _check_causal(config: PretrainedConfig, name: str) -> None:
    """Refuse encoders, encoder-decoders, and models of another task."""
    kind = str(config.model_type)
    listed = config.architectures
    architectures = [str(each) for each in listed] if isinstance(listed, list | tuple) else []
    called = cut(architectures[0] if architectures else kind or type(config).__name__)
    text = config.get_text_config()
    if getattr(config, "is_encoder_decoder", False) is True:
        raise InputError(f"{name}: {called} is an encoder-decoder, not a causal language model; {_ADVICE}")
    own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not own_code and not _registered(config):
        raise InputError(f"{name}: {called} (model_type {cut(kind)!r}) is not a causal language model; {_ADVICE}")
    decoder = getattr(config, "is_decoder", False) is True or getattr(config, "causal", False) is True
    if kind in _BIDIRECTIONAL or (kind in _ENCODERS and not decoder and not own_code):
        remedy = "" if kind in _BIDIRECTIONAL else ' (one that was trained as a decoder has "is_decoder": true)'
        raise InputError(
            f"{name}: {called} is a masked language model, in which each token sees those after it{remedy}; {_ADVICE}"
        )
    if any(getattr(each, "is_causal", None) is False for each in (config, text)) or any(
        getattr(each, "use_bidirectional_attention", None) in (True, "all") for each in (config, text)
    ):
        raise InputError(f"{name}: {called} is set to bidirectional attention in its config; {_ADVICE}")
    if architectures and not (kind in _ENCODERS and decoder):
        causal = [each for each in architectures if not _OTHER_TASK.search(each) or each in _causal_classes()]
        if not causal:
            raise InputError(f"{name}: {called} is a model of another task, with another head; {_ADVICE}")


def _causal_classes() -> set[str]:
    """Return the names of transformers' causal language model classes; not all end in `ForCausalLM`."""
    names: set[str] = set()
    for each in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        names.update([each] if isinstance(each, str) else each)
    return names


def _registered(config: PretrainedConfig) -> bool:
    """Return whether a model class was registered for the config with `AutoModelForCausalLM.register`."""
    from transformers import AutoModelForCausalLM

    return type(config) in AutoModelForCausalLM._model_mapping._extra_content


def check_sizes(config: Mapping[str, Any], name: str) -> None:
    """Refuse sizes of the wrong type or out of range, before lists of that length are made.

    A quantization must be a mapping, or transformers cannot read the config.

    Args:
        config: config as written, including the configs of its parts.
        name: name of the model, for messages.
    """
    for key, value in config.items():
        if key in QUANTIZATION_KEYS and not isinstance(value, dict | type(None)):
            raise InputError(f"{name}: {key} in its config is {shown(value)}; it must have keys and values")
        if isinstance(value, dict) and key.endswith("_config") and key not in QUANTIZATION_KEYS:
            check_sizes(value, name)
        if key not in _COUNTS or value is None or (isinstance(value, list) and value):  # some have one per layer
            continue
        most = _MOST_LAYERS if key in _LAYERS else _MOST_EXPERTS if key in _EXPERTS else _MOST
        least = 1 if key in _NEVER_ZERO else 0
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise InputError(
                f"{name}: {key} in its config is {shown(value)}; it must be an integer from {least} to {most:,}; "
                "correct config.json"
            )


def check_layers_by_weights(config: PretrainedConfig, tensors: int, name: str) -> None:
    """Refuse a config with more layers than its checkpoint has tensors, before the layers are made."""
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(layers, int) and layers > tensors:
        raise InputError(f"{name}: its config has {layers:,} layers, but its weights only {tensors:,} tensors")


def check_size_by_weights(model: torch.nn.Module, numbers: int, name: str) -> None:
    """Refuse a model far larger than its checkpoint, which would exhaust the memory before other checks.

    Args:
        model: model without weights, made from its config.
        numbers: number of elements in its checkpoint.
        name: name of the model, for messages.

    Raises:
        InputError: the model has more than four times as many parameters (tied embeddings may double them).
    """
    size = parameters(model)
    if size > 4 * numbers:
        raise InputError(
            f"{name}: its config describes {size:,} parameters, but its weights have {numbers:,}, so they do not "
            "belong together; copy the model's files again"
        )


def run_attention_here(config: PretrainedConfig, dtype: torch.dtype, device: torch.device, name: str) -> None:
    """Use the default attention, with a warning, if the config requests one that cannot run here.

    Kernels from the Hub are not used, as the user has not chosen their repository.

    Args:
        config: config of the model, changed in place.
        dtype: dtype that the model will run in.
        device: device that it will run on.
        name: name of the model, for messages.
    """
    asked = sorted(
        {
            str(each._attn_implementation)
            for each in (config, config.get_text_config())
            if each._attn_implementation is not None and not _runs(str(each._attn_implementation), dtype, device)
        }
    )
    if not asked:
        return
    config._attn_implementation = None
    text = config.get_text_config()
    if text is not config:
        text._attn_implementation = None
    warnings.warn(
        f"{name}: its config requests the attention {cut(asked[0], 60)}, which is not installed or does not run on "
        f"{device.type} in {str(dtype).removeprefix('torch.')}; sdpa is used instead",
        stacklevel=2,
    )


def _runs(attention: str, dtype: torch.dtype, device: torch.device) -> bool:
    if attention in _FLASH:
        return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and _FLASH[attention]()
    return attention in ("eager", "sdpa")


def follows_order(model: torch.nn.Module, vocabulary: int) -> bool:
    """Return whether a token's logits do not depend on later tokens, tested on random tokens.

    One successful try is enough: rounding changes logits by far less than a tenth of their spread, but may route a
    token to another expert.

    Args:
        model: model in eval mode; called with `input_ids` [2, 4].
        vocabulary: size of the vocabulary.
    """
    device = next(model.parameters()).device
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randint(vocabulary, (1, 4), generator=generator).repeat(2, 1)
        rows[1, 3] = (rows[1, 3] + 1 + int(torch.randint(max(1, vocabulary - 1), (), generator=generator))) % vocabulary
        with torch.no_grad():
            logits = model(input_ids=rows.to(device)).logits[:, :3].double()
        spread = float(logits.std())
        moved = float((logits[0] - logits[1]).abs().max())
        if not math.isfinite(moved) or moved <= 0.1 * spread:
            return True
    return False
