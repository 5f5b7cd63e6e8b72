"""Register proxies with transformers without importing it, so that `import iprox` is fast.

A proxy has the quantization method `iprox` in its `config.json`. transformers looks methods up in two tables;
the entries made here import the real classes (`iprox.models.checkpoint`) when a proxy is loaded.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

METHOD = "iprox"
TABLES = "transformers.quantizers.auto"


def teach_transformers() -> None:
    """Register proxies in the tables of transformers, now if they are imported, else when they are imported."""
    loaded = sys.modules.get(TABLES)
    if loaded is not None and hasattr(loaded, "AUTO_QUANTIZER_MAPPING"):
        _register(loaded)
    elif not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())


class _Watcher(MetaPathFinder):
    """Import hook that registers proxies when the module with the tables is imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the module's usual spec, changed to register proxies after the module has run."""
        if fullname != TABLES:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                _register(module)

            spec.loader.exec_module = run_and_register
        return spec


class _Config:
    """Stand-in for `IproxConfig` until a proxy is loaded."""

    @staticmethod
    def from_dict(values: dict[str, Any], **options: Any) -> Any:
        """Return the config of a proxy."""
        from iprox.models.checkpoint import IproxConfig

        return IproxConfig.from_dict(values, **options)


def _quantizer(config: Any, **options: Any) -> Any:
    """Return the quantizer of a proxy."""
    from iprox.models.checkpoint import IproxQuantizer

    return IproxQuantizer(config, **options)


def _register(tables: ModuleType) -> None:
    tables.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = _Config
    tables.AUTO_QUANTIZER_MAPPING[METHOD] = _quantizer
