import pytest
import torch

from iprox.data import Batch
from iprox.errors import InputError
from iprox.models.layers import low_rank_layers
from iprox.models.loss import causal_lm_losses
from iprox.proxy.align import align, schedule
from iprox.proxy.align_loss import (
    alignment_loss,
    cosine_distance,
    frobenius_distance,
    kl_divergence,
    target_signals,
)
from iprox.proxy.align_signals import SignalStore, stored_bytes
from iprox.proxy.compress import derive_proxy
from iprox.proxy.size import Size
from iprox.settings import AlignSection


@pytest.fixture
def pair(tiny):
    """A target, its proxy and two batches, in float64."""
    model = tiny.model("gpt-neox")
    batches = [tiny.batch([9, 6]), tiny.batch([8, 7], seed=1)]
    proxy, _ = derive_proxy(model, batches, Size(0.4))
    return model, proxy, batches


BOTH = AlignSection(gradient_weight=1.0, kl_weight=0.3)


def both(epochs, learning_rate, **others):
    settings = {"gradient_weight": 1.0, "kl_weight": 0.3, **others}
    return AlignSection(epochs=epochs, learning_rate=learning_rate, **settings)


def loss_of(proxy, model, batch, objective=BOTH):
    layers = low_rank_layers(proxy)
    return alignment_loss(proxy, layers, batch, target_signals(model, layers, batch, objective), objective)


@pytest.mark.parametrize(
    "objective",
    [
        BOTH,
        AlignSection(gradient_weight=0, hidden_weight=0.7),
    ],
)
def test_the_gradient_equals_finite_differences(pair, objective):
    """Second-order autograd through the gradient distances, against central differences of the loss itself."""
    model, proxy, (batch, _) = pair
    proxy.requires_grad_(False)
    factors = [f for layer in low_rank_layers(proxy).values() for f in (layer.up.weight, layer.down.weight)]
    for factor in factors:
        factor.requires_grad_(True)
    loss_of(proxy, model, batch, objective).whole.backward()
    generator = torch.Generator().manual_seed(0)
    step = 1e-5
    for factor in factors[:4] + factors[-4:]:
        index = int(torch.randint(factor.numel(), (1,), generator=generator))
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                factor.view(-1)[index] += sign * step
            ends.append(loss_of(proxy, model, batch, objective).whole.item())
            with torch.no_grad():
                factor.view(-1)[index] -= sign * step
        found = 0.0 if factor.grad is None else factor.grad.view(-1)[index].item()
        assert found == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-4, abs=1e-8)


def test_target_signals_are_the_gradient_of_the_mean_loss(pair):
    model, proxy, (batch, _) = pair
    names = list(low_rank_layers(proxy))
    signals = target_signals(model, low_rank_layers(proxy), batch, BOTH)
    weights = [model.get_submodule(name).weight for name in names]
    expected = torch.autograd.grad(causal_lm_losses(model, batch).mean(), weights)
    for name, gradient in zip(names, expected, strict=True):
        torch.testing.assert_close(signals.gradients[name], gradient)
    assert signals.logits.shape == (int((batch.labels[:, 1:] != -100).sum()), 64)


def test_a_proxy_equal_to_its_target_has_no_loss(tiny):
    from iprox.models.layers import compressible_layers
    from iprox.proxy.factorize import with_factors
    from iprox.proxy.ipsvd import weighted_svd

    model, batch = tiny.model(), tiny.batch([9, 6])
    layers = compressible_layers(model)
    full = {name: min(layer.weight.shape) for name, layer in layers.items()}
    spectra = {name: weighted_svd(layer.weight.detach(), None, None) for name, layer in layers.items()}
    proxy = with_factors(model, spectra, full)
    losses = loss_of(proxy, model, batch, AlignSection(gradient_weight=1.0, kl_weight=0.3, hidden_weight=1.0))
    assert losses.whole.item() == pytest.approx(0, abs=1e-6)  # factors are kept in float32
    assert losses.gradient.item() >= -1e-12
    assert losses.kl.item() >= 0


