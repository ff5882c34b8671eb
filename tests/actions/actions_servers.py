"""Real servers for the tests of the catalogue, each private: its own directory, socket or port, ended afterwards."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from actions_world import NOW, MemoryLedger, Proposal, ScriptedVerifier, context, in_sandbox

import sandbox
from actions import guard
from actions.catalog import load_catalog
from actions.model import Declined, Plan, Step
from actions.runner import Runner, RunnerSettings
from sandbox.model import RunResult

CATALOG = load_catalog()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    """Polls until `condition()` is true; an error of it counts as not yet."""
    deadline = time.monotonic() + seconds
    last: Exception | None = None
    while True:
        try:
            if condition():
                return
        except (OSError, subprocess.SubprocessError, ValueError, LookupError) as error:
            last = error
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:.0f} s; {last!r}")
        time.sleep(0.02)


@contextmanager
def directory(prefix: str, user: str = "") -> Iterator[Path]:
    """A short path: a unix socket's may not be long."""
    made = Path(tempfile.mkdtemp(prefix=f"am-{prefix}-", dir="/tmp"))
    if user and os.geteuid() == 0:
        shutil.chown(made, user, user)
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


@contextmanager
def running(
    argv: Sequence[str | Path],
    ready: Callable[[], object],
    *,
    env: Mapping[str, str] | None = None,
    log: Path | None = None,
    stop: signal.Signals = signal.SIGTERM,
    seconds: float = 30.0,
) -> Iterator[subprocess.Popen[bytes]]:
    """A server in the foreground, in a process group of its own; what is left of the group is killed afterwards."""
    out: Any = log.open("wb") if log else subprocess.DEVNULL
    process = subprocess.Popen(
        [str(a) for a in argv], stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
        env={"PATH": os.environ["PATH"] + ":/usr/sbin:/sbin", "LANG": "C.UTF-8", **(env or {})},
    )  # fmt: skip
    try:
        try:
            until(lambda: ready() or process.poll() is not None, seconds)
            assert process.poll() is None, "it has ended"
        except AssertionError as error:
            said = log.read_text(errors="replace")[-1500:] if log else ""
            raise AssertionError(f"{argv[0]} did not start: {error}\n{said}") from None
        yield process
    finally:
        process.send_signal(stop)
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)
        if log:
            out.close()


def listens(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


async def plan_for(
    action: str, entry: Mapping[str, str], secrets: Mapping[str, str] | None = None, **params: Any
) -> Any:
    """The plan, or the refusal, for a service `svc` with this inventory."""
    world = context(inventory={"svc": dict(entry)}, targets=(), values={}, secrets=dict(secrets or {}))
    return await guard.consider(Proposal(action=action, service="svc", params=params), CATALOG, world, in_sandbox)


async def one_step(
    action: str, entry: Mapping[str, str], secrets: Mapping[str, str] | None = None, **params: Any
) -> Step:
    made = await plan_for(action, entry, secrets, **params)
    assert isinstance(made, Plan), made
    assert len(made.steps) == 1, made.steps
    return made.steps[0]


async def refused(
    action: str, entry: Mapping[str, str], secrets: Mapping[str, str] | None = None, **params: Any
) -> Declined:
    answer = await plan_for(action, entry, secrets, **params)
    assert isinstance(answer, Declined), answer
    return answer


async def do(argv: Sequence[str], step: Step, secrets: Mapping[str, str] | None = None) -> RunResult:
    return await in_sandbox(tuple(argv), step.limits, secrets, step.needs)


async def checked(step: Step, secrets: Mapping[str, str] | None = None) -> int | None:
    """The exit code of the step's check: 0 it has happened, 1 it has not, 94 nobody can tell."""
    return (await do(step.check, step, secrets)).exit_code


def with_option(argv: Sequence[str], **changed: object) -> tuple[str, ...]:
    """The argv with other values of some options, which must be there."""
    wanted = {f"--{name.replace('_', '-')}": str(value) for name, value in changed.items()}
    assert wanted.keys() <= {a.partition("=")[0] for a in argv}, (wanted, argv)
    return tuple(f"{k}={wanted[k]}" if (k := a.partition("=")[0]) in wanted else a for a in argv)


async def carry_out(made: Plan | Declined, *, verdict: bool = True, secrets: Mapping[str, str] | None = None) -> str:
    """The outcome of the plan through the real runner; with verdict False the series does not recover: undone."""
    assert isinstance(made, Plan), made
    settings = RunnerSettings(secrets=dict(secrets or {}))
    runner = Runner(MemoryLedger(), sandbox, ScriptedVerifier([(verdict, "seen")]), lambda: NOW, settings)
    return str((await runner.run(made, asyncio.Event())).result)
