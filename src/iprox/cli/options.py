"""From parsed options to what the commands work with: a session, pools, settings, an output folder."""

from __future__ import annotations

import math
import shutil
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from iprox.data import Pool
from iprox.data.sampling import draw_rows
from iprox.errors import InputError, cut
from iprox.files import check_output, check_path
from iprox.models.adapters import check_lora
from iprox.models.checkpoint import proxy_description
from iprox.models.loading import load_config, model_fingerprint, skeleton
from iprox.models.optimizer_state import load_adam_state
from iprox.models.saving import CHECKPOINTS
from iprox.progress import Reporter, say_plainly
from iprox.recipe import validate_section
from iprox.run_folder import StageRecord, environment, read_json, write_json
from iprox.scores import read_scores_schema, scores_metadata
from iprox.session import Session
from iprox.settings import InfluenceSection
from iprox.stages.held_out import HeldOutRows

# Probe examples unless asked otherwise: past some hundreds the moments hardly change.
PROBE_SIZE = 512

# Settings of influence that a target's scores of a proxy's best rows do not take over.
OF_A_PROXY = {"query", "query_norm", "per_example", "compile"}


def session_of(arguments: Namespace) -> Session:
    """The session that a command's options ask for."""
    given = {name: getattr(arguments, name, None) for name in ("batch_tokens", "max_length", "seed", "num_proc")}
    return Session.create(
        getattr(arguments, "device", None) or "auto",
        getattr(arguments, "dtype", None) or "auto",
        trust_remote_code=getattr(arguments, "trust_remote_code", False),
        chat_template=getattr(arguments, "chat_template", None),
        skip_refused=getattr(arguments, "on_bad_row", "stop") == "skip",
        reporter=Reporter(arguments.quiet),
        **{name: value for name, value in given.items() if value is not None},
    )


def training_of(arguments: Namespace) -> dict[str, Any]:
    """The keys of a training's section that `training_options` give.

    Raises:
        InputError: a scale of adapters without adapters.
    """
    if arguments.lora_alpha is not None and arguments.lora is None:
        raise InputError("--lora-alpha scales adapters, which there are none of: add --lora, or leave it out")
    given = {name: getattr(arguments, name) for name in ("epochs", "batch_size", "accumulate")}
    if arguments.learning_rate is not None:  # otherwise the section knows which
        given["learning_rate"] = arguments.learning_rate
    if arguments.lora is not None:
        given["lora"] = {"rank": arguments.lora, "alpha": arguments.lora_alpha}
    return given


def check_training(arguments: Namespace) -> None:
    """Refuse adapters on a model that cannot have them, before any work."""
    if arguments.lora is not None:
        check_lora(skeleton(arguments.model, trust_remote_code=arguments.trust_remote_code), arguments.model)


def pool_of(files: list[str], arguments: Namespace, name: str = "pool") -> Pool:
    """The examples of some files."""
    return Pool(files, name=name, on_bad_row=arguments.on_bad_row, columns=columns_of(arguments.columns))


def columns_as_scored(arguments: Namespace) -> None:
    """Read the pool's columns as they were when it was scored, unless `--columns` says how."""
    if not arguments.columns:
        columns: Any = scores_metadata(read_scores_schema(arguments.scores)).get("columns", {})
        arguments.columns = [f"{known}={own}" for known, own in columns.items()]


def influence_as_scored(arguments: Namespace) -> InfluenceSection:
    """The settings that a scores table was made with; examples are also cut, and samples drawn, as they were.

    Settings that are of a proxy only, or of how the work was done, are left at their defaults.

    Raises:
        InputError: the table does not say how it was made.
    """
    made: Any = scores_metadata(read_scores_schema(arguments.scores))
    if "estimator" not in made:
        raise InputError(
            f"{arguments.scores}: does not say how it was scored, so the target cannot score rows alike; give what "
            "iprox score, query or run has written"
        )
    for name in ("max_length", "seed"):
        if getattr(arguments, name) is None:
            setattr(arguments, name, made.get(name))
    names = InfluenceSection.model_fields.keys() - OF_A_PROXY
    return validate_section(InfluenceSection, **{name: made[name] for name in names if name in made})


