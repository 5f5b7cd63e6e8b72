"""The commands for single stages; each returns plain data for `--json`."""

from __future__ import annotations

import functools
from argparse import Namespace
from pathlib import Path
from typing import Any

from iprox import hub
from iprox.cli import options, summary
from iprox.data import Pool
from iprox.data.locate import COMPRESSIONS
from iprox.data.sampling import draw_rows
from iprox.engine.shards import IDENTITY
from iprox.errors import InputError
from iprox.files import expanded
from iprox.influence.index import DESCRIPTION, GradientIndex
from iprox.influence.job import Checkpoint
from iprox.models.checkpoint import proxy_config
from iprox.models.loading import checkpoint_fingerprint, skeleton, stored_dtype
from iprox.models.saving import save_model
from iprox.progress import say_plainly
from iprox.proxy.export import to_dense
from iprox.recipe import validate_section
from iprox.run_folder import StageRecord, key_of, read_json
from iprox.session import refuse_shared_files
from iprox.settings import (
    SIZES,
    AlignSection,
    FinetuneSection,
    LdsSection,
    ProbeSection,
    ProxySection,
    RefineSection,
    RemovalSection,
    SelectSection,
    WarmupSection,
)
from iprox.stages import alignment, auditing, compression, indexing, refinement, scoring, selection, training
from iprox.stages.retraining import LOSSES

SHARDS = "scores.parquet.shards"


def warmup(arguments: Namespace) -> dict[str, Any]:
    """`iprox warmup`."""
    if arguments.optimizer_state and arguments.lora:
        raise InputError("--optimizer-state keeps Adam's moments of the weights, of which --lora trains none")
    settings = validate_section(WarmupSection, fraction=arguments.fraction, **options.training_of(arguments))
    session, pool = options.session_of(arguments), options.pool_of(arguments.pool, arguments)
    options.check_training(arguments)
    output = options.new_folder(arguments.output)
    total = session.read(pool).rows
    rows = draw_rows("warmup", session.seed, total, settings.examples(total))
    return options.single_stage(
        session,
        "warmup",
        output,
        arguments,
        lambda: training.warm_up(
            session, arguments.model, pool.take(rows), output, settings, optimizer_state=arguments.optimizer_state
        ),
    )


def compress(arguments: Namespace) -> dict[str, Any]:
    """`iprox compress`."""
    settings = validate_section(
        ProxySection,
        {"model": "--proxy-model"},
        **{name: getattr(arguments, name) for name in (*SIZES, "method", "ranks")},
        ridge=arguments.ridge,
        model=arguments.proxy_model,
        probe=validate_section(
            ProbeSection,
            {"labels": "--probe-labels", "tokens": "--probe-tokens"},
            labels=arguments.probe_labels,
            tokens=arguments.probe_tokens,
        ),
    )
    session, pool = options.session_of(arguments), options.pool_of(arguments.probe, arguments, "probe")
    output = options.new_folder(arguments.output)
    compression.check_size(skeleton(arguments.model, trust_remote_code=session.trust_remote_code), settings)
    examples = options.sample_of(pool, session, "probe", arguments.probe_size)
    held_out = options.held_out_of(arguments)
    if (settings.fidelity is not None) != (held_out is not None):
        raise InputError("--fidelity goes with --held-out and --validation, on which it is measured")
    return options.single_stage(
        session,
        "compress",
        output,
        arguments,
        lambda: compression.compress(session, arguments.model, examples, output, settings, held_out),
    )


def align(arguments: Namespace) -> dict[str, Any]:
    """`iprox align`."""
    settings = validate_section(
        AlignSection,
        learning_rate=arguments.learning_rate,
        gradient_weight=arguments.gradient_weight,
        kl_weight=arguments.kl_weight,
        hidden_weight=arguments.hidden_weight,
        batch_size=arguments.batch_size,
        accumulate=arguments.accumulate,
    )
    held_out = options.held_out_of(arguments)
    session, pool = options.session_of(arguments), options.pool_of(arguments.data, arguments, "data")
    output = options.new_folder(arguments.output)
    key = [checkpoint_fingerprint(arguments.model), checkpoint_fingerprint(arguments.proxy)]
    key += [session.read(pool).fingerprint, settings.model_dump(), arguments.steps, session.seed, str(session.dtype)]
    template = session.encoder(arguments.model).chat_template
    key += [session.max_length, session.batch_tokens, template]
    if held_out is not None:
        key += [source.scan().fingerprint for source in (held_out.pool, *held_out.validation.values())]
    examples = list(pool)
    state = output.with_name(f"{output.name}.state.safetensors")
    record = options.single_stage(
        session,
        "align",
        output,
        arguments,
        lambda: alignment.align_proxy(
            session,
            arguments.model,
            arguments.proxy,
            examples,
            output,
            settings,
            held_out=held_out,
            max_steps=arguments.steps,
            state=state,
            identity=key_of(key),
        ),
    )
    state.unlink(missing_ok=True)
    return record


