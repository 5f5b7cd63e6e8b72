"""The stages, one function each: they read inputs, do the work with progress, write the output and return its cost.

Both `iprox run` and the commands for single stages call them through `iprox.run.steps`.
"""
