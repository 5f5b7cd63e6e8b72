"""Choose preference pairs that help a task, for DPO: `python examples/preferences.py`."""

import json
import random
from importlib.resources import files

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import iprox

MODEL = str(files("iprox.quickstart") / "model")
TASK = "arithmetic"


def pairs(seed: int) -> dict[str, list[dict]]:
    """Return pairs in the sets "pool", "validation" and "test", from the questions of the quickstart.

    The answer to another question of the same kind is rejected. In every fourth pair of the pool the answers are
    swapped; other kinds of questions are off the task. `kind` says which a pair is.
    """
    draw = random.Random(seed)
    with (files("iprox.quickstart") / "data/pool.jsonl").open(encoding="utf-8") as stream:
        rows = [json.loads(line) for line in stream]
    draw.shuffle(rows)
    answers: dict[str, list[dict]] = {}
    for row in rows:
        answers.setdefault(row["source"], []).append(row["messages"][-1])
    of_task: list[dict] = []
    others: list[dict] = []
    for number, row in enumerate(rows):
        *prompt, chosen = row["messages"]
        wrong = draw.choice([each for each in answers[row["source"]] if each != chosen])
        on_task = row["source"] == TASK
        pair = {"id": f"pair-{number}", "prompt": prompt, "chosen": [chosen], "rejected": [wrong]}
        (of_task if on_task else others).append({**pair, "kind": "good" if on_task else "off-task"})
    validation, test, mine = of_task[:30], of_task[30:90], of_task[90:]
    for pair in (*mine[::4], *others[::4]):
        pair["chosen"], pair["rejected"] = pair["rejected"], pair["chosen"]
        pair["kind"] = "swapped" if pair["kind"] == "good" else pair["kind"]
    pool = [*mine, *others]
    draw.shuffle(pool)
    return {"pool": pool, "validation": validation, "test": test}


if __name__ == "__main__":
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    sets, how = pairs(seed=0), {"loss_fn": iprox.DpoLoss(), "tokenizer": tokenizer}
    proxy = iprox.compress(model, sets["pool"][:128], sparsity=0.5, **how)
    scores = iprox.score(proxy, sets["pool"], {TASK: sets["validation"]}, target=model, **how)
    chosen = [sets["pool"][row] for row in iprox.select(scores, count=60)]
    print({kind: sum(pair["kind"] == kind for pair in chosen) for kind in ("good", "swapped", "off-task")})
    with open("selected.jsonl", "w", encoding="utf-8") as file:  # ready for TRL's DPOTrainer
        file.writelines(json.dumps(pair) + "\n" for pair in chosen)
