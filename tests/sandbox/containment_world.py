"""A real agent whose sandbox runs attacks, and somebody outside who keeps asking after its health.

Used by test_containment_attacks.py. Run as a program it is the agent: `alertmedic serve`'s own code, which also takes
attacks as JSON lines on standard input and answers each with its RunResult.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import msgspec

import sandbox
from agent import app
from agent.config import load
from sandbox import Limits, Needs, RunResult

ROOT = Path(__file__).parents[2]
HEALTH_SECONDS = 20.0  # a health request that takes longer has failed; user-mode-linux has one slow CPU


class Agent:
    """The agent's process, seen from the test."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        env = {**os.environ, "PYTHONPATH": str(ROOT), "AGENT_SECRET": "the-agents-own-secret"}
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__)), str(directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=env,
            text=True,
            cwd=ROOT,
        )
        self.address = self._answer()["ready"]

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def attack(self, request: dict[str, Any]) -> RunResult:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return msgspec.convert(self._answer(), RunResult)

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the agent has ended: {self.process.poll()}"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def memory_bytes(self) -> int:
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGESIZE")

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            assert self.process.wait(30) == 0
        finally:
            self.process.kill()
            self.process.wait()


class Prober(threading.Thread):
    """Asks /-/healthy again and again. `failures` must stay empty."""

    def __init__(self, address: str) -> None:
        super().__init__(daemon=True)
        self.url = f"http://{address}/-/healthy"
        self.answered = 0
        self.slowest = 0.0
        self.failures: list[str] = []
        self._end = threading.Event()
        self._news = threading.Condition()

    def run(self) -> None:
        while not self._end.is_set():
            began = time.monotonic()
            try:
                with urllib.request.urlopen(self.url, timeout=HEALTH_SECONDS) as answer:
                    if answer.status != 200:
                        self.failures.append(f"status {answer.status}")
            except OSError as x:
                self.failures.append(f"{type(x).__name__}: {x}")
            with self._news:
                self.slowest = max(self.slowest, time.monotonic() - began)
                self.answered += 1
                self._news.notify_all()
            self._end.wait(0.02)

    def one_more(self) -> None:
        """Returns when a request that began after this call has been answered."""
        with self._news:
            target = self.answered + 2
            assert self._news.wait_for(lambda: self.answered >= target, 2 * HEALTH_SECONDS)

    def stop(self) -> None:
        self._end.set()
        self.join(HEALTH_SECONDS)


async def _serve(directory: str) -> int:
    """The service, and a line of attacks."""
    config = load(None, {}, {"listen": "127.0.0.1:0", "state_dir": f"{directory}/state"})
    ready = asyncio.get_running_loop().create_future()
    service = asyncio.create_task(app.serve(config, ready.set_result))
    _say({"ready": await ready})
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        request = json.loads(line)
        result = await sandbox.run(
            request["argv"],
            msgspec.convert(request["limits"], Limits),
            user=request.get("user", ""),
            needs=msgspec.convert(request.get("needs", {}), Needs),
            secrets=request.get("secrets", {}),
        )
        _say(msgspec.to_builtins(result))
    os.kill(os.getpid(), 15)  # its own way to end
    return await service


def _say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    sys.exit(asyncio.run(_serve(sys.argv[1])))
