"""The session of a command: device, dtype, batches, how to read examples, and where to report."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from iprox.data import Batch, ChatEncoder, Encoded, Example, Overlap, Pool, PoolSummary, iter_batches, on_device
from iprox.data.batching import batch_tokens_for
from iprox.distributed import rank, started
from iprox.errors import InputError, one_line
from iprox.metering import Usage, metered
from iprox.models.adapters import adapter_base
from iprox.models.cpu.threads import limit_threads
from iprox.models.loading import checkpoint_fingerprint, load_config, load_model, load_tokenizer, skeleton
from iprox.models.loss import LossFn, causal_lm_losses
from iprox.models.precision import out_of_memory, resolve_device, resolve_dtype
from iprox.models.preference import DpoLoss
from iprox.models.saving import CHECKPOINTS
from iprox.models.suitability import ModelLimits
from iprox.progress import Reporter
from iprox.settings import DpoSection, Settings
from iprox.tracking import Tracker

# Smallest sample for moments, alignment and fidelity, if the pool is large enough.
AT_LEAST = 64

# Largest default number of tokenizing processes; one tokenizes some ten thousand examples per second.
MOST_AHEAD = 4


@dataclass(slots=True)
class Session:
    """How a command computes.

    Attributes:
        device: device to compute on.
        dtype: dtype of products; sums are float32 or better.
        batch_tokens: largest rows × longest row of a batch.
        max_length: longest example in tokens.
        seed: seed of every draw and order.
        compile: whether to compile models; `auto` does where it saves time.
        trust_remote_code: whether a model's own code may run.
        chat_template: replacement for the tokenizer's own template.
        skip_refused: whether rows that the chat template refuses get no score rather than stop the run.
        dpo: settings of the loss of preference pairs, if rows are pairs.
        num_proc: processes that tokenize ahead of scoring; 0 tokenizes in this process.
        processes: processes that train together; `auto` is one per GPU.
        reporter: reporter for progress and warnings.
        tracker: tracker that numbers are logged to.
    """

    device: torch.device
    dtype: torch.dtype
    batch_tokens: int
    max_length: int = 2048
    seed: int = 0
    compile: Literal["auto"] | bool = "auto"
    trust_remote_code: bool = False
    chat_template: str | None = None
    skip_refused: bool = False
    dpo: DpoSection | None = None
    num_proc: int = 0
    processes: Literal["auto"] | int = 1
    reporter: Reporter = field(default_factory=Reporter)
    tracker: Tracker = field(default_factory=lambda: Tracker("none", Path(), {}))

    @classmethod
    def create(
        cls,
        device: str = "auto",
        dtype: str = "auto",
        batch_tokens: int | Literal["auto"] = "auto",
        **settings: object,
    ) -> Session:
        """Create a session, resolving `auto` for this machine.

        Raises:
            InputError: the device is not available, or this is not the first of several processes.
        """
        if rank() > 0:  # the command line does not come here
            raise InputError(
                "only commands that train can be started by torchrun or accelerate launch; start one process"
            )
        try:
            where = resolve_device(device)
            limit_threads()
            torch.empty(0, device=where)
        except (RuntimeError, AssertionError) as error:
            raise InputError(f"device {device}: not usable here ({one_line(error)}); try --set device=cpu") from error
        # On a CPU all cores run the model. An accelerator leaves them free, and is faster than one tokenizing process.
        ahead = 0 if where.type == "cpu" else min(MOST_AHEAD, (os.cpu_count() or 1) - 1)
        size = batch_tokens_for(where, batch_tokens)
        return cls(where, resolve_dtype(dtype, where), size, **{"num_proc": ahead, **settings})  # pyright: ignore[reportArgumentType]

    @classmethod
    def of(cls, settings: Settings, reporter: Reporter) -> Session:
        """Return the session for a command's settings."""
        data = settings.data
        return cls.create(
            settings.device,
            settings.dtype,
            batch_tokens=settings.batch_tokens,
            max_length=data.max_length,
            seed=settings.seed,
            compile=settings.compile,
            trust_remote_code=settings.trust_remote_code,
            chat_template=data.chat_template,
            skip_refused=data.on_bad_row == "skip",
            dpo=settings.dpo if settings.loss == "dpo" else None,
            processes=settings.processes,
            reporter=reporter,
            **({} if data.num_proc is None else {"num_proc": data.num_proc}),
        )

    @contextmanager
    def metered(self) -> Iterator[Usage]:
        """Measure the block, and turn running out of memory into an error that says what to change."""
        try:
            with metered(self.device) as usage, self.own_warnings():
                yield usage
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            raise InputError(
                f"not enough memory on {self.device} ({one_line(error)}); --set batch_tokens="
                f"{max(1, self.batch_tokens // 2)} halves the memory of a batch (now {self.batch_tokens}); training "
                "needs less with a smaller batch_size (and accumulate) or lora; iprox plan shows what each stage needs"
            ) from error

    @contextmanager
    def own_warnings(self) -> Iterator[None]:
        """Report iprox's own warnings inside the block, for `run.json`; show those of other packages as usual."""
        with warnings.catch_warnings():
            show = warnings.showwarning

            def report(message: Warning | str, category: type[Warning], filename: str, *rest: Any) -> None:
                if Path(filename).is_relative_to(Path(__file__).parent):
                    self.reporter.warn(str(message))
                else:
                    show(message, category, filename, *rest)

            warnings.showwarning = report
            yield

    def read(self, pool: Pool, judged_by: Mapping[str, Pool] = MappingProxyType({})) -> PoolSummary:
        """Check and count a pool, with progress.

        Warns about rows that are also in one of the sets `judged_by`, and about named columns that no row has.

        Raises:
            InputError: the pool and one of these sets share a file.
        """
        refuse_shared_files(pool, judged_by)
        with self.own_warnings():
            for source in judged_by.values():
                source.scan()  # reports all bad rows, not only the first
            overlap = Overlap(judged_by)
        with self.own_warnings(), self.reporter.bar("read", None, "rows") as progress:
            summary = pool.scan(progress, overlap.look if judged_by else None)
        missing = [
            own for own in pool.columns.missing if all(own in each.columns.missing for each in judged_by.values())
        ]
        if missing:
            self.reporter.warn(f"{pool.name}: {pool.columns.why_missing(missing[0])}")
        for warning in overlap.warnings():
            self.reporter.warn(warning)
        return summary

    def together(self, batch_size: int, *, alone: bool = False) -> AbstractContextManager[int]:
        """Start the processes that train batches of a size together, inside the block; yields their number.

        Without an explicit number, it is 1 if `alone`, and otherwise such that all have as many examples of a batch.

        Raises:
            InputError: they cannot share a batch equally.
        """
        whole = self.device.type == "cuda" and self.device.index is None
        most = torch.cuda.device_count() if whole and not alone else 1
        fitting = max(count for count in range(1, most + 1) if batch_size % count == 0)
        return started(fitting if self.processes == "auto" else self.processes, batch_size, self.device)

    def model(self, path: str | Path, dtype: torch.dtype | None = None, *, fused: bool = False) -> PreTrainedModel:
        """Load a model or proxy on the session's device, in the session's dtype by default (see `load_model`)."""
        self.note_adapter(path)
        return self.load(path, dtype=dtype or self.dtype, fused=fused)

    def note_adapter(self, path: str | Path) -> None:
        """Warn that a model is a PEFT adapter, which is merged into its base model, unless iprox trained it."""
        base = adapter_base(path)
        if base is not None and not (Path(path).parent / CHECKPOINTS).is_file():
            self.reporter.warn(f"{path} is a PEFT adapter; it is merged into {base} first")

    @property
    def load(self) -> functools.partial[PreTrainedModel]:
        """A function that loads models and can be sent to other processes; it does not call `note_adapter`."""
        return functools.partial(
            load_model, dtype=self.dtype, device=self.device, trust_remote_code=self.trust_remote_code
        )

    def loss_fn(self) -> LossFn:
        """Return the losses that are scored; loads the reference model of preference pairs, if there is one."""
        if self.dpo is None:
            return causal_lm_losses
        reference = None if self.dpo.reference is None else self.model(self.dpo.reference)
        return DpoLoss(reference, self.dpo.beta)

    def loss_identity(self) -> dict[str, Any]:
        """Return what scores depend on if rows are pairs, for keys and metadata; {} if they are not."""
        if self.dpo is None:
            return {}
        reference = self.dpo.reference and checkpoint_fingerprint(self.dpo.reference)
        return {"loss": "dpo", "beta": self.dpo.beta, "reference": reference}

    def skeleton(self, path: str) -> PreTrainedModel:
        """Return a model without weights, to count costs; experts are split, so that they are counted."""
        return skeleton(path, trust_remote_code=self.trust_remote_code)

    def tokenizer(self, path: str | Path) -> PreTrainedTokenizerBase:
        """Load the tokenizer of a model; without a pad token it pads with the EOS token."""
        tokenizer = load_tokenizer(path, trust_remote_code=self.trust_remote_code)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def encoder(self, model: str | Path, *others: str | Path) -> ChatEncoder:
        """Return the encoder of a model, for examples that `others` will read too; its warnings are reported."""
        configs = (load_config(each, trust_remote_code=self.trust_remote_code) for each in (model, *others))
        reach = ModelLimits.of(*configs)
        encoder = ChatEncoder(
            self.tokenizer(model),
            self.max_length,
            self.chat_template,
            skip_refused=self.skip_refused,
            positions=reach.positions,
            vocabulary=reach.vocabulary,
        )
        for warning in encoder.warnings:
            self.reporter.warn(warning)
        return encoder

    def batches(self, encoded: Sequence[Encoded]) -> Iterable[Batch]:
        """Return length-sorted batches on the session's device."""
        return on_device(iter_batches(encoded, self.batch_tokens), self.device)


