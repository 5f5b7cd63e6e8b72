"""A small synthetic run folder, of the exact shape that `iprox run` leaves."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from iprox.audits import compare_scores
from iprox.scores import scores_table

ROWS = 600
SCRIPT = "<script>window.pwned = true; document.title = 'pwned'</script>"
HOSTILE_SOURCE = "<img src=x onerror=alert(1)> & <b>co</b>"
SOURCES = ["arithmetic", "code", "dates", "reading comprehension of long passages", "sets", HOSTILE_SOURCE]
TASKS = ("gsm8k", "code")


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_pool(path: Path, sources: list[str | None], best: int) -> None:
    """Row `best` holds a script; row `best + 1` a long text; the others one short exchange."""
    lines = []
    for row, source in enumerate(sources):
        question = f"What is {row} plus {row}? Answer with the number alone, please."
        if row == best:
            question = f"Is this markup safe to show? {SCRIPT}"
        if row == best + 1:
            question = "Read this passage. " + "A long sentence that goes on and on. " * 60
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": f"{2 * row}"}]
        if row % 7 == 0:
            turns.insert(0, {"role": "system", "content": "You are terse."})
        lines.append(json.dumps({"id": f"row-{row:04d}", "source": source, "messages": turns}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def layers() -> dict[str, dict[str, Any]]:
    """Four blocks of a small model with grouped queries; one layer stays dense."""
    shapes = {
        "self_attn.q_proj": [384, 384],
        "self_attn.k_proj": [128, 384],
        "self_attn.v_proj": [128, 384],
        "self_attn.o_proj": [384, 384],
        "mlp.gate_proj": [1152, 384],
        "mlp.up_proj": [1152, 384],
        "mlp.down_proj": [384, 1152],
    }
    result = {}
    for block in range(4):
        for place, (kind, shape) in enumerate(shapes.items()):
            dense = block == 0 and kind == "self_attn.v_proj"
            rank = None if dense else min(shape) // 4 + 12 * block + 3 * place
            tail = 0.0 if dense else 0.01 * (1 + place) / (1 + block)
            result[f"model.layers.{block}.{kind}"] = {"shape": shape, "rank": rank, "tail": tail}
    return result


def write_run(
    folder: Path, name: str = "run", without: tuple[str, ...] = (), rows: int = ROWS, tasks: tuple[str, ...] = TASKS
) -> Path:
    """Writes a run folder and its pool.

    Args:
        folder: where to make them.
        name: name of the run folder; the pool is `NAME-pool.jsonl` beside it.
        without: stages that were switched off.
        rows: rows of the pool.
        tasks: names of the tasks.

    Returns:
        The run folder.
    """
    rng = np.random.default_rng(0)
    run = folder / name
    run.mkdir(parents=True)
    codes = rng.choice(len(SOURCES), size=rows, p=[0.3, 0.22, 0.18, 0.14, 0.1, 0.06])
    sources: list[str | None] = [SOURCES[c] for c in codes]
    best = 10
    scores = {}
    for place, task in enumerate(tasks):
        values = rng.standard_t(4, size=rows) * 4e-3 + np.where(codes == place, 6e-3, -1e-3)
        values[best], values[best + 1] = 0.09, 0.08
        values[3] = np.nan
        scores[task] = values
    influence = np.mean(list(scores.values()), axis=0)
    order = np.argsort(-influence, kind="stable")
    chosen = order[: max(1, rows // 20)]
    pool = folder / f"{name}-pool.jsonl"
    write_pool(pool, sources, best)
    (run / "recipe.yaml").write_text("model: models/target\nselect: {fraction: 0.05} # <b>top</b>\n")

    def nullable(values: np.ndarray) -> pa.Array:
        return pa.array(values, type=pa.float64(), mask=np.isnan(values))

    columns: dict[str, Any] = {
        "id": pa.array([f"row-{i:04d}" for i in range(rows)]),
        "source": pa.array(sources, type=pa.string()),
        "tokens": pa.array(rng.gamma(3.0, 40.0, rows).astype(np.int32) + 8),
    }
    supervised = np.maximum(columns["tokens"].to_numpy() // 4, 1)
    columns["supervised"] = pa.array(supervised.astype(np.int32))
    columns |= {f"influence/{task}": nullable(values) for task, values in scores.items()}
    columns["influence"] = nullable(influence)
    pq.write_table(pa.table(columns), run / "scores.parquet")
    if "select" not in without:
        selection = {"strategy": "top", "count": len(chosen), "fraction": 0.05}
        selection |= {"threshold": float(influence[chosen[-1]]), "rows": [int(r) for r in chosen]}
        selection["profile"] = profile(supervised, chosen, tasks)
        write_json(run / "selection.json", selection)
    if "warmup" not in without:
        points = [
            {"step": s, "epoch": s / 44, "loss": 2.4 + 7 / (1 + s / 9), "learning_rate": 2e-5} for s in range(2, 90, 2)
        ]
        write_json(run / "warmup/history.json", points)
        marks = [
            {
                "path": f"checkpoint-{s}",
                "step": s,
                "epoch": s / 44,
                "learning_rate": 1.7e-5,
                "loss": 2.4 + 7 / (1 + s / 9),
            }
            for s in (44, 88)
        ]
        write_json(run / "warmup/checkpoints.json", marks)
    if "compress" not in without:
        compression = {
            "method": "ipsvd",
            "ranks_rule": "global",
            "size": {"sparsity": 0.5},
            "achieved_sparsity": 0.4998,
        }
        write_json(run / "proxy/compression.json", compression | {"seconds": 4.2, "layers": layers()})
    if "align" not in without:
        steps = [
            {"step": s, "loss": 0.2 + 0.9 / s, "gradient": 0.18 + 0.7 / s, "kl": 0.2 / s, "learning_rate": 1e-4}
            for s in range(1, 41)
        ]
        held_out = [{"step": s, "fidelity": f} for s, f in ((0, 0.7), (10, 0.76), (20, 0.79), (30, 0.81), (40, 0.805))]
        write_json(
            run / "aligned/alignment.json", {"steps": steps, "held_out": held_out, "best_step": 30, "seconds": 20.0}
        )
    if "audit" not in without:
        write_audit(run / "audit", scores, sources, rng)
    if "attribute" not in without:
        write_attribution(run / "attribution.parquet", best)
    write_json(run / "run.json", run_json(pool, rows, tasks, without))
    return run


def profile(supervised: np.ndarray, chosen: np.ndarray, tasks: tuple[str, ...]) -> dict[str, Any]:
    """What the guard says of the selection, with a warning."""

    def lengths(counts: Any) -> dict[str, float]:
        return dict(zip(("low", "median", "high"), np.quantile(counts, (0.1, 0.5, 0.9)).tolist(), strict=True))

    validation = {task: lengths([200 + 7 * place]) for place, task in enumerate(tasks)}
    return {
        "rows": len(chosen),
        "supervised": {
            "selection": lengths(supervised[chosen]),
            "pool": lengths(supervised),
            "validation": validation,
        },
        "sources": [{"source": HOSTILE_SOURCE, "selection": 0.62, "pool": 0.06}],
        "near_duplicates": {"share": 0.375, "compared": 16},
        "warnings": ["the selected answers are <i>short</i>"],
    }


def write_attribution(path: Path, best: int) -> None:
    """Tokens of three rows: the one with a script, a long one, and one without a score."""
    pieces = [["Is this ", SCRIPT, "\n", "20"], [f"word{place} " for place in range(1500)], ["nothing"]]
    terms = [[-0.01, 0.02, 0.0, 0.08], [0.001 * (place % 7 - 3) for place in range(1500)], None]
    columns = {
        "row": pa.array([best, best + 1, 3], pa.int64()),
        "id": [f"row-{row:04d}" for row in (best, best + 1, 3)],
        "tokens": pieces,
        "supervised": [[False, False, False, True], [False] * 1500, [False]],
        "influence": pa.array(terms, pa.list_(pa.float64())),
    }
    pq.write_table(pa.table(columns), path)


def write_audit(folder: Path, scores: dict[str, np.ndarray], sources: list[str | None], rng: Any) -> None:
    folder.mkdir()
    sample = np.sort(rng.choice(np.arange(4, len(sources)), size=min(200, len(sources) - 4), replace=False))
    columns: dict[str, Any] = {"id": [f"row-{i:04d}" for i in sample], "source": [sources[i] for i in sample]}
    columns["tokens"] = rng.integers(20, 300, len(sample))
    sides = {}
    for task, values in scores.items():
        columns[f"target/{task}"] = values[sample]
        columns[f"proxy/{task}"] = 0.7 * values[sample] + rng.normal(size=len(sample)) * 2.5e-3
    for side in ("proxy", "target"):
        matrix = np.stack([columns[f"{side}/{task}"] for task in scores], axis=1)
        sides[side] = scores_table(columns["id"], columns["source"], columns["tokens"], matrix, list(scores))
    report = compare_scores(sides["proxy"], sides["target"])
    pq.write_table(report.scores, folder / "audit.parquet")
    write_json(folder / "audit.json", report.as_dict())


def run_json(pool: Path, rows: int, tasks: tuple[str, ...], without: tuple[str, ...]) -> dict[str, Any]:
    stages = {
        "data": (1.2, 73_000, 0.0, 310_000_000, []),
        "warmup": (48.0, 9_000, 9.1e11, 1_900_000_000, []),
        "compress": (4.2, 12_000, 1.3e11, 900_000_000, ["2 layers needed a larger ridge <i>to be</i> invertible."]),
        "align": (21.4, 16_000, 2.4e11, 2_100_000_000, []),
        "audit": (9.9, 60_000, 1.1e12, 1_500_000_000, []),
        "score": (84.6, 73_000, 3.4e12, 1_300_000_000, ["1 row has no supervised token and no score."]),
        "select": (0.05, 0, 0.0, 400_000_000, []),
        "attribute": (2.1, 3_000, 1.4e10, 700_000_000, []),
    }
    keys = ("seconds", "tokens", "flops", "peak_memory_bytes", "warnings")
    return {
        "iprox": "0.1.0",
        "command": "iprox run recipe.yaml",
        "created": "2026-11-24T09:30:00+00:00",
        "seed": 0,
        "device": "cpu",
        "dtype": "bfloat16",
        "git": None,
        "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
        "model": "models/target-17m",
        "inputs": {
            "pool": {"files": [str(pool)], "rows": rows, "fingerprint": "0f3a9c"},
            "validation": {task: {"rows": 64, "fingerprint": "77aa01"} for task in tasks},
        },
        "stages": {
            name: dict(zip(keys, values, strict=True)) | {"skipped": name == "data"}
            for name, values in stages.items()
            if name not in without
        },
        "cost": {
            "proxy_flops_per_token": 4.7e7,
            "target_flops_per_token": 9.0e7,
            "proxy_parameters": 10_000_000,
            "target_parameters": 16_900_000,
            "score_flops": 3.4e12,
            "target_score_flops": 6.6e12,
        },
    }
