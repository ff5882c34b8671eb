"""Ending real process groups, and what is never touched; looking at processes without touching them."""

from __future__ import annotations

import json
import os
import pwd
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from actions_started import wait_until
from actions_world import Proposal, builtin, context, in_sandbox, policy

import actions.builtin
from actions import guard
from actions.catalog import load_catalog
from actions.model import Declined, Plan, Refusal, Step
from actions.policy import ProtectedPolicy
from sandbox.model import RunResult

Start = Callable[..., "subprocess.Popen[str]"]
READY = "print('ready', flush=True)\n"
HOG = "import time\n" + READY + "time.sleep(600)"
STUBBORN = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + READY + "time.sleep(600)"
FAMILY = (
    "import os, time\nfor _ in range(3):\n    os.fork()\nif os.getpid() == os.getpgid(0): " + READY + "time.sleep(600)"
)
# Whoever is told to end starts a brother first.
BREEDER = (
    "import os, signal, time\n"
    "def more(*_):\n    os.fork()\n"
    "signal.signal(signal.SIGTERM, more)\n" + READY + "while True: time.sleep(1)"
)
STRANGER = 2  # a pid that is no ancestor of anything here, in the place of the agent's


def alive(pgid: int) -> list[int]:
    found = []
    for p in psutil.process_iter(["pid", "status"]):
        try:
            if os.getpgid(p.pid) == pgid and p.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(p.pid)
        except ProcessLookupError:
            continue
    return found


async def plan_for(process: subprocess.Popen[str], *, agent: bool = False, **more: Any) -> Plan | Declined:
    """As the diagnosis would propose it: pid, start time by the clock, group."""
    params = {"pid": process.pid, "start": psutil.Process(process.pid).create_time(), "pgid": process.pid, "grace": 1}
    proposal = Proposal(action="process.terminate_group", service="node-1", params=params | more.pop("params", {}))
    world = context(inventory={"node-1": {}} | more.pop("inventory", {}), targets=(), values={}, **more)

    async def run(argv: tuple[str, ...], limits: Any, secrets: Any, needs: Any) -> RunResult:
        return await in_sandbox(argv if agent else disguised(argv), limits, None, needs)

    return await guard.consider(proposal, load_catalog(), world, run)


def disguised(argv: tuple[str, ...]) -> tuple[str, ...]:
    """The test is the parent of what it wants ended, and is not the agent."""
    return tuple(f"--agent-pid={STRANGER}" if a.startswith("--agent-pid=") else a for a in argv)


async def run_step(step: Step, what: str = "argv") -> RunResult:
    return await in_sandbox(disguised(getattr(step, what)), step.limits, None, step.needs)


async def one_step(process: subprocess.Popen[str], **more: Any) -> Step:
    made = await plan_for(process, **more)
    assert isinstance(made, Plan), made
    return made.steps[0]


@pytest.mark.parametrize(
    "source", [HOG, STUBBORN, FAMILY, BREEDER], ids=["plain", "ignores SIGTERM", "family", "breeder"]
)
async def test_the_whole_group_ends(group: Start, source: str) -> None:
    process = group(source)
    step = await one_step(process)
    assert (await run_step(step, "check")).exit_code == 1
    result = await run_step(step)
    assert result.ok, result
    assert alive(process.pid) == []
    assert (await run_step(step, "check")).exit_code == 0
    assert (await run_step(step)).exit_code == 93  # nothing is left to end


async def test_a_stopped_process_ends_too(group: Start) -> None:
    process = group(HOG)
    os.kill(process.pid, signal.SIGSTOP)
    wait_until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_STOPPED)
    assert (await run_step(await one_step(process))).ok
    assert process.wait(10) == -signal.SIGTERM


async def test_others_are_left_alone(group: Start) -> None:
    process, other = group(HOG), group(HOG)
    assert (await run_step(await one_step(process))).ok
    assert other.poll() is None


@pytest.mark.parametrize("change", [{"start": -100.0}, {"pgid": None}, {"pid": None}], ids=["start", "group", "pid"])
async def test_another_identity_plans_nothing(group: Start, change: dict[str, Any]) -> None:
    process, other = group(HOG), group(HOG)
    params: dict[str, Any] = {}
    if "start" in change:
        params["start"] = psutil.Process(process.pid).create_time() + change["start"]
    else:
        params[next(iter(change))] = other.pid
        params["start"] = psutil.Process(process.pid).create_time()
    answer = await plan_for(process, params=params)
    assert isinstance(answer, Declined), answer
    assert answer.reason is Refusal.EMPTY_TARGET


