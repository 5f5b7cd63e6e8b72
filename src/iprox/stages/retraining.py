"""The stages that retrain the target on parts of the audited rows: linear datamodeling scores, and the removal test.

Every validation loss is written to `retrained.json` as soon as it is known, under a key of all that it depends on. So a
stopped measurement resumes, more repeats train only what is new, and the two measurements share trainings.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch

from iprox.audits.datamodels import datamodeling_score, draw_subsets
from iprox.audits.removal import length_strata, random_rows, removal_effect, removed_count, top_rows
from iprox.data import Encoded, Example, Pool
from iprox.errors import InputError
from iprox.models import flops
from iprox.models.loading import checkpoint_fingerprint, hidden_size
from iprox.records import StageRecord, key_of, read_json, write_json
from iprox.session import Session, encode_validation, tokens_of
from iprox.settings import BATCH_SIZE, REMOVED_FRACTION, SUBSET_FRACTION, AuditSection

LOSSES = "retrained.json"
LDS, REMOVAL = "lds.json", "removal.json"


def measure_lds(retraining: Retraining) -> StageRecord:
    """Compute linear datamodeling scores of the proxy's and the target's scores (`audit.lds`); writes `lds.json`."""
    scores, rows, seed = retraining.scores, len(retraining.encoded), retraining.session.seed
    subsets = retraining.settings.lds
    members = draw_subsets(rows, subsets, SUBSET_FRACTION, seed)
    losses, record = retraining.losses([Training(subset, seed) for subset in members])
    found = {
        task: {side: datamodeling_score(scores[side][:, column], members, losses[:, column]) for side in scores}
        for column, task in enumerate(retraining.tasks)
    }
    result = {
        **retraining.described,
        "subsets": subsets,
        "fraction": SUBSET_FRACTION,
        "rows": rows,
        "tasks": found,
    }
    result["mean"] = {side: float(np.mean([entry[side]["lds"] for entry in found.values()])) for side in scores}
    write_json(retraining.folder / LDS, result)
    return {**record, "lds": result["mean"]}


def measure_removal(retraining: Retraining) -> StageRecord:
    """Compare training without a ranking's top rows and without random rows (`audit.removal`); writes `removal.json`.

    Each repeat has its own order. It trains on all rows, and for each of T tasks and each side (proxy, target) without
    the top rows and without random rows of similar length: 1 + 4T trainings, or fewer if some leave out the same rows.
    """
    seed, repeats = retraining.session.seed, retraining.settings.removal
    scores, rows, tasks = retraining.scores, len(retraining.encoded), retraining.tasks
    count = removed_count(rows, REMOVED_FRACTION)
    supervised = np.array([row.supervised for row in retraining.encoded])
    strata = length_strata(supervised)
    orders = [np.random.default_rng([seed, repeat]).permutation(rows) for repeat in range(repeats)]
    rankings = [(side, column) for column in range(len(tasks)) for side in scores]
    tops = {ranking: top_rows(scores[ranking[0]][:, ranking[1]], count) for ranking in rankings}
    controls = {ranking: [random_rows(tops[ranking], strata, order) for order in orders] for ranking in rankings}
    trainings = []
    for repeat in range(repeats):
        removed = [np.zeros(rows, bool)]
        for ranking in rankings:
            removed += [tops[ranking], controls[ranking][repeat]]
        trainings += [Training(~left_out, seed + repeat) for left_out in removed]
    losses, record = retraining.losses(trainings)
    by_repeat = losses.reshape(repeats, 1 + 2 * len(rankings), len(tasks))
    everything = by_repeat[:, 0]
    found: dict[str, dict[str, Any]] = {task: {"loss": float(everything[:, i].mean())} for i, task in enumerate(tasks)}
    measured = {side: np.zeros((3, repeats)) for side in scores}  # means over tasks
    for place, (side, column) in enumerate(rankings):
        compared = np.stack(
            [everything[:, column], by_repeat[:, 1 + 2 * place, column], by_repeat[:, 2 + 2 * place, column]]
        )
        measured[side] += compared / len(tasks)
        found[tasks[column]][side] = {
            **removal_effect(*compared),
            "supervised": {
                "top": int(supervised[tops[side, column]].sum()),
                "random": float(np.mean([supervised[control].sum() for control in controls[side, column]])),
            },
        }
    mean = {side: removal_effect(*values) for side, values in measured.items()}
    described = {**retraining.described, "repeats": repeats, "fraction": REMOVED_FRACTION}
    write_json(retraining.folder / REMOVAL, {**described, "rows": rows, "removed": count, "tasks": found, "mean": mean})
    return {**record, "removal": mean}


class Training(NamedTuple):
    """A training: which audited rows it uses (booleans [N]), and the seed of their order."""

    members: np.ndarray
    seed: int


class Retraining:
    """The audited rows that have scores, and the validation losses after training on some of them.

    Args:
        session: how to compute.
        model: checkpoint that the scores were taken at; every training starts there.
        examples: the audited rows, in the order of `audit.parquet`.
        validation: validation sets by task.
        folder: folder of the audit.
        settings: how often and how to train.
        name: name of the measurement, in messages.

    Raises:
        InputError: fewer than two audited rows have scores.

    Attributes:
        tasks: names of the T tasks.
        scores: scores [N, T] of `proxy` and `target`, for the N rows that have both.
        encoded: these N rows.
        described: the training settings as plain data.
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
        self.held = encode_validation(encoder, validation)
        self._digests = [_digest([row]) for row in self.encoded]
        held = [[task, _digest(rows)] for task, rows in self.held.items()]
        self.described = settings.model_dump(include={"learning_rate"})
        self._common = [checkpoint_fingerprint(model), held, str(session.dtype), self.described]

    def _known(self) -> dict[str, list[float]]:
        """Return the losses of earlier trainings; of a damaged file none, with a warning."""
        file = self.folder / LOSSES
        try:
            known = read_json(file) if file.is_file() else {}
            return {str(key): [float(loss) for loss in losses] for key, losses in known.items()}
        except (ValueError, TypeError, AttributeError):
            self.session.reporter.warn(f"{file}: is damaged; its trainings are repeated")
            return {}

    def losses(self, trainings: Sequence[Training]) -> tuple[np.ndarray, StageRecord]:
        """Return the validation losses after each training [len(trainings), T], and the cost of new trainings."""
        known = self._known()
        counted = self.session.skeleton(self.model)
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
                    tokens, supervised = tokens_of(rows)
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
            epochs=1,
            learning_rate=settings.peak(hidden_size(fresh.config)),
            batch_size=BATCH_SIZE,
            bf16=session.dtype == torch.bfloat16,
            every_epoch=False,
            seed=seed,
            store_dtype=torch.float32,
        )
        # Losses of similar trainings differ by little, so they are measured in float32.
        trained = session.model(Path(folder) / result.checkpoints[-1].path, torch.float32)
    if result.uncompiled:
        session.reporter.warn(f"the model could not be compiled, so it trains more slowly: {result.uncompiled}")
    return [evaluate(trained, examples, session.batch_tokens)["loss"] for examples in held.values()]


def _finite_scores(file: Path, tasks: Sequence[str]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return the scores [N, T] of the rows that have all of them on both sides, and the positions of these rows."""
    table = pq.read_table(file)
    scores = {
        side: np.stack([table[f"{side}/{task}"].to_numpy(zero_copy_only=False) for task in tasks], axis=1)
        for side in ("proxy", "target")
    }
    (kept,) = np.nonzero(np.all([np.isfinite(values).all(1) for values in scores.values()], axis=0))
    return {side: values[kept] for side, values in scores.items()}, kept


def _digest(encoded: Sequence[Encoded]) -> str:
    """Return a hash of the tokens and labels of some examples."""
    digest = hashlib.sha256()
    for row in encoded:
        for part in (row.input_ids, row.labels):
            digest.update(np.int64(len(part)).tobytes() + np.asarray(part, np.int32).tobytes())
    return digest.hexdigest()[:16]
