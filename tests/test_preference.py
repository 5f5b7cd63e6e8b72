"""Preference pairs: read as TRL reads them, scored by the DPO loss and by the loss of reward models."""

import json
from importlib.resources import files

import datasets
import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import iprox
from iprox.cli import main
from iprox.data import Pool, collate, iter_batches
from iprox.influence.validation_gradients import mean_gradient
from iprox.models.layers import influence_layers
from iprox.models.preference import DpoLoss, RewardLoss
from iprox.recipe import parse_recipe, set_overrides

MODEL = str(files("iprox.quickstart") / "model")


def user(text):
    return {"role": "user", "content": text}


def said(text):
    return {"role": "assistant", "content": text}


def conversational(count, start=0):
    return [
        {
            "prompt": [user(f"What is {i} plus {i}?")],
            "chosen": [said(f"It is {2 * i}.")],
            "rejected": [said(f"I think that it may be {2 * i + 1}, but who knows.")],
        }
        for i in range(start, start + count)
    ]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


def lower_layers(kind=AutoModelForCausalLM, **options):
    lower = {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}
    return kind.from_pretrained(MODEL, dtype=torch.float64, **lower, **options).eval()


@pytest.fixture(scope="module")
def model():
    return lower_layers()


@pytest.fixture(scope="module")
def reference():
    """Another model of the same kind: the first with its weights changed."""
    other = lower_layers()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
    return other


def encoded(rows, model, tokenizer):
    from iprox.api.examples import Reader

    return Reader(model, tokenizer, 512, 512, DpoLoss()).encode(rows, "rows")


PLAIN = [{"prompt": "Say: ", "chosen": f"good {i}", "rejected": "bad"} for i in range(4)]


@pytest.mark.slow
@pytest.mark.parametrize("rows", [conversational(4), PLAIN], ids=["turns", "text"])
def test_the_loss_is_that_of_trls_dpo_trainer(model, reference, tokenizer, rows, tmp_path):
    from trl import DPOConfig, DPOTrainer

    options = {"beta": 0.3, "per_device_eval_batch_size": 1, "report_to": "none", "use_cpu": True, "bf16": False}
    trainer = DPOTrainer(
        model,
        reference,
        args=DPOConfig(str(tmp_path), max_length=512, **options),
        train_dataset=datasets.Dataset.from_list(rows),
        eval_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    expected = trainer.evaluate()["eval_loss"]
    loss = DpoLoss(reference, beta=0.3)
    batches = list(iter_batches(encoded(rows, model, tokenizer), 200))
    with torch.no_grad():
        found = torch.cat([loss(model, batch) for batch in batches])
    assert len(found) == 4
    assert abs(float(found.mean()) - expected) < 1e-6


@pytest.mark.parametrize("with_reference", [False, True])
@pytest.mark.parametrize("depth", [1.0, 0.5])
def test_scores_are_dot_products_of_the_gradients_of_pairs(model, reference, tokenizer, with_reference, depth):
    pool, validation = conversational(6), conversational(3, start=20)
    loss = DpoLoss(reference if with_reference else None, beta=0.2)
    proxy = model if depth == 1 else iprox.compress(model, depth=depth)
    scores = iprox.score(
        *(proxy, pool, {"sums": validation}),
        target=None if depth == 1 else model,
        loss_fn=loss,
        tokenizer=tokenizer,
        estimator="tracin",
        per_example=False,
        query_norm=1.0,
        normalize="none",
    )
    layers = [model.get_submodule(name) for name in influence_layers(proxy)]
    parameters = [parameter for layer in layers for parameter in layer.parameters()]

    def gradient(rows):
        pairs = encoded(rows, model, tokenizer)
        losses = []
        for pair in pairs:  # row by row, from the definition
            logps = []
            for one in (model, reference if with_reference else None):
                for row in pair.rows:
                    if one is None:
                        logps.append(logps[len(logps) - 2].detach())
                        continue
                    ids = torch.from_numpy(row.input_ids).long()[None]
                    log = torch.log_softmax(one(input_ids=ids).logits[0, :-1], -1).gather(1, ids[0, 1:, None])[:, 0]
                    logps.append(log[torch.from_numpy(row.labels[1:] != -100)].sum())
            chosen, rejected, chosen_before, rejected_before = logps
            losses.append(-logsigmoid(0.2 * (chosen - rejected - chosen_before.detach() + rejected_before.detach())))
        grads = torch.autograd.grad(torch.stack(losses).mean(), parameters)
        return torch.cat([each.flatten() for each in grads])

    expected = torch.stack([gradient([row]) for row in pool]) @ gradient(validation)
    found = scores["influence"].to_numpy()
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6)


