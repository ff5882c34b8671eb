"""Steps on other hosts: `alertmedic sandbox run` there, through the OpenSSH client, or here for those of this host.

`agent.remediation` gives an `Executors` to `actions.runner` as its sandbox and to the guard for look-ups. Limits,
result and records are the same wherever a step runs. A connection that is lost after the request was sent says nothing
about the step: `RemoteLost`, upon which the runner ends the old run over a new connection and asks the action's check.
Never lets a shell read a command: the remote command line is fixed by the configuration, the rest is JSON on stdin.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets as random_source
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import msgspec

import sandbox
from agent.remote_protocol import PYTHON_THERE, Hello, Kill, Killed, Probe, Probed, Request, Run, line
from sandbox import EnforcedBy, Limits, Needs, Protection, RunResult

GRACE_SECONDS = 15.0  # beyond a run's own timeout, until the connection is taken for lost
HEALTHY_SECONDS = 300.0  # what a host said of its limits holds so long
UNREACHABLE_SECONDS = 30.0  # until a host that could not be asked is asked again
KILLING_MARGIN = 5.0
ERROR_BYTES = 2000

A = TypeVar("A", RunResult, Killed, Probed)


class RemoteLost(ConnectionError):  # noqa: N818
    """The connection ended after the request was sent: whether it was carried out is not known."""


class RemoteUnreachable(ConnectionError):  # noqa: N818
    """The other side never said hello: nothing was sent, so nothing ran."""


class RemoteRefused(RuntimeError):  # noqa: N818
    """The other side did not take the request: nothing was done."""


class Host(Protocol):
    """A host of the configuration (`hosts.NAME`)."""

    @property
    def address(self) -> str: ...
    @property
    def port(self) -> int: ...
    @property
    def user(self) -> str: ...
    @property
    def identity_file(self) -> Path | None: ...
    @property
    def known_hosts(self) -> Path | None: ...
    @property
    def command(self) -> str: ...
    @property
    def connect_seconds(self) -> float: ...


@dataclass(frozen=True, slots=True)
class HostResult:
    """One host of a batch. `result` is None where it was not begun or is not known, and `problem` says why."""

    host: str
    result: RunResult | None = None
    problem: str = ""

    @property
    def ok(self) -> bool:
        return self.result is not None and self.result.ok


class Executors:
    """The runner's sandbox on every host that is configured."""

    def __init__(self, hosts: Mapping[str, Host]) -> None:
        self._hosts = hosts
        self._enforced: dict[str, tuple[float, EnforcedBy]] = {}

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._hosts)

    def leaf_name(self, host: str = "") -> str:
        """A fresh name. Those of other hosts are no sweepable ones: an agent there must not take them for its own."""
        return f"remote-{random_source.token_hex(12)}" if host else sandbox.leaf_name()

    async def run(
        self,
        argv: Sequence[str],
        limits: Limits,
        *,
        env: Mapping[str, str] | None = None,
        user: str = "",
        stdin: bytes = b"",
        protection: Protection = "automatic",
        leaf: str = "",
        needs: Needs | None = None,
        secrets: Mapping[str, str] | None = None,
        redact: Sequence[str] = (),
        host: str = "",
    ) -> RunResult:
        """As `sandbox.run`. Raises RemoteLost when nobody knows what became of it. Not begun is `RunResult.error`."""
        if not host:
            return await sandbox.run(
                argv, limits, env=env, user=user, stdin=stdin, protection=protection, leaf=leaf,
                needs=needs, secrets=secrets, redact=redact,
            )  # fmt: skip
        request = Run(
            argv=there(argv),
            limits=limits,
            env=dict(env) if env is not None else None,
            user=user,
            protection=protection,
            leaf=leaf or self.leaf_name(host),
            needs=needs or Needs(),
            secrets=dict(secrets or {}),
            redact=tuple(redact),
        )
        try:
            return await self._ask(host, request, limits.timeout_seconds + GRACE_SECONDS, RunResult)
        except (RemoteUnreachable, RemoteRefused) as x:
            return RunResult(exit_code=None, error=str(x))

    async def kill_leaf(self, leaf: str, deadline_seconds: float, host: str = "") -> bool:
        """As `sandbox.kill_leaf`. False also when the host cannot be asked."""
        if not host:
            return await sandbox.kill_leaf(leaf, deadline_seconds)
        request = Kill(leaf=leaf, seconds=deadline_seconds)
        try:
            return (await self._ask(host, request, 2 * deadline_seconds + KILLING_MARGIN, Killed)).certain
        except (ConnectionError, RemoteRefused):
            return False

    async def probe(self, host: str) -> Probed:
        """What holds steps there. Raises ConnectionError, RemoteRefused."""
        return await self._ask(host, Probe(), GRACE_SECONDS, Probed)

    async def learn_enforcement(self, host: str) -> None:
        """Asks the host unless its answer is still fresh. A host that cannot be asked enforces nothing."""
        now = asyncio.get_running_loop().time()
        if host in self._hosts and self._enforced.get(host, (0.0, EnforcedBy.RLIMITS))[0] <= now:
            try:
                found = (await self.probe(host)).enforced_by
            except (ConnectionError, RemoteRefused):
                self._enforced[host] = (now + UNREACHABLE_SECONDS, EnforcedBy.RLIMITS)
            else:
                self._enforced[host] = (now + HEALTHY_SECONDS, found)

    def enforced_by(self, host: str) -> EnforcedBy:
        """What the host last said; rlimits only while it has said nothing."""
        return self._enforced.get(host, (0.0, EnforcedBy.RLIMITS))[1]

    async def on_many(
        self, hosts: Sequence[str], do: Callable[[str], Awaitable[RunResult]], *, batch: int
    ) -> list[HostResult]:
        """`do` on each host, at most `batch` at once; after a batch with a failure no further one is begun. Results in
        the order of `hosts`."""
        if batch < 1:
            raise ValueError(f"on_many: a batch of {batch} hosts")
        results: list[HostResult] = []
        for first in range(0, len(hosts), batch):
            part = hosts[first : first + batch]
            if any(not r.ok for r in results):
                results += [HostResult(name, problem="not begun: an earlier batch failed") for name in part]
                continue
            answers = await asyncio.gather(*(do(name) for name in part), return_exceptions=True)
            for name, answer in zip(part, answers, strict=True):
                if isinstance(answer, RunResult):
                    results.append(HostResult(name, answer, answer.error))
                elif isinstance(answer, ConnectionError):
                    results.append(HostResult(name, problem=str(answer)))
                else:
                    raise answer
        return results

    async def _ask(self, host: str, request: Request, seconds: float, wanted: type[A]) -> A:
        """One connection, one request, one answer."""
        known = self._hosts.get(host)
        if known is None:
            raise RemoteRefused(f"{host}: no such host is configured (hosts.{host})")
        async with self._connected(host, known) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                process.stdin.write(line(request))
                process.stdin.write_eof()
                async with asyncio.timeout(seconds):
                    text = await process.stdout.readuntil(b"\n")
                raw = msgspec.json.decode(text)
                if isinstance(raw, dict) and set(raw) == {"refused"}:
                    raise RemoteRefused(f"{host}: refused: {raw['refused']}")
                return msgspec.convert(raw, wanted)
            except (TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, OSError) as x:
                raise RemoteLost(f"{host}: lost after the request was sent: {type(x).__name__}: {x}") from x
            except (msgspec.DecodeError, msgspec.ValidationError) as x:
                raise RemoteLost(f"{host}: what came back is no answer: {x}") from x

    @contextlib.asynccontextmanager
    async def _connected(self, name: str, host: Host) -> AsyncIterator[asyncio.subprocess.Process]:
        """ssh to the host, after its hello. RemoteUnreachable without one."""
        process = await asyncio.create_subprocess_exec(
            *command_line(host),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=16 * 1024 * 1024,
            start_new_session=True,
        )
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            try:
                async with asyncio.timeout(host.connect_seconds + GRACE_SECONDS):
                    hello = await process.stdout.readuntil(b"\n")
                msgspec.json.decode(hello, type=Hello)
            except (TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, msgspec.DecodeError) as x:
                said = b""
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(1.0):
                        said = await process.stderr.read(ERROR_BYTES)
                why = said.decode(errors="replace").strip() or f"{type(x).__name__}: {x}"
                raise RemoteUnreachable(f"{name}: cannot be reached: {why}") from x
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


