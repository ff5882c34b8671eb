"""A cache with the mistake that most of them have: while there is no value, everybody who asks computes one.

Used by `agent.demo.shop.orders`. A value is kept until it is invalidated, and one that was computed from what was true
before that is not kept at all. Names of the metrics: Micrometer's.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web
from prometheus_client import Counter

GETS = Counter("cache_gets", "Look-ups in a cache", ["cache", "result"])


class Cache:
    """One value under `name`; `compute` makes it."""

    def __init__(self, name: str, compute: Callable[[], Awaitable[Any]]) -> None:
        self._name, self._compute = name, compute
        self._value: Any = None
        self._invalidations = 0

    async def get(self) -> Any:
        """Raises what `compute` raises."""
        if self._value is not None:
            GETS.labels(self._name, "hit").inc()
            return self._value
        GETS.labels(self._name, "miss").inc()
        begun = self._invalidations
        value = await self._compute()
        if begun == self._invalidations:
            self._value = value
        return value

    async def look(self, _: web.Request) -> web.Response:
        return web.json_response({"held": self._value is not None})

    async def invalidate(self, _: web.Request) -> web.Response:
        self._value = None
        self._invalidations += 1
        return web.json_response({"invalidations": self._invalidations})
