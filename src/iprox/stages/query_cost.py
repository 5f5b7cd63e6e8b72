"""What scoring costs in FLOPs: the candidates' passes, and the validation gradients that they meet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from iprox.data import Encoded
from iprox.models import flops
from iprox.session import tokens_of
from iprox.settings import CURVED, InfluenceSection


@dataclass(frozen=True, slots=True)
class QueryTokens:
    """What is read at each checkpoint before the first candidate is scored; kept in `run.json`.

    Attributes:
        tasks: of validation.
        tokens: of their examples.
        supervised: tokens among them.
        curvature_tokens: of the sample that an influence function measures curvature on; 0 for the others.
        curvature_supervised: tokens among them.
    """

    tasks: int
    tokens: int
    supervised: int
    curvature_tokens: int = 0
    curvature_supervised: int = 0

    @classmethod
    def of(cls, validation: Mapping[str, Sequence[Encoded]], sample: Sequence[Encoded] = ()) -> QueryTokens:
        """Of encoded examples."""
        counts = [tokens_of(task) for task in validation.values()]
        return cls(len(counts), sum(each[0] for each in counts), sum(each[1] for each in counts), *tokens_of(sample))


def candidate_flops(
    model: nn.Module, settings: InfluenceSection, tokens: int, supervised: int, contraction: float
) -> float:
    """FLOPs of the candidates' side on a model; of the scorers without gradients a forward pass, or nothing.

    Args:
        model: what they are scored on.
        settings: how influence is scored.
        tokens: of the candidates.
        supervised: tokens among them.
        contraction: FLOPs of meeting validation gradients, norms included.
    """
    if not settings.gradient_free:
        return flops.scoring_flops(model, tokens, supervised, contraction)
    heads = supervised if settings.estimator == "perplexity" else 0  # RDS reads hidden states
    return flops.forward_pass_flops(model, tokens, heads) if settings.runs_model else 0.0


def query_flops(model: nn.Module, settings: InfluenceSection, read: QueryTokens) -> float:
    """FLOPs of the validation side at one checkpoint, were it taken on a model.

    Validation gradients are 6P a token, as training is. Of the scorers without gradients, hidden states take a forward
    pass, and the others nothing.

    Args:
        model: the target, or a proxy that takes its own.
        settings: how influence is scored.
        read: what is read.
    """
    if settings.gradient_free:
        return flops.forward_pass_flops(model, read.tokens, 0) if settings.estimator == "rds" else 0.0
    spent = flops.training_flops(model, read.tokens, read.supervised)
    if settings.estimator in CURVED:
        kind = "datainf" if settings.estimator == "datainf" else settings.curvature
        spent += flops.curvature_flops(
            model, settings.gradient, read.curvature_tokens, read.curvature_supervised, kind, read.tasks
        )
    return spent
