"""Influence functions against dense inverses of the Fisher, layer by layer, in float64."""

import functools

import pytest
import torch
from jobs import preconditioned

from iprox.influence.estimators.ekfac import as_matrix
from iprox.influence.scorer import BatchScorer
from iprox.influence.validation_gradients import mean_gradient
from iprox.kronecker.eigen import EigenBasis, kronecker_curvature, together
from iprox.models.experts import experts_split
from iprox.models.layers import influence_layers
from iprox.models.loss import causal_lm_losses
from iprox.models.observe import frozen, watched_backward
from iprox.proxy.compress import derive_proxy
from iprox.proxy.size import Size

FAMILIES = ["qwen3", "qwen2", "gpt2"]  # no biases; some; all, with transposed weights
DAMPING = 0.1


def per_token(model, layers, batch):
    """Inputs (with the bias's 1) and output gradients of every layer, a list of examples without padding."""
    seen = {name: [] for name in layers}
    with frozen(model):
        for row in range(len(batch.input_ids)):
            length = int(batch.lengths[row])
            one = batch.__class__(
                batch.input_ids[row : row + 1, :length],
                batch.labels[row : row + 1, :length],
                batch.lengths[row : row + 1],
                batch.indices[row : row + 1],
            )

            def keep(name, h, delta):
                h = h[0]
                if layers[name].bias is not None:
                    h = torch.cat([h, torch.ones(len(h), 1, dtype=h.dtype)], dim=1)
                seen[name].append((h, delta[0]))

            watched_backward(model, layers, lambda one=one: causal_lm_losses(model, one), keep)
    return seen


@pytest.fixture(params=FAMILIES)
def setting(request, tiny):
    model = tiny.model(request.param)
    sample = tiny.batch([9, 6, 11, 4, 8], seed=3, padding=3)
    query = mean_gradient(model, [tiny.batch([8, 5], seed=1)])
    layers = influence_layers(model)
    return model, layers, sample, query, per_token(model, layers, sample)


def dense_solve(fisher, gradient):
    G = as_matrix(gradient)
    ridge = DAMPING * fisher.diagonal().mean()
    return torch.linalg.solve(fisher + ridge * torch.eye(len(fisher), dtype=fisher.dtype), G.flatten()).view_as(G)


def test_kfac_is_the_dense_kronecker_inverse(setting):
    model, layers, sample, query, seen = setting
    bases = together(kronecker_curvature(model, layers, [sample], corrected=False, labels="data"))
    for name, tokens in seen.items():
        h, delta = (torch.cat(part) for part in zip(*tokens, strict=True))
        fisher = torch.kron(delta.mT @ delta / len(tokens), h.mT @ h / len(h))
        got = bases[name].solve(as_matrix(query[name]), DAMPING)
        torch.testing.assert_close(got, dense_solve(fisher, query[name]), rtol=1e-7, atol=1e-10)


def test_groups_of_layers_give_the_same_curvature(setting):
    model, layers, sample, _, _ = setting
    whole = together(kronecker_curvature(model, layers, [sample]))
    parts = list(kronecker_curvature(model, layers, [sample], memory=1))
    assert [len(part) for part in parts] == [1] * len(layers)
    for part in parts:
        for name, basis in part.items():
            for each in EigenBasis.__slots__:
                torch.testing.assert_close(getattr(basis, each), getattr(whole[name], each))


def test_ekfac_is_the_dense_inverse_with_eigenvalues_of_the_fisher_in_the_kronecker_basis(setting):
    model, layers, sample, query, seen = setting
    bases = together(kronecker_curvature(model, layers, [sample], labels="data"))
    for name, tokens in seen.items():
        gradients = torch.stack([(delta.mT @ h).flatten() for h, delta in tokens])
        fisher = gradients.mT @ gradients / len(tokens)
        Q = torch.kron(bases[name].left, bases[name].right)
        eigenvalues = (Q.mT @ fisher @ Q).diagonal()
        corrected = Q @ torch.diag(eigenvalues) @ Q.mT
        assert torch.isclose(corrected.trace(), fisher.trace(), rtol=1e-9)
        got = bases[name].solve(as_matrix(query[name]), DAMPING)
        torch.testing.assert_close(got, dense_solve(corrected, query[name]), rtol=1e-7, atol=1e-10)
        # No diagonal in this basis is closer to the Fisher: K-FAC's, for one.
        kfac = together(kronecker_curvature(model, {name: layers[name]}, [sample], corrected=False, labels="data"))[
            name
        ]
        plain = Q @ torch.diag(kfac.eigenvalues.flatten()) @ Q.mT
        assert (corrected - fisher).norm() <= (plain - fisher).norm() * (1 + 1e-9)
        break  # one layer: the others differ in nothing but their shapes, and dense Fishers are large


