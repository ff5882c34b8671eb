"""Leaves and what a restarted agent does about them. Needs a cgroup v2 tree, with or without limits."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sandbox_traces import alive, remains, until

import sandbox
from sandbox import Limits, cgroup, hardening, kill_leaf, launcher, leaf_name, run
from sandbox.cgroup import Leaf

pytestmark = pytest.mark.usefixtures("node")
FAILPOINTS = ["sandbox_before_spawn", "sandbox_after_spawn", "sandbox_after_exit", "sandbox_before_cleanup"]


def enter(leaf: Leaf, script: str = "exec sleep 1000") -> subprocess.Popen[bytes]:
    """A process in the leaf, as a crashed agent leaves one; it is in it when this returns."""
    command = ["/bin/sh", "-c", f'echo 0 > "$1" && echo in && {script}', "sh", str(leaf.procs)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == b"in\n"
    return process


async def test_the_program_is_in_its_leaf_from_its_first_instruction() -> None:
    leaf = leaf_name()
    result = await run(["cat", "/proc/self/cgroup"], Limits(), leaf=leaf)
    (line,) = (entry for entry in result.stdout.splitlines() if entry.startswith("0::"))
    assert line.endswith(f"/alertmedic/{leaf}")
    assert result.leaf == leaf
    assert not remains(leaf)


async def test_leaf_names_are_fresh() -> None:
    names = {leaf_name() for _ in range(1000)}
    assert len(names) == 1000


async def test_a_leaf_belongs_to_one_run(new_leaf: Callable[[str], Leaf]) -> None:
    old = new_leaf(leaf_name())
    result = await run(["true"], Limits(), leaf=old.path.name)
    assert "exists already" in result.error
    assert old.path.exists(), "it is not ours to remove"


async def test_kill_leaf_empties_and_removes(new_leaf: Callable[[str], Leaf]) -> None:
    leaf = new_leaf(leaf_name())
    workdir = Path(tempfile.gettempdir(), f"alertmedic-{leaf.path.name}")
    workdir.mkdir()
    (workdir / "file").touch()
    process = enter(leaf, "(setsid sleep 1000 &) ; exec sleep 1000")
    assert await kill_leaf(leaf.path.name, 10.0) is True
    assert process.wait(10) == -signal.SIGKILL
    assert not remains(leaf.path.name)


async def test_kill_leaf_also_takes_cgroups_made_inside(new_leaf: Callable[[str], Leaf]) -> None:
    leaf = new_leaf(leaf_name())
    (leaf.path / "a" / "b").mkdir(parents=True)
    process = enter(Leaf.at(leaf.path / "a" / "b"))
    assert await kill_leaf(leaf.path.name, 10.0) is True
    assert process.wait(10) == -signal.SIGKILL
    assert not leaf.path.exists()


async def test_kill_leaf_finds_the_leaf_of_an_agent_that_ran_elsewhere(node: Path) -> None:
    elsewhere = node.parent / f"alertmedic-test-{os.getpid()}"
    elsewhere.mkdir()
    leaf = Leaf.create(elsewhere, leaf_name())
    try:
        process = enter(leaf)
        assert await kill_leaf(leaf.path.name, 10.0) is True
        assert process.wait(10) == -signal.SIGKILL
        assert not leaf.path.exists()
    finally:
        if leaf.path.exists():
            leaf.kill(5.0)
            leaf.remove()
        elsewhere.rmdir()


async def test_kill_leaf_of_one_that_is_gone() -> None:
    assert await kill_leaf(leaf_name(), 1.0) is True
    assert await kill_leaf("", 1.0) is False


@pytest.mark.parametrize("name", ["../alertmedic", "a/b", "..", "cgroup.procs", "a b", "x" * 65])
async def test_kill_leaf_takes_no_path(name: str) -> None:
    with pytest.raises(ValueError, match="cannot be the name of a leaf"):
        await kill_leaf(name, 1.0)


async def test_a_launcher_that_finds_no_leaf_never_starts_the_program(tmp_path: Path, node: Path) -> None:
    """The agent dies right after the spawn, the next one kills the leaf: the launcher, late, must give up."""
    command = launcher.check(["touch", str(tmp_path / "ran")], {}, "", b"")
    procs = node / "run-gone" / "cgroup.procs"
    by_shell = hardening.Profile(locked=True)
    threads = hardening.threads(by_shell)
    late = threads.submit(launcher.spawn, command, Limits(), tmp_path, procs, frozenset(), by_shell)
    started = await asyncio.wrap_future(late)
    try:
        assert started.process.wait(20) == 125
        said = os.read(started.stderr, 4096)
        assert "cgroup.procs" in launcher.launch_error(started.secret, 125, said, changed_user=False)
    finally:
        for fd in (started.pidfd, started.stdout, started.stderr):
            os.close(fd)
    with pytest.raises(FileNotFoundError, match="run-gone"):
        launcher.spawn(command, Limits(), tmp_path, procs, frozenset())
    assert not (tmp_path / "ran").exists()


AGENT = """
import asyncio, dataclasses, sys
from pathlib import Path
import sandbox
if sys.argv[3:]:
    sandbox.use(dataclasses.replace(sandbox.current(), root=Path(sys.argv[3])))
