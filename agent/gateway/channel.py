"""Diagnosis channels: a version of packs, model and engine in a process of its own, or an external HTTP endpoint.

Made and asked by `agent.gateway`. A channel is asked with a budget and always answers within it: with a diagnosis, or
with the reason why there is none. It never raises, never blocks the loop, and holds nothing of the service. While the
primary is at work a process is stopped (`hold`): an idle class alone still cost the primary a tenth of its time.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any, Final, Protocol

import aiohttp
import msgspec

from agent.gateway.score import Answered, answered, sound
from agent.gateway.worker import LENGTH, OUT_OF_MEMORY, Setting
from rules.model import Diagnosis, Situation

ROOT: Final = str(Path(__file__).resolve().parents[2])  # where `agent` is found
MAX_ANSWER: Final = 8 * 1024 * 1024
START_SECONDS: Final = 30.0
GRACE_SECONDS: Final = 1.0  # a late process may finish; then it is ended
BACKOFF_SECONDS: Final = (0.0, 1.0, 5.0, 30.0, 60.0)  # before the next start, by failures of late
REMEMBERED_SECONDS: Final = 300.0  # for how long a failure counts, whatever went well since


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What a channel said, and how long it took."""

    short: Answered
    diagnosis: Diagnosis | None = None
    seconds: float = 0.0


class Channel(Protocol):
    version: str

    async def ask(self, frozen: Frozen, budget: float) -> Answer: ...

    def hold(self) -> None: ...

    def release(self) -> None: ...

    async def close(self) -> None: ...


class Frozen(msgspec.Struct, frozen=True, kw_only=True):
    """Evidence as both channels see it. `pickled` is `situation` in bytes, `digest` names them."""

    situation: Situation
    pickled: bytes
    digest: str
    trace: str
    flags: dict[str, bool] = {}


class _Reply(msgspec.Struct, frozen=True):
    diagnosis: Diagnosis | None = None
    error: str = ""


def none(status: str, reason: str, version: str = "", seconds: float = 0.0) -> Answer:
    return Answer(short=Answered(status=status, reason=reason[:500], version=version), seconds=seconds)


def checked(body: bytes, seconds: float, version: str = "") -> Answer:
    """A `_Reply` from outside, believed only if it is a sound diagnosis."""
    try:
        reply = msgspec.json.decode(body, type=_Reply)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        return none("invalid", f"no diagnosis: {error}", version, seconds)
    if reply.error:
        return none("crashed", reply.error, version, seconds)
    if reply.diagnosis is None:
        return none("invalid", "neither a diagnosis nor an error", version, seconds)
    if why := sound(reply.diagnosis):
        return none("invalid", why, version, seconds)
    short = answered(reply.diagnosis)
    return Answer(
        short=msgspec.structs.replace(short, version=version or short.version),
        diagnosis=reply.diagnosis,
        seconds=seconds,
    )


