"""The command line."""

from iprox.cli.main import main

__all__ = ["main"]
