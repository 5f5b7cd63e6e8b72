"""`python -m iprox.cli`."""

import sys

from iprox.cli.main import main

sys.exit(main())
