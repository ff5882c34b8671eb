"""What the chaos harness can break, beyond the demo's faults: run as the injector, `python -m agent.chaos.faults`.

Started by `agent.chaos.world`, spoken to as `agent.demo.faults` describes, and as blind: it knows the shop's addresses,
never the agent's. Faults of the agent and of its monitoring are the harness' own (`agent.chaos.run`), since the
injector must not know them. Every fault lives in processes that end with the injector, in sessions that end with their
connection, or in parts of the world that end with it: after a kill -9 of everything nothing stays broken.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import asyncpg
import psutil

from agent.chaos import releases
from agent.chaos.inner_faults import (
    CacheStampede,
    ClockSkew,
    Deadlock,
    Deploy,
    LogsFillDisk,
    LogStorm,
    PoolLeak,
    ThreadLeak,
)
from agent.chaos.outer_faults import Certificate, Loss, Names, SlowDisk
from agent.demo import faults as demo
from agent.demo.children import set_session_priority
from agent.demo.faults import Crash, InjectionError, Make, Shop, Stuck, Supervisor, put

SPARE_DESCRIPTORS = 2
LOOKS = 20


@dataclass
class PaymentsFailing:
    """The payment provider answers most requests with an error of its own."""

    shop: Shop
    share: float = 0.8
    seconds: float = 0.0  # it gets well by itself after this time; 0: only `clear` mends it
    _recovery: asyncio.Task[None] | None = None

    async def inject(self) -> float:
        await self._fail(self.share)
        if self.seconds:
            self._recovery = asyncio.ensure_future(self._recover())
        return time.time()

    async def _fail(self, share: float) -> None:
        await put(f"{self.shop.payments}/sandbox/failing", {"share": share})

    async def _recover(self) -> None:
        await asyncio.sleep(self.seconds)
        await self._fail(0.0)

    async def clear(self) -> None:
        if self._recovery is not None:
            self._recovery.cancel()
        await self._fail(0.0)


@dataclass
class PaymentsSlow:
    """The payment provider answers slowly for a while: like the demo's, with its length and delay to choose."""

    shop: Shop
    delay: float = 1.6
    seconds: float = 24.0
    _recovery: asyncio.Task[None] | None = None

    async def inject(self) -> float:
        await self._delay(self.delay)
        self._recovery = asyncio.ensure_future(self._recover())
        return time.time()

    async def _delay(self, seconds: float) -> None:
        await put(f"{self.shop.payments}/sandbox/delay", {"seconds": seconds})

    async def _recover(self) -> None:
        await asyncio.sleep(self.seconds)
        await self._delay(0.0)

    async def clear(self) -> None:
        if self._recovery is not None:
            self._recovery.cancel()
        await self._delay(0.0)


@dataclass
class Descriptors:
    """A program may open hardly any more files than it has open: what a leak of descriptors ends in."""

    shop: Shop
    program: str = "orders"
    _process: psutil.Process | None = None
    _usual: tuple[int, int] = (0, 0)

    async def inject(self) -> float:
        info = await Supervisor(self.shop.supervisor).info(self.program)
        if not info["pid"]:
            raise InjectionError(f"descriptors: {self.program} is {info['statename']}")
        self._process = psutil.Process(info["pid"])
        self._usual = self._process.rlimit(resource.RLIMIT_NOFILE)
        open_at_rest = self._process.num_fds()
        for _ in range(LOOKS):  # between two requests: those under way have files open, too
            await asyncio.sleep(0.05)
            open_at_rest = min(open_at_rest, self._process.num_fds())
        few = open_at_rest + SPARE_DESCRIPTORS
        self._process.rlimit(resource.RLIMIT_NOFILE, (few, self._usual[1]))
        return time.time()

    async def clear(self) -> None:
        if self._process is not None and self._process.is_running():
            with contextlib.suppress(psutil.NoSuchProcess):
                self._process.rlimit(resource.RLIMIT_NOFILE, self._usual)
        await Supervisor(self.shop.supervisor).start(self.program)


@dataclass
class Network:
    """A link of the shop delays, stalls or refuses what passes. `seconds` 0: until it is cleared."""

    shop: Shop
    link: str
    delay: float = 0.0
    stalled: bool = False
    refusing: bool = False
    seconds: float = 0.0
    _recovery: asyncio.Task[None] | None = None

    async def inject(self) -> float:
        await self._put({"delay_seconds": self.delay, "stalled": self.stalled, "refusing": self.refusing})
        if self.seconds:
            self._recovery = asyncio.ensure_future(self._recover())
        return time.time()

    async def _put(self, state: dict[str, Any]) -> None:
        await put(f"{self.shop.links[self.link]}/link", state)

    async def _recover(self) -> None:
        await asyncio.sleep(self.seconds)
        await self._put({})

    async def clear(self) -> None:
        if self._recovery is not None:
            self._recovery.cancel()
        await self._put({})


