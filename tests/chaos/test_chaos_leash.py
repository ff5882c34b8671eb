"""What the injector started dies with it, also when it is killed; with the environment that it has in the world."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable

import psutil
import pytest

SHOP = dict.fromkeys(("front", "orders", "worker", "payments", "database", "supervisor"), "")


@pytest.mark.parametrize(("module", "fault"), [("agent.demo.faults", "cpu_hog"), ("agent.chaos.faults", "cpu_burst")])
def test_a_killed_injector_leaves_nothing_running(module: str, fault: str, program: Callable[[str, str], str]) -> None:
    program("setpriv", "util-linux")
    pipe = subprocess.PIPE
    injector = subprocess.Popen(
        [sys.executable, "-m", module], stdin=pipe, stdout=pipe, env={"PYTHONUNBUFFERED": "1"}, text=True
    )
    try:
        assert injector.stdin is not None
        assert injector.stdout is not None
        shop = SHOP | {"cpu": max(os.sched_getaffinity(0))}
        injector.stdin.write(json.dumps({"shop": shop}) + "\n" + json.dumps({"inject": fault}) + "\n")
        injector.stdin.flush()
        answer = json.loads(injector.stdout.readline())
        assert answer.get("injected") == fault, answer
        hogs = psutil.Process(injector.pid).children(recursive=True)
        assert hogs
    finally:
        injector.kill()
        injector.wait()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and any(h.is_running() and h.status() != "zombie" for h in hogs):
        time.sleep(0.02)
    assert not [h for h in hogs if h.is_running() and h.status() != "zombie"]