def command_line(host: Host) -> list[str]:
    """The ssh command: no prompt, no unknown host key, nothing of a user's own configuration."""
    options = {
        "BatchMode": "yes",
        "StrictHostKeyChecking": "yes",
        "ConnectTimeout": str(max(1, round(host.connect_seconds))),
        "ServerAliveInterval": "5",
        "ServerAliveCountMax": "3",
        "ClearAllForwardings": "yes",
        "ForwardAgent": "no",
        "PermitLocalCommand": "no",
        "ControlMaster": "no",
        "ControlPath": "none",
    }
    if host.known_hosts is not None:
        options["UserKnownHostsFile"] = str(host.known_hosts)
        options["GlobalKnownHostsFile"] = "/dev/null"
    if host.identity_file is not None:
        options["IdentitiesOnly"] = "yes"
    argv = ["ssh", "-F", "none", "-T", *(f"-o{name}={value}" for name, value in options.items())]
    argv += ["-i", str(host.identity_file)] if host.identity_file is not None else []
    argv += ["-p", str(host.port)]
    argv += ["-l", host.user] if host.user else []
    return [*argv, "--", host.address, *host.command.split()]


def there(argv: Sequence[str]) -> tuple[str, ...]:
    """An argv for another host: our own interpreter is named so that the other side puts in its own."""
    return (PYTHON_THERE, *argv[1:]) if list(argv[:1]) == [sys.executable] else tuple(argv)