def tasks_of(pairs: list[str], arguments: Namespace) -> dict[str, Pool]:
    """The validation sets of `TASK=FILE` pairs.

    Raises:
        InputError: a pair is written otherwise.
    """
    files: dict[str, list[str]] = {}
    for pair in pairs:
        task, equals, file = pair.partition("=")
        if not equals or not task or not file:
            raise InputError(f"--validation {pair}: write it as TASK=FILE, e.g. gsm8k=gsm8k.val.jsonl")
        files.setdefault(task, []).append(file)
    return {task: pool_of(names, arguments, task) for task, names in files.items()}


def numbers_of(pairs: list[str], option: str, form: str = "SOURCE=SHARE, e.g. gsm8k=0.1") -> dict[str, float]:
    """The numbers of `NAME=NUMBER` pairs by name.

    Args:
        pairs: as given.
        option: which they are of.
        form: how they are to be written.

    Raises:
        InputError: a pair is written otherwise.
    """
    numbers = {}
    for pair in pairs:
        name, equals, number = pair.rpartition("=")
        try:
            numbers[name] = float(number)
        except ValueError:
            equals = ""
        if not equals or not name:
            raise InputError(f"{option} {pair}: write it as {form}")
    return numbers


def columns_of(pairs: list[str]) -> dict[str, str]:
    """Columns by the name that iprox knows, of `NAME=YOURS` pairs.

    Raises:
        InputError: a pair is written otherwise.
    """
    columns = {}
    for pair in pairs:
        known, equals, own = pair.partition("=")
        if not equals or not known:
            raise InputError(f"--columns {pair}: write it as NAME=YOURS, e.g. output=response (NAME= reads none)")
        columns[known] = own
    return columns


def cap_of(given: list[str]) -> float | dict[str, float] | None:
    """One cap for any source, or caps by source."""
    if len(given) == 1 and "=" not in given[0]:
        try:
            return float(given[0])
        except ValueError as error:
            raise InputError(f"--source-cap {given[0]}: give a share such as 0.3, or SOURCE=0.3 ...") from error
    return numbers_of(given, "--source-cap") or None


def influence_of(arguments: Namespace) -> InfluenceSection:
    """The settings of influence; what is not given, or no option of the command, is at its default."""
    names = (
        *("estimator", "curvature_examples", "damping"),
        *("query", "query_norm", "normalize", "per_example", "compile"),
    )
    given = {name: getattr(arguments, name, None) for name in names}
    return validate_section(InfluenceSection, **{name: value for name, value in given.items() if value is not None})


def held_out_of(arguments: Namespace) -> HeldOutRows | None:
    """The rows that fidelity is measured on while a proxy is made, where they are given.

    Raises:
        InputError: --held-out without --validation, or the other way round.
    """
    if bool(arguments.held_out) != bool(arguments.validation):
        raise InputError("--held-out goes with --validation: fidelity is of scores for some task")
    if not arguments.held_out:
        return None
    pool = pool_of(arguments.held_out, arguments, "held-out")
    pool.scan()
    return HeldOutRows(list(pool), tasks_of(arguments.validation, arguments), validate_section(InfluenceSection), pool)


def query_target(model: str, arguments: Namespace, settings: InfluenceSection, session: Session) -> str | None:
    """Where the validation gradients of a scored model are taken: the target, given or named by a proxy; None: on it.

    A proxy whose target is not to be found is scored with its own, and that is said.

    Raises:
        InputError: --target with a model that is no factorized proxy, or the target is not the proxy's.
    """
    proxy = proxy_description(load_config(model, trust_remote_code=session.trust_remote_code), model)
    if proxy is None or not proxy.ranks:
        if arguments.target:
            raise InputError(f"--target {arguments.target}: goes with a low-rank proxy, which {model} is not")
        return None
    if settings.query == "proxy" or not settings.traits.gradients:
        if arguments.target:
            why = (
                "--query proxy" if settings.traits.gradients else f"--estimator {settings.estimator} takes no gradients"
            )
            raise InputError(f"--target {arguments.target}: is not used with {why}; leave one of the two out")
        return None
    target = arguments.target or proxy.target
    try:
        loaded = _target_model(str(target), session, named=bool(arguments.target))
    except InputError as error:
        if arguments.target:
            raise
        session.reporter.warn(
            f"the target of {model} cannot be read ({error}); validation gradients are taken on the proxy, which is "
            "less faithful: give --target"
        )
        return None
    if proxy.target_fingerprint not in (None, model_fingerprint(loaded)):
        raise InputError(
            f"{target}: is not the target of {model} (the weights differ); give the right --target, or --query proxy"
        )
    return str(target)


