"""iprox: select the training data that helps your task, with influence scored on a low-rank proxy of your model.

Importing it teaches transformers to load proxies: `AutoModelForCausalLM.from_pretrained(proxy_folder)`.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from types import ModuleType
from typing import TYPE_CHECKING, Any

from iprox.errors import InputError
from iprox.registration import register_proxies

if TYPE_CHECKING:
    from iprox.api import align, audit, compress, load, score, select

__version__ = version("iprox")
__all__ = ["InputError", "align", "audit", "compress", "load", "score", "select"]

_API = frozenset(__all__) - {"InputError"}


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        # The import system sets a sub-package as an attribute; `iprox.audit` is the function, whatever is imported.
        if name not in _API:
            super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    # The API needs torch and transformers, seconds of imports; whoever asks for it waits, not `iprox --help`.
    if name not in _API:
        raise AttributeError(f"module 'iprox' has no attribute {name!r}")
    from iprox import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


sys.modules[__name__].__class__ = _Package
register_proxies()