def refuse_shared_files(pool: Pool, judged_by: Mapping[str, Pool]) -> None:
    """Refuse a pool that shares a file with a validation or test set.

    Args:
        pool: the candidates.
        judged_by: sets by their names in messages, e.g. `validation set of gsm8k`.
    """
    for name, source in judged_by.items():
        file = pool.shared_file(source)
        if file is not None:
            raise InputError(
                f"{file}: is part of both the {pool.name} and the {name}, so rows would be judged by themselves; move "
                "the rows of that set to a separate file"
            )


def share(total: int, fraction: float) -> int:
    """Return the number of rows in a fraction of the pool, at least `AT_LEAST` or the whole pool."""
    return max(round(total * fraction), min(AT_LEAST, total))


def tokens_of(encoded: Sequence[Encoded]) -> tuple[int, int]:
    """Return the numbers of tokens and of supervised tokens of some examples."""
    return sum(row.tokens for row in encoded), sum(row.supervised for row in encoded)


def pool_of(files: str | list[str], settings: Settings, name: str = "pool") -> Pool:
    """Return a pool of files, read as the settings say."""
    how = {"on_bad_row": settings.data.on_bad_row, "columns": settings.data.columns, "pairs": settings.loss == "dpo"}
    return Pool(files, name=name, **how)


def tasks_of(files: Mapping[str, str | list[str]], settings: Settings) -> dict[str, Pool]:
    """Return the pool of each task's validation or test files."""
    return {task: pool_of(names, settings, task) for task, names in files.items()}


def encode_validation(encoder: ChatEncoder, pools: Mapping[str, Pool]) -> dict[str, list[Encoded]]:
    """Return the encoded validation set of each task.

    Raises:
        InputError: no example of a task has a supervised token.
    """
    encoded: dict[str, list[Encoded]] = {}
    for task, pool in pools.items():
        pool.scan()
        examples: list[Example] = list(pool)
        encoded[task] = encoder.encode(examples)
        if not any(example.supervised for example in encoded[task]):
            why = f"; rows were left out: {encoder.refused}" if encoder.refused else " within the maximum length"
            raise InputError(f"validation task {task!r}: no example has a supervised token{why}")
    return encoded
