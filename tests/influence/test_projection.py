"""Projected gradients against explicit ones in float64, and the index that keeps them."""

import copy
import itertools
import json

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from letters import Letters
from test_adam import warmed_optimizer

from iprox.data import Pool, iter_batches
from iprox.engine.stream import WindowWorker, local_engine
from iprox.errors import InputError
from iprox.influence.estimators.less import LessScorer
from iprox.influence.gradients import summed_gradient
from iprox.influence.index import GradientIndex, GradientProjector, unit_gradients, write_index
from iprox.influence.projection import LayerProjection, sides, signs
from iprox.influence.scorer import BatchScorer
from iprox.influence.validation_gradients import example_gradient, example_gradients, mean_gradient
from iprox.models.experts import experts_split
from iprox.models.optimizer_state import load_adam_state, save_adam_state
from iprox.proxy.compress import derive_proxy
from iprox.proxy.size import Size
from iprox.scores import example_matrix, score_matrix


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 9), st.integers(1, 9), st.booleans())
def test_features_are_those_of_the_gradient_itself(count, length, m, n, bias):
    generator = torch.Generator().manual_seed(100 * m + n)
    h = torch.randn(count, length, n, generator=generator, dtype=torch.float64)
    delta = torch.randn(count, length, m, generator=generator, dtype=torch.float64)
    projection = LayerProjection.of("layer", (m, n), 12, h)
    features = projection.of_tokens(h, delta, bias)
    assert features.shape == (count, 3, 4)
    left, right = projection.left, torch.cat([projection.right, projection.bias[:, None]], dim=1)
    for one, x, d in zip(features, h, delta, strict=True):
        gradient = torch.cat([d.mT @ x, d.sum(0)[:, None] if bias else torch.zeros(m, 1)], dim=1)
        torch.testing.assert_close(one, left @ gradient @ right.mT / 12**0.5)
        torch.testing.assert_close(projection.of_gradient(summed_gradient(x[None], d[None], bias)), one)
        torch.testing.assert_close(projection.of_low_rank(example_gradient(x, d, bias, 1.0)), one)


def test_signs_hang_on_their_key_alone():
    few = signs("0/layer/left", 3, 50)
    assert few.abs().eq(1).all()
    # Written down: an index of today is queried with the signs of tomorrow.
    assert few[0, :16].tolist() == [1, 1, 1, 1, 1, 1, -1, 1, 1, 1, -1, -1, 1, -1, 1, -1]
    assert not torch.equal(few, signs("1/layer/left", 3, 50))
    many = signs("many", 400, 500).double()
    assert abs(many.mean()) < 0.01
    assert (many @ many.mT / 500 - torch.eye(400)).abs().max() < 0.3


@pytest.mark.parametrize(("dimension", "expected"), [(8192, (64, 128)), (1, (1, 1)), (12, (3, 4)), (900, (30, 30))])
def test_sides_are_near(dimension, expected):
    assert sides(dimension) == expected


@pytest.mark.parametrize("dimension", [0, -4, 101, 22])
def test_a_dimension_without_near_divisors_is_refused(dimension):
    with pytest.raises(InputError, match="power of two"):
        sides(dimension)


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "qwen3-moe"])
def test_inner_products_of_features_are_the_scores_in_the_mean(tiny, family):
    """Over many seeds the mean nears the exact score, as fast as independent errors do; each norm is near by itself."""
    model, pool = tiny.model(family), tiny.batch([9, 3, 7])
    with experts_split(model):
        query = mean_gradient(model, tiny.rows(pool)[:1])
        exact = BatchScorer(model, {"t": query})(pool)[0][:, 0]
        drawn = []
        for seed in range(48):
            projector = GradientProjector(model, 256, seed=seed)
            drawn.append((projector(pool)[0] @ projector.project(query).mT)[:, 0])
    drawn = torch.stack(drawn)
    deviation = drawn.std(0)
    assert ((drawn.mean(0) - exact).abs() < 4 * deviation / len(drawn) ** 0.5).all()
    assert deviation[0] < 0.4 * exact[0]


