"""Run the command line with `python -m iprox.cli`."""

import sys

from iprox.cli.entry import main

sys.exit(main())
