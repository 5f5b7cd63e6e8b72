"""iprox: select the training data that helps your task, with influence scored on a low-rank proxy of your model.

Importing it teaches transformers to load proxies: `AutoModelForCausalLM.from_pretrained(proxy_folder)`.
"""

from importlib.metadata import version

from iprox.api import align, attribute, audit, compress, load, score, select
from iprox.api.views import view
from iprox.audit import compare
from iprox.errors import InputError
from iprox.influence.index import GradientIndex

__version__ = version("iprox")
__all__ = [
    "GradientIndex",
    "InputError",
    "align",
    "attribute",
    "audit",
    "compare",
    "compress",
    "load",
    "score",
    "select",
    "view",
]