def test_scores_do_not_depend_on_batches_and_proxies_work(model, tokenizer):
    pool, validation = conversational(12), {"sums": conversational(4, start=30)}
    how = {"loss_fn": iprox.DpoLoss(), "tokenizer": tokenizer, "progress": False}
    one, other = (iprox.score(model, pool, validation, batch_tokens=size, **how) for size in (80, 4096))
    np.testing.assert_allclose(one["influence"].to_numpy(), other["influence"].to_numpy(), rtol=1e-6)
    assert len(one["examples/sums"][0]) == 4
    proxy = iprox.compress(model, pool, sparsity=0.3, **how)
    iprox.align(proxy, model, pool, epochs=1, **how)
    assert iprox.audit(model, proxy, pool, validation, **how).mean["spearman"] > 0.5
    assert one["tokens"].to_numpy().min() > 40  # both answers count


def test_formats_of_trl_are_read_alike(model, tokenizer):
    explicit = conversational(2)
    implicit = [{key: row["prompt"] + row[key] for key in ("chosen", "rejected")} for row in explicit]
    repeated = [{**row, "prompt": f"What is {i} plus {i}?"} for i, row in enumerate(implicit)]
    text = [{"chosen": "The sky is blue.", "rejected": "The sky is green."}]
    first = [
        (row.input_ids.tolist(), row.labels.tolist())
        for pair in encoded(explicit, model, tokenizer)
        for row in pair.rows
    ]
    for rows in (implicit, repeated):
        pairs = encoded(rows, model, tokenizer)
        assert [(row.input_ids.tolist(), row.labels.tolist()) for pair in pairs for row in pair.rows] == first
    (example,) = Pool(text, pairs=True)
    assert (example.prompt, example.completion) == ("The sky is", " blue.")
    assert example.rejected is not None
    assert example.rejected.completion == " green."


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "a", "completion": "b"}, "no preference pair: loss: dpo reads chosen and rejected"),
        ({"chosen": "same", "rejected": "same"}, "are the same, or one is the start of the other"),
        ({"chosen": "a", "rejected": "b"}, "start differently, so there is no prompt"),
        ({"prompt": "q", "chosen": [user("a"), said("b")], "rejected": [user("a"), said("c")]}, "prompt is text"),
        ({"prompt": "q", "chosen": "a", "rejected": ""}, "rejected: completion"),
        ({"prompt": [user("q")], "chosen": [said("a")], "rejected": [user("b")]}, "rejected: no assistant turn"),
        (
            {"prompt": [user("q")], "chosen": [{**said("a"), "train": False}, said("b")], "rejected": [said("c")]},
            "chosen has a masked turn",
        ),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "images": ["x.png"]}, "images"),
    ],
)
def test_bad_pairs_are_refused_by_row(row, said):
    with pytest.raises(iprox.InputError, match=rf"row:1: .*{said}"):
        Pool([row], pairs=True).scan()


def test_pairs_under_another_loss_are_refused_with_both_ways():
    with pytest.raises(iprox.InputError, match=r"--set loss=dpo; to read the preferred answers alone"):
        Pool(conversational(1)).scan()
    with pytest.raises(iprox.InputError, match="give rows with chosen and rejected"):
        DpoLoss()(torch.nn.Linear(1, 1), collate([], []))


