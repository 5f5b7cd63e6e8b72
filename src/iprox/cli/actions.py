"""The functions behind the commands; each returns plain data for `--json`."""

from __future__ import annotations

import hashlib
import math
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from iprox.cli import summary
from iprox.cli.parser import Request
from iprox.data.locate import COMPRESSIONS
from iprox.engine.cluster import check_ray
from iprox.errors import InputError
from iprox.files import check_output, expanded, not_regular
from iprox.harness import check_harness
from iprox.influence.index import DESCRIPTION, GradientIndex
from iprox.influence.job import Checkpoint
from iprox.metering import measured_gemm_rate
from iprox.models.adapters import check_lora
from iprox.models.checkpoint import proxy_config
from iprox.models.loading import checkpoint_fingerprint, skeleton, stored_dtype
from iprox.models.saving import CHECKPOINTS, learning_rates_in, save_model
from iprox.progress import Reporter, say_plainly
from iprox.proxy.export import to_dense
from iprox.recipe import resolved, validated
from iprox.records import read_json
from iprox.run import steps
from iprox.run.folder import RunFolder
from iprox.run.plan import plan_recipe, warn_of_memory
from iprox.run.runner import Run
from iprox.run.single import single_run
from iprox.run.whole import run_recipe
from iprox.scores import read_scores_schema, scores_metadata
from iprox.session import Session, pool_of, tasks_of
from iprox.settings import (
    AuditSection,
    FinetuneSection,
    InfluenceSection,
    ProxySection,
    RefineSection,
    Settings,
    WarmupSection,
)
from iprox.stages import indexing, selection
from iprox.stages.compression import check_size
from iprox.stages.targets import query_target, warmed_folder

# Settings of influence that concern proxies or speed; `iprox refine` leaves them at their defaults.
OF_A_PROXY = {"query", "query_norm", "per_example"}


def quickstart(request: Request) -> dict[str, Any]:
    """Run the bundled recipe."""
    result = run(request)
    if not request.json:
        say_plainly(
            "The bundled model is tiny: curvature and the output head are most of its cost, and a proxy shares them. "
            "`iprox plan RECIPE.yaml` says what a recipe of yours would cost."
        )
    return result


def run(request: Request) -> dict[str, Any]:
    """Run a recipe."""
    assert request.recipe is not None
    done = run_recipe(
        request.recipe,
        reporter=Reporter(request.quiet),
        fresh=request.inputs["fresh"],
        stop_after=request.inputs.get("stop_after"),
        command=request.line,
        before=warn_of_memory,
    )
    if not request.json:
        summary.print_run(done.folder)
    return summary.run_summary(done.folder)


def plan(request: Request) -> dict[str, Any]:
    """Predict the cost of a recipe."""
    assert request.recipe is not None
    recipe, tflops = resolved(request.recipe), request.inputs["tflops"]
    if tflops is not None and not 0 < tflops < math.inf:
        raise InputError(f"--tflops {tflops}: must be a positive number")
    session = Session.of(recipe, Reporter(request.quiet))
    rate = tflops * 1e12 if tflops else measured_gemm_rate(session.device, session.dtype, seconds=0.1)
    planned = plan_recipe(recipe, session, rate)
    if not request.json:
        summary.print_plan(planned)
    return planned


def report(request: Request) -> dict[str, Any]:
    """Write the report of a run again."""
    from iprox.report.page import build_report

    path = build_report(expanded(request.inputs["run_dir"]))
    if not request.json:
        say_plainly(str(path))
    return {"report": str(path)}


def push(request: Request) -> dict[str, Any]:
    """Push a proxy, a selection or a report to the Hub."""
    from iprox.hub import push

    inputs = request.inputs
    address = push(expanded(inputs["source"]), inputs["repo"], public=inputs["public"])
    if not request.json:
        say_plainly(address)
    return {"url": address}


