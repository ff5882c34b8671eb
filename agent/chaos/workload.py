"""What a run needs of the thing that is broken, and a workload of the user's own.

`agent.chaos.follow` works with any `Workload`; `agent.chaos.world.ChaosWorld` is the shipped one. A user's own is told
in a file: where to probe, which Prometheus and which agent to look at, and commands that break and mend things. Their
argument lists are executed as they stand, never through a shell.

    workload:
      probe: {url: "http://127.0.0.1:8080/", method: GET, good_seconds: 0.5}
      prometheus: http://127.0.0.1:9090
      agent: http://127.0.0.1:9095
      faults:
        worker_stopped: {inject: [systemctl, kill, -s, STOP, worker], clear: [systemctl, kill, -s, CONT, worker]}

What is injected is written down before it is injected, so that it can be cleared after a kill -9 of the harness: `chaos
run` begins with clearing what an earlier one left.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import AsyncIterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import aiohttp
import msgspec

from agent.chaos.scenario import MAX_FILE_BYTES, Name, ScenarioError
from agent.demo.children import WorldError
from agent.demo.probe import Probe
from agent.strict import Document, kind

COMMAND_SECONDS = 60.0
TAIL = 2000


class CannotInjectError(WorldError):
    """A fault cannot be made on this machine (a program or a right is missing): its run is void, and others go on."""


class Workload(Protocol):
    """The thing that is broken, as a run sees it. Times are unix seconds; what cannot go on raises WorldError, a fault
    that cannot be had here CannotInjectError."""

    probe: Probe  # the service-level indicator
    browse: Probe  # what must stay good where a scenario says so

    def check(self) -> None: ...
    async def quiet(self, seconds: float, patience: float) -> None: ...
    async def alerts(self) -> dict[str, float]: ...
    async def agent_incidents(self) -> list[dict[str, Any]]: ...
    async def inject(self, fault: str, settings: Mapping[str, float]) -> float: ...
    async def clear(self, fault: str) -> None: ...
    async def kill_agent(self) -> None: ...


class ProbeAt(msgspec.Struct, frozen=True, kw_only=True):
    """Where a customer knocks. `body` is JSON text, "" for none."""

    url: Annotated[str, kind("url")]
    method: Literal["GET", "POST", "PUT", "HEAD"] = "GET"
    body: str = ""
    good_seconds: Annotated[float, msgspec.Meta(gt=0, le=60)] = 1.0

    def probe(self) -> Probe:
        return Probe(self.url, self.method, json.loads(self.body) if self.body else None, self.good_seconds)


class CommandFault(msgspec.Struct, frozen=True, kw_only=True):
    """A fault by commands. Both must end with 0 within a minute; `clear` must be safe to run twice."""

    inject: tuple[str, ...]
    clear: tuple[str, ...]


class WorkloadFile(msgspec.Struct, frozen=True, kw_only=True):
    """The key `workload` of a file."""

    probe: ProbeAt
    browse: ProbeAt | None = None
    prometheus: Annotated[str, kind("url")]
    agent: Annotated[str, kind("url")]
    agent_token_file: str = ""
    faults: Mapping[Name, CommandFault]


class _File(msgspec.Struct, frozen=True, kw_only=True):
    workload: WorkloadFile


def load_workload(file: Path) -> WorkloadFile:
    """Raises ScenarioError with every fault of the file, OSError."""
    document = Document(str(file), file.parent)
    body = file.read_bytes()
    if len(body) > MAX_FILE_BYTES:
        raise OSError(f"workload: {file} has {len(body)} bytes, at most {MAX_FILE_BYTES} are read")
    document.read(body)
    built = document.build(_File)
    if built is not None:
        for name, fault in built.workload.faults.items():
            for key, argv in (("inject", fault.inject), ("clear", fault.clear)):
                if not argv:
                    document.fault(f"workload.faults.{name}.{key}", "an argument list is needed")
        for key, at in (("probe", built.workload.probe), ("browse", built.workload.browse)):
            if at is not None and at.body and not _is_json(at.body):
                document.fault(f"workload.{key}.body", "is no JSON")
    if document.faults or built is None:
        raise ScenarioError(tuple(document.faults))
    return built.workload


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


class UserWorkload:
    """A workload that runs already. It starts and stops nothing but the faults; `left_behind` is the file in which they
    are written down while they are there."""

    def __init__(self, told: WorkloadFile, session: aiohttp.ClientSession, left_behind: Path) -> None:
        self._told, self._session, self._file = told, session, left_behind
        self.probe = told.probe.probe()
        self.browse = (told.browse or told.probe).probe()
        self._active: list[str] = []

    @classmethod
    @contextlib.asynccontextmanager
    async def running(cls, told: WorkloadFile, left_behind: Path) -> AsyncIterator[UserWorkload]:
        """Probes while the context lasts; what an earlier run left behind is cleared first, and what this one leaves at
        the end."""
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session:
            workload = cls(told, session, left_behind)
            await workload.clear_left_behind()
            async with workload.probe.probing(), workload.browse.probing():
                try:
                    yield workload
                finally:
                    await workload.clear_left_behind()

    async def clear_left_behind(self) -> None:
        """Clears what the file names. Raises WorldError for the first that cannot be cleared, after trying all."""
        self._active = json.loads(self._file.read_bytes()) if self._file.exists() else []
        failures = []
        for name in reversed(list(self._active)):
            try:
                await self.clear(name)
            except WorldError as error:
                failures.append(str(error))
        if failures:
            raise WorldError("; ".join(failures))

    def check(self) -> None:
        """The user's parts are the user's to watch."""

    async def quiet(self, seconds: float, patience: float) -> None:
        """Waits until both probes have been fine for `seconds` and no alert fires. Raises WorldError."""
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError, ValueError):
                if self.probe.steady(seconds) and self.browse.steady(seconds) and not await self.alerts():
                    return
            await asyncio.sleep(0.5)
        raise WorldError(f"the workload is not fine for {seconds:.0f} s within {patience:.0f} s")

    async def alerts(self) -> dict[str, float]:
        document = await self._get(f"{self._told.prometheus}/api/v1/alerts", {})
        firing = [a for a in document["data"]["alerts"] if a["state"] == "firing"]
        return {a["labels"]["alertname"]: datetime.fromisoformat(a["activeAt"]).timestamp() for a in firing}

    async def agent_incidents(self) -> list[dict[str, Any]]:
        headers = {}
        if self._told.agent_token_file:
            token = await asyncio.to_thread(Path(self._told.agent_token_file).read_text)
            headers = {"Authorization": f"Bearer {token.strip()}"}
        return list((await self._get(f"{self._told.agent}/api/v1/incidents?limit=100", headers))["incidents"])

    async def _get(self, url: str, headers: Mapping[str, str]) -> Any:
        async with self._session.get(url, headers=headers) as answer:
            answer.raise_for_status()
            return await answer.json()

    async def inject(self, fault: str, settings: Mapping[str, float]) -> float:
        if settings:
            raise WorldError(f"{fault}: a fault by commands has no settings")
        self._active.append(fault)
        self._write_down()
        at = time.time()
        await self._execute(fault, self._command(fault).inject)
        return at

    async def clear(self, fault: str) -> None:
        await self._execute(fault, self._command(fault).clear)
        self._active = [name for name in self._active if name != fault]
        self._write_down()

    async def kill_agent(self) -> None:
        """By the fault `agent_kill`, if there is one; how the agent comes back is its supervisor's affair."""
        await self._execute("agent_kill", self._command("agent_kill").inject)

    def _command(self, fault: str) -> CommandFault:
        if fault not in self._told.faults:
            raise WorldError(f"{fault}: the workload has no such fault; there are {', '.join(self._told.faults)}")
        return self._told.faults[fault]

    async def _execute(self, fault: str, argv: tuple[str, ...]) -> None:
        try:
            process = await asyncio.create_subprocess_exec(
                *argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
            )
        except OSError as error:
            raise WorldError(f"{fault}: {argv[0]} cannot be started: {error}") from error
        try:
            out, _ = await asyncio.wait_for(process.communicate(), COMMAND_SECONDS)
        except TimeoutError as error:
            process.kill()
            await process.wait()
            raise WorldError(f"{fault}: {argv[0]} has not ended within {COMMAND_SECONDS:.0f} s") from error
        if process.returncode:
            said = out.decode(errors="replace")[-TAIL:]
            raise WorldError(f"{fault}: {argv[0]} ended with {process.returncode}: {said}")

    def _write_down(self) -> None:
        """Durable when it returns: the fault is on disk before it is in the world, and gone from there after."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("wb") as file:
            file.write(json.dumps(self._active).encode())
            file.flush()
            os.fsync(file.fileno())
