"""Losses of preference pairs, whose batches hold a chosen and a rejected answer per example (`Batch.paired`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from iprox.data.batching import Batch
from iprox.data.tokens import IGNORE
from iprox.errors import InputError
from iprox.models.loss import causal_lm_losses


class PreferenceLoss:
    """A loss of pairs, (model, batch) -> losses [B]; data given with it are rows with `chosen` and `rejected`."""


@dataclass(frozen=True)
class DpoLoss(PreferenceLoss):
    """The loss of direct preference optimization (Rafailov et al., arXiv:2305.18290, eq. 7).

    -log σ(β (m - m_ref)), where m is the difference of the log-probabilities of the chosen and the rejected answer,
    each the sum over its tokens, and m_ref that of the reference.

    Attributes:
        reference: model that training must not leave. None is the model itself at its present weights, where DPO
            starts: all losses are log 2, and the gradient of m has the same weight in each.
        beta: β; without a reference it scales all scores alike.
    """

    reference: nn.Module | None = None
    beta: float = 0.1

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the losses [B] of a batch."""
        margin = self.margin(model, batch)
        if self.reference is None:
            before = margin.detach()
        else:
            training = self.reference.training
            self.reference.eval()
            with torch.no_grad():
                there = batch.to(next(self.reference.parameters()).device)
                before = self.margin(self.reference, there).to(margin)
            self.reference.train(training)
        return softplus(-self.beta * (margin - before))

    def margin(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return log π(chosen) - log π(rejected) of each pair [B]."""
        check_pairs(batch)
        means = causal_lm_losses(model, batch)
        chosen, rejected = (-means * (batch.labels[:, 1:] != IGNORE).sum(1)).view(-1, 2).unbind(1)
        return chosen - rejected


@dataclass(frozen=True)
class RewardLoss(PreferenceLoss):
    """The loss of reward models (Bradley and Terry), -log σ(r(chosen) - r(rejected)).

    The model is a sequence classifier of transformers with one label, whose config has a `pad_token_id`.
    """

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the losses [B] of a batch.

        Raises:
            InputError: the model gives no single number per row, or has no padding token.
        """
        check_pairs(batch)
        pad: Any = getattr(getattr(model, "config", None), "pad_token_id", None)
        if not isinstance(pad, int):
            raise InputError("a reward model finds the end of an answer by its padding; set model.config.pad_token_id")
        places = torch.arange(batch.input_ids.shape[1], device=batch.lengths.device)
        padded = batch.input_ids.masked_fill(places >= batch.lengths[:, None], pad)
        rewards = model(input_ids=padded).logits
        if rewards.shape != (len(padded), 1):
            raise InputError(f"a reward model gives one number per row (num_labels=1), not {list(rewards.shape)}")
        return softplus(-(rewards.view(-1, 2) @ rewards.new_tensor([1.0, -1.0])))


def check_pairs(batch: object) -> None:
    """Refuse a batch that does not hold pairs."""
    if not isinstance(batch, Batch) or not batch.paired:
        raise InputError("this loss compares two answers: give rows with chosen and rejected")
