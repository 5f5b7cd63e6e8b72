import pytest
import torch

from iprox.kronecker.moments import MomentSettings, collect_moments
from iprox.kronecker.sample import sampled_labels
from iprox.models.layers import compressible_layers
from iprox.models.loss import causal_lm_logits, causal_lm_losses


def moments_by_hand(model, batch, rows):
    """h and δ of every token from hooks and autograd, one unpadded example at a time."""
    layers = compressible_layers(model)
    sums = {name: [0.0, 0.0] for name in layers}
    for row in rows(batch):
        kept, handles = {}, []
        for name, layer in layers.items():

            def hook(module, inputs, output, name=name, kept=kept):
                output.retain_grad()
                kept[name] = (inputs[0].detach(), output)

            handles.append(layer.register_forward_hook(hook))
        model.zero_grad()
        causal_lm_losses(model, row).sum().backward()
        for handle in handles:
            handle.remove()
        for name, (h, y) in kept.items():
            sums[name][0] += h[0].mT @ h[0]
            sums[name][1] += y.grad[0].mT @ y.grad[0]
    tokens = int(batch.lengths.sum())
    model.zero_grad()
    return {name: (h / tokens, d / tokens) for name, (h, d) in sums.items()}


@pytest.mark.parametrize("family", ["qwen3", "qwen2"])
def test_moments_equal_those_taken_by_hand(tiny, family):
    model = tiny.model(family)
    batch = tiny.batch([9, 5, 7], padding=3)
    layers = compressible_layers(model)
    moments, tokens = collect_moments(model, layers, [batch], MomentSettings(balanced=False))
    assert tokens.tokens == 21
    for name, (inputs, gradients) in moments_by_hand(model, batch, tiny.rows).items():
        torch.testing.assert_close(moments[name].inputs.matrix, inputs)
        torch.testing.assert_close(moments[name].gradients.matrix, gradients)


def test_batches_add_up(tiny):
    model, batch = tiny.model(), tiny.batch([9, 5, 7, 4])
    whole, _ = collect_moments(model, compressible_layers(model), [batch])
    split, _ = collect_moments(model, compressible_layers(model), tiny.rows(batch))
    for name in whole:
        torch.testing.assert_close(whole[name].inputs.matrix, split[name].inputs.matrix)
        torch.testing.assert_close(whole[name].gradients.matrix, split[name].gradients.matrix)


def test_layers_that_read_the_same_input_share_its_moment(tiny):
    model = tiny.model()
    moments, _ = collect_moments(model, compressible_layers(model), [tiny.batch([6, 8]), tiny.batch([5, 3], seed=1)])
    attention, mlp = "model.layers.0.self_attn", "model.layers.0.mlp"
    assert moments[f"{attention}.q_proj"].inputs is moments[f"{attention}.v_proj"].inputs
    assert moments[f"{mlp}.gate_proj"].inputs is moments[f"{mlp}.up_proj"].inputs
    assert moments[f"{attention}.q_proj"].inputs is not moments[f"{attention}.o_proj"].inputs


def test_the_model_is_left_as_it_was(tiny):
    model = tiny.model().train()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    collect_moments(model, compressible_layers(model), [tiny.batch([6])])
    assert model.training
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])


def test_no_probe_is_refused(tiny):
    with pytest.raises(ValueError, match="probe"):
        collect_moments(model := tiny.model(), compressible_layers(model), [])


def test_a_moment_that_is_not_finite_names_its_layer(tiny):
    model = tiny.model()
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.up_proj").weight[0, 0] = float("inf")
    with pytest.raises(FloatingPointError, match=r"model\.layers\.1"):
        collect_moments(model, compressible_layers(model), [tiny.batch([6])])


def test_sampled_labels_are_the_models_own(tiny):
    """At the supervised positions only, seeded, and as likely as the model says: its mean loss is its entropy."""
    model, batch = tiny.model(), tiny.batch([40] * 30)
    sampled = sampled_labels(model, batch, torch.Generator().manual_seed(0))
    again = sampled_labels(model, batch, torch.Generator().manual_seed(0))
    assert torch.equal(sampled.labels, again.labels)
    assert torch.equal(sampled.labels == -100, batch.labels == -100)
    with torch.no_grad():
        logits, _, _ = causal_lm_logits(model, batch)
        entropy = torch.distributions.Categorical(logits=logits).entropy().mean()
        drawn = sampled.labels[:, 1:][sampled.labels[:, 1:] != -100]
        loss = torch.nn.functional.cross_entropy(logits, drawn)
    assert loss.item() == pytest.approx(entropy.item(), rel=0.05)
    layers = compressible_layers(model)
    moments, _ = collect_moments(model, layers, [batch], MomentSettings(labels="sampled"))
    expected, _ = collect_moments(model, layers, [sampled])
    name = "model.layers.0.self_attn.q_proj"
    torch.testing.assert_close(moments[name].gradients.matrix, expected[name].gradients.matrix)


def test_settings_that_need_a_language_model_are_refused_without_one(tiny):
    model = tiny.model()
    with pytest.raises(ValueError, match="language model"):
        collect_moments(
            model,
            compressible_layers(model),
            [tiny.batch([6])],
            MomentSettings(labels="sampled"),
            lambda model, batch: causal_lm_losses(model, batch),
        )


def test_balanced_examples_count_by_their_supervised_tokens(tiny):
    """C_δ of one example, times its number of supervised tokens; the inputs' moment does not change."""
    model = tiny.model()
    layers = compressible_layers(model)
    (row,) = tiny.rows(tiny.batch([9]))
    supervised = int((row.labels[:, 1:] != -100).sum())
    assert supervised > 1
    plain, _ = collect_moments(model, layers, [row], MomentSettings(balanced=False))
    balanced, _ = collect_moments(model, layers, [row])
    for name in layers:
        torch.testing.assert_close(balanced[name].gradients.matrix, supervised * plain[name].gradients.matrix)
        torch.testing.assert_close(balanced[name].inputs.matrix, plain[name].inputs.matrix)
