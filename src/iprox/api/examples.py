"""Turn the examples that callers of the Python API give into tokens and batches."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from iprox.api.batches import Batches, of_batches
from iprox.data import ChatEncoder, Encoded, Pool, iter_batches, on_device
from iprox.data.batching import batch_tokens_for
from iprox.errors import InputError
from iprox.models.loading import load_tokenizer
from iprox.models.loss import LossFn, causal_lm_losses
from iprox.models.preference import PreferenceLoss
from iprox.models.suitability import ModelLimits

# A `datasets.Dataset` or a list of dicts in a format of docs/files.md; with a `loss_fn`, a torch data set or a
# DataLoader.
Examples = Any


def as_pool(examples: Examples, name: str, loss_fn: LossFn = causal_lm_losses) -> Pool:
    """Return examples as a pool, of pairs if the loss is of pairs."""
    return examples if isinstance(examples, Pool) else Pool(examples, name=name, pairs=of_pairs(loss_fn))


def of_pairs(loss_fn: LossFn) -> bool:
    """Return whether a loss is one of preference pairs."""
    return isinstance(loss_fn, PreferenceLoss)


def _tokenizer_of(name: str) -> PreTrainedTokenizerBase:
    if not name:
        raise InputError("the model does not say where it was loaded from; pass tokenizer=")
    try:
        return load_tokenizer(name)
    except InputError as error:
        raise InputError(f"{error}; or pass tokenizer=") from error


class Reader:
    """Turns examples into batches on the model's device."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase | None,
        max_length: int,
        batch_tokens: int | Literal["auto"] = "auto",
        loss_fn: LossFn = causal_lm_losses,
    ) -> None:
        self.loss_fn = loss_fn
        self.model, self.max_length, self.device = model, max_length, next(model.parameters()).device
        self.batch_tokens = batch_tokens_for(self.device, batch_tokens)
        self._tokenizer = tokenizer
        self._encoder: ChatEncoder | None = None

    @property
    def encoder(self) -> ChatEncoder:
        """The encoder, with the tokenizer given or the model's own."""
        if self._encoder is None:
            config = getattr(self.model, "config", None)
            tokenizer = self._tokenizer or _tokenizer_of(getattr(config, "_name_or_path", ""))
            reach = ModelLimits.of(config) if isinstance(config, PretrainedConfig) else ModelLimits()
            self._encoder = ChatEncoder(
                tokenizer, self.max_length, positions=reach.positions, vocabulary=reach.vocabulary
            )
        return self._encoder

    def encode(self, examples: Examples, name: str) -> list[Encoded]:
        """Check examples and return them as tokens."""
        source = as_pool(examples, name, self.loss_fn)
        source.scan()
        return self.encoder.encode(list(source))

    def batches(self, examples: Examples, name: str) -> Iterable[Any]:
        """Return batches of the examples on the model's device; those of text are sorted by length."""
        if of_batches(examples, self.loss_fn):
            return Batches(examples, name, self.device)
        return on_device(iter_batches(self.encode(examples, name), self.batch_tokens), self.device)
