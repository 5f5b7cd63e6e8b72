"""Stage 2: tune the factors until the proxy matches its target (`align_loss` says in what)."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from iprox.data.batching import Batch
from iprox.errors import InputError
from iprox.models.layers import LowRankLinear, low_rank_layers
from iprox.models.memory import RELEASE_EVERY, release_memory
from iprox.models.precision import cast_parameters
from iprox.progress import Advance
from iprox.proxy.align_loss import Objective, Signals, alignment_loss, target_signals
from iprox.proxy.align_signals import SignalStore
from iprox.proxy.align_state import load_state, save_state

if TYPE_CHECKING:
    import plotly.graph_objects as go

# How often held-out fidelity is measured and the state saved, evenly over the steps; fidelity is also measured before.
EVALUATIONS = 4
# Evaluations in a row that may be no better than the best before alignment stops.
PATIENCE = 2


@dataclass(frozen=True, slots=True)
class AlignmentStep:
    """One optimizer step: the whole loss, its parts (KL per token, nats), the learning rate.

    Parts without weight are None, and were not computed. Of several batches a step they are means.
    """

    step: int
    loss: float
    gradient: float | None
    kl: float
    hidden: float | None
    learning_rate: float


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Fidelity on held-out examples after some steps; 0 is before alignment."""

    step: int
    fidelity: float


@dataclass(slots=True)
class AlignmentHistory:
    """What alignment did; written beside the proxy as `alignment.json`.

    Attributes:
        steps: one by one.
        held_out: fidelity where it was measured.
        best_step: the step whose factors were kept; the last one where fidelity was not measured.
        stopped_early: whether fidelity had stopped rising before all steps were done.
        tokens: read.
        seconds: wall time.
    """

    steps: list[AlignmentStep] = field(default_factory=list)
    held_out: list[HeldOut] = field(default_factory=list)
    best_step: int = 0
    stopped_early: bool = False
    tokens: int = 0
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def plot(self) -> go.Figure:
        """Return the losses by step and, where it was measured, the held-out fidelity, as a Plotly figure."""
        # The charts depend on no other room; they are imported here, so that alignment does not import Plotly.
        from iprox.report.charts import alignment_chart, figures, held_out_chart

        data = self.as_dict()
        drawn = (alignment_chart(data["steps"]), held_out_chart(data["held_out"], self.best_step))
        return figures([chart for chart in drawn if chart is not None], columns=2)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> AlignmentHistory:
        """The reverse of `as_dict`."""
        steps = [AlignmentStep(**step) for step in data["steps"]]
        return cls(**{**data, "steps": steps, "held_out": [HeldOut(**point) for point in data["held_out"]]})


@dataclass(frozen=True, slots=True)
class AlignSettings:
    """How factors are tuned.

    Attributes:
        steps: optimizer steps; batches are taken in a new seeded order each time round.
        learning_rate: peak step size of a factor of average scale.
        accumulate: batches an optimizer step. With batches of one example each, every example's own gradient is matched
            rather than a batch's mean.
        seed: of the order.
    """

    steps: int
    learning_rate: float = 1e-4
    accumulate: int = 1
    seed: int = 0

    @property
    def every(self) -> int:
        """Steps between evaluations."""
        return max(1, math.ceil(self.steps / EVALUATIONS))


