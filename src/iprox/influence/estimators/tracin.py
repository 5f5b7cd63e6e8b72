"""TracIn: ⟨G(z), Ḡ(V)⟩, summed over checkpoints with their learning rates (Pruthi et al., arXiv:2002.08484).

The plain dot product: validation gradients are taken as they are.
"""

from iprox.influence.estimators.base import GradientEstimator


class TracIn(GradientEstimator):
    """TracIn, which preconditions nothing."""