def warmup(request: Request) -> dict[str, Any]:
    """Fine-tune a model briefly on a share of the pool."""
    settings = _on(request, "warmup", WarmupSection())
    assert settings.warmup
    if request.inputs["optimizer_state"]:
        if settings.warmup.lora:
            raise InputError("--optimizer-state keeps Adam's moments of the weights, which --lora does not train")
        settings.influence.estimator = "less"
    _check_lora(settings, settings.warmup.lora)
    with _single(request, settings, "warmup", model=settings.model) as done:
        steps.warm_up(done)
    return _finished(request, done, "warmup")


def compress(request: Request) -> dict[str, Any]:
    """Derive a proxy from a model."""
    settings = _on(request, "proxy", ProxySection())
    assert settings.proxy
    assert settings.model
    if (settings.proxy.fidelity is not None) != bool(settings.data.validation):
        raise InputError("--fidelity and --validation go together: fidelity is measured by the scores for a task")
    check_size(skeleton(settings.model, trust_remote_code=settings.trust_remote_code), settings.proxy)
    with _single(request, settings, "proxy", model=settings.model) as done:
        _at(done, settings.model)
        steps.compress(done)
    return _finished(request, done, "compress")


def align(request: Request) -> dict[str, Any]:
    """Tune a proxy's factors."""
    settings, proxy = _on(request, "proxy", ProxySection()), request.inputs["proxy"]
    if "proxy" not in settings.model_fields_set:
        settings.proxy = ProxySection(method="ipsvd")  # a proxy of the default method has no factors
    assert settings.proxy
    assert settings.model
    if not settings.proxy.align:
        raise InputError("proxy.align is false, so iprox align has nothing to do; leave that out")
    with _single(
        request, settings, "aligned", kept="align-state/*.safetensors", model=settings.model, proxy=proxy
    ) as done:
        _at(done, settings.model, proxy)
        steps.align(done)
    return _finished(request, done, "align")


def score(request: Request) -> dict[str, Any]:
    """Score a pool."""
    settings, inputs = request.settings, request.inputs
    influence, models = settings.influence, inputs["model"]
    rates = learning_rates_of(models, inputs["learning_rates"])
    if not influence.traits.gradients and len(rates) > 1:
        raise InputError(f"--model: {influence.estimator} takes one model; only gradient estimators sum checkpoints")
    session, pool = _session(request, settings), pool_of(settings.data.pool, settings)
    tasks_of(settings.data.validation, settings)  # refuses missing files before a model is loaded
    if settings.ray_workers:
        check_ray(settings.ray_workers, session.device.type)
    targets = [query_target(model, inputs["target"], influence, session) for model in models]
    scored = [
        Checkpoint(model, rate, target, warmed_folder(model, target, influence))
        for model, rate, target in zip(models, rates, targets, strict=True)
    ]
    known = {
        "models": [checkpoint_fingerprint(model) for model in models],
        "targets": [target and checkpoint_fingerprint(target) for target in targets],
        "learning rates": rates,
    }
    kept = f"{RunFolder('').scores.name}.shards/*/*.parquet"
    with _single(
        request, settings, "", session=session, pool=pool, read_by=models[0], kept=kept, identity=known
    ) as done:
        done.scored = scored
        steps.score(done)
    return _finished(request, done, "score")


def audit(request: Request) -> dict[str, Any]:
    """Compare a proxy's scores of a sample with the target's."""
    settings, proxy = _on(request, "audit", AuditSection()), request.inputs["proxy"]
    assert settings.audit
    assert settings.model
    with _single(
        request, settings, "audit", model=settings.model, proxy=proxy, read_by=settings.model, kept="retrained.json"
    ) as done:
        _at(done, settings.model, proxy)
        steps.audit(done)
    output = done.folder.path
    found = read_json(output / "audit.json")
    measured = {
        name: read_json(output / f"{name}.json") for name in ("lds", "removal") if getattr(settings.audit, name)
    }
    if not request.json:
        summary.print_fidelity(found)
        for name, result in measured.items():
            {"lds": summary.print_lds, "removal": summary.print_removal}[name](result)
    records = [done.record["stages"][name] for name in ("audit", *measured)]
    total = {name: sum(record[name] for record in records) for name in ("tokens", "flops", "seconds")}
    return {**_finished(request, done, "audit"), **total, **found, **measured}


