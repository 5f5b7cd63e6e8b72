"""Proxies that compare fewer gradients: those of the upper layers, or those that pass through answers."""

import pytest
import torch
from jobs import scorer_of_batches
from transformers import AutoModelForCausalLM

import iprox
from iprox.data import Batch, Encoded, iter_batches
from iprox.errors import InputError
from iprox.influence.scorer import BatchScorer
from iprox.influence.validation_gradients import mean_gradient
from iprox.models import flops
from iprox.models.checkpoint import limit_gradients
from iprox.models.layers import influence_layers
from iprox.proxy.compress import derive_proxy, keep_weights
from iprox.proxy.size import Size


def limited(model, depth=1.0, gradients="all"):
    proxy, report = keep_weights(model)
    limit_gradients(proxy, depth, gradients)
    return proxy, report


def prompted(tiny):
    batch = tiny.batch([13, 6, 9], padding=2)
    for row, start in enumerate((7, 1, 5)):
        batch.labels[row, :start] = -100
        batch.labels[row, start] = batch.input_ids[row, start]
    return batch


def upper(model, count):
    total = model.config.num_hidden_layers
    return {
        name: layer
        for name, layer in influence_layers(model).items()
        if any(f"layers.{number}." in name for number in range(total - count, total))
    }


def test_weights_are_the_targets_own_and_the_target_stays_as_it_was(tiny):
    model = tiny.model(num_hidden_layers=3)
    proxy, report = limited(model, 0.5)
    assert all(a is b for a, b in zip(model.parameters(), proxy.parameters(), strict=True))
    assert getattr(model.config, "quantization_config", None) is None
    assert (report.method, report.achieved_sparsity, report.relative_flops) == ("target", 0.0, 1.0)


@pytest.mark.parametrize(("depth", "count"), [(0.01, 1), (0.34, 1), (0.5, 2), (0.67, 2), (0.99, 3)])
def test_a_depth_keeps_the_upper_layers_and_at_least_one(tiny, depth, count):
    model = tiny.model(num_hidden_layers=3)
    proxy, _ = limited(model, depth)
    assert list(influence_layers(proxy)) == list(upper(model, count))


@pytest.mark.parametrize("normalize", ["none", "cosine"])
def test_scores_are_those_of_autograd_on_the_upper_layers(tiny, normalize):
    model, batch, validation = tiny.model(num_hidden_layers=3), tiny.batch([9, 4, 7]), [tiny.batch([8, 5], seed=1)]
    proxy, _ = limited(model, 0.67)
    scorer = scorer_of_batches(proxy, {"task": validation}, target=model, normalize=normalize, query_norm=1)
    layers = upper(model, 2)
    mean = sum(tiny.autograd_gradient(model, row, layers) for row in tiny.rows(validation[0])) / 2
    for row, score in zip(tiny.rows(batch), scorer(batch)[0], strict=True):
        gradient = tiny.autograd_gradient(model, row, layers)
        expected = gradient @ mean
        if normalize == "cosine":
            expected = expected / gradient.norm() / mean.norm()
        torch.testing.assert_close(score[0], expected, rtol=1e-9, atol=1e-12)


def test_the_backward_pass_stops_below_the_upper_layers(tiny):
    model = tiny.model(num_hidden_layers=3)
    proxy, _ = limited(model, 0.34)
    scorer = scorer_of_batches(proxy, {"task": [tiny.batch([8])]}, target=model)
    seen = []
    for number, block in enumerate(proxy.model.layers):
        block.register_forward_hook(lambda _m, _i, output, number=number: seen.append((number, output.requires_grad)))
    scorer(tiny.batch([9, 4]))
    assert seen[-3:] == [(0, False), (1, False), (2, True)]  # after one token, on which the head is tried


