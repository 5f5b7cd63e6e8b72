"""The stream: windows, shards, resuming, several checkpoints."""

import dataclasses
from typing import get_args

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs import job_of, scorer_of, settings_of
from letters import Letters

from iprox.aggregation import TaskSpread
from iprox.data import Pool, iter_batches
from iprox.engine import shards
from iprox.engine.shards import score_to_file
from iprox.engine.stream import local_engine
from iprox.engine.windows import ScoringStats, Windows
from iprox.errors import InputError
from iprox.files import remove
from iprox.influence.estimators.registry import REGISTRY
from iprox.influence.job import Job
from iprox.influence.scorer import NORM_SKETCH, BatchScorer
from iprox.influence.validation_gradients import mean_gradient
from iprox.models.loss import causal_lm_losses
from iprox.proxy.compress import derive_proxy
from iprox.proxy.size import Size
from iprox.scores import example_matrix, read_scores, score_matrix, scores_metadata, scores_table, task_names
from iprox.settings import ESTIMATORS, EXAMPLES_NORM, EstimatorName

BATCH_TOKENS, WINDOW = 64, 4


TEXTS = [f"{'abcdefghij'[: 2 + i % 8]} {i}" for i in range(9)] + ["nothing here", "last one"]


@pytest.fixture
def setup(tiny):
    pool = Pool([{"text": text, "source": "even" if i % 2 == 0 else None} for i, text in enumerate(TEXTS)])
    validation = {
        "one": Letters().encode(Pool([{"text": "hello"}, {"text": "world!"}])),
        "two": Letters().encode(Pool([{"text": "other"}])),
    }
    return tiny.model("gpt-neox"), pool, validation


def run(path, models, pool, validation, rates=None, identity=None, **settings):
    job = job_of(models, validation, rates=rates, batch_tokens=BATCH_TOKENS, **settings)
    identity = identity or {"run": 1}
    return score_to_file(job.workers, job.learning_rates, pool, path, identity=identity, window=WINDOW)


def by_hand(model, validation):
    """Every text by itself, with the estimator that its own tests check against autograd."""
    columns = []
    for encoded in validation.values():
        queries = mean_gradient(model, list(iter_batches(encoded, 64)))
        scorer = BatchScorer(model, {"task": queries})
        scores = np.full(len(TEXTS), np.nan)
        for i, row in enumerate(Letters().encode(Pool([{"text": text} for text in TEXTS]))):
            for batch in iter_batches([row], 64):
                scores[i] = scorer(batch)[0].item()
        columns.append(scores)
    return np.stack(columns, axis=1)


def test_the_file_holds_every_row_in_pool_order(setup, tmp_path):
    model, pool, validation = setup
    stats = run(tmp_path / "scores.parquet", [model], pool, validation)
    table = read_scores(tmp_path)
    assert table.column_names == ["id", "source", "tokens", "supervised", "influence/one", "influence/two", "influence"]
    types = [str(field.type) for field in table.schema]
    assert types == ["string", "string", "int32", "int32", "double", "double", "double"]
    assert table["id"].to_pylist() == [example.id for example in pool]
    assert table["source"].to_pylist() == [example.source for example in pool]
    assert table["tokens"].to_pylist() == [len(text) for text in TEXTS]
    np.testing.assert_allclose(score_matrix(table), by_hand(model, validation), rtol=1e-9)
    assert stats == ScoringStats(
        rows=11,
        unscored=1,
        tokens=sum(map(len, TEXTS)),
        supervised=stats.supervised,
        contraction_flops=stats.contraction_flops,
        batch_tokens=BATCH_TOKENS,
    )
    assert stats.supervised == sum(len(text) - 1 for text in TEXTS if not text.startswith("nothing"))
    assert scores_metadata(table) == {"run": 1}
    assert not (tmp_path / "scores.parquet.shards").exists()


def test_an_example_without_supervised_tokens_has_a_null_score(setup, tmp_path):
    model, pool, validation = setup
    run(tmp_path / "scores.parquet", [model], pool, validation)
    table = read_scores(tmp_path)
    for name in ("influence/one", "influence/two", "influence"):
        assert [i for i, value in enumerate(table[name].to_pylist()) if value is None] == [9]


def test_checkpoints_add_up_with_their_learning_rates(setup, tiny, tmp_path):
    model, pool, validation = setup
    other = tiny.model("gpt-neox", seed=5)
    run(tmp_path / "both.parquet", [model, other], pool, validation, rates=[0.3, 0.07])
    expected = 0.3 * by_hand(model, validation) + 0.07 * by_hand(other, validation)
    np.testing.assert_allclose(score_matrix(read_scores(tmp_path / "both.parquet")), expected, rtol=1e-9)


