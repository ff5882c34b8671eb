"""What stands in for cgroups on a host that has none: rlimits, and a tree kill by looking for the processes."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from sandbox_traces import alive, until

import sandbox
from sandbox import EnforcedBy, Limits, processes, run

pytestmark = pytest.mark.usefixtures("rlimits_only")
PYTHON = [sys.executable, "-I", "-S", "-c"]


async def test_address_space_and_cpu_time_are_limited() -> None:
    limits = Limits(memory_bytes=100 << 20, timeout_seconds=8, cpu_quota_us=50_000)
    result = await run(["cat", "/proc/self/limits"], limits)
    found = {line[:26].strip(): line[26:].split()[0] for line in result.stdout.splitlines()}
    assert int(found["Max address space"]) == 400 << 20
    assert int(found["Max cpu time"]) == 6  # half a CPU for 8 s, rounded up generously
    assert result.enforced_by is EnforcedBy.RLIMITS
    assert (result.memory_peak_bytes, result.pids_refused, result.oom_killed) == (None, None, False)


async def test_memory_beyond_the_limit_is_refused() -> None:
    hungry = "try:\n b = bytearray(1 << 30)\nexcept MemoryError:\n print('refused')"
    assert (await run([*PYTHON, hungry], Limits(memory_bytes=64 << 20))).stdout == "refused\n"


async def test_there_is_no_leaf() -> None:
    assert sandbox.leaf_name() == ""
    assert (await run(["true"], Limits())).leaf == ""
    assert await sandbox.kill_leaf("", 1.0) is False
    assert await sandbox.kill_leaf("run-0123456789abcdef", 1.0) is False


async def test_required_limits_are_refused_in_words() -> None:
    with pytest.raises(sandbox.SandboxUnavailable, match="'true' not started: the test wants none"):
        await run(["true"], Limits(), protection="required")


FORKING = """
import os, sys, time
os.write(os.open(sys.argv[1], os.O_WRONLY), b"up")
while True:
    if os.fork():
        os._exit(0)
    time.sleep(0.001)
"""


async def test_a_process_that_keeps_forking_away_is_caught(tmp_path: Path) -> None:
    """Every generation lives a millisecond, so that no look at /proc finds it. All of them hold the writing end of a
    FIFO: its reader sees the end of the file only when the last one is dead."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        task = asyncio.create_task(
            run(["/bin/sh", "-c", '"$@" & wait; sleep 100', "", *PYTHON, FORKING, str(fifo)], Limits())
        )
        await until(lambda: _read(reader) == b"up")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: _read(reader) == b"")
    finally:
        os.close(reader)


def _read(descriptor: int) -> bytes | None:
    """What is there to read: b"" once nobody can write any more, None while somebody could and did not."""
    try:
        return os.read(descriptor, 16)
    except BlockingIOError:
        return None


ABANDONING = """
import asyncio, sandbox, sys
from pathlib import Path
sandbox.use(sandbox.Capability(sandbox.EnforcedBy.RLIMITS, reason="none"))
script = f"setsid sleep 1003 & echo $! > {sys.argv[1]}; wait"
asyncio.run(sandbox.run(["/bin/sh", "-c", script], sandbox.Limits(timeout_seconds=300)))
"""


async def test_what_a_dead_agent_left_without_a_leaf_is_ended_at_the_start(tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    agent = subprocess.Popen([sys.executable, "-c", ABANDONING, str(mark)])
    await until(lambda: mark.exists() and mark.read_text().endswith("\n"))
    survivor = int(mark.read_text())
    cookie = processes.psutil.Process(survivor).environ()[processes.COOKIE]
    workdir = Path(tempfile.gettempdir(), f"alertmedic-{cookie}")
    assert workdir.is_dir()
    assert cookie not in await sandbox.sweep(10.0), "its agent is alive"
    agent.kill()
    agent.wait()
    assert alive(survivor)
    assert cookie in await sandbox.sweep(10.0)
    assert not alive(survivor)
    assert not workdir.exists()


def test_tree_kill_takes_its_own_and_nobody_else() -> None:
    def started(session: bool, cookie: str) -> subprocess.Popen[bytes]:
        env = {"PATH": "/usr/bin:/bin", processes.COOKIE: cookie}
        return subprocess.Popen(["sleep", "1000"], env=env, start_new_session=session)

    root, marked, other = started(True, "mine"), started(True, "mine"), started(True, "theirs")
    try:
        assert processes.kill_tree(root.pid, "mine", 10.0)
        assert root.wait(10) == marked.wait(10) == -9
        assert other.poll() is None
        assert processes.kill_tree(root.pid, "mine", 10.0), "nothing left is no failure"
    finally:
        for process in (root, marked, other):
            process.kill()
            process.wait()
