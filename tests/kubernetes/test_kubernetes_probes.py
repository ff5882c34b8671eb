"""What the probes ask, in trouble that a restart would not mend: the process stays up, says why, and recovers."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from cluster import free_port

pytestmark = pytest.mark.full


def ask(port: int, path: str) -> tuple[int, dict[str, object]]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_full_disk_and_a_lost_prometheus_do_not_end_the_agent(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("a file system of its own needs root")
    state = tmp_path / "state"
    state.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", state], check=True)
    port, ends = free_port(), free_port()
    environment = {**os.environ, "ALERTMEDIC_PROMETHEUS_URL": f"http://127.0.0.1:{ends}"}
    command = [sys.executable, "-m", "agent", "serve", "--listen", f"127.0.0.1:{port}", "--state-dir", str(state)]

    def start() -> subprocess.Popen[bytes]:
        made = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)

        def answers() -> bool:
            assert made.poll() is None
            try:
                return ask(port, "/-/healthy")[0] == 200
            except OSError:
                return False

        until(answers)
        return made

    process = start()
    try:
        fill = state / "fill"
        with contextlib.suppress(OSError), fill.open("wb", buffering=0) as file:
            while True:
                file.write(b"\0" * 4096)
        alert = {"status": "firing", "labels": {"alertname": "A", "note": "x" * 4000}, "annotations": {},
                 "startsAt": "2026-01-01T00:00:00Z", "endsAt": "0001-01-01T00:00:00Z", "fingerprint": "a"}  # fmt: skip
        answers = []
        for i in range(400):
            alerts = [{**alert, "labels": {**alert["labels"], "n": str(i)}, "fingerprint": f"{i:016x}"}]
            body = {"version": "4", "groupKey": f"g{i}", "receiver": "r", "status": "firing", "alerts": alerts,
                    "groupLabels": {}, "commonLabels": {}, "commonAnnotations": {}, "externalURL": ""}  # fmt: skip
            url, kind = f"http://127.0.0.1:{port}/webhook", {"Content-Type": "application/json"}
            request = urllib.request.Request(url, json.dumps(body).encode(), kind)
            try:
                answers.append(urllib.request.urlopen(request, timeout=10).status)
            except urllib.error.HTTPError as error:
                answers.append(error.code)
            if answers[-1] != 200:
                break
        assert answers[-1] == 503, answers[-3:]
        assert ask(port, "/-/healthy")[0] == 200, "liveness must not ask for a restart"
        status, said = ask(port, "/-/ready")
        assert status == 503
        assert "space" in str(said["journal"])
        assert process.poll() is None
        process.terminate()
        process.wait(60)
        process = start()  # the node restarted it: it comes up on the full disk too
        fill.unlink()
        until(lambda: ask(port, "/-/ready")[0] == 200)
    finally:
        process.kill()
        process.wait(30)
        subprocess.run(["umount", "-l", state], check=False)
