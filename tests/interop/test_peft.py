"""PEFT on a loaded proxy, unmodified: LoRA on the factors."""

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from iprox.models.layers import low_rank_layers
from iprox.models.loss import causal_lm_losses
from iprox.proxy.compress import derive_proxy
from iprox.proxy.size import Size


def test_lora_trains_on_the_factors(tiny, tmp_path):
    batch = tiny.batch([9, 7, 12])
    proxy, _ = derive_proxy(tiny.model(dtype=torch.float32), [batch], Size(0.5))
    proxy.save_pretrained(tmp_path / "proxy")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "proxy", dtype=torch.float32)
    adapted = get_peft_model(loaded, LoraConfig(r=2, target_modules=["up", "down"], init_lora_weights=False))
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 2 * len(low_rank_layers(proxy))
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(5):
        loss = causal_lm_losses(adapted, batch).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    adapted.save_pretrained(tmp_path / "adapter")
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "proxy", dtype=torch.float32)
    again = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    torch.testing.assert_close(causal_lm_losses(again, batch), causal_lm_losses(adapted, batch))
