"""Held-out rows of a pool, on which fidelity is measured while a proxy is sized or aligned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from iprox.audits.held_out import HeldOutFidelity
from iprox.data import ChatEncoder, Example, Pool
from iprox.influence.job import Checkpoint
from iprox.models.layers import low_rank_layers
from iprox.session import Session, encode_validation
from iprox.settings import InfluenceSection
from iprox.stages.scoring import job_of


@dataclass(frozen=True, slots=True)
class HeldOutRows:
    """What fidelity is measured on while a proxy is made.

    Attributes:
        examples: examples that are not aligned on.
        validation: validation sets by task.
        influence: how candidates will be scored.
        pool: what curvature is measured on.
    """

    examples: Sequence[Example]
    validation: Mapping[str, Pool]
    influence: InfluenceSection
    pool: Pool


def held_out_fidelity(
    session: Session,
    target: PreTrainedModel,
    proxy: PreTrainedModel | None,
    encoder: ChatEncoder,
    held_out: HeldOutRows,
) -> HeldOutFidelity:
    """Return the fidelity on held-out rows, with the target's scores of them measured now.

    Args:
        session: how to compute.
        target: the target.
        proxy: the proxy, or None for low-rank ones that are yet to be made.
        encoder: makes tokens and labels.
        held_out: the rows.
    """
    settings = held_out.influence
    encoded = encode_validation(encoder, dict(held_out.validation))
    return HeldOutFidelity(
        job_of(session, settings, [Checkpoint(target)], encoded, encoder, held_out.pool),
        encoder.encode(held_out.examples),
        query_on_target=settings.query == "target" and (proxy is None or bool(low_rank_layers(proxy))),
    )
