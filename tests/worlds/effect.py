"""The action of the crash tests: a non-idempotent effect that leaves a line for each time it happens.

usage: effect.py do|check|undo --directory DIR --url URL --service SERVICE --incident ID

`do` appends a line to DIR/effects and heals the service at URL, unless its name says that it cannot be healed; `check`
ends with 0 if that is in effect (done, and not undone) and 1 if not; `undo` appends a line to DIR/undone.

Three files make it a worse program. DIR/slow lets `do` take its time before anything happens. DIR/kill holds the name
of a point (`do_begin`, `do_done`, `do_healed`, `check_begin`, `check_end`, `undo_begin`, `undo_done`) at which it kills
itself with SIGKILL, once. DIR/linger makes every `do` and `undo` leave a process behind that has gone to a session of
its own, twice removed, and ignores SIGTERM.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
import urllib.request
from pathlib import Path

LINGERS_SECONDS = 900.0
SLOW_SECONDS = 1.0


def append(path: Path, line: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(descriptor, f"{line}\n".encode())
    os.fsync(descriptor)
    os.close(descriptor)


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def point(directory: Path, name: str) -> None:
    """Ends this process here if the test wants that; the order is used up first, and the kill told of."""
    order = directory / "kill"
    try:
        if order.read_text().strip() != name:
            return
        order.unlink()
    except FileNotFoundError:
        return
    append(directory / "killed", name)
    os.kill(os.getpid(), signal.SIGKILL)


def linger() -> None:
    """A descendant that nobody waits for. Its command line is ours, and so names the test's directory."""
    if os.fork():
        return
    os.setsid()
    if os.fork():
        os._exit(0)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(LINGERS_SECONDS)
    os._exit(0)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("do", "check", "undo"))
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--url", required=True)
    parser.add_argument("--service", required=True)
    parser.add_argument("--incident", required=True)
    given = parser.parse_args()
    directory: Path = given.directory
    effects = directory / "effects"
    point(directory, f"{given.what}_begin")
    if given.what == "check":
        done = given.incident in lines(effects) and given.incident not in lines(directory / "undone")
        point(directory, "check_end")
        return 0 if done else 1
    if (directory / "linger").exists():
        linger()
    if given.what == "undo":
        append(directory / "undone", given.incident)
        point(directory, "undo_done")
        return 0
    if (directory / "slow").exists():
        time.sleep(SLOW_SECONDS)
    append(effects, given.incident)
    point(directory, "do_done")
    if not given.service.endswith("-sick"):
        request = urllib.request.Request(f"{given.url}/heal/{given.service}", method="POST")
        with urllib.request.urlopen(request, timeout=5):
            pass
    point(directory, "do_healed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
