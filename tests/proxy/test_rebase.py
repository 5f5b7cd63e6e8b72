import copy

import pytest
import torch

from iprox.errors import InputError
from iprox.models.checkpoint import proxy_config
from iprox.models.layers import compressible_layers, dense_weight, layer_bias, low_rank_layers
from iprox.models.loading import model_fingerprint
from iprox.proxy.compress import derive_proxy
from iprox.proxy.rebase import followed, rebased
from iprox.proxy.size import Size


def nudged(model, size):
    """The model a little later: every parameter moved."""
    later = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in later.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(size * parameter.std().nan_to_num() * noise)
    return later


@pytest.fixture(params=["qwen2", "gemma3", "gpt2"])  # biases; norms of one plus the weight; transposed weights
def start(tiny, request):
    base = tiny.model(request.param)
    proxy, report = derive_proxy(base, [tiny.batch([9, 7, 12])], Size(0.4))
    return base, proxy, report.norm_scales


def test_without_a_change_the_proxy_is_the_same(start, tiny):
    base, proxy, scales = start
    same = rebased(proxy, base, copy.deepcopy(base), scales)
    ids = tiny.batch([8, 5]).input_ids
    torch.testing.assert_close(same(ids).logits, proxy(ids).logits, rtol=1e-5, atol=1e-6)  # factors in float32


def test_what_is_not_factorised_is_the_other_checkpoints_and_it_belongs_to_it(start):
    base, proxy, scales = start
    other = nudged(base, 0.1)
    moved = rebased(proxy, base, other, scales, target="later")
    assert torch.equal(moved.get_input_embeddings().weight, other.get_input_embeddings().weight)
    assert proxy_config(moved).target_fingerprint == model_fingerprint(other)
    assert proxy_config(moved).target == "later"
    assert {name: layer.rank for name, layer in low_rank_layers(moved).items()} == proxy_config(proxy).ranks
    for name, layer in compressible_layers(moved).items():  # left dense
        assert torch.equal(layer.weight, compressible_layers(other)[name].weight)


def test_every_layer_comes_closer_to_its_checkpoints_weight(start):
    base, proxy, scales = start
    other = nudged(base, 0.5)
    moved = low_rank_layers(rebased(proxy, base, other, scales))
    for name, layer in low_rank_layers(proxy).items():
        wanted = dense_weight(compressible_layers(other)[name])
        before, after = ((wanted - factors.weight).norm().item() for factors in (layer, moved[name]))
        assert after < before, name
        bias = layer_bias(compressible_layers(other)[name])
        assert (bias is None) == (moved[name].bias is None)
        if bias is not None:
            assert torch.equal(moved[name].bias, bias)


def test_rows_of_zeros_are_no_obstacle():
    B = torch.zeros(3, 8, dtype=torch.float64)
    B[0, 0] = 2.0
    change = torch.randn(5, 8, dtype=torch.float64)
    found = followed(change, B)
    assert torch.isfinite(found).all()
    torch.testing.assert_close((found @ B)[:, 0], change[:, 0])


def test_the_factors_follow_a_change_in_their_row_space_whole_and_any_other_as_well_as_they_can():
    torch.manual_seed(0)
    B = torch.randn(3, 8, dtype=torch.float64)
    inside = torch.randn(5, 3, dtype=torch.float64) @ B
    torch.testing.assert_close(followed(inside, B) @ B, inside)
    change = torch.randn(5, 8, dtype=torch.float64)
    least = (change - followed(change, B) @ B).norm()
    for _ in range(50):
        assert (change - (followed(change, B) + 0.1 * torch.randn(5, 3)) @ B).norm() > least
    projector = torch.eye(8) - B.mT @ torch.linalg.inv(B @ B.mT) @ B
    assert least == pytest.approx((change @ projector).norm().item())


def test_a_dense_model_is_refused(tiny):
    model = tiny.model("qwen3")
    with pytest.raises(InputError, match="no factors"):
        rebased(model, model, model, {})