@dataclass
class Backlog:
    """A campaign fills the queue: jobs that nobody waits for at once, and that are done in order like all others.
    `clear` takes out what is left of them, and gives the worker the pool that it had: the next fault needs that."""

    shop: Shop
    jobs: float = 500
    _usual: int = 0  # the worker's pool

    async def inject(self) -> float:
        self._usual = (await demo.put(f"{self.shop.worker}/pool", None, "GET"))["size"]
        connection = await asyncpg.connect(self.shop.database, timeout=5)
        try:
            await connection.execute(
                "INSERT INTO jobs (order_id, expires_at) "
                "SELECT 0, now() + interval '1 hour' FROM generate_series(1, $1)",
                int(self.jobs),
                timeout=10,
            )
            return time.time()
        finally:
            connection.terminate()

    async def clear(self) -> None:
        connection = await asyncpg.connect(self.shop.database, timeout=5)
        try:
            await connection.execute(
                "UPDATE jobs SET state = 'expired' WHERE state = 'queued' AND order_id = 0", timeout=10
            )
        finally:
            connection.terminate()
        if self._usual:
            await demo.put(f"{self.shop.worker}/pool", {"size": self._usual})


@dataclass
class DbFrozen:
    """The database's machine hangs: every process of PostgreSQL stops, and all of its connections stay open."""

    shop: Shop
    _stopped: tuple[psutil.Process, ...] = ()

    async def inject(self) -> float:
        connection = await asyncpg.connect(self.shop.database, timeout=5)
        try:
            backend = psutil.Process(await connection.fetchval("SELECT pg_backend_pid()", timeout=5))
            leader = backend.parent()
        finally:
            connection.terminate()
        if leader is None or "postgres" not in leader.name():
            raise InjectionError("db_frozen: no PostgreSQL server of ours was found")
        self._stopped = (leader, *leader.children())
        for process in self._stopped:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()
        return time.time()

    async def clear(self) -> None:
        for process in self._stopped:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()


@dataclass
class Busy:
    """A short burst of work on the CPU of `orders`, that ends by itself. Processes die with the injector."""

    shop: Shop
    seconds: float = 5.0
    _processes: tuple[asyncio.subprocess.Process, ...] = ()

    async def inject(self) -> float:
        argv = (*demo.leash(), "/usr/bin/timeout", f"{self.seconds:.1f}", *demo.leash())
        process = await asyncio.create_subprocess_exec(
            *argv, "/bin/sh", "-c", "while :; do :; done", start_new_session=True
        )
        self._processes = (process,)
        await asyncio.sleep(0.1)
        with contextlib.suppress(psutil.NoSuchProcess):
            leader = psutil.Process(process.pid)
            for one in (leader, *leader.children()):
                one.cpu_affinity([self.shop.cpu])
            set_session_priority(process.pid, -7)
        return time.time()

    async def clear(self) -> None:
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()


@dataclass
class Pause:
    """A program stops for a moment, as a long garbage collection or a live migration makes it."""

    shop: Shop
    program: str = "worker"
    seconds: float = 1.0
    _inner: Stuck | None = None
    _recovery: asyncio.Task[None] | None = None

    async def inject(self) -> float:
        self._inner = Stuck(self.shop, self.program)
        at = await self._inner.inject()
        self._recovery = asyncio.ensure_future(self._recover())
        return at

    async def _recover(self) -> None:
        await asyncio.sleep(self.seconds)
        if self._inner is not None:
            await self._inner.clear()

    async def clear(self) -> None:
        if self._recovery is not None:
            self._recovery.cancel()
        if self._inner is not None:
            await self._inner.clear()


class Surge(demo.PoolExhausted):
    """More customers for a while. `clear` sends them home and leaves the pool as it is."""

    async def inject(self) -> float:
        at = await super().inject()
        self._usual = 0
        return at


FAULTS: dict[str, Make] = {
    **demo.FAULTS,
    "payments_slow": PaymentsSlow,
    "payments_failing": PaymentsFailing,
    "payments_partition": partial(Network, link="payments", stalled=True),
    "orders_crash": partial(Crash, program="orders"),
    "orders_stuck": partial(Stuck, program="orders"),
    "front_crash": partial(Crash, program="front"),
    "front_stuck": partial(Stuck, program="front"),
    "orders_descriptors": Descriptors,
    "db_delay": partial(Network, link="database", delay=0.12),
    "db_partition": partial(Network, link="database", stalled=True),
    "db_refused": partial(Network, link="database", refusing=True),
    "db_frozen": DbFrozen,
    "queue_backlog": Backlog,
    "cpu_burst": Busy,
    "worker_pause": Pause,
    "surge": Surge,
    "pool_leak": PoolLeak,
    "deadlock": Deadlock,
    "thread_leak": ThreadLeak,
    "log_storm": LogStorm,
    "bad_deploy": Deploy,
    "good_deploy": partial(Deploy, version=releases.HARMLESS),
    "clock_skew": ClockSkew,
    "names_failing": Names,
    "certificate_expired": Certificate,
    "certificate_renewed": partial(Certificate, name="renewed"),
    "payments_loss": Loss,
    "disk_full": LogsFillDisk,
    "disk_slow": SlowDisk,
    "cache_stampede": CacheStampede,
}


def known() -> frozenset[str]:
    return frozenset(FAULTS)


if __name__ == "__main__":
    asyncio.run(demo.serve(FAULTS))
