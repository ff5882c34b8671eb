"""Facts about this machine, checked against processes that the test starts."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
from sources_world import Query

from agent.sources import EvidenceRequest, gather
from agent.sources.host import EVIDENCE, MAX_PROCESSES, SECRET, HostQuery, HostSource
from rules.model import Evidence, Fact

LISTENER = """
import socket, subprocess, sys, time
s = socket.socket(); s.bind(("127.0.0.1", 0)); s.listen()
child = subprocess.Popen([sys.executable, "-c", "import time\\nprint('up', flush=True)\\ntime.sleep(600)"],
                         stdout=subprocess.PIPE)
child.stdout.readline()
print(s.getsockname()[1], child.pid, flush=True)
time.sleep(600)
"""
BUSY = "print('up', flush=True)\nwhile True: pass"
IDLE = "print('up', flush=True)\nimport time\ntime.sleep(600)"

Start = Callable[..., tuple[subprocess.Popen[bytes], list[str]]]


@pytest.fixture
def start() -> Iterator[Start]:
    """`start(code, *arguments)` gives a python process and the words of its first line."""
    with ExitStack() as stack:

        def begin(code: str, *arguments: str) -> tuple[subprocess.Popen[bytes], list[str]]:
            argv = [sys.executable, "-c", code, *arguments]
            process = subprocess.Popen(argv, stdout=subprocess.PIPE, start_new_session=True)

            def end() -> None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(10)

            stack.callback(end)
            assert process.stdout is not None
            return process, process.stdout.readline().decode().split()

        yield begin


async def look(source: HostSource, deadline: float = 30.0) -> Evidence:
    (evidence,) = await gather([source], EvidenceRequest((HostQuery(),), (), 0.0, 1.0), deadline)
    assert evidence.missing is None
    return evidence


def facts(evidence: Evidence, kind: str) -> list[Fact]:
    return [f for f in evidence.facts if f.kind == kind]


def process_fact(evidence: Evidence, pid: int) -> Fact:
    (fact,) = [f for f in facts(evidence, "host.process") if f.attributes["pid"] == pid]
    return fact


async def test_a_process_that_listens_and_its_children_belong_to_the_service(start: Start) -> None:
    process, (port, child) = start(LISTENER)
    stranger, _ = start(BUSY)
    evidence = await look(HostSource({"orders": {"listen_port": port}, "away": {"listen_port": port, "host": "db-7"}}))
    own = process_fact(evidence, process.pid)
    created = psutil.Process(process.pid).create_time()
    assert own.service == "orders"
    assert own.subject == f"pid={process.pid},start={created:.2f}"
    assert own.attributes["start"] == created
    assert process_fact(evidence, int(child)).service == "orders"
    assert process_fact(evidence, stranger.pid).service == ""
    (listener,) = facts(evidence, "host.listener")
    assert (listener.subject, listener.service) == (f"port={port}", "orders")
    assert listener.attributes["present"] is True
    assert (listener.attributes["pid"], listener.attributes["start"]) == (process.pid, created)
    assert listener.attributes["address"] == f"127.0.0.1:{port}"
    assert listener.attributes["status"] == "sleeping"


async def test_what_is_told_of_a_process(start: Start) -> None:
    process, (port, _) = start(LISTENER, "--password=hunter2", "x" * 1000, "a\nb\x1b[31m")
    found = psutil.Process(process.pid)
    a = process_fact(await look(HostSource({"orders": {"listen_port": port}})), process.pid).attributes
    assert a["pgid"] == process.pid
    assert a["ppid"] == os.getpid()
    assert a["name"] == found.name()
    assert a["user"] == found.username()
    assert a["status"] == "sleeping"
    assert a["cpus"] == ",".join(map(str, found.cpu_affinity()))
    assert (a["threads"], a["fds"]) == (found.num_threads(), found.num_fds())
    assert isinstance(a["rss_bytes"], int)
    assert a["rss_bytes"] > 1_000_000
    assert isinstance(a["cmdline"], str)
    assert len(a["cmdline"]) <= 256
    assert "hunter2" not in a["cmdline"]
    assert a["cmdline"].isprintable()


async def test_a_busy_process_shows_its_cpu_and_an_affinity_its_cpus(start: Start) -> None:
    busy, _ = start(BUSY)
    psutil.Process(busy.pid).cpu_affinity([0])
    evidence = await look(HostSource({}))
    fact = process_fact(evidence, busy.pid)
    assert isinstance(fact.attributes["cpu_percent"], float)
    assert fact.attributes["cpu_percent"] > 2.0  # it shares this machine's CPUs with whatever else runs
    assert fact.attributes["cpus"] == "0"
    assert fact.attributes["status"] == "running"


SHARED = """
import os, socket, threading
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
s = socket.socket(); s.bind(("127.0.0.1", 0)); s.listen()
if os.fork() == 0:
    while True: pass
