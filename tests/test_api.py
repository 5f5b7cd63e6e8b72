"""The Python API, on layers of the bundled quickstart model and on a model that is no language model."""

import copy
import inspect
import json
from importlib.resources import files

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from transformers import AutoModelForCausalLM, AutoTokenizer

import iprox
from iprox.models.layers import compressible_layers
from iprox.scores import scores_metadata
from iprox.settings import AlignSection, ProxySection

QUICKSTART = files("iprox.quickstart")


def rows(name: str, count: int) -> list[dict]:
    with (QUICKSTART / "data" / name).open(encoding="utf-8") as stream:
        return [json.loads(line) for _, line in zip(range(count), stream, strict=False)]


@pytest.fixture(scope="module")
def model():
    """The bundled model's lower layers, a third of it."""
    lower = {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}
    return AutoModelForCausalLM.from_pretrained(str(QUICKSTART / "model"), dtype=torch.float32, **lower)


def test_the_whole_method_in_memory(model, tmp_path):
    pool, validation = rows("pool.jsonl", 40), {"arithmetic": rows("arithmetic.val.jsonl", 8)}
    proxy = iprox.compress(model, pool[:16], sparsity=0.5, ranks="global")
    history = iprox.align(proxy, model, pool[:16], epochs=1)
    assert len(history.steps) == 2
    scores = iprox.score(proxy, pool, validation, estimator="tracin")
    assert isinstance(scores, pa.Table)
    assert scores["id"].to_pylist() == [row["id"] for row in pool]
    assert scores["supervised"].to_numpy().min() > 0
    assert list(scores_metadata(scores)["validation_supervised"]["tasks"]) == ["arithmetic"]
    chosen = iprox.select(scores, fraction=0.1, strategy="top")
    influence = scores["influence"].to_numpy()
    assert chosen.tolist() == np.argsort(-influence, kind="stable")[:4].tolist()
    report = iprox.audit(model, proxy, pool, validation)
    assert report.sample == 40
    assert 0.3 < report.mean["spearman"] <= 1
    rough = iprox.audit(model, proxy, pool, validation, query_norm=0.5)
    assert rough.scores["target/arithmetic"].equals(report.scores["target/arithmetic"])
    same = iprox.audit(model, proxy, pool, validation, normalize="cosine", estimator="ekfac")  # which are the defaults
    assert same.scores.equals(report.scores)
    assert not rough.scores["proxy/arithmetic"].equals(report.scores["proxy/arithmetic"])
    proxy.save_pretrained(tmp_path / "proxy")
    loaded = iprox.load(tmp_path / "proxy")
    with pytest.raises(iprox.InputError, match=r"no tokenizer in it .* or pass tokenizer="):
        iprox.score(loaded, pool, validation)
    again = iprox.score(loaded, pool, validation, tokenizer=bundled_tokenizer(), estimator="tracin")
    np.testing.assert_allclose(again["influence"].to_numpy(), influence, rtol=1e-4)


def bundled_tokenizer():
    """The tokenizer for a proxy saved without one, as proxies made in memory are."""
    return AutoTokenizer.from_pretrained(str(QUICKSTART / "model"))


def test_a_dataset_and_a_list_are_the_same(model):
    listed, validation = rows("pool.jsonl", 6), {"t": rows("spelling.val.jsonl", 4)}
    one = iprox.score(model, listed, validation)
    two = iprox.score(model, datasets.Dataset.from_list(listed), validation)
    assert one.equals(two)


def test_several_checkpoints_need_their_learning_rates(model):
    listed, validation = rows("pool.jsonl", 3), {"t": rows("spelling.val.jsonl", 2)}
    one = iprox.score(model, listed, validation)["influence"].to_numpy()
    both = iprox.score([model, model], listed, validation, learning_rates=[0.5, 0.25])
    np.testing.assert_allclose(both["influence"].to_numpy(), 0.75 * one, rtol=1e-6)
    with pytest.raises(iprox.InputError, match="learning_rates"):
        iprox.score([model, model], listed, validation)
    with pytest.raises(iprox.InputError, match="1 learning rates"):
        iprox.score([model, model], listed, validation, learning_rates=[1.0])


