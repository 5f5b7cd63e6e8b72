"""The stages that train the target: the warm-up before scoring, and fine-tuning on the selection."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from iprox.data import Encoded, Example, Pool
from iprox.distributed import check_sharded, together
from iprox.errors import InputError
from iprox.files import empty_folder
from iprox.models import flops
from iprox.models.adapters import with_lora
from iprox.models.checkpoint import proxy_config
from iprox.models.loading import hidden_size, stored_dtype
from iprox.models.quantized import check_trainable
from iprox.models.saving import CHECKPOINTS
from iprox.records import RUN, StageRecord, read_json, write_json
from iprox.session import Session, encode_validation, tokens_of
from iprox.settings import EvaluateSection, FinetuneSection, WarmupSection

BENCHMARKS = "lm_eval.json"

if TYPE_CHECKING:
    from iprox.finetune import TrainingResult


def warm_up(
    session: Session,
    model: str,
    examples: Sequence[Example],
    output: Path,
    settings: WarmupSection,
    *,
    optimizer_state: bool = False,
) -> StageRecord:
    """Fine-tune the target briefly; writes `checkpoint-*`, `checkpoints.json` and `history.json`.

    `optimizer_state` keeps Adam's moments in each checkpoint, for the estimator `less`.
    """
    return _sft(session, model, examples, output, settings, every_epoch=True, optimizer_state=optimizer_state)


def finetune(
    session: Session,
    model: str,
    examples: Sequence[Example],
    output: Path,
    settings: FinetuneSection,
    tests: Mapping[str, Pool],
) -> StageRecord:
    """Fine-tune a model; writes the last checkpoint to `output/model`, and test results to `finetune.json`."""
    encoder = session.encoder(model)
    encoded = encode_validation(encoder, tests)
    before = _tested(session, model, encoded)
    record = _sft(session, model, examples, output, settings, every_epoch=False)
    (last,) = read_json(output / CHECKPOINTS)
    final = output / "model"
    (output / last["path"]).replace(final)
    write_json(output / CHECKPOINTS, [{**last, "path": final.name}])
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


def benchmark(session: Session, model: str, output: Path, settings: EvaluateSection) -> StageRecord:
    """Run lm-evaluation-harness on a model and on `output/model`; writes `lm_eval.json`."""
    from iprox.harness import run_harness  # imports the harness: seconds

    batch_size = max(1, session.batch_tokens // session.max_length)
    before, after = (
        run_harness(session.model(each), session.tokenizer(each), settings, batch_size)
        for each in (model, str(output / "model"))
    )
    changes = {
        task: {
            metric: {"before": before[task][metric][0], "after": value, "stderr": [before[task][metric][1], error]}
            for metric, (value, error) in metrics.items()
        }
        for task, metrics in after.items()
    }
    write_json(output / BENCHMARKS, changes)
    return {"tokens": 0, "flops": 0.0, "lm_eval": changes}


def _tested(session: Session, model: str, encoded: Mapping[str, Sequence[Encoded]]) -> dict[str, dict[str, float]]:
    from iprox.finetune import evaluate  # imports TRL: seconds

    loaded = session.model(model)
    return {task: evaluate(loaded, rows, session.batch_tokens) for task, rows in encoded.items()}


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
    """Train a model, and write the list of checkpoints and the history."""
    from iprox.finetune import steps_per_epoch  # imports TRL: seconds

    encoder = session.encoder(model)
    tokenizer = encoder.tokenizer
    encoded = encoder.encode(examples)
    # Trained weights are float32 and are saved in the dtype of the model; frozen weights keep their dtype.
    lora = settings.lora
    stored = stored_dtype(model, trust_remote_code=session.trust_remote_code)
    counted = session.skeleton(model)
    if proxy_config(counted) is not None:
        raise InputError(f"{model}: is an iprox proxy, and proxies are for scoring; fine-tune its target")
    check_trainable(counted.config, model)
    check_sharded(adapters=lora > 0, moments=optimizer_state)
    session.note_adapter(model)
    empty_folder(output, keep=RUN)  # remove what an interrupted training left
    kept = sum(row.supervised > 0 for row in encoded)
    steps = settings.epochs * steps_per_epoch(kept, settings.batch_size, settings.accumulate)
    rate = settings.peak(hidden_size(counted.config))
    name = "warm-up" if every_epoch else "finetune"
    with (
        session.together(settings.batch_size) as number,
        session.reporter.bar(name, steps, "steps") as progress,
        session.tracker.training(name),
    ):
        # Each of several processes moves the model to its own device.
        load = session.load if number == 1 else partial(session.load, device="cpu")
        job = partial(
            _train,
            partial(load, model, dtype=stored if lora else torch.float32, fused=True),
            partial(with_lora, base=model, rank=lora, seed=session.seed) if lora else None,
            tokenizer,
            encoded,
            output,
            epochs=settings.epochs,
            learning_rate=rate,
            batch_size=settings.batch_size,
            accumulate=settings.accumulate,
            bf16=session.dtype == torch.bfloat16,
            every_epoch=every_epoch,
            seed=session.seed,
            store_dtype=stored,
            optimizer_state=optimizer_state,
            adapters_only=not every_epoch,  # a model to be scored must not depend on the path of its base model
            compile_model=session.compile,
        )
        result, trained = together(partial(job, progress=progress, tracking=session.tracker.for_trainer), job)
    if result.uncompiled:
        session.reporter.warn(f"the model could not be compiled, so it trains more slowly: {result.uncompiled}")
    write_json(output / "history.json", result.history)
    write_json(output / CHECKPOINTS, [asdict(checkpoint) for checkpoint in result.checkpoints])
    _, supervised = tokens_of(encoded)
    return {
        "tokens": result.tokens,
        "flops": flops.training_flops(counted, result.tokens, supervised * settings.epochs, lora or None),
        "trained_parameters": trained,
        "processes": number,
        "examples": kept,
        "learning_rate": rate,
        "labels": encoder.describe,
        "first_loss": result.history[0]["loss"],
        "last_loss": result.history[-1]["loss"],
    }


def _train(
    load: Callable[[], PreTrainedModel], adapt: Callable[[PreTrainedModel], Any] | None, *given: Any, **how: Any
) -> tuple[TrainingResult, int]:
    """Load a model and train it, in one of several processes; return the result and the number of trained weights."""
    from iprox.finetune import train

    model = load() if adapt is None else adapt(load())
    trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
    return train(model, *given, **how), trained
