"""The fault injector: a process of its own that breaks the shop and mends it.

Run by `agent.demo.world` as `python -m agent.demo.faults` with an environment of its own and everything it must know
on its standard input; it shares no file, label or environment variable with the agent, and never looks at it. One
JSON object a line:

    {"shop": {...}}                          first line: the addresses in `Shop`
    {"inject": NAME, "settings": {...}}  ->  {"injected": NAME, "at": unix seconds}
    {"clear": NAME}   ->  {"cleared": NAME}
    anything wrong    ->  {"error": "..."}

End of input or SIGTERM clears whatever is still injected, then the process ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol
from xmlrpc.client import Fault as RpcFault
from xmlrpc.client import ServerProxy

import aiohttp
import asyncpg
import psutil

from agent.demo.children import set_session_priority

PAYMENTS_SECONDS = 24.0  # a slow provider gets well by itself after this time, whatever anybody does


@dataclass(frozen=True)
class Shop:
    """Where the shop's parts are: URLs, a PostgreSQL URI, and the CPU that `orders` is pinned to."""

    front: str
    orders: str
    worker: str
    payments: str
    database: str
    supervisor: str
    cpu: int
    links: Mapping[str, str] = field(default_factory=dict)  # control URLs of network links that may be disturbed
    names: str = ""  # control URL of the name server
    certificates: Mapping[str, str] = field(default_factory=dict)  # the payment provider's, by name
    releases: str = ""  # directory of the releases of `orders`, with a link `current`
    clock: str = ""  # file that says by how much the clock of `orders` is wrong; "": it cannot be
    spool: str = ""  # where the shop keeps receipts and logs: a small disk; "": there is none


class InjectionError(Exception):
    """The fault could not be brought about; what had been begun is cleared by `clear`."""


def leash() -> tuple[str, ...]:
    """What a command begins with to die with whoever started it, so that a killed injector leaves nothing behind. The
    injector has no PATH. Raises InjectionError."""
    program = shutil.which("setpriv", path=os.defpath)
    if program is None:
        raise InjectionError("setpriv not found: apt-get install util-linux")
    return (program, "--pdeathsig", "KILL", "--")


class Fault(Protocol):
    @abstractmethod
    async def inject(self) -> float:
        """Breaks something; gives the time at which it broke."""

    @abstractmethod
    async def clear(self) -> None:
        """Mends it if nobody else has. May be called at any time, and more than once."""


async def put(url: str, body: object, method: str = "PUT") -> Any:
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session,
        session.request(method, url, json=body) as answer,
    ):
        answer.raise_for_status()
        return await answer.json()


class Supervisor:
    """The shop's supervisor over XML-RPC, as an operator uses it."""

    def __init__(self, url: str) -> None:
        self._url = url + "/RPC2"

    async def info(self, program: str) -> dict[str, Any]:
        return dict(await self._call("getProcessInfo", program))

    async def pid(self) -> int:
        """Of the supervisor itself."""
        return int(await self._call("getPID"))

    async def restart(self, program: str) -> None:
        if (await self.info(program))["statename"] in ("RUNNING", "STARTING"):
            await self._call("stopProcess", program)
        await self._call("startProcess", program)

    async def start(self, program: str) -> None:
        if (await self.info(program))["statename"] not in ("RUNNING", "STARTING"):
            with contextlib.suppress(RpcFault):  # somebody else has just started it
                await self._call("startProcess", program)

    async def _call(self, method: str, *values: Any) -> Any:
        def call() -> Any:
            with ServerProxy(self._url) as server:
                return getattr(server.supervisor, method)(*values)

        return await asyncio.to_thread(call)


