"""Estimators that `benchmarks/defaults.py` tries, to see whether iprox should have them.

- *Linearized Adam* (arXiv:2602.00329): LESS replaces a candidate's gradient by Adam's step Γ(G). At a fixed state,
  Γ(G) ≈ Γ(0) + D∘G with D = (1 - β₁) / ((1 - β₁ᵗ)(√v̂ + ε)), so ⟨Γ(G), Ḡ⟩ ranks as ⟨G, D∘Ḡ⟩ does: TracIn with
  another validation gradient.
- *EK-FAC refined by conjugate gradients*: (F + λI)⁻¹Ḡ of the Gauss-Newton matrix F over all layers at once, from
  EK-FAC's solution as the start and its inverse as the preconditioner. Its cost does not depend on the pool.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call

from iprox.data import Batch
from iprox.influence.estimators.less import adam_direction
from iprox.influence.gradients import ExampleGradient, LowRankGradient
from iprox.influence.shared_basis import SharedQueries
from iprox.kronecker.eigen import EigenBasis
from iprox.models.loss import causal_lm_logits
from iprox.models.optimizer_state import AdamState

# One weight gradient, or a direction, per layer.
Weights = dict[str, Tensor]


def slopes(state: AdamState) -> Weights:
    """Return D of every layer [m, n]: the derivative of Adam's next step by the gradient, at gradient 0."""
    beta1, beta2 = state.betas
    step = state.step + 1
    return {
        name: (1 - beta1) / (1 - beta1**step) / ((moments.square * (beta2 / (1 - beta2**step))).sqrt() + state.eps)
        for name, moments in state.weights.items()
    }


def scaled(example: ExampleGradient, by: Weights) -> ExampleGradient:
    """Return D∘G of one example, as a product of the whole gradient and the identity."""
    return {name: whole((part.left @ part.right.mT).float() * by[name]) for name, part in example.items()}


def whole(gradient: Tensor) -> LowRankGradient:
    """Return a gradient [m, n] in the form that shared bases are made from."""
    return LowRankGradient(gradient, identity(gradient.shape[1]), None, gradient.new_zeros(()))


@functools.cache
def identity(size: int) -> Tensor:
    """Return the identity, one for all examples."""
    return torch.eye(size)


class AdamNorms:
    """Norms of D∘G(z) and Γ(G(z)), and LESS's own scores, of the candidates of a batch."""

    def __init__(self, state: AdamState, queries: Mapping[str, SharedQueries], count: int) -> None:
        self.state, self.slopes, self.queries = state, slopes(state), queries
        self.linear, self.adam = torch.zeros(count), torch.zeros(count)
        self.scores = {name: torch.zeros(count, len(query.norms)) for name, query in queries.items()}

    def add(self, name: str, h: Tensor, delta: Tensor, indices: Sequence[int]) -> None:
        """Add one layer. Forms a gradient at a time."""
        for index, x, d in zip(indices, h, delta, strict=False):
            gradient = (d.mT @ x).float()
            self.linear[index] += (gradient * self.slopes[name]).square().sum()
            step = adam_direction(gradient, self.state.weights[name], self.state)
            self.adam[index] += step.square().sum()
            for task, query in self.queries.items():
                if name in query.layers:
                    layer = query.layers[name]
                    projected = layer.left.float().mT @ step @ layer.right.float()
                    self.scores[task][index] += layer.cores.float() @ projected.flatten()