print(s.getsockname()[1], flush=True)
while True: pass
"""


async def test_a_service_that_shares_its_cpu_waits_for_it(start: Start) -> None:
    """Two busy loops on one CPU: each waits about half of the time, by the kernel's account."""
    _, (port,) = start(SHARED)
    evidence = await look(HostSource({"shop": {"listen_port": port}}))
    waits = [
        f.attributes["cpu_wait_percent"] for f in evidence.facts if f.service == "shop" and f.kind == "host.process"
    ]
    assert any(isinstance(wait, float) and 15 < wait < 101 for wait in waits), waits
    others = [f for f in evidence.facts if f.kind == "host.process" and not f.service]
    assert not [f for f in others if "cpu_wait_percent" in f.attributes]


async def test_an_idle_service_waits_for_no_cpu(start: Start) -> None:
    listener = "import socket, time\ns = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen()\n"
    process, (port,) = start(listener + "print(s.getsockname()[1], flush=True)\ntime.sleep(600)")
    async with asyncio.timeout(30):
        while psutil.Process(process.pid).status() != psutil.STATUS_SLEEPING:  # it has told its port a moment before
            await asyncio.sleep(0.01)
    evidence = await look(HostSource({"shop": {"listen_port": port}}))
    waits = [
        f.attributes["cpu_wait_percent"] for f in evidence.facts if f.service == "shop" and f.kind == "host.process"
    ]
    assert waits == [0.0]


async def test_a_stopped_process_is_told_as_stopped(start: Start) -> None:
    process, (port, _) = start(LISTENER)
    os.kill(process.pid, signal.SIGSTOP)
    os.waitpid(process.pid, os.WUNTRACED)
    evidence = await look(HostSource({"orders": {"listen_port": port}}))
    assert process_fact(evidence, process.pid).attributes["status"] == "stopped"
    assert facts(evidence, "host.listener")[0].attributes["status"] == "stopped"


async def test_a_service_that_is_gone_has_no_listener() -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))  # bound, not listening
        evidence = await look(HostSource({"orders": {"listen_port": str(s.getsockname()[1])}}))
    (listener,) = facts(evidence, "host.listener")
    assert listener.service == "orders"
    assert listener.attributes == {"present": False}


async def test_the_agents_own_tree_is_marked(start: Start) -> None:
    process, (port, child) = start(LISTENER)
    inventory = {"orders": {"listen_port": port}}
    agent_is_child = await look(HostSource(inventory, own_pid=int(child)))
    agent_is_parent = await look(HostSource(inventory, own_pid=process.pid))
    stranger, (other, _) = start(LISTENER)
    elsewhere = await look(HostSource({**inventory, "other": {"listen_port": other}}, own_pid=stranger.pid))
    for evidence in (agent_is_child, agent_is_parent):
        assert process_fact(evidence, process.pid).attributes["self"] is True
        assert process_fact(evidence, int(child)).attributes["self"] is True
    assert process_fact(elsewhere, process.pid).attributes["self"] is False
    assert process_fact(elsewhere, stranger.pid).attributes["self"] is True


