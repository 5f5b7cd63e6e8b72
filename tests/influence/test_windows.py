"""Batches that do not fit in memory."""

import numpy as np
import pytest
import torch
from jobs import job_of, scorer_of

from iprox.data import Encoded, Pool, iter_batches
from iprox.engine import stream
from iprox.engine.stream import filled_rows
from iprox.models.loss import causal_lm_losses
from iprox.scores import score_matrix

ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory."),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    MemoryError(),
]


class Numbers:
    def encode(self, examples):
        rows = [np.array(example.text.split(), dtype=np.int32) for example in examples]
        return [Encoded(row, row, truncated=False) for row in rows]


@pytest.fixture
def window():
    rng = np.random.default_rng(0)
    texts = [" ".join(map(str, rng.integers(1, 60, length))) for length in (3, 9, 4, 4, 7, 2, 12, 5, 5)]
    return list(Pool([{"text": text} for text in texts]))


def small_memory(tokens, error, sizes):
    """Losses that a batch of more tokens than that does not fit for."""

    def losses(model, batch):
        sizes.append(batch.input_ids.numel())
        if batch.input_ids.numel() > tokens:
            raise error
        return causal_lm_losses(model, batch)

    return losses


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_batches_are_halved_until_they_fit(tiny, window, error):
    model, encoder = tiny.model("qwen3"), Numbers()
    validation = {"task": encoder.encode(window[:2])}
    job = job_of(model, validation, encoder=encoder, batch_tokens=64)
    whole = score_matrix(job.worker()(window)[0])
    sizes, done = [], []
    worker = job.worker()
    worker.rows.loss_fn = small_memory(20, error, sizes)
    table, stats = worker(window, done.append)
    np.testing.assert_allclose(score_matrix(table), whole, rtol=1e-9)
    assert stats.batch_tokens == 16
    assert sum(done) == len(window)
    tried = sum(size > 20 for size in sizes)
    worker(window)
    assert sum(size > 20 for size in sizes) == tried  # what did not fit is not tried again


@pytest.mark.parametrize(
    ("rows", "full", "expected"), [(1, 100, 25), (26, 100, 50), (100, 100, 100), (2, 2, 2), (3, 1, 3)]
)
def test_batches_are_filled_up_to_quarters(rows, full, expected):
    assert filled_rows(rows, full) == expected


def test_shapes_repeat_whatever_the_number_of_rows(tiny, window):
    model, encoder = tiny.model("qwen3"), Numbers()
    validation = {"task": encoder.encode(window[:2])}
    worker, shapes = job_of(model, validation, encoder=encoder, batch_tokens=128).worker(), set()
    whole = score_matrix(worker(window)[0])

    def losses(model, batch):
        shapes.add(tuple(batch.input_ids.shape))
        return causal_lm_losses(model, batch)

    worker.rows.loss_fn = losses
    for count in range(1, len(window) + 1):
        np.testing.assert_allclose(score_matrix(worker(window[:count])[0]), whole[:count], rtol=1e-9)
    assert len(shapes) <= 8  # two widths, four numbers of rows


def test_one_row_that_does_not_fit_is_an_error(tiny, window):
    worker = job_of(tiny.model("qwen3"), {"task": Numbers().encode(window[:2])}, encoder=Numbers()).worker()
    worker.rows.loss_fn = small_memory(10, ERRORS[0], [])
    with pytest.raises(torch.OutOfMemoryError):
        worker(window)


def test_another_error_is_not_taken_for_lack_of_memory(tiny, window):
    sizes = []
    losses = small_memory(0, RuntimeError("shapes do not match"), sizes)
    with pytest.raises(RuntimeError, match="shapes"):
        scorer_of(tiny.model("qwen3"), {"task": Numbers().encode(window)}, loss_fn=losses)
    assert len(sizes) == 1


def test_validation_gradients_are_taken_in_batches_that_fit(tiny, window):
    model, validation = tiny.model("qwen3"), {"task": Numbers().encode(window)}
    scorer, fitted = job_of(model, validation, batch_tokens=64, loss_fn=small_memory(20, ERRORS[0], [])).scorer()
    assert fitted == 16
    batch = next(iter_batches(validation["task"], 16))
    torch.testing.assert_close(scorer(batch)[0], scorer_of(model, validation)(batch)[0], rtol=1e-9, atol=0)
    with pytest.raises(torch.OutOfMemoryError):
        scorer_of(model, validation, batch_tokens=64, loss_fn=small_memory(10, ERRORS[0], []))


def test_halves_hold_the_rows_without_columns_of_padding(tiny):
    batch = tiny.batch([9, 7, 4, 3, 2])
    first, second = batch.halves()
    assert first.input_ids.shape == (2, 9)
    assert second.input_ids.shape == (3, 4)
    torch.testing.assert_close(second.labels, batch.labels[2:, :4])
    assert [*first.indices, *second.indices] == batch.indices


def test_a_window_that_was_interrupted_goes_on_where_it_was(tiny, window, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "KEEP_EVERY", 0.0)
    model, encoder = tiny.model("qwen3"), Numbers()
    job = job_of(model, {"task": encoder.encode(window[:2])}, encoder=encoder, batch_tokens=16)
    whole = score_matrix(job.worker()(window)[0])
    seen: list[int] = []

    def worker_that_stops(after):
        def losses(model, batch):
            if len(seen) == after:
                raise KeyboardInterrupt
            seen.append(batch.input_ids.numel())
            return causal_lm_losses(model, batch)

        worker = job.worker()
        worker.rows.loss_fn, worker.kept = losses, tmp_path
        return worker

    worker_that_stops(None)(window)
    batches = len(seen)
    for file in tmp_path.iterdir():
        file.unlink()
    seen.clear()
    with pytest.raises(KeyboardInterrupt):
        worker_that_stops(2)(window)
    (kept,) = tmp_path.iterdir()
    table, _ = worker_that_stops(None)(window)
    assert len(seen) == batches
    assert score_matrix(table).tobytes() == whole.tobytes()
    content = bytearray(kept.read_bytes())
    content[-20] ^= 255  # of a number
    kept.write_bytes(content)
    with pytest.warns(UserWarning, match="is damaged"):
        table, _ = worker_that_stops(None)(window)
    assert len(seen) == 2 * batches
    assert score_matrix(table).tobytes() == whole.tobytes()


def test_parts_of_a_window_count_by_their_work(tiny):
    """The longest rows come first, so a count of rows would give an ETA that is several times too long."""
    lengths = [40] * 4 + [4] * 36
    window = list(Pool([{"text": " ".join(["7"] * length)} for length in lengths]))
    worker = job_of(tiny.model("qwen3"), {"task": Numbers().encode(window[:2])}, encoder=Numbers()).worker()
    worker.batch_tokens, done = 80, []
    worker(window, done.append)
    assert sum(done) == 40
    assert done[0] == 10  # two of the four long rows: 80 of 304 tokens
    assert sum(done[:2]) == 21
