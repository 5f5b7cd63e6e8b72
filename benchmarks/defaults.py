"""Which score and strategy select the data that trains best? The table that the defaults are chosen from.

For every task and seed the target is warmed up, a pool is scored once by TracIn and by EK-FAC against every validation
example, and each row of the table selects 5 % of the pool from these scores in its own way. The original target is
then fine-tuned on the selection and tested. Next to them: random rows, RDS+, BM25 and random rows of the source that a
task has of its own.

    python benchmarks/defaults.py                                  # target-17m, 8 tasks, 2 seeds
    python benchmarks/defaults.py --selected                       # what each row selects; trains nothing
    python benchmarks/defaults.py --preset smollm2                 # SmolLM2-135M-Instruct (benchmarks/models.py), LoRA
    python benchmarks/defaults.py --preset gemma                   # Gemma 3 270M, a small pool
    python benchmarks/defaults.py --preset smollm2 --only random 'EK-FAC, cosine, turns'

Finished cells are kept in `--output`, one line each, and are not computed again; a stopped benchmark continues.

How the rows are computed. One pass gives S[z, v] = ⟨G(z), G(v)⟩ of mean token losses for every candidate z and
validation example v, whole gradients on the target itself, and ‖G(z)‖. A candidate of n supervised tokens then has, as
TracIn of the mean loss, the mean of S over v; of the summed loss, n Σ_v n_v S; as a cosine, the mean over v divided by
‖G(z)‖. With `turns` each v is a column of its own and the validation examples take turns to choose. With `blend`, which
is iprox's default, they choose by the sum of their own cosine and the one with the mean, both standardized. EK-FAC
replaces G(v) by (F + λI)⁻¹ G(v). `benchmarks/tried.py` says what LESS, linearized Adam and EK-FAC + CG are. *depth d*
scores candidates by iprox's own engine on a proxy with gradients of the upper fraction d of the layers; *refined*
scores three times as many rows as are selected again on the target, and selects among these.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import iprox
from iprox.data import Batch, Encoded, Example, Pool, iter_batches
from iprox.data.sampling import draw_rows
from iprox.finetune import evaluate, train
from iprox.influence.baselines import Corpus
from iprox.influence.estimators.base import Inputs
from iprox.influence.estimators.registry import REGISTRY
from iprox.influence.gradients import squared_norms
from iprox.influence.job import Checkpoint, Job
from iprox.influence.shared_basis import SharedQueries, shared_queries
from iprox.influence.validation_gradients import example_gradients, mean_gradient
from iprox.kronecker.eigen import kronecker_curvature
from iprox.kronecker.kept import KeptCurvature, is_kept, keep_curvature
from iprox.models.adapters import with_lora
from iprox.models.layers import has_bias, influence_layers
from iprox.models.loss import causal_lm_losses
from iprox.models.observe import frozen, watched_backward
from iprox.models.optimizer_state import AdamState, load_adam_state
from iprox.records import key_of, read_json
from iprox.run.folder import environment
from iprox.scores import example_matrix, score_matrix
from iprox.selection.strategies import Turns, blended, top
from iprox.session import Session
from iprox.settings import InfluenceSection, WarmupSection
from iprox.stages.training import warm_up
from tried import AdamNorms, refined, scaled, slopes, whole

SHARED = Path(__file__).resolve().parents[2] / "shared"
MODELS = Path(__file__).resolve().parents[2] / "models"
RESULTS = Path(__file__).parent / "results"
POOL = str(SHARED / "data/pool.jsonl")

# The source of the pool that a task has of its own; bbh has none.
OWN = {"code": "codealpaca", "bbh": None}
# Tasks that have no files of their own, and are cut from the pool's source of that name.
CUT = ("commonsenseqa", "strategyqa")
ESTIMATORS = ("TracIn", "EK-FAC")
# In the order they are computed.
ROWS = (
    *("random", "EK-FAC, cosine, blend"),
    *(f"{estimator}, cosine, {strategy}" for strategy in ("turns", "top") for estimator in ("EK-FAC", "TracIn")),
    *("RDS+", "BM25", "own source"),
    *(f"{estimator}, {score}, top" for score in ("mean", "sum") for estimator in ("TracIn", "EK-FAC")),
    *(f"{estimator}, {score}, turns" for score in ("sum", "mean") for estimator in ("EK-FAC", "TracIn")),
    *("LESS, cosine, turns", "linearized Adam, cosine, turns", "EK-FAC + CG, cosine, top"),
    *(f"EK-FAC, cosine, blend, {proxy}" for proxy in ("depth 0.33", "depth 0.1, refined", "depth 0.1")),
)
# Damping as a share of the mean eigenvalue, as in `iprox.score`, and the share of the validation gradients' norms that
# the bases which they share keep.
DAMPING, KEEP = 0.1, 0.9
# What a refined row scores again on the target, as a multiple of what it selects.
AGAIN = 3
# Tasks whose queries are in memory at once.
GROUP = 4
# Examples of the Gauss-Newton matrix that conjugate gradients solve with, and how many products.
CG_SAMPLE, CG_ITERATIONS = 32, 10


@dataclass(frozen=True)
class Preset:
    """What is trained, on which pool, and how long."""

    model: Path
    tasks: tuple[str, ...]
    rows: int
    validation: int
    tests: int
    seeds: int
    learning_rate: float
    lora: int | None
    epochs: int = 2
    batch_size: int = 8
    warmup: int = 500
    curvature: int = 256


PRESETS = {
    "target-17m": Preset(
        model=SHARED / "models/target-17m",
        tasks=("gsm8k", "code", "summarization", "science", "sentiment", "bbh", *CUT),
        rows=1500,
        validation=24,
        tests=150,
        seeds=2,
        learning_rate=0.1 / 384,
        lora=None,
    ),
    "smollm2": Preset(
        model=MODELS / "smollm2-135m-instruct",
        tasks=("gsm8k", "code", "science", "commonsenseqa"),
        rows=1500,
        validation=16,
        tests=80,
        seeds=1,
        learning_rate=1 / 576,
        lora=16,
        warmup=0,  # it knows chat
        curvature=128,
    ),
    "gemma": Preset(
        model=MODELS / "gemma3-270m",
        tasks=("gsm8k", "science"),
        rows=400,
        validation=12,
        tests=60,
        seeds=1,
        learning_rate=1 / 640,
        lora=16,
        warmup=100,  # a base model
        curvature=64,
    ),
}


def main() -> None:
    """Compute what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="target-17m")
    parser.add_argument("--only", nargs="+", help="rows of the table to compute, by name")
    parser.add_argument("--tasks", nargs="+", help="tasks to compute")
    parser.add_argument("--seeds", type=int, nargs="+", help="which seeds to compute")
    parser.add_argument("--work", type=Path, default=Path("runs/defaults"))
    parser.add_argument("--output", type=Path, help="results file; default results/defaults-PRESET.jsonl")
    parser.add_argument(
        "--selected", action="store_true", help="train nothing; print what each row selects: own source, median length"
    )
    arguments = parser.parse_args()
    preset = PRESETS[arguments.preset]
    output = arguments.output or RESULTS / f"defaults-{arguments.preset}.jsonl"
    chosen = [name for name in ROWS if not arguments.only or name in arguments.only]
    tasks = [task for task in preset.tasks if not arguments.tasks or task in arguments.tasks]
    bench = Bench(arguments.preset, preset, arguments.work / arguments.preset, Cells(output))
    bench.adam = preset.warmup > 0 and any("LESS" in name or "Adam" in name for name in chosen)
    for seed in arguments.seeds or range(preset.seeds):
        if arguments.selected:
            print_selected(
                bench, seed, tasks, [name for name in chosen if name.startswith(ESTIMATORS) and "CG" not in name]
            )
            continue
        for name in chosen:
            for task in tasks:
                bench.cell(name, task, seed)
    if not arguments.selected:
        print_table(bench.cells, preset)


