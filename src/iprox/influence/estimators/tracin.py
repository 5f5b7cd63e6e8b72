"""TracIn: ⟨G(z), Ḡ(V)⟩, weighted by learning rate and summed over checkpoints (Pruthi et al., arXiv:2002.08484)."""

from iprox.influence.estimators.base import GradientEstimator


class TracIn(GradientEstimator):
    """TracIn: validation gradients are not preconditioned."""
