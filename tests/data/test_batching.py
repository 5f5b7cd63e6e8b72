import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from iprox.data import IGNORE, Encoded, collate, example_batches, iter_batches, token_budget_batches
from iprox.data.batching import batch_tokens_for, padded_width
from iprox.errors import InputError


def encoded(length, supervised=None):
    ids = np.arange(1, length + 1, dtype=np.int32)
    labels = ids.copy()
    labels[: length - (length if supervised is None else supervised)] = IGNORE
    return Encoded(ids, labels, False)


@given(st.lists(st.integers(0, 300), max_size=80), st.integers(1, 1000))
def test_batches_hold_each_index_once_within_the_budget(lengths, budget):
    batches = token_budget_batches(lengths, budget)
    flat = [index for batch in batches for index in batch]
    assert sorted(flat) == list(range(len(lengths)))
    # Longest first, equal lengths in order: the whole order is determined.
    assert flat == sorted(flat, key=lambda index: (-lengths[index], index))
    for position, batch in enumerate(batches):
        width = padded_width(max(lengths[index] for index in batch))
        assert len(batch) == 1 or len(batch) * width <= budget
        if position + 1 < len(batches):  # no room was left: one more row would not have fitted
            assert (len(batch) + 1) * width > budget


@pytest.mark.parametrize(("budget", "most"), [(4096, 0.05), (16384, 0.08)])
def test_padding_is_a_few_percent_on_realistic_lengths(budget, most):
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(4.5, 0.75, size=4096), 10, 512).astype(int).tolist()
    batches = token_budget_batches(lengths, budget)
    padded = sum(len(batch) * padded_width(max(lengths[i] for i in batch)) for batch in batches)
    assert 1 - sum(lengths) / padded < most


def test_widths_are_few_and_close():
    widths = {length: padded_width(length) for length in range(1, 4097)}
    assert all(0 <= width - length <= max(7, length / 16) for length, width in widths.items())
    assert all(width % 8 == 0 for width in widths.values())
    assert len(set(widths.values())) <= 16 * 8
    for k in range(3, 13):
        assert max(widths[length] for length in range(1, 2**k + 1)) == 2**k


def test_a_budget_below_one_is_refused():
    with pytest.raises(InputError, match="at least 1"):
        token_budget_batches([1], 0)


def test_collate_pads_on_the_right():
    batch = collate([encoded(3, 1), encoded(1), encoded(2, 1)], [2, 0])
    assert batch.input_ids.tolist() == [[1, 2, 0], [1, 2, 3]]
    assert batch.labels.tolist() == [[IGNORE, 2, IGNORE], [IGNORE, IGNORE, 3]]
    assert batch.lengths.tolist() == [2, 3]
    assert batch.indices == [2, 0]
    assert {batch.input_ids.dtype, batch.labels.dtype, batch.lengths.dtype} == {torch.int64}


@given(st.lists(st.tuples(st.integers(1, 20), st.booleans()), max_size=30), st.integers(1, 60))
def test_iter_batches_yields_the_supervised_rows_unchanged(spec, budget):
    rows = [encoded(length, None if supervised else 0) for length, supervised in spec]
    seen = []
    for batch in iter_batches(rows, budget):
        assert batch.input_ids.shape[1] == padded_width(int(batch.lengths.max()))
        for position, index in enumerate(batch.indices):
            length = int(batch.lengths[position])
            np.testing.assert_array_equal(batch.input_ids[position, :length], rows[index].input_ids)
            np.testing.assert_array_equal(batch.labels[position, :length], rows[index].labels)
            assert (batch.labels[position, length:] == IGNORE).all()
            seen.append(index)
    assert sorted(seen) == [index for index, row in enumerate(rows) if row.supervised]


def test_batches_are_smaller_on_a_cpu_unless_their_size_is_given():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert (batch_tokens_for(cpu, "auto"), batch_tokens_for(cuda, "auto")) == (1024, 4096)
    assert batch_tokens_for(cpu, 77) == batch_tokens_for(cuda, 77) == 77


def test_a_lone_first_token_has_no_prediction():
    assert encoded(1).supervised == 0
    assert encoded(4, 4).supervised == 3
    assert list(iter_batches([encoded(1)], 10)) == []


@given(st.lists(st.integers(2, 60), min_size=1, max_size=30), st.integers(1, 8), st.integers(10, 200))
def test_example_batches_hold_so_many_examples_unless_they_are_long(lengths, size, budget):
    rows = [encoded(n) for n in lengths]
    batches = list(example_batches(rows, size, batch_tokens=budget))
    assert sorted(i for batch in batches for i in batch.indices) == list(range(len(rows)))
    for batch in batches[:-1]:
        assert len(batch.indices) <= size
        assert batch.input_ids.numel() <= budget or len(batch.indices) == 1
    unlimited = [len(batch.indices) for batch in example_batches(rows, size)]
    assert all(count == size for count in unlimited[:-1])