class Cells:
    """Results, one JSON object per line: row, task, seed, metrics, and the revision that made them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.is_file() else []
        self.known = {(c["row"], c["task"], c["seed"]): c for c in map(json.loads, lines)}

    def add(self, row: str, task: str, seed: int, **metrics: object) -> None:
        """Keep one cell."""
        cell = {"row": row, "task": task, "seed": seed, **metrics, "revision": revision()}
        self.known[row, task, seed] = cell
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(cell) + "\n")


def revision() -> str:
    """The commit of this checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


class Bench:
    """One target, its pool and tasks."""

    def __init__(self, name: str, preset: Preset, work: Path, cells: Cells) -> None:
        self.name, self.preset, self.work, self.cells = name, preset, work, cells
        self.session = Session.create(max_length=512)
        pool, held = list(Pool([POOL])), {}
        used: set[int] = set()
        for task in CUT:
            of_source = [row for row, example in enumerate(pool) if example.source == task]
            rows = [of_source[i] for i in draw_rows(task, 0, len(of_source), preset.validation + preset.tests)]
            held[task] = [pool[row] for row in rows]
            used |= set(rows)
        rest = [row for row in range(len(pool)) if row not in used]
        self.pool = [pool[rest[i]] for i in draw_rows("pool", 0, len(rest), preset.rows)]
        self.validation, self.tests = {}, {}
        for task in preset.tasks:
            if task in CUT:
                self.validation[task] = held[task][: preset.validation]
                self.tests[task] = held[task][preset.validation :]
            else:
                self.validation[task] = spread(examples_in(f"{task}.val.jsonl"), preset.validation)
                self.tests[task] = spread(examples_in(f"{task}.test.jsonl"), preset.tests)
        encoder = self.session.encoder(str(preset.model))
        self.encoder = encoder
        self.encoded = encoder.encode(self.pool)
        self.encoded_validation = {task: encoder.encode(rows) for task, rows in self.validation.items()}
        self.encoded_tests = {task: encoder.encode(rows) for task, rows in self.tests.items()}
        self.tokens = np.array([example.supervised for example in self.encoded])
        self.source = np.array([example.source for example in self.pool])
        self.adam = False  # whether scores by Adam's steps are wanted, which take as long as all others together
        self._scores: dict[int, dict[str, np.ndarray]] = {}

    def warmed(self, seed: int) -> str:
        """The checkpoint that scores are taken at."""
        if not self.preset.warmup:
            return str(self.preset.model)
        folder = self.work / f"warmup-{seed}"
        if not (folder / "checkpoints.json").is_file():
            session = Session.create(max_length=512, seed=seed)
            rows = draw_rows("warmup", seed, len(self.pool), self.preset.warmup)
            hidden = self.session.model(self.preset.model).config.hidden_size
            settings = WarmupSection(epochs=2, learning_rate=0.1 / hidden)  # pyright: ignore[reportCallIssue]
            examples = [self.pool[row] for row in rows]
            warm_up(session, str(self.preset.model), examples, folder, settings, optimizer_state=True)
        return str(folder / read_json(folder / "checkpoints.json")[-1]["path"])

    def scored(self, seed: int) -> dict[str, np.ndarray]:
        """S by estimator and task [N, V], norms [N], and the baselines' scores by task [N, V]."""
        if seed not in self._scores:
            file = self.work / f"scores-{seed}{self.adam * '-adam'}.npz"
            if not file.is_file():
                file.parent.mkdir(parents=True, exist_ok=True)
                np.savez(file, **self._score(seed))
            with np.load(file) as known:
                self._scores[seed] = dict(known)
        return self._scores[seed]

    def _score(self, seed: int) -> dict[str, np.ndarray]:
        started = time.time()
        model = self.session.model(self.warmed(seed))
        layers = influence_layers(model)
        adam = load_adam_state(self.warmed(seed)) if self.adam else None
        part = self.work / f"scores-{seed}{self.adam * '-adam'}.part.npz"  # what an interrupted run has kept
        found = dict(np.load(part)) if part.is_file() else {}
        tasks = [task for task in self.encoded_validation if f"TracIn/{task}" not in found]
        bases = None
        if tasks:
            bases = self.curvature(model, seed)
            print(f"curvature: {time.time() - started:.0f} s", flush=True)
        for some in (tasks[start : start + GROUP] for start in range(0, len(tasks), GROUP)):
            queries = {}
            for task in some:
                examples = list(example_gradients(model, self.batches(self.encoded_validation[task])))
                made_of = {"TracIn": (examples, None), "EK-FAC": (examples, bases)}
                if adam is not None:
                    by = slopes(adam)
                    made_of["linearized Adam"] = ([scaled(example, by) for example in examples], None)
                for name, (gradients, curvature) in made_of.items():
                    made = shared_queries(gradients, KEEP, curvature, DAMPING, self.session.dtype)
                    queries[f"{name}/{task}"] = made
                    kept = f"kept {made.kept.min():.3f} to {made.kept.max():.3f}"
                    print(f"{name}, {task}: {time.time() - started:.0f} s, {kept}", flush=True)
                del examples, made_of
            found |= contracted(model, layers, self.encoded, queries, adam)
            np.savez(part, **found)
            del queries
        del bases
        print(f"candidates: {time.time() - started:.0f} s", flush=True)
        validation = {task: list(self.batches(rows)) for task, rows in self.encoded_validation.items()}
        rds, bm25 = (
            REGISTRY[name].scorer(
                Inputs(
                    settings=InfluenceSection(estimator=name, per_example=True),
                    model=model,
                    validation=validation,
                    corpus=Corpus.of(self.encoded),
                )
            )
            for name in ("rds", "bm25")
        )
        for name, scorer in (("RDS+", rds), ("BM25", bm25)):
            table = np.zeros((len(self.encoded), sum(scorer.widths)))
            for batch in self.batches(self.encoded):
                table[batch.indices] = scorer(batch)[0].numpy()
            edges = np.cumsum([0, *scorer.widths])
            for task, start, end in zip(scorer.tasks, edges, edges[1:], strict=False):
                found[f"{name}/{task}"] = table[:, start:end]
        found["seconds"] = np.array(time.time() - started)
        return found

    def curvature(self, model: torch.nn.Module, seed: int) -> KeptCurvature:
        """EK-FAC's curvature of the warmed model, which is measured once."""
        folder = self.work / f"curvature-{seed}"
        if not is_kept(folder):
            rows = draw_rows("curvature", seed, len(self.encoded), self.preset.curvature)
            sample = self.batches([self.encoded[row] for row in rows])
            keep_curvature(kronecker_curvature(model, influence_layers(model), sample, seed=seed), folder)
        return KeptCurvature(folder, next(model.parameters()).device)

    def on_proxy(self, depth: float, seed: int, rows: list[int] | None = None) -> dict[str, np.ndarray]:
        """Cosines of some rows by task, [N, 1 + V]: with the mean validation gradient, and with each example's.

        At depth 1 they are the target's own.
        """
        file = self.work / f"depth-{depth:g}-{key_of(rows)[:8]}-{seed}.npz"
        if not file.is_file():
            model, found = self.session.model(self.warmed(seed)), {}
            self.curvature(model, seed)
            checkpoint = Checkpoint(model, curvature=self.work / f"curvature-{seed}")
            if depth < 1:
                proxy = iprox.compress(model, method="target", depth=depth, progress=False)
                checkpoint = Checkpoint(proxy, 1.0, model, curvature=checkpoint.curvature)
            settings = InfluenceSection(estimator="ekfac", normalize="cosine", per_example=True)
            names = list(self.encoded_validation)
            for some in (names[start : start + GROUP] for start in range(0, len(names), GROUP)):
                validation = {task: self.encoded_validation[task] for task in some}
                job = Job.of(
                    settings,
                    [checkpoint],
                    validation,
                    self.encoder,
                    Pool([POOL]),
                    batch_tokens=self.session.batch_tokens,
                )
                table, _ = job.worker()([self.pool[row] for row in rows or range(len(self.pool))])
                for number, task in enumerate(some):
                    found[task] = np.hstack([score_matrix(table)[:, [number]], example_matrix(table, task)])
            np.savez(file, **found)
        with np.load(file) as known:
            return dict(known)

    def through_proxy(self, depth: float, again: bool, task: str, seed: int, count: int) -> list[int]:
        """Rows that a proxy selects, or of which it selects the candidates that the target scores again."""
        scores = self.on_proxy(depth, seed)
        if not again:
            return in_blend(scores[task], count)
        candidates = {name: in_blend(found, AGAIN * count) for name, found in scores.items()}
        rows = sorted(set().union(*candidates.values()))
        place = {row: number for number, row in enumerate(rows)}
        exact = self.on_proxy(1, seed, rows)[task][[place[row] for row in candidates[task]]]
        return [candidates[task][best] for best in in_blend(exact, count)]

    def refined(self, task: str, seed: int) -> np.ndarray:
        """Cosines [N] with the mean validation gradient that conjugate gradients divided by the curvature."""
        file = self.work / f"cg-{seed}-{task}.npz"
        if not file.is_file():
            model = self.session.model(self.warmed(seed), torch.float32)
            model.set_attn_implementation("eager")  # it has a forward derivative
            layers = influence_layers(model)
            bases = dict(self.curvature(model, seed))
            rows = draw_rows("curvature", seed, len(self.encoded), self.preset.curvature)[:CG_SAMPLE]
            sample = self.batches([self.encoded[row] for row in rows])
            mean = mean_gradient(model, self.batches(self.encoded_validation[task]))
            gradient = {name: part.weight for name, part in mean.items()}
            solved, residuals = refined(model, sample, gradient, bases, DAMPING, CG_ITERATIONS)
            print(f"residuals of CG, {task}: {' '.join(f'{value:.3g}' for value in residuals)}", flush=True)
            query = shared_queries([{name: whole(part) for name, part in solved.items()}], KEEP)
            found = contracted(model, layers, self.encoded, {"CG": query})
            np.savez(file, scores=found["CG"][:, 0] / found["norms"], residuals=residuals)
        return np.load(file)["scores"]

    def batches(self, encoded: list[Encoded]) -> list[Batch]:
        """Length-sorted batches."""
        return list(iter_batches(encoded, self.session.batch_tokens))

    def selection(self, row: str, task: str, seed: int) -> list[int]:
        """The rows of the pool that a row of the table selects."""
        count = round(0.05 * len(self.pool))
        if row == "random":
            return draw_rows("random", seed, len(self.pool), count)
        if row == "own source":
            own = np.flatnonzero(self.source == OWN.get(task, task))
            return own[draw_rows(f"own/{task}", seed, len(own), count)].tolist()
        if row.startswith("EK-FAC + CG"):
            return top(self.refined(task, seed), count).tolist()
        if "depth" in row:
            depth = float(row.split("depth ")[1].split(",")[0])
            return self.through_proxy(depth, row.endswith("refined"), task, seed, count)
        known = self.scored(seed)
        if row in ("RDS+", "BM25"):
            return in_turns(known[f"{row}/{task}"], count)
        estimator, score, strategy = row.split(", ")
        matrix, n = known[f"{estimator}/{task}"], np.maximum(self.tokens, 1)
        n_v = np.array([example.supervised for example in self.encoded_validation[task]])
        norms = known.get(f"norms, {estimator}", known["norms"])
        if strategy == "blend":
            return in_blend(np.hstack([matrix.mean(1, keepdims=True), matrix]) / norms[:, None], count)
        if strategy == "turns":
            scale = {"mean": 1.0, "sum": n, "cosine": 1 / norms}[score]
            return in_turns(matrix * np.reshape(scale, (-1, 1)), count)
        column = {"mean": matrix.mean(1), "sum": n * (matrix @ n_v), "cosine": matrix.mean(1) / norms}[score]
        return top(column, count).tolist()

    def cell(self, row: str, task: str, seed: int) -> None:
        """Fine-tune on one selection and test, unless it is known."""
        if (row, task, seed) in self.cells.known or (row == "own source" and OWN.get(task, task) is None):
            return
        rows = self.selection(row, task, seed)
        tasks = list(self.tests) if row == "random" else [task]
        started, here = time.time(), environment()
        tested = self.trained(rows, tasks, seed)
        own = OWN.get(task, task)
        for each, metrics in tested.items():
            self.cells.add(
                row,
                each,
                seed,
                loss=metrics["loss"],
                token_loss=metrics["token_loss"],
                exact_match=metrics["exact_match"],
                rows=len(rows),
                own_source=None if own is None else float((self.source[rows] == own).mean()),
                supervised_median=float(np.median(self.tokens[rows])),
                supervised_sum=int(self.tokens[rows].sum()),
                seconds=time.time() - started,
                machine={"machine": here["machine"], "torch": here["versions"]["torch"]},
            )
        first = tested[task]
        print(f"{self.name} {row} {task} {seed}: {first['loss']:.4f} ({time.time() - started:.0f} s)", flush=True)

    def trained(self, rows: list[int], tasks: list[str], seed: int) -> dict[str, dict[str, float]]:
        """Test metrics of the original target after fine-tuning on some rows."""
        preset, folder = self.preset, self.work / f"model-{seed}"
        target = self.session.model(str(preset.model), torch.float32, fused=True)
        model = with_lora(target, str(preset.model), preset.lora, seed) if preset.lora else target
        settings = {"epochs": preset.epochs, "learning_rate": preset.learning_rate, "batch_size": preset.batch_size}
        train(
            model,
            self.encoder.tokenizer,
            [self.encoded[row] for row in rows],
            folder,
            bf16=self.session.dtype == torch.bfloat16,
            every_epoch=False,
            seed=seed,
            compile_model=False,
            **settings,
        )
        last = newest_checkpoint(folder)
        final = self.session.model(str(last))
        return {task: evaluate(final, self.encoded_tests[task], 4096) for task in tasks}


