"""Make, align and load proxies in memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from iprox.api.arguments import check_model, check_tasks, chosen, takes
from iprox.api.batches import Batches, of_batches
from iprox.api.examples import Examples, Reader
from iprox.audits.held_out import HeldOutFidelity
from iprox.data import example_batches, on_device
from iprox.errors import InputError
from iprox.influence.job import Checkpoint, Job
from iprox.models import checkpoint as _checkpoint  # noqa: F401  registers proxies with transformers
from iprox.models.checkpoint import limit_depth
from iprox.models.experts import experts_split
from iprox.models.layers import compressible_layers
from iprox.models.loading import check_belongs, load_model
from iprox.models.loss import LossFn, causal_lm_losses
from iprox.models.preference import DpoLoss
from iprox.progress import Reporter
from iprox.proxy.align import align as align_factors
from iprox.proxy.align_state import AlignmentHistory
from iprox.proxy.compress import adopt, derive_proxy, extract_layers, keep_weights
from iprox.proxy.factorizations import PROBED
from iprox.proxy.factorize import FactorSettings
from iprox.proxy.size import Size
from iprox.settings import AlignSection, InfluenceSection, ProxySection

_OF_PROXY = ("method", "depth", "sparsity", "flops", "ranks")
_OF_ALIGNMENT = ("epochs", "learning_rate", "batch_size")
_OF_ALIGNMENT += ("gradient_weight", "kl_weight", "hidden_weight")


@takes(ProxySection, *_OF_PROXY)
def compress(
    model: PreTrainedModel,
    probe_examples: Examples = (),
    *,
    other: PreTrainedModel | None = None,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int = 2048,
    batch_tokens: int | Literal["auto"] = "auto",
    loss_fn: LossFn = causal_lm_losses,
    progress: bool = True,
    **settings: Any,
) -> PreTrainedModel:
    """Derive a proxy from a model (stage 1). The model is not changed.

    Args:
        model: the target.
        probe_examples: examples to measure second moments on; the methods `svd`, `random` and `layers` need none.
        other: an off-the-shelf model to use as the proxy; no other setting applies to it.
        seed: seed for sampled labels and random factors.
        tokenizer: tokenizer; the model's own if None.
        max_length: longest example in tokens.
        batch_tokens: largest rows × longest row of a batch; `auto` as in a recipe.
        loss_fn: (model, batch) -> losses [B], for models other than language models; `probe_examples` is then a torch
            data set or a DataLoader.
        progress: whether to show progress on standard error.
        **settings: settings of `proxy` in a recipe.

    Returns:
        The proxy; `proxy.save_pretrained(path)` saves it.

    Raises:
        InputError: bad input; the message says what is wrong and how to fix it.
    """
    check_model("model", model)
    if other is not None:
        if settings:
            raise InputError(f"compress: {next(iter(settings))}= has no effect with other=; leave it out")
        check_model("other", other)
        with experts_split(model, other):
            return adopt(model, other)[0]
    how = chosen(ProxySection, compress, settings, _OF_PROXY)
    if how.method == "off-the-shelf":
        raise InputError("compress: method='off-the-shelf' takes other=, the model to use as the proxy")
    with experts_split(model):
        if how.method == "target":
            proxy, _ = keep_weights(model)
        elif how.method == "layers":
            proxy, _ = extract_layers(model, Size(how.sparsity, how.flops))
        else:
            assert how.method is not None
            factors = FactorSettings(how.method, how.ranks, seed=seed)
            reader = Reader(model, tokenizer, max_length, batch_tokens, loss_fn)
            batches = reader.batches(probe_examples, "probe_examples") if how.method in PROBED else []
            with Reporter(quiet=not progress).bar("compress", len(compressible_layers(model)), "layers") as advance:
                proxy, _ = derive_proxy(
                    model, batches, Size(how.sparsity, how.flops), factors, loss_fn=loss_fn, progress=advance
                )
        if how.given_depth < 1:
            limit_depth(proxy, how.given_depth)
    return proxy


@takes(AlignSection, *_OF_ALIGNMENT)
def align(
    proxy: PreTrainedModel,
    model: PreTrainedModel,
    data: Examples,
    *,
    held_out: Examples | None = None,
    validation: Mapping[str, Examples] | None = None,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int = 2048,
    loss_fn: LossFn = causal_lm_losses,
    progress: bool = True,
    **settings: Any,
) -> AlignmentHistory:
    """Tune a proxy in place until its logits, and its gradients if asked, match the target's (stage 2).

    Args:
        proxy: proxy from `compress`.
        model: its target.
        data: examples to align on.
        held_out: other examples; the factors that are most faithful on them (by cosine TracIn scores) are kept. Needs
            `validation`.
        validation: validation examples by task.
        seed: seed for the order.
        tokenizer: tokenizer; the model's own if None.
        max_length: longest example in tokens.
        loss_fn: (model, batch) -> losses [B], for models other than language models; `data` is then a torch data set or
            a DataLoader, and the relative squared distance of the model's outputs takes the place of the logits' KL.
        progress: whether to show progress on standard error.
        **settings: settings of `proxy.align` in a recipe.

    Returns:
        The losses by step, and the fidelity if it was measured.

    Raises:
        InputError: bad input; the message says what is wrong and how to fix it.
    """
    if (held_out is None) != (validation is None):
        raise InputError("held_out= and validation= go together: fidelity is measured by the scores for a task")
    check_model("proxy", proxy)
    check_model("model", model)
    how = chosen(AlignSection, align, settings, _OF_ALIGNMENT)
    if validation is not None:
        check_tasks(validation)
    reader = Reader(model, tokenizer, max_length, loss_fn=loss_fn)
    if of_batches(data, loss_fn):
        if held_out is not None or (loss_fn is not causal_lm_losses and how.hidden_weight):
            raise InputError("align: held_out= and hidden_weight= need the examples of a language model")
        data = data if isinstance(data, DataLoader) else DataLoader(data, how.batch_size)
        batches = list(Batches(data, "data", reader.device))
    else:
        batches = list(on_device(example_batches(reader.encode(data, "data"), how.batch_size), reader.device))
    with experts_split(model):
        if isinstance(loss_fn, DpoLoss):
            loss_fn = causal_lm_losses  # the logits of both answers are matched
        if isinstance(proxy, PreTrainedModel):
            check_belongs(proxy, "proxy", model, "model")
        watched = None
        if held_out is not None and validation is not None:
            tasks = {task: reader.encode(examples, task) for task, examples in validation.items()}
            scoring = InfluenceSection(estimator="tracin", per_example=False)
            job = Job(
                settings=scoring,
                checkpoints=[Checkpoint(model)],
                validation=tasks,
                encoder=reader.encoder,
                batch_tokens=reader.batch_tokens,
            )
            watched = HeldOutFidelity(job, reader.encode(held_out, "held_out")).watch(proxy)
        with Reporter(quiet=not progress).bar("align", how.epochs * len(batches), "steps") as advance:
            return align_factors(
                proxy, model, batches, how, loss_fn=loss_fn, seed=seed, held_out=watched, progress=advance
            )


def load(path: str | Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> PreTrainedModel:
    """Load a proxy or model folder.

    Raises:
        InputError: it is not a folder of a model.
    """
    return load_model(path, dtype=dtype, device=device)