def score(arguments: Namespace) -> dict[str, Any]:
    """`iprox score`."""
    settings = options.influence_of(arguments)
    session, pool = options.session_of(arguments), options.pool_of(arguments.pool, arguments)
    validation = options.tasks_of(arguments.validation, arguments)
    rates = options.learning_rates_of(arguments.model, arguments.learning_rates)
    if not settings.traits.gradients and len(rates) > 1:
        raise InputError(f"--model: checkpoints are summed by TracIn; {settings.estimator} takes one model")
    marker = f"{SHARDS}/{IDENTITY}"
    output = options.resumable_folder(arguments.output, marker, SHARDS, "scores.parquet", "*.partial")
    identity = {
        "models": [checkpoint_fingerprint(model) for model in arguments.model],
        "pool": session.read(
            pool, {f"validation set of {task}": each for task, each in validation.items()}
        ).fingerprint,
        "validation": {task: source.scan().fingerprint for task, source in validation.items()},
    }
    targets = [options.query_target(model, arguments, settings, session) for model in arguments.model]
    identity["targets"] = [target and checkpoint_fingerprint(target) for target in targets]
    models = [
        Checkpoint(model, rate, target, options.warmed_folder(model, target, settings))
        for model, rate, target in zip(arguments.model, rates, targets, strict=True)
    ]
    return options.single_stage(
        session,
        "score",
        output,
        arguments,
        functools.partial(
            scoring.score, session, models, pool, validation, output / "scores.parquet", settings, identity
        ),
        kept=f"{SHARDS}/*/*.parquet",
    )


def select(arguments: Namespace) -> dict[str, Any]:
    """`iprox select`."""
    names = ("fraction", "count", "tokens", "strategy", "task", "threshold", "deduplicate")
    settings = validate_section(
        SelectSection,
        **{name: getattr(arguments, name) for name in names},
        weights=options.numbers_of(arguments.weights, "--weights", "TASK=WEIGHT, e.g. gsm8k=2"),
        source_floor=options.numbers_of(arguments.source_floor, "--source-floor"),
        source_cap=options.cap_of(arguments.source_cap),
    )
    session = options.session_of(arguments)
    output = expanded(arguments.output)
    if output.suffix.lower() in (".json", ".parquet", ".csv", *COMPRESSIONS):
        name = output.name.partition(".")[0]
        raise InputError(f"--output {output}: a selection is written as JSON lines; name it {name}.jsonl")
    # Named after the output, so that several selections in one folder keep theirs apart.
    description = output.with_name(f"{output.stem}.selection.json")
    options.columns_as_scored(arguments)
    pool = options.pool_of(arguments.pool, arguments)
    record = selection.select(session, Path(arguments.scores), pool, output, description, settings, "command")
    if not arguments.json:
        say_plainly(f"{record['count']:,} rows, {record['tokens']:,} tokens, best first: {output}")
        for reason, number in record["passed_over"].items():
            say_plainly(f"passed over: {number:,} {reason}")
    return {**record, "warnings": session.reporter.take_warnings(), "output": str(output)}


def audit(arguments: Namespace) -> dict[str, Any]:
    """`iprox audit`."""
    settings = options.influence_of(arguments)
    session, pool = options.session_of(arguments), options.pool_of(arguments.pool, arguments)
    validation = options.tasks_of(arguments.validation, arguments)
    retrain = _retrainings(arguments)
    results = [f"{name}.json" for name in retrain]
    output = options.resumable_folder(
        arguments.output, LOSSES, "audit.json", "audit.parquet", LOSSES, *results, "*.partial"
    )
    refuse_shared_files(pool, {f"validation set of {task}": each for task, each in validation.items()})
    examples = options.sample_of(pool, session, "audit", arguments.sample)
    state = options.warmed_folder(arguments.model, None, settings)
    pairs = [Checkpoint(arguments.proxy, 1.0, arguments.model, state)]

    def work() -> StageRecord:
        record, _ = auditing.audit(session, pairs, examples, pool, validation, output, settings)
        for name, chosen in retrain.items():
            more = auditing.MEASUREMENTS[name](session, arguments.model, examples, validation, output, chosen)
            record = {**record, **more, **{count: record[count] + more[count] for count in ("tokens", "flops")}}
        return record

    record = options.single_stage(session, "audit", output, arguments, work, kept=LOSSES)
    found = read_json(output / "audit.json")
    measured = {name: read_json(output / f"{name}.json") for name in retrain}
    if not arguments.json:
        summary.print_fidelity(found)
        for name, result in measured.items():
            {"lds": summary.print_lds, "removal": summary.print_removal}[name](result)
    return {**record, **found, **measured}