class ProcessChannel:
    """One engine in one child process, started when it is first wanted and again after it failed, one question at a
    time. A start takes a second or so, during which the channel is `unavailable`. Time for which it is held counts
    against the budget of a question, but never as hanging."""

    def __init__(self, setting: Setting, version: str = "") -> None:
        self._setting = msgspec.structs.replace(setting, path=tuple(sys.path))
        self.version = version
        self._process: asyncio.subprocess.Process | None = None
        self._begun: asyncio.subprocess.Process | None = None  # that which is starting
        self._holds = 0
        self._held_since = 0.0
        self._held_seconds = 0.0  # before that
        self._released = asyncio.Event()
        self._released.set()
        self._starting: asyncio.Task[None] | None = None
        self._asking: asyncio.Task[bytes] | None = None
        self._ending: set[asyncio.Task[None]] = set()
        self._failures: deque[float] = deque(maxlen=len(BACKOFF_SECONDS))  # when it failed
        self._not_before = 0.0
        self.problem = "not started yet"

    async def ready(self, seconds: float = START_SECONDS) -> bool:
        """Waits until it can be asked, at most so long. Who waits for it does not want it to hold back."""
        self._not_before = 0.0
        self._start()
        if self._starting is not None:
            await asyncio.wait([self._starting], timeout=seconds)
        return self._process is not None

    async def rest(self) -> None:
        """Waits until it is at no question, late or not, and neither starting nor ending."""
        while tasks := [t for t in (self._starting, *self._ending) if t is not None]:
            await asyncio.wait(tasks)

    def hold(self) -> None:
        """Stops it, whatever it is at, until `release` is called as often."""
        self._holds += 1
        if self._holds == 1:
            self._held_since = time.monotonic()
            self._released.clear()
            self._signal(signal.SIGSTOP)

    def release(self) -> None:
        self._holds -= 1
        if self._holds == 0:
            self._held_seconds += time.monotonic() - self._held_since
            self._released.set()
            self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        """To its group: an engine may have processes of its own."""
        for process in (self._process, self._begun):
            if process is not None and process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)

    def _held(self) -> float:
        return self._held_seconds + (time.monotonic() - self._held_since if self._holds else 0.0)

    async def _finished(self, task: asyncio.Task[bytes], seconds: float) -> bool:
        """Waits for it, at most so long beside the time for which the process is held."""
        while seconds > 0 and not task.done():
            before = self._held()
            await asyncio.wait([task], timeout=seconds)
            seconds = self._held() - before
            await self._released.wait()
        return task.done()

    async def ask(self, frozen: Frozen, budget: float) -> Answer:
        begin = time.perf_counter()
        process = self._process
        if process is None:
            self._start()
            return none("unavailable", self.problem, self.version)
        if self._asking is not None:
            return none("busy", "it is still at an earlier question", self.version)
        if budget <= 0:
            return none("late", "the primary took the whole budget", self.version)
        asking = self._asking = asyncio.create_task(self._exchange(process, frozen.pickled))
        done, _ = await asyncio.wait([asking], timeout=budget)
        seconds = time.perf_counter() - begin
        if not done:
            grace = asyncio.create_task(self._late(process, asking))
            self._ending.add(grace)
            grace.add_done_callback(self._ending.discard)
            return none("late", f"no answer within {budget * 1000:.0f} ms", self.version, seconds)
        self._asking = None
        if (error := asking.exception()) is not None:
            await self._failed(process, error)
            return none("crashed", self.problem, self.version, seconds)
        return checked(asking.result(), seconds, self.version)

    async def _late(self, process: asyncio.subprocess.Process, asking: asyncio.Task[bytes]) -> None:
        """It may finish, for whoever comes next; an engine that hangs is ended."""
        if not await self._finished(asking, GRACE_SECONDS):
            asking.cancel()
            await self._failed(process, TimeoutError(f"it hung for {GRACE_SECONDS:g} s and was ended"))
        elif asking.exception() is not None:
            await self._failed(process, asking.exception() or EOFError())
        self._asking = None

    async def _exchange(self, process: asyncio.subprocess.Process, body: bytes) -> bytes:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.writelines([LENGTH.pack(len(body)), body])
        await process.stdin.drain()
        (size,) = LENGTH.unpack(await process.stdout.readexactly(LENGTH.size))
        if size > MAX_ANSWER:
            raise ValueError(f"an answer of {size} bytes, at most {MAX_ANSWER}")
        return await process.stdout.readexactly(size)

    def _start(self) -> None:
        if self._process is None and self._starting is None and time.monotonic() >= self._not_before:
            self._starting = asyncio.create_task(self._started())

    async def _started(self) -> None:
        process: asyncio.subprocess.Process | None = None
        try:
            self.problem = "it is starting"
            await self._released.wait()
            self._begun = process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "agent.gateway.worker", str(os.getpid())),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
                env={"PATH": os.defpath, "PYTHONPATH": ROOT, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
                process_group=0,  # no session: its autogroup would get as large a share of the CPUs as ours
                limit=MAX_ANSWER,
            )
            _give_way(process.pid)
            if self._holds:
                self._signal(signal.SIGSTOP)
            answering = asyncio.create_task(self._exchange(process, msgspec.json.encode(self._setting)))
            try:
                if not await self._finished(answering, START_SECONDS):
                    raise TimeoutError(f"it did not start within {START_SECONDS:g} s")
            finally:
                answering.cancel()
            reply = msgspec.json.decode(answering.result())
            if reply.get("error"):
                raise ValueError(str(reply["error"]))
            self._process, self.problem, self.version = process, "", str(reply.get("version", ""))
        except (OSError, EOFError, ValueError, msgspec.MsgspecError) as error:
            await self._failed(process, error)
        finally:
            self._starting = self._begun = None
            if process is not None and self._process is not process:  # the start was given up
                await _ended(process)

    async def _failed(self, process: asyncio.subprocess.Process | None, error: BaseException) -> None:
        """Ends the process; the next start waits the longer, the more of them have failed of late: each start costs
        the host a second of CPU, and an engine that dies at every other question would ask for one at each."""
        if self._process is process:
            self._process = None
        code = ""
        if process is not None:
            await _ended(process, by_itself=isinstance(error, EOFError))
            code = f" (exit status {process.returncode})"
        text = "it ended" if isinstance(error, EOFError) else str(error) or type(error).__name__
        if process is not None and process.returncode == OUT_OF_MEMORY:
            text = "it ran out of the memory that a diagnosis may take"
        self.problem = f"{text}{code}"
        now = time.monotonic()
        self._failures.append(now)
        recent = sum(now - at < REMEMBERED_SECONDS for at in self._failures)
        self._not_before = now + BACKOFF_SECONDS[recent - 1]

    async def close(self) -> None:
        for task in (self._starting, self._asking, *self._ending):
            if task is not None:
                task.cancel()
                await asyncio.wait([task])
        if self._process is not None:
            await _ended(self._process)
            self._process = None


