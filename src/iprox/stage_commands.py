"""The commands for single stages; each returns plain data for `--json`."""

from __future__ import annotations

import shutil
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from iprox import hub, score_stages, stages, summary
from iprox.data import Pool
from iprox.errors import InputError
from iprox.finetune import save_model
from iprox.models.checkpoint import proxy_config
from iprox.models.loading import checkpoint_fingerprint, load_config, model_fingerprint, stored_dtype
from iprox.models.optimizer_state import load_adam_state
from iprox.progress import Reporter
from iprox.proxy.export import to_dense
from iprox.recipe import (
    SIZES,
    AlignSection,
    FinetuneSection,
    InfluenceSection,
    ProbeSection,
    ProxySection,
    SelectSection,
    WarmupSection,
    validate_section,
)
from iprox.run_folder import environment, read_json, write_json
from iprox.session import Session, draw_rows

# Probe examples unless asked otherwise: past some hundreds the moments hardly change.
PROBE_SIZE = 512

SHARDS = "scores.parquet.shards"


def warmup(arguments: Namespace) -> dict[str, Any]:
    """`iprox warmup`."""
    settings = validate_section(
        WarmupSection,
        fraction=arguments.fraction,
        epochs=arguments.epochs,
        learning_rate=arguments.learning_rate,
        batch_size=arguments.batch_size,
    )
    session, pool = _session(arguments), _pool(arguments.pool, arguments)
    output = _new_folder(arguments.output)
    total = session.read(pool).rows
    rows = draw_rows("warmup", session.seed, total, max(1, round(total * settings.fraction)))
    return _single(
        session,
        "warmup",
        output,
        arguments,
        lambda: stages.warm_up(
            session, arguments.model, pool.take(rows), output, settings, optimizer_state=arguments.optimizer_state
        ),
    )


def compress(arguments: Namespace) -> dict[str, Any]:
    """`iprox compress`."""
    settings = validate_section(
        ProxySection,
        **{name: getattr(arguments, name) for name in (*SIZES, "method", "ranks")},
        ridge=arguments.ridge,
        model=arguments.proxy_model,
        probe=validate_section(ProbeSection, labels=arguments.probe_labels, tokens=arguments.probe_tokens),
    )
    session, pool = _session(arguments), _pool(arguments.probe, arguments, "probe")
    output = _new_folder(arguments.output)
    examples = _sample(pool, session, "probe", arguments.probe_size)
    return _single(
        session,
        "compress",
        output,
        arguments,
        lambda: stages.compress(session, arguments.model, examples, output, settings),
    )


def align(arguments: Namespace) -> dict[str, Any]:
    """`iprox align`."""
    settings = validate_section(
        AlignSection,
        learning_rate=arguments.learning_rate,
        kl_weight=arguments.kl_weight,
        temperature=arguments.temperature,
    )
    session, pool = _session(arguments), _pool(arguments.data, arguments, "data")
    output = _new_folder(arguments.output)
    session.read(pool)
    examples = list(pool)
    return _single(
        session,
        "align",
        output,
        arguments,
        lambda: stages.align_proxy(
            session, arguments.model, arguments.proxy, examples, output, settings, arguments.steps
        ),
    )


def score(arguments: Namespace) -> dict[str, Any]:
    """`iprox score`."""
    settings = _influence(arguments)
    session, pool = _session(arguments), _pool(arguments.pool, arguments)
    validation = _tasks(arguments.validation, arguments)
    rates = _learning_rates(arguments.model, arguments.learning_rates)
    if settings.gradient_free and len(rates) > 1:
        raise InputError(f"--model: checkpoints are summed by TracIn; {settings.estimator} takes one model")
    output = _scores_folder(arguments.output)
    identity = {
        "models": [checkpoint_fingerprint(model) for model in arguments.model],
        "pool": session.read(pool).fingerprint,
        "validation": {task: source.scan().fingerprint for task, source in validation.items()},
    }
    output.mkdir(parents=True, exist_ok=True)
    targets = [_query_target(model, arguments, settings, session) for model in arguments.model]
    identity["targets"] = [target and checkpoint_fingerprint(target) for target in targets]
    models = [
        score_stages.ScoredModel(model, rate, target, _warmed(model, target, settings))
        for model, rate, target in zip(arguments.model, rates, targets, strict=True)
    ]
    return _single(
        session,
        "score",
        output,
        arguments,
        lambda: score_stages.score(session, models, pool, validation, output / "scores.parquet", settings, identity),
    )


