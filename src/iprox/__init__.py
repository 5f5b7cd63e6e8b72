"""iprox: select the training data that helps your task, with influence scored on a cheaper proxy of your model.

Importing it lets transformers load proxies: `AutoModelForCausalLM.from_pretrained(proxy_folder)`. torch and
transformers are imported with the first name that needs them.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from iprox.registration import teach_transformers

if TYPE_CHECKING:
    from iprox.api import align, attribute, audit, compress, load, score, select
    from iprox.audits import compare
    from iprox.errors import InputError
    from iprox.influence.index import GradientIndex
    from iprox.models.preference import DpoLoss, RewardLoss

__version__ = version("iprox")
__all__ = [
    "DpoLoss",
    "GradientIndex",
    "InputError",
    "RewardLoss",
    "align",
    "attribute",
    "audit",
    "compare",
    "compress",
    "load",
    "score",
    "select",
]

# Module of each public name.
_HOMES = {
    **dict.fromkeys(("align", "attribute", "audit", "compress", "load", "score", "select"), "iprox.api"),
    "compare": "iprox.audits.comparison",
    "InputError": "iprox.errors",
    "GradientIndex": "iprox.influence.index",
    **dict.fromkeys(("DpoLoss", "RewardLoss"), "iprox.models.preference"),
}

teach_transformers()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'iprox' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
