"""An influence scorer, a row of the main table: the sibling trained to predict the target's scores from the text.

A regression head on the small off-the-shelf model is trained on the target's scores of a random 5 % of the pool, then
predicts scores for the whole pool, as in MATES (arXiv:2406.06046), but with influence computed on the target.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, Trainer, TrainingArguments

from iprox.data import ChatEncoder, Encoded, Pool, iter_batches
from iprox.data.sampling import draw_rows
from iprox.metering import metered
from iprox.models import flops
from iprox.models.loading import load_tokenizer, skeleton
from iprox.recipe import parse_recipe
from iprox.records import read_json
from iprox.scores import TASK_PREFIX, read_scores
from iprox.session import tokens_of

SHARE, EPOCHS, LEARNING_RATE = 0.05, 4, 3e-4


def score(recipe: dict[str, Any], sibling: str, warmed: Path, folder: Path) -> dict[str, Any]:
    """Train the scorer, write its scores of the pool to `folder`, and return the cost."""
    settings = parse_recipe(recipe, "scorer.py")
    pool = Pool(settings.data.pool)
    truth = read_scores(warmed / "scores.parquet")
    tasks = [name for name in truth.column_names if name.startswith(TASK_PREFIX)]
    values = np.stack([truth[name].to_numpy() for name in tasks], axis=1)
    unscored = np.flatnonzero(~np.isfinite(values).all(1)).tolist()
    rows = draw_rows("scorer", settings.seed, len(truth), round(SHARE * len(truth)), unscored)
    tokenizer = load_tokenizer(sibling)
    encoded = ChatEncoder(tokenizer, settings.data.max_length).encode(list(pool))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(settings.seed)
    with metered(device) as training:
        model = train(sibling, tokenizer, [encoded[row] for row in rows], values[rows], folder, settings.seed)
    with metered(device) as predicting:
        predicted = predict(model, encoded, values.shape[1])
    table = truth
    for number, name in enumerate(tasks):
        table = table.set_column(table.column_names.index(name), name, pa.array(predicted[:, number]))
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, folder / "scores.parquet")
    small = skeleton(sibling)
    trained, _ = tokens_of([encoded[row] for row in rows])
    every, _ = tokens_of(encoded)
    whole = read_json(warmed / "run.json")["stages"]["score"]
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "flops": {
            # A share of the rows, and all validation gradients.
            "labels": SHARE * (whole["flops"] - whole["query_flops"]) + whole["query_flops"],
            "training": flops.training_flops(small, EPOCHS * trained, 0),
            "score": flops.forward_pass_flops(small, every, 0),
        },
        "seconds": {
            "labels": SHARE * whole["seconds"],
            "training": training.seconds,
            "score": predicting.seconds,
        },
        "peak_memory_bytes": max(training.peak_memory_bytes, predicting.peak_memory_bytes),
    }


def train(
    sibling: str, tokenizer: Any, encoded: list[Encoded], values: np.ndarray, folder: Path, seed: int
) -> nn.Module:
    """Fit the regression head and the model below it to standardized scores [N, tasks]."""
    labels = (values - values.mean(0)) / values.std(0)
    model = AutoModelForSequenceClassification.from_pretrained(
        sibling,
        num_labels=values.shape[1],
        problem_type="regression",
        dtype=torch.float32,
        pad_token_id=tokenizer.pad_token_id or 0,
    )
    rows = [
        {"input_ids": row.input_ids.tolist(), "labels": target.tolist()}
        for row, target in zip(encoded, labels.astype(np.float32), strict=True)
    ]
    settings = TrainingArguments(
        output_dir=str(folder / "trainer"),
        num_train_epochs=EPOCHS,
        learning_rate=LEARNING_RATE,
        per_device_train_batch_size=16,
        lr_scheduler_type="cosine",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=seed,
    )
    collator = DataCollatorWithPadding(tokenizer)
    Trainer(model, settings, train_dataset=rows, data_collator=collator).train()  # pyright: ignore[reportArgumentType]
    return model.eval()


def predict(model: nn.Module, encoded: list[Encoded], tasks: int) -> np.ndarray:
    """Return predicted scores [N, tasks]; NaN for examples without a supervised token, which have no score."""
    device = next(model.parameters()).device
    found = np.full((len(encoded), tasks), np.nan)
    with torch.inference_mode():
        for batch in iter_batches(encoded, 4096):
            mask = torch.arange(batch.input_ids.shape[1]) < batch.lengths[:, None]
            logits = model(input_ids=batch.input_ids.to(device), attention_mask=mask.to(device)).logits
            found[batch.indices] = logits[: len(batch.indices)].double().cpu().numpy()
    return found
