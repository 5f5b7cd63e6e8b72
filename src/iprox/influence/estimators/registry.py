"""All estimators by their names in the settings; `iprox.settings.ESTIMATORS` declares their traits."""

from iprox.influence.baselines import Bm25, Length, Perplexity, Random, Rds
from iprox.influence.estimators.base import Estimator
from iprox.influence.estimators.ekfac import KroneckerInfluence
from iprox.influence.estimators.less import Less
from iprox.influence.estimators.tracin import TracIn
from iprox.settings import InfluenceSection

REGISTRY: dict[str, Estimator] = {
    "ekfac": KroneckerInfluence(corrected=True),
    "kfac": KroneckerInfluence(corrected=False),
    "tracin": TracIn(),
    "less": Less(),
    "random": Random(),
    "length": Length(),
    "perplexity": Perplexity(),
    "rds": Rds(),
    "bm25": Bm25(),
}


def estimator_of(settings: InfluenceSection) -> Estimator:
    """Return the estimator that the settings name."""
    return REGISTRY[settings.estimator]
