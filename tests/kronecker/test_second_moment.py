"""Moments against dense algebra: exact, sketched, their roots, the ridge."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iprox.kronecker.roots import DiagonalRoot
from iprox.kronecker.second_moment import LARGEST_RIDGE, LEAST_RIDGE, ExactMoment, SketchedMoment

CPU, DOUBLE = torch.device("cpu"), torch.float64


def examples(count: int, length: int, width: int, seed: int = 0, decay: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(0, -decay, width, dtype=DOUBLE)
    return torch.randn(count, length, width, generator=generator, dtype=DOUBLE) * scale


def filled(moment, x: torch.Tensor):
    for part in x.split(3):
        moment.add(part)
    moment.finish(x.shape[0] * x.shape[1])
    return moment


def exact_of(x: torch.Tensor) -> ExactMoment:
    return filled(ExactMoment(x.shape[-1], CPU, DOUBLE), x)


def test_an_exact_moment_is_the_mean_outer_product():
    x = examples(7, 5, 6)
    moment = exact_of(x)
    rows = x.reshape(-1, 6)
    torch.testing.assert_close(moment.matrix, rows.mT @ rows / len(rows))
    assert moment.mean_eigenvalue == pytest.approx(torch.linalg.eigvalsh(moment.matrix).mean().item())
    assert moment.squared_norm() == pytest.approx(moment.matrix.square().sum().item())
    torch.testing.assert_close(moment.diagonal(), rows.square().mean(0))
    blocks = sum((z.mT @ z).square().sum().item() for z in x)
    assert moment.block_squares == pytest.approx(blocks)


@given(width=st.integers(2, 12), directions=st.integers(1, 12), count=st.integers(1, 6), seed=st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_a_sketch_keeps_the_bound_of_frequent_directions(width, directions, count, seed):
    """0 ⪯ Σxxᵀ - SᵀS ⪯ ‖Σxxᵀ - best rank k‖_* / (ℓ-k) for every k < ℓ (Ghashami et al., theorem 1.1)."""
    x = examples(count, 9, width, seed)
    sketch = filled(SketchedMoment(width, directions, CPU, DOUBLE), x)
    rows = x.reshape(-1, width)
    gap = torch.linalg.eigvalsh(rows.mT @ rows - sketch.sketch.mT @ sketch.sketch)
    values = torch.linalg.eigvalsh(rows.mT @ rows).flip(0)
    assert gap.min() > -1e-9 * values[0]
    for k in range(sketch.directions):
        assert gap.max() <= values[k:].sum() / (sketch.directions - k) + 1e-9 * values[0]
    assert sketch.trace == pytest.approx(rows.square().sum().item())


@pytest.mark.parametrize("length", [3, 40])
def test_sketch_and_exact_moment_agree_where_both_run(length):
    """With as many directions as the width nothing is lost: the same moment, the same roots, the same ridge."""
    x = examples(6, length, 8)
    exact, sketch = exact_of(x), filled(SketchedMoment(8, 8, CPU, DOUBLE), x)
    assert sketch.squared_norm() == pytest.approx(exact.squared_norm())
    assert sketch.shrinkage() == pytest.approx(exact.shrinkage())
    torch.testing.assert_close(sketch.diagonal(), exact.diagonal())
    eye = torch.eye(8, dtype=DOUBLE)
    for ridge in (1e-3, 1.0):
        wanted = exact.matrix + ridge * exact.mean_eigenvalue * eye
        for moment in (exact, sketch):
            root = moment.root(ridge).weigh(eye).mT  # Rᵀ I = Rᵀ
            torch.testing.assert_close(root @ root.mT, wanted)


def test_a_sketch_spreads_the_trace_it_lost():
    x = examples(20, 10, 16, decay=0.3)
    sketch = filled(SketchedMoment(16, 4, CPU, DOUBLE), x)
    root = sketch.root(0.0 + 1e-9).weigh(torch.eye(16, dtype=DOUBLE))
    assert (root @ root.mT).trace().item() == pytest.approx(sketch.mean_eigenvalue * 16, rel=1e-6)


@pytest.mark.parametrize("make", [lambda x: exact_of(x).root(0.1), lambda x: DiagonalRoot(x[0, 0].abs() + 0.1)])
@pytest.mark.parametrize("kind", ["given", "sketched"])
def test_unweighing_undoes_weighing(make, kind):
    x = examples(4, 6, 7)
    root = make(x) if kind == "given" else filled(SketchedMoment(7, 3, CPU, DOUBLE), x).root(0.1)
    X = torch.randn(7, 5, dtype=DOUBLE)
    torch.testing.assert_close(root.unweigh(root.weigh(X)), X)


def test_a_moment_that_nothing_reached_counts_as_the_plain_norm():
    for moment in (ExactMoment(3, CPU, DOUBLE), SketchedMoment(3, 2, CPU, DOUBLE)):
        moment.finish(5)
        torch.testing.assert_close(moment.root(1e-2).weigh(torch.eye(3, dtype=DOUBLE)), torch.eye(3, dtype=DOUBLE))


def test_the_ridge_rule_is_that_of_ledoit_and_wolf():
    """Against the definition, block by block; and against the shrinkage that an oracle would choose."""
    generator = torch.Generator().manual_seed(3)
    truth = torch.diag(torch.linspace(0.5, 2.0, 10, dtype=DOUBLE))
    x = torch.randn(12, 4, 10, generator=generator, dtype=DOUBLE) @ truth.sqrt()
    moment = exact_of(x)
    C, N, T = moment.matrix, 12, 48
    mean = C.diagonal().mean() * torch.eye(10, dtype=DOUBLE)
    error = sum(((N / T) * z.mT @ z - C).square().sum() for z in x) / (N * (N - 1))
    share = (error / (C - mean).square().sum()).item()
    assert moment.shrinkage() == pytest.approx(share / (1 - share))
    shrunk = (1 - share) * C + share * mean
    assert (shrunk - truth).square().sum() < (C - truth).square().sum()


def test_the_ridge_falls_with_more_examples_and_stays_in_bounds():
    ridges = [exact_of(examples(count, 5, 8)).shrinkage() for count in (1, 4, 16, 64, 2048)]
    assert ridges[0] == LARGEST_RIDGE  # one example says nothing of its own error
    assert ridges == sorted(ridges, reverse=True)
    same = torch.ones(4, 2, 3, dtype=DOUBLE)  # examples that do not differ at all
    assert exact_of(same).shrinkage() == LEAST_RIDGE
