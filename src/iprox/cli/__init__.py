"""The command line."""

from iprox.cli.entry import main

__all__ = ["main"]
