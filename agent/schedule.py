"""Which incident is investigated next: fair between tenants, bounded per tenant.

Used by `agent.app` alone. At most `limit` incidents of a tenant await diagnosis here; what is offered beyond that is
not queued but remembered as overflow, stays in the journal's fold, and is fetched from there (oldest first, through
`refill`) as soon as the tenant's queue has room again: nothing is dropped. An incident that was begun already (a
person decided, a time came, an alert resolved) is always queued, once: `refill` would not find it, and a flood of new
ones must not hold it up. Tenants take turns, so one tenant's flood delays another by at most one investigation per
slot. Never decides what an investigation does, and never runs one.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable


class Schedule:
    """`refill(tenant)` yields the tenant's incidents that still wait in the journal, oldest first."""

    def __init__(self, limit: int, refill: Callable[[str], Iterable[str]]) -> None:
        if limit < 1:
            raise ValueError(f"schedule: limit is {limit}, expected at least 1")
        self._limit = limit
        self._refill = refill
        self._queues: OrderedDict[str, deque[str]] = OrderedDict()  # the first tenant is the next to be served
        self._queued: set[str] = set()
        self._running: set[str] = set()
        self._again: dict[str, str] = {}  # offered while running: incident -> tenant
        self._overflowed: set[str] = set()
        self._ready = asyncio.Event()
        self.watermark = 0  # the longest that one tenant's queue has been

    def offer(self, tenant: str, incident: str, *, begun: bool = False) -> bool:
        """Ask for `incident` to be looked at. False: the tenant's queue is full and it waits in the journal, which
        happens only to one that was not begun."""
        if incident in self._queued:
            return True
        if incident in self._running:
            self._again[incident] = tenant
            return True
        queue = self._queues.setdefault(tenant, deque())
        if len(queue) >= self._limit and not begun:
            self._overflowed.add(tenant)
            return False
        queue.append(incident)
        self._queued.add(incident)
        self.watermark = max(self.watermark, len(queue))
        self._ready.set()
        return True

    async def take(self) -> str:
        """The next incident, tenants in turn; waits while there is none. The caller must call `done` for it."""
        while True:
            for tenant in self._queues:
                queue = self._queues[tenant]
                if queue:
                    incident = queue.popleft()
                    self._queued.discard(incident)
                    self._running.add(incident)
                    self._queues.move_to_end(tenant)
                    self._fill(tenant)
                    return incident
            self._ready.clear()
            await self._ready.wait()

    def done(self, incident: str) -> None:
        """The incident left its slot; if it was offered meanwhile, it is queued again."""
        self._running.discard(incident)
        tenant = self._again.pop(incident, None)
        if tenant is not None:
            self.offer(tenant, incident, begun=True)

    def _fill(self, tenant: str) -> None:
        queue = self._queues[tenant]
        if tenant in self._overflowed:
            self._overflowed.discard(tenant)
            for waiting in self._refill(tenant):
                if waiting in self._queued or waiting in self._running:
                    continue
                if not self.offer(tenant, waiting):
                    break
        if not queue:
            del self._queues[tenant]  # many tenants may pass by; an empty queue is not kept

    def depth(self, tenant: str | None = None) -> int:
        """How many wait: of one tenant, or of all."""
        if tenant is not None:
            return len(self._queues.get(tenant, ()))
        return len(self._queued)

    def depths(self) -> dict[str, int]:
        return {tenant: len(queue) for tenant, queue in self._queues.items()}
