"""`python -m tt_model.training.boilerplate`."""

import sys

from .corpus import main

if __name__ == "__main__":
    sys.exit(main())
