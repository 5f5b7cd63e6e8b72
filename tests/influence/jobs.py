"""Jobs and scorers from a few arguments: TracIn of whole gradients unless a test says otherwise."""

from letters import Letters

from iprox.influence.estimators.base import Inputs
from iprox.influence.estimators.registry import REGISTRY
from iprox.influence.job import Checkpoint, Job
from iprox.settings import InfluenceSection

PLAIN = {"estimator": "tracin", "normalize": "none", "per_example": False}


def settings_of(**settings) -> InfluenceSection:
    return InfluenceSection(**{**PLAIN, **settings})


def job_of(models, validation, *, target=None, sample=(), corpus=None, encoder=None, loss_fn=None, **given) -> Job:
    """The job of one model, or of several with `rates`; settings and attributes of the job by keyword."""
    models = list(models) if isinstance(models, list) else [models]
    rates = given.pop("rates", None) or [1.0] * len(models)
    how = {name: given.pop(name) for name in ("seed", "batch_tokens", "load") if name in given}
    if loss_fn is not None:
        how["loss_fn"] = loss_fn
    if given.get("estimator") in ("random", "length", "perplexity", "rds", "bm25"):
        given = {"per_example": False, **given}
        settings = InfluenceSection(**given)
    else:
        settings = settings_of(**given)
    checkpoints = [Checkpoint(model, rate, target) for model, rate in zip(models, rates, strict=True)]
    return Job(
        settings=settings,
        checkpoints=checkpoints,
        validation=validation,
        encoder=encoder or Letters(),
        sample=sample,
        corpus=corpus,
        **how,
    )


def scorer_of(model, validation, **given):
    return job_of(model, validation, **given).scorer()[0]


def scorer_of_batches(model, validation, *, target=None, sample=(), optimizer=None, **settings):
    """The scorer of batches that are made already."""
    chosen = settings_of(**settings)
    inputs = Inputs(
        settings=chosen, model=model, target=target, validation=validation, sample=sample, optimizer=optimizer
    )
    return REGISTRY[chosen.estimator].scorer(inputs)


def preconditioned(model, queries, sample, estimator="ekfac", *, damping=0.1, seed=0):
    """(F + λI)⁻¹ Ḡ of every task."""
    settings = settings_of(estimator=estimator, damping=damping)
    inputs = Inputs(settings=settings, model=model, validation={}, sample=sample, seed=seed)
    return REGISTRY[estimator].precondition(queries, inputs)
