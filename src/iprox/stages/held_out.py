"""Held-out rows of a pool, on which fidelity is measured while a proxy is sized or aligned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from iprox.audits.held_out import HeldOutFidelity
from iprox.data import ChatEncoder, Example, Pool
from iprox.models import flops
from iprox.models.layers import low_rank_layers
from iprox.session import Session, encode_validation, tokens_of
from iprox.settings import InfluenceSection
from iprox.stages.query_cost import QueryTokens, query_flops
from iprox.stages.scoring import curvature_sample, scoring_settings


@dataclass(frozen=True, slots=True)
class HeldOutRows:
    """What fidelity is measured on while a proxy is made.

    Attributes:
        examples: that are not aligned on.
        validation: validation sets by task.
        influence: how candidates will be scored.
        pool: where an influence function takes the examples that it measures curvature on.
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
    """Fidelity on held-out rows, with what the target says of them measured now.

    Args:
        session: how to compute.
        target: the target.
        proxy: the proxy, or None for low-rank ones that are yet to be made.
        encoder: makes tokens and labels.
        held_out: the rows.
    """
    settings = held_out.influence
    return HeldOutFidelity(
        target,
        encoder.encode(held_out.examples),
        encode_validation(encoder, dict(held_out.validation)),
        0,
        scoring_settings(session, settings),
        query_on_target=settings.query == "target" and (proxy is None or bool(low_rank_layers(proxy))),
        sample=curvature_sample(session, held_out.pool, encoder, settings),
    )


def watching_flops(
    target: PreTrainedModel, proxies: Sequence[PreTrainedModel], watched: HeldOutFidelity, settings: InfluenceSection
) -> float:
    """Of validation gradients and curvature, the target's scores of the held-out rows, and each proxy's."""
    tokens, supervised = tokens_of(watched.rows)
    read = QueryTokens.of(watched.validation, watched.sample)
    spent = query_flops(target, settings, read)
    if not watched.fixed:
        taken_on = (target if watched.query_on_target else proxy for proxy in proxies)
        spent += sum(query_flops(model, settings, read) for model in taken_on)
    on_target, on_proxy = watched.meeting_flops["target"], watched.meeting_flops["proxy"]
    spent += flops.scoring_flops(target, tokens, supervised, on_target)
    return spent + sum(flops.scoring_flops(proxy, tokens, supervised, on_proxy) for proxy in proxies)
