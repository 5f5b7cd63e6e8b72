"""The command line interface."""

from iprox.cli.entry import main

__all__ = ["main"]
