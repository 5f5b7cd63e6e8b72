"""The stream: windows, shards, resuming, several checkpoints."""

import dataclasses

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from letters import Letters

from iprox.data import Pool
from iprox.errors import InputError
from iprox.influence import scoring, shards
from iprox.aggregation import TaskSpread
from iprox.influence.estimators import BatchScorer, mean_gradient
from iprox.scores import read_scores, score_matrix, scores_metadata, scores_table, task_names
from iprox.influence.scoring import (
    CURVED_QUERY_NORM,
    NORM_SKETCH,
    QUERY_NORM,
    ScoringSettings,
    ScoringStats,
    build_scorer,
)
from iprox.engine.shards import ScoringCheckpoint, score_to_file
from iprox.engine.stream import score_windows
from iprox.models.loss import causal_lm_losses
from iprox.proxy.compress import derive_proxy
from iprox.proxy.size import Size

SETTINGS = ScoringSettings(batch_tokens=64, window=4)


TEXTS = [f"{'abcdefghij'[: 2 + i % 8]} {i}" for i in range(9)] + ["nothing here", "last one"]


@pytest.fixture
def setup(tiny):
    pool = Pool([{"text": text, "source": "even" if i % 2 == 0 else None} for i, text in enumerate(TEXTS)])
    validation = {
        "one": Letters().encode(Pool([{"text": "hello"}, {"text": "world!"}])),
        "two": Letters().encode(Pool([{"text": "other"}])),
    }
    return tiny.model("gpt-neox"), pool, validation


def run(path, models, pool, validation, rates=None, settings=SETTINGS, identity=None):
    rates = rates or [1.0] * len(models)
    checkpoints = [ScoringCheckpoint(lambda m=m: m, rate) for m, rate in zip(models, rates, strict=True)]
    return score_to_file(checkpoints, pool, validation, Letters(), 0, path, settings, identity=identity or {"run": 1})


def by_hand(model, validation):
    """Every text by itself, with the estimator that its own tests check against autograd."""
    columns = []
    for encoded in validation.values():
        queries = mean_gradient(model, list(scoring.iter_batches(encoded, 64, 0)))[0]
        scorer = BatchScorer(model, {"task": queries})
        scores = np.full(len(TEXTS), np.nan)
        for i, row in enumerate(Letters().encode(Pool([{"text": text} for text in TEXTS]))):
            for batch in scoring.iter_batches([row], 64, 0):
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
        batch_tokens=SETTINGS.batch_tokens,
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
    cosine = dataclasses.replace(SETTINGS, normalize="cosine")
    run(path, [model], pool, validation, settings=cosine, identity={"run": 2})
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
    tables = []
    for window in (3, 100):
        settings = dataclasses.replace(SETTINGS, window=window)
        scorer = build_scorer(model, validation, 0, settings)
        parts = [table for table, _ in score_windows(scorer, pool, Letters(), 0, settings)]
        tables.append(np.concatenate([score_matrix(part) for part in parts]))
    np.testing.assert_allclose(tables[0], tables[1], rtol=1e-9)


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
    scorer = build_scorer(model, validation, 0, SETTINGS)
    scorer.loss_fn = lambda model, batch: causal_lm_losses(model, batch) * float("nan")
    with pytest.raises(FloatingPointError, match="row"):
        list(score_windows(scorer, pool, Letters(), 0, SETTINGS))


def test_a_task_without_supervised_tokens_is_refused(setup):
    model, _, _ = setup
    with pytest.raises(InputError, match="'empty'"):
        build_scorer(model, {"empty": Letters().encode(Pool([{"text": "nothing"}]))}, 0, SETTINGS)


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
        scorer = build_scorer(model, validation, 0, SETTINGS)
        parts = [score_matrix(table) for table, _ in score_windows(scorer, pool, Letters(), 0, SETTINGS)]
        columns.append(np.concatenate(parts)[:, 0])
    scored = np.isfinite(columns[0])
    assert np.corrcoef(columns[0][scored], columns[1][scored])[0, 1] > 0.99


