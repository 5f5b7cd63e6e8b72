"""Teaches transformers to load proxies without importing it: that takes seconds, and `iprox --help` needs none."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# Whatever loads a model imports this first; and it comes after the tables that proxies are registered in.
TRIGGER = "transformers.modeling_utils"


def register_proxies() -> None:
    """Register proxies with transformers: now if its models are imported already, else the moment they are."""
    if TRIGGER in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _Watch())


def _register() -> None:
    importlib.import_module("iprox.models.checkpoint")  # registers as it is imported


class _Watch(MetaPathFinder):
    """Waits for the import of `TRIGGER`, once."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != TRIGGER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register()

            spec.loader.exec_module = execute_and_register
        return spec
