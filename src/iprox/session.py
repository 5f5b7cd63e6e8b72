"""What every command shares: where and how to compute, how to read examples, where to report."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from iprox.data import Batch, ChatEncoder, Encoded, Example, Overlap, Pool, PoolSummary, iter_batches, on_device
from iprox.errors import InputError, one_line
from iprox.metering import Usage, metered
from iprox.models.adapters import adapter_base
from iprox.models.loading import load_config, load_model, load_tokenizer
from iprox.models.precision import out_of_memory, resolve_device, resolve_dtype
from iprox.models.saving import CHECKPOINTS
from iprox.models.suitability import ModelLimits
from iprox.progress import Reporter
from iprox.settings import Settings
from iprox.tracking import Tracker

# Fewest examples that moments, alignment and fidelity are measured on, if the pool has as many.
AT_LEAST = 64

# Processes that tokenize ahead on an accelerator: one tokenizes some ten thousand examples a second.
MOST_AHEAD = 4


@dataclass(slots=True)
class Session:
    """How a command computes.

    Attributes:
        device: where.
        dtype: of the products; sums are in float32 or better.
        batch_tokens: largest rows × longest row of a batch.
        max_length: longest example in tokens.
        seed: of every draw and order.
        trust_remote_code: whether a model's own code may run.
        chat_template: instead of the tokenizer's own.
        skip_refused: whether rows that the chat template cannot render have no score, rather than stop the run.
        compile: whether models run compiled; `auto` where that repays the time it takes.
        num_proc: processes that tokenize ahead of scoring; 0 tokenizes in this one.
        reporter: where progress and warnings go.
        tracker: where numbers go.
    """

    device: torch.device
    dtype: torch.dtype
    batch_tokens: int = 4096
    max_length: int = 2048
    seed: int = 0
    compile: Literal["auto"] | bool = "auto"
    trust_remote_code: bool = False
    chat_template: str | None = None
    skip_refused: bool = False
    num_proc: int = 0
    reporter: Reporter = field(default_factory=Reporter)
    tracker: Tracker = field(default_factory=lambda: Tracker("none", Path(), {}))

    @classmethod
    def create(cls, device: str = "auto", dtype: str = "auto", **settings: object) -> Session:
        """Resolve `auto` for this machine.

        Raises:
            InputError: there is no such device, or this is one of several processes of torchrun.
        """
        if int(os.environ.get("WORLD_SIZE") or 1) > 1:
            raise InputError(
                "iprox runs as one process, and this is one of several that torchrun or accelerate has started: start "
                "it by itself; `ray_workers: N` scores on N GPUs"
            )
        try:
            where = resolve_device(device)
            torch.empty(0, device=where)
        except (RuntimeError, AssertionError) as error:
            raise InputError(f"device {device}: not usable here ({one_line(error)}); try --set device=cpu") from error
        # The cores of a CPU have the model to run; an accelerator leaves them free, and outruns one core's tokenizer.
        ahead = 0 if where.type == "cpu" else min(MOST_AHEAD, (os.cpu_count() or 1) - 1)
        return cls(where, resolve_dtype(dtype, where), **{"num_proc": ahead, **settings})  # pyright: ignore[reportArgumentType]

    @classmethod
    def of(cls, settings: Settings, reporter: Reporter) -> Session:
        """Return the session that settings describe.

        Raises:
            InputError: There is no such device.
        """
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
            reporter=reporter,
            **({} if data.num_proc is None else {"num_proc": data.num_proc}),
        )

    @contextmanager
    def metered(self) -> Iterator[Usage]:
        """Measure a stage, and say what would fit where its memory does not.

        Raises:
            InputError: not enough memory.
        """
        try:
            with metered(self.device) as usage, self.own_warnings():
                yield usage
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            raise InputError(
                f"not enough memory on {self.device} ({one_line(error)}); --set batch_tokens="
                f"{max(1, self.batch_tokens // 2)} halves what a batch needs (now {self.batch_tokens}); a training "
                "needs less with a smaller batch_size (and accumulate) or lora; iprox plan says what each stage needs"
            ) from error

    @contextmanager
    def own_warnings(self) -> Iterator[None]:
        """Report what the library itself warns of, so that it is kept in `run.json`; other packages' as they are."""
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

        Warns of its rows that are in a set that it is judged by, and of columns to be read that no row of any has.

        Raises:
            InputError: a file of it is that of a set that it is judged by.
        """
        refuse_shared_files(pool, judged_by)
        with self.own_warnings():
            for source in judged_by.values():
                source.scan()  # tells of all their bad rows, not of the first
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

    def model(self, path: str | Path, dtype: torch.dtype | None = None, *, fused: bool = False) -> PreTrainedModel:
        """A model or proxy on the session's device, in its dtype or another (see `load_model`)."""
        self.note_adapter(path)
        return load_model(
            path,
            dtype=dtype or self.dtype,
            device=self.device,
            trust_remote_code=self.trust_remote_code,
            fused=fused,
        )

    def note_adapter(self, path: str | Path) -> None:
        """Say that a model is a PEFT adapter, which is merged into its base model, unless iprox has trained it."""
        base = adapter_base(path)
        if base is not None and not (Path(path).parent / CHECKPOINTS).is_file():
            self.reporter.warn(f"{path} is a PEFT adapter: it is merged into {base} first")

    @property
    def load(self) -> Callable[[str], PreTrainedModel]:
        """What loads a model later, also in another process; `note_adapter` says what it does not."""
        return functools.partial(
            load_model, dtype=self.dtype, device=self.device, trust_remote_code=self.trust_remote_code
        )

    def tokenizer(self, path: str | Path) -> PreTrainedTokenizerBase:
        """The tokenizer of a model; one without a pad token pads with its end token."""
        tokenizer = load_tokenizer(path, trust_remote_code=self.trust_remote_code)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def encoder(self, model: str | Path, *others: str | Path) -> ChatEncoder:
        """What turns examples into tokens for a model, and for others that read the same; its warnings are reported."""
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
    """Refuse a pool that is judged by itself, before it is read.

    Args:
        pool: the candidates.
        judged_by: by what each is, e.g. `validation set of gsm8k`.

    Raises:
        InputError: a file is both the pool's and such a set's.
    """
    for name, source in judged_by.items():
        file = pool.shared_file(source)
        if file is not None:
            raise InputError(
                f"{file}: is both the {pool.name}'s and the {name}: each row would be judged by itself; take the rows "
                "of that set out of the pool, into a file of their own"
            )


def share(total: int, fraction: float) -> int:
    """Number of rows in a share of the pool, but never fewer than `AT_LEAST` (a pool that small is taken whole)."""
    return max(round(total * fraction), min(AT_LEAST, total))


def tokens_of(encoded: Sequence[Encoded]) -> tuple[int, int]:
    """Tokens and supervised tokens of some examples."""
    return sum(len(row.input_ids) for row in encoded), sum(row.supervised for row in encoded)


def pool_of(files: str | list[str], settings: Settings, name: str = "pool") -> Pool:
    """Return the examples of some files, read as the settings say."""
    return Pool(files, name=name, on_bad_row=settings.data.on_bad_row, columns=settings.data.columns)


def tasks_of(files: Mapping[str, str | list[str]], settings: Settings) -> dict[str, Pool]:
    """The examples of each task, validation or test."""
    return {task: pool_of(names, settings, task) for task, names in files.items()}


def encode_validation(encoder: ChatEncoder, pools: Mapping[str, Pool]) -> dict[str, list[Encoded]]:
    """Every task's validation set, encoded.

    Raises:
        InputError: a task without an example that has a supervised token.
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