async def test_a_group_that_was_replaced_since_the_plan_is_left_alone(group: Start) -> None:
    process = group(HOG)
    step = await one_step(process)
    argv = tuple(re.sub(r"^(--members=\d+):\d+$", r"\1:1", a) for a in disguised(step.argv))
    assert argv != disguised(step.argv)
    result = await in_sandbox(argv, step.limits, None, step.needs)
    assert result.exit_code == 93
    assert process.poll() is None


LISTENING = (
    "import socket, time\ns = socket.create_server(('127.0.0.1', 0))\n"
    "print('ready', flush=True)\nprint(s.getsockname()[1], flush=True)\n"
)


def port_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


async def refused(process: subprocess.Popen[str], words: str, **more: Any) -> None:
    answer = await plan_for(process, **more)
    assert isinstance(answer, Declined), answer
    assert answer.reason is Refusal.PROTECTED_TARGET
    assert words in answer.detail
    assert process.poll() is None


async def test_the_owner_of_a_known_port_is_protected(group: Start) -> None:
    process = group(LISTENING + "time.sleep(600)")
    port = port_of(process)
    inventory = {"orders": {"listen_port": port}}
    await refused(process, f"listens on port {port}", inventory=inventory)
    # And at execution, when it became one only after the plan.
    step = await one_step(process)
    late = await in_sandbox((*disguised(step.argv), f"--known-ports={port}"), step.limits, None, step.needs)
    assert late.exit_code == 93
    # Without the right to look into it nobody can say that it owns none: protected.
    blind = await in_sandbox((*disguised(step.argv), f"--known-ports={port}"), step.limits)
    assert blind.exit_code == 93
    assert process.poll() is None


async def test_a_worker_of_a_known_service_is_protected(group: Start) -> None:
    source = LISTENING + (
        "import os\npid = os.fork()\nif not pid:\n"
        "    os.setsid()\n    s.close()\n    print(os.getpid(), flush=True)\ntime.sleep(600)"
    )
    parent = group(source)
    port, child = port_of(parent), int(port_of(parent))
    try:
        start = psutil.Process(child).create_time()
        arguments = ["--agent-pid=2", f"--pid={child}", f"--pgid={child}", f"--start={start}"]
        free = await builtin("process_group", "resolve", *arguments)
        assert json.loads(free.stdout)[0]["identity"].startswith(f"pid={child},")
        kept = await builtin("process_group", "resolve", *arguments, f"--known-ports={port}")
        assert kept.exit_code == 93
        assert f"port {port}" in kept.stderr
    finally:
        os.kill(child, signal.SIGKILL)


async def test_names_and_owners_of_the_policy_are_protected(group: Start) -> None:
    process = group("open('/proc/self/comm', 'w').write('precious')\n" + HOG)
    await refused(process, "is called precious", policy=policy(protected=ProtectedPolicy(processes=("x", "prec*"))))
    me = pwd.getpwuid(os.geteuid()).pw_name
    await refused(process, f"protected user {me}", policy=policy(protected=ProtectedPolicy(users=("nobody", me))))
    await refused(process, f"protected user {me}", policy=policy(protected=ProtectedPolicy(users=(f"{me[:2]}*",))))


async def test_names_longer_than_the_kernel_keeps_are_protected(tmp_path: Path) -> None:
    """comm has 15 characters; people write the whole name."""
    program = tmp_path / "precious-daemon-of-the-shop"
    program.symlink_to("/bin/sleep")
    script = tmp_path / "precious-script-of-the-shop"
    script.write_text("#!/bin/sh\nsleep 600\n")
    script.chmod(0o755)
    for path in (program, script):
        process = subprocess.Popen([str(path), "600"], start_new_session=True, text=True)
        try:
            watched = psutil.Process(process.pid)
            wait_until(lambda w=watched: w.name().startswith("precious"))  # type: ignore[misc]
            protected = ProtectedPolicy(processes=("precious-*-of-the-shop",))
            await refused(process, f"is called {path.name}", policy=policy(protected=protected))
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.mark.parametrize("name", ["postgres", "sshd", "supervisord", "systemd", "dockerd", "prometheus"])
async def test_data_stores_and_supervisors_are_protected(group: Start, name: str) -> None:
    process = group(f"open('/proc/self/comm', 'w').write('{name}')\n" + HOG)
    await refused(process, f"is called {name}")


