"""Worlds that cannot see each other, and end with whoever started them. Real namespaces, real kills."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import psutil
import pytest
from chaos_runs import run

from agent.chaos import isolation
from agent.chaos.isolation import Keeping, Task, TaskJob, Told, enclosed, obstacle, runs_of
from agent.chaos.scenario import load_scenarios
from agent.demo.children import WorldError

SCENARIOS = load_scenarios()
# Starts a second process, then tells what it sees, and stays. `settle_in` is the child's own.
INSIDE = """
import json, os, signal, socket, subprocess, sys
from agent.chaos.block import settle_in
settle_in()
other = subprocess.Popen(["sleep", "1000"])
port = socket.create_server(("127.0.0.1", 18080))
with socket.create_connection(("127.0.0.1", 18080), timeout=5):
    pass
print(json.dumps({"pid": os.getpid(), "pids": sorted(int(n) for n in os.listdir("/proc") if n.isdigit()),
    "links": [line.split(":")[0].strip() for line in open("/proc/net/dev") if ":" in line],
    "ambient": next(l.split()[1] for l in open("/proc/self/status") if l.startswith("CapAmb")),
    "other": other.pid, "space": os.stat("/proc/self/ns/pid").st_ino}), flush=True)
sys.stdin.read()
signal.pause()
"""


@pytest.fixture(autouse=True)
def _namespaces(program: Callable[[str, str], str]) -> None:
    program("unshare", "util-linux")
    program("setpriv", "util-linux")
    if why := obstacle():
        pytest.skip(f"no namespaces here: {why}")


def start(prefix: tuple[str, ...] = ()) -> subprocess.Popen[bytes]:
    argv = (*prefix, *enclosed((sys.executable, "-c", INSIDE)))
    env = {"PYTHONPATH": str(Path(isolation.__file__).parents[2]), "PATH": os.defpath}
    return subprocess.Popen(argv, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def told(process: subprocess.Popen[bytes]) -> dict[str, object]:
    assert process.stdout is not None
    line = process.stdout.readline()
    found: dict[str, object] = json.loads(line)
    return found


def members(space: object) -> list[int]:
    """Processes of that PID namespace, seen from here."""
    found = []
    for pid in psutil.pids():
        try:
            if Path(f"/proc/{pid}/ns/pid").stat().st_ino == space:
                found.append(pid)
        except OSError:
            continue
    return found


def until_gone(space: object) -> bool:
    deadline = time.monotonic() + 15
    while members(space) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not members(space)


@pytest.fixture
def two() -> Iterator[list[subprocess.Popen[bytes]]]:
    started = [start(), start()]
    yield started
    for process in started:
        process.kill()
        process.communicate()


def test_two_worlds_see_only_themselves_and_share_no_port(two: list[subprocess.Popen[bytes]]) -> None:
    seen = [told(process) for process in two]
    for world in seen:
        assert world["pid"] == 1
        assert world["pids"] == [1, world["other"]]
        assert world["links"] == ["lo"]
        if os.geteuid() != 0:
            assert int(str(world["ambient"]), 16) == 0
    assert seen[0]["space"] != seen[1]["space"]


def test_a_world_dies_whole_with_its_first_process(two: list[subprocess.Popen[bytes]]) -> None:
    seen = [told(process) for process in two]
    first = min(members(seen[0]["space"]), key=lambda pid: psutil.Process(pid).create_time())
    psutil.Process(first).kill()
    assert until_gone(seen[0]["space"])
    assert len(members(seen[1]["space"])) == 2


PARENT = """
import asyncio, sys
from agent.chaos.isolation import enclosed
async def main():
    child = await asyncio.create_subprocess_exec(*enclosed((sys.executable, "-c", sys.argv[1])),
        stdin=asyncio.subprocess.PIPE, start_new_session=True)
    await child.wait()
asyncio.run(main())
"""


def test_a_world_dies_with_a_killed_harness() -> None:
    env = {"PYTHONPATH": str(Path(isolation.__file__).parents[2]), "PATH": os.defpath}
    parent = subprocess.Popen([sys.executable, "-c", PARENT, INSIDE], env=env, stdout=subprocess.PIPE)
    world = told(parent)
    assert len(members(world["space"])) == 2
    parent.kill()
    parent.communicate()
    assert until_gone(world["space"])


def test_the_sandbox_enforces_in_a_world_what_it_enforces_outside() -> None:
    probe = "import sandbox; print(sandbox.current().enforced_by.value)"
    inside = "from agent.chaos.block import settle_in; settle_in(); " + probe
    env = {"PYTHONPATH": str(Path(isolation.__file__).parents[2]), "PATH": os.defpath}
    out = [
        subprocess.run(argv, env=env, capture_output=True, text=True, timeout=60, check=True).stdout
        for argv in ((sys.executable, "-c", probe), enclosed((sys.executable, "-c", inside)))
    ]
    assert out[0] == out[1]


def task(**more: object) -> Task:
    jobs = (TaskJob(scenario=SCENARIOS["db_lock"], repetition=1, seed=7),)
    return msgspec.structs.replace(Task(arm="auto", jobs=jobs, cpu=0, keeping=Keeping()), **more)


def test_task_and_runs_survive_the_pipe() -> None:
    whole = task()
    jobs = tuple(TaskJob(scenario=s, repetition=2, seed=5, kill_agent=True) for s in SCENARIOS.values())
    assert msgspec.json.decode(msgspec.json.encode(whole), type=Task) == whole
    decoded = msgspec.json.decode(msgspec.json.encode(task(jobs=jobs)), type=Task)
    assert [j.job("auto").scenario for j in decoded.jobs] == list(SCENARIOS.values())
    line = Told(run=run("db_lock", story=("a", "b")))
    assert msgspec.json.decode(msgspec.json.encode(line), type=Told) == line


async def test_a_child_that_fails_is_told_with_its_last_words(tmp_path: Path) -> None:
    place = tmp_path / "world-0"
    with pytest.raises(WorldError, match=r"last words:\n(?s:.*)IndexError"):
        async for _ in runs_of(task(jobs=()), place):
            pass
    assert not place.exists()


async def test_leaving_early_ends_the_child(tmp_path: Path) -> None:
    """While the world is being built: the end of its input is a word to stop."""
    place = tmp_path / "world-0"
    runs = runs_of(task(), place)
    first = asyncio.ensure_future(anext(runs))
    mine = psutil.Process()
    before = {c.pid for c in mine.children(recursive=True)}  # what other tests' servers are
    while not [c for c in mine.children(recursive=True) if "agent.chaos.block" in " ".join(c.cmdline())]:
        await asyncio.sleep(0.02)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    left = [c for c in mine.children(recursive=True) if c.pid not in before]
    assert not [c for c in left if c.status() != psutil.STATUS_ZOMBIE]
    assert not place.exists()
