"""The stages, one function each: read what it needs, do it with progress, write what it made, say what it cost.

Both `iprox run` (`iprox.pipeline`) and the commands for single stages (cli.py) call these.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from transformers import PreTrainedModel

from iprox.data import Encoded, Example, Pool
from iprox.errors import InputError
from iprox.finetune import evaluate, train
from iprox.influence.index import GradientIndex
from iprox.influence.scores import read_scores
from iprox.models import flops
from iprox.models.checkpoint import proxy_config
from iprox.models.loading import model_fingerprint, skeleton, stored_dtype
from iprox.recipe import FinetuneSection, SelectSection, WarmupSection
from iprox.run_folder import read_json, write_json
from iprox.selection import SelectionSettings, select_rows
from iprox.session import Session, encode_validation, tokens_of

# What a stage says of itself in run.json: tokens, flops, and anything particular to it.
StageRecord = dict[str, Any]


def warm_up(
    session: Session,
    model: str,
    examples: Sequence[Example],
    output: Path,
    settings: WarmupSection,
    *,
    optimizer_state: bool = False,
) -> StageRecord:
    """Brief SFT of the target; writes `checkpoint-*`, `checkpoints.json` and `history.json`.

    `optimizer_state` keeps Adam's moments in each checkpoint, for the estimator `adam`.
    """
    return _sft(session, model, examples, output, settings, every_epoch=True, optimizer_state=optimizer_state)


def selection_settings(settings: SelectSection, seed: int) -> SelectionSettings:
    """What a recipe asks to be chosen, checked.

    Raises:
        InputError: it cannot be meant; or there is no index of features.
    """
    if settings.features is not None:
        GradientIndex.open(settings.features)
    return SelectionSettings(**settings.model_dump(exclude={"features"}), seed=seed)


def select(
    session: Session, scores: Path, pool: Pool, output: Path, description: Path, settings: SelectSection
) -> StageRecord:
    """Choose rows of a scores table; writes the chosen pool rows, best first, and which they are as JSON."""
    table = read_scores(scores)

    def texts(rows: Sequence[int]) -> list[str]:
        return [example.words for example in pool.take(rows)]

    def features(rows: np.ndarray) -> np.ndarray:
        return GradientIndex.open(str(settings.features)).features_of(table, rows)

    selection = select_rows(
        table,
        selection_settings(settings, session.seed),
        texts=texts,
        features=features if settings.features else None,
    )
    if selection.count_asked is not None and len(selection.rows) < selection.count_asked:
        session.reporter.warn(
            f"{len(selection.rows)} rows chosen where {selection.count_asked} were asked for: no more have an "
            f"influence of {settings.threshold} or above"
            + "".join(f", and {number} were passed over ({why})" for why, number in selection.passed_over.items())
        )
    rows = selection.rows.tolist()
    ids = table["id"].take(pa.array(rows)).to_pylist()
    pool.write_rows(rows, output, ids)
    chosen = selection.as_dict()
    write_json(description, chosen)
    return {key: chosen[key] for key in ("strategy", "count", "fraction", "threshold", "tokens", "passed_over")}


def finetune(
    session: Session,
    model: str,
    examples: Sequence[Example],
    output: Path,
    settings: FinetuneSection,
    tests: Mapping[str, Pool],
) -> StageRecord:
    """SFT of a model; writes the last checkpoint to `output/model`, and `finetune.json` with what tests show."""
    encoder = session.encoder(session.tokenizer(model))
    encoded = encode_validation(encoder, dict(tests))
    before = _tested(session, model, encoded)
    record = _sft(session, model, examples, output, settings, every_epoch=False)
    (last,) = read_json(output / "checkpoints.json")
    final = output / "model"
    (output / last["path"]).replace(final)
    write_json(output / "checkpoints.json", [{**last, "path": final.name}])
    after = _tested(session, str(final), encoded)
    record["test"] = {
        task: {
            "before": before[task]["loss"],
            "after": after[task]["loss"],
            "exact_match": {"before": before[task]["exact_match"], "after": after[task]["exact_match"]},
        }
        for task in encoded
    }
    write_json(output / "finetune.json", record)
    return record


def check_belongs(proxy: PreTrainedModel, proxy_path: str, target: PreTrainedModel, target_path: str) -> None:
    """Refuse a proxy offered with another target.

    Raises:
        InputError: it is no proxy, or one of another model.
    """
    config = proxy_config(proxy)
    if config is None:
        raise InputError(f"{proxy_path}: is no iprox proxy; make one with iprox compress")
    if config.target_fingerprint and config.target_fingerprint != model_fingerprint(target):
        raise InputError(
            f"{proxy_path}: is a proxy of {config.target or 'another model'}, not of {target_path} (the weights differ)"
        )


def _tested(session: Session, model: str, encoded: Mapping[str, Sequence[Encoded]]) -> dict[str, dict[str, float]]:
    loaded = session.model(model)
    return {task: evaluate(loaded, rows, session.batch_tokens, 0) for task, rows in encoded.items()}


def _sft(
    session: Session,
    model: str,
    examples: Sequence[Example],
    output: Path,
    settings: WarmupSection | FinetuneSection,
    *,
    every_epoch: bool,
    optimizer_state: bool = False,
) -> StageRecord:
    """Train, and write the checkpoints' list and the history beside them."""
    tokenizer = session.tokenizer(model)
    encoder = session.encoder(tokenizer)
    encoded = encoder.encode(examples)
    shutil.rmtree(output, ignore_errors=True)  # what an interrupted training left
    # Master weights in float32; the checkpoints are stored as the model was.
    target = session.model(model, torch.float32, fused=True)
    stored = stored_dtype(model, trust_remote_code=session.trust_remote_code)
    kept = sum(row.supervised > 0 for row in encoded)
    steps = settings.epochs * math.ceil(kept / settings.batch_size)
    name = "warm-up" if every_epoch else "finetune"
    with session.reporter.bar(name, steps, "steps") as progress, session.tracker.training(name):
        result = train(
            target,
            tokenizer,
            encoded,
            output,
            epochs=settings.epochs,
            learning_rate=settings.learning_rate,
            batch_size=settings.batch_size,
            bf16=session.dtype == torch.bfloat16,
            every_epoch=every_epoch,
            seed=session.seed,
            store_dtype=stored,
            optimizer_state=optimizer_state,
            compile_model=settings.compile,
            progress=progress,
            report_to=session.tracker.kind,
        )
    if result.uncompiled:
        session.reporter.warn(f"the model trains without being compiled, more slowly: {result.uncompiled}")
    write_json(output / "history.json", result.history)
    write_json(output / "checkpoints.json", [asdict(checkpoint) for checkpoint in result.checkpoints])
    _, supervised = tokens_of(encoded)
    counted = skeleton(model, trust_remote_code=session.trust_remote_code)  # with its experts split, to be counted
    return {
        "tokens": result.tokens,
        "flops": flops.training_flops(counted, result.tokens, supervised * settings.epochs),
        "examples": kept,
        "labels": encoder.describe,
        "first_loss": result.history[0]["loss"],
        "last_loss": result.history[-1]["loss"],
    }
