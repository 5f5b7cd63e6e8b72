"""Faster training on a CPU with this package's attention (`attention.py`) and compiled decoder layers.

In a small model, norms, casts and activations cost more than the GEMMs; compiling fuses them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from iprox.models.compiled import compile_blocks, uncompile_blocks, why_compiling_failed, why_not_compiled
from iprox.models.cpu.attention import fast_attention
from iprox.models.layers import decoder_layers

# Number of optimizer steps from which compiling saves time: it takes up to a minute once per machine, then seconds.
COMPILE_STEPS = 128


@contextmanager
def fast_training(model: PreTrainedModel, compiled: bool, trial: Callable[[], Tensor]) -> Iterator[str]:
    """Make a model on a CPU train faster inside the block; other devices are not affected.

    Args:
        model: model to train; restored after the block.
        compiled: whether to compile the decoder layers, if possible.
        trial: function that returns a training loss, to test the compiled layers with its gradient.

    Yields:
        Why the model does not run compiled although `compiled` is true, else an empty string.
    """
    if model.device.type != "cpu":
        yield ""
        return
    with fast_attention(model):
        if not compiled:
            yield ""
            return
        blocks = decoder_layers(model)[1]
        reason = why_not_compiled(model) or _compile(model, blocks, trial)
        try:
            yield reason
        finally:
            uncompile_blocks(blocks)


def _compile(model: PreTrainedModel, blocks: nn.ModuleList, trial: Callable[[], Tensor]) -> str:
    """Compile the decoder layers; return why they cannot be compiled, or an empty string."""
    compile_blocks(blocks)
    try:
        with torch.random.fork_rng(devices=()):  # the trial must not advance the generator
            failed = why_compiling_failed(lambda: trial().backward())
    finally:
        model.zero_grad(set_to_none=True)
    if failed:
        uncompile_blocks(blocks)
    return failed
