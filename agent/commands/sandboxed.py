"""`alertmedic sandbox`: what this host can hold, one command in the sandbox, and the far end of remote execution.

Called by `agent.cli`. `run` without a command line takes one request of `agent.remote_protocol` on standard input; that
is the command that `agent.remote` starts through SSH, and that a ForceCommand allows as the only one. Needs neither
configuration nor journal: the records are kept by who asked.
"""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import stat
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

import sandbox
from agent import __version__
from agent.commands.output import CommandError, Exit, emit_json, say
from agent.config import Config
from agent.remote import Executors
from agent.remote_protocol import (
    MAX_REQUEST_BYTES,
    PYTHON_THERE,
    Answer,
    BadRequest,
    Hello,
    Kill,
    Killed,
    Probe,
    Probed,
    Refused,
    Request,
    Run,
    line,
    read_request,
)
from sandbox import Limits, Needs, RunResult, processes

CLAIM_DAYS = 7  # how long it is remembered that a run was begun or forbidden


def probe(parent: str, *, as_json: bool) -> int:
    """What holds steps on this host, and what is missing. Exit code 0 if limits are enforced, else 1."""
    found = probed(sandbox.probe(parent))
    if as_json:
        emit_json(msgspec.to_builtins(found))
    else:
        say(f"limits: {found.enforced_by}" + (f" under {found.root}" if found.root else ""))
        say(f"controllers: {', '.join(found.controllers) or 'none'}")
        if found.reason:
            say(f"missing: {found.reason}")
        say(f"layers: {', '.join(found.layers)}")
        for layer, reason in found.absent_layers.items():
            say(f"absent: {layer}: {reason}")
    return Exit.OK if found.enforced_by.limits_enforced else Exit.FAULT


def probed(capability: sandbox.Capability) -> Probed:
    return Probed(
        enforced_by=capability.enforced_by,
        reason=capability.reason,
        root=str(capability.root or ""),
        controllers=tuple(sorted(capability.controllers)),
        layers=tuple(sandbox.host_layers()),
        absent_layers=sandbox.absent_layers(),
    )


def run_here(argv: Sequence[str], limits: str, needs: str, user: str) -> int:
    """A command line in the sandbox, its RunResult as JSON. For people who try an action out."""
    texts = {"--limits": limits, "--needs": needs}
    given = {}
    for (option, text), kind in zip(texts.items(), (Limits, Needs), strict=True):
        try:
            raw = msgspec.json.decode(text)
            if unknown := sorted(set(raw) - set(kind.__struct_fields__)):
                raise CommandError(f"{option}: {unknown[0]}: no such key", "", Exit.USAGE)
            given[option] = msgspec.convert(raw, kind)
        except (msgspec.DecodeError, msgspec.ValidationError, TypeError) as x:
            raise CommandError(f"{option}: {x}", 'write JSON: {"pids": 5}', Exit.USAGE) from x
    try:
        result = asyncio.run(sandbox.run(argv, given["--limits"], needs=given["--needs"], user=user))
    except sandbox.SandboxUnavailable as x:
        raise CommandError(str(x), "", Exit.FAULT) from x
    emit_json(msgspec.to_builtins(result))
    return Exit.OK if result.ok else Exit.FAULT


def run_there(config: Config, hosts: Sequence[str], argv: Sequence[str], batch: int) -> int:
    """One command on several configured hosts: one JSON object for each, in the order given."""
    if unknown := sorted(set(hosts) - set(config.hosts)):
        raise CommandError(f"hosts.{unknown[0]}: no such host is configured", "", Exit.USAGE)
    executors = Executors(config.hosts)
    settings = config.sandbox

    async def do(host: str) -> RunResult:
        return await executors.run(argv, Limits(), user=settings.user, protection=settings.protection, host=host)

    results = asyncio.run(executors.on_many(hosts, do, batch=max(1, batch)))
    for each in results:
        emit_json({"host": each.host, "problem": each.problem, "result": msgspec.to_builtins(each.result)})
    return Exit.OK if all(each.ok for each in results) else Exit.FAULT


def serve_request() -> int:
    """One request from standard input, one answer to standard output. Exit code 0 if the request was taken."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a connection that is lost ends no run: who asked will say `kill`
    _out(line(Hello(version=__version__)))
    try:
        answer = asyncio.run(_answer(read_request(sys.stdin.buffer.readline(MAX_REQUEST_BYTES + 1))))
    except (BadRequest, sandbox.SandboxUnavailable, OSError) as x:
        answer = Refused(refused=str(x))
    _out(line(answer))
    return Exit.FAULT if isinstance(answer, Refused) else Exit.OK


async def _answer(request: Request) -> Answer:
    if isinstance(request, Probe):
        return probed(sandbox.current())
    if isinstance(request, Kill):
        return Killed(certain=await _kill(request))
    claim = _claim(request.leaf)
    if claim is None:
        return Refused(refused=f"{request.leaf} was begun or forbidden before")
    with claim.open("w") as f:
        f.write(f"{os.getpid()} {processes.start_ticks(os.getpid())}")
    return await _run(request)


async def _run(request: Run) -> Answer:
    argv = list(request.argv)
    if argv[:1] == [PYTHON_THERE]:
        argv[0] = sys.executable
    return await sandbox.run(
        argv,
        request.limits,
        env=request.env,
        user=request.user,
        protection=request.protection,
        leaf=request.leaf,
        needs=request.needs,
        secrets=request.secrets,
        redact=request.redact,
    )


async def _kill(request: Kill) -> bool:
    """First whoever could still start the run, then what runs. One not begun yet never will: its claim is taken."""
    if _claim(request.leaf) is None:
        pid, _, start = (_claims() / request.leaf).read_text().partition(" ")
        deadline = time.monotonic() + request.seconds
        while pid and str(processes.start_ticks(int(pid))) == start:
            if time.monotonic() > deadline:
                return False
            os.kill(int(pid), signal.SIGKILL)
            await asyncio.sleep(0.01)
    return await sandbox.kill_leaf(request.leaf, request.seconds)


def _claim(leaf: str) -> Path | None:
    """The right to begin the run of that name, or to forbid it for ever: whoever makes the file first has it."""
    directory = _claims()
    old = time.time() - CLAIM_DAYS * 86400
    for path in directory.iterdir():
        if path.stat().st_mtime < old:
            path.unlink(missing_ok=True)
    try:
        (directory / leaf).touch(mode=0o600, exist_ok=False)
    except FileExistsError:
        return None
    return directory / leaf


def _claims() -> Path:
    """Our own directory; refused if somebody else has put one in its place."""
    path = Path(tempfile.gettempdir(), f"alertmedic-remote-{os.geteuid()}")
    path.mkdir(mode=0o700, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise OSError(errno.EPERM, "not a private directory of ours: remove it", str(path))
    return path


def _out(text: bytes) -> None:
    sys.stdout.buffer.write(text)
    sys.stdout.buffer.flush()
