"""The whole method, stage by stage: each reads and writes the run folder and is skipped when it is done.

data → warm-up → compress → align → audit → score → refine → select → fine-tune → report. A stage is done when
`run.json` has its key (its settings, its inputs' fingerprints and the keys of the stages it reads) and its output is
there. Keys hold no paths, so a run folder can be moved.
"""

from __future__ import annotations

from iprox.pipeline import choosing, making, scoring
from iprox.pipeline.run import Context, Run, open_run
from iprox.progress import Reporter
from iprox.recipe import resolved
from iprox.settings import STAGES, Recipe
from iprox.tracking import Tracker

__all__ = ["Run", "run_recipe"]

# One for each of `STAGES` after the first, which opens the run.
STEPS = (
    making.warm_up,
    making.compress,
    making.align,
    scoring.audit,
    scoring.score,
    scoring.refine,
    choosing.select,
    choosing.finetune,
    choosing.report,
)


def run_recipe(
    recipe: Recipe,
    *,
    reporter: Reporter,
    fresh: bool = False,
    stop_after: str | None = None,
    command: str = "iprox run",
) -> Run:
    """Run a recipe, or go on with it where it stopped.

    Args:
        recipe: validated.
        reporter: where progress goes.
        fresh: forget what an earlier run left in the output folder.
        stop_after: last stage to do, one of `STAGES`.
        command: how it was started, for `run.json`.

    Returns:
        The run; `run.record` is what `run.json` holds.

    Raises:
        InputError: bad input, before any long work.
    """
    recipe = resolved(recipe)
    run = open_run(recipe, reporter, fresh, command)
    try:
        if stop_after != "data":
            with Tracker(recipe.tracking, run.folder.path, recipe.model_dump(mode="json"), reporter.warn) as tracker:
                run.session.tracker = tracker
                _do(run, stop_after)
    finally:
        run.folder.release()
    return run


def _do(run: Run, stop_after: str | None) -> None:
    context = Context()
    for name, step in zip(STAGES[1:], STEPS, strict=True):
        step(run, context)
        if name == stop_after:
            break