def test_counts_of_checkpoints_are_rows_once_and_all_that_was_done():
    first = ScoringStats(rows=4, tokens=40, contraction_flops=100.0, query_kept=0.99, batch_tokens=4096)
    second = ScoringStats(
        rows=4, tokens=40, contraction_flops=900.0, query_kept=0.9, uncompiled="no compiler", batch_tokens=512
    )
    both = ScoringStats.over_checkpoints([first, second])
    assert both == dataclasses.replace(second, contraction_flops=1000.0)
    assert first.contraction_flops == 100.0
    total = ScoringStats()
    total.add(both)
    total.add(first)
    assert (total.rows, total.tokens, total.contraction_flops) == (8, 80, 1100.0)
    assert (total.query_kept, total.uncompiled, total.batch_tokens) == (0.9, "no compiler", 512)


@pytest.mark.parametrize("killed_after", [0, 1, 2, 4])
def test_killed_and_started_again_it_gives_the_same_bytes(setup, tiny, tmp_path, monkeypatch, killed_after):
    model, pool, validation = setup
    models, rates = [model, tiny.model("gpt-neox", seed=5)], [0.3, 0.07]
    whole, resumed = tmp_path / "whole.parquet", tmp_path / "resumed.parquet"
    expected = run(whole, models, pool, validation, rates)
    real, calls = shards.write_parts, []

    def dies(path, parts):
        if len(calls) == killed_after:
            raise KeyboardInterrupt
        calls.append(path)
        return real(path, parts)

    monkeypatch.setattr(shards, "write_parts", dies)
    with pytest.raises(KeyboardInterrupt):
        run(resumed, models, pool, validation, rates)
    assert not resumed.exists()
    monkeypatch.setattr(shards, "write_parts", real)
    assert run(resumed, models, pool, validation, rates) == expected
    assert resumed.read_bytes() == whole.read_bytes()


def test_shards_of_other_scores_are_thrown_away(setup, tmp_path, monkeypatch):
    model, pool, validation = setup
    path = tmp_path / "scores.parquet"
    real = shards.write_parts

    def dies_at_the_end(target, parts):
        if target == path:
            raise KeyboardInterrupt
        return real(target, parts)

    monkeypatch.setattr(shards, "write_parts", dies_at_the_end)
    with pytest.raises(KeyboardInterrupt):
        run(path, [model], pool, validation, identity={"run": 1})
    monkeypatch.setattr(shards, "write_parts", real)
    run(path, [model], pool, validation, normalize="cosine", identity={"run": 2})
    assert np.nanmax(np.abs(score_matrix(read_scores(path)))) <= 1 + 1e-9


def test_killed_while_it_throws_shards_away_it_keeps_none_of_them(tmp_path, monkeypatch):
    """Half a set of shards, under the marker of the whole, would be taken for the first windows later."""
    folder = tmp_path / "shards"
    shards.claim(folder, {"run": 1})
    for number in range(3):
        (folder / f"{number:06d}.parquet").write_text("a window")

    def dies(path, **_):
        (path / "000000.parquet").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shards.shutil, "rmtree", dies)
        with pytest.raises(KeyboardInterrupt):
            shards.claim(folder, {"run": 2})
    shards.claim(folder, {"run": 1})
    assert not list(folder.glob("*.parquet"))


def test_windows_do_not_change_the_scores(setup):
    model, pool, validation = setup
    worker, tables = job_of(model, validation, batch_tokens=BATCH_TOKENS).worker(), []
    for window in (3, 100):
        parts = [table for _, (table, _) in local_engine(lambda: worker, Windows(pool, window))]
        tables.append(np.concatenate([score_matrix(part) for part in parts]))
    np.testing.assert_allclose(tables[0], tables[1], rtol=1e-9)


def test_in_memory_and_on_disk_the_scores_are_the_same(setup, tiny, tmp_path):
    model, pool, validation = setup
    models, rates = [model, tiny.model("gpt-neox", seed=5)], [0.3, 0.07]
    how = {"rates": rates, "batch_tokens": BATCH_TOKENS, "per_example": True}
    expected = run(tmp_path / "scores.parquet", models, pool, validation, rates, per_example=True)
    table, stats = job_of(models, validation, **how).score(pool, metadata={"run": 1})
    kept = read_scores(tmp_path, examples=True)
    assert table.schema == kept.schema
    np.testing.assert_allclose(score_matrix(table), score_matrix(kept), rtol=1e-12)
    for task in validation:
        np.testing.assert_allclose(example_matrix(table, task), example_matrix(kept, task), rtol=1e-12)
    assert scores_metadata(table) == {"run": 1}
    assert ScoringStats.over_checkpoints(stats) == expected