def test_enough_numbers_give_the_scores_of_a_proxy(tiny):
    proxy, _ = derive_proxy(tiny.model("qwen3"), [tiny.batch([9, 7, 5], seed=2)], Size(sparsity=0.5))
    pool, query = tiny.batch([9, 3, 7]), mean_gradient(proxy, [tiny.batch([5, 8], seed=1)])
    exact = BatchScorer(proxy, {"t": query}, normalize="cosine")(pool)[0][:, 0]
    projector = GradientProjector(proxy, 1 << 16)
    features, meets = projector(pool)[0], projector.project(query)[0]
    torch.testing.assert_close(features @ meets / features.norm(dim=1) / meets.norm(), exact, rtol=0, atol=0.03)


def test_adams_steps_are_projected_where_asked(tiny, tmp_path):
    model, pool = tiny.model("qwen2"), tiny.batch([9, 3, 7])
    save_adam_state(model, warmed_optimizer(model, tiny), tmp_path)
    state = load_adam_state(tmp_path)
    query = mean_gradient(model, [tiny.batch([5, 8], seed=1)])
    exact = LessScorer(model, {"t": query}, state, normalize="cosine")(pool)[0][:, 0]
    projector = GradientProjector(model, 1 << 16, optimizer=state)
    features, meets = projector(pool)[0], projector.project(query)[0]
    torch.testing.assert_close(features @ meets / features.norm(dim=1) / meets.norm(), exact, rtol=0, atol=0.03)


POOL = Pool([{"text": text} for text in ("some words", "nothing here", "a few more words", "others", "last of them")])


@pytest.fixture
def made(tiny):
    model = tiny.model("qwen3", dtype=torch.float32)
    return model, GradientProjector(model, 64)


def write(projector, folder, pool=POOL, window=2, engine=None, **description):
    more = {} if engine is None else {"engine": engine}
    make = lambda: WindowWorker(projector, Letters(), 4096)  # noqa: E731
    return write_index(make, pool, folder, {"dimension": 64, **description}, window=window, **more)


@pytest.mark.parametrize("normalize", ["none", "cosine"])
def test_an_index_gives_the_inner_products_of_its_features(tiny, made, tmp_path, normalize):
    model, projector = made
    stats = write(projector, tmp_path / "index")
    assert (stats.rows, stats.unscored) == (5, 1)
    index = GradientIndex.open(tmp_path / "index")
    assert (index.rows, index.dimension) == (5, 64)
    batch = tiny.batch([5, 8, 4], seed=1)
    queries = {"mean": mean_gradient(model, [batch]), "each": example_gradients(model, [batch])}
    parts = list(index.scores(queries, projector, normalize, by_example=True))
    table = pa.concat_tables([table for table, _ in parts])
    assert sum(counted.rows for _, counted in parts) == 5
    assert table["id"].to_pylist() == [example.id for example in POOL]

    encoded = Letters().encode(list(POOL))
    expected = np.full((5, 4), np.nan)
    for each in iter_batches(encoded, 4096):
        features, meets = projector(each)[0], torch.cat([projector.project(query) for query in queries.values()])
        if normalize == "cosine":
            features, meets = (torch.nn.functional.normalize(x, dim=1) for x in (features, meets))
        expected[each.indices] = (features @ meets.mT).numpy()
    scale = np.nanmax(np.abs(expected))
    np.testing.assert_allclose(score_matrix(table)[:, 0] / scale, expected[:, 0] / scale, atol=2e-3)
    # The task's own score is of the mean of its examples, the other task's, however it is normalized.
    np.testing.assert_allclose(score_matrix(table)[:, 1] / scale, expected[:, 0] / scale, atol=2e-3)
    np.testing.assert_allclose(example_matrix(table, "each") / scale, expected[:, 1:] / scale, atol=2e-3)
    assert np.isnan(expected[1]).all()  # the row without a supervised token has no score