def select(arguments: Namespace) -> dict[str, Any]:
    """`iprox select`."""
    settings = validate_section(
        SelectSection, fraction=arguments.fraction, count=arguments.count, strategy=arguments.strategy
    )
    output = Path(arguments.output)
    # Named after the output, so that several selections in one folder keep theirs apart.
    description = output.with_name(f"{output.stem}.selection.json")
    pool = _pool(arguments.pool, arguments)
    record = stages.select(Path(arguments.scores), pool, output, description, settings)
    if not arguments.json:
        print(f"{record['count']:,} rows, best first: {output}")
    return {**record, "output": str(output)}


def audit(arguments: Namespace) -> dict[str, Any]:
    """`iprox audit`."""
    settings = _influence(arguments)
    session, pool = _session(arguments), _pool(arguments.pool, arguments)
    validation = _tasks(arguments.validation, arguments)
    output = _new_folder(arguments.output)
    examples = _sample(pool, session, "audit", arguments.sample)
    pairs = [(arguments.model, arguments.proxy, 1.0)]
    record = _single(
        session,
        "audit",
        output,
        arguments,
        lambda: score_stages.audit(session, pairs, examples, pool, validation, output, settings)[0],
    )
    if not arguments.json:
        summary.print_fidelity(read_json(output / "audit.json"))
    return {**record, **read_json(output / "audit.json")}


def finetune(arguments: Namespace) -> dict[str, Any]:
    """`iprox finetune`."""
    settings = validate_section(
        FinetuneSection,
        epochs=arguments.epochs,
        learning_rate=arguments.learning_rate,
        batch_size=arguments.batch_size,
    )
    session, pool = _session(arguments), _pool(arguments.data, arguments, "data")
    tests = _tasks(arguments.validation, arguments)
    output = _new_folder(arguments.output)
    session.read(pool)
    examples = list(pool)
    record = _single(
        session,
        "finetune",
        output,
        arguments,
        lambda: stages.finetune(session, arguments.model, examples, output, settings, tests),
    )
    if not arguments.json:
        summary.print_test_losses(record)
    return record


def export(arguments: Namespace) -> dict[str, Any]:
    """`iprox export`."""
    session = _session(arguments)
    output = _new_folder(arguments.output)
    # Keep the proxy's own number format unless asked for another: exporting should not round.
    dtype = session.dtype if arguments.dtype not in (None, "auto") else stored_dtype(arguments.proxy)
    proxy = session.model(arguments.proxy, dtype)
    if proxy_config(proxy) is None:
        raise InputError(f"{arguments.proxy}: is no iprox proxy, so there is nothing to multiply out")
    save_model(to_dense(proxy), session.tokenizer(arguments.proxy), output)
    if not arguments.json:
        print(f"dense checkpoint, loads without iprox: {output}")
    return {"output": str(output)}


def push(arguments: Namespace) -> dict[str, Any]:
    """`iprox push`."""
    address = hub.push(Path(arguments.proxy), arguments.repo, private=arguments.private, revision=arguments.revision)
    if not arguments.json:
        print(address)
    return {"commit": address}


def _session(arguments: Namespace) -> Session:
    given = {name: getattr(arguments, name) for name in ("batch_tokens", "max_length", "seed")}
    return Session.create(
        arguments.device or "auto",
        arguments.dtype or "auto",
        trust_remote_code=getattr(arguments, "trust_remote_code", False),
        chat_template=getattr(arguments, "chat_template", None),
        reporter=Reporter(arguments.quiet),
        **{name: value for name, value in given.items() if value is not None},
    )


def _pool(files: list[str], arguments: Namespace, name: str = "pool") -> Pool:
    return Pool(files, name=name, on_bad_row=arguments.on_bad_row)


def _tasks(pairs: list[str], arguments: Namespace) -> dict[str, Pool]:
    files: dict[str, list[str]] = {}
    for pair in pairs:
        task, equals, file = pair.partition("=")
        if not equals or not task or not file:
            raise InputError(f"--validation {pair}: write it as TASK=FILE, e.g. gsm8k=gsm8k.val.jsonl")
        files.setdefault(task, []).append(file)
    return {task: _pool(names, arguments, task) for task, names in files.items()}


def _influence(arguments: Namespace) -> InfluenceSection:
    names = (
        *("estimator", "curvature", "curvature_examples", "damping"),
        *("gradient", "query", "query_norm", "normalise", "aggregate", "over_examples", "per_example", "compile"),
    )
    given = {name: getattr(arguments, name) for name in names}
    return validate_section(InfluenceSection, **{name: value for name, value in given.items() if value is not None})