def refine(request: Request) -> dict[str, Any]:
    """Score a proxy's best rows again on the target."""
    settings, scores = _on(request, "refine", RefineSection()), expanded(request.inputs["scores"])
    assert settings.model
    _as_scored(settings, scores)
    kept = "candidates.parquet.shards/*/*.parquet"
    with _single(
        request,
        settings,
        "refined",
        model=settings.model,
        read_by=settings.model,
        kept=kept,
        identity={"scores": _digest(scores)},
    ) as done:
        _at(done, settings.model)
        done.scores = scores
        steps.refine(done)
    if not request.json:
        record = done.record["stages"]["refine"]
        say_plainly(f"{record['candidates']:,} rows ({record['candidate_share']:.1%}) scored again on the target")
    return _finished(request, done, "refine")


def select(request: Request) -> dict[str, Any]:
    """Write the best rows of a pool."""
    settings, scores = request.settings, expanded(request.inputs["scores"])
    assert settings.output
    session = _session(request, settings)
    output = expanded(settings.output)
    if output.suffix.lower() in (".json", ".parquet", ".csv", *COMPRESSIONS):
        name = output.name.partition(".")[0]
        raise InputError(f"--output {output}: a selection is written as JSON lines; name it {name}.jsonl")
    if irregular := not_regular(output):
        raise InputError(f"--output {output}: {irregular.partition(';')[0]}; choose another name")
    _columns_as_scored(settings, scores)
    # Named after the output, so that several selections can be in one folder.
    description = output.with_name(f"{output.stem}.selection.json")
    pool = pool_of(settings.data.pool, settings)
    record = selection.select(session, scores, pool, output, description, settings.select, "command")
    if not request.json:
        say_plainly(f"{record['count']:,} rows, {record['tokens']:,} tokens, best first: {output}")
        for reason, number in record["passed_over"].items():
            say_plainly(f"passed over: {number:,} {reason}")
    return {**record, "warnings": session.reporter.take_warnings(), "output": str(output)}


def finetune(request: Request) -> dict[str, Any]:
    """Fine-tune a model on a selection."""
    settings = _on(request, "finetune", FinetuneSection())
    assert settings.finetune
    assert settings.model
    _check_lora(settings, settings.finetune.lora)
    if settings.finetune.evaluate:
        check_harness(settings.finetune.evaluate)
    with _single(
        request,
        settings,
        "finetune",
        pool=pool_of(settings.data.pool, settings, "selection"),
        tests=tasks_of(settings.finetune.test, settings),
        model=settings.model,
    ) as done:
        _at(done, settings.model)
        done.selected = list(done.pool)
        steps.finetune(done)
    record = _finished(request, done, "finetune")
    if not request.json:
        summary.print_test_losses(record)
        for line in summary.benchmark_lines(done.record["stages"].get("evaluate", {}).get("lm_eval", {})):
            say_plainly(line)
    return record


def index(request: Request) -> dict[str, Any]:
    """Build the gradient index of a pool."""
    settings, inputs = request.settings, request.inputs
    assert settings.model
    influence = InfluenceSection(estimator=inputs["estimator"])
    session, pool, warmed = _session(request, settings), pool_of(settings.data.pool, settings), None
    if influence.traits.optimizer:
        target = query_target(settings.model, inputs["target"], influence, session)
        warmed = warmed_folder(settings.model, target, influence)
    elif inputs["target"]:
        raise InputError("--target is only for --estimator less; iprox query has a --target of its own")
    model, dimension = Checkpoint(settings.model, optimizer=warmed), inputs["dimension"]
    fingerprint = checkpoint_fingerprint(settings.model)
    known = {"models": [fingerprint], "dimension": dimension, "estimator": influence.estimator}
    with _single(request, settings, "", session=session, pool=pool, kept="*.arrow", identity=known) as done:
        output = done.folder.path
        done.stage(
            "index",
            done.keys,
            lambda: [output / DESCRIPTION, *output.glob("*.arrow")],
            lambda: indexing.build_index(session, model, done.pool, output, influence, dimension, fingerprint),
        )
    return _finished(request, done, "index")