@dataclass
class CpuHog:
    """A neighbour on the host: two busy loops in a session of their own, on the CPU that `orders` needs.

    Both the processes and their scheduling group get some priority (as root): kernels that group tasks by session would
    otherwise give the neighbour half of the CPU, which `orders` could live with.
    """

    shop: Shop
    _leader: asyncio.subprocess.Process | None = None

    async def inject(self) -> float:
        leashed, loop = (*leash(), "/bin/sh", "-c"), "while :; do :; done"
        self._leader = await asyncio.create_subprocess_exec(
            *leashed, f"{' '.join(leashed)} '{loop}' & {loop}", "nightly-reindex", start_new_session=True
        )
        await asyncio.sleep(0.1)
        for process in self._group():
            process.cpu_affinity([self.shop.cpu])
            with contextlib.suppress(psutil.AccessDenied):
                process.nice(-10)
        set_session_priority(self._leader.pid, -7)
        return time.time()

    def _group(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            if self._leader is not None:
                leader = psutil.Process(self._leader.pid)
                return [leader, *leader.children()]
        return []

    async def clear(self) -> None:
        if self._leader is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._leader.pid, signal.SIGKILL)
            await self._leader.wait()


@dataclass
class MemoryLeak:
    """A sales report that nobody collects: `orders` grows until its budget is used up. Only a restart helps."""

    shop: Shop
    _started: int = 0

    async def inject(self) -> float:
        self._started = (await Supervisor(self.shop.supervisor).info("orders"))["start"]
        await put(f"{self.shop.orders}/reports", {}, "POST")
        return time.time()

    async def clear(self) -> None:
        supervisor = Supervisor(self.shop.supervisor)
        info = await supervisor.info("orders")
        if self._started and info["start"] == self._started:
            await supervisor.restart("orders")
        else:
            await supervisor.start("orders")


@dataclass
class DbLock:
    """Somebody at a prompt: BEGIN; LOCK TABLE; and off to lunch."""

    shop: Shop
    _session: Any = None

    async def inject(self) -> float:
        self._session = await asyncpg.connect(
            self.shop.database, timeout=5, server_settings={"application_name": "psql"}
        )
        await self._session.execute("BEGIN")
        await self._session.execute("LOCK TABLE orders IN ACCESS EXCLUSIVE MODE", timeout=10)
        return time.time()

    async def clear(self) -> None:
        if self._session is not None:
            self._session.terminate()
            self._session = None


@dataclass
class Crash:
    """A program crashes again and again, until the supervisor gives it up."""

    shop: Shop
    program: str = "worker"

    async def inject(self) -> float:
        supervisor, first, deadline = Supervisor(self.shop.supervisor), 0.0, time.monotonic() + 20
        while time.monotonic() < deadline:
            info = await supervisor.info(self.program)
            if info["statename"] == "FATAL":
                return first
            if info["statename"] in ("RUNNING", "STARTING") and info["pid"]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(info["pid"], signal.SIGKILL)
                first = first or time.time()
            await asyncio.sleep(0.05)
        raise InjectionError(f"crash: the supervisor has not given {self.program} up within 20 s")

    async def clear(self) -> None:
        await Supervisor(self.shop.supervisor).start(self.program)


@dataclass
class Stuck:
    """A program hangs: alive for the supervisor, but it does nothing any more."""

    shop: Shop
    program: str = "worker"
    _process: psutil.Process | None = None

    async def inject(self) -> float:
        info = await Supervisor(self.shop.supervisor).info(self.program)
        if not info["pid"]:
            raise InjectionError(f"stuck: {self.program} is {info['statename']}")
        self._process = psutil.Process(info["pid"])
        self._process.suspend()
        return time.time()

    async def clear(self) -> None:
        if self._process is not None and self._process.is_running():
            with contextlib.suppress(psutil.NoSuchProcess):
                self._process.resume()
        await Supervisor(self.shop.supervisor).start(self.program)


@dataclass
class PaymentsSlow:
    """The payment provider answers slowly. Nobody in the shop can do anything about it; it passes by itself."""

    shop: Shop
    _recovery: asyncio.Task[None] | None = None

    async def inject(self) -> float:
        await self._delay(1.6)
        self._recovery = asyncio.ensure_future(self._recover())
        return time.time()

    async def _delay(self, seconds: float) -> None:
        await put(f"{self.shop.payments}/sandbox/delay", {"seconds": seconds})

    async def _recover(self) -> None:
        await asyncio.sleep(PAYMENTS_SECONDS)
        await self._delay(0)

    async def clear(self) -> None:
        if self._recovery is not None:
            self._recovery.cancel()
        await self._delay(0)


