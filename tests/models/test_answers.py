import pytest
import torch

from iprox.errors import InputError
from iprox.models.answers import answer_losses, answer_starts
from iprox.models.checkpoint import check_gradients
from iprox.models.layers import influence_layers
from iprox.models.loss import causal_lm_losses
from iprox.models.observe import frozen, watched_backward

FAMILIES = ("qwen3", "llama", "gpt2", "gpt-neox", "opt", "gemma3", "phi3", "olmo2", "mistral", "qwen3-moe")
FAMILIES += ("qwen2", "qwen2-moe", "phimoe", "olmo", "smollm3")


def prompted(tiny, lengths=(13, 6, 9, 4), starts=(7, 1, 5, 2), **options):
    """A batch whose rows have a prompt without labels."""
    batch = tiny.batch(list(lengths), **options)
    for row, start in enumerate(starts):
        batch.labels[row, :start] = -100
        batch.labels[row, start] = batch.input_ids[row, start]
    return batch


def gradients(model, batch, losses, counted=1.0):
    """Each example's gradient of every weight: G = Σ_t δ_t h_tᵀ over the positions that count."""
    found = {}
    with frozen(model):
        values = watched_backward(
            model,
            influence_layers(model),
            lambda: losses(model, batch),
            lambda name, h, delta: found.__setitem__(name, torch.einsum("blm,bln->bmn", delta * counted, h)),
        )
    return values, found


def test_an_answer_starts_where_its_first_token_is_predicted(tiny):
    batch = prompted(tiny)
    batch.labels[3] = -100
    assert answer_starts(batch).tolist() == [6, 0, 4, 3]


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_those_of_the_whole_row(tiny, family):
    model, batch = tiny.model(family), prompted(tiny, padding=3)
    with frozen(model):
        torch.testing.assert_close(answer_losses(model, batch), causal_lm_losses(model, batch))


@pytest.mark.parametrize("family", ["qwen3", "llama", "gemma3"])
def test_gradients_are_those_with_the_prompts_keys_and_values_held_constant(tiny, family):
    model, batch = tiny.model(family), prompted(tiny)
    starts = answer_starts(batch)
    answer = (torch.arange(batch.labels.shape[1]) >= starts[:, None])[..., None]

    def hold(_module, _inputs, output):
        return torch.where(answer, output, output.detach())

    _, found = gradients(model, batch, answer_losses)
    handles = [
        layer.register_forward_hook(hold)
        for name, layer in influence_layers(model).items()
        if name.endswith(("k_proj", "v_proj"))
    ]
    # The layers are watched behind the hold, where prompts still have a gradient.
    _, expected = gradients(model, batch, causal_lm_losses, answer)
    for handle in handles:
        handle.remove()
    _, whole = gradients(model, batch, causal_lm_losses)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-11)
    assert any(not torch.allclose(found[name], gradient) for name, gradient in whole.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_and_company_change_nothing(tiny, family):
    model, batch = tiny.model(family), prompted(tiny, padding=5)
    _, together = gradients(model, batch, answer_losses)
    for row, alone in enumerate(tiny.rows(batch)):
        _, found = gradients(model, alone, answer_losses)
        for name, gradient in found.items():
            torch.testing.assert_close(together[name][row], gradient[0], rtol=1e-7, atol=1e-10)


def test_rows_without_a_prompt_have_their_whole_gradient(tiny):
    model, batch = tiny.model(), prompted(tiny, lengths=(6, 5), starts=(1, 1))
    _, found = gradients(model, batch, answer_losses)
    _, whole = gradients(model, batch, causal_lm_losses)
    for name, gradient in whole.items():
        torch.testing.assert_close(found[name], gradient)


@pytest.mark.parametrize("family", ["deepseek-v2", "deepseek-v3", "glm4-moe-lite"])
def test_latent_attention_is_refused_with_what_to_set(tiny, family):
    with pytest.raises(InputError, match=r"set proxy\.gradients: all"):
        check_gradients(tiny.model(family), "answers")
    check_gradients(tiny.model(family), "all")
