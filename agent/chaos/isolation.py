"""A world of one's own: a block of runs in a child process that sees nobody else's processes, ports or files.

Called by `agent.chaos.run`. Agents that may act kill what takes their shop's CPU, so two worlds must not see each
other. The child (`agent.chaos.block`) is PID 1 of a PID namespace and has its own mounts (for its own /proc), network
(its ports cannot clash with anybody's), IPC and UTS namespace, by util-linux' `unshare`; where we are not root, in a
user namespace. When it ends, however it ends, the kernel ends everything in it; and it ends with the harness: by its
parent-death signal and by the end of its standard input. Where namespaces cannot be had `obstacle` says why; nothing
is isolated by halves.

Cgroups are not unshared: what the sandbox enforces in a world is what it enforces on the host.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from pathlib import Path

import msgspec

from agent.chaos.follow import Job
from agent.chaos.measure import Run
from agent.chaos.scenario import Scenario
from agent.demo.children import WorldError, bare_environment

PROBE_SECONDS = 20.0
GOODBYE_SECONDS = 30.0  # for a child to take its world down
TAIL_BYTES = 4000
MAX_LINE_BYTES = 1024 * 1024


class Keeping(msgspec.Struct, frozen=True, kw_only=True):
    """What is kept of a world. `worlds`: its directory; `record`: where recordings of its incidents go, "": none kept;
    `made_by`: what every run says of the version that made it."""

    worlds: bool = False
    record: str = ""
    made_by: str = ""


class TaskJob(msgspec.Struct, frozen=True, kw_only=True):
    """One job, complete: scenarios of the user's own reach a child that has none of his files."""

    scenario: Scenario
    repetition: int
    seed: int
    kill_agent: bool = False

    @classmethod
    def of(cls, job: Job) -> TaskJob:
        return cls(scenario=job.scenario, repetition=job.repetition, seed=job.seed, kill_agent=job.kill_agent)

    def job(self, arm: str) -> Job:
        return Job(self.scenario, arm, self.repetition, self.seed, self.kill_agent)


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """What a child is told on its standard input, one JSON object on one line."""

    arm: str
    jobs: tuple[TaskJob, ...]
    cpu: int  # that `orders` is pinned to
    keeping: Keeping


class Told(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of the child's standard output: a run, or how the world broke, or that there is nothing more to come."""

    run: Run | None = None
    broken: str = ""
    done: bool = False


def enclosed(argv: tuple[str, ...]) -> tuple[str, ...]:
    """The command that runs `argv` as PID 1 of a world of its own, and ends with whoever started it. Raises WorldError
    where util-linux is missing."""
    programs = {name: shutil.which(name, path=bare_environment()["PATH"]) for name in ("setpriv", "unshare")}
    if missing := [name for name, found in programs.items() if found is None]:
        raise WorldError(f"{', '.join(missing)} not found: apt-get install util-linux")
    prefix = [str(programs["setpriv"]), "--pdeathsig", "KILL", "--", str(programs["unshare"])]
    if os.geteuid() != 0:
        # The loopback must be brought up: capabilities of the new user namespace, which the child then gives up.
        prefix += ["--user", "--map-current-user", "--keep-caps"]
    prefix += ["--fork", "--kill-child=KILL", "--pid", "--mount", "--mount-proc", "--net", "--ipc", "--uts", "--"]
    return (*prefix, *argv)


@functools.cache
def obstacle() -> str:
    """Why worlds cannot be isolated here; "" where they can. Tried once, in full, with the child's own start."""
    try:
        tried = subprocess.run(
            enclosed((sys.executable, "-m", "agent.chaos.block", "--try")),
            env=_environment(Path(tempfile.gettempdir())),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=PROBE_SECONDS,
            check=False,
        )
    except (WorldError, OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    said = tried.stderr.decode(errors="replace").strip()[-300:]
    return "" if tried.returncode == 0 else said or f"unshare ended with status {tried.returncode}"


def _environment(directory: Path) -> Mapping[str, str]:
    """The child's: where to find the code if it is not installed, and a directory of its own for what is temporary."""
    root = str(Path(__file__).parents[2])
    mine = {"TMPDIR": str(directory), "PYTHONPATH": root, "PYTHONUNBUFFERED": "1"}
    return {**bare_environment(), **mine}


async def runs_of(task: Task, directory: Path) -> AsyncGenerator[Run, None]:
    """Makes the task's runs in a world of their own, each as it is done. `directory` is emptied and used for everything
    temporary, and gone at the end. Raises WorldError with the child's last words when it did not come to its end."""
    await asyncio.to_thread(_fresh, directory)
    words = directory / "stderr"
    try:
        with words.open("wb") as stderr:
            child = await asyncio.create_subprocess_exec(
                *enclosed((sys.executable, "-m", "agent.chaos.block")),
                env=_environment(directory),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=stderr,
                start_new_session=True,  # Ctrl-C is for the harness, which then ends every world in order
                limit=MAX_LINE_BYTES,
            )
        try:
            async for told in _lines(child, task):
                if told.run is not None:
                    yield told.run
                if told.broken:
                    raise WorldError(told.broken)
                if told.done:
                    return
            raise WorldError(f"the child of a world ended early; its last words:\n{_tail(words)}")
        finally:
            await _end(child)
    finally:
        if not task.keeping.worlds:
            await asyncio.to_thread(shutil.rmtree, directory, True)


def _fresh(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    directory.chmod(0o711)  # PostgreSQL's user must be able to walk through


async def _lines(child: asyncio.subprocess.Process, task: Task) -> AsyncIterator[Told]:
    assert child.stdin is not None
    assert child.stdout is not None
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it has died: its output ends at once
        child.stdin.write(msgspec.json.encode(task) + b"\n")
        await child.stdin.drain()
    while line := await child.stdout.readline():
        try:
            yield msgspec.json.decode(line, type=Told)
        except msgspec.MsgspecError as error:
            raise WorldError(f"the child of a world said {line[:200]!r}: {error}") from error


async def _end(child: asyncio.subprocess.Process) -> None:
    """By the end of its input, which it takes for a word to stop; then by force."""
    if child.stdin is not None:
        child.stdin.close()
    try:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(child.wait(), GOODBYE_SECONDS)
    finally:
        if child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            await child.wait()


def _tail(words: Path) -> str:
    with contextlib.suppress(OSError):
        return words.read_bytes()[-TAIL_BYTES:].decode(errors="replace")
    return ""