@dataclass
class BadFlag:
    """A feature is switched on that makes every checkout do hundreds of queries."""

    shop: Shop

    async def inject(self) -> float:
        await self._switch(True)
        return time.time()

    async def _switch(self, enabled: bool) -> None:
        await put(f"{self.shop.orders}/flags/live_recommendations", {"enabled": enabled})

    async def clear(self) -> None:
        await self._switch(False)


@dataclass
class PoolExhausted:
    """A surge of customers: more orders than the worker's pool can confirm."""

    shop: Shop
    rate: float = 16.0
    _usual: int = 0
    _surge: asyncio.Task[None] | None = None

    async def inject(self) -> float:
        self._usual = (await put(f"{self.shop.worker}/pool", None, "GET"))["size"]
        self._surge = asyncio.ensure_future(self._customers())
        return time.time()

    async def _customers(self) -> None:
        chance = random.Random(7)  # noqa: S311 - arrival times, no secret
        timeout = aiohttp.ClientTimeout(total=5)
        async with aiohttp.ClientSession(timeout=timeout) as session, asyncio.TaskGroup() as customers:
            while True:
                await asyncio.sleep(chance.uniform(0.5, 1.5) / self.rate)
                customers.create_task(self._buy(session))

    async def _buy(self, session: aiohttp.ClientSession) -> None:
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            async with session.post(f"{self.shop.front}/checkout", json={"product": 1}) as answer:
                await answer.read()

    async def clear(self) -> None:
        if self._surge is not None:
            self._surge.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._surge
        if self._usual:
            await put(f"{self.shop.worker}/pool", {"size": self._usual})


Make = Callable[..., Fault]  # from the shop, and settings by name
FAULTS: dict[str, Make] = {
    "cpu_hog": CpuHog,
    "memory_leak": MemoryLeak,
    "db_lock": DbLock,
    "worker_crash": Crash,
    "worker_stuck": Stuck,
    "payments_slow": PaymentsSlow,
    "bad_flag": BadFlag,
    "pool_exhausted": PoolExhausted,
}


@dataclass
class Injector:
    """What is injected at the moment, and the answers to the driver's lines."""

    shop: Shop
    faults: Mapping[str, Make] = field(default_factory=lambda: FAULTS)
    active: dict[str, Fault] = field(default_factory=dict)

    async def answer(self, request: dict[str, Any]) -> dict[str, object]:
        try:
            if (name := request.get("inject", "")) in self.faults:
                fault = self.faults[name](self.shop, **request.get("settings", {}))
                self.active[name] = fault
                return {"injected": name, "at": await fault.inject()}
            if (name := request.get("clear", "")) in self.faults:
                if (active := self.active.pop(name, None)) is not None:
                    await active.clear()
                return {"cleared": name}
        except (
            OSError,
            aiohttp.ClientError,
            asyncpg.PostgresError,
            RpcFault,
            psutil.Error,
            InjectionError,
        ) as e:
            return {"error": f"{request}: {type(e).__name__}: {e}"}
        except TypeError as e:
            return {"error": f"{request}: the fault has no such setting: {e}"}
        return {"error": f"{request}: no such fault; there are {', '.join(self.faults)}"}

    async def clear_all(self) -> None:
        for name in list(self.active):
            await self.answer({"clear": name})


async def serve(faults: Mapping[str, Make] = FAULTS) -> None:
    """Answers the lines of standard input until it ends."""
    loop = asyncio.get_running_loop()
    lines = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    loop.add_signal_handler(signal.SIGTERM, lines.feed_eof)
    loop.add_signal_handler(signal.SIGINT, lambda: None)  # the driver ends us, by ending our input
    injector = Injector(Shop(**json.loads(await lines.readline())["shop"]), faults)
    try:
        while line := await lines.readline():
            answer = await injector.answer(json.loads(line))
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()
    finally:
        await injector.clear_all()


if __name__ == "__main__":
    asyncio.run(serve())
