"""Tiny models in float64 and random batches: what the oracle tests compare on."""

from collections.abc import Mapping, Sequence

import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    Gemma3TextConfig,
    Glm4MoeLiteConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    OlmoConfig,
    OPTConfig,
    Phi3Config,
    PhimoeConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
    set_seed,
)

from iprox.data import Batch
from iprox.models.loss import causal_lm_losses
from iprox.models.precision import cast_parameters

# gpt-neox is the one whose norms stay in float64 (RMSNorm goes through float32), so finite differences are exact.
CONFIGS = {
    "gpt-neox": GPTNeoXConfig,
    "gpt2": GPT2Config,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "qwen3-moe": Qwen3MoeConfig,
    "qwen2-moe": Qwen2MoeConfig,
    "phimoe": PhimoeConfig,
    "opt": OPTConfig,
    "olmo": OlmoConfig,
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "gemma3": Gemma3TextConfig,
    "phi3": Phi3Config,
    "olmo2": Olmo2Config,
    "smollm3": SmolLM3Config,
    "deepseek-v2": DeepseekV2Config,
    "deepseek-v3": DeepseekV3Config,
    "glm4-moe-lite": Glm4MoeLiteConfig,
}
# Attention from a latent vector, which a layer is given as of one head: [B, 1, L, r].
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Names of their own, and special tokens within the tiny vocabulary.
OWN = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "n_positions": 64},
    "phi3": {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "smollm3": {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    # Clamps its projections in place.
    "olmo": {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "clip_qkv": 1.0},
    # Flattens what its MLP is given to [B·L, n].
    "opt": {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "ffn_dim": 48, "word_embed_proj_dim": 32},
    # Its shared expert is given [B·L, n].
    "qwen2-moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
    },
    # Its router is a kind of linear layer.
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek-v2": LATENT,
    # The width of a head is that of its rotated part: the one of SHAPE would take its place.
    "deepseek-v3": {**LATENT, "head_dim": LATENT["qk_rope_head_dim"]},
    "glm4-moe-lite": {**LATENT, "mlp_layer_types": ["dense", "sparse"]},
    "qwen3-moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1},
}
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "head_dim": 8,
}


def make_model(family: str = "qwen3", dtype: torch.dtype = torch.float64, seed: int = 0, **changes) -> PreTrainedModel:
    """A random causal language model; weights large enough that nothing is near linear."""
    set_seed(seed)
    config = CONFIGS[family](**{**SHAPE, **OWN.get(family, {}), "tie_word_embeddings": True, **changes})
    model = AutoModelForCausalLM.from_config(config).eval()
    model.set_experts_implementation("eager")  # the others have no float64 kernel
    cast_parameters(model, dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.2)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model


def make_batch(lengths: Sequence[int], seed: int = 0, vocabulary: int = 64, padding: int = 0) -> Batch:
    """Random tokens; a random half of the positions from the second on is supervised, at least the last."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths) + padding
    input_ids = torch.zeros(len(lengths), width, dtype=torch.int64)
    labels = torch.full_like(input_ids, -100)
    for row, length in enumerate(lengths):
        tokens = torch.randint(1, vocabulary, (length,), generator=generator)
        supervised = torch.rand(length, generator=generator) < 0.5
        supervised[-1] = True
        supervised[0] = False
        input_ids[row, :length] = tokens
        labels[row, :length] = torch.where(supervised, tokens, -100)
    return Batch(input_ids, labels, torch.tensor(lengths), list(range(len(lengths))))


def autograd_gradient(model: PreTrainedModel, batch: Batch, layers: Mapping[str, torch.nn.Module]) -> torch.Tensor:
    """The batch's gradient of every weight and bias of some layers, flat, by autograd; 0 where none was reached."""
    parameters = [p for layer in layers.values() for p in (layer.weight, layer.bias) if p is not None]
    for parameter in parameters:
        parameter.requires_grad_(True)
    gradients = torch.autograd.grad(causal_lm_losses(model, batch).sum(), parameters, allow_unused=True)
    filled = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, parameters, strict=True)]
    return torch.cat([gradient.flatten() for gradient in filled])


def rows_of(batch: Batch) -> list[Batch]:
    """Each example as a batch of its own, without padding."""
    return [
        Batch(batch.input_ids[i : i + 1, :n], batch.labels[i : i + 1, :n], batch.lengths[i : i + 1], [i])
        for i, n in enumerate(batch.lengths.tolist())
    ]
