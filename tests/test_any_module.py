"""Models that are no language models: convolutions and other layers scored and compressed, against autograd."""

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import iprox
from iprox.kronecker.moments import collect_moments
from iprox.models.layers import LowRankConv, as_rows, compressible_layers, dense_weight, influence_layers, weight_shape


def losses(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


class Network(nn.Module):
    """Convolutions of every kind that is read, two of which have the same input, and a linear layer over places."""

    def __init__(self):
        super().__init__()
        self.line = nn.Conv1d(3, 4, 3, padding="same", padding_mode="circular")
        self.first = nn.Conv2d(4, 6, 3, padding=1, stride=2)
        self.skip = nn.Conv2d(4, 6, 1, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.mix = nn.Linear(6, 6)
        self.deep = nn.Conv3d(1, 2, (2, 3, 1), padding=(1, 1, 0), dilation=(2, 1, 1))
        self.out = nn.Linear(2, 3)

    def forward(self, x):
        x = torch.tanh(self.line(x)).unflatten(2, (4, 4))
        x = torch.tanh(self.norm(self.first(x) + self.skip(x)))
        x = self.mix(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.out(torch.tanh(self.deep(x.unsqueeze(1))).mean((2, 3, 4)))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    model = Network().double()
    for parameter in model.parameters():
        parameter.data.mul_(3)
    return model.eval()


@pytest.fixture(scope="module")
def data():
    torch.manual_seed(1)
    x, y = torch.randn(14, 3, 16, dtype=torch.float64), torch.randint(0, 3, (14,))
    x[0, :, :6] = 0  # whole patches are zero
    return TensorDataset(x, y)


def gradient(model, examples):
    """The mean gradient of the layers that are read, as one vector; the reference."""
    model.eval()
    parameters = [p for layer in influence_layers(model).values() for p in layer.parameters()]
    return torch.cat([g.flatten() for g in torch.autograd.grad(losses(model, examples).mean(), parameters)])


@pytest.mark.parametrize("normalize", ["none", "cosine"])
@pytest.mark.parametrize("per_example", [False, True])
def test_scores_are_dot_products_of_autograds_gradients(network, data, normalize, per_example):
    validation = TensorDataset(*data[:5])
    scores = iprox.score(
        *(network, data, {"task": validation}),
        loss_fn=losses,
        estimator="tracin",
        normalize=normalize,
        per_example=per_example,
        query_norm=1.0,
    )
    query = gradient(network, validation[:])
    rows = torch.stack([gradient(network, data[i : i + 1]) for i in range(len(data))])
    expected = rows @ query
    if normalize == "cosine":
        expected = expected / (rows.norm(dim=1) * query.norm())
    np.testing.assert_allclose(scores["influence"].to_numpy(), expected.numpy(), rtol=1e-9)
    if per_example:
        each = torch.stack([gradient(network, data[i : i + 1]) for i in range(5)])
        lengths = rows.norm(dim=1)[:, None] * each.norm(dim=1) if normalize == "cosine" else 1
        table = np.stack(scores["examples/task"].to_numpy())
        np.testing.assert_allclose(table, (rows @ each.mT / lengths).numpy(), rtol=1e-9)


def test_the_unfolded_input_times_the_matrix_is_the_convolution(network, data):
    x = data[:][0]
    for layer, given in ((network.line, x), (network.first, network.line(x).unflatten(2, (4, 4)))):
        output = layer(given)
        h, delta = as_rows(layer, given, output)
        torch.testing.assert_close(h @ dense_weight(layer).mT + layer.bias, delta)


def test_ekfac_divides_by_the_mean_square_in_the_eigenbasis_also_of_convolutions(network, data):
    """EK-FAC of one layer against its dense definition, from autograd's gradients of single examples."""
    from iprox.kronecker.eigen import kronecker_curvature

    layers = {name: compressible_layers(network)[name] for name in ("first", "mix")}
    batches = list(DataLoader(data, 4))
    (bases,) = kronecker_curvature(network, layers, batches, labels="data", loss_fn=losses)
    network.eval()
    for name, layer in layers.items():
        squares = 0
        for i in range(len(data)):
            weight, bias = torch.autograd.grad(losses(network, data[i : i + 1]).mean(), [layer.weight, layer.bias])
            whole = torch.cat([weight.flatten(1), bias[:, None]], 1)
            squares = squares + (bases[name].left.mT @ whole @ bases[name].right) ** 2 / len(data)
        torch.testing.assert_close(bases[name].eigenvalues, squares)


def test_moments_of_layers_with_one_input_but_other_kernels_are_their_own(network, data):
    layers = compressible_layers(network)
    moments, _ = collect_moments(network, layers, list(DataLoader(data, 5)), loss_fn=losses)
    assert {name: each.inputs.width for name, each in moments.items()} == {
        name: weight_shape(layer)[1] for name, layer in layers.items()
    }
    with torch.no_grad():
        inputs = torch.tanh(network.line(data[:][0])).unflatten(2, (4, 4))
        for name in ("first", "skip"):
            rows = as_rows(layers[name], inputs, layers[name](inputs))[0].flatten(0, 1)
            torch.testing.assert_close(moments[name].inputs.diagonal(), rows.square().mean(0))


def test_a_proxy_has_low_rank_convolutions_whose_gradients_are_those_of_the_dense_weight(network, data):
    proxy = iprox.compress(network, data, sparsity=0.4, ranks="uniform", loss_fn=losses)
    low = {name: layer for name, layer in proxy.named_modules() if isinstance(layer, LowRankConv)}
    assert set(low) <= {"line", "first", "skip", "deep"}
    assert len(low) > 1
    dense = Network().double().eval()
    dense.load_state_dict(proxy.state_dict(), strict=False)
    for name, layer in low.items():
        plain = dense.get_submodule(name)
        plain.weight.data.copy_(layer.weight.view_as(plain.weight))
        if layer.bias is not None:
            plain.bias.data.copy_(layer.bias)
    for name, layer in proxy.named_modules():
        if hasattr(layer, "rank") and name not in low:
            dense.get_submodule(name).weight.data.copy_(layer.weight)
            dense.get_submodule(name).bias.data.copy_(layer.bias)
    torch.testing.assert_close(proxy(data[:][0]), dense(data[:][0]))
    options = {"loss_fn": losses, "estimator": "tracin", "query_norm": 1.0}
    one, other = (iprox.score(model, data, {"t": data}, **options)["influence"] for model in (proxy, dense))
    np.testing.assert_allclose(one.to_numpy(), other.to_numpy(), rtol=1e-9)


def test_alignment_and_audit_of_any_module(network, data):
    proxy = iprox.compress(network, data, sparsity=0.4, loss_fn=losses)

    def apart():
        with torch.no_grad():
            theirs = network(data[:][0])
            return float((proxy(data[:][0]) - theirs).square().sum() / theirs.square().sum())

    before = apart()
    settings = {"epochs": 30, "batch_size": 7}
    history = iprox.align(proxy, network, data, loss_fn=losses, learning_rate=3e-3, **settings)
    assert len(history.steps) == 60
    assert apart() < before / 2
    history = iprox.align(proxy, network, data, loss_fn=losses, learning_rate=3e-3, gradient_weight=1, **settings)
    assert history.steps[-1].gradient < history.steps[0].gradient
    report = iprox.audit(network, proxy, data, {"task": data}, loss_fn=losses)
    assert report.mean["spearman"] > 0.5
    assert len(iprox.select(report_scores(proxy, data), count=3)) == 3


def report_scores(proxy, data):
    return iprox.score(proxy, data, {"task": data}, loss_fn=losses)


def test_scores_do_not_depend_on_batches(network, data):
    one = iprox.score(network, data, {"t": data}, loss_fn=losses)
    other = iprox.score(network, DataLoader(data, 3), {"t": DataLoader(data, 4)}, loss_fn=losses)
    np.testing.assert_allclose(one["influence"].to_numpy(), other["influence"].to_numpy(), rtol=1e-8)


SMALL = {"num_labels": 3, "attn_implementation": "eager"}
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
SOUND = {"conv_dim": (8, 8), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_conv_pos_embedding_groups": 2}


@pytest.mark.parametrize(
    ("kind", "config", "shape"),
    [
        ("ViTForImageClassification", {**SIZES, "image_size": 8, "patch_size": 4, "num_channels": 1}, (1, 8, 8)),
        (
            "SwinForImageClassification",  # windows: several rows of tokens per example
            {"image_size": 16, "patch_size": 2, "num_channels": 1, "embed_dim": 8, "window_size": 4}
            | {"depths": [2], "num_heads": [2]},
            (1, 16, 16),
        ),
        (
            "ResNetForImageClassification",
            {"num_channels": 1, "embedding_size": 8, "hidden_sizes": [8], "depths": [1]} | {"layer_type": "basic"},
            (1, 16, 16),
        ),
        ("Wav2Vec2ForSequenceClassification", {**SIZES, **SOUND, "num_conv_pos_embeddings": 4}, (200,)),
    ],
    ids=["vit", "swin", "resnet", "wav2vec2"],
)
@pytest.mark.filterwarnings("ignore:model. .* is neither compressed nor scored")
def test_models_of_transformers_are_scored_as_autograd_says(kind, config, shape):
    torch.manual_seed(0)
    named = {"ViT": "ViTConfig", "Swi": "SwinConfig", "Res": "ResNetConfig", "Wav": "Wav2Vec2Config"}[kind[:3]]
    model = getattr(transformers, kind)(getattr(transformers, named)(**config, **SMALL)).double().eval()
    data = TensorDataset(torch.randn(5, *shape, dtype=torch.float64), torch.randint(0, 3, (5,)))

    def loss(model, batch):
        return nn.functional.cross_entropy(model(batch[0]).logits, batch[1], reduction="none")

    how = {"estimator": "tracin", "per_example": False, "normalize": "none", "loss_fn": loss}
    scores = iprox.score(model, data, {"t": data}, **how)["influence"].to_numpy()
    parameters = [p for layer in influence_layers(model).values() for p in layer.parameters()]

    def gradient(examples):
        grads = torch.autograd.grad(loss(model, examples).mean(), parameters)
        return torch.cat([each.flatten() for each in grads])

    query = gradient(data[:])
    expected = [float(gradient(data[i : i + 1]) @ query) for i in range(5)]
    np.testing.assert_allclose(scores, expected, rtol=1e-8)


class Encoder(nn.Module):
    """torch's own transformer layer, which reads sequences of tokens first unless told otherwise."""

    def __init__(self, batch_first):
        super().__init__()
        self.batch_first = batch_first
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=batch_first)

    def forward(self, x):
        x = self.layer(x if self.batch_first else x.transpose(0, 1))
        return x.mean(1 if self.batch_first else 0)


def test_torchs_transformer_layers_are_read_where_the_batch_comes_first():
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(6, 6, 4), torch.randint(0, 4, (6,)))
    with pytest.warns(UserWarning, match=r"layer\.self_attn\.out_proj .* was never called"):
        scores = iprox.score(Encoder(True), data, {"t": data}, loss_fn=losses, estimator="tracin", normalize="none")
    assert np.abs(scores["influence"].to_numpy()).min() > 0
    with pytest.raises(iprox.InputError, match=r"layer\.linear2: the loss of one example .*batch_first=True"):
        iprox.score(Encoder(False), data, {"t": data}, loss_fn=losses)


class Overwritten(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.out = nn.Conv1d(3, 3, 1), nn.Conv1d(3, 3, 1), nn.Linear(3, 3)

    def forward(self, x):
        x = self.one(x) * 1.0
        y = self.two(x)
        return self.out((y + x.relu_()).mean(2))


class Reused(Overwritten):
    def forward(self, x):
        return self.out(self.one(self.one(x)).mean(2))


class Shared(Overwritten):
    def __init__(self):
        super().__init__()
        self.two.weight = self.one.weight


class TiedToEmbedding(Overwritten):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(3, 3)
        self.table.weight = self.out.weight


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Overwritten, "two: its input is overwritten later .* inplace=False"),
        (Reused, "one: is used more than once"),
        (Shared, "two: shares its weights with one"),
        (TiedToEmbedding, "out: shares its weights with table"),
    ],
)
def test_what_cannot_be_separated_is_refused_by_name(kind, said):
    data = TensorDataset(torch.randn(4, 3, 5), torch.randint(0, 3, (4,)))
    with pytest.raises(iprox.InputError, match=said):
        iprox.score(kind(), data, {"t": data}, loss_fn=losses)


