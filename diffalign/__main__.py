"""`python -m diffalign` is the `diffalign` command."""

import sys

from diffalign.commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
