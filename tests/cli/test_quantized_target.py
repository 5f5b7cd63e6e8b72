"""A target that bitsandbytes quantized, from the command line."""

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

pytest.importorskip("bitsandbytes")


@pytest.fixture
def quantized(model, tmp_path):
    folder = tmp_path / "quantized"
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(model, quantization_config=how).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("proxy", [{"depth": 0.5}, {"sparsity": 0.5, "align": {"epochs": 1, "held_out": 20}}])
def test_a_quantized_target_is_scored_and_makes_proxies(place, quantized, proxy):
    again = {"candidates": 0.3}
    place.set(model=str(quantized), proxy=proxy, warmup=False, refine=again, influence={"curvature_examples": 16})
    assert place.run() == 0
    record = place.record()
    assert record["cost"]["target_parameters"] > 0
    assert len(place.result()["selected.jsonl"].splitlines()) == 20


def test_it_is_not_trained(place, quantized, refused):
    place.set(model=str(quantized))
    said = refused("run", place.recipe)
    assert "its weights are quantized, so it is not trained here" in said
    assert not place.output.exists()
    assert said == refused("plan", place.recipe)
