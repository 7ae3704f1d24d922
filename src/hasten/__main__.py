"""`python -m hasten` is the `hasten` command."""

import sys

from hasten.cli import main

if __name__ == "__main__":
    sys.exit(main())