@pytest.mark.parametrize(
    ("name", "words"), [("supervisord", "is supervised by supervisord"), ("sshd", "login session")]
)
async def test_children_of_supervisors_and_of_sshd_are_protected(group: Start, name: str, words: str) -> None:
    source = (
        f"import os, time\nopen('/proc/self/comm', 'w').write('{name}')\n"
        "pid = os.fork()\nif not pid:\n    os.setsid()\n    open('/proc/self/comm', 'w').write('job')\n"
        "    print('ready', flush=True)\n    print(os.getpid(), flush=True)\ntime.sleep(600)"
    )
    parent = group(source)
    child = int(port_of(parent))
    try:
        start = psutil.Process(child).create_time()
        arguments = ["--agent-pid=2", f"--pid={child}", f"--pgid={child}", f"--start={start}"]
        result = await builtin("process_group", "resolve", *arguments)
        assert result.exit_code == 93
        assert words in result.stderr
    finally:
        os.kill(child, signal.SIGKILL)


async def test_the_agent_and_what_it_started_are_protected(group: Start) -> None:
    answer = await plan_for(group(HOG), agent=True)  # the test stands for the agent, and is its parent
    assert isinstance(answer, Declined)
    assert answer.reason is Refusal.PROTECTED_TARGET
    assert "started by the agent" in answer.detail


async def test_pid_one_ancestors_and_kernel_threads_are_protected() -> None:
    me = psutil.Process()
    candidates = [me, *me.parents()]
    candidates += [p for p in psutil.process_iter() if p.pid == 2 or p.ppid() == 2][:2]
    tried = 0
    for p in candidates:
        pgid = os.getpgid(p.pid)
        arguments = [f"--agent-pid={os.getpid()}", f"--pid={p.pid}", f"--pgid={pgid}", f"--start={p.create_time()}"]
        result = await builtin("process_group", "resolve", *arguments)
        # The leader of its group, pid 1, or a kernel thread: refused; everything else is a wrong identity.
        assert result.exit_code == 93 or result.stdout.strip() == "[]", (p, result)
        tried += result.exit_code == 93
    assert tried
    assert (await builtin("process_group", "run", "--agent-pid=2", "--pid=1", "--pgid=1", "--start=0")).exit_code == 93


async def test_a_capture_shows_the_service_and_touches_nothing(group: Start) -> None:
    source = LISTENING + (
        "import threading\nfor _ in range(3):\n"
        "    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()\ntime.sleep(600)"
    )
    process = group(source)
    port = port_of(process)
    with socket.create_connection(("127.0.0.1", int(port))):
        world = context(inventory={"orders": {"listen_port": port}}, targets=(), values={})
        proposal = Proposal(action="diagnostic.capture", service="orders")
        made = await guard.consider(proposal, load_catalog(), world, in_sandbox)
        assert isinstance(made, Plan), made
        assert made.steps[0].read_only
        result = await in_sandbox(made.steps[0].argv, made.steps[0].limits, None, made.steps[0].needs)
    assert result.ok, result
    assert result.stdout_dropped == 0
    document = json.loads(result.stdout)
    (found,) = document["service"]
    assert found["pid"] == process.pid
    assert found["threads"] == 4
    assert found["open_files"]["socket"] >= 1
    assert found["tcp"]["listen"] == 1
    assert found["limits"]["Max open files"]
    assert document["top_memory"][0]["rss_bytes"] >= document["top_memory"][-1]["rss_bytes"]
    assert process.poll() is None


async def test_a_capture_without_a_port_shows_the_host() -> None:
    result = await builtin("diagnostic", "run")
    assert result.ok
    document = json.loads(result.stdout)
    assert document["service"] == []
    assert document["host"]["cpus"] == os.cpu_count()


def test_a_capture_is_bounded() -> None:
    from actions.builtin.diagnostic import bounded

    text = bounded({"a": [{"x": "y" * 100}] * 50, "b": [1]}, 2000)
    assert len(text) <= 2000
    assert json.loads(text)["left_out"] > 30
    assert sys.getsizeof(text) < 4000


def test_a_check_that_crashes_does_not_say_that_nothing_has_happened() -> None:
    """Python's exit code for a traceback is 1, which would mean that, and the action would be done again."""
    source = "import sys; from actions.builtin import crashed; sys.excepthook = crashed; print('x', end=''); 1 / 0"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (94, "x")
    assert "ZeroDivisionError" in done.stderr
    for program in ("feature_flag", "free_logs", "postgres", "process_group", "supervisord", "systemd", "workers"):
        text = Path(actions.builtin.__file__).with_name(f"{program}.py").read_text()
        assert "    sys.excepthook = crashed\n    sys.exit(main())" in text, program
