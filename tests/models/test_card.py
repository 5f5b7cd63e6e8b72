"""The model card of a proxy."""

import torch
from huggingface_hub import ModelCard

from iprox.models.card import UNMEASURED, note_fidelity, proxy_card, write_card
from iprox.models.layers import low_rank_layers
from iprox.proxy.compress import derive_proxy
from iprox.proxy.size import Size


def test_the_card_says_what_the_proxy_is_and_how_faithful(tiny, tmp_path):
    proxy, _ = derive_proxy(tiny.model(), [tiny.batch([9, 7])], Size(0.5), target="Qwen/Qwen3-4B")
    card = ModelCard(proxy_card(proxy))
    assert card.data.base_model == "Qwen/Qwen3-4B"
    assert "iprox" in card.data.tags
    for rank in {layer.rank for layer in low_rank_layers(proxy).values()}:
        assert f" {rank} |" in card.text
    assert UNMEASURED in card.text
    write_card(proxy, tmp_path)
    note_fidelity(tmp_path, 300, {r"ma\1th": {"spearman": 0.9123, "overlap": {"0.05": 0.8}}}, "ekfac cosine")
    noted = ModelCard.load(tmp_path / "README.md")
    assert UNMEASURED not in noted.text
    assert "the target's own scores (ekfac cosine) on 300 random examples" in noted.text
    assert r"| ma\1th | 0.912 | 0.80 |" in noted.text
    assert "## Ranks" in noted.text
    note_fidelity(tmp_path, 300, {"code": {"spearman": 0.5, "overlap": {"0.05": 0.4}}}, "tracin")
    assert r"ma\1th" not in (tmp_path / "README.md").read_text()


def test_a_local_path_is_no_hub_id(tiny, tmp_path):
    proxy, _ = derive_proxy(tiny.model(dtype=torch.float32), [tiny.batch([9])], Size(0.5), target=str(tmp_path))
    assert ModelCard(proxy_card(proxy)).data.base_model is None