leaf = sandbox.leaf_name()
Path(sys.argv[1], "leaf").write_text(leaf)
script = f"echo $$ > {sys.argv[1]}/pid; sleep 1000 & echo $! >> {sys.argv[1]}/pid; wait"
asyncio.run(sandbox.run(["/bin/sh", "-c", script], sandbox.Limits(timeout_seconds=float(sys.argv[2])), leaf=leaf))
Path(sys.argv[1], "survived").touch()
"""


@pytest.mark.parametrize("name", FAILPOINTS)
async def test_agent_killed_at_a_failpoint_leaves_nothing_after_kill_leaf(name: str, tmp_path: Path) -> None:
    env = {**os.environ, "ALERTMEDIC_FAILPOINT": name}
    timeout = "0.5" if name in ("sandbox_after_exit", "sandbox_before_cleanup") else "300"
    agent = await asyncio.create_subprocess_exec(sys.executable, "-c", AGENT, str(tmp_path), timeout, env=env)
    assert await agent.wait() == -signal.SIGKILL
    assert not (tmp_path / "survived").exists()
    leaf = (tmp_path / "leaf").read_text()
    assert remains(leaf), "a crashed agent cleans up nothing"
    if name == "sandbox_after_spawn":  # nobody watches over the program, which runs on
        pids = tmp_path / "pid"
        await until(lambda: pids.exists() and len(pids.read_text().split()) == 2)
        assert all(alive(int(p)) for p in pids.read_text().split())
    assert await kill_leaf(leaf, 10.0) is True
    assert not remains(leaf)
    if (tmp_path / "pid").exists():
        assert not [p for p in (tmp_path / "pid").read_text().split() if alive(int(p))]


@pytest.fixture
def own_node(node: Path) -> Iterator[Path]:
    """A node of the test's own: what other agents of this host have left is not for a test to sweep."""
    path = node.parent / f"alertmedic-test-{os.getpid()}"
    path.mkdir()
    cgroup.enable(path, owned=False)
    yield path
    whole = Leaf.at(path)
    whole.kill(5.0)
    whole.remove()


async def test_sweep_ends_what_dead_agents_left_and_nothing_else(
    tmp_path: Path, own_node: Path, held: sandbox.Capability
) -> None:
    env = {**os.environ, "ALERTMEDIC_FAILPOINT": "sandbox_after_spawn"}
    command = [sys.executable, "-c", AGENT, str(tmp_path), "300", str(own_node)]
    agent = await asyncio.create_subprocess_exec(*command, env=env)
    assert await agent.wait() == -signal.SIGKILL
    dead = (tmp_path / "leaf").read_text()
    sandbox.use(dataclasses.replace(held, root=own_node))
    ours = Leaf.create(own_node, leaf_name())
    strange = Leaf.create(own_node, f"run-1-{agent.pid}-1-abc")  # of another PID namespace
    assert (own_node / dead).exists()
    swept = await sandbox.sweep(10.0)  # other dead agents of this host may have left something, too
    assert dead in swept
    assert not {ours.path.name, strange.path.name} & set(swept)
    assert not (own_node / dead).exists()
    assert not remains(dead)
    assert ours.path.exists()
    assert strange.path.exists()


async def test_the_leaf_that_cannot_be_made_is_an_error_and_starts_nothing(
    tmp_path: Path, held: sandbox.Capability
) -> None:
    gone = sandbox.Capability(held.enforced_by, Path("/sys/fs/cgroup/no/such/node"), held.controllers)
    sandbox.use(gone)
    result = await run(["touch", str(tmp_path / "ran")], Limits())
    assert "/sys/fs/cgroup/no/such/node" in result.error
    assert not (tmp_path / "ran").exists()
