"""`python -m funcparam`: what a checkpoint is, and another one made of it."""

import sys

from funcparam.checkpoint._command import main

if __name__ == "__main__":
    sys.exit(main())
