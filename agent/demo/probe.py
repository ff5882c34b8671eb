"""The outside probe: a customer with a stopwatch, who decides when the shop is degraded and when it has recovered.

Used by the demo's driver and its tests. It knows the front's address and nothing else: not Prometheus, not the agent,
not what was injected. A probe is good when a checkout is answered with 200 within `GOOD_SECONDS`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import aiohttp

GOOD_SECONDS = 0.75
INTERVAL_SECONDS = 0.4
PATIENCE_SECONDS = 4.0
CHECKOUT = {"product": 1}
IN_A_ROW = 4


@dataclass(frozen=True)
class Checkout:
    """One probe. `at` is when it began (unix seconds); `seconds` is when it was decided: by its answer, or by there
    still being none after `GOOD_SECONDS`."""

    at: float
    seconds: float
    good: bool


def degraded_at(probes: Sequence[Checkout]) -> float | None:
    """When the second of two bad probes in a row had shown it; None while the shop is fine."""
    for one, two in itertools.pairwise(probes):
        if not one.good and not two.good:
            return two.at + two.seconds
    return None


def recovered_at(probes: Sequence[Checkout]) -> float | None:
    """When the last of `IN_A_ROW` good probes after the last bad one had been answered; None until then, and where
    nothing was bad."""
    bad = [i for i, probe in enumerate(probes) if not probe.good]
    if not bad:
        return None
    row = probes[bad[-1] + 1 :][:IN_A_ROW]
    return max(c.at + c.seconds for c in row) if len(row) == IN_A_ROW else None


class Probe:
    """Probes every `INTERVAL_SECONDS`, whatever becomes of the probe before. Good is an answer with 200 within
    `good_seconds`; `body` is sent as JSON, None: nothing is."""

    def __init__(
        self, url: str, method: str = "POST", body: object = CHECKOUT, good_seconds: float = GOOD_SECONDS
    ) -> None:
        self._url, self._method, self._body, self._good_seconds = url, method, body, good_seconds
        self._seen: list[Checkout] = []
        self._undecided: set[float] = set()

    def since(self, at: float) -> list[Checkout]:
        """Probes that began at or after `at`, in the order in which they began, up to the first undecided one."""
        end = min(self._undecided, default=float("inf"))
        return sorted((c for c in self._seen if at <= c.at < end), key=lambda c: c.at)

    def indicator(self, since: float) -> float:
        """The service-level indicator: the share of good probes (NaN when there is none)."""
        probes = self.since(since)
        return sum(c.good for c in probes) / len(probes) if probes else float("nan")

    def steady(self, seconds: float) -> bool:
        """Whether nearly every probe of the last `seconds` was good (other work on the machine may delay one), and the
        last few all were."""
        probes = self.since(time.time() - seconds)
        row = probes[-IN_A_ROW:]
        return len(row) == IN_A_ROW and all(c.good for c in row) and sum(c.good for c in probes) >= 0.9 * len(probes)

    async def _one(self, session: aiohttp.ClientSession) -> None:
        at, began = time.time(), time.monotonic()
        self._undecided.add(at)
        buying = asyncio.ensure_future(self._buy(session))
        try:
            done, _ = await asyncio.wait({buying}, timeout=self._good_seconds)
            good = bool(done) and buying.result()
            self._seen.append(Checkout(at, time.monotonic() - began, good))
            self._undecided.discard(at)
            await buying  # the customer waits on, as customers do; the verdict stands
        finally:
            buying.cancel()

    async def _buy(self, session: aiohttp.ClientSession) -> bool:
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            async with session.request(self._method, self._url, json=self._body) as answer:
                await answer.read()
                return answer.status == 200
        return False

    async def _run(self) -> None:
        timeout = aiohttp.ClientTimeout(total=PATIENCE_SECONDS)
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        session = aiohttp.ClientSession(timeout=timeout, connector=connector)
        async with session, asyncio.TaskGroup() as probes:
            while True:
                probes.create_task(self._one(session))
                await asyncio.sleep(INTERVAL_SECONDS)

    @contextlib.asynccontextmanager
    async def probing(self) -> AsyncIterator[Probe]:
        """Probes while the context lasts."""
        task = asyncio.ensure_future(self._run())
        try:
            yield self
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
