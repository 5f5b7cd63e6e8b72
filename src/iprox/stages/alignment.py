"""The stage that aligns a proxy with its target and watches its fidelity on held-out rows."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from iprox.data import Batch, Example, example_batches
from iprox.distributed import own_device, processes, rank, together
from iprox.models import flops
from iprox.models.layers import low_rank_layers
from iprox.models.loading import check_belongs
from iprox.models.saving import save_model
from iprox.proxy.align import align
from iprox.proxy.align_signals import AUTO_BYTES, SignalStore, stored_bytes
from iprox.records import StageRecord, write_json
from iprox.session import Session, tokens_of
from iprox.settings import AlignSection
from iprox.stages.held_out import HeldOutRows, held_out_fidelity

# Largest rows × longest row of a batch.
ALIGN_TOKENS = 1024


def align_proxy(
    session: Session,
    model: str,
    proxy_path: str,
    examples: Sequence[Example],
    output: Path,
    settings: AlignSection,
    *,
    held_out: HeldOutRows | None = None,
    state: Path,
    identity: str,
) -> StageRecord:
    """Align a proxy with its target; writes a proxy folder with `alignment.json`.

    Args:
        model: folder of the target.
        proxy_path: folder of the proxy.
        examples: examples to align on.
        output: folder to write.
        settings: how to align.
        held_out: rows to measure fidelity on; None keeps the factors of the last step.
        state: file that an interrupted alignment resumes from; the caller removes it afterwards.
        identity: key of everything the result depends on; a state with another key is not resumed.
    """
    encoder = session.encoder(model, proxy_path)
    tokenizer = encoder.tokenizer
    encoded = encoder.encode(examples)
    target = session.model(model)
    proxy = session.model(proxy_path)
    check_belongs(proxy, proxy_path, target, model)
    # A second-order step needs several times the memory of a plain one. The limit is the same on every device, as it
    # changes the steps.
    batches = list(example_batches(encoded, settings.batch_size, batch_tokens=min(ALIGN_TOKENS, session.batch_tokens)))
    steps = settings.epochs * len(batches)
    watched = None if held_out is None else held_out_fidelity(session, target, encoder, held_out)
    tokens, supervised = tokens_of(encoded)
    kept = keeps_signals(proxy, settings, len(batches), supervised)
    if state.is_file():
        session.reporter.say(f"align: resumes from {state}")
    how = {"settings": settings, "seed": session.seed, "state": state, "identity": identity}
    # Several processes match logits only.
    alone = settings.gradient_weight > 0 or settings.hidden_weight > 0
    with (
        session.together(settings.batch_size, alone=alone),
        session.reporter.bar("align", steps, "steps") as progress,
    ):
        store = _store(state, identity) if kept else None
        watch = None if watched is None else watched.watch(proxy)
        history = together(
            partial(align, proxy, target, batches, **how, held_out=watch, store=store, progress=progress),
            partial(_follow, session.load, proxy_path, model, batches, store, watched is not None, how),
        )
    if watched is not None and history.best_step == 0:
        session.reporter.warn(
            "alignment did not raise the fidelity on held-out examples, so the proxy is left as it was compressed"
        )
    asked = 1.0 if store is None else min(len(batches), len(history.steps)) / max(1, len(history.steps))
    if store is not None:
        store.discard()
    data = history.as_dict()
    save_model(proxy, tokenizer, output)
    write_json(output / "alignment.json", data)
    compression = Path(proxy_path) / "compression.json"
    if compression.is_file():
        shutil.copyfile(compression, output / "compression.json")
    session.tracker.curve("align", data["steps"])
    session.tracker.curve("align/held_out", data["held_out"])
    read = history.tokens, round(supervised * history.tokens / tokens)
    spent = flops.alignment_flops(target, proxy, *read, gradients=settings.gradient_weight > 0, asked=asked)
    if watched is not None and held_out is not None:
        spent += watched.cost.flops(target, [proxy] * len(history.held_out))
    return {
        "tokens": history.tokens,
        "flops": spent,
        "examples": len(examples),
        "target_asked": asked,
        "steps": len(history.steps),
        "first_loss": history.steps[0].loss,
        "last_loss": history.steps[-1].loss,
        "held_out": None if watched is None else len(watched.rows),
        "fidelity": {
            "before": history.held_out[0].fidelity,
            "after": max(point.fidelity for point in history.held_out),
            "best_step": history.best_step,
            "stopped_early": history.stopped_early,
        }
        if history.held_out
        else None,
    }


def _follow(
    load: partial[PreTrainedModel],
    proxy: str,
    target: str,
    batches: Sequence[Batch],
    store: SignalStore | None,
    watched: bool,
    how: dict[str, Any],
) -> None:
    """Take part in an alignment in another process than the first, which measures the fidelity and saves the result."""
    own_proxy, own_target = (load(each, device=own_device()) for each in (proxy, target))
    own = None if store is None else SignalStore(store.folder / f"{rank():04d}")
    align(own_proxy, own_target, batches, **how, held_out=(lambda: 0.0) if watched else None, store=own)


def keeps_signals(proxy: PreTrainedModel, settings: AlignSection, batches: int, supervised: int) -> bool:
    """Return whether what the target says of each batch is kept: where batches are read again, and it is not too large.

    Args:
        proxy: proxy that is aligned, with or without weights.
        settings: how it is aligned.
        batches: number of batches.
        supervised: supervised tokens of all batches.
    """
    if settings.hidden_weight or settings.epochs == 1:
        return False
    vocabulary = proxy.config.get_text_config().vocab_size
    return stored_bytes(low_rank_layers(proxy), settings, batches, supervised, vocabulary) <= AUTO_BYTES


def _store(state: Path, identity: str) -> SignalStore:
    """Return where what the target says of each batch is kept."""
    shares = f"-{processes()}" if processes() > 1 else ""  # each process keeps those of its rows
    folder = state.with_name(f"{state.stem}-{identity[:16]}{shares}.signals")
    for other in state.parent.glob(f"{state.stem}-*.signals"):
        if other != folder:  # left by an interrupted alignment with other settings
            SignalStore(other).discard()
    return SignalStore(folder)