def align(
    proxy: nn.Module,
    target: nn.Module,
    batches: Sequence[Batch],
    settings: AlignSettings,
    objective: Objective | None = None,
    *,
    held_out: Callable[[], float] | None = None,
    store: SignalStore | None = None,
    state: Path | None = None,
    identity: str = "",
    progress: Advance | None = None,
) -> AlignmentHistory:
    """Align a proxy with its target, in place.

    AdamW without weight decay on float32 master copies of the factors, a tenth of the steps as warm-up, cosine
    decay, gradient norm clipped to 1. Adam's steps have unit size whatever the factor's scale, so the learning
    rate of each factor is `learning_rate` times its own root mean square over the mean root mean square of all:
    every factor moves by the same share of itself. A bfloat16 proxy runs in bfloat16.

    With `held_out` the best factors are kept, those before alignment among them: the fidelity that it measures is never
    lower than it was.

    Cost per token: target 6P (once a batch with a `store`), proxy about 16P′ FLOPs (forward, backward, and the
    backward of both); without the gradient part 2P and 6P′.

    Args:
        proxy: the model to tune; its dtype is restored at the end.
        target: the model to match; left as it was. It may be on another device, or quantized.
        batches: the alignment batches.
        settings: how factors are tuned.
        objective: what is minimized.
        held_out: fidelity of the proxy as it is, on examples that are not aligned on.
        store: keeps what the target says of each batch, so that it is asked once; None asks every time.
        state: file that an interrupted alignment goes on from.
        identity: of the run that may go on from it.
        progress: called with the number of steps done.

    Raises:
        InputError: the proxy has no low-rank layer, or there is nothing to align on.
        FloatingPointError: the loss is not finite (the step and the batch are named).
    """
    objective = objective or Objective()
    started = time.perf_counter()
    layers = low_rank_layers(proxy)
    if not layers:
        raise InputError(
            "the proxy has no low-rank layer, so there is nothing to align; was it made by iprox compress?"
        )
    if not batches:
        raise InputError("no supervised example to align on")
    here, there = (next(model.parameters()).device for model in (proxy, target))

    def signals_of(index: int) -> Signals:
        def make() -> Signals:
            return target_signals(target, layers, batches[index].to(there), objective)

        return (make() if store is None else store(index, make)).to(here)

    with _trainable(proxy, layers) as (factors, autocast):
        optimizer = _optimizer(factors, settings.learning_rate)
        run = _Run(factors, optimizer, held_out)
        if state is not None and state.is_file():
            run.load(state, identity)
        elif held_out is not None:
            run.evaluate(0)
        done = len(run.history.steps)
        if progress is not None and done:
            progress(done, earlier=True)
        generator = torch.Generator().manual_seed(settings.seed)
        rounds = (torch.randperm(len(batches), generator=generator).tolist() for _ in itertools.count())
        order = itertools.chain.from_iterable(rounds)
        for step in range(1, settings.steps + 1):
            indices = list(itertools.islice(order, settings.accumulate))
            if step <= done:
                continue
            if run.worse_since() >= PATIENCE:
                run.history.stopped_early = True
                break
            if step % RELEASE_EVERY == 0:
                release_memory()
            rate = settings.learning_rate * schedule(step, settings.steps)
            some = [batches[index] for index in indices]
            told = (signals_of(index) for index in indices)  # one at a time: they are as large as the target
            try:
                parts = _step(
                    *(proxy, layers, some, told, objective),
                    *(optimizer, list(factors.values()), rate, autocast),
                )
            except FloatingPointError as error:
                raise FloatingPointError(f"{error} at step {step} (batch {', '.join(map(str, indices))})") from None
            run.history.steps.append(AlignmentStep(step, *parts, rate))
            run.history.tokens += sum(int(batch.lengths.sum()) for batch in some)
            if progress is not None:
                progress(1)
            if step % settings.every == 0 or step == settings.steps:
                if held_out is not None:
                    run.evaluate(step)
                if state is not None and step < settings.steps:
                    run.history.seconds += time.perf_counter() - started
                    started = time.perf_counter()
                    run.save(state, identity)
        run.finish()
    run.history.seconds += time.perf_counter() - started
    return run.history


def _step(
    proxy: nn.Module,
    layers: dict[str, LowRankLinear],
    batches: Sequence[Batch],
    signals: Iterable[Signals],
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    factors: Sequence[nn.Parameter],
    rate: float,
    autocast: bool,
) -> tuple[float, float | None, float, float | None]:
    """One optimizer step. Returns the mean losses of its batches: whole, gradient, KL, hidden."""
    here = next(proxy.parameters()).device
    optimizer.zero_grad(set_to_none=True)
    found = []
    for batch, told in zip(batches, signals, strict=True):
        with torch.autocast(here.type, torch.bfloat16, enabled=autocast):
            losses = alignment_loss(proxy, layers, batch.to(here), told, objective)
        if not torch.isfinite(losses.whole):
            raise FloatingPointError(f"the alignment loss is {losses.whole.item()}")
        (losses.whole / len(batches)).backward()
        parts = (losses.whole, losses.gradient, losses.kl, losses.hidden)
        found.append([None if part is None else part.item() for part in parts])
    torch.nn.utils.clip_grad_norm_(factors, 1.0)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]
    optimizer.step()
    whole, gradient, kl, hidden = (
        None if column[0] is None else math.fsum(column) / len(column) for column in zip(*found, strict=True)
    )
    assert whole is not None and kl is not None  # noqa: PT018
    return whole, gradient, kl, hidden