@pytest.mark.parametrize("curvature", ["ekfac", "kfac"])
def test_strong_damping_ranks_as_tracin(tiny, curvature):
    # Towards infinite damping (F + λI)⁻¹ is the identity over λ, so per layer the direction is that of Ḡ.
    model, sample = tiny.model(), tiny.batch([9, 6, 11], seed=3)
    query = mean_gradient(model, [tiny.batch([8, 5], seed=1)])
    solved = preconditioned(model, {"task": query}, [sample], curvature, damping=1e9)["task"]
    for name, part in query.items():
        cosine = (part.weight * solved[name].weight).sum() / part.weight.norm() / solved[name].weight.norm()
        assert cosine > 1 - 1e-6


@pytest.mark.parametrize("curvature", ["ekfac", "kfac"])
def test_the_seed_draws_the_labels(tiny, curvature):
    model, sample = tiny.model(), tiny.batch([9, 6, 11], seed=3)
    query = mean_gradient(model, [tiny.batch([8, 5], seed=1)])
    draw = functools.partial(preconditioned, model, {"t": query}, [sample], curvature)
    first, again, other = (draw(seed=seed)["t"] for seed in (1, 1, 2))
    for name, part in first.items():
        assert torch.equal(part.weight, again[name].weight)
        assert not torch.equal(part.weight, other[name].weight)


@pytest.mark.parametrize("curvature", ["ekfac", "kfac"])
def test_padding_and_batches_change_nothing(tiny, curvature):
    model = tiny.model("qwen2")
    query = mean_gradient(model, [tiny.batch([8, 5], seed=1)])
    together = tiny.batch([9, 6, 11], seed=3, padding=4)
    one = preconditioned(model, {"t": query}, [together], curvature)["t"]
    other = preconditioned(model, {"t": query}, tiny.rows(together), curvature)["t"]
    for name, part in one.items():
        torch.testing.assert_close(part.weight, other[name].weight, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(part.bias, other[name].bias, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("curvature", ["ekfac", "kfac"])
def test_scattered_experts_of_a_proxy(tiny, curvature):
    target = tiny.model("qwen3-moe")
    pool = tiny.batch([9, 6, 11, 5], seed=3)
    with experts_split(target):
        proxy, _ = derive_proxy(target, [pool], Size(0.4))
        query = mean_gradient(proxy, [tiny.batch([8, 5], seed=1)])
        solved = preconditioned(proxy, {"t": query}, [pool], curvature)
        scores, _ = BatchScorer(proxy, solved)(pool)
    assert torch.isfinite(scores).all()
    assert set(solved["t"]) == set(query)


def test_an_example_counts_most_for_itself(tiny):
    # With its own curvature an influence function is a positive definite form: self-influence is above 0.
    model, pool = tiny.model(), tiny.batch([9, 6, 11], seed=3)
    for number, row in enumerate(tiny.rows(pool)):
        query = mean_gradient(model, [row])
        solved = preconditioned(model, {"t": query}, [pool], "ekfac")
        assert BatchScorer(model, solved)(pool)[0][number, 0] > 0


@pytest.mark.parametrize("curvature", ["ekfac", "kfac"])
def test_a_layer_that_no_example_moved_keeps_its_gradient_and_is_named(tiny, curvature):
    target = tiny.model("qwen3-moe")
    with experts_split(target):
        query = mean_gradient(target, [tiny.batch([12, 12, 12], seed=1)])
        with pytest.warns(UserWarning, match="experts.*use more curvature examples"):
            # One token reaches two of four experts.
            solved = preconditioned(target, {"t": query}, [tiny.batch([2], seed=3)], curvature)["t"]
    assert any(solved[name] is part for name, part in query.items())