def in_turns(scores: np.ndarray, count: int) -> list[int]:
    """The rows that the columns of scores [N, V] choose in turns."""
    return Turns(lambda: iter([scores]), [1.0] * scores.shape[1], np.ones(len(scores), bool))(count).tolist()


def in_blend(cosines: np.ndarray, count: int) -> list[int]:
    """The rows that validation examples choose in turns by their own cosine and the mean's, which is the first."""
    own, mean = cosines[:, 1:], cosines[:, :1]
    return in_turns(*blended(lambda: iter([own]), mean, [own.shape[1]])(), count)


def newest_checkpoint(folder: Path) -> Path:
    """The newest checkpoint of a training."""
    return max(folder.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)


def contracted(
    model: torch.nn.Module,
    layers: dict[str, torch.nn.Module],
    encoded: list[Encoded],
    queries: dict[str, SharedQueries],
    adam: AdamState | None = None,
) -> dict[str, np.ndarray]:
    """Norms of candidates' gradients [N], and ⟨G(z), G(v)⟩ by estimator and task [N, V]; with Adam's state, LESS."""
    total = {name: np.zeros((len(encoded), len(query.norms))) for name, query in queries.items()}
    norms = np.zeros(len(encoded))
    plain = {name.replace("TracIn", "LESS"): query for name, query in queries.items() if name.startswith("TracIn")}
    less = AdamNorms(adam, plain, len(encoded)) if adam is not None else None
    with frozen(model):
        for batch in iter_batches(encoded, 4096):
            scores = {name: torch.zeros(len(batch.indices), matrix.shape[1]) for name, matrix in total.items()}
            squares = torch.zeros(len(batch.indices), dtype=torch.float64)

            def sink(name: str, h: torch.Tensor, delta: torch.Tensor, batch=batch, scores=scores, squares=squares):
                squares.add_(squared_norms(h, delta, has_bias(layers[name])).double())
                if less is not None:
                    less.add(name, h, delta, batch.indices)
                for estimator, query in queries.items():
                    if name in query.layers:
                        scores[estimator] += query.layers[name].contract(h, delta)

            watched_backward(model, layers, lambda batch=batch: causal_lm_losses(model, batch), sink)
            print(".", end="", flush=True)
            for estimator, matrix in scores.items():
                total[estimator][batch.indices] = matrix.numpy()
            norms[batch.indices] = squares.sqrt().numpy()
    found = {"norms": norms, **total}
    if less is not None:
        found |= {name: matrix.numpy() for name, matrix in less.scores.items()}
        found |= {"norms, LESS": less.adam.sqrt().numpy(), "norms, linearized Adam": less.linear.sqrt().numpy()}
    return found


