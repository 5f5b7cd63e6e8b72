"""The CPU attention kernel against plain softmax attention under autograd, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iprox.models.cpu import attention
from iprox.models.cpu.attention import NAME, causal_attention, fast_attention


def plain(query, key, value, scale):
    """Attention written out; returns [B, L, H, d]."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    hidden = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).triu(1)
    scores = (scale * query @ key.mT).masked_fill(hidden, -torch.inf)
    return (torch.softmax(scores, -1) @ value).transpose(1, 2)


def check(batch, kv_heads, groups, length, width, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def make(heads):
        # As transformers gives them: heads and positions transposed, so not contiguous.
        x = torch.randn(batch, length, heads, width, generator=generator, dtype=torch.float64)
        return x.transpose(1, 2).requires_grad_()

    query, key, value = make(kv_heads * groups), make(kv_heads), make(kv_heads)
    grad = torch.randn(batch, length, kv_heads * groups, width, generator=generator, dtype=torch.float64)
    out, _ = causal_attention(query, key, value, 0.3)
    expected = plain(query, key, value, 0.3)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    got = torch.autograd.grad(out, (query, key, value), grad)
    wanted = torch.autograd.grad(expected, (query, key, value), grad)
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 5),
    kv_heads=st.integers(1, 3),
    groups=st.integers(1, 3),
    length=st.integers(1, 20),
    width=st.sampled_from([4, 8]),
)
def test_it_equals_plain_attention(batch, kv_heads, groups, length, width):
    check(batch, kv_heads, groups, length, width)


def test_blocks_and_small_caches_change_nothing(monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", 5)
    monkeypatch.setattr(attention, "CACHE", 1000)
    check(batch=5, kv_heads=2, groups=2, length=17, width=4)


def test_long_rows_take_torchs_kernel(monkeypatch):
    monkeypatch.setattr(attention, "LONGEST", 8)
    monkeypatch.setattr(attention, "_backward_by_gemm", None)
    check(batch=2, kv_heads=2, groups=3, length=9, width=4)


def test_a_model_uses_it_inside_the_block_and_only_there(tiny, monkeypatch):
    model, batch = tiny.model(), tiny.batch([9, 5])
    model.set_attn_implementation("sdpa")
    calls = []
    monkeypatch.setattr(attention, "causal_attention", lambda *a: calls.append(1) or causal_attention(*a))
    before = model(input_ids=batch.input_ids).logits
    assert not calls
    with fast_attention(model):
        assert model.config._attn_implementation == NAME
        inside = model(input_ids=batch.input_ids).logits
    assert len(calls) == 2
    assert model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(inside, before)


def test_a_sliding_window_is_left_to_transformers(tiny):
    model = tiny.model("gemma3", sliding_window=4, layer_types=["sliding_attention", "full_attention"])
    batch = tiny.batch([12, 12])
    before = model(input_ids=batch.input_ids).logits
    with fast_attention(model):
        inside = model(input_ids=batch.input_ids).logits
    torch.testing.assert_close(inside, before)


@pytest.mark.parametrize("implementation", ["eager"])
def test_a_model_that_chose_another_attention_keeps_it(tiny, implementation):
    model = tiny.model()
    model.set_attn_implementation(implementation)
    with fast_attention(model):
        assert model.config._attn_implementation == implementation
