"""Which ways of saving FLOPs keep the target's ranking? Fidelity of each lever by itself, and of a few together.

Each lever changes how the target's own gradients of candidates are taken; validation gradients are always whole and of
the target. *forward r, backward q*: the forward pass runs through IPSVD factors of sparsity r, the backward pass
through those of sparsity q, 0 being the target's own weights. *float8*, *int8*: every product of both passes has its
two factors rounded, with a scale for each row. *P/A tokens*: at most P tokens before the answer and A of it. *depth d*:
gradients of the fraction d of the decoder layers, from the top. The levers are simulated with the target's own layers:
this measures what they keep, and counts FLOPs of linear layers; `cost.py` measures seconds of those that are built in.

    python benchmarks/levers.py --model ../models/smollm2-135m-instruct --examples 300
    python benchmarks/levers.py --estimator ekfac            # the default score; TracIn's cosine is quicker
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import iprox
from common import RESULTS, Results, agreement, settings_of
from cost import AGAIN, Bench, Scored, options_of
from iprox.data import Encoded
from iprox.data.tokens import IGNORE
from iprox.engine.stream import WindowWorker
from iprox.influence.job import Checkpoint
from iprox.models.layers import LowRankLinear, compressible_layers
from iprox.scores import example_matrix, score_matrix

Round = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Lever:
    """One way of taking a candidate's gradient."""

    forward: float = 0.0
    backward: float = 0.0
    rounding: str = ""
    tokens: tuple[int, int] | None = None
    depth: float = 1.0

    @property
    def name(self) -> str:
        """Its name in the table."""
        parts = []
        if self.forward or self.backward:
            parts.append(f"forward {self.forward:g}, backward {self.backward:g}")
        if self.depth < 1:
            parts.append(f"depth {self.depth:g}")
        if self.rounding:
            parts.append(self.rounding)
        if self.tokens:
            parts.append(f"{self.tokens[0]}/{self.tokens[1]} tokens")
        return " and ".join(parts)

    def flops(self, kept: float) -> float:
        """Return the FLOPs of linear layers, forward and backward, as a fraction of the target's."""
        return kept * ((1 - self.forward) + self.depth * (1 - self.backward)) / 2


LEVERS = (
    *(Lever(backward=share) for share in (0.3, 0.5, 0.7)),
    *(Lever(0.3, share) for share in (0.0, 0.3, 0.5)),
    *(Lever(0.5, share) for share in (0.0, 0.5)),
    *(Lever(rounding=name) for name in ("float8", "int8")),
    *(Lever(tokens=pair) for pair in ((128, 128), (64, 64), (32, 32))),
    *(Lever(depth=share) for share in (0.5, 0.33, 0.25, 0.17)),
    Lever(depth=0.33, rounding="float8"),
    *(Lever(depth=0.33, tokens=pair) for pair in ((128, 128), (64, 64))),
    Lever(backward=0.5, depth=0.5),
    Lever(forward=0.3, depth=0.33),
)


class Levers(Bench):
    """The target of `cost.py`, its sample and tasks, scored through levers."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        super().__init__(arguments)
        self.rows = self.encoder.encode(self.sample)
        self.worker_of = cache(self._worker_of)
        self.weights_at = cache(self._weights_at)

    def _worker_of(self, depth: float) -> WindowWorker:
        """Return the scorer of candidates with gradients of some layers."""
        if depth == 1:
            return self.job(Checkpoint(self.target, curvature=self.folder)).worker()
        proxy = iprox.compress(self.target, method="target", depth=depth, progress=False)
        return self.job(Checkpoint(proxy, 1.0, self.target, curvature=self.folder)).worker()

    def _weights_at(self, sparsity: float) -> dict[str, Tensor]:
        """Return the low-rank weights [m, n] of the layers, which IPSVD makes."""
        proxy = iprox.compress(
            self.target, self.probe, tokenizer=self.encoder.tokenizer, max_length=512, progress=False, sparsity=sparsity
        )
        return {
            name: layer.weight.detach() for name, layer in proxy.named_modules() if isinstance(layer, LowRankLinear)
        }

    def scored_with(self, lever: Lever) -> tuple[Scored, float]:
        """Return the scores through a lever, and the share of tokens that are read."""
        worker = self.worker_of(lever.depth)
        model = worker.rows.model  # pyright: ignore[reportAttributeAccessIssue]
        rows = [cut(row, *lever.tokens) for row in self.rows] if lever.tokens else self.rows
        forward, backward = (self.weights_at(s) if s else None for s in (lever.forward, lever.backward))
        with products(model, forward, backward, ROUNDINGS.get(lever.rounding)):
            table, _ = worker(self.sample, encoded=rows)
        examples = [example_matrix(table, task) for task in self.validation] if self.settings.by_example else []
        kept = sum(len(row.input_ids) for row in rows) / sum(len(row.input_ids) for row in self.rows)
        return Scored(score_matrix(table), examples, 0.0, 0.0), kept

    def of_target(self) -> Scored:
        """Return the scores of the target itself."""
        if self.truth is None:
            self.truth = self.scored_with(Lever())[0]
        return self.truth

    def cell(self, lever: Lever) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Measure one lever."""
        truth, (found, kept) = self.of_target(), self.scored_with(lever)
        return {
            **agreement(found.scores, truth.scores, list(self.validation)),
            "recall": {f"{share:g}": self.recall(found, share) for share in AGAIN},
            "flops": lever.flops(kept),
        }


