"""Stage 2: train the factors of a proxy to match its target (`iprox.proxy.align_loss` defines the loss)."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn

from iprox.data.batching import Batch
from iprox.distributed import average, from_first, processes, rank
from iprox.errors import InputError
from iprox.models.cpu.shapes import RELEASE_EVERY, release_memory
from iprox.models.layers import LowRankLinear, low_rank_layers
from iprox.models.loss import LossFn, causal_lm_losses
from iprox.models.precision import cast_parameters
from iprox.progress import Advance
from iprox.proxy.align_loss import Losses, Signals, alignment_loss, target_signals
from iprox.proxy.align_signals import SignalStore
from iprox.proxy.align_state import AlignmentHistory, AlignmentState, AlignmentStep
from iprox.settings import AlignSection

# Number of times that held-out fidelity is measured, evenly over the steps, after a first time.
EVALUATIONS = 4
# Most seconds between two times that the state is saved.
KEEP_EVERY = 60.0
# Alignment stops after this many evaluations without a new best fidelity.
PATIENCE = 2


def align(
    proxy: nn.Module,
    target: nn.Module,
    batches: Sequence[Any],
    settings: AlignSection,
    *,
    loss_fn: LossFn = causal_lm_losses,
    seed: int = 0,
    held_out: Callable[[], float] | None = None,
    store: SignalStore | None = None,
    state: Path | None = None,
    identity: str = "",
    progress: Advance | None = None,
) -> AlignmentHistory:
    """Align a proxy with its target, in place.

    Uses AdamW without weight decay on float32 master copies of the factors, a tenth of the steps as warm-up, cosine
    decay, and gradient norms clipped to 1. Adam's steps do not depend on a factor's scale, so the learning rate of each
    factor is `learning_rate` times its root mean square over the mean of all root mean squares: relative to their
    scale, all factors change by the same amount. A bfloat16 proxy runs in bfloat16.

    With `held_out` the best factors are kept, including those before alignment, so this fidelity never decreases.

    Several processes (`iprox.distributed`) share the rows of every batch and take the steps that one would take.

    Cost per token: target 6P (once per batch with a `store`), proxy about 16P′ FLOPs (forward, backward, and the
    backward of both); without the gradient part 2P and 6P′.

    Args:
        proxy: model to tune; its dtype is restored at the end.
        target: model to match; unchanged. It may be on another device, or quantized.
        batches: alignment batches.
        settings: how to align; `batches` have been made by its `batch_size`.
        loss_fn: per-example losses, for a model that is not a language model.
        seed: seed for the order of the batches, which is new in every epoch.
        held_out: function that returns the proxy's fidelity on examples outside `batches`.
        store: cache of the target's signals, so that the target runs once per batch; None runs it every time.
        state: file to resume an interrupted alignment from.
        identity: identity of the alignment; the file of another one is refused.
        progress: function called with the number of steps done.

    Raises:
        InputError: the proxy has no low-rank layer, or there is nothing to align on.
        FloatingPointError: the loss is not finite (the message names the step and the batch).
    """
    started = time.perf_counter()
    layers = low_rank_layers(proxy)
    if not layers:
        raise InputError(
            "the proxy has no low-rank layer, so there is nothing to align; was it made by iprox compress?"
        )
    if not batches:
        raise InputError("no supervised example to align on")
    here, there = (next(model.parameters()).device for model in (proxy, target))
    if processes() > 1 and (settings.gradient_weight or settings.hidden_weight or loss_fn is not causal_lm_losses):
        raise InputError(
            "align.gradient_weight, align.hidden_weight and a loss_fn need one process; several match logits only"
        )
    if held_out is not None and processes() > 1:
        measured = held_out
        held_out = lambda: from_first(measured() if rank() == 0 else 0.0)  # noqa: E731

    def signals_of(index: int, own: Any) -> Signals:
        def make() -> Signals:
            return target_signals(target, layers, send_to_device(own, there), settings, loss_fn)

        return (make() if store is None else store(index, make)).to(here)

    steps = settings.epochs * len(batches)
    every = max(1, math.ceil(steps / EVALUATIONS))
    with _trainable(proxy, layers) as (factors, autocast):
        run = AlignmentState(factors, _optimizer(factors, settings.learning_rate), held_out)
        if state is None or not run.load(state, identity):
            run.evaluate(0)
        saved = time.monotonic()
        done = len(run.history.steps)
        if progress is not None and done:
            progress(done, earlier=True)
        for step, index in enumerate(_order(len(batches), steps, seed), start=1):
            if step <= done:
                continue
            if run.evaluations_since_best() >= PATIENCE:
                run.history.stopped_early = True
                break
            if step % RELEASE_EVERY == 0:
                release_memory()
            rate = settings.learning_rate * schedule(step, steps)
            batch = share_of(batches[index], rank(), processes())
            signals, batch = signals_of(index, batch), send_to_device(batch, here)
            try:
                with torch.autocast(here.type, torch.bfloat16, enabled=autocast):
                    losses = alignment_loss(proxy, layers, batch, signals, settings, loss_fn)
                parts = _step(losses, run.optimizer, rate)
            except FloatingPointError as error:
                raise FloatingPointError(f"{error} at step {step} (batch {index})") from None
            run.history.steps.append(AlignmentStep(step, *parts, rate))
            whole = batches[index]
            run.history.tokens += int(whole.lengths.sum()) if isinstance(whole, Batch) else 0
            if progress is not None:
                progress(1)
            evaluated = step % every == 0 or step == steps
            if evaluated:
                run.evaluate(step)
            late = time.monotonic() - saved >= KEEP_EVERY
            if state is not None and step < steps and (evaluated or late) and rank() == 0:
                run.history.seconds += time.perf_counter() - started
                started, saved = time.perf_counter(), time.monotonic()
                run.save(state, identity)
        run.finish()
    run.history.seconds += time.perf_counter() - started
    return run.history


def _order(count: int, steps: int, seed: int) -> Iterator[int]:
    """Yield the number of the batch of each optimizer step; every pass has a new random order."""
    generator = torch.Generator().manual_seed(seed)
    rounds = (torch.randperm(count, generator=generator).tolist() for _ in itertools.count())
    yield from itertools.islice(itertools.chain.from_iterable(rounds), steps)


def _step(
    losses: Losses, optimizer: torch.optim.Optimizer, rate: float
) -> tuple[float, float | None, float, float | None]:
    """Take one optimizer step; return the losses: total, gradient, KL, hidden."""
    optimizer.zero_grad(set_to_none=True)
    whole, kl = losses.whole.detach().clone(), losses.kl.detach().clone()
    average((whole, kl))
    if not torch.isfinite(whole):
        raise FloatingPointError(f"the alignment loss is {whole.item()}")
    losses.whole.backward()
    if processes() > 1:
        average(_filled(factor) for group in optimizer.param_groups for factor in group["params"])
    torch.nn.utils.clip_grad_norm_([factor for group in optimizer.param_groups for factor in group["params"]], 1.0)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]
    optimizer.step()
    gradient, hidden = (None if part is None else part.item() for part in (losses.gradient, losses.hidden))
    return whole.item(), gradient, kl.item(), hidden


def _filled(factor: nn.Parameter) -> torch.Tensor:
    """Return a factor's gradient, which is 0 where none of this process's tokens used it."""
    if factor.grad is None:
        factor.grad = torch.zeros_like(factor)
    return factor.grad


def share_of(batch: Batch, rank: int, processes: int) -> Batch:
    """Return the examples of a batch that one of several processes takes; if none, one without a supervised token."""
    if processes == 1:
        return batch
    mine = list(range(rank, len(batch.indices), processes)) or [0]
    rows = [index * batch.rows_each + row for index in mine for row in range(batch.rows_each)]
    labels = batch.labels[rows]
    return replace(
        batch,
        input_ids=batch.input_ids[rows],
        labels=labels if rank < len(batch.indices) else torch.full_like(labels, -100),
        lengths=batch.lengths[rows],
        indices=[batch.indices[index] for index in mine],
    )


@contextmanager
def _trainable(proxy: nn.Module, layers: Mapping[str, LowRankLinear]) -> Iterator[tuple[dict[str, nn.Parameter], bool]]:
    """Make only the factors trainable, in float32 or better; yield them by name, and whether to run in bfloat16."""
    dtype = next(iter(layers.values())).up.weight.dtype
    training = proxy.training
    flags = {id(parameter): parameter.requires_grad for parameter in proxy.parameters()}
    proxy.eval()  # no dropout, which would add noise to the proxy's gradient
    proxy.requires_grad_(False)
    cast_parameters(proxy, torch.promote_types(dtype, torch.float32))
    factors = {
        f"{name}.{part}.weight": getattr(layer, part).weight
        for name, layer in layers.items()
        for part in ("up", "down")
    }
    for factor in factors.values():
        factor.requires_grad_(True)
    try:
        yield factors, dtype == torch.bfloat16
    finally:
        cast_parameters(proxy, dtype)
        proxy.train(training)
        for parameter in proxy.parameters():
            parameter.requires_grad_(flags.get(id(parameter), True))


def _optimizer(factors: Mapping[str, nn.Parameter], learning_rate: float) -> torch.optim.AdamW:
    """Return AdamW with a learning rate per factor that is proportional to its scale (see `align`)."""
    scales = torch.stack([factor.detach().square().mean().sqrt() for factor in factors.values()])
    rates = (scales / scales.mean()).tolist()
    groups = [{"params": [factor], "scale": rate} for factor, rate in zip(factors.values(), rates, strict=True)]
    return torch.optim.AdamW(groups, lr=learning_rate, weight_decay=0.0)


def schedule(step: int, total: int) -> float:
    """Return the share of the peak learning rate at a step (1-based): linear over the first tenth, then cosine to 0."""
    warm = max(1, total // 10)
    if step <= warm:
        return step / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))