def refined(
    model: nn.Module,
    batches: Sequence[Batch],
    gradient: Weights,
    curvature: Mapping[str, EigenBasis],
    damping: float,
    iterations: int,
) -> tuple[Weights, list[float]]:
    """Return (F + λI)⁻¹Ḡ by preconditioned conjugate gradients, and the residual's norm by iteration.

    F = E_z[Σ_t Jₜᵀ Hₜ Jₜ / n_z²], the Fisher that EK-FAC approximates; λ is each layer's, as there. A product costs
    ten times the layers' parameters per token of the sample in FLOPs.

    Args:
        model: in float32, with an attention that has a forward derivative (`eager`).
        batches: the sample.
        gradient: Ḡ [m, n] per layer.
        curvature: EK-FAC of each layer.
        damping: λ as a share of each layer's mean eigenvalue.
        iterations: how many products.
    """
    ridges = {name: damping * float(curvature[name].eigenvalues.mean()) for name in gradient}

    def precondition(residual: Weights) -> Weights:
        found = {name: curvature[name].solve(part, damping) for name, part in residual.items()}
        return {name: residual[name] if part is None else part for name, part in found.items()}

    def product(direction: Weights) -> Weights:
        curved = gauss_newton(model, batches, direction)
        return {name: curved[name] + ridges[name] * part for name, part in direction.items()}

    return conjugate_gradients(product, precondition, gradient, iterations)


def conjugate_gradients(
    product: Callable[[Weights], Weights],
    precondition: Callable[[Weights], Weights],
    right: Weights,
    iterations: int,
) -> tuple[Weights, list[float]]:
    """Solve A x = b from x = M⁻¹b by preconditioned conjugate gradients; also return ‖b - A x‖ / ‖b‖ by iteration."""
    x = precondition(right)
    image = product(x)
    residual = {name: part - image[name] for name, part in right.items()}
    z = precondition(residual)
    direction, slope = dict(z), inner(residual, z)
    size, history = inner(right, right) ** 0.5, []
    for _ in range(iterations):
        history.append(inner(residual, residual) ** 0.5 / size)
        image = product(direction)
        length = slope / inner(direction, image)
        x = {name: part + length * direction[name] for name, part in x.items()}
        residual = {name: part - length * image[name] for name, part in residual.items()}
        z = precondition(residual)
        slope, before = inner(residual, z), slope
        direction = {name: part + slope / before * direction[name] for name, part in z.items()}
    history.append(inner(residual, residual) ** 0.5 / size)
    return x, history


def inner(left: Weights, right: Weights) -> float:
    """Return the inner product of two directions, in float64."""
    return sum(float((left[name].double() * right[name].double()).sum()) for name in left)


def gauss_newton(model: nn.Module, batches: Sequence[Batch], direction: Weights) -> Weights:
    """Return F v by one forward derivative and one backward pass per batch, as if per example: E_z[ΣJᵀHJ v / n_z²]."""
    parameters, module = dict(model.named_parameters()), Logits(model)
    names = {name: f"{name}.weight" for name in direction}
    total = {name: torch.zeros_like(part) for name, part in direction.items()}
    count = 0
    for batch in batches:
        weights = {f"model.{names[name]}": parameters[names[name]].detach() for name in direction}
        with torch.no_grad(), forward_ad.dual_level():
            duals = {
                key: forward_ad.make_dual(w, v) for (key, w), v in zip(weights.items(), direction.values(), strict=True)
            }
            logits, _, rows = functional_call(module, duals, (batch,))
            primal, tangent = forward_ad.unpack_dual(logits)
            assert tangent is not None
            chances = primal.softmax(1)
            curved = chances * (tangent - (chances * tangent).sum(1, keepdim=True))
            curved /= torch.bincount(rows)[rows, None].square()
        with torch.enable_grad():
            weights = {key: weight.requires_grad_() for key, weight in weights.items()}
            logits, _, _ = functional_call(module, weights, (batch,))
            found = torch.autograd.grad(logits, list(weights.values()), curved)
        for name, part in zip(direction, found, strict=True):
            total[name] += part
        count += len(batch.indices)
    return {name: part / count for name, part in total.items()}


class Logits(nn.Module):
    """A model as a module that returns the logits of its supervised tokens."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return what `causal_lm_logits` does."""
        return causal_lm_logits(self.model, batch)
