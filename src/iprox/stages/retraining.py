"""Train on parts of the audited rows: what the measurements that retrain (`lds`, `removal`) have in common."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch

from iprox.data import Encoded, Example, Pool
from iprox.errors import InputError
from iprox.models import flops
from iprox.models.loading import checkpoint_fingerprint, hidden_size, skeleton
from iprox.records import StageRecord, key_of, read_json, write_json
from iprox.session import Session, encode_validation, tokens_of
from iprox.settings import AuditSection

# Validation losses by training; all measurements of an audit share them.
LOSSES = "retrained.json"


class Training(NamedTuple):
    """One training to do: which of the audited rows it is on (booleans [N]), and the seed of its order."""

    members: np.ndarray
    seed: int


class Retraining:
    """The audited rows that have scores, and what training on some of them does to the validation losses.

    Losses are written to `retrained.json` as they become known, each under a key of all that it depends on. So a
    stopped measurement resumes where it was, more trainings cost only those, and no training is done twice.

    Args:
        session: how to compute.
        model: the target, or the warm-up's checkpoint that the scores were taken at; every training starts there.
        examples: the audited rows, in the order of `audit.parquet`.
        validation: validation sets by task.
        folder: folder of the audit.
        settings: how to train.
        name: name of the measurement, for messages and progress.

    Attributes:
        tasks: names of the T tasks.
        scores: by side, `proxy` and `target`: scores of the N rows that have one on both [N, T].
        encoded: these N rows.
        described: how the target is trained, as plain data.

    Raises:
        InputError: fewer than two audited rows have scores.
    """

    def __init__(
        self,
        session: Session,
        model: str,
        examples: Sequence[Example],
        validation: Mapping[str, Pool],
        folder: Path,
        settings: AuditSection,
        name: str,
    ) -> None:
        self.session, self.model, self.folder, self.settings, self.name = session, model, folder, settings, name
        self.tasks = list(validation)
        self.scores, kept = _finite_scores(folder / "audit.parquet", self.tasks)
        if len(kept) < 2:
            raise InputError(f"audit.{name}: {len(kept)} audited rows have scores; give audit.sample more rows")
        encoder = session.encoder(model)
        self.encoded = encoder.encode([examples[row] for row in kept.tolist()])
        self.held = encode_validation(encoder, dict(validation))
        self._digests = [_digest([row]) for row in self.encoded]
        held = [[task, _digest(rows)] for task, rows in self.held.items()]
        self.described = settings.model_dump(include={"epochs", "learning_rate", "batch_size"})
        self._common = [checkpoint_fingerprint(model), held, str(session.dtype), self.described]

    def losses(self, trainings: Sequence[Training]) -> tuple[np.ndarray, StageRecord]:
        """Return the validation losses after each training [len(trainings), T], and what the new ones cost."""
        known: dict[str, list[float]] = read_json(self.folder / LOSSES) if (self.folder / LOSSES).is_file() else {}
        counted = skeleton(self.model, trust_remote_code=self.session.trust_remote_code)
        record: StageRecord = {"tokens": 0, "flops": 0.0}
        keys = [self._key(training) for training in trainings]
        to_do = dict(zip(keys, trainings, strict=True))
        with self.session.reporter.bar(self.name, len(to_do), "trainings") as progress:
            for key, training in to_do.items():
                earlier = key in known
                if not earlier:
                    rows = [self.encoded[row] for row in np.flatnonzero(training.members)]
                    known[key] = validation_losses(
                        self.session, self.model, rows, self.held, self.settings, training.seed
                    )
                    write_json(self.folder / LOSSES, known)
                    tokens, supervised = (self.settings.epochs * count for count in tokens_of(rows))
                    record["tokens"] += tokens
                    record["flops"] += flops.training_flops(counted, tokens, supervised)
                progress(1, earlier=earlier)
        return np.array([known[key] for key in keys]), record

    def _key(self, training: Training) -> str:
        rows = [self._digests[row] for row in np.flatnonzero(training.members)]
        return key_of([self._common, rows, training.seed])


def validation_losses(
    session: Session,
    model: str,
    rows: Sequence[Encoded],
    held: Mapping[str, Sequence[Encoded]],
    settings: AuditSection,
    seed: int,
) -> list[float]:
    """Train a fresh copy of a model on some rows, and return each task's validation loss after it, in nats."""
    from iprox.finetune import evaluate, train  # imports TRL: seconds

    fresh = session.model(model, torch.float32, fused=True)
    with tempfile.TemporaryDirectory(prefix="iprox-retrain-") as folder:
        result = train(
            fresh,
            session.tokenizer(model),
            rows,
            Path(folder),
            epochs=settings.epochs,
            learning_rate=settings.peak(hidden_size(fresh.config)),
            batch_size=settings.batch_size,
            bf16=session.dtype == torch.bfloat16,
            every_epoch=False,
            seed=seed,
            store_dtype=torch.float32,
        )
        # Losses of similar trainings differ by little, so they are measured in float32.
        trained = session.model(Path(folder) / result.checkpoints[-1].path, torch.float32)
    if result.uncompiled:
        session.reporter.warn(f"the model trains without being compiled, more slowly: {result.uncompiled}")
    return [evaluate(trained, examples, session.batch_tokens, 0)["loss"] for examples in held.values()]


def _finite_scores(file: Path, tasks: Sequence[str]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Read the scores of the rows that have one for every task on both sides [N, T], and the places of these rows."""
    table = pq.read_table(file)
    scores = {
        side: np.stack([table[f"{side}/{task}"].to_numpy(zero_copy_only=False) for task in tasks], axis=1)
        for side in ("proxy", "target")
    }
    (kept,) = np.nonzero(np.all([np.isfinite(values).all(1) for values in scores.values()], axis=0))
    return {side: values[kept] for side, values in scores.items()}, kept


def _digest(encoded: Sequence[Encoded]) -> str:
    """Digest the tokens and labels of some examples."""
    digest = hashlib.sha256()
    for row in encoded:
        for part in (row.input_ids, row.labels):
            digest.update(np.int64(len(part)).tobytes() + np.asarray(part, np.int32).tobytes())
    return digest.hexdigest()[:16]
