"""`python -m ragfleet` is the `ragfleet` command."""

import sys

from ragfleet.cli import main

if __name__ == "__main__":
    sys.exit(main())