def test_a_models_own_scores_are_exact_and_a_proxys_are_cut_unless_asked(tiny):
    model = tiny.model()
    proxy, _ = derive_proxy(model, [tiny.batch([9, 7])], Size(0.5))
    assert ScoringSettings().kept_norm(model) == 1
    assert ScoringSettings().kept_norm(proxy) == QUERY_NORM < 1
    curved = ScoringSettings(estimator="influence-function")
    assert QUERY_NORM < curved.kept_norm(proxy) == CURVED_QUERY_NORM < curved.kept_norm(model) == 1
    assert ScoringSettings(query_norm=0.5).kept_norm(model) == 0.5
    assert ScoringSettings(query_norm=1.0).kept_norm(proxy) == 1


def test_norms_are_sketched_for_the_cosine_on_a_proxy_unless_asked(tiny, setup):
    _, _, validation = setup
    model = tiny.model()
    proxy, _ = derive_proxy(model, [tiny.batch([9, 7])], Size(0.5))
    cosine = ScoringSettings(normalize="cosine")
    assert ScoringSettings().sketched(proxy) == cosine.sketched(model) == 0
    assert cosine.sketched(proxy) == NORM_SKETCH > 0
    assert dataclasses.replace(cosine, norm_sketch=0).sketched(proxy) == 0
    assert dataclasses.replace(cosine, norm_sketch=8).sketched(model) == 0  # a model's own norms are exact
    assert dataclasses.replace(cosine, norm_sketch=8).sketched(proxy) == 8
    assert dataclasses.replace(cosine, estimator="adam").sketched(proxy) == 0
    exact, sketched = (
        build_scorer(proxy, validation, 0, dataclasses.replace(cosine, norm_sketch=size), target=model)
        for size in (0, 4)
    )
    assert isinstance(exact, BatchScorer)
    assert isinstance(sketched, BatchScorer)
    assert (exact.norm_sketch, sketched.norm_sketch) == (0, 4)
    assert sketched.norm_flops([50]) < exact.norm_flops([50])


def test_a_proxys_validation_gradients_are_cut_and_its_targets_are_not(tiny, setup):
    _, _, validation = setup
    model = tiny.model()
    proxy, _ = derive_proxy(model, [tiny.batch([9, 7])], Size(0.5))
    cut, whole, own = (
        build_scorer(scored, validation, 0, ScoringSettings(query_norm=keep), target=target)
        for scored, keep, target in ((proxy, None, model), (proxy, 1.0, model), (model, None, None))
    )
    assert isinstance(cut, BatchScorer)
    assert isinstance(whole, BatchScorer)
    assert isinstance(own, BatchScorer)
    assert all(QUERY_NORM <= share < 1 for share in cut.kept.values())
    assert set(whole.kept.values()) == set(own.kept.values()) == {1.0}
    assert cut.contraction_flops < whole.contraction_flops


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
    said = f"{files[place].name}: is (damaged|not there), so its rows are scored again"
    with pytest.warns(UserWarning, match=said):
        assert run(path, models, pool, validation, [0.3, 0.07]) == expected
    assert path.read_bytes() == whole.read_bytes()


def test_shards_that_are_whole_are_not_scored_again(setup, tmp_path, monkeypatch, tiny):
    model, pool, validation = setup
    models, path = [model, tiny.model("gpt-neox", seed=5)], tmp_path / "scores.parquet"
    files = stopped_before_the_merge(path, models, pool, validation, monkeypatch)
    files[1].unlink()
    real, written = shards.write_parts, []
    monkeypatch.setattr(shards, "write_parts", lambda to, parts: (written.append(to), real(to, parts)))
    with pytest.warns(UserWarning, match="is not there"):
        run(path, models, pool, validation, [0.3, 0.07])
    assert written == [files[1], path]
