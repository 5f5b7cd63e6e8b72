import pytest
import torch
import torch.nn.functional as F

from iprox.data.batching import padded_width
from iprox.models import loss as module
from iprox.models.loss import (
    TokenLosses,
    causal_lm_logits,
    causal_lm_losses,
    logits_in_parts,
    mean_by_row,
    plain_logits,
)
from iprox.models.observe import frozen


def test_losses_are_the_mean_over_each_examples_supervised_tokens(tiny):
    model, batch = tiny.model(), tiny.batch([9, 3, 7], padding=4)
    losses = causal_lm_losses(model, batch)
    for row, loss in zip(tiny.rows(batch), losses, strict=True):
        logits = model(input_ids=row.input_ids).logits[0, :-1]
        expected = F.cross_entropy(logits, row.labels[0, 1:], ignore_index=-100)
        torch.testing.assert_close(loss, expected)


def test_they_are_transformers_own_loss(tiny):
    model, batch = tiny.model(), tiny.batch([8])
    expected = model(input_ids=batch.input_ids, labels=batch.labels).loss
    torch.testing.assert_close(causal_lm_losses(model, batch)[0], expected, check_dtype=False)


def test_padding_changes_nothing(tiny):
    model = tiny.model()
    together = causal_lm_losses(model, tiny.batch([9, 3, 7], padding=6))
    apart = torch.cat([causal_lm_losses(model, row) for row in tiny.rows(tiny.batch([9, 3, 7]))])
    torch.testing.assert_close(together, apart)


def test_logits_are_made_only_where_supervised(tiny):
    model, batch = tiny.model(), tiny.batch([9, 3])
    seen = []
    handle = model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    logits, targets, rows = causal_lm_logits(model, batch)
    handle.remove()
    count = int((batch.labels[:, 1:] != -100).sum())
    assert [tuple(shape) for shape in seen] == [(1, padded_width(count), 64)]
    assert len(logits) == len(targets) == len(rows) == count
    assert not model.lm_head._forward_pre_hooks


def test_shapes_of_the_head_repeat(tiny):
    model, seen = tiny.model("qwen3"), set()
    handle = model.lm_head.register_forward_hook(lambda module, inputs, output: seen.add(output.shape[1]))
    for seed in range(8):
        causal_lm_losses(model, tiny.batch([9, 8, 7, 5], seed=seed)).sum().backward()
    handle.remove()
    assert seen <= {8, 16, 24}


def test_an_example_without_supervised_tokens_has_no_loss(tiny):
    model, batch = tiny.model(), tiny.batch([9, 3])
    batch.labels[0] = -100
    losses = causal_lm_losses(model, batch)
    assert losses[0] == 0
    assert losses[1] > 0


def test_mean_by_row():
    values, rows = torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 2])
    assert mean_by_row(values, rows, 3).tolist() == [2.0, 0.0, 5.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 50])
def test_token_losses_are_cross_entropy_and_so_is_their_gradient(monkeypatch, dtype, rows):
    monkeypatch.setattr(module, "_few_rows", lambda logits: logits.split(7))
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(rows, 33, generator=generator)).to(dtype).requires_grad_()
    targets = torch.randint(0, 33, (rows,), generator=generator)
    weights = torch.rand(rows, generator=generator, dtype=torch.promote_types(dtype, torch.float32))
    losses = TokenLosses.apply(logits, targets)
    exact = logits.detach().double().requires_grad_()
    expected = F.cross_entropy(exact, targets, reduction="none")
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-5)
    losses.backward(weights)
    expected.backward(weights.double())
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype]
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=tolerance, atol=tolerance)


