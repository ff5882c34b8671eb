"""Faults inside the shop's programs: what their own mistakes do to them.

Part of the injector (`agent.chaos.faults`). Each is set off as customers and colleagues do it, by the programs' own
interfaces and by what they are started from; all of it ends with the program or with the world.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from agent.chaos import disk, releases
from agent.demo.faults import InjectionError, Shop, Supervisor, put

MOST_EXPORTS = 12
LOOKS = 10
OLD_LOG_SECONDS = 2 * 86400.0
OLD_LOG_BYTES = 4 * 1024 * 1024


async def restart_unless(shop: Shop, program: str, started: int) -> None:
    """Restarts the program if it is still the process that was started at `started` (unix seconds)."""
    supervisor = Supervisor(shop.supervisor)
    if (await supervisor.info(program))["start"] == started:
        await supervisor.restart(program)


@dataclass
class _UntilRestart:
    """What only a restart of `orders` undoes."""

    shop: Shop
    _started: int = 0

    async def inject(self) -> float:
        self._started = (await Supervisor(self.shop.supervisor).info("orders"))["start"]
        at = time.time()
        await self._begin()
        return at

    async def _begin(self) -> None:
        raise NotImplementedError

    async def clear(self) -> None:
        if self._started:
            await restart_unless(self.shop, "orders", self._started)


class PoolLeak(_UntilRestart):
    """Exports that nobody fetches keep every connection of the pool of `orders`."""

    async def _begin(self) -> None:
        for number in range(MOST_EXPORTS):
            try:
                await put(f"{self.shop.orders}/exports", {}, "POST")
            except aiohttp.ClientResponseError as e:
                if e.status == 503 and number:
                    return
                raise


class Deadlock(_UntilRestart):
    """The threads that sign lock each other, for good, while everything else of `orders` is alive."""

    async def _begin(self) -> None:
        await put(f"{self.shop.orders}/audits", {}, "POST")
        timeout = aiohttp.ClientTimeout(total=1.5)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            for _ in range(LOOKS):
                try:
                    async with session.get(f"{self.shop.orders}/products") as answer:
                        await answer.read()
                except TimeoutError:
                    return
                await asyncio.sleep(0.3)
        raise InjectionError("deadlock: the threads have not locked each other")


class ThreadLeak(_UntilRestart):
    """Every answer of `orders` leaves a thread behind."""

    async def _begin(self) -> None:
        await put(f"{self.shop.orders}/feeds", {}, "POST")


class LogStorm(_UntilRestart):
    """The log level of `orders` is set to debug, and forgotten. It is not kept: a restart sets the usual one."""

    async def _begin(self) -> None:
        await put(f"{self.shop.orders}/loggers", {"level": "DEBUG"})


@dataclass
class Deploy:
    """A release is deployed: the link is switched and the program started again, as a deployment tool does it."""

    shop: Shop
    version: str = releases.BAD

    async def inject(self) -> float:
        await self._deploy(self.version)
        return time.time()

    async def _deploy(self, version: str) -> None:
        directory = Path(self.shop.releases)
        if releases.current(directory) != version:
            releases.switch(directory, version)
            await Supervisor(self.shop.supervisor).restart("orders")

    async def clear(self) -> None:
        await self._deploy(releases.FIRST)


@dataclass
class ClockSkew:
    """The clock of the machine under `orders` jumps, and is put right after a while by who runs the machine."""

    shop: Shop
    ahead: float = 600.0
    seconds: float = 30.0
    _recovery: asyncio.Task[None] | None = None

    async def inject(self) -> float:
        self._write(self.ahead)
        self._recovery = asyncio.ensure_future(after(self.seconds, lambda: self._write(0.0)))
        return time.time()

    def _write(self, seconds: float) -> None:
        if not self.shop.clock:
            raise InjectionError("clock_skew: libfaketime not found: apt-get install faketime")
        Path(self.shop.clock).write_text(f"{seconds:+.0f}\n")

    async def clear(self) -> None:
        if self._recovery is not None:
            self._recovery.cancel()
        if self.shop.clock:
            self._write(0.0)


@dataclass
class CacheStampede:
    """A job of somebody's invalidates the cache of `orders` again and again; he notices after a while."""

    shop: Shop
    every: float = 0.1
    seconds: float = 30.0
    _job: asyncio.Task[None] | None = None

    async def inject(self) -> float:
        await self._ask("DELETE")
        self._job = asyncio.ensure_future(self._again_and_again())
        return time.time()

    async def _ask(self, method: str) -> Any:
        return await put(f"{self.shop.orders}/caches/trends", None, method)

    async def _again_and_again(self) -> None:
        end = time.monotonic() + self.seconds
        while time.monotonic() < end:
            await asyncio.sleep(self.every)
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                await self._ask("DELETE")

    async def clear(self) -> None:
        """A stampede may outlive what set it off: where everybody computes at once, nobody is done in time. A program
        that is started again computes before it lets customers in."""
        if self._job is None:
            return
        self._job.cancel()
        for _ in range(LOOKS):
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                if (await self._ask("GET"))["held"]:
                    return
            await asyncio.sleep(0.3)
        await Supervisor(self.shop.supervisor).restart("orders")


@dataclass
class LogsFillDisk:
    """Old logs of a nightly import, which nobody deletes, take the last byte of the disk that receipts are kept on."""

    shop: Shop
    _files: tuple[Path, ...] = ()

    async def inject(self) -> float:
        if not self.shop.spool:
            raise InjectionError("disk_full: there is no small disk here: run as root, in a world of its own")
        log, old = Path(self.shop.spool) / "log", time.time() - OLD_LOG_SECONDS
        self._files = tuple(log / f"import.log.{number}" for number in range(1, 9))
        for file in self._files[:-1]:
            await asyncio.to_thread(disk.fill, file, OLD_LOG_BYTES)
        await asyncio.to_thread(disk.fill, self._files[-1])
        for file in self._files:
            os.utime(file, (old, old))
        return time.time()

    async def clear(self) -> None:
        for file in self._files:
            file.unlink(missing_ok=True)


async def after(seconds: float, do: Callable[[], Any]) -> None:
    await asyncio.sleep(seconds)
    with contextlib.suppress(OSError):
        do()
