"""Estimators that the benchmarks try: conjugate gradients on the Gauss-Newton matrix, Adam linearized at its state."""

import sys
from pathlib import Path

import pytest
import torch

from iprox.influence.estimators.less import adam_direction
from iprox.models.layers import influence_layers
from iprox.models.loss import causal_lm_logits
from iprox.models.optimizer_state import AdamState, Moments

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
tried = pytest.importorskip("tried")


def test_a_product_is_that_of_the_dense_gauss_newton_matrix(tiny):
    model, batch = tiny.model("gpt-neox", attn_implementation="eager"), tiny.batch([7, 5])
    layers = influence_layers(model)
    generator = torch.Generator().manual_seed(0)
    direction = {
        name: torch.randn(layer.weight.shape, generator=generator, dtype=torch.float64)
        for name, layer in layers.items()
    }
    found = tried.gauss_newton(model, [batch], direction)
    weights = [layer.weight.requires_grad_() for layer in layers.values()]
    expected = [torch.zeros_like(weight) for weight in weights]
    logits, _, rows = causal_lm_logits(model, batch)
    counts = torch.bincount(rows)
    for token, row in zip(logits, rows.tolist(), strict=True):
        chances = token.softmax(0).detach()
        hessian = torch.diag(chances) - torch.outer(chances, chances)
        gradients = [torch.autograd.grad(logit, weights, retain_graph=True) for logit in token]
        moved = torch.stack(
            [sum((g * v).sum() for g, v in zip(each, direction.values(), strict=True)) for each in gradients]
        )
        for total, *parts in zip(expected, *gradients, strict=True):
            total += sum(p * c for p, c in zip(parts, hessian @ moved, strict=True)) / (counts[row] ** 2 * 2)
    for part, other in zip(found.values(), expected, strict=True):
        # The attention's softmax is in float32.
        torch.testing.assert_close(part, other, rtol=1e-5, atol=2e-7)


def test_conjugate_gradients_solve():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    matrix, right = root @ root.T + torch.eye(12), torch.randn(12, generator=generator, dtype=torch.float64)
    solved, residuals = tried.conjugate_gradients(
        lambda v: {"a": matrix @ v["a"]}, lambda r: {"a": r["a"] / matrix.diagonal()}, {"a": right}, 12
    )
    torch.testing.assert_close(solved["a"], torch.linalg.solve(matrix, right))
    assert residuals[-1] < 1e-8 < residuals[0]


def test_linearized_adam_is_the_derivative_of_its_step():
    generator = torch.Generator().manual_seed(0)
    mean, square = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64)
    state = AdamState({"layer": Moments(mean, square.square())}, {}, 7, (0.9, 0.999), 1e-8)
    gradient = torch.randn(4, 3, generator=generator, dtype=torch.float64)

    def step(scale):
        return adam_direction(scale * gradient.clone(), state.weights["layer"], state)

    slope = (step(1e-4) - step(-1e-4)) / 2e-4
    torch.testing.assert_close(slope, tried.slopes(state)["layer"] * gradient, rtol=1e-6, atol=1e-9)
