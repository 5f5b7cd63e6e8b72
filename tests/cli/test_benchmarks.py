"""lm-evaluation-harness on the model before and after fine-tuning, on a task of this test."""

import json

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("lm_eval")

QUESTIONS = [
    {"question": f"{a} + {b} =", "choices": [str(a + b), str(a + b + 1), "no"], "answer": 0}
    for a in (1, 2, 3)
    for b in (4, 5)
]


@pytest.fixture
def benchmark(place, monkeypatch):
    """A folder with a multiple-choice task `sums`."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = place.path / "tasks"
    folder.mkdir()
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    task = {
        "task": "sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "sums.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    }
    (folder / "sums.yaml").write_text(yaml.safe_dump(task))
    return {"lm_eval": ["sums"], "include": str(folder)}


def accuracy(folder, dtype):
    """The share of questions whose right choice is the most likely one, one sequence at a time."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), AutoTokenizer.from_pretrained(folder)
    right = 0
    for row in QUESTIONS:
        prompt, sums = tokenizer.encode(row["question"]), []
        for choice in row["choices"]:
            ids = tokenizer.encode(f"{row['question']} {choice}")
            with torch.no_grad():
                logs = model(torch.tensor([ids])).logits.float().log_softmax(-1)[0]
            sums.append(sum(float(logs[at - 1, ids[at]]) for at in range(len(prompt), len(ids))))
        right += sums.index(max(sums)) == row["answer"]
    return right / len(QUESTIONS)


def test_benchmarks_before_and_after_are_in_the_record_and_the_report(place, benchmark, capfd):
    off = ["--set", "warmup=false", "proxy=false", "audit=false", "influence.estimator=length", "dtype=float32"]
    place.set(finetune={"epochs": 1, "learning_rate": 1e-3, "evaluate": benchmark})
    assert place.run(*off) == 0
    found = json.loads((place.output / "finetune/lm_eval.json").read_text())
    assert place.record()["stages"]["evaluate"]["lm_eval"] == found
    model = yaml.safe_load(place.recipe.read_text())["model"]
    measured = found["sums"]["acc,none"]
    assert measured["before"] == pytest.approx(accuracy(model, torch.float32))
    assert measured["after"] == pytest.approx(accuracy(place.output / "finetune/model", torch.float32))
    assert f"sums acc: {measured['before']:.3f} before" in capfd.readouterr().out
    assert "Before and after fine-tuning" in (place.output / "report.html").read_text()

    # Another limit measures again, and trains nothing again.
    place.set(finetune={"epochs": 1, "learning_rate": 1e-3, "evaluate": {**benchmark, "limit": 2}})
    assert place.run(*off) == 0
    assert place.done() == ["evaluate", "report"]


def test_a_task_that_is_not_there_is_refused_before_any_work(place, benchmark, capfd):
    place.set(finetune={"evaluate": {**benchmark, "lm_eval": ["summs"]}})
    assert place.run() == 2
    assert "finetune.evaluate.lm_eval: summs: no such task" in capfd.readouterr().err
    assert not place.output.exists()
