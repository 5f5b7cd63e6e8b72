import itertools

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from iprox.proxy.ranks import ErrorCurve, global_ranks, kept_cost, least_cost, total_cost, uniform_ranks


def random_layers(seed: int, count: int = 5, low: int = 8, high: int = 64) -> dict[str, ErrorCurve]:
    rng = np.random.default_rng(seed)
    layers = {}
    for number in range(count):
        m, n = rng.integers(low, high, 2)
        values = np.sort(rng.exponential(size=min(m, n)) * 10 ** rng.uniform(-2, 2))[::-1]
        layers[f"layer{number}"] = ErrorCurve((int(m), int(n)), 1.0, values)
    return layers


def error(layers, ranks) -> float:
    return sum(
        0.0 if ranks[name] is None else float((layer.singular_values[ranks[name] :] ** 2).sum())
        for name, layer in layers.items()
    )


@given(seed=st.integers(0, 500), sparsity=st.floats(0.05, 0.75))
@settings(max_examples=60, deadline=None)
def test_global_ranks_keep_the_budget_and_spend_it(seed, sparsity):
    layers = random_layers(seed)
    dense = sum(layer.dense_cost for layer in layers.values())
    ranks = global_ranks(layers, (1 - sparsity) * total_cost(layers))
    kept = kept_cost(layers, ranks)
    assert kept <= (1 - sparsity) * dense
    # What is left buys no further rank of any layer.
    for name, layer in layers.items():
        rank = ranks[name]
        if rank is not None:
            price = layer.rank_cost if rank < layer.largest_rank else layer.dense_cost - rank * layer.rank_cost
            assert kept + price > (1 - sparsity) * dense
            assert 1 <= rank <= layer.largest_rank


@given(seed=st.integers(0, 200))
@settings(max_examples=25, deadline=None)
def test_global_ranks_are_near_the_best_by_brute_force(seed):
    """All rank choices of two small layers: greedy is within one singular value of the optimum."""
    layers = random_layers(seed, count=2, low=8, high=12)
    sparsity = 0.4
    budget = (1 - sparsity) * sum(layer.dense_cost for layer in layers.values())
    choices = [[*range(1, layer.largest_rank + 1), None] for layer in layers.values()]
    best = min(
        error(layers, ranks)
        for pair in itertools.product(*choices)
        if kept_cost(layers, ranks := dict(zip(layers, pair, strict=True))) <= budget
    )
    ranks = global_ranks(layers, (1 - sparsity) * total_cost(layers))
    largest_skipped = max(
        (float(layer.singular_values[ranks[name]] ** 2) for name, layer in layers.items() if ranks[name] is not None),
        default=0.0,
    )
    # A dense layer's price is a lump, which greedy may not see coming: allow what the lump could hold.
    lump = max(float((layer.singular_values[layer.largest_rank :] ** 2).sum()) for layer in layers.values())
    assert error(layers, ranks) <= best + largest_skipped + lump + 1e-12


def test_global_beats_uniform_on_the_error_it_is_about():
    layers = random_layers(1, count=8)
    assert error(layers, global_ranks(layers, 0.5 * total_cost(layers))) < error(
        layers, uniform_ranks(layers, 0.5 * total_cost(layers))
    )


def test_a_layer_whose_factors_cost_too_much_stays_dense():
    """One layer holds nearly all the error, so its every direction is worth keeping: then dense is cheaper."""
    layers = {
        "heavy": ErrorCurve((16, 16), 1.0, np.full(16, 100.0)),
        "light": ErrorCurve((16, 16), 1.0, np.full(16, 0.01)),
    }
    ranks = global_ranks(layers, 0.6 * total_cost(layers))
    assert ranks["heavy"] is None
    assert ranks["light"] == 1
    assert kept_cost(layers, ranks) == 256 + 32


@given(seed=st.integers(0, 100), sparsity=st.floats(0.05, 0.7))
@example(seed=87, sparsity=0.5)  # an exact share of 3.0 that gets what is left of the budget: 4
@settings(max_examples=30, deadline=None)
def test_uniform_ranks_take_the_same_share_of_every_layer_and_spend_the_budget(seed, sparsity):
    layers = random_layers(seed)
    budget = (1 - sparsity) * total_cost(layers)
    ranks = uniform_ranks(layers, budget)
    for name, rank in ranks.items():
        layer = layers[name]
        exact = (1 - sparsity) * layer.dense_cost / layer.rank_cost
        assert rank is not None
        assert 1 <= rank <= layer.largest_rank
        # Rounded down, and at most one more from what was left.
        assert rank == 1 or rank == layer.largest_rank or exact - 1 < rank <= exact + 1
    if all(1 < rank < layers[name].largest_rank for name, rank in ranks.items()):
        assert budget - max(layer.rank_cost for layer in layers.values()) < kept_cost(layers, ranks) <= budget


@given(seed=st.integers(0, 100), sparsity=st.floats(0.5, 0.99))
@settings(max_examples=60, deadline=None)
def test_uniform_ranks_keep_a_budget_that_leaves_some_layers_less_than_a_rank(seed, sparsity):
    layers = random_layers(seed)
    budget = max(least_cost(layers), (1 - sparsity) * total_cost(layers))
    ranks = uniform_ranks(layers, budget)
    assert min(ranks.values()) >= 1
    assert kept_cost(layers, ranks) <= budget * (1 + 1e-9)


def test_a_jump_to_dense_is_taken_where_its_tail_is_worth_it():
    """A square layer with a flat spectrum: at half its ranks, factors cost what it does and save half the error."""
    layers = {
        "flat": ErrorCurve((16, 16), 1.0, np.full(16, 1.0)),
        "steep": ErrorCurve((16, 16), 1.0, np.logspace(0.3, -3, 16)),
    }
    # 256 for the flat layer dense and 3 ranks of the steep one; single ranks by σ² would not get there.
    ranks = global_ranks(layers, 256 + 3 * 32)
    assert ranks == {"flat": None, "steep": 3}


def test_what_a_token_pays_counts_not_what_is_stored():
    """Two layers alike, one of them an expert that a quarter of the tokens use: its ranks cost a quarter."""
    values = np.logspace(0, -1, 16)
    layers = {"all": ErrorCurve((16, 16), 1.0, values), "expert": ErrorCurve((16, 16), 0.25, values)}
    ranks = global_ranks(layers, 0.5 * total_cost(layers))
    assert kept_cost(layers, ranks) <= 0.5 * total_cost(layers)
    assert (ranks["expert"] or 16) > (ranks["all"] or 16)


def test_the_least_is_one_rank_a_layer():
    layers = random_layers(0)
    assert kept_cost(layers, global_ranks(layers, least_cost(layers))) == least_cost(layers)
