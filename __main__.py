"""`python -m nibble` is the `nibble` command."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