def _retrainings(arguments: Namespace) -> dict[str, Any]:
    """Return the settings of what is to be measured by retraining, by name.

    Raises:
        InputError: a bad value, or a learning rate without a training.
    """
    rate = {} if arguments.learning_rate is None else {"learning_rate": arguments.learning_rate}
    chosen: dict[str, Any] = {}
    if arguments.lds:
        chosen["lds"] = validate_section(LdsSection, {"subsets": "--lds"}, subsets=arguments.lds, **rate)
    if arguments.removal:
        chosen["removal"] = validate_section(RemovalSection, **rate)
    if rate and not chosen:
        raise InputError(
            f"--learning-rate {arguments.learning_rate:g}: is used by --lds and --removal, and neither is given"
        )
    return chosen


def refine(arguments: Namespace) -> dict[str, Any]:
    """`iprox refine`."""
    settings = validate_section(RefineSection, candidates=arguments.candidates)
    weights = options.numbers_of(arguments.weights, "--weights", "TASK=WEIGHT, e.g. gsm8k=2")
    chosen = validate_section(SelectSection, strategy=arguments.strategy, task=arguments.task, weights=weights)
    options.columns_as_scored(arguments)
    influence = options.influence_as_scored(arguments)
    session, pool = options.session_of(arguments), options.pool_of(arguments.pool, arguments)
    validation = options.tasks_of(arguments.validation, arguments)
    output = options.resumable_folder(arguments.output, f"candidates.parquet.shards/{IDENTITY}", "candidates.*")
    session.read(pool)

    def on_target(candidates: Pool, file: Path) -> StageRecord:
        identity = {
            "models": [checkpoint_fingerprint(arguments.model)],
            "pool": pool.scan().fingerprint,
            "candidates": candidates.scan().fingerprint,
            "validation": {task: source.scan().fingerprint for task, source in validation.items()},
        }
        model = Checkpoint(arguments.model, 1.0, None, options.warmed_folder(arguments.model, None, influence))
        return scoring.score(session, [model], candidates, validation, file, influence, identity, part_of=pool)

    record = options.single_stage(
        session,
        "refine",
        output,
        arguments,
        lambda: refinement.refine(
            scores=Path(arguments.scores),
            pool=pool,
            folder=output,
            candidates=settings.candidates,
            chosen=selection.selection_settings(chosen),
            score_on_target=on_target,
        ),
        kept="candidates.parquet.shards/*/*.parquet",
    )
    if not arguments.json:
        summary.print_refinement(record)
    return record


def finetune(arguments: Namespace) -> dict[str, Any]:
    """`iprox finetune`."""
    settings = validate_section(FinetuneSection, **options.training_of(arguments))
    session, pool = options.session_of(arguments), options.pool_of(arguments.data, arguments, "data")
    tests = options.tasks_of(arguments.validation, arguments)
    options.check_training(arguments)
    output = options.new_folder(arguments.output)
    session.read(pool)
    examples = list(pool)
    record = options.single_stage(
        session,
        "finetune",
        output,
        arguments,
        lambda: training.finetune(session, arguments.model, examples, output, settings, tests),
    )
    if not arguments.json:
        summary.print_test_losses(record)
    return record


def export(arguments: Namespace) -> dict[str, Any]:
    """`iprox export`."""
    if (Path(arguments.source) / DESCRIPTION).is_file():
        rows = indexing.export_faiss(GradientIndex.open(arguments.source), Path(arguments.output))
        if not arguments.json:
            say_plainly(f"FAISS index of {rows:,} normalized gradients: {arguments.output}")
        return {"output": arguments.output, "rows": rows}
    session = options.session_of(arguments)
    output = options.new_folder(arguments.output)
    # Keep the proxy's own number format unless asked for another: exporting should not round.
    dtype = session.dtype if arguments.dtype not in (None, "auto") else stored_dtype(arguments.source)
    proxy = session.model(arguments.source, dtype)
    if proxy_config(proxy) is None:
        raise InputError(f"{arguments.source}: is neither an iprox proxy nor an index, so there is nothing to export")
    save_model(to_dense(proxy), session.tokenizer(arguments.source), output)
    if not arguments.json:
        say_plainly(f"dense checkpoint, loads without iprox: {output}")
    return {"output": str(output)}


def push(arguments: Namespace) -> dict[str, Any]:
    """`iprox push`."""
    address = hub.push(Path(arguments.proxy), arguments.repo, private=arguments.private, revision=arguments.revision)
    if not arguments.json:
        say_plainly(address)
    return {"commit": address}
