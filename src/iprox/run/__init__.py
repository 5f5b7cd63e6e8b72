"""Runs: `iprox run` does all stages in one folder, a command does one.

settings + files -> Run -> steps (warm_up ... report) -> stages (the work) -> run.json

A step says what its output depends on, where it goes and how it is made. `Run.stage` does the stage, or skips it if its
output is up to date.
"""
