"""Faults outside the shop's programs: names, certificates, connections and disks, which nobody in the shop can mend.

Part of the injector (`agent.chaos.faults`). Each ends by itself after `seconds`, as somebody else puts it right, and
with the world at the latest.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from agent.chaos.throttle import Throttle, obstacle
from agent.demo.faults import InjectionError, Shop, Supervisor, put


@dataclass
class _Passing:
    """`_set(True)` breaks it, `_set(False)` mends it: after `seconds` (0: not), or when it is cleared."""

    shop: Shop
    seconds: float = 30.0
    _recovery: asyncio.Task[None] | None = None

    async def inject(self) -> float:
        await self._set(True)
        if self.seconds:
            self._recovery = asyncio.ensure_future(self._recover())
        return time.time()

    async def _recover(self) -> None:
        await asyncio.sleep(self.seconds)
        await self._set(False)

    async def _set(self, broken: bool) -> None:
        raise NotImplementedError

    async def clear(self) -> None:
        if self._recovery is not None:
            self._recovery.cancel()
        await self._set(False)


@dataclass
class Names(_Passing):
    """The name server answers every question with "server failure", or (`silent` 1) not at all."""

    silent: float = 0.0

    async def _set(self, broken: bool) -> None:
        mode = "answering" if not broken else "silent" if self.silent else "failing"
        await put(f"{self.shop.names}/names", {"mode": mode})


@dataclass
class Certificate(_Passing):
    """The payment provider shows another certificate."""

    name: str = "expired"

    async def _set(self, broken: bool) -> None:
        name = self.name if broken else "valid"
        if name not in self.shop.certificates:
            raise InjectionError(f"certificate: there is none called {name}")
        await put(f"{self.shop.payments}/sandbox/certificate", {"file": self.shop.certificates[name]})


@dataclass
class Loss(_Passing):
    """A link resets a share of what is sent over it, with the connection."""

    link: str = "payments"
    share: float = 0.4

    async def _set(self, broken: bool) -> None:
        await put(f"{self.shop.links[self.link]}/link", {"loss": self.share} if broken else {})


@dataclass
class SlowDisk(_Passing):
    """The disk that receipts are kept on takes so many `writes` a second from the shop's programs, also from those that
    are started meanwhile."""

    writes: float = 4.0
    _throttle: Throttle | None = None

    async def _set(self, broken: bool) -> None:
        if broken:
            why = obstacle() if self.shop.spool else "there is no small disk here: run as root, in a world of its own"
            if why:
                raise InjectionError(f"disk_slow: {why}")
            leader = await Supervisor(self.shop.supervisor).pid()
            try:
                self._throttle = Throttle.of(Path(self.shop.spool), leader, int(self.writes))
            except (OSError, psutil.Error) as error:
                raise InjectionError(f"disk_slow: the writes of {leader} are not bounded: {error}") from error
        elif self._throttle is not None:
            self._throttle.end()
            self._throttle = None