def query(request: Request) -> dict[str, Any]:
    """Score a pool with its index."""
    settings, inputs = request.settings, request.inputs
    indexes = [GradientIndex.open(folder) for folder in inputs["index"]]
    about = [each.description for each in indexes]
    models = inputs["model"] or [each["model"] for each in about]
    if len(models) != len(indexes):
        raise InputError(f"{len(indexes)} indexes but {len(models)} models")
    for model, each in zip(models, about, strict=True):
        if checkpoint_fingerprint(model) != each["model_fingerprint"]:
            raise InputError(f"{model}: is not the model of the index (its files differ); give the right --model")
    for key in ("estimator", "max_length", "chat_template"):
        if any(each[key] != about[0][key] for each in about):
            raise InputError(f"the indexes differ in {key}, so their scores cannot be summed")
    # Validation examples are read as the pool was.
    given = settings.influence.model_dump(exclude_unset=True)
    settings.influence = validated(InfluenceSection, {**given, "estimator": about[0]["estimator"]}, "the index")
    if "max_length" not in settings.data.model_fields_set:
        settings.data.max_length = about[0]["max_length"]
    settings.data.chat_template = settings.data.chat_template or about[0]["chat_template"]
    session = _session(request, settings)
    rates = learning_rates_of(models, inputs["learning_rates"])
    targets = [query_target(model, inputs["target"], settings.influence, session) for model in models]
    checkpoints = [Checkpoint(*each) for each in zip(models, rates, targets, strict=True)]
    identity = {
        "index": [each["pool"] for each in about],
        "models": [each["model_fingerprint"] for each in about],
        "targets": [target and checkpoint_fingerprint(target) for target in targets],
        "dimension": [each["dimension"] for each in about],
        "learning_rates": rates,
        "max_length": session.max_length,
        **settings.influence.model_dump(include={"estimator", "normalize"}),
    }
    with _single(request, settings, "", session=session, identity=identity, read_by=models[0]) as done:
        described = {**identity, "validation": done.record["identity"]["validation"]}
        file = done.folder.scores
        done.stage(
            "query",
            done.keys,
            lambda: [file],
            lambda: indexing.query_indexes(
                session, indexes, checkpoints, done.validation, file, settings.influence, described
            ),
        )
    return _finished(request, done, "query")


def export(request: Request) -> dict[str, Any]:
    """Write a proxy as a dense checkpoint."""
    source, output = str(expanded(request.inputs["source"])), str(expanded(request.inputs["output"]))
    session, folder = _session(request, request.settings), check_output(output)
    if folder.exists() and (folder.is_file() or any(folder.iterdir())):
        raise InputError(f"{folder}: exists already; choose another output or remove it")
    # Keep the proxy's dtype unless another is asked for: exporting should not round.
    dtype = session.dtype if request.settings.dtype != "auto" else stored_dtype(source)
    proxy = session.model(source, dtype)
    if proxy_config(proxy) is None:
        raise InputError(f"{source}: is not an iprox proxy, so there is nothing to export")
    save_model(to_dense(proxy), session.tokenizer(source), folder)
    if not request.json:
        say_plainly(f"dense checkpoint, which loads without iprox: {folder}")
    return {"output": str(folder)}


