"""`iprox index` and `iprox query`; each returns plain data for `--json`."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from iprox.cli import options
from iprox.engine.shards import IDENTITY
from iprox.errors import InputError
from iprox.influence.index import DESCRIPTION, GradientIndex
from iprox.influence.job import Checkpoint
from iprox.models.loading import checkpoint_fingerprint
from iprox.stages import indexing


def index(arguments: Namespace) -> dict[str, Any]:
    """`iprox index`."""
    settings = options.influence_of(arguments)
    session, pool = options.session_of(arguments), options.pool_of(arguments.pool, arguments)
    output = options.resumable_folder(arguments.output, IDENTITY, IDENTITY, DESCRIPTION, "*.arrow", "*.partial")
    session.read(pool)
    warmed = None
    if settings.traits.optimizer:
        target = options.query_target(arguments.model, arguments, settings, session)
        warmed = options.warmed_folder(arguments.model, target, settings)
    elif arguments.target:
        raise InputError("--target goes with --estimator less; a query names its own")
    model = Checkpoint(arguments.model, optimizer=warmed)
    fingerprint = checkpoint_fingerprint(arguments.model)
    return options.single_stage(
        session,
        "index",
        output,
        arguments,
        lambda: indexing.build_index(session, model, pool, output, settings, arguments.dimension, fingerprint),
        kept="*.arrow",
    )


def query(arguments: Namespace) -> dict[str, Any]:
    """`iprox query`."""
    indexes = [GradientIndex.open(folder) for folder in arguments.index]
    about = [each.description for each in indexes]
    models = arguments.model or [each["model"] for each in about]
    if len(models) != len(indexes):
        raise InputError(f"{len(indexes)} indexes but {len(models)} models")
    for model, each in zip(models, about, strict=True):
        if checkpoint_fingerprint(model) != each["model_fingerprint"]:
            raise InputError(f"{model}: is not the model of the index (its files differ); give the right --model")
    for key in ("estimator", "max_length", "chat_template"):
        if any(each[key] != about[0][key] for each in about):
            raise InputError(f"the indexes differ in {key}, so their scores cannot be summed")
    # Validation examples are read as the pool was.
    arguments.estimator = about[0]["estimator"]
    arguments.max_length = arguments.max_length or about[0]["max_length"]
    arguments.chat_template = arguments.chat_template or about[0]["chat_template"]
    settings = options.influence_of(arguments)
    session = options.session_of(arguments)
    validation = options.tasks_of(arguments.validation, arguments)
    rates = options.learning_rates_of(models, arguments.learning_rates)
    output = options.new_folder(arguments.output)
    targets = [options.query_target(model, arguments, settings, session) for model in models]
    checkpoints = [Checkpoint(*each) for each in zip(models, rates, targets, strict=True)]
    identity = {
        "index": [each["pool"] for each in about],
        "models": [each["model_fingerprint"] for each in about],
        "targets": [target and checkpoint_fingerprint(target) for target in targets],
        "validation": {task: source.scan().fingerprint for task, source in validation.items()},
        "dimension": [each["dimension"] for each in about],
        "learning_rates": rates,
        "max_length": session.max_length,
        **settings.model_dump(include={"estimator", "normalize"}),
    }
    return options.single_stage(
        session,
        "query",
        output,
        arguments,
        lambda: indexing.query_indexes(
            session, indexes, checkpoints, validation, output / "scores.parquet", settings, identity
        ),
    )
