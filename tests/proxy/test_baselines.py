"""Each method's weighing against its definition by dense algebra."""

import pytest
import torch

from iprox.kronecker.moments import collect_moments
from iprox.models.layers import compressible_layers, dense_weight
from iprox.proxy.factorizations import PROBED, layer_spectrum

NAME = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def layer(tiny):
    model = tiny.model()
    layers = compressible_layers(model)
    moments, _ = collect_moments(model, layers, [tiny.batch([9, 7, 8, 5], seed=2)])
    return dense_weight(layers[NAME]).detach(), moments[NAME]


def spectrum(method, weight, moments, ridge=1e-2):
    return layer_spectrum(method, weight, moments, ridge, torch.Generator().manual_seed(0))


def weights_of(method, weight, moments):
    """The (output, input) moments whose norm each method minimizes, written out."""
    m, n = weight.shape
    C_d, C_h = moments.gradients.matrix, moments.inputs.matrix
    ridged = C_h + 1e-2 * C_h.diagonal().mean() * torch.eye(n, dtype=C_h.dtype)
    identity = torch.eye(m, dtype=C_h.dtype), torch.eye(n, dtype=C_h.dtype)
    return {
        "svd": identity,
        "svd-llm": (identity[0], ridged),
        "asvd": (identity[0], torch.diag(C_h.diagonal().sqrt())),
        "fwsvd": (torch.diag(C_d.diagonal()), identity[1]),
        "ipsvd": (C_d + 1e-2 * C_d.diagonal().mean() * identity[0], ridged),
    }[method]


@pytest.mark.parametrize("method", ["ipsvd", "svd", "svd-llm", "asvd", "fwsvd"])
def test_a_method_is_best_in_its_own_norm(layer, method):
    weight, moments = layer
    out, inner = weights_of(method, weight, moments)

    def error(other):
        up, down = spectrum(other, weight, moments).factors(6)
        E = weight - up @ down
        return ((out @ E @ inner) * E).sum().item()

    own = error(method)
    tail = spectrum(method, weight, moments).singular_values[6:].square().sum().item()
    assert own == pytest.approx(tail, rel=1e-6)
    for other in {"ipsvd", "svd", "svd-llm", "asvd", "fwsvd", "random"} - {method}:
        assert own <= error(other) * (1 + 1e-9)


def test_random_factors_give_the_weight_back_at_full_rank_only(layer):
    weight, _ = layer
    up, down = spectrum("random", weight, None).factors(32)
    torch.testing.assert_close(up @ down, weight)
    up, down = spectrum("random", weight, None).factors(4)
    assert (weight - up @ down).norm() > 0.5 * weight.norm()
    assert torch.equal(spectrum("random", weight, None).left, spectrum("random", weight, None).left)


@pytest.mark.parametrize("method", PROBED)
def test_a_method_that_needs_moments_says_so(layer, method):
    with pytest.raises(ValueError, match="needs moments"):
        spectrum(method, layer[0], None)


def test_the_ridge_is_chosen_or_taken(layer):
    weight, moments = layer
    chosen = spectrum("ipsvd", weight, moments, "auto")
    assert chosen.ridge_in == moments.inputs.shrinkage()
    assert chosen.ridge_out == moments.gradients.shrinkage()
    given = spectrum("svd-llm", weight, moments, 0.5)
    assert (given.ridge_in, given.ridge_out) == (0.5, None)


def test_a_larger_ridge_does_not_make_a_layer_matter_more(layer):
    weight, moments = layer
    small, large = (spectrum("ipsvd", weight, moments, ridge) for ridge in (1e-6, 3.0))
    plain, shrunk = small.singular_values, large.singular_values
    assert shrunk.square().sum() > 2 * plain.square().sum()
    assert large.comparable.square().sum() < 1.5 * small.comparable.square().sum()
    torch.testing.assert_close(large.comparable, shrunk / 4)
    assert torch.equal(spectrum("svd", weight, None).singular_values, spectrum("svd", weight, None, "auto").comparable)
