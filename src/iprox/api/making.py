"""Proxies in memory: made, aligned, loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from iprox.api.arguments import check_choices, check_model, check_tasks
from iprox.api.examples import Examples, Reader
from iprox.api.scoring import influence_settings
from iprox.audits.held_out import HeldOutFidelity
from iprox.data import example_batches, on_device
from iprox.errors import InputError
from iprox.influence.job import Checkpoint, Job
from iprox.models import checkpoint as _checkpoint  # noqa: F401  registers proxies with transformers
from iprox.models.experts import experts_split
from iprox.models.layers import compressible_layers
from iprox.models.loading import check_belongs, load_model
from iprox.models.loss import LossFn, causal_lm_losses
from iprox.progress import Reporter
from iprox.proxy.align import AlignmentHistory, AlignSettings
from iprox.proxy.align import align as align_factors
from iprox.proxy.align_loss import Objective
from iprox.proxy.compress import Method, adopt, derive_proxy, extract_layers
from iprox.proxy.factorize import FactorSettings, RankRule
from iprox.proxy.methods import PROBED, Ridge
from iprox.proxy.moments import Labels, MomentSettings, Tokens
from iprox.proxy.size import Size


def compress(
    model: PreTrainedModel,
    probe: Examples = (),
    *,
    sparsity: float | None = None,
    parameters: int | None = None,
    flops: float | None = None,
    method: Method = "ipsvd",
    ranks: RankRule = "global",
    ridge: Ridge = "auto",
    other: PreTrainedModel | None = None,
    labels: Labels = "data",
    tokens: Tokens = "all",
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int = 2048,
    batch_tokens: int = 4096,
    loss_fn: LossFn = causal_lm_losses,
    progress: bool = True,
) -> PreTrainedModel:
    """Derive a proxy from a model (stage 1). The model is left as it was.

    Give exactly one of `sparsity`, `parameters` and `flops` (none with `off-the-shelf`).

    Args:
        model: the target.
        probe: examples that second moments are measured on; `svd`, `random`, `layers` and `off-the-shelf` need none.
        sparsity: share of the linear parameters to remove, in (0, 1).
        parameters: of the whole proxy, embeddings and head included.
        flops: of a token's forward pass, as a share of the target's, in (0, 1).
        method: `ipsvd`, or a baseline: `svd`, `svd-llm`, `asvd`, `fwsvd`, `random`, `layers` (the first few decoder
            layers), `off-the-shelf` (`other` as it is).
        ranks: `global` or `uniform`.
        ridge: share of the mean eigenvalue added to the moments, or `auto` (Ledoit and Wolf).
        other: the proxy itself, for `off-the-shelf`.
        labels: `data`, or `sampled` from the model (true Fisher).
        tokens: probe tokens that count, `all` or `supervised`.
        seed: of sampled labels and random factors.
        tokenizer: the model's own if None.
        max_length: longest example in tokens.
        batch_tokens: largest rows × longest row of a batch.
        loss_fn: (model, batch) -> losses [B], for models that are no language models; `probe` is then a DataLoader.
        progress: show it, with rate and time left, on standard error.

    Returns:
        The proxy; `proxy.save_pretrained(path)` saves it.

    Raises:
        InputError: bad input; the message says which and how to mend it.
    """
    check_model("model", model)
    check_choices(
        method=(method, [name for kind in get_args(Method) for name in get_args(kind)]),
        ranks=(ranks, get_args(RankRule)),
        labels=(labels, get_args(Labels)),
        tokens=(tokens, get_args(Tokens)),
    )
    if ridge != "auto" and not (isinstance(ridge, int | float) and 0 <= ridge < math.inf):
        raise InputError(f"ridge must be 'auto' or a share from 0 up, not {ridge!r}")
    if (method == "off-the-shelf") != (other is not None):
        raise InputError("method='off-the-shelf' takes other=, the model to use as the proxy; no other method does")
    if other is not None:
        with experts_split(model, other):
            return adopt(model, other)[0]
    size = Size(sparsity, parameters, flops)
    if method == "layers":
        with experts_split(model):
            return extract_layers(model, size)[0]
    settings = FactorSettings(method, ranks, ridge, MomentSettings(labels, tokens, seed=seed), seed=seed)  # pyright: ignore
    batches = Reader(model, tokenizer, max_length, batch_tokens).batches(probe, "probe") if method in PROBED else []
    with experts_split(model):
        layers = len(compressible_layers(model))
        with Reporter(quiet=not progress).bar("compress", layers, "layers") as advance:
            return derive_proxy(model, batches, size, settings, loss_fn=loss_fn, progress=advance)[0]


def align(
    proxy: PreTrainedModel,
    model: PreTrainedModel,
    data: Examples,
    *,
    epochs: int = 5,
    learning_rate: float = 1e-4,
    gradient_weight: float = 1.0,
    kl_weight: float = 0.1,
    hidden_weight: float = 0.0,
    accumulate: int = 1,
    held_out: Examples | None = None,
    validation: Mapping[str, Examples] | None = None,
    normalize: Literal["none", "cosine"] = "none",
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int = 2048,
    batch_size: int = 8,
    progress: bool = True,
) -> AlignmentHistory:
    """Tune a proxy in place until its gradients, or its logits only, match the target's (stage 2).

    Args:
        proxy: from `compress`.
        model: its target.
        data: examples to align on.
        epochs: passes over them.
        learning_rate: peak.
        gradient_weight: weight of the gradients' distance; 0 matches the logits only, at a third of the cost.
        kl_weight: weight of the KL of the logits.
        hidden_weight: weight of the distance of hidden states.
        accumulate: batches an optimizer step; with a `batch_size` of 1 every example is matched by itself.
        held_out: examples that are not aligned on: the factors most faithful on them are kept, for which
            `validation` is needed.
        validation: validation examples by task.
        normalize: of the scores whose fidelity is measured.
        seed: of the order.
        tokenizer: the model's own if None.
        max_length: longest example in tokens.
        batch_size: examples a batch.
        progress: show it, with rate and time left, on standard error.

    Returns:
        Losses by step, and the fidelity where it was measured.

    Raises:
        InputError: bad input; the message says which and how to mend it.
    """
    if (held_out is None) != (validation is None):
        raise InputError("held_out= goes with validation=: fidelity is of scores for some task")
    check_model("proxy", proxy)
    check_model("model", model)
    scoring = influence_settings(estimator="tracin", normalize=normalize, per_example=False)
    if validation is not None:
        check_tasks(validation)
    objective = Objective(gradient_weight, kl_weight, hidden_weight)
    reader = Reader(model, tokenizer, max_length, batch_tokens=0)
    if isinstance(data, DataLoader):
        batches = list(data)
    else:
        batches = list(on_device(example_batches(reader.encode(data, "data"), batch_size, 0), reader.device))
    with experts_split(model):
        check_belongs(proxy, "proxy", model, "model")
        watched = None
        if held_out is not None and validation is not None:
            tasks = {task: reader.encode(examples, task) for task, examples in validation.items()}
            job = Job(settings=scoring, checkpoints=[Checkpoint(model)], validation=tasks, encoder=reader.encoder)
            watched = HeldOutFidelity(job, reader.encode(held_out, "held_out")).watch(proxy)
        steps = epochs * math.ceil(len(batches) / accumulate)
        chosen = AlignSettings(steps, learning_rate, accumulate, seed)
        with Reporter(quiet=not progress).bar("align", steps, "steps") as advance:
            return align_factors(proxy, model, batches, chosen, objective, held_out=watched, progress=advance)


def load(path: str | Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> PreTrainedModel:
    """Load a proxy or model folder.

    Raises:
        InputError: it holds none.
    """
    return load_model(path, dtype=dtype, device=device)
