"""The model card of a proxy: purpose, method, fidelity and use."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedModel

from iprox.files import write_text
from iprox.models.checkpoint import IproxConfig, proxy_config
from iprox.models.flops import parameters
from iprox.models.layers import low_rank_layers

CARD = "README.md"

# The fidelity section of a card before an audit.
UNMEASURED = "Not measured yet: `iprox audit` compares the proxy's ranking with its target's."


def proxy_card(model: PreTrainedModel) -> str:
    """Return the card of a proxy, with front matter for the Hub.

    Raises:
        ValueError: the model is not a proxy.
    """
    config = proxy_config(model)
    if config is None:
        raise ValueError("the model is not a proxy")
    target = config.target or "an unnamed model"
    data = ModelCardData(
        base_model=config.target if config.target and not Path(config.target).exists() else None,
        library_name="transformers",
        tags=["iprox", "data-selection", "influence", "low-rank"],
    )
    text = f"""---
{data.to_yaml()}
---

# Influence proxy of {target}

A cheaper stand-in for `{target}` that ranks training examples by their influence on that model, made by
[iprox](https://arxiv.org/abs/2602.17835). It is for **selecting data**, not for generating text.

| | |
| --- | --- |
| target | `{target}` (weights {config.target_fingerprint or "not recorded"}) |
| method | {config.method} |
| sparsity | {config.sparsity:.3f} of the target's linear parameters removed |
| parameters | {parameters(model):,} |
| gradients | of {config.depth:.0%} of the decoder layers, from the top |
| made with | iprox {version("iprox")}, transformers {version("transformers")}, torch {version("torch")} |

## Fidelity

{UNMEASURED}

## Use

```python
import iprox  # teaches transformers to load proxies
from transformers import AutoModelForCausalLM

proxy = AutoModelForCausalLM.from_pretrained("path/or/id")
```

```bash
iprox score --model path/or/id --target {target} --pool pool.jsonl --validation task=val.jsonl --output scores
```

## Ranks

{_ranks(model, config)}
"""
    return str(ModelCard(text))


def write_card(model: PreTrainedModel, folder: Path) -> None:
    """Write the card into a proxy's folder."""
    write_text(folder / CARD, proxy_card(model))


def note_fidelity(folder: Path, sample: int, tasks: Mapping[str, Mapping[str, object]], score: str) -> None:
    """Write the results of an audit into the card of a proxy.

    Args:
        folder: folder of the proxy.
        sample: number of examples that were compared.
        tasks: `spearman` and `overlap` (by share of the top) per task, as in `audit.json`.
        score: kind of score that was compared, e.g. `ekfac cosine`.
    """
    file = folder / CARD
    rows = [f"Agreement with the target's own scores ({score}) on {sample} random examples:", ""]
    rows += ["| task | Spearman | top-5 % overlap |", "| --- | --- | --- |"]
    for task, entry in tasks.items():
        overlap = entry["overlap"]
        assert isinstance(overlap, Mapping)
        rows.append(f"| {task} | {entry['spearman']:.3f} | {overlap['0.05']:.2f} |")
    section = "## Fidelity\n\n" + "\n".join(rows) + "\n\n## Use"
    text = re.sub(r"## Fidelity\n.*?\n## Use", lambda _: section, file.read_text(encoding="utf-8"), flags=re.DOTALL)
    write_text(file, text)


def _ranks(model: PreTrainedModel, config: IproxConfig) -> str:
    """Return a table of ranks, with one row per block of the model and one column per kind of layer."""
    if not config.ranks:
        return "No layer is factorized."
    blocks: dict[str, dict[str, int]] = {}
    for name in low_rank_layers(model):
        match = re.match(r"(.*?\.\d+)\.(.*)", name)
        block, kind = match.groups() if match else ("", name)
        blocks.setdefault(block, {})[kind] = config.ranks[name]
    kinds = list(dict.fromkeys(kind for layers in blocks.values() for kind in layers))
    rows = [["block", *kinds], ["---"] * (len(kinds) + 1)]
    rows += [[block or "–", *(str(layers.get(kind, "dense")) for kind in kinds)] for block, layers in blocks.items()]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
