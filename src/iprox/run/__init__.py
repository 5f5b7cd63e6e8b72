"""Stages and the folders they write: `iprox run` does all of them, a command does one.

    settings + files -> Run -> steps (warm_up ... report) -> stages (the work) -> run.json

A step says what its output depends on, where it is written, and what makes it; `Run.stage` does it, or skips it when it
is done.
"""