def test_token_losses_refuse_a_second_derivative():
    logits = torch.randn(3, 5, requires_grad=True)
    losses = TokenLosses.apply(logits, torch.tensor([0, 1, 2]))
    (gradient,) = torch.autograd.grad(losses.sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        gradient.square().sum().backward()


def in_parts_of(monkeypatch, size):
    """Make the head run on so many tokens at a time."""
    monkeypatch.setattr(
        module, "_parts", lambda hidden, _head: ((i, hidden[i : i + size]) for i in range(0, len(hidden), size))
    )


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "gpt-neox"])
@pytest.mark.parametrize("size", [3, 100])
def test_a_frozen_head_runs_on_a_few_tokens_at_a_time(tiny, monkeypatch, family, size):
    model, batch = tiny.model(family), tiny.batch([9, 3, 7], padding=2)
    batch.labels[1] = -100
    weights = torch.tensor([1.0, 2.0, -0.5], dtype=torch.float64)
    embeddings = model.get_input_embeddings()
    found = {}
    seen = []
    for name in ("whole", "parts"):
        hidden = []
        handle = embeddings.register_forward_hook(lambda _m, _i, out, hidden=hidden: hidden.append(out) or out)
        if name == "whole":
            losses = causal_lm_losses(model, batch)
            (losses * weights).sum().backward(inputs=hidden)
        else:
            handle.remove()
            in_parts_of(monkeypatch, size)
            head = model.get_output_embeddings()
            watched = head.register_forward_hook(lambda _m, _i, out: seen.append(out.shape[-2]))
            with frozen(model):
                handle = embeddings.register_forward_hook(
                    lambda _m, _i, out, hidden=hidden: hidden.append(out.requires_grad_()) or hidden[-1]
                )
                with torch.no_grad():
                    plain_logits(model)
                hidden.clear()
                seen.clear()
                losses = causal_lm_losses(model, batch)
                (losses * weights).sum().backward()
            watched.remove()
        handle.remove()
        found[name] = losses.detach(), hidden[0].grad
    torch.testing.assert_close(found["parts"][0], found["whole"][0])
    torch.testing.assert_close(found["parts"][1], found["whole"][1])
    assert max(seen) <= size


def test_logits_in_parts_are_the_logits(tiny, monkeypatch):
    model, batch = tiny.model("qwen3"), tiny.batch([9, 3, 7])
    in_parts_of(monkeypatch, 4)
    parts = list(logits_in_parts(model, batch))
    assert len(parts) > 2
    for part, whole in zip(zip(*parts, strict=True), causal_lm_logits(model, batch), strict=True):
        torch.testing.assert_close(torch.cat(part), whole)


@pytest.mark.parametrize("size", range(1, 9))
def test_parts_that_begin_in_the_padding_are_empty(tiny, monkeypatch, size):
    model, batch = tiny.model("qwen3"), tiny.batch([9, 3, 7])
    count = int((batch.labels[:, 1:] != -100).sum())
    assert padded_width(count) - count > 1
    in_parts_of(monkeypatch, size)
    parts = list(logits_in_parts(model, batch))
    assert [len(each) for part in parts for each in part] == [len(part[1]) for part in parts for _ in part]
    torch.testing.assert_close(torch.cat([part[0] for part in parts]), causal_lm_logits(model, batch)[0])


def test_logits_are_not_taken_for_the_heads_because_a_pad_token_has_none(tiny):
    model = tiny.model("gemma3")
    model.config.final_logit_softcapping = 0.5
    with torch.no_grad():
        model.get_input_embeddings().weight[0] = 0
    assert not plain_logits(model)


def test_logits_that_the_model_scales_or_caps_are_not_taken_from_the_head(tiny, monkeypatch):
    model, batch = tiny.model("gemma3"), tiny.batch([9, 3, 7])
    plain = causal_lm_losses(model, batch)
    assert plain_logits(model)
    capped = tiny.model("gemma3")
    capped.load_state_dict(model.state_dict())
    capped.config.final_logit_softcapping = 0.5
    in_parts_of(monkeypatch, 4)
    with frozen(capped):
        assert not plain_logits(capped)
        losses = causal_lm_losses(capped, batch)
    logits, targets, rows = causal_lm_logits(model, batch)
    expected = F.cross_entropy(0.5 * torch.tanh(logits / 0.5), targets, reduction="none")
    torch.testing.assert_close(losses, mean_by_row(expected, rows, 3))
    assert not torch.allclose(losses, plain)
    ((whole, _, _),) = logits_in_parts(capped, batch)
    torch.testing.assert_close(whole, 0.5 * torch.tanh(logits / 0.5))