class _Run:
    """An alignment in progress: the factors, the best ones so far, and what happened."""

    def __init__(
        self, factors: dict[str, nn.Parameter], optimizer: torch.optim.AdamW, held_out: Callable[[], float] | None
    ) -> None:
        self.factors, self.optimizer, self.held_out = factors, optimizer, held_out
        self.history = AlignmentHistory()
        self.best: dict[str, Tensor] = {}

    def evaluate(self, step: int) -> None:
        """Measure fidelity, and keep the factors if they are the best yet."""
        assert self.held_out is not None
        fidelity = self.held_out()
        if not math.isfinite(fidelity):
            raise FloatingPointError(
                f"the held-out fidelity is {fidelity} at step {step}: scores of a task are all alike, so they have no "
                "ranking; give other held-out examples, or none"
            )
        highest = max((point.fidelity for point in self.history.held_out), default=-math.inf)
        self.history.held_out.append(HeldOut(step, fidelity))
        if fidelity > highest:
            self.history.best_step = step
            self.best = {name: factor.detach().clone() for name, factor in self.factors.items()}

    def worse_since(self) -> int:
        """Evaluations since the best one."""
        return sum(point.step > self.history.best_step for point in self.history.held_out)

    def save(self, file: Path, identity: str) -> None:
        """Write all that it takes to go on."""
        save_state(file, identity, self.factors, self.optimizer, self.best, self.history.as_dict())

    def load(self, file: Path, identity: str) -> None:
        """Go on from what `save` wrote.

        Raises:
            InputError: it is of another alignment.
        """
        self.best, history = load_state(file, identity, self.factors, self.optimizer)
        self.history = AlignmentHistory.from_dict(history)

    def finish(self) -> None:
        """Leave the proxy with the best factors."""
        if self.held_out is None:
            self.history.best_step = len(self.history.steps)
            return
        with torch.no_grad():
            for name, factor in self.factors.items():
                factor.copy_(self.best[name])


@contextmanager
def _trainable(proxy: nn.Module, layers: dict[str, LowRankLinear]) -> Iterator[tuple[dict[str, nn.Parameter], bool]]:
    """A proxy whose factors alone train, in float32 or better; gives them by name, and whether it runs in bfloat16."""
    dtype = next(iter(layers.values())).A.weight.dtype
    training = proxy.training
    flags = {id(parameter): parameter.requires_grad for parameter in proxy.parameters()}
    proxy.eval()  # dropout would make the proxy's gradient noisy against the target's
    proxy.requires_grad_(False)
    cast_parameters(proxy, torch.promote_types(dtype, torch.float32))
    factors = {
        f"{name}.{part}.weight": getattr(layer, part).weight for name, layer in layers.items() for part in ("A", "B")
    }
    for factor in factors.values():
        factor.requires_grad_(True)
    try:
        yield factors, dtype == torch.bfloat16
    finally:
        cast_parameters(proxy, dtype)
        proxy.train(training)
        for parameter in proxy.parameters():
            parameter.requires_grad_(flags.get(id(parameter), True))


def _optimizer(factors: dict[str, nn.Parameter], learning_rate: float) -> torch.optim.AdamW:
    """AdamW with a rate for each factor in proportion to its scale (see `align`)."""
    scales = torch.stack([factor.detach().square().mean().sqrt() for factor in factors.values()])
    rates = (scales / scales.mean()).tolist()
    groups = [{"params": [factor], "scale": rate} for factor, rate in zip(factors.values(), rates, strict=True)]
    return torch.optim.AdamW(groups, lr=learning_rate, weight_decay=0.0)


def schedule(step: int, total: int) -> float:
    """Share of the peak learning rate at a step (1-based): linear over the first tenth, then cosine to 0."""
    warm = max(1, total // 10)
    if step <= warm:
        return step / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))