def test_gradients_of_answers_give_other_scores_than_whole_ones(tiny):
    model, batch, validation = tiny.model(), prompted(tiny), [tiny.batch([8, 5], seed=1)]
    proxy, _ = limited(model, gradients="answers")
    scorer = scorer_of_batches(proxy, {"task": validation}, target=model, query_norm=1)
    whole = BatchScorer(model, {"task": mean_gradient(model, validation)})
    assert scorer.by_answer
    scores, losses = scorer(batch)
    torch.testing.assert_close(losses, whole(batch)[1])
    assert not torch.allclose(scores, whole(batch)[0])
    # A row without a prompt has its whole gradient.
    torch.testing.assert_close(scores[1], whole(batch)[0][1])


def test_terms_of_tokens_sum_to_the_score_and_prompts_have_none(tiny):
    model, batch = tiny.model(), prompted(tiny)
    proxy, _ = limited(model, gradients="answers")
    scorer = scorer_of_batches(proxy, {"task": [tiny.batch([8, 5], seed=1)]}, target=model)
    terms = scorer(batch, by_token=True)[0]
    assert terms.shape == (*batch.labels.shape, 1)
    torch.testing.assert_close(terms.sum(1), scorer(batch)[0], rtol=1e-9, atol=1e-12)
    assert not terms[0, :6].any()
    assert terms[0, 6:12].all()
    assert not terms[0, 13:].any()


@pytest.mark.parametrize("factors", [False, True])
def test_a_saved_proxy_is_read_with_its_limits(tiny, tmp_path, factors):
    model, batch = tiny.model(dtype=torch.float32, num_hidden_layers=3), prompted(tiny)
    proxy = derive_proxy(model, [tiny.batch([9, 7, 12])], Size(0.3))[0] if factors else keep_weights(model)[0]
    limit_gradients(proxy, 0.67, "answers")
    proxy.save_pretrained(tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path)
    both = [scorer_of_batches(each, {"task": [batch]}, target=model)(batch)[0] for each in (proxy, read)]
    torch.testing.assert_close(*both, rtol=0, atol=0)
    assert set(influence_layers(read)) == set(upper(model, 2))


def test_a_model_without_a_cache_is_refused(tiny, monkeypatch):
    proxy, _ = keep_weights(tiny.model())
    monkeypatch.setattr(type(proxy), "_is_stateful", True, raising=False)
    with pytest.raises(InputError, match="answers"):
        limit_gradients(proxy, 1.0, "answers")


def test_another_module_needs_a_size():
    with pytest.raises(InputError, match="sparsity"):
        iprox.compress(torch.nn.Sequential(torch.nn.Linear(4, 3)), progress=False)


def test_flops_are_of_what_is_passed(tiny):
    model = tiny.model(num_hidden_layers=4)
    proxy, _ = limited(model, 0.5)
    forward, head = flops.forward_flops(model), flops.head_flops(model)
    assert flops.scoring_flops(proxy, 100, 20, 7.0, graded=30) == 100 * forward + 30 * forward / 2 + 40 * head + 7
    assert flops.scoring_flops(model, 100, 20, 7.0) == 200 * forward + 40 * head + 7


def test_batches_by_answer_hold_every_row_once_and_little_padding():
    generator = torch.Generator().manual_seed(0)
    rows = []
    for prompt, answer in torch.randint(1, 60, (200, 2), generator=generator).tolist():
        labels = torch.cat([torch.full((prompt,), -100), torch.ones(answer, dtype=torch.int64)]).numpy()
        rows.append(Encoded(labels, labels, False))
    batches = list(iter_batches(rows, 512, by_answer=True))
    assert sorted(index for batch in batches for index in batch.indices) == list(range(200))
    assert all(batch.input_ids.numel() <= 512 for batch in batches if len(batch.indices) > 1)

    def padded(batches: list[Batch]) -> int:
        lengths = [[len(rows[index].labels) - rows[index].prompt for index in batch.indices] for batch in batches]
        return sum(len(each) * max(each) for each in lengths)

    assert padded(batches) < 0.8 * padded(list(iter_batches(rows, 512)))