def learning_rates_of(models: list[str], given: list[float]) -> list[float]:
    """Return the learning rates given, else those in the `checkpoints.json` next to the models; 1 for a single model.

    Raises:
        InputError: a learning rate is missing, unknown or not positive.
    """
    if given:
        if len(given) != len(models):
            raise InputError(f"{len(models)} models but {len(given)} learning rates")
        if not all(0 < rate < math.inf for rate in given):
            raise InputError(f"--learning-rates {' '.join(map(str, given))}: each must be a positive number")
        return given
    if len(models) == 1:
        return [1.0]
    rates = []
    for model in models:
        listing = Path(model).parent / CHECKPOINTS
        known = learning_rates_in(listing)
        if Path(model).name not in known:
            raise InputError(f"{model}: its learning rate is not in {listing}; give --learning-rates")
        rates.append(known[Path(model).name])
    return rates


def _on(request: Request, name: str, default: Any) -> Settings:
    """Return the settings with the command's own section switched on."""
    settings = request.settings
    if not getattr(settings, name):
        if name in settings.model_fields_set:
            raise InputError(f"{name} is false, so iprox {request.command.name} has nothing to do; leave that out")
        setattr(settings, name, default)
    return settings


def _session(request: Request, settings: Settings) -> Session:
    return Session.of(settings, Reporter(request.quiet))


def _single(
    request: Request, settings: Settings, stage: str, *, session: Session | None = None, **options: Any
) -> AbstractContextManager[Run]:
    """Open the run of a command; the options are those of `single_run`."""
    session = session or _session(request, settings)
    return single_run(session, settings, request.command.name, request.line, stage, **options)


def _at(run: Run, model: str, proxy: str | None = None) -> None:
    """Set what earlier stages of a run would have set: the target and its proxy."""
    run.targets = [(model, 1.0)]
    run.proxies = [] if proxy is None else [proxy]
    run.keys |= dict.fromkeys(("warmup", "compress", "select"), run.keys["inputs"])


def _finished(request: Request, run: Run, stage: str) -> dict[str, Any]:
    """Print that a command is done, and return its record."""
    record, output = run.record["stages"][stage], str(run.folder.path)
    if not request.json:
        say_plainly(f"{stage}: {record['seconds']:.1f} s, {output}")
    return {**record, "output": output}


def _check_lora(settings: Settings, lora: Any) -> None:
    """Refuse adapters for a model that cannot have them, before any work."""
    if lora and settings.model:
        check_lora(skeleton(settings.model, trust_remote_code=settings.trust_remote_code), settings.model)


def _columns_as_scored(settings: Settings, scores: Path) -> None:
    """Use the column names that the pool was scored with, unless the command names columns, and read pairs as pairs."""
    made: Any = scores_metadata(read_scores_schema(scores))
    if not settings.data.columns:
        settings.data.columns = made.get("columns", {})
    if "loss" in made:
        settings.loss = made["loss"]


def _as_scored(settings: Settings, scores: Path) -> None:
    """Use the settings that a scores table was made with, so that the target scores in the same way.

    Settings that matter only for proxies or for speed keep their defaults.

    Raises:
        InputError: the table does not say how it was made.
    """
    made: Any = scores_metadata(read_scores_schema(scores))
    if "estimator" not in made:
        raise InputError(
            f"{scores}: does not say how it was made, so the target cannot score rows the same way; give scores that "
            "iprox score, query or run has written"
        )
    _columns_as_scored(settings, scores)
    if settings.loss == "dpo":
        settings.dpo.beta = made.get("beta", settings.dpo.beta)
        if made.get("reference") and settings.dpo.reference is None:
            raise InputError(f"{scores}: was scored against a reference model; give it: --set dpo.reference=MODEL")
    if "max_length" not in settings.data.model_fields_set and "max_length" in made:
        settings.data.max_length = made["max_length"]
    if "seed" not in settings.model_fields_set and "seed" in made:
        settings.seed = made["seed"]
    names = InfluenceSection.model_fields.keys() - OF_A_PROXY
    settings.influence = validated(InfluenceSection, {key: made[key] for key in names if key in made}, str(scores))


def _digest(scores: Path) -> str:
    """Return the SHA-256 hash of a scores table."""
    file = scores / "scores.parquet" if scores.is_dir() else scores
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
