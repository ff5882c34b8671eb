"""Fixtures that every test directory may use."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "worlds"))  # what several directories build their tests on

SERVER_DIRS = ["/usr/sbin", "/sbin", *map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True))]
ALTERNATIVES = {
    "prometheus-alertmanager": ["alertmanager"],
    "prometheus-node-exporter": ["node_exporter"],
    "prometheus-postgres-exporter": ["postgres_exporter"],
}


def find_program(name: str) -> str | None:
    """The program's path, looked for on PATH and where Debian hides servers."""
    path = os.pathsep.join([os.environ.get("PATH", ""), *SERVER_DIRS])
    for candidate in (name, *ALTERNATIVES.get(name, [])):
        if found := shutil.which(candidate, path=path):
            return found
    return None


@pytest.fixture(scope="session")
def program() -> Callable[[str], str]:
    """`program("prometheus")` gives its path; absent, the test fails under CI=true and is skipped elsewhere."""

    def find(name: str, package: str = "") -> str:
        if found := find_program(name):
            return found
        message = f"{name} not found: install it (Debian: apt-get install {package or name}) or run `make test` as root"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)

    return find


@pytest.fixture
def free_port() -> Callable[[], int]:
    """`free_port()` gives a TCP port of the loopback that nobody listened on a moment ago."""

    def find() -> int:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port: int = s.getsockname()[1]
            return port

    return find
