from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from iprox.data.batching import padded_width
from iprox.errors import InputError
from iprox.influence.estimators.base import GradientEstimator, Inputs, QueryTokens
from iprox.influence.estimators.registry import REGISTRY
from iprox.influence.scorer import BatchScorer
from iprox.influence.validation_gradients import mean_gradient
from iprox.models import flops
from iprox.models.adapters import with_lora
from iprox.models.experts import split_experts
from iprox.models.layers import compressible_layers, weight_shape
from iprox.models.loss import causal_lm_losses, plain_logits
from iprox.models.observe import frozen, watched_backward
from iprox.settings import InfluenceSection


def test_compression_counts_each_reading_and_factorizes_once(tiny):
    model = tiny.model()
    reading = 2 * (100 * flops.forward_flops(model) + 40 * flops.head_flops(model))
    once, twice = (flops.compression_flops(model, 100, 40, passes) for passes in (1, 2))
    assert twice - once == pytest.approx(reading)
    # Without a probe there is nothing but the SVDs, whatever there is to read.
    shapes = [weight_shape(layer) for layer in compressible_layers(model).values()]
    svds = sum(4 * m * n * min(m, n) + 9 * min(m, n) ** 3 for m, n in shapes)
    assert flops.compression_flops(model, 100, 40, 0) == pytest.approx(svds)
    roots = sum((m**3 + n**3) / 3 for m, n in shapes)
    moments = 100 * sum(2 * (m**2 + n**2) for m, n in shapes)
    assert once == pytest.approx(reading + moments + roots + svds)


@pytest.mark.parametrize("name", ["kfac", "ekfac"])
def test_curvature_is_charged_what_torch_counts(tiny, name):
    """But for eigendecompositions, which torch does not count; rows long enough that norms form gradients."""
    model, sample = tiny.model("qwen2"), tiny.batch([48] * 4)
    queries = {f"t{i}": mean_gradient(model, [tiny.batch([8, 5], seed=i)]) for i in range(3)}
    supervised = int((sample.labels[:, 1:] != -100).sum())
    estimator = REGISTRY[name]
    assert isinstance(estimator, GradientEstimator)
    with FlopCounterMode(display=False) as counter:
        inputs = Inputs(settings=InfluenceSection(estimator=name), model=model, validation={}, sample=[sample])
        estimator.precondition(queries, inputs)
    kinds = counter.get_flop_counts()["Global"]
    counted = sum(flops_ for kind, flops_ in kinds.items() if "attention" not in str(kind))
    # Biases are one more input each; attention's products are left out by us, so they are taken out of torch's too.
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        causal_lm_losses(model, sample)
    outside = sum(n for kind, n in forward.get_flop_counts()["Global"].items() if "bmm" in str(kind))
    shapes = [weight_shape(layer) for layer in compressible_layers(model).values()]
    bases = sum(9 * (m**3 + n**3) for m, n in shapes)
    ours = estimator.query_flops(model, QueryTokens(3, 0, 0, 4 * 48, supervised)) - bases
    assert ours == pytest.approx(counted - outside, rel=0.06)


def test_training_adapters_is_charged_what_torch_counts(tiny):
    """But for attention's own products. Inputs need gradients, so that the first layers are no exception."""
    model, batch = tiny.model(dtype=torch.float32), tiny.batch([12, 9])
    supervised = padded_width(int((batch.labels[:, 1:] != -100).sum()))  # so many the head is run on
    charged = flops.training_flops(model, batch.input_ids.numel(), supervised, lora_rank=3)
    adapted = with_lora(model, "org/name", rank=3)
    adapted.enable_input_require_grads()
    plain_logits(adapted)  # tried once, not counted
    with FlopCounterMode(display=False) as counter:
        causal_lm_losses(adapted, batch).sum().backward()
    kinds = counter.get_flop_counts()["Global"]
    counted = sum(flops_ for kind, flops_ in kinds.items() if "attention" not in str(kind) and "bmm" not in str(kind))
    assert charged == pytest.approx(counted, rel=0.02)


def test_experts_are_charged_for_the_tokens_that_use_them(tiny):
    model, pool = tiny.model("qwen3-moe"), tiny.batch([9, 3, 7])
    split_experts(model)
    query = mean_gradient(model, [tiny.batch([8, 5], seed=1)])
    scorer = BatchScorer(model, {"t": query}, normalize="cosine")
    met = 0.0
    layers = compressible_layers(model)

    def sink(name, h, _):
        nonlocal met
        m, n = weight_shape(layers[name])
        met += 2 * m * n * int((h != 0).any(-1).sum())

    counted = torch.arange(pool.input_ids.shape[1])[None] < pool.lengths[:, None]
    with frozen(model):
        watched_backward(model, layers, lambda: causal_lm_losses(model, pool), sink, counted)
    assert 19 * scorer.contraction_flops == pytest.approx(met)
    assert 19 * flops.contraction_flops(model) == pytest.approx(met)
    assert flops.forward_flops(model) == pytest.approx(flops.contraction_flops(model))


def test_experts_count_for_the_tokens_that_use_them_whatever_the_config_calls_it(tiny):
    model = tiny.model("qwen2-moe")
    split_experts(model)
    experts = [name for name in compressible_layers(model) if ".gate_up." in name]
    chosen, shares = model.config.num_experts_per_tok, flops.layer_shares(model, experts)
    assert set(shares.values()) == {chosen / model.config.num_experts}
    for names, known in (({"top_k_experts": chosen}, True), ({}, False)):  # as Gemma 4 has it; a model of another kind
        text = SimpleNamespace(**names)
        model.config = SimpleNamespace(get_text_config=lambda text=text: text)
        if known:
            assert flops.layer_shares(model, experts) == shares
        else:
            with pytest.raises(InputError, match="does not say how many experts"):
                flops.layer_shares(model, experts)
