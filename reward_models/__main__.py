"""`python -m reward_models` is the `reward-score` command."""

import sys

from reward_models.folder.cli import main

if __name__ == "__main__":
    sys.exit(main())
