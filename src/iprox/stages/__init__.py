"""The stages, one function each: read what it needs, do it with progress, write what it made, say what it cost.

Both `iprox run` (`iprox.run`) and the commands for single stages (`iprox.cli`) call these.
"""
