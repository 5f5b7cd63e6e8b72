"""The Python API: the stages on models and data in memory."""

from iprox.api.choosing import audit, select
from iprox.api.making import align, compress, load
from iprox.api.scoring import attribute, score

__all__ = ["align", "attribute", "audit", "compress", "load", "score", "select"]