def cut(row: Encoded, before: int, answer: int) -> Encoded:
    """Keep the last tokens of the prompt and the first of what follows."""
    start = int(np.flatnonzero(row.labels != IGNORE)[0])
    kept = slice(max(0, start - before), start + answer)
    return Encoded(row.input_ids[kept], row.labels[kept], row.truncated or len(row.labels) > before + answer)


@contextmanager
def products(
    model: nn.Module, forward: dict[str, Tensor] | None, backward: dict[str, Tensor] | None, rounded: Round | None
) -> Iterator[None]:
    """Replace the products of linear layers inside the block."""
    with ExitStack() as stack:
        if forward is not None or backward is not None or rounded is not None:
            for name, layer in compressible_layers(model).items():
                weights = tuple(None if known is None else known.get(name) for known in (forward, backward))
                stack.enter_context(layer.register_forward_hook(partial(_replaced, weights, rounded)))
        yield


def _replaced(
    weights: Sequence[Tensor | None], rounded: Round | None, layer: nn.Module, inputs: tuple[Tensor, ...], _: Tensor
) -> Tensor:
    """Return a layer's output with other weights forward and backward."""
    (x,), own = inputs, layer.weight
    there, back = (own if weight is None else weight.to(own.dtype) for weight in weights)
    return Product.apply(x, there, back, layer.bias, rounded or (lambda values: values))  # pyright: ignore


class Product(torch.autograd.Function):
    """x Wᵀ + b with another W in the backward pass, and both factors of each product rounded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Tensor, back: Tensor, bias: Tensor | None, rounded: Round) -> Tensor:
        """Return [..., m]."""
        ctx.save_for_backward(back)
        ctx.rounded = rounded
        return nn.functional.linear(rounded(x), rounded(there), bias)

    @staticmethod
    def backward(ctx: Any, *deltas: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of the input [..., n]; the sums of δ W run over outputs, so W is rounded by columns."""
        (back,), (delta,) = ctx.saved_tensors, deltas
        return ctx.rounded(delta) @ ctx.rounded(back.mT).mT, None, None, None, None


def as_float8(values: Tensor) -> Tensor:
    """Round to float8 (e4m3), each row scaled so that its largest value is the format's."""
    largest = torch.finfo(torch.float8_e4m3fn).max
    scale = values.abs().amax(-1, keepdim=True).float().clamp(min=1e-30) / largest
    return ((values / scale).to(torch.float8_e4m3fn).float() * scale).to(values.dtype)


def as_int8(values: Tensor) -> Tensor:
    """Round to 255 steps, each row scaled by its largest value."""
    scale = values.abs().amax(-1, keepdim=True).float().clamp(min=1e-30) / 127
    return ((values / scale).round() * scale).to(values.dtype)


ROUNDINGS: dict[str, Round] = {"float8": as_float8, "int8": as_int8}


def main() -> None:
    """Measure what is missing and print the table."""
    options = options_of(__doc__, "tracin")
    arguments = options.parse_args()
    output = arguments.output or RESULTS / f"levers-{Path(arguments.model).name}-{arguments.estimator}.jsonl"
    results = Results(output, settings_of(arguments), fresh=arguments.fresh)
    bench: Levers | None = None
    for lever in LEVERS:
        if f"{lever.name}/{arguments.seed}" not in results.cells:
            bench = bench or Levers(arguments)
            results(lever.name, lambda lever=lever, bench=bench: bench.cell(lever), arguments.seed)
        cell = results.cells[f"{lever.name}/{arguments.seed}"]
        recall = "  ".join(f"{value:.2f}" for value in cell["recall"].values())
        print(
            f"{lever.name:<40} FLOPs {cell['flops']:.2f}  Spearman {cell['spearman']:.3f}  found {recall}", flush=True
        )


if __name__ == "__main__":
    main()
