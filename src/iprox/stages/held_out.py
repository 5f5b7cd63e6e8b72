"""Measure fidelity on held-out rows while a proxy is sized or aligned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from iprox.audits.held_out import HeldOutFidelity
from iprox.data import ChatEncoder, Example, Pool
from iprox.influence.job import Checkpoint
from iprox.session import Session, encode_validation
from iprox.settings import InfluenceSection
from iprox.stages.scoring import job_of


@dataclass(frozen=True, slots=True)
class HeldOutRows:
    """The rows that fidelity is measured on while a proxy is made.

    Attributes:
        examples: examples that the proxy is not made from.
        validation: validation sets by task.
        influence: how candidates will be scored.
        pool: pool that curvature is measured on.
        curvature: folder of the target's curvature, if an earlier stage has measured it.
    """

    examples: Sequence[Example]
    validation: Mapping[str, Pool]
    influence: InfluenceSection
    pool: Pool
    curvature: Path | None = None


def held_out_fidelity(
    session: Session, target: PreTrainedModel, encoder: ChatEncoder, held_out: HeldOutRows
) -> HeldOutFidelity:
    """Score held-out rows on the target, and return what measures the fidelity of low-rank proxies on them."""
    settings = held_out.influence
    encoded = encode_validation(encoder, held_out.validation)
    on_target = settings.query == "target"
    checkpoint = Checkpoint(target, curvature=held_out.curvature if on_target else None)
    return HeldOutFidelity(
        job_of(session, settings, [checkpoint], encoded, encoder, held_out.pool),
        encoder.encode(held_out.examples),
        query_on_target=on_target,
    )
