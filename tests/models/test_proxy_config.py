"""What a hand may have written into a proxy's config, and layers that are seen in other shapes."""

import json

import pytest
import torch

from iprox.errors import InputError
from iprox.models.loading import load_config, load_model, skeleton
from iprox.models.observe import _by_row
from iprox.proxy.compress import derive_proxy
from iprox.proxy.size import Size


@pytest.fixture
def proxy(tiny, tmp_path):
    made, _ = derive_proxy(tiny.model("qwen3", torch.float32), [tiny.batch([9, 7])], Size(0.5))
    made.save_pretrained(tmp_path / "proxy")
    return tmp_path / "proxy"


def describe(folder, **changes):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"].update(changes)
    file.write_text(json.dumps(config))


def refusals(folder):
    for read in (load_model, skeleton):
        with pytest.raises(InputError) as error:
            read(folder)
        assert len(str(error.value).splitlines()) == 1
        assert "batch_tokens" not in str(error.value)
        yield str(error.value)


@pytest.mark.parametrize("rank", [-5, 0, "../..", 3.5, None, 1e30, [], {}, True, 10**9, 33])
def test_ranks_that_cannot_be_are_refused(proxy, rank):
    layer = "model.layers.0.mlp.up_proj"
    describe(proxy, ranks={layer: rank})
    for said in refusals(proxy):
        assert str(proxy) in said
        assert "rank" in said
        assert layer in said


@pytest.mark.parametrize("ranks", [None, -5, "../..", 3.5, [1, 2], 1e30, True])
def test_ranks_are_by_layer(proxy, ranks):
    describe(proxy, ranks=ranks)
    for said in refusals(proxy):
        assert "ranks" in said


@pytest.mark.parametrize(
    ("key", "value"),
    [("target", 3), ("target", ["a"]), ("target_fingerprint", 7), ("method", None), ("sparsity", "half")],
)
def test_other_keys_of_a_proxy_have_their_types(proxy, key, value):
    describe(proxy, **{key: value})
    for said in refusals(proxy):
        assert key in said


def test_a_proxy_as_it_is_written_is_read(proxy):
    describe(proxy, target=None, target_fingerprint=None, sparsity=0)
    assert load_config(proxy).quantization_config["target"] is None
    load_model(proxy)


@pytest.mark.parametrize("shape", [(2, 5), (10,), (2, 1, 5), (1, 2, 5), (2, 5, 1), (10, 1), (1, 10), (1, 2, 1, 5)])
def test_dimensions_of_size_one_change_no_rows(shape):
    rows = torch.arange(20.0).reshape(2, 5, 2)
    counted = torch.tensor([[True] * 5, [True, True, False, False, False]])
    assert torch.equal(_by_row("layer", rows.reshape(*shape, 2), None, None, (2, 5)), rows)
    kept = _by_row("layer", rows.reshape(*shape, 2), None, counted, (2, 5))
    assert torch.equal(kept, rows * counted[..., None])


@pytest.mark.parametrize("positions", [(1, 5), (5, 1), (1, 1)])
def test_batches_of_one_row_or_token_are_told_apart_too(positions):
    rows = torch.randn(*positions, 3)
    for shape in ((positions[0], 1, positions[1]), (positions[0] * positions[1],), (1, *positions)):
        assert torch.equal(_by_row("layer", rows.reshape(*shape, 3), None, None, positions), rows)


@pytest.mark.parametrize("shape", [(5, 2), (2, 3, 5), (7,), (4, 5)])
def test_rows_that_cannot_be_told_apart_are_refused(shape):
    with pytest.raises(InputError, match="layer: gets rows of the shape"):
        _by_row("layer", torch.randn(*shape, 3), None, None, (2, 5))