def test_gradients_too_small_for_half_precision_are_kept(made, tmp_path):
    _, projector = made
    worker = WindowWorker(copy.copy(projector), Letters(), 4096)
    worker.rows.loss_fn = lambda model, batch: projector.loss_fn(model, batch) * 1e-9
    table, _ = worker(list(POOL))
    plain, _ = WindowWorker(projector, Letters(), 4096)(list(POOL))
    np.testing.assert_allclose(table["norm"].to_numpy()[[0, 2]], 1e-9 * plain["norm"].to_numpy()[[0, 2]], rtol=1e-5)
    # Equal but for the last bit of some, which depends on the processor.
    torch.testing.assert_close(
        unit_gradients(table.combine_chunks()), unit_gradients(plain.combine_chunks()), rtol=1e-3, atol=1e-4
    )


def test_an_interrupted_index_goes_on_and_gives_the_same_bytes(made, tmp_path):
    _, projector = made
    write(projector, tmp_path / "whole")

    class StoppedError(Exception):
        pass

    def stopping(make, windows, progress):
        work = make()
        for number, window in windows:
            if number == 1:
                raise StoppedError
            yield number, work(window, progress)

    with pytest.raises(StoppedError):
        write(projector, tmp_path / "index", engine=stopping)
    with pytest.raises(InputError, match="incomplete"):
        GradientIndex.open(tmp_path / "index")
    before = (tmp_path / "index/000000.arrow").stat().st_mtime_ns
    stats = write(projector, tmp_path / "index")
    assert (tmp_path / "index/000000.arrow").stat().st_mtime_ns == before
    assert stats.rows == 5
    names = sorted(file.name for file in (tmp_path / "whole").iterdir())
    assert names == ["000000.arrow", "000001.arrow", "000002.arrow", "index.json"]
    for name in names:
        assert (tmp_path / "index" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_windows_of_another_description_are_not_kept(made, tmp_path):
    _, projector = made
    write(projector, tmp_path / "index", seed=0)
    (tmp_path / "index/index.json").unlink()
    (tmp_path / "index/identity.json").write_text(json.dumps({"dimension": 64, "seed": 0}))
    write(projector, tmp_path / "index", pool=Pool([{"text": "other"}]), seed=1)
    assert GradientIndex.open(tmp_path / "index").rows == 1


def test_a_folder_without_an_index_is_refused(tmp_path):
    with pytest.raises(InputError, match="not an index"):
        GradientIndex.open(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "removed", "repeated", "description"])
def test_a_damaged_index_is_refused(made, tmp_path, damage):
    write(made[1], tmp_path)
    file = tmp_path / ("index.json" if damage == "description" else "000001.arrow")
    content = file.read_bytes()
    file.unlink() if damage == "removed" else file.write_bytes(content if damage == "repeated" else content[:-9])
    if damage == "repeated":
        (tmp_path / "000009.arrow").write_bytes(content)
    with pytest.raises(InputError, match="index the pool again"):
        GradientIndex.open(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "removed"])
def test_a_damaged_window_of_an_interrupted_index_is_made_again(made, tmp_path, damage):
    _, projector = made
    write(projector, tmp_path / "whole")

    def stopping(make, windows, progress):
        yield from itertools.islice(local_engine(make, windows, progress), 2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(projector, tmp_path / "index", engine=stopping)
    file = tmp_path / "index/000000.arrow"
    file.unlink() if damage == "removed" else file.write_bytes(file.read_bytes()[:-9])
    with pytest.warns(UserWarning, match=r"000000\.arrow: is missing or damaged"):
        write(projector, tmp_path / "index")
    names = sorted(file.name for file in (tmp_path / "whole").iterdir())
    assert sorted(file.name for file in (tmp_path / "index").iterdir()) == names
    for name in names:
        assert (tmp_path / "index" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
