"""What the tests of remediation know of the servers that their fixtures start.

A module with a name of its own: `conftest` is whichever of them was loaded last.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote


def wait_until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    """Polls until `condition()` is true; for what offers no event to wait for."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:.0f} s")
        time.sleep(0.02)


@dataclass
class Cluster:
    """A private PostgreSQL server on a unix socket."""

    bin: Path
    socket_dir: str
    user: str  # of the operating system

    def dsn(self, role: str = "medic", database: str = "postgres") -> str:
        return f"postgresql://{role}@/{database}?host={self.socket_dir}"

    def command(self, role: str, application: str = "") -> list[str]:
        extra = f"&application_name={quote(application)}" if application else ""
        return [str(self.bin / "psql"), "-X", "-q", "-A", "-t", "-d", self.dsn(role) + extra]

    def query(self, sql: str, role: str = "postgres") -> str:
        done = subprocess.run(
            [*self.command(role), "-v", "ON_ERROR_STOP=1", "-c", sql],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
        return done.stdout.strip()


@dataclass
class Supervised:
    url: str
    directory: Path
    control: list[str]

    def ctl(self, *words: str) -> str:
        return subprocess.run([*self.control, *words], capture_output=True, text=True, timeout=30, check=False).stdout
