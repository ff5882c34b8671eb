"""What can go wrong inside `orders` by its own doing, as it does inside real services.

Used by `agent.demo.shop.orders`. Each is a mistake that people make: connections that are never given back, two locks
taken in two orders, a thread for every answer, a log level that somebody forgot, a release that was not tested. None
of them happens by itself, and nothing here looks at who watches.
"""

from __future__ import annotations

import logging
import runpy
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import asyncpg
from aiohttp import web
from prometheus_client import Counter, Gauge

CONNECTIONS = Gauge(
    "db_client_connection_count",
    "Connections of the pool",
    ["db_client_connection_pool_name", "db_client_connection_state"],
)
MOST_CONNECTIONS = Gauge(
    "db_client_connection_max", "Connections that the pool may have", ["db_client_connection_pool_name"]
)
PENDING = Gauge(
    "db_client_connection_pending_requests", "Requests that wait for a connection", ["db_client_connection_pool_name"]
)
MESSAGES = Counter("log_messages", "Lines logged", ["level"])
BUILD = Gauge("build_info", "1; its labels say which build runs", ["version"])

POOL = "shop"
FEED_STACK_BYTES = 512 * 1024
FEED_SECONDS = 5.0
AUDIT_SECONDS = 10.0
DUMPED_LINES = 700  # of an answer, at the level DEBUG
LEVELS = {"DEBUG": logging.DEBUG, "INFO": logging.INFO}


class _Counting(logging.StreamHandler[Any]):
    """Writes each line at once, as a service under a supervisor does, and counts it."""

    def emit(self, record: logging.LogRecord) -> None:
        super().emit(record)
        MESSAGES.labels(record.levelname.lower()).inc()


def _logger() -> logging.Logger:
    logger = logging.getLogger("orders")
    handler = _Counting(sys.stdout)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logger.addHandler(handler)
    logger.propagate = False
    logger.setLevel(logging.INFO)
    return logger


class Weaknesses:
    """The state of all of them, and the routes by which customers and colleagues run into them."""

    def __init__(self, pool: asyncpg.Pool, release: Path | None = None) -> None:
        self._pool, self._logger = pool, _logger()
        self._exports: list[Any] = []
        self._ledger, self._prices = threading.Lock(), threading.Lock()
        self._receipts = 0
        self._never = threading.Event()  # waited for in place of sleeping, which libfaketime breaks
        self._feeding = False
        self._total: Callable[[int, int], int] = lambda _, cents: cents
        if release is not None:
            self._total = runpy.run_path(str(release / "pricing.py"))["total"]
            BUILD.labels((release / "VERSION").read_text().strip()).set(1)
        for state, count in (("used", self._used), ("idle", pool.get_idle_size)):
            CONNECTIONS.labels(POOL, state).set_function(count)
        MOST_CONNECTIONS.labels(POOL).set_function(pool.get_max_size)
        PENDING.labels(POOL).set(0)

    def _used(self) -> int:
        return int(self._pool.get_size() - self._pool.get_idle_size())

    def routes(self, app: web.Application) -> None:
        app.router.add_post("/exports", self.export)
        app.router.add_post("/audits", self.audit)
        app.router.add_post("/feeds", self.feed)
        app.router.add_get("/loggers", self.loggers)
        app.router.add_put("/loggers", self.loggers)

    # -- a connection that is never given back ---------------------------------------------------------------------

    async def export(self, _: web.Request) -> web.Response:
        """An export of the catalogue, fetched in pieces; until its last piece it keeps a connection."""
        try:
            self._exports.append(await self._pool.acquire(timeout=2))
        except TimeoutError as e:
            raise web.HTTPServiceUnavailable(text="no connection is free") from e
        return web.json_response({"export": len(self._exports)}, status=201)

    # -- two locks in two orders -----------------------------------------------------------------------------------

    def enter_receipt(self) -> None:
        """Called by the signing threads for each receipt: the ledger, then the prices."""
        with self._ledger, self._prices:
            self._receipts += 1

    async def audit(self, _: web.Request) -> web.Response:
        threading.Thread(target=self._audit, name="audit", daemon=True).start()
        return web.json_response({"audit": "begun"}, status=202)

    def _audit(self) -> None:
        """Goes through the prices, and looks into the ledger meanwhile: the other order."""
        deadline = time.monotonic() + AUDIT_SECONDS
        while time.monotonic() < deadline:
            with self._prices:
                self._never.wait(0.02)
                with self._ledger:
                    self._receipts += 0

    # -- a thread for each answer ----------------------------------------------------------------------------------

    async def feed(self, _: web.Request) -> web.Response:
        """Somebody subscribes to the answers: each is handed to a thread, which nobody ends."""
        threading.stack_size(FEED_STACK_BYTES)
        self._feeding = True
        return web.json_response({"feed": "begun"}, status=201)

    def _follow(self) -> None:
        while True:
            self._never.wait(FEED_SECONDS)

    def answered(self, document: object, status: int) -> None:
        """Called for every answer."""
        if self._feeding:
            threading.Thread(target=self._follow, name="feed", daemon=True).start()
        self._logger.info("answered %d", status)
        if self._logger.isEnabledFor(logging.DEBUG):
            for line in range(DUMPED_LINES):
                self._logger.debug("field %d of the answer: %.60r", line, document)

    # -- a log level that somebody forgot --------------------------------------------------------------------------

    async def loggers(self, request: web.Request) -> web.Response:
        if request.method == "PUT":
            level = (await request.json()).get("level")
            if level not in LEVELS:
                raise web.HTTPBadRequest(text=f'expected {{"level": one of {", ".join(LEVELS)}}}')
            self._logger.setLevel(LEVELS[level])
        return web.json_response({"level": logging.getLevelName(self._logger.level)})

    # -- a release -------------------------------------------------------------------------------------------------

    def total(self, product: int, cents: int) -> int:
        """What a product costs, as this release computes it."""
        return self._total(product, cents)