def test_an_unknown_estimator_names_the_known(model):
    for unknown, said in (("magic", "known: ekfac, kfac"), ("influence-function", "known: "), ("k-fac", "'kfac'")):
        with pytest.raises(
            iprox.InputError, match=f"estimator: there is no such estimator; .*{said}.*given: '{unknown}'"
        ):
            iprox.score(model, rows("pool.jsonl", 2), {"t": rows("spelling.val.jsonl", 2)}, estimator=unknown)


@pytest.mark.parametrize("estimator", ["ekfac", "kfac"])
def test_an_influence_function_measures_curvature_on_the_pool_or_a_given_sample(model, estimator):
    pool, validation = rows("pool.jsonl", 12), {"t": rows("spelling.val.jsonl", 3)}

    def influence(**settings):
        return iprox.score(model, pool, validation, **settings)["influence"].to_numpy()

    tracin, drawn = influence(estimator="tracin"), influence(estimator=estimator)
    given = influence(estimator=estimator, curvature_sample=pool)
    np.testing.assert_allclose(given, drawn, rtol=1e-5)  # a pool of fewer than 256 is the sample
    assert np.abs(influence(estimator=estimator, curvature_sample=pool[:4]) / drawn - 1).max() > 1e-3
    assert np.corrcoef(tracin, drawn)[0, 1] < 0.999
    assert np.corrcoef(influence(estimator=estimator, damping=1e9), drawn)[0, 1] < 0.99999


def test_attribution_splits_a_score_by_token(model):
    pool, validation = rows("pool.jsonl", 12), {"t": rows("spelling.val.jsonl", 3), "u": rows("spelling.val.jsonl", 5)}
    proxy = iprox.compress(model, pool, sparsity=0.5)
    options = {"target": model, "normalize": "cosine", "query_norm": 1.0}
    scores = iprox.score(proxy, pool, validation, estimator="tracin", per_example=False, **options)
    table = iprox.attribute(proxy, pool[:4], validation, **options)
    assert table.column_names == ["id", "tokens", "supervised", "influence/t", "influence/u"]
    for name in ("influence/t", "influence/u"):
        sums = [sum(terms) for terms in table[name].to_pylist()]
        np.testing.assert_allclose(sums, scores[name].to_numpy()[:4], rtol=1e-3)
    for row in table.to_pylist():
        assert len(row["tokens"]) == len(row["supervised"]) == len(row["influence/t"])
        assert any(row["supervised"])


def test_attribution_refuses_experts_before_any_work(tiny):
    with pytest.raises(iprox.InputError, match="expert layers"):
        iprox.attribute(tiny.model("qwen3-moe"), [], {"t": [{"text": "a"}]})


def test_scorers_without_gradients_compare_on_the_same_rows(model):
    pool, validation = rows("pool.jsonl", 12), {"t": rows("spelling.val.jsonl", 3)}
    columns = {}
    for estimator in ("random", "length", "perplexity", "rds", "bm25"):
        table = iprox.score(model, pool, validation, estimator=estimator, seed=1)
        columns[estimator] = table["influence"].to_numpy()
        assert np.isfinite(columns[estimator]).all()
    assert len({tuple(np.argsort(column)) for column in columns.values()}) == 5
    other = iprox.score(model, pool, validation, estimator="random", seed=2)["influence"].to_numpy()
    assert not np.array_equal(other, columns["random"])
    with pytest.raises(iprox.InputError, match="takes one model"):
        iprox.score([model, model], pool, validation, estimator="rds", learning_rates=[1.0, 1.0])
    with pytest.raises(iprox.InputError, match="give examples, not a DataLoader"):
        iprox.score(model, DataLoader(pool), validation, estimator="rds")


