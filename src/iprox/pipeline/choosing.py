"""The steps that use the scores: selection, fine-tuning, report."""

from __future__ import annotations

from iprox.influence.attribution import why_not_attributed
from iprox.models.loading import skeleton
from iprox.pipeline.run import Context, Run, common_key
from iprox.report import build_report, shown_rows
from iprox.run_folder import StageRecord
from iprox.session import pool_of, tasks_of
from iprox.stages import attribution, selection, training


def select(run: Run, context: Context) -> None:
    """Choose rows by the scores."""
    settings = run.recipe.select
    scores = context.scores
    assert scores is not None  # the stage before has written it
    context.keys["select"] = run.stage(
        "select",
        [context.keys.get("refine", context.keys["score"]), settings.model_dump()],
        [run.folder.selected, run.folder.selection],
        lambda: selection.select(
            run.session, scores, run.pool, run.folder.selected, run.folder.selection, settings, "recipe"
        ),
    )


def finetune(run: Run, context: Context) -> None:
    """Train the original target on the chosen rows, if asked, and test it."""
    settings = run.recipe.finetune
    if not settings:
        return
    tests = tasks_of(settings.test, run.recipe)
    fingerprints = {task: source.scan().fingerprint for task, source in tests.items()}
    context.keys["finetune"] = run.stage(
        "finetune",
        [common_key(run), context.keys["select"], settings.model_dump(exclude={"test"}), fingerprints],
        [run.folder.finetune / "finetune.json", run.folder.finetune / "model"],
        lambda: training.finetune(
            run.session,
            run.recipe.model,
            list(pool_of([str(run.folder.selected)], run.recipe, "selection")),
            run.folder.finetune,
            settings,
            tests,
        ),
    )


def _attribute(run: Run, context: Context) -> None:
    settings, count = run.recipe.influence, run.recipe.report.attributed
    if not count:
        return
    on = skeleton(context.scored[0].read_by[0], trust_remote_code=run.recipe.trust_remote_code)
    why = why_not_attributed(settings, on)
    if why is not None:
        run.record["unattributed"] = why
        run.session.reporter.say(f"the report shades no tokens: {why}")
        return
    rows = shown_rows(run.folder.path)[:count]
    run.stage(
        "attribute",
        [context.keys["score"], rows],
        [run.folder.attribution],
        lambda: attribution.attribute(
            run.session,
            context.scored,
            run.pool,
            rows,
            run.validation,
            run.folder.scores,
            run.folder.attribution,
            settings,
        ),
    )


def report(run: Run, context: Context) -> None:
    """Shade the shown rows' tokens, where their scores are sums over tokens, and write the report."""
    _attribute(run, context)

    def work() -> StageRecord:
        build_report(run.folder.path, run.pool)
        return {}

    run.stage("report", [stage["key"] for stage in run.record["stages"].values()], [run.folder.report], work)