def test_convolutions_that_are_not_read_are_said(data):
    model = nn.Sequential(
        nn.Conv1d(3, 6, 3, groups=3), nn.utils.parametrizations.weight_norm(nn.Conv1d(6, 2, 3)), nn.Flatten()
    )
    model.append(nn.Linear(24, 3))
    with pytest.warns(UserWarning, match=r"model: 0 \(2 in all\) is neither compressed nor scored"):
        iprox.score(model.double(), data, {"t": data}, loss_fn=losses)


def test_what_is_no_loss_or_no_data_set_is_said(network, data):
    mean = lambda model, batch: losses(model, batch).mean()  # noqa: E731
    with pytest.raises(iprox.InputError, match=r"one number per example, \[B\], not \[\]; use reduction='none'"):
        iprox.score(network, data, {"t": data}, loss_fn=mean)
    with pytest.raises(iprox.InputError, match="pool: expected a torch data set or a DataLoader, not a str"):
        iprox.score(network, "pool", {"t": data}, loss_fn=losses)
    with pytest.raises(iprox.InputError, match="convolution, whose FLOPs depend on the size of its input"):
        iprox.compress(network, data, flops=0.5, loss_fn=losses)


def test_a_stream_needs_a_curvature_sample(network, data):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(data)

    with pytest.raises(iprox.InputError, match="give curvature_sample=, or estimator='tracin'"):
        iprox.score(network, Stream(), {"t": data}, loss_fn=losses)
    whole = iprox.score(network, data, {"t": data}, loss_fn=losses)
    streamed = iprox.score(network, Stream(), {"t": data}, loss_fn=losses, curvature_sample=data)
    np.testing.assert_allclose(streamed["influence"].to_numpy(), whole["influence"].to_numpy(), rtol=1e-9)