def test_a_model_without_a_name_needs_a_tokenizer(model):
    nameless = AutoModelForCausalLM.from_config(copy.deepcopy(model.config))
    nameless.config._name_or_path = ""
    with pytest.raises(iprox.InputError, match="tokenizer="):
        iprox.score(nameless, rows("pool.jsonl", 2), {"t": rows("spelling.val.jsonl", 2)})


@pytest.mark.parametrize(
    "given",
    [{"method": "ipsdv"}, {"ranks": "globl"}],
)
def test_misspelt_choices_of_a_compression_are_refused(model, given):
    ((name, value),) = given.items()
    with pytest.raises(iprox.InputError, match=f"compress: {name}.*{value}"):
        iprox.compress(model, rows("pool.jsonl", 2), sparsity=0.5, **given)
    with pytest.raises(iprox.InputError, match="no setting 'sparsty'; known here: method, depth, sparsity"):
        iprox.compress(model, rows("pool.jsonl", 2), sparsty=0.5)


def test_settings_are_in_the_signature_and_the_help():
    for function, section in ((iprox.compress, ProxySection), (iprox.align, AlignSection)):
        parameters = inspect.signature(function).parameters
        shared = (parameters.keys() & section.model_fields.keys()) - {"model", "held_out"}
        assert len(shared) > 4
        for name in shared:
            assert parameters[name].default == section.model_fields[name].get_default()
            assert f"\n    {name}: {section.model_fields[name].description}" in function.__doc__


def test_what_is_no_model_or_no_task_is_named(model):
    some = rows("pool.jsonl", 2)
    with pytest.raises(iprox.InputError, match=r"model: expected a loaded model, not the path 'm'; iprox.load"):
        iprox.score("m", some, {"t": some})
    with pytest.raises(iprox.InputError, match="model: expected a loaded model, not a dict"):
        iprox.compress({}, some, sparsity=0.5)
    with pytest.raises(iprox.InputError, match="proxy: expected a loaded model"):
        iprox.align("p", model, some)
    with pytest.raises(iprox.InputError, match=r"validation: expected examples by task, .* not a list"):
        iprox.score(model, some, some)
    with pytest.raises(iprox.InputError, match="validation: no task is given"):
        iprox.attribute(model, some, {})
    with pytest.raises(iprox.InputError, match="normalize: input should be 'none' or 'cosine'"):
        iprox.attribute(model, some, {"t": some}, normalize="cos")
    with pytest.raises(iprox.InputError, match=r"scores: expected the pyarrow.Table of iprox.score, not a dict"):
        iprox.select({"influence": [1.0]}, count=1)


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh())
        self.out = nn.Linear(16, 3)

    def forward(self, x):
        return self.out(self.body(x))


