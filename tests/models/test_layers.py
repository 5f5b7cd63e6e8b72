import pytest
import torch
from torch import nn

from iprox.errors import InputError
from iprox.models.layers import LowRankLinear, compressible_layers, influence_layers, low_rank_layers, replace_module


def test_the_head_and_the_embeddings_are_not_compressible(tiny):
    for tied in (True, False):
        names = compressible_layers(tiny.model("llama", tie_word_embeddings=tied))
        assert len(names) == 2 * 7
        assert not any("lm_head" in name or "embed" in name for name in names)


def test_a_low_rank_layer_is_two_linear_children(tiny):
    up, down, bias = torch.randn(5, 2), torch.randn(2, 7), torch.randn(5)
    layer = LowRankLinear.from_factors(up, down, bias, torch.float32)
    assert [(name, type(child)) for name, child in layer.named_children()] == [("down", nn.Linear), ("up", nn.Linear)]
    x = torch.randn(3, 7)
    torch.testing.assert_close(layer(x), x @ (up @ down).mT + bias)
    torch.testing.assert_close(layer.weight, up @ down)
    assert (layer.in_features, layer.out_features, layer.rank) == (7, 5, 2)


def test_influence_layers_of_a_proxy(tiny):
    model = tiny.model("llama")
    name = "model.layers.0.mlp.up_proj"
    replace_module(model, name, LowRankLinear(32, 48, 4, dtype=torch.float64))
    assert list(low_rank_layers(model)) == [name]
    assert name not in compressible_layers(model)
    layers = influence_layers(model)
    assert isinstance(layers[name], LowRankLinear)
    assert len(layers) == 14


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(InputError, match="no linear layer"):
        compressible_layers(nn.Sequential(nn.LayerNorm(3)))
