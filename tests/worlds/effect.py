"""The action of the crash tests: a non-idempotent effect that leaves a line for each time it happens.

usage: effect.py do|check|undo --directory DIR --url URL --service SERVICE --incident ID

`do` appends a line to DIR/effects and heals the service at URL, unless its name says that it cannot be healed; `check`
ends with 0 if the line is there and 1 if not; `undo` appends a line to DIR/undone.
"""

from __future__ import annotations

import argparse
import os
import sys
import urllib.request
from pathlib import Path


def append(path: Path, line: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(descriptor, f"{line}\n".encode())
    os.fsync(descriptor)
    os.close(descriptor)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("do", "check", "undo"))
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--url", required=True)
    parser.add_argument("--service", required=True)
    parser.add_argument("--incident", required=True)
    given = parser.parse_args()
    effects = given.directory / "effects"
    if given.what == "check":
        done = effects.read_text().splitlines() if effects.exists() else []
        return 0 if given.incident in done else 1
    if given.what == "undo":
        append(given.directory / "undone", given.incident)
        return 0
    append(effects, given.incident)
    if not given.service.endswith("-sick"):
        request = urllib.request.Request(f"{given.url}/heal/{given.service}", method="POST")
        with urllib.request.urlopen(request, timeout=5):
            pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
