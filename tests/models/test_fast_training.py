"""Training on a CPU with our attention and compiled layers: the gradients are those of plain training."""

import shutil

import pytest
import torch
from torch import nn

from iprox.models.cpu.attention import NAME
from iprox.models.cpu.training import fast_training
from iprox.models.loss import causal_lm_losses

COMPILE = nn.Module.compile


@pytest.fixture(params=["aot_eager", "inductor"])
def backend(request, monkeypatch):
    """What `torch.compile` runs."""
    if request.param == "inductor" and not shutil.which("g++"):
        pytest.skip("no C++ compiler (g++) for torch.compile")
    torch._dynamo.reset()
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: COMPILE(self, backend=request.param, **options))
    yield
    torch._dynamo.reset()


def gradients(model, batch, compiled, bf16=False):
    """Gradients of all parameters, and why the model did not run compiled."""

    def loss():
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return causal_lm_losses(model, batch).mean()

    model.zero_grad()
    with fast_training(model, compiled, loss) as reason:
        assert model.config._attn_implementation == NAME
        assert all(parameter.grad is None for parameter in model.parameters())
        loss().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}, reason


def test_gradients_are_those_of_plain_training(tiny, backend):
    model, batch = tiny.model("gpt-neox").train(), tiny.batch([9, 4, 7])
    causal_lm_losses(model, batch).mean().backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    found, reason = gradients(model, batch, compiled=True)
    assert reason == ""
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backend", ["aot_eager"], indirect=True)
def test_the_model_is_as_it_was_afterwards(tiny, backend):
    model = tiny.model()
    gradients(model, tiny.batch([5, 3]), compiled=True)
    assert all(block._compiled_call_impl is None for block in model.model.layers)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "gpt2"])
def test_products_in_bfloat16_are_those_of_torchs_attention(tiny, name):
    model, batch = tiny.model(name, dtype=torch.float32), tiny.batch([9, 4, 7])
    with torch.autocast("cpu", torch.bfloat16):
        causal_lm_losses(model, batch).mean().backward()
    expected = torch.cat([parameter.grad.flatten().clone() for parameter in model.parameters()])
    found, _ = gradients(model, batch, compiled=False, bf16=True)
    cosine = torch.cosine_similarity(torch.cat([gradient.flatten() for gradient in found.values()]), expected, dim=0)
    assert cosine > 0.999


def test_what_cannot_be_compiled_says_why_and_trains_all_the_same(tiny, monkeypatch):
    def broken(*_):
        raise RuntimeError("no compiler here")

    torch._dynamo.reset()
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: COMPILE(self, backend=broken, **options))
    model, batch = tiny.model("gpt-neox"), tiny.batch([9, 4])
    found, reason = gradients(model, batch, compiled=True)
    assert "no compiler here" in reason
    model.zero_grad()
    causal_lm_losses(model, batch).mean().backward()
    for parameter, gradient in zip(model.parameters(), found.values(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-9, atol=1e-12)