def test_reward_models_are_scored_by_the_difference_of_rewards(tokenizer):
    torch.manual_seed(0)
    model = lower_layers(AutoModelForSequenceClassification, num_labels=1)
    model.config.pad_token_id = tokenizer.pad_token_id
    pool, validation = conversational(5), conversational(2, start=9)
    pairs = encoded(pool + validation, model, tokenizer)
    loss = RewardLoss()
    for pair, found in zip(pairs, loss(model, collate(pairs, range(7))), strict=True):
        rewards = [model(input_ids=torch.from_numpy(row.input_ids).long()[None]).logits[0, 0] for row in pair.rows]
        torch.testing.assert_close(found, -logsigmoid(rewards[0] - rewards[1]))
    how = {"estimator": "tracin", "per_example": False, "normalize": "none", "tokenizer": tokenizer, "loss_fn": loss}
    scores = iprox.score(model, pool, {"sums": validation}, **how)["influence"].to_numpy()
    query = mean_gradient(model, iter_batches(pairs[5:], 512), loss)
    for number in range(5):
        own = mean_gradient(model, [collate(pairs, [number])], loss)
        expected = sum((own[name].weight * part.weight).sum() for name, part in query.items())
        assert scores[number] == pytest.approx(float(expected), rel=1e-6)
    model.config.pad_token_id = None
    with pytest.raises(iprox.InputError, match=r"set model\.config\.pad_token_id"):
        loss(model, collate(pairs, [0]))


@pytest.mark.slow
def test_a_run_on_pairs_selects_rows_that_trls_dpo_trainer_loads(tmp_path, tokenizer):
    from trl import DPOConfig, DPOTrainer

    for name, rows in (("pool", conversational(40)), ("validation", conversational(6, start=60))):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.yaml").write_text(
        f"""
model: {MODEL}
loss: dpo
data: {{pool: {tmp_path}/pool.jsonl, validation: {{sums: {tmp_path}/validation.jsonl}}}}
proxy: {{sparsity: 0.5, align: {{epochs: 1, held_out: 16}}}}
audit: {{sample: 10}}
select: {{count: 4}}
output: {tmp_path}/run
"""
    )
    assert main(["run", str(tmp_path / "recipe.yaml")]) == 0
    assert not (tmp_path / "run/warmup").exists()
    assert "rejected assistant" in (tmp_path / "run/report.html").read_text()
    selected = datasets.Dataset.from_json(str(tmp_path / "run/selected.jsonl"))
    args = DPOConfig(str(tmp_path / "dpo"), max_steps=1, report_to="none", use_cpu=True, bf16=False, max_length=256)
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    trained = DPOTrainer(model, args=args, train_dataset=selected, processing_class=tokenizer).train()
    assert np.isfinite(trained.training_loss)
    scores = str(tmp_path / "run/scores.parquet")
    select = ["select", "--scores", scores, "--pool", f"{tmp_path}/pool.jsonl", "--output", f"{tmp_path}/few.jsonl"]
    assert main([*select, "--count", "2"]) == 0


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("finetune={}", "trains nothing, so leave finetune out"),
        ("warmup={}", "trains nothing, so leave warmup out"),
        ("influence.estimator=less", "influence.estimator less does not fit"),
        ("loss=sft", "dpo.reference is for loss: dpo"),
    ],
)
def test_what_does_not_fit_pairs_is_refused(setting, said):
    raw = {"model": "m", "output": "o", "data": {"pool": "p", "validation": {"t": "v"}}, "loss": "dpo"}
    raw["dpo"] = {"reference": "r"}
    assert parse_recipe(raw).warmup is False
    set_overrides(raw, [setting])
    with pytest.raises(iprox.InputError, match=said):
        parse_recipe(raw)
