"""`python -m tt_model.cli`: the command `twotower`."""

import sys

from . import main

sys.exit(main())