def _target_model(target: str, session: Session, *, named: bool) -> PreTrainedModel:
    """The target of a proxy, loaded.

    What only the proxy's config names is read if it is a folder here: whoever wrote the proxy does not choose what is
    fetched from the hub.

    Raises:
        InputError: it is none, or cannot be loaded.
    """
    if not named:
        printable = "".join(each if each.isprintable() else "?" for each in cut(target))
        check_path(target)
        if not Path(target).is_dir():
            raise InputError(f"there is no folder {printable} here; --target {printable} fetches it from the hub")
    with session.own_warnings():
        return session.model(target)


def warmed_folder(model: str, target: str | None, settings: InfluenceSection) -> str | None:
    """The folder that holds the optimizer's state, for the estimator `less`.

    Raises:
        InputError: it holds none.
    """
    if not settings.traits.optimizer:
        return None
    load_adam_state(target or model)  # refused now rather than after the model is loaded
    return target or model


def sample_of(pool: Pool, session: Session, name: str, size: int | None) -> list[Any]:
    """A seeded random sample of a pool's examples."""
    total = session.read(pool).rows
    if size is None:
        size = min(PROBE_SIZE, total)
    elif size > total:
        session.reporter.warn(f"{name}: {size} examples asked for, the files hold only {total}; all are used")
    return pool.take(draw_rows(name, session.seed, total, size))


def learning_rates_of(models: list[str], given: list[float] | None) -> list[float]:
    """As given, else from the `checkpoints.json` that the warm-up wrote beside them; 1 for a single model."""
    if given is not None:
        if len(given) != len(models):
            raise InputError(f"{len(models)} models but {len(given)} learning rates")
        if not all(0 < rate < math.inf for rate in given):
            raise InputError(f"--learning-rates {' '.join(map(str, given))}: each must be a number above 0")
        return given
    if len(models) == 1:
        return [1.0]
    rates = []
    for model in models:
        listing = Path(model).parent / CHECKPOINTS
        known = {entry["path"]: entry["learning_rate"] for entry in read_json(listing)} if listing.is_file() else {}
        if Path(model).name not in known:
            raise InputError(f"{model}: its learning rate is not in {listing}; give --learning-rates")
        rates.append(known[Path(model).name])
    return rates


def new_folder(path: str) -> Path:
    """An output folder that holds nothing yet.

    Raises:
        InputError: it holds something.
    """
    folder = check_output(path)
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder}: exists already; choose another output or remove it")
    return folder


def resumable_folder(path: str, marker: str, *left: str) -> Path:
    """An output folder that holds nothing, or what an interrupted command left.

    Args:
        path: the folder.
        marker: the file in it by which the command knows what it left; without it nothing there is taken for ours.
        left: names or patterns of all that the command may have left.

    Raises:
        InputError: it holds something else.
    """
    folder = check_output(path)
    if (folder / marker).is_file() and all(any(fnmatch(file.name, name) for name in left) for file in folder.iterdir()):
        return folder
    return new_folder(path)


def single_stage(
    session: Session,
    name: str,
    output: Path,
    arguments: Namespace,
    work: Callable[[], StageRecord],
    kept: str | None = None,
) -> dict[str, Any]:
    """Do one stage by itself and write its `run.json` beside its output.

    What it leaves half-made goes, unless files of the pattern `kept` are there, which the same command goes on after.
    What was there before stays.
    """
    existed = output.exists()
    before = set(output.iterdir()) if existed else set()
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
        if kept is None or not any(output.glob(kept)):
            for made in set(output.iterdir()) - before if existed else {output}:
                shutil.rmtree(made) if made.is_dir() else made.unlink(missing_ok=True)
        shutil.rmtree(output.with_name(output.name + ".partial"), ignore_errors=True)
        raise
    if not arguments.json:
        say_plainly(f"{name}: {record['seconds']:.1f} s, {output}")
    return {**record, "output": str(output)}