def examples_in(name: str) -> list[Example]:
    """The examples of one of the shared files."""
    return list(Pool([str(SHARED / "data/targets" / name)]))


def spread(examples: list[Example], count: int) -> list[Example]:
    """So many examples, evenly spread over a file."""
    return [examples[int(i)] for i in np.linspace(0, len(examples) - 1, min(count, len(examples)))]


def print_selected(bench: Bench, seed: int, tasks: list[str], names: list[str]) -> None:
    """Share of each selection that is of the task's own source, and its median of supervised tokens."""
    print(f"pool: median of {np.median(bench.tokens):.0f} supervised tokens")
    for task, rows in bench.encoded_validation.items():
        print(f"validation, {task}: {np.median([row.supervised for row in rows]):.0f}")
    for row in names:
        line = f"{row:<28}"
        for task in tasks:
            own = OWN.get(task, task)
            if row == "own source" and own is None:
                line += f"{'-':>15}"
                continue
            chosen = bench.selection(row, task, seed)
            share = "" if own is None else f"{(bench.source[chosen] == own).mean():.2f} "
            line += f"{share + f'({np.median(bench.tokens[chosen]):.0f})':>15}"
        print(line)


def print_table(cells: Cells, preset: Preset) -> None:
    """Test loss by row and task, mean over seeds."""
    rows = list(dict.fromkeys(row for row, _, _ in cells.known))
    print(f"{'':<28}" + "".join(f"{task:>15}" for task in preset.tasks) + f"{'mean':>10}")
    for row in rows:
        line, means = f"{row:<28}", []
        for task in preset.tasks:
            known = [c["loss"] for (r, t, _), c in cells.known.items() if (r, t) == (row, task)]
            line += f"{np.mean(known):>15.3f}" if known else f"{'-':>15}"
            means += [np.mean(known)] if known else []
        print(line + (f"{np.mean(means):>10.3f}" if len(means) == len(preset.tasks) else f"{'':>10}"))


if __name__ == "__main__":
    main()
