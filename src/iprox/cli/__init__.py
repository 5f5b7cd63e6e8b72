"""The command line (design 4)."""

from iprox.cli.entry import main

__all__ = ["main"]