def _give_way(pid: int) -> None:
    """Whatever it does, reading its modules included, it does with the time that nobody else wants."""
    with contextlib.suppress(OSError):  # it has died already, or the host forbids it: nice is left then
        os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0))


async def _ended(process: asyncio.subprocess.Process, *, by_itself: bool = False) -> None:
    """Ends it. One that closed its pipe is about to end `by_itself`, with an exit status that says something."""
    if by_itself:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), GRACE_SECONDS)
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    await process.wait()


class HttpChannel:
    """An external endpoint: POST of the evidence as JSON, answered with `{"diagnosis": ...}` of our shape."""

    def __init__(self, url: str, version: str = "") -> None:
        self.url = url
        self.version = version or url
        self._session: aiohttp.ClientSession | None = None

    async def ask(self, frozen: Frozen, budget: float) -> Answer:
        begin = time.perf_counter()
        try:
            async with asyncio.timeout(budget):
                status, body = await self._post(frozen)
        except TimeoutError:
            return none("late", f"no answer within {budget * 1000:.0f} ms", self.version, time.perf_counter() - begin)
        except (aiohttp.ClientError, OSError, ValueError) as error:
            reason = str(error) or type(error).__name__
            return none("crashed", reason, self.version, time.perf_counter() - begin)
        seconds = time.perf_counter() - begin
        if status != 200:
            return none("crashed", f"HTTP {status}", self.version, seconds)
        return checked(body, seconds)

    def hold(self) -> None:
        """What is elsewhere does not share the primary's CPUs."""

    def release(self) -> None:
        pass

    async def _post(self, frozen: Frozen) -> tuple[int, bytes]:
        if self._session is None:
            self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=4))
        body = await asyncio.to_thread(as_json, frozen)
        headers = {"Content-Type": "application/json"}
        async with self._session.post(self.url, data=body, headers=headers, allow_redirects=False) as response:
            got = b""
            async for part in response.content.iter_chunked(65_536):
                got += part
                if len(got) > MAX_ANSWER:
                    raise ValueError(f"an answer of more than {MAX_ANSWER} bytes")
            return response.status, got

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()


def as_json(frozen: Frozen) -> bytes:
    """The evidence for a channel elsewhere: `{"trace", "flags", "alerts", "entry", "onset", "until", "topology",
    "evidence": [{"name", "times", "series": {notation: [value | null]}, "facts", "missing"}]}`."""
    situation = frozen.situation
    evidence: list[dict[str, Any]] = []
    for one in situation.evidence:
        values = one.frame.values
        series = {str(id): [None if v != v else v for v in values[i].tolist()] for i, id in enumerate(one.frame.ids)}
        facts = [
            {"kind": f.kind, "subject": f.subject, "service": f.service, "attributes": dict(f.attributes)}
            for f in one.facts
        ]
        times = one.frame.times.tolist()
        evidence.append({"name": one.name, "times": times, "series": series, "facts": facts, "missing": one.missing})
    return msgspec.json.encode(
        {
            "trace": frozen.trace,
            "flags": frozen.flags,
            "alerts": situation.alerts,
            "entry": situation.entry,
            "onset": situation.onset,
            "until": situation.until,
            "topology": {"edges": situation.topology.edges, "kinds": dict(situation.topology.kinds)},
            "evidence": evidence,
        }
    )