def classification_losses(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def test_a_model_that_is_no_language_model():
    """loss_fn in place of a language model's loss: scores against autograd, and a proxy of it."""
    torch.manual_seed(0)
    classifier = Classifier().double()
    x, y = torch.randn(20, 6, dtype=torch.float64), torch.randint(0, 3, (20,))
    pool, validation = TensorDataset(x[:14], y[:14]), TensorDataset(x[14:], y[14:])
    scores = iprox.score(
        classifier,
        DataLoader(pool, batch_size=5),
        {"task": DataLoader(validation, batch_size=4)},
        loss_fn=classification_losses,
        normalize="none",
        estimator="tracin",
        per_example=False,
    )

    def gradient(data):
        losses = classification_losses(classifier, data)
        return torch.cat([g.flatten() for g in torch.autograd.grad(losses.mean(), list(classifier.parameters()))])

    query = gradient((x[14:], y[14:]))
    expected = [(gradient((x[i : i + 1], y[i : i + 1])) @ query).item() for i in range(14)]
    np.testing.assert_allclose(scores["influence"].to_numpy(), expected, rtol=1e-9)
    proxy = iprox.compress(classifier, DataLoader(pool, batch_size=7), sparsity=0.3, loss_fn=classification_losses)
    size = sum(parameter.numel() for parameter in classifier.parameters())
    assert sum(parameter.numel() for parameter in proxy.parameters()) < size
    how = {"loss_fn": classification_losses, "estimator": "tracin"}
    approximate = iprox.score(proxy, DataLoader(pool, batch_size=5), {"task": DataLoader(validation)}, **how)
    assert np.corrcoef(approximate["influence"].to_numpy(), expected)[0, 1] > 0.5


class Repeated(Classifier):
    """Uses a layer twice."""

    def forward(self, x):
        return self.out(torch.tanh(self.body[2](self.body(x))))


class Tied(Classifier):
    """Two layers with the same weights."""

    def __init__(self):
        super().__init__()
        self.more = nn.Linear(16, 16)
        self.more.weight = self.body[2].weight


class ByWeight(Classifier):
    """Uses a layer's weight without calling the layer, as torch's own attention does its output projection."""

    def forward(self, x):
        return nn.functional.linear(self.body(x), self.out.weight, self.out.bias)


def loaders(rows=20, **options):
    torch.manual_seed(0)
    x, y = torch.randn(rows, 6, dtype=torch.float64), torch.randint(0, 3, (rows,))
    pool = DataLoader(TensorDataset(x[:14], y[:14]), batch_size=5, **options)
    return pool, {"task": DataLoader(TensorDataset(x[14:], y[14:]), batch_size=4)}


@pytest.mark.parametrize(
    ("kind", "said"), [(Repeated, "body.2: is used more than once"), (Tied, "more: shares its weights with body.2")]
)
def test_layers_whose_gradients_are_sums_over_uses_are_refused(kind, said):
    with pytest.raises(iprox.InputError, match=said):
        iprox.score(kind().double(), *loaders(), loss_fn=classification_losses)


def test_a_layer_that_is_never_called_is_said():
    with pytest.warns(UserWarning, match=r"out \(1 layers in all\) was never called"):
        iprox.score(ByWeight().double(), *loaders(), loss_fn=classification_losses)


def test_what_follows_a_layer_may_be_written_in_place():
    torch.manual_seed(0)
    inplace = nn.Sequential(nn.Linear(6, 16), nn.ReLU(inplace=True), nn.Linear(16, 3)).double()
    plain = nn.Sequential(inplace[0], nn.ReLU(), inplace[2])
    one, other = (iprox.score(model, *loaders(), loss_fn=classification_losses) for model in (inplace, plain))
    assert one["influence"].to_numpy() == pytest.approx(other["influence"].to_numpy(), rel=1e-12)


def test_a_loader_that_shuffles_is_refused():
    pool, validation = loaders(shuffle=True)
    with pytest.raises(iprox.InputError, match="the DataLoader shuffles"):
        iprox.score(Classifier().double(), pool, validation, loss_fn=classification_losses)


def test_batches_of_text_need_their_lengths(model):
    batches = DataLoader([{"input_ids": torch.ones(5, dtype=torch.int64)}], batch_size=1)
    with pytest.raises(iprox.InputError, match=r"of the type iprox\.data\.Batch, not dict"):
        iprox.score(model, batches, {"t": batches}, estimator="tracin")


def test_a_batch_row_without_supervised_tokens_has_no_score_and_no_part_in_the_mean(tiny):
    network, batch, validation = tiny.model(), tiny.batch([9, 5, 7]), tiny.batch([8, 6], seed=1)
    batch.labels[1] = validation.labels[1] = -100
    alone = [each for number, each in enumerate(tiny.rows(validation)) if number == 0]
    how = {"estimator": "tracin", "per_example": False}
    scores = iprox.score(network, Batches([batch]), {"t": Batches([validation])}, **how)["influence/t"].to_pylist()
    pool = Batches(tiny.rows(batch)[::2])
    expected = iprox.score(network, pool, {"t": Batches(alone)}, **how)["influence/t"].to_pylist()
    assert scores[1] is None
    assert scores[::2] == pytest.approx(expected, rel=1e-9)


class Batches(DataLoader):
    """A DataLoader of batches that are made already."""

    def __init__(self, batches):
        super().__init__(batches, batch_size=None)


def test_a_target_that_is_not_the_proxys_is_refused(model):
    pool, validation = rows("pool.jsonl", 6), {"t": rows("spelling.val.jsonl", 4)}
    other = copy.deepcopy(model)
    with torch.no_grad():
        next(other.parameters()).mul_(1.5)
    proxy = iprox.compress(model, pool, sparsity=0.5, tokenizer=bundled_tokenizer())
    for call in (
        lambda: iprox.score(proxy, pool, validation, target=other, tokenizer=bundled_tokenizer()),
        lambda: iprox.audit(other, proxy, pool, validation, tokenizer=bundled_tokenizer()),
        lambda: iprox.align(proxy, other, pool, epochs=1, tokenizer=bundled_tokenizer()),
    ):
        with pytest.raises(iprox.InputError, match=r"is a proxy of .*, not of .* \(the weights differ\)"):
            call()


@pytest.mark.parametrize(
    "options",
    [
        {"normalize": "cos"},
        {"query_norm": 2},
        {"damping": 0},
        {"learning_rates": [float("nan")]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_a_choice_that_there_is_not_is_refused(tiny, options):
    with pytest.raises(iprox.InputError, match=next(iter(options))):
        iprox.score(tiny.model(), [{"text": "a"}], {"task": [{"text": "b"}]}, **options)


def test_an_adapter_that_transformers_loaded_is_refused(tiny):
    model = tiny.model()
    model._hf_peft_config_loaded = True  # as `load_adapter` and `from_pretrained` of an adapter's folder leave it
    with pytest.raises(iprox.InputError, match="transformers has loaded a PEFT adapter"):
        iprox.score(model, [{"text": "a"}], {"task": [{"text": "b"}]})


def test_progress_is_shown_of_each_stage_and_can_be_switched_off(model, capsys):
    pool, validation = rows("pool.jsonl", 12), {"arithmetic": rows("arithmetic.val.jsonl", 4)}
    proxy = iprox.compress(model, pool[:8], sparsity=0.5)
    iprox.align(proxy, model, pool[:8], epochs=2)
    iprox.score([proxy, proxy], pool, validation, learning_rates=[1.0, 1.0])
    said = [line for line in capsys.readouterr().err.splitlines() if line.endswith("done")]
    layers = len(compressible_layers(model))
    assert [line.split(",")[0] for line in said] == [
        f"compress: {layers}/{layers} layers",
        "align: 2/2 steps",
        "score: 24/24 rows",
    ]
    quiet = iprox.compress(model, pool[:8], sparsity=0.5, progress=False)
    iprox.align(quiet, model, pool[:8], epochs=1, progress=False)
    iprox.audit(model, quiet, pool, validation, progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("streamed", "first"), [(False, "score: 3 batches"), (True, "score")])
def test_progress_of_batches_has_a_total_where_their_number_is_known(streamed, first, capsys):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(TensorDataset(torch.randn(6, 4), torch.randn(6, 1)))

    torch.manual_seed(0)
    data = Stream() if streamed else TensorDataset(torch.randn(6, 4), torch.randn(6, 1))
    loader = DataLoader(data, batch_size=2)
    loss = lambda module, batch: ((module(batch[0]) - batch[1]) ** 2).sum(1)  # noqa: E731
    how = {"loss_fn": loss, "estimator": "tracin"}
    scores = iprox.score(nn.Sequential(nn.Linear(4, 1)), loader, {"task": DataLoader(data, 3)}, **how)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == first
    assert lines[-1].startswith("score: 3/3 batches," if not streamed else "score: 3 batches,")
    assert len(scores) == 6
