"""Retraining on subsets: the linear datamodelling score of the audited scores, proxy's and target's (`audit.lds`)."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from iprox.audit.datamodels import datamodelling_score, draw_subsets
from iprox.data import Encoded, Example, Pool
from iprox.errors import InputError
from iprox.finetune import evaluate, train
from iprox.models import flops
from iprox.models.loading import checkpoint_fingerprint, skeleton
from iprox.recipe import LdsSection
from iprox.run_folder import StageRecord, read_json, write_json
from iprox.session import Session, encode_validation, tokens_of

RESULT, LOSSES = "lds.json", "lds-losses.json"


def measure_lds(
    session: Session,
    model: str,
    examples: Sequence[Example],
    validation: Mapping[str, Pool],
    folder: Path,
    settings: LdsSection,
) -> StageRecord:
    """Retrain a target on random subsets of the audited rows; writes `lds.json` beside `audit.parquet`.

    The validation losses of each subset are kept as they are known, in `lds-losses.json`, so a stopped measurement
    goes on where it was, and more subsets cost only those.

    Args:
        session: how to compute.
        model: the target, or the warm-up's checkpoint that the scores were taken at.
        examples: the audited rows, in the order of `audit.parquet`.
        validation: validation sets by task.
        folder: of the audit.
        settings: how many subsets, how large, how trained.

    Raises:
        InputError: fewer than two audited rows have scores.
    """
    table = pq.read_table(folder / "audit.parquet")
    tasks = list(validation)
    scores = {
        side: np.stack([table[f"{side}/{task}"].to_numpy(zero_copy_only=False) for task in tasks], axis=1)
        for side in ("proxy", "target")
    }
    (kept,) = np.nonzero(np.isfinite(scores["proxy"]).all(1) & np.isfinite(scores["target"]).all(1))
    if len(kept) < 2:
        raise InputError(f"audit.lds: {len(kept)} audited rows have scores; give audit.sample more rows")
    encoder = session.encoder(model)
    encoded = encoder.encode([examples[row] for row in kept.tolist()])
    held = encode_validation(encoder, dict(validation))
    members = draw_subsets(len(kept), settings.subsets, settings.fraction, session.seed)
    # All that the losses hang on: another validation set, or other rows, start anew.
    of = [checkpoint_fingerprint(model), _digest(encoded), {task: _digest(rows) for task, rows in held.items()}]
    known = _known(folder / LOSSES, [*of, str(session.dtype), session.seed, settings.model_dump(exclude={"subsets"})])
    counted = skeleton(model, trust_remote_code=session.trust_remote_code)
    record: StageRecord = {"tokens": 0, "flops": 0.0}
    before = len(known["losses"])
    with session.reporter.bar("lds", settings.subsets, "subsets") as progress:
        for number, subset in enumerate(members):
            if number >= len(known["losses"]):
                rows = [encoded[row] for row in np.flatnonzero(subset)]
                known["losses"].append(_retrained(session, model, rows, held, settings, tasks))
                write_json(folder / LOSSES, known)
                tokens, supervised = (settings.epochs * count for count in tokens_of(rows))
                record["tokens"] += tokens
                record["flops"] += flops.training_flops(counted, tokens, supervised)
            progress(1, earlier=number < before)
    losses = np.array(known["losses"][: settings.subsets])
    found = {
        task: {side: datamodelling_score(scores[side][kept, column], members, losses[:, column]) for side in scores}
        for column, task in enumerate(tasks)
    }
    result = {**settings.model_dump(), "rows": len(kept), "tasks": found}
    result["mean"] = {side: float(np.mean([entry[side]["lds"] for entry in found.values()])) for side in scores}
    write_json(folder / RESULT, result)
    return {**record, "lds": result["mean"]}


def _known(path: Path, identity: Any) -> dict[str, Any]:
    """What is known of the losses, or nothing where they are of other rows or settings."""
    known = read_json(path) if path.is_file() else {}
    return known if known.get("of") == identity else {"of": identity, "losses": []}


def _digest(encoded: Sequence[Encoded]) -> str:
    """Of the tokens and labels of some examples."""
    digest = hashlib.sha256()
    for row in encoded:
        for part in (row.input_ids, row.labels):
            digest.update(np.int64(len(part)).tobytes() + np.asarray(part, np.int32).tobytes())
    return digest.hexdigest()[:16]


def _retrained(
    session: Session,
    model: str,
    rows: Sequence[Encoded],
    held: Mapping[str, Sequence[Encoded]],
    settings: LdsSection,
    tasks: Sequence[str],
) -> list[float]:
    """Each task's validation loss after training a fresh copy of the model on some rows."""
    fresh = session.model(model, torch.float32, fused=True)
    with tempfile.TemporaryDirectory(prefix="iprox-lds-") as folder:
        result = train(
            fresh,
            session.tokenizer(model),
            rows,
            Path(folder),
            epochs=settings.epochs,
            learning_rate=settings.learning_rate,
            batch_size=settings.batch_size,
            bf16=session.dtype == torch.bfloat16,
            every_epoch=False,
            seed=session.seed,
            store_dtype=torch.float32,
        )
        # Losses of subsets differ by little, so they are measured in float32.
        trained = session.model(Path(folder) / result.checkpoints[-1].path, torch.float32)
    if result.uncompiled:
        session.reporter.warn(f"the model trains without being compiled, more slowly: {result.uncompiled}")
    return [evaluate(trained, held[task], session.batch_tokens, 0)["loss"] for task in tasks]