def _query_target(model: str, arguments: Namespace, settings: InfluenceSection, session: Session) -> str | None:
    """Where the validation gradients of a scored model are taken: the target, given or named by a proxy; None: on it.

    A proxy whose target is not to be found is scored with its own, and that is said.

    Raises:
        InputError: --target with a model that is no factorised proxy, or the target is not the proxy's.
    """
    config = load_config(model, trust_remote_code=session.trust_remote_code)
    proxy = getattr(config, "quantization_config", None) or {}
    if proxy.get("quant_method") != "iprox" or not proxy["ranks"]:
        if arguments.target:
            raise InputError(f"--target {arguments.target}: goes with a low-rank proxy, which {model} is not")
        return None
    if settings.query == "proxy" or settings.gradient_free:
        return None
    target = arguments.target or proxy["target"]
    try:
        loaded = session.model(str(target))
    except InputError as error:
        if arguments.target:
            raise
        session.reporter.warn(
            f"the target of {model} cannot be read ({error}); validation gradients are taken on the proxy, which is "
            "less faithful: give --target"
        )
        return None
    if proxy["target_fingerprint"] not in (None, model_fingerprint(loaded)):
        raise InputError(
            f"{target}: is not the target of {model} (the weights differ); give the right --target, or --query proxy"
        )
    return str(target)


def _warmed(model: str, target: str | None, settings: InfluenceSection) -> str | None:
    """The folder that holds the optimizer's state, for the estimator `adam`.

    Raises:
        InputError: it holds none.
    """
    if settings.estimator != "adam":
        return None
    load_adam_state(target or model)  # refused now rather than after the model is loaded
    return target or model


def _sample(pool: Pool, session: Session, name: str, size: int | None) -> list[Any]:
    total = session.read(pool).rows
    if size is None:
        size = min(PROBE_SIZE, total)
    elif size > total:
        session.reporter.warn(f"{name}: {size} examples asked for, the files hold only {total}; all are used")
    return pool.take(draw_rows(name, session.seed, total, size))


def _learning_rates(models: list[str], given: list[float] | None) -> list[float]:
    """As given, else from the `checkpoints.json` that the warm-up wrote beside them; 1 for a single model."""
    if given is not None:
        if len(given) != len(models):
            raise InputError(f"{len(models)} models but {len(given)} learning rates")
        return given
    if len(models) == 1:
        return [1.0]
    rates = []
    for model in models:
        listing = Path(model).parent / "checkpoints.json"
        known = {entry["path"]: entry["learning_rate"] for entry in read_json(listing)} if listing.is_file() else {}
        if Path(model).name not in known:
            raise InputError(f"{model}: its learning rate is not in {listing}; give --learning-rates")
        rates.append(known[Path(model).name])
    return rates


def _new_folder(path: str) -> Path:
    """An output folder that holds nothing yet.

    Raises:
        InputError: it holds something.
    """
    folder = Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: exists already; choose another output or remove it")
    return folder


def _scores_folder(path: str) -> Path:
    """An output folder that holds nothing, or the shards of an interrupted scoring."""
    folder = Path(path)
    if folder.is_dir() and [file.name for file in folder.iterdir()] == [SHARDS]:
        return folder
    return _new_folder(path)


def _single(
    session: Session, name: str, output: Path, arguments: Namespace, work: Callable[[], stages.StageRecord]
) -> dict[str, Any]:
    """Do one stage by itself and write its `run.json` beside its output; what it left half-made goes."""
    existed = output.exists()
    try:
        with session.metered() as usage:
            record = work()
        record = {**record, **asdict(usage), "warnings": session.reporter.take_warnings(), "skipped": False}
        write_json(
            output / "run.json",
            {
                **environment(),
                "command": arguments.started_as,
                "seed": session.seed,
                "device": str(session.device),
                "dtype": str(session.dtype).removeprefix("torch."),
                "stages": {name: record},
            },
        )
    except BaseException:
        # Whole shards of scores are kept: the same command goes on after them.
        if not any((output / SHARDS).rglob("*.parquet")):
            shutil.rmtree(output, ignore_errors=True)
            if existed:
                output.mkdir()
        shutil.rmtree(output.with_name(output.name + ".partial"), ignore_errors=True)
        raise
    if not arguments.json:
        print(f"{name}: {record['seconds']:.1f} s, {output}")
    return {**record, "output": str(output)}
