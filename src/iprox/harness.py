"""Benchmarks of the fine-tuned model by EleutherAI's lm-evaluation-harness (`finetune.evaluate`)."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from iprox.errors import InputError, one_line
from iprox.files import expanded
from iprox.settings import EvaluateSection

# By task, then by metric (with its filter, e.g. `acc,none`): the value and its standard error, None if unknown.
Results = dict[str, dict[str, tuple[float, float | None]]]


def check_harness(settings: EvaluateSection) -> None:
    """Refuse tasks that the harness does not know, before anything is trained.

    Raises:
        InputError: the package is not installed, the folder of tasks is missing, or a task is unknown.
    """
    if find_spec("lm_eval") is None:
        raise InputError("finetune.evaluate needs lm-evaluation-harness: pip install 'iprox[eval]'")
    if settings.include is not None and not expanded(settings.include).is_dir():
        raise InputError(f"finetune.evaluate.include: {settings.include}: no such folder; give that of your tasks")
    manager = _tasks(settings)
    for name in settings.lm_eval:
        if not manager.match_tasks([name]):
            raise InputError(
                f"finetune.evaluate.lm_eval: {name}: no such task; `lm-eval ls tasks` lists them, and "
                "finetune.evaluate.include names a folder with your own"
            )


def tasks_key(settings: EvaluateSection) -> list[Any]:
    """Return what results depend on besides the model: the settings, the harness, and the files of your own tasks."""
    files = sorted(expanded(settings.include).rglob("*.*")) if settings.include else []
    digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.suffix in (".yaml", ".py")]
    return [settings.model_dump(exclude={"include"}), digests, version("lm_eval")]


def run_harness(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: EvaluateSection, batch_size: int
) -> Results:
    """Run the tasks on a model and return all metrics.

    Raises:
        InputError: the harness cannot run a task, for example because its dataset cannot be had.
    """
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    try:
        model_of: Any = HFLM
        wrapped = model_of(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        found: Any = simple_evaluate(
            wrapped,
            tasks=list(settings.lm_eval),
            task_manager=_tasks(settings),
            limit=settings.limit,
            apply_chat_template=settings.chat_template,
            log_samples=False,
        )
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"finetune.evaluate: lm-evaluation-harness failed: {one_line(error)}") from error
    results: Results = {}
    for task, values in found["results"].items():
        metrics = {name: value for name, value in values.items() if "," in name and isinstance(value, int | float)}
        for name, value in metrics.items():
            measure, _, extraction = name.partition(",")
            if not measure.endswith("_stderr"):
                error = metrics.get(f"{measure}_stderr,{extraction}")
                results.setdefault(task, {})[name] = (float(value), error)
    return results


def _tasks(settings: EvaluateSection) -> Any:
    return _task_manager(str(expanded(settings.include)) if settings.include else None)


@cache
def _task_manager(include: str | None) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include)  # reads thousands of files
