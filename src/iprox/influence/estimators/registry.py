"""All estimators by their names in the settings; `iprox.settings.ESTIMATORS` declares their traits."""

from iprox.influence.baselines import Bm25, Length, Perplexity, Random, Rds
from iprox.influence.estimators.base import Estimator
from iprox.influence.estimators.datainf import DataInf
from iprox.influence.estimators.ekfac import KroneckerInfluence
from iprox.influence.estimators.less import Less
from iprox.influence.estimators.tracin import TracIn
from iprox.settings import InfluenceSection

REGISTRY: dict[str, Estimator] = {
    "ekfac": KroneckerInfluence("ekfac", corrected=True),
    "kfac": KroneckerInfluence("kfac", corrected=False),
    "datainf": DataInf("datainf"),
    "tracin": TracIn("tracin"),
    "less": Less("less"),
    "random": Random("random"),
    "length": Length("length"),
    "perplexity": Perplexity("perplexity"),
    "rds": Rds("rds"),
    "bm25": Bm25("bm25"),
}


def estimator_of(settings: InfluenceSection) -> Estimator:
    """Return the estimator that the settings name."""
    return REGISTRY[settings.estimator]
