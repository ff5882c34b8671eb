"""What holds a run on this host, and looking at what a run left behind. Used by the sandbox's tests."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import sandbox

HERE = sandbox.probe()  # once: the answer cannot change while the tests run
UNHELD = sandbox.Capability(sandbox.EnforcedBy.RLIMITS, reason="the test wants none")

TABLE: list[tuple[str, str, str, str]] = []  # attack, how it ran, contained by, all layers; printed at the end


def alive(pid: int) -> bool:
    """Is there a process of that number that still does something? A zombie waits for a parent that may never ask."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def remains(leaf: str) -> list[str]:
    """What is left of the run in that leaf: its cgroup, its working directory. Nothing for a run without a leaf."""
    if not leaf:
        return []
    places = [Path(tempfile.gettempdir(), f"alertmedic-{leaf}")]
    if HERE.root is not None:
        places.append(HERE.root / leaf)
    return [str(p) for p in places if p.exists()]


async def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Waits for what only the file system can tell; fails at the deadline."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s"
        await asyncio.sleep(0.005)
