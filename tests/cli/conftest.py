"""Fixtures of the command-line tests: a journal with incidents in it, and a real running service."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cli_world import Service, environment


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """`serving(state_dir)` starts `alertmedic serve` on a free port and waits until it listens."""
    started: list[subprocess.Popen[bytes]] = []

    def start(state_dir: Path, *arguments: str, **env: str) -> Service:
        log = tmp_path / f"serve-{len(started)}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "agent",
                    "serve",
                    "--listen",
                    "127.0.0.1:0",
                    "--state-dir",
                    str(state_dir),
                    *arguments,
                ],
                stderr=out,
                stdout=out,
                env=environment(**env),
            )
        started.append(process)
        deadline = time.monotonic() + 60.0
        while time.monotonic() < deadline:
            if found := re.search(r"listens on 127\.0\.0\.1:(\d+)", log.read_text()):
                return Service(int(found[1]), process, state_dir)
            assert process.poll() is None, log.read_text()
            time.sleep(0.02)
        pytest.fail(f"serve did not listen within 60 s: {log.read_text()}")

    yield start
    for process in started:
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
        process.wait(30)