async def test_processes_that_vanish_while_looking_are_left_out(start: Start) -> None:
    """A hundred processes that come and go during the look, and one that stays."""
    process, (port, _) = start(LISTENER)
    source = HostSource({"orders": {"listen_port": port}})
    task = asyncio.create_task(look(source))
    while not task.done():
        short = await asyncio.create_subprocess_exec("/bin/true")
        await short.wait()
    evidence = await task
    assert process_fact(evidence, process.pid).service == "orders"


async def test_facts_are_bounded_and_of_known_kinds_and_plain() -> None:
    evidence = await look(HostSource({}))
    kinds = {f.kind for f in evidence.facts}
    assert kinds >= {"host.process", "host.cpu", "host.memory", "host.disk"}
    assert kinds <= {"host.process", "host.cpu", "host.memory", "host.disk", "host.pressure"}
    assert len(facts(evidence, "host.process")) <= MAX_PROCESSES
    for fact in evidence.facts:
        assert all(isinstance(v, str | int | float | bool) for v in fact.attributes.values())
    assert len({f.subject for f in facts(evidence, "host.process")}) == len(facts(evidence, "host.process"))


async def test_cpu_memory_and_disks(tmp_path: Path) -> None:
    root = tmp_path / "logs" / "not" / "yet"
    evidence = await look(HostSource({"orders": {"log_root": str(root)}, "worker": {"log_root": str(root)}}))
    (cpu,) = facts(evidence, "host.cpu")
    assert cpu.attributes["count"] == psutil.cpu_count()
    assert isinstance(cpu.attributes["percent"], float)
    assert 0.0 <= cpu.attributes["percent"] <= 100.0
    (memory,) = facts(evidence, "host.memory")
    assert memory.attributes["total_bytes"] == psutil.virtual_memory().total
    (disk,) = [f for f in facts(evidence, "host.disk") if f.attributes["services"]]
    assert disk.attributes["services"] == "orders,worker"
    assert disk.attributes["total_bytes"] == psutil.disk_usage(str(tmp_path)).total


async def test_pressure_where_the_kernel_tells_it() -> None:
    path = Path("/proc/pressure/cpu")
    try:
        path.read_text()
    except OSError:
        pytest.skip("this kernel has no pressure stall information (CONFIG_PSI)")
    evidence = await look(HostSource({}))
    (cpu,) = [f for f in facts(evidence, "host.pressure") if f.subject == "cpu"]
    assert set(cpu.attributes) >= {"some_avg10", "some_avg60", "some_avg300"}


async def test_looks_take_turns_and_a_late_one_is_missing() -> None:
    source = HostSource({}, look_seconds=5.0)
    request = EvidenceRequest((HostQuery(),), (), 0.0, 1.0)
    (evidence,) = await source.fetch(request, 0.0)
    assert evidence.missing == "timeout after 0 s"
    assert evidence.facts == ()


async def test_another_question_is_missing() -> None:
    (evidence,) = await gather([HostSource({})], EvidenceRequest((Query("host.gpu", "", "host"),), (), 0, 1), 5.0)
    assert evidence.missing == f"the host source knows {EVIDENCE} only"


@pytest.mark.parametrize("port", ["x", "0", "65536", "-1", "٣", "1.5"])
def test_a_port_that_is_none_is_refused(port: str) -> None:
    with pytest.raises(ValueError, match="listen_port"):
        HostSource({"a": {"listen_port": port}})


SECRETS = ["--password=hunter2", "--db-password hunter2", "TOKEN=hunter2", "--api-key=hunter2", "pg://u:hunter2@h/db"]


@pytest.mark.parametrize("text", SECRETS)
def test_secrets_in_a_command_line_are_masked(text: str) -> None:
    assert "hunter2" not in SECRET.sub(r"\1***", f"prog {text} --verbose")
    assert "--verbose" in SECRET.sub(r"\1***", f"prog {text} --verbose")
