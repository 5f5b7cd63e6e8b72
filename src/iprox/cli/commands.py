"""The commands: their inputs, the settings that are options, and the sections that `--set` reaches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from iprox.settings import DIMENSION, NAMED_SHARE, STAGES

# Sections and settings that every computing command reads.
COMPUTING = ("data", "seed", "dtype", "device", "batch_tokens", "trust_remote_code")
# What those read that score.
SCORING = (*COMPUTING, "loss", "dpo")


@dataclass(frozen=True, slots=True)
class Input:
    """An argument of a command that is not a setting of a recipe.

    Attributes:
        name: name of the option or positional argument.
        meaning: help text.
        type: type of the value.
        default: default value; `...` if it is required.
        positional: whether it is a positional argument.
    """

    name: str
    meaning: str
    type: Any = str
    default: Any = None
    positional: bool = False


@dataclass(frozen=True, slots=True)
class Command:
    """A command.

    Attributes:
        name: name of the command.
        summary: one line for the help.
        example: one or more command lines.
        action: function that does it, as `module:function`; imported only when it is called.
        needs: keys of required settings.
        offers: keys of settings that are options.
        inputs: other arguments.
        reads: sections and settings that `--set` reaches.
        unread: settings among these that have no effect on this command.
        resumes: whether the same command resumes after an interruption.
        renamed: option names that differ from the key, by key.
        meanings: help texts that differ from the setting's own, by key.
    """

    name: str
    summary: str
    example: str
    action: str
    needs: tuple[str, ...] = ()
    offers: tuple[str, ...] = ()
    inputs: tuple[Input, ...] = ()
    reads: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    resumes: bool = False
    renamed: tuple[tuple[str, str], ...] = ()
    meanings: tuple[tuple[str, str], ...] = ()

    def takes(self, key: str) -> bool:
        """Return whether the command reads a setting."""
        read, unread = (any(f"{key}.".startswith(f"{each}.") for each in keys) for keys in (self.reads, self.unread))
        return read and not unread

    def option(self, key: str) -> str:
        """Return the option name of a setting, without dashes."""
        return dict(self.renamed).get(key, key.rpartition(".")[2]).replace("_", "-")


_OF_A_PROXY = "the target: the model that the proxy was made from, hub id or folder"
_RECIPE = Input("recipe", "recipe file (YAML)", default=..., positional=True)
_SCORES = Input("scores", "scores.parquet or its folder", default=...)
_PROXY = Input("proxy", "proxy folder", default=...)
_TARGET = Input("target", "target of the proxy, for validation gradients (default: the one that the proxy names)")
_RATES = Input(
    "learning_rates",
    "learning rate of each model (default: from the checkpoints.json next to them)",
    list[float],
    (),
)
_FRESH = Input("fresh", "remove the results of an earlier run in the output folder", bool, False)

COMMANDS = (
    Command(
        "quickstart",
        "Run the whole pipeline on a bundled model and pool, in under two minutes on two cores.",
        "iprox quickstart --output runs/quickstart",
        "iprox.cli.actions:quickstart",
        inputs=(Input("output", "run folder", default="runs/quickstart"), _FRESH),
        reads=("*",),
        resumes=True,
    ),
    Command(
        "run",
        "Run a recipe, or resume it where it stopped.",
        "iprox run recipe.yaml --set proxy.sparsity=0.5 --stop-after score",
        "iprox.cli.actions:run",
        inputs=(_RECIPE, _FRESH, Input("stop_after", "last stage to run", Literal[STAGES])),
        reads=("*",),
        resumes=True,
    ),
    Command(
        "plan",
        "Predict the cost of a recipe by stage: tokens, FLOPs, memory, time. Runs nothing.",
        "iprox plan recipe.yaml",
        "iprox.cli.actions:plan",
        inputs=(_RECIPE, Input("tflops", "GEMM rate to assume in TFLOP/s (default: measured here)", float)),
        reads=("*",),
    ),
    Command(
        "warmup",
        "Fine-tune a model briefly on a random sample of the pool, and keep a checkpoint of each epoch.",
        "iprox warmup --model Qwen/Qwen3-4B --pool pool/*.jsonl --output warm",
        "iprox.cli.actions:warmup",
        needs=("model", "data.pool", "output"),
        offers=("warmup.fraction", "warmup.epochs", "warmup.learning_rate", "warmup.lora"),
        inputs=(
            Input("optimizer_state", "keep Adam's moments with each checkpoint, for --estimator less", bool, False),
        ),
        reads=(*COMPUTING, "warmup", "compile", "processes"),
        unread=("data.validation",),
    ),
    Command(
        "compress",
        "Derive a proxy from a model.",
        "iprox compress --model warm/checkpoint-44 --pool pool/*.jsonl --output proxy --sparsity 0.7",
        "iprox.cli.actions:compress",
        needs=("model", "data.pool", "output"),
        offers=("proxy.sparsity", "proxy.flops", "proxy.fidelity", "data.validation", "proxy.method"),
        reads=(*SCORING, "proxy", "influence"),
        unread=("proxy.align", "influence.checkpoints"),
        meanings=(
            ("data.pool", "pool that the probe for the second moments is drawn from"),
            ("data.validation", "with --fidelity: file or files per task, TASK=FILE ..."),
        ),
    ),
    Command(
        "align",
        "Tune a low-rank proxy until its logits, and its gradients if asked, match the target's.",
        "iprox align --model warm/checkpoint-44 --proxy proxy --pool pool/*.jsonl --output aligned",
        "iprox.cli.actions:align",
        needs=("model", "data.pool", "output"),
        offers=("data.validation", "proxy.align.fraction", "proxy.align.epochs", "proxy.align.gradient_weight"),
        inputs=(_PROXY,),
        reads=(*SCORING, "proxy.align", "influence", "processes"),
        unread=("influence.checkpoints",),
        resumes=True,
        meanings=(
            ("model", _OF_A_PROXY),
            ("data.pool", "pool that the examples to align on are drawn from"),
            (
                "data.validation",
                "keep the factors most faithful for these tasks: TASK=FILE ... (default: the last ones)",
            ),
        ),
    ),
    Command(
        "score",
        "Score a pool against validation tasks, on a proxy or on any causal language model.",
        "iprox score --model aligned --pool pool/*.jsonl --validation gsm8k=gsm8k.val.jsonl --output scores",
        "iprox.cli.actions:score",
        needs=("data.pool", "data.validation", "output"),
        offers=("influence.estimator",),
        inputs=(
            Input("model", "model or proxy folder; several are checkpoints, whose scores are summed", list[str], ...),
            _TARGET,
            _RATES,
        ),
        reads=(*SCORING, "influence", "compile", "ray_workers"),
        unread=("influence.checkpoints",),
        resumes=True,
    ),
    Command(
        "index",
        "Store a pool's gradients, randomly projected, to score it for later tasks without reading it again.",
        "iprox index --model aligned --pool pool/*.jsonl --output index",
        "iprox.cli.actions:index",
        needs=("model", "data.pool", "output"),
        inputs=(
            Input("dimension", "numbers per example, 2 bytes each", int, DIMENSION),
            Input(
                "estimator",
                "tracin: gradients; less: the steps of the warm-up's optimizer",
                Literal["tracin", "less"],
                "tracin",
            ),
            Input("target", "with --estimator less: target of a proxy (default: the one that the proxy names)"),
        ),
        reads=(*COMPUTING, "compile"),
        resumes=True,
    ),
    Command(
        "query",
        "Score a pool against validation tasks with its index, at the speed of the disk.",
        "iprox query --index index --validation code=code.val.jsonl --output scores",
        "iprox.cli.actions:query",
        needs=("data.validation", "output"),
        inputs=(
            Input("index", "index folder; several are checkpoints, whose scores are summed", list[str], ...),
            Input("model", "model of each index, if it has moved", list[str], ()),
            _TARGET,
            _RATES,
        ),
        reads=(*COMPUTING, "influence.normalize", "influence.query", "influence.per_example"),
        unread=("data.pool",),
    ),
    Command(
        "audit",
        "Score a sample on proxy and target, and report how faithful the proxy is.",
        "iprox audit --model warm/checkpoint-44 --proxy aligned --pool pool/*.jsonl --validation gsm8k=val.jsonl "
        "--output audit\niprox audit ... --lds 50     # do the scores predict what training does?\n"
        "iprox audit ... --removal 3  # what is the ranking worth?",
        "iprox.cli.actions:audit",
        needs=("model", "data.pool", "data.validation", "output"),
        offers=("audit.sample", "audit.lds", "audit.removal"),
        inputs=(_PROXY,),
        reads=(*SCORING, "audit", "influence"),
        unread=("influence.checkpoints",),
        meanings=(("model", _OF_A_PROXY),),
        resumes=True,
    ),
    Command(
        "refine",
        "Score a proxy's best rows again on the target; the other rows lose their scores.",
        "iprox refine --scores scores --pool pool/*.jsonl --model warm/checkpoint-44 --validation gsm8k=val.jsonl "
        "--output refined",
        "iprox.cli.actions:refine",
        needs=("model", "data.pool", "data.validation", "output"),
        offers=("refine.candidates",),
        inputs=(_SCORES,),
        reads=(*SCORING, "refine", "select.strategy", "select.task", "select.weights"),
        meanings=(("model", _OF_A_PROXY),),
        resumes=True,
    ),
    Command(
        "select",
        "Write the best rows of the pool, byte for byte, best first.",
        "iprox select --scores scores --pool pool/*.jsonl --output selected.jsonl --fraction 0.05\n"
        "iprox select --scores scores --pool pool/*.jsonl --output for-gsm8k.jsonl --count 10000 --task gsm8k",
        "iprox.cli.actions:select",
        needs=("data.pool", "output"),
        offers=("select.fraction", "select.count", "select.tokens", "select.strategy", "select.task"),
        inputs=(_SCORES,),
        reads=("data", "select"),
        unread=("data.validation",),
        meanings=(("output", "file to write, *.jsonl"), ("data.pool", "the pool that was scored")),
    ),
    Command(
        "finetune",
        "Fine-tune a model on a selection, and measure the loss on test sets before and after.",
        "iprox finetune --model Qwen/Qwen3-4B --selection selected.jsonl --output tuned --test gsm8k=gsm8k.test.jsonl",
        "iprox.cli.actions:finetune",
        needs=("model", "data.pool", "output"),
        offers=("finetune.test", "finetune.epochs", "finetune.learning_rate", "finetune.lora"),
        reads=(*COMPUTING, "finetune", "compile", "processes"),
        renamed=(("data.pool", "selection"),),
        meanings=(
            ("data.pool", "files of the examples to train on"),
            ("output", "folder; the model is in its subfolder model"),
        ),
    ),
    Command(
        "compare",
        "Compare how several scores rank the same pool, each with the first: of proxies, estimators, seeds or runs.",
        "iprox compare runs/target runs/ipsvd runs/sibling\n"
        "iprox compare target=a/scores.parquet proxy=b/scores.parquet --share 0.1",
        "iprox.cli.compare:compare",
        inputs=(
            Input(
                "scores",
                "[NAME=]SCORES ...: scores.parquet or a folder that holds it; the first is the reference",
                list[str],
                ...,
                positional=True,
            ),
            Input("share", "fraction of rows counted as the top", float, NAMED_SHARE),
        ),
    ),
    Command(
        "report",
        "Write the report.html of a run folder again.",
        "iprox report runs/quickstart",
        "iprox.cli.actions:report",
        inputs=(Input("run_dir", "run folder", default=..., positional=True),),
    ),
    Command(
        "push",
        "Push a proxy, the selection of a run with its report, or a report alone to the Hugging Face Hub.",
        "iprox push runs/qwen3-4b me/math-selection      # dataset with a card, and the report\n"
        "iprox push selected.jsonl me/math-selection     # a selection of iprox select\n"
        "iprox push runs/qwen3-4b/proxy me/qwen3-4b-proxy\n"
        "iprox push runs/qwen3-4b/report.html me/report  # a static Space",
        "iprox.cli.actions:push",
        inputs=(
            Input("source", "proxy or run folder, selection (*.jsonl) or report.html", default=..., positional=True),
            Input("repo", "repository, user/name; made if missing", default=..., positional=True),
            Input("public", "make a new repository public (default: private)", bool, False),
        ),
    ),
    Command(
        "export",
        "Write a proxy as a dense checkpoint that loads without iprox.",
        "iprox export runs/quickstart/aligned --output dense-proxy",
        "iprox.cli.actions:export",
        inputs=(
            Input("source", "proxy folder", default=..., positional=True),
            Input("output", "folder for the dense checkpoint", default=...),
        ),
        reads=("dtype", "device"),
    ),
)