def test_kl_is_the_textbook_sum():
    p, q = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    P, Q = (p / 3).softmax(-1), (q / 3).softmax(-1)
    torch.testing.assert_close(kl_divergence(p, q, 3.0), 9 * (P * (P / Q).log()).sum(-1))


def test_alignment_lowers_the_loss_and_moves_only_factors(pair):
    model, proxy, batches = pair
    before = {name: parameter.clone() for name, parameter in proxy.named_parameters()}
    target_before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    start = sum(loss_of(proxy, model, batch).whole.item() for batch in batches)
    history = align(proxy, model, batches, both(15, 5e-3))
    end = sum(loss_of(proxy, model, batch).whole.item() for batch in batches)
    assert end < 0.9 * start
    assert [step.step for step in history.steps] == list(range(1, 31))
    assert history.tokens == 15 * sum(int(batch.lengths.sum()) for batch in batches)
    moved = {name for name, parameter in proxy.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {f"{name}.{factor}.weight" for name in low_rank_layers(proxy) for factor in ("up", "down")}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, target_before[name])
        assert parameter.requires_grad


def test_the_same_seed_gives_the_same_factors(pair, tiny):
    import copy

    model, proxy, batches = pair
    other = copy.deepcopy(proxy)
    for candidate in (proxy, other):
        align(candidate, model, batches, both(2, 1e-3), seed=7)
    for one, two in zip(proxy.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_bfloat16_proxy_stays_bfloat16_and_keeps_its_rotary_frequencies(tiny):
    model = tiny.model(dtype=torch.bfloat16)
    batch = tiny.batch([9, 6])
    proxy, _ = derive_proxy(model, [batch], Size(0.4))
    buffers = {name: buffer.clone() for name, buffer in proxy.named_buffers()}
    align(proxy, model, [batch], AlignSection(epochs=2, gradient_weight=1.0))
    assert {parameter.dtype for parameter in proxy.parameters()} == {torch.bfloat16}
    assert all(factor.isfinite().all() for factor in proxy.parameters())
    for name, buffer in proxy.named_buffers():
        assert torch.equal(buffer, buffers[name])


def test_without_gradients_only_logits_are_matched(pair, monkeypatch):
    from iprox.proxy import align_loss as module

    model, proxy, batches = pair
    monkeypatch.setattr(module, "gradient_distance", None)  # is not called
    history = align(
        proxy, model, batches, AlignSection(epochs=15, learning_rate=5e-3, gradient_weight=0, kl_weight=1.0)
    )
    first, last = history.steps[0], history.steps[-1]
    assert first.gradient is None
    assert first.loss == pytest.approx(first.kl)
    assert last.kl < 0.5 * first.kl


def test_the_weights_weigh(pair):
    model, proxy, (batch, _) = pair
    layers = low_rank_layers(proxy)
    proxy.requires_grad_(True)
    objective = AlignSection(gradient_weight=0.5, kl_weight=0.25, hidden_weight=2.0)
    losses = loss_of(proxy, model, batch, objective)
    torch.testing.assert_close(losses.whole, 0.5 * losses.gradient + 0.25 * losses.kl + 2 * losses.hidden)
    without = target_signals(model, layers, batch, AlignSection(gradient_weight=0))
    torch.testing.assert_close(without.logits, target_signals(model, layers, batch, objective).logits)
    assert (without.gradients, without.hidden) == ({}, [])


def test_distances_are_the_textbook_ones():
    x, y = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    assert cosine_distance(x, y).item() == pytest.approx(1 - (x * y).sum().item() / (x.norm() * y.norm()).item())
    assert frobenius_distance(x, y).item() == pytest.approx(((x - y).norm() / y.norm()).item() ** 2)


def test_the_gradient_part_is_the_mean_over_layers_of_both_distances(pair):
    model, proxy, (batch, _) = pair
    proxy.requires_grad_(True)
    layers = low_rank_layers(proxy)
    signals = target_signals(model, layers, batch, BOTH)
    loss = causal_lm_losses(proxy, batch).mean()
    expected = []
    for name, layer in layers.items():
        up, down, G = layer.up.weight, layer.down.weight, signals.gradients[name]
        seen = torch.autograd.grad(loss, [up, down], retain_graph=True)
        pairs = zip(seen, (G @ down.mT, up.mT @ G), strict=True)
        expected.append(sum(1 - torch.cosine_similarity(one.flatten(), other.flatten(), dim=0) for one, other in pairs))
    torch.testing.assert_close(loss_of(proxy, model, batch).gradient, torch.stack(expected).mean())


def test_hidden_states_are_those_that_transformers_gives(pair):
    """The last layer's, before the final norm, are not among `hidden_states`; the others are."""
    model, proxy, (batch, _) = pair
    objective = AlignSection(gradient_weight=0, hidden_weight=1.0)
    found = target_signals(model, low_rank_layers(proxy), batch, objective).hidden
    with torch.no_grad():
        expected = model(input_ids=batch.input_ids, output_hidden_states=True).hidden_states[1:]
    assert len(found) == len(expected)
    for one, other in zip(found[:-1], expected[:-1], strict=True):
        torch.testing.assert_close(one, other)


def test_padding_does_not_change_the_loss(pair):
    model, proxy, (batch, _) = pair
    proxy.requires_grad_(True)
    pad = torch.nn.functional.pad
    padded = Batch(
        pad(batch.input_ids, (0, 5), value=3), pad(batch.labels, (0, 5), value=-100), batch.lengths, batch.indices
    )
    objective = AlignSection(gradient_weight=1.0, hidden_weight=1.0)
    losses = [loss_of(proxy, model, each, objective).whole for each in (batch, padded)]
    torch.testing.assert_close(*losses)


def test_nothing_to_align_by_is_refused():
    with pytest.raises(ValueError, match="all 0"):
        AlignSection(gradient_weight=0, kl_weight=0)


def factors_of(proxy):
    return {
        name: parameter.detach().clone() for name, parameter in proxy.named_parameters() if name.endswith("down.weight")
    }


def test_the_best_factors_are_kept_and_training_stops_when_fidelity_falls(pair):
    model, proxy, batches = pair
    fidelities = iter([0.5, 0.7, 0.6, 0.65, 0.9])
    seen = []

    def held_out():
        seen.append(factors_of(proxy))
        return next(fidelities)

    history = align(proxy, model, batches, both(4, 1e-3), held_out=held_out)
    assert [(point.step, point.fidelity) for point in history.held_out] == [(0, 0.5), (2, 0.7), (4, 0.6), (6, 0.65)]
    assert (history.best_step, history.stopped_early, len(history.steps)) == (2, True, 6)
    for name, factor in factors_of(proxy).items():
        assert torch.equal(factor, seen[1][name])


def test_a_proxy_that_alignment_makes_worse_is_left_as_it_was(pair):
    model, proxy, batches = pair
    before = factors_of(proxy)
    fidelities = iter([0.5, 0.4, 0.3])
    history = align(proxy, model, batches, both(4, 1.0), held_out=lambda: next(fidelities))
    assert history.best_step == 0
    for name, factor in factors_of(proxy).items():
        assert torch.equal(factor, before[name])


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("watched", [False, True])
def test_an_interrupted_alignment_goes_on_and_gives_the_same_factors(pair, tmp_path, watched):
    import copy

    model, proxy, batches = pair
    settings = both(4, 1e-3)
    copies = [copy.deepcopy(proxy) for _ in range(2)]

    def fidelity_of(one):
        return (lambda: -loss_of(one, model, batches[0]).whole.item()) if watched else None

    whole = align(copies[0], model, batches, settings, held_out=fidelity_of(copies[0]))
    state = tmp_path / "state.safetensors"
    interrupted = copy.deepcopy(proxy)
    steps = []

    def progress(count, *, earlier=False):
        assert not earlier
        steps.append(count)
        if len(steps) == 5:
            raise StoppedError

    with pytest.raises(StoppedError):
        align(interrupted, model, batches, settings, held_out=fidelity_of(interrupted), state=state,
              identity="a", progress=progress)  # fmt: skip
    with pytest.raises(InputError, match="another alignment"):
        align(copy.deepcopy(proxy), model, batches, settings, state=state, identity="b")
    done = []

    def progress_again(count, *, earlier=False):
        done.append((count, earlier))

    resumed = align(copies[1], model, batches, settings, held_out=fidelity_of(copies[1]), state=state,
                    identity="a", progress=progress_again)  # fmt: skip
    assert done == [(4, True), *[(1, False)] * 4]
    assert resumed.steps == whole.steps
    assert resumed.held_out == whole.held_out
    for one, other in zip(copies[0].parameters(), copies[1].parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_loss_that_is_not_finite_stops_and_names_the_step(pair):
    model, proxy, batches = pair
    with torch.no_grad():
        next(iter(low_rank_layers(proxy).values())).up.weight[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="step 1"):
        align(proxy, model, batches, AlignSection(epochs=1))


def test_a_dense_model_is_refused(tiny):
    model, batch = tiny.model(), tiny.batch([6])
    with pytest.raises(InputError, match="nothing to align"):
        align(model, model, [batch], AlignSection(epochs=1))


def test_the_schedule_rises_and_falls():
    rates = [schedule(step, 100) for step in range(1, 101)]
    assert max(rates) == rates[9] == 1
    assert rates[-1] == pytest.approx(0, abs=1e-12)
    assert rates[:10] == sorted(rates[:10])
    assert rates[9:] == sorted(rates[9:], reverse=True)


def test_what_the_target_says_is_asked_once_and_gives_the_same_factors(pair, tiny, tmp_path, monkeypatch):
    from iprox.proxy import align as module

    model, proxy, batches = pair
    asked = []
    monkeypatch.setattr(module, "target_signals", lambda *given: (asked.append(given), target_signals(*given))[1])
    settings = both(4, 1e-3, hidden_weight=0.1)
    other, _ = derive_proxy(model, batches, Size(0.4))
    align(other, model, batches, settings)
    assert len(asked) == 8
    store = SignalStore(tmp_path / "signals")
    align(proxy, model, batches, settings, store=store)
    assert len(asked) == 8 + 2
    for one, two in zip(proxy.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
    size = sum(file.stat().st_size for file in store.folder.iterdir())
    # Here everything is float64, and hidden states are kept too.
    layers = low_rank_layers(proxy)
    supervised = sum(int((batch.labels[:, 1:] != -100).sum()) for batch in batches)
    assert size > 2 * stored_bytes(layers, settings, len(batches), supervised, 64)
    first = next(store.folder.iterdir())
    first.write_bytes(first.read_bytes()[:100])  # a file that was cut off is made again
    align(other, model, batches, both(2, 1e-3, hidden_weight=0.1), store=SignalStore(store.folder))
    assert len(asked) == 8 + 2 + 1
    store.discard()
    assert not store.folder.exists()


def test_a_full_disk_spares_the_alignment(pair, tmp_path, monkeypatch):
    from iprox.proxy import align_signals

    def full(*_given, **_options):
        raise OSError(28, "No space left on device")

    model, proxy, batches = pair
    monkeypatch.setattr(align_signals, "save_checked", full)
    with pytest.warns(UserWarning, match="runs at every step"):
        align(proxy, model, batches, both(2, 1e-3), store=SignalStore(tmp_path / "may"))
    assert not (tmp_path / "may").exists()
