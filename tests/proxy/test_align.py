import pytest
import torch

from iprox.errors import InputError
from iprox.models.layers import low_rank_layers
from iprox.models.loss import causal_lm_losses
from iprox.proxy.align import align, alignment_loss, kl_divergence, schedule, target_signals
from iprox.proxy.compress import derive_proxy
from iprox.proxy.size import Size


@pytest.fixture
def pair(tiny):
    """A target, its proxy and two batches, in float64."""
    model = tiny.model("gpt-neox")
    batches = [tiny.batch([9, 6]), tiny.batch([8, 7], seed=1)]
    proxy, _ = derive_proxy(model, batches, Size(0.4))
    return model, proxy, batches


def loss_of(proxy, model, batch, kl_weight=0.3, temperature=2.0):
    layers = low_rank_layers(proxy)
    gradients, logits = target_signals(model, list(layers), batch)
    return alignment_loss(proxy, layers, batch, gradients, logits, kl_weight=kl_weight, temperature=temperature)


def test_the_gradient_equals_finite_differences(pair):
    """Second-order autograd through the gradient distances, against central differences of the loss itself."""
    model, proxy, (batch, _) = pair
    proxy.requires_grad_(False)
    factors = [f for layer in low_rank_layers(proxy).values() for f in (layer.A.weight, layer.B.weight)]
    for factor in factors:
        factor.requires_grad_(True)
    loss, _, _ = loss_of(proxy, model, batch)
    loss.backward()
    generator = torch.Generator().manual_seed(0)
    step = 1e-5
    for factor in factors[:4] + factors[-4:]:
        index = int(torch.randint(factor.numel(), (1,), generator=generator))
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                factor.view(-1)[index] += sign * step
            ends.append(loss_of(proxy, model, batch)[0].item())
            with torch.no_grad():
                factor.view(-1)[index] -= sign * step
        assert factor.grad.view(-1)[index].item() == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-4, abs=1e-8)


def test_target_signals_are_the_gradient_of_the_mean_loss(pair):
    model, proxy, (batch, _) = pair
    names = list(low_rank_layers(proxy))
    gradients, logits = target_signals(model, names, batch)
    weights = [model.get_submodule(name).weight for name in names]
    expected = torch.autograd.grad(causal_lm_losses(model, batch).mean(), weights)
    for name, gradient in zip(names, expected, strict=True):
        torch.testing.assert_close(gradients[name], gradient)
    assert logits.shape == (int((batch.labels[:, 1:] != -100).sum()), 64)


def test_a_proxy_equal_to_its_target_has_no_loss(tiny):
    from iprox.models.layers import compressible_layers
    from iprox.proxy.factorise import with_factors
    from iprox.proxy.ipsvd import weighted_svd
    from iprox.proxy.spectra import SpectrumStore

    model, batch = tiny.model(), tiny.batch([9, 6])
    layers = compressible_layers(model)
    full = {name: min(layer.weight.shape) for name, layer in layers.items()}
    spectra = SpectrumStore()
    for name, layer in layers.items():
        spectra.put(name, weighted_svd(layer.weight.detach(), None, None))
    proxy = with_factors(model, layers, spectra, full)
    loss, gradient, kl = loss_of(proxy, model, batch)
    assert loss.item() == pytest.approx(0, abs=1e-6)  # factors are kept in float32
    assert gradient.item() >= -1e-12
    assert kl.item() >= 0


def test_kl_is_the_textbook_sum():
    p, q = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    P, Q = (p / 3).softmax(-1), (q / 3).softmax(-1)
    torch.testing.assert_close(kl_divergence(p, q, 3.0), 9 * (P * (P / Q).log()).sum(-1))


def test_alignment_lowers_the_loss_and_moves_only_factors(pair):
    model, proxy, batches = pair
    before = {name: parameter.clone() for name, parameter in proxy.named_parameters()}
    target_before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    start = sum(loss_of(proxy, model, batch)[0].item() for batch in batches)
    history = align(proxy, model, batches, steps=30, learning_rate=5e-3, kl_weight=0.3)
    end = sum(loss_of(proxy, model, batch)[0].item() for batch in batches)
    assert end < 0.9 * start
    assert [step.step for step in history.steps] == list(range(1, 31))
    assert history.tokens == 15 * sum(int(batch.lengths.sum()) for batch in batches)
    moved = {name for name, parameter in proxy.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {f"{name}.{factor}.weight" for name in low_rank_layers(proxy) for factor in "AB"}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, target_before[name])
        assert parameter.requires_grad


def test_the_same_seed_gives_the_same_factors(pair, tiny):
    import copy

    model, proxy, batches = pair
    other = copy.deepcopy(proxy)
    for candidate in (proxy, other):
        align(candidate, model, batches, steps=4, learning_rate=1e-3, seed=7)
    for one, two in zip(proxy.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_bfloat16_proxy_stays_bfloat16_and_keeps_its_rotary_frequencies(tiny):
    model = tiny.model(dtype=torch.bfloat16)
    batch = tiny.batch([9, 6])
    proxy, _ = derive_proxy(model, [batch], Size(0.4))
    buffers = {name: buffer.clone() for name, buffer in proxy.named_buffers()}
    align(proxy, model, [batch], steps=2)
    assert {parameter.dtype for parameter in proxy.parameters()} == {torch.bfloat16}
    for name, buffer in proxy.named_buffers():
        assert torch.equal(buffer, buffers[name])


def test_without_gradients_only_logits_are_matched(pair, monkeypatch):
    from iprox.proxy import align as module

    model, proxy, batches = pair
    monkeypatch.setattr(module, "gradient_distance", None)  # is not called
    history = align(proxy, model, batches, steps=30, learning_rate=5e-3, gradient_weight=0, kl_weight=1.0)
    first, last = history.steps[0], history.steps[-1]
    assert first.gradient is None
    assert first.loss == pytest.approx(first.kl)
    assert last.kl < 0.5 * first.kl


def test_the_weights_weigh(pair):
    model, proxy, (batch, _) = pair
    layers = low_rank_layers(proxy)
    proxy.requires_grad_(True)
    signals = target_signals(model, list(layers), batch)
    loss, gradient, kl = alignment_loss(
        proxy, layers, batch, *signals, gradient_weight=0.5, kl_weight=0.25, temperature=2.0
    )
    torch.testing.assert_close(loss, 0.5 * gradient + 0.25 * kl)
    torch.testing.assert_close(target_signals(model, (), batch)[1], signals[1])


def test_nothing_to_align_by_is_refused(pair):
    model, proxy, batches = pair
    with pytest.raises(InputError, match="both 0"):
        align(proxy, model, batches, steps=1, gradient_weight=0, kl_weight=0)


def test_a_loss_that_is_not_finite_stops_and_names_the_step(pair):
    model, proxy, batches = pair
    with torch.no_grad():
        next(iter(low_rank_layers(proxy).values())).A.weight[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="step 1"):
        align(proxy, model, batches, steps=2)


def test_a_dense_model_is_refused(tiny):
    model, batch = tiny.model(), tiny.batch([6])
    with pytest.raises(InputError, match="nothing to align"):
        align(model, model, [batch], steps=1)


def test_the_schedule_rises_and_falls():
    rates = [schedule(step, 100) for step in range(1, 101)]
    assert max(rates) == rates[9] == 1
    assert rates[-1] == pytest.approx(0, abs=1e-12)
    assert rates[:10] == sorted(rates[:10])
    assert rates[9:] == sorted(rates[9:], reverse=True)
