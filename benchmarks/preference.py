"""What a selection of preference pairs holds and trains: DPO on pairs from the quickstart's questions.

    python benchmarks/preference.py        # the bundled model, three seeds; draws docs/plots/preference.svg

The pool, with swapped and off-task pairs, is that of examples/preferences.py. Scores are from a proxy, with validation
gradients on the model. TRL's DPOTrainer then trains the model on the selection, on as many random pairs, and on as many
random good pairs; the accuracy is the share of held-out pairs of which the model finds the chosen answer more probable.
"""

from __future__ import annotations

import copy
import random
import sys
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import DPOConfig, DPOTrainer

import iprox
from common import Results, settings_of
from iprox.data import ChatEncoder, Encoded, Pool, iter_batches

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))

from preferences import MODEL, TASK, pairs
from selected import arguments_of, draw, shares


def main() -> None:
    """Measure, draw and print."""
    arguments = arguments_of("preference", __doc__, count=60)
    results = Results(arguments.output, settings_of(arguments), fresh=arguments.fresh)
    for seed in range(arguments.seeds):
        print(seed, results("bundled model", lambda seed=seed: measured(arguments, seed), seed), flush=True)
    draw(results, ["bundled model"], ("good", "swapped", "off-task"), "preference")


def measured(arguments: Namespace, seed: int) -> dict[str, Any]:
    """Return what the selection holds, the proxy's fidelity, and accuracies."""
    sets = pairs(seed)
    pool, task, kinds = sets["pool"], {TASK: sets["validation"]}, np.array([pair["kind"] for pair in sets["pool"]])
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    how = {"loss_fn": iprox.DpoLoss(), "tokenizer": tokenizer, "progress": False}
    generator = random.Random(seed)
    proxy = iprox.compress(model, generator.sample(pool, 128), sparsity=arguments.sparsity, **how)
    scores = iprox.score(proxy, pool, task, target=model, **how)
    chosen = iprox.select(scores, count=arguments.count)
    report = iprox.audit(model, proxy, generator.sample(pool, 300), task, **how)
    test = ChatEncoder(tokenizer, 512).encode(list(Pool(sets["test"], pairs=True)))
    rows = {
        "selected": chosen.tolist(),
        "random": generator.sample(range(len(pool)), arguments.count),
        "random good": generator.sample(np.flatnonzero(kinds == "good").tolist(), arguments.count),
    }
    accuracy = {"untrained": accuracy_of(model, test)}
    for name, taken in rows.items():
        accuracy[name] = accuracy_of(trained(model, tokenizer, [pool[row] for row in taken], seed), test)
    return {
        "pool": shares(kinds),
        "selected": shares(kinds[chosen]),
        "spearman": report.mean["spearman"],
        "overlap": report.mean["overlap"]["0.05"],
        "accuracy": accuracy,
    }


def trained(model: Any, tokenizer: Any, chosen: list[dict[str, Any]], seed: int) -> Any:
    """Return a copy of the model that DPOTrainer has trained."""
    set_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        arguments = DPOConfig(
            folder,
            seed=seed,
            num_train_epochs=4,
            learning_rate=3e-4,
            per_device_train_batch_size=8,
            max_length=512,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            bf16=False,
        )
        data = datasets.Dataset.from_list(
            [{key: pair[key] for key in ("prompt", "chosen", "rejected")} for pair in chosen]
        )
        trainer = DPOTrainer(copy.deepcopy(model), args=arguments, train_dataset=data, processing_class=tokenizer)
        trainer.train()
    return trainer.model


@torch.no_grad()
def accuracy_of(model: Any, test: list[Encoded]) -> float:
    """Return the share of pairs of which the chosen answer is more probable."""
    model.eval()
    margins = [iprox.DpoLoss().margin(model, batch) for batch in iter_batches(test, 4096)]
    return (torch.cat(margins) > 0).float().mean().item()


if __name__ == "__main__":
    main()
