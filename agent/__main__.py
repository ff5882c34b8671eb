"""`alertmedic` and `python -m agent`: the process' entry, and nothing else."""

from __future__ import annotations

import sys

from agent.cli import main as run


def main() -> int:
    """Runs the command line of this process; the result is its exit code."""
    return run()


if __name__ == "__main__":
    sys.exit(main())