def test_the_aggregate_counts_every_task_alike(setup, tmp_path):
    model, pool, validation = setup
    run(tmp_path / "a.parquet", [model], pool, validation)
    table = read_scores(tmp_path / "a.parquet")
    scores = score_matrix(table)
    expected = (scores / np.nanstd(scores, axis=0)).mean(axis=1)
    np.testing.assert_allclose(table["influence"].to_numpy(zero_copy_only=False), expected, rtol=1e-9)


def test_of_one_task_the_aggregate_is_its_score(setup, tmp_path):
    model, pool, validation = setup
    run(tmp_path / "scores.parquet", [model], pool, {"one": validation["one"]})
    table = read_scores(tmp_path)
    assert table["influence"].equals(table["influence/one"])
    assert task_names(table) == ["one"]


@given(st.lists(st.integers(1, 20), min_size=1, max_size=5), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_running_spread_equals_the_spread_of_the_whole(sizes, seed):
    rng = np.random.default_rng(seed)
    parts = [rng.normal(size=(size, 3)) * [1, 100, 1e-6] for size in sizes]
    spread = TaskSpread()
    for part in parts:
        spread.add(np.concatenate([part, np.full((1, 3), np.nan)]))
    whole = np.concatenate(parts)
    deviation = whole.std(axis=0)
    np.testing.assert_allclose(spread.deviation(), np.where(deviation > 0, deviation, 1), rtol=1e-6)


def test_a_score_that_is_not_finite_names_the_example(setup):
    model, pool, validation = setup
    worker = job_of(model, validation, batch_tokens=BATCH_TOKENS).worker()
    worker.rows.loss_fn = lambda model, batch: causal_lm_losses(model, batch) * float("nan")
    with pytest.raises(FloatingPointError, match="row"):
        worker(list(pool))


@pytest.mark.parametrize(
    ("validation", "sample", "said"),
    [("nothing", "words", "'empty'"), ("words", "nothing", "curvature sample")],
)
def test_a_task_or_a_sample_without_supervised_tokens_is_refused(validation, sample, said):
    one, other = (Pool([{"text": text}]) for text in (validation, sample))
    with pytest.raises(InputError, match=said):
        Job.of(settings_of(estimator="ekfac"), [], {"empty": Letters().encode(one)}, Letters(), other)


def test_the_curvature_sample_follows_the_seed_and_an_estimator_without_curvature_has_none(setup):
    _, pool, validation = setup
    few = settings_of(estimator="ekfac", curvature_examples=3)
    drawn = [Job.of(few, [], validation, Letters(), pool, seed=seed).sample for seed in (0, 0, 1)]
    texts = [[row.input_ids.tolist() for row in sample] for sample in drawn]
    assert texts[0] == texts[1] != texts[2]
    assert list(Job.of(settings_of(), [], validation, Letters(), pool).sample) == []


def test_what_is_no_scores_table_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such scores file"):
        read_scores(tmp_path)
    (tmp_path / "scores.parquet").write_text("hello")
    with pytest.raises(InputError, match="not a readable Parquet file"):
        read_scores(tmp_path)
    table = scores_table(["a"], [None], [1], np.zeros((1, 1)), ["t"])
    pq.write_table(table.drop_columns(["influence"]), tmp_path / "scores.parquet")
    with pytest.raises(InputError, match="'influence'"):
        read_scores(tmp_path)


def test_bfloat16_ranks_as_float32_does(tiny, setup):
    _, pool, validation = setup
    columns = []
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny.model("qwen3", dtype, hidden_size=64, head_dim=16)
        table, _ = job_of(model, validation, batch_tokens=BATCH_TOKENS).score(pool)
        columns.append(score_matrix(table)[:, 0])
    scored = np.isfinite(columns[0])
    assert np.corrcoef(columns[0][scored], columns[1][scored])[0, 1] > 0.99


def test_a_models_own_scores_are_exact_and_a_proxys_are_cut_unless_asked():
    tracin, curved = ESTIMATORS["tracin"].query_norm, ESTIMATORS["ekfac"].query_norm
    assert settings_of().kept_norm(on_proxy=False) == settings_of(estimator="ekfac").kept_norm(on_proxy=False) == 1
    assert settings_of().kept_norm(on_proxy=True) == tracin < 1
    assert tracin < settings_of(estimator="ekfac").kept_norm(on_proxy=True) == curved < 1
    assert settings_of(per_example=True).kept_norm(on_proxy=False) == EXAMPLES_NORM < 1
    assert settings_of(query_norm=0.5).kept_norm(on_proxy=False) == 0.5
    assert settings_of(query_norm=1.0).kept_norm(on_proxy=True) == 1


def test_norms_are_sketched_for_the_cosine_on_a_proxy_and_exact_on_a_model_itself(tiny, setup):
    _, _, validation = setup
    model = tiny.model()
    proxy, _ = derive_proxy(model, [tiny.batch([9, 7])], Size(0.5))
    own, sketched = (scorer_of(each, validation, target=model, normalize="cosine") for each in (model, proxy))
    assert (own.norm_sketch, sketched.norm_sketch) == (0, NORM_SKETCH)
    assert NORM_SKETCH > 0
    assert scorer_of(proxy, validation, target=model).norm_flops([50]) == 0


def test_a_proxys_validation_gradients_are_cut_and_its_targets_are_not(tiny, setup):
    _, _, validation = setup
    model = tiny.model()
    proxy, _ = derive_proxy(model, [tiny.batch([9, 7])], Size(0.5))
    cut, whole, own = (
        scorer_of(scored, validation, target=target, query_norm=keep)
        for scored, keep, target in ((proxy, None, model), (proxy, 1.0, model), (model, None, None))
    )
    assert all(ESTIMATORS["tracin"].query_norm <= share < 1 for share in cut.kept.values())
    assert set(whole.kept.values()) == set(own.kept.values()) == {1.0}
    assert cut.contraction_flops < whole.contraction_flops


def test_every_estimator_of_the_settings_has_its_class_and_the_other_way_round():
    assert list(REGISTRY) == list(ESTIMATORS) == list(get_args(EstimatorName))


def stopped_before_the_merge(path, models, pool, validation, monkeypatch):
    """All shards are there, and the scores are not: where a run is stopped at its very end."""
    with monkeypatch.context() as patched:
        patched.setattr(shards, "merge_shards", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(path, models, pool, validation, [0.3, 0.07])
    return sorted(path.with_name(path.name + ".shards").rglob("*.parquet"))


def cut(file):
    file.write_bytes(file.read_bytes()[:-40])


def empty(file):
    file.write_bytes(b"")


def flip(file):
    """One byte of the first column's data."""
    raw = bytearray(file.read_bytes())
    raw[40] ^= 0xFF
    file.write_bytes(bytes(raw))


def shorten(file):
    """A whole file with a row less than it says."""
    table = pq.read_table(file)
    pq.write_table(table.slice(1), file)


@pytest.mark.parametrize("fault", [lambda file: file.unlink(), cut, empty, flip, shorten])
@pytest.mark.parametrize("place", [0, 1, -1])
def test_a_shard_that_is_lost_or_damaged_is_made_again(setup, tiny, tmp_path, monkeypatch, fault, place):
    model, pool, validation = setup
    models = [model, tiny.model("gpt-neox", seed=5)]
    whole, path = tmp_path / "whole.parquet", tmp_path / "scores.parquet"
    expected = run(whole, models, pool, validation, [0.3, 0.07])
    files = stopped_before_the_merge(path, models, pool, validation, monkeypatch)
    fault(files[place])
    said = f"{files[place].name}: is (damaged|missing); its rows are scored again"
    with pytest.warns(UserWarning, match=said):
        assert run(path, models, pool, validation, [0.3, 0.07]) == expected
    assert path.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("lost", ["checkpoint-000", "identity.json"])
def test_shards_that_are_all_lost_are_made_again_and_that_is_said(setup, tiny, tmp_path, monkeypatch, lost):
    model, pool, validation = setup
    models, path = [model, tiny.model("gpt-neox", seed=5)], tmp_path / "scores.parquet"
    expected = run(tmp_path / "whole.parquet", models, pool, validation, [0.3, 0.07])
    stopped_before_the_merge(path, models, pool, validation, monkeypatch)
    remove(tmp_path / "scores.parquet.shards" / lost)
    with pytest.warns(UserWarning, match=rf"{lost}: (its files are|is) missing"):
        assert run(path, models, pool, validation, [0.3, 0.07]) == expected


def test_shards_that_are_whole_are_not_scored_again(setup, tmp_path, monkeypatch, tiny):
    model, pool, validation = setup
    models, path = [model, tiny.model("gpt-neox", seed=5)], tmp_path / "scores.parquet"
    files = stopped_before_the_merge(path, models, pool, validation, monkeypatch)
    files[1].unlink()
    real, written = shards.write_parts, []
    monkeypatch.setattr(shards, "write_parts", lambda to, parts: (written.append(to), real(to, parts)))
    with pytest.warns(UserWarning, match="is missing"):
        run(path, models, pool, validation, [0.3, 0.07])
    assert written == [files[1], path]
