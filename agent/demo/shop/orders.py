"""The orders API: prices, places and reports orders, over PostgreSQL and the payment provider.

Run as `python -m agent.demo.shop.orders --port N --database DSN --payments URL [--memory BYTES] [--cpu N]
[--release DIR] [--ca FILE] [--resolver HOST:PORT] [--spool DIR] [--trends HOURS]`. It does real work on its CPU for
every request (each price list and each receipt is signed) in two threads, within a budget of memory.

Two of its weaknesses are those of real services: a sales report, once begun, keeps a page of every answer without a
bound; and the flag `live_recommendations` makes every checkout wait for hundreds of small queries. More of them are in
`agent.demo.shop.weaknesses`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import os
import ssl
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import asyncpg
from aiohttp import web
from prometheus_client import Gauge

from agent.demo.shop.cache import Cache
from agent.demo.shop.metrics import (
    Callee,
    application,
    database_operation,
    limit_memory,
    listening,
    until_terminated,
)
from agent.demo.shop.resolver import Resolver
from agent.demo.shop.weaknesses import PENDING, POOL, Weaknesses

PAYMENTS_TIMEOUT_SECONDS = 2.5
DATABASE_TIMEOUT_SECONDS = 2.0
SIGNING_ROUNDS = 64_000  # some 14 ms of CPU a receipt
PAGE_BYTES = 1024 * 1024  # of a sales report, one page an answer
RENDER_BYTES = 4 * PAGE_BYTES  # working space that rendering an answer takes
RECEIPT_BYTES = 4096  # with its signatures; a page of its own
PROMISED_SECONDS = 2  # a customer does not wait longer for the confirmation
RECOMMENDED = 500

QUEUE_DEPTH = Gauge("queue_depth", "Jobs waiting", ["queue"])
QUEUE_AGE = Gauge("queue_oldest_age_seconds", "Age of the oldest waiting job", ["queue"])
FLAG = Gauge("feature_flag_enabled", "1 while the flag is on", ["flag"])

QUEUE_LOOK = """
SELECT count(*) AS depth, coalesce(extract(epoch FROM now() - min(queued_at)), 0)::float8 AS age
FROM jobs WHERE state = 'queued'"""
# What is in demand, by hours of the past: dear enough to be kept in a cache.
TRENDS = """
SELECT p.id, sum(hashtext(p.id::text || hour::text) & 7) AS looks
FROM products p CROSS JOIN generate_series(1, $1::int) AS hour GROUP BY p.id"""


def write_receipt(file: Path, receipt: str) -> None:
    """Appends it, and returns when it is on the disk. Raises OSError."""
    with file.open("a") as out:
        out.write(receipt.ljust(RECEIPT_BYTES - 1)[: RECEIPT_BYTES - 1] + "\n")
        out.flush()
        os.fsync(out.fileno())


class Orders:
    """The API's handlers and what they hold: connections, signing threads, flags and unfinished reports."""

    def __init__(
        self,
        pool: asyncpg.Pool,
        payments: Callee,
        weaknesses: Weaknesses,
        spool: Path | None = None,
        trend_hours: int = 0,
    ) -> None:
        self._pool, self._payments, self._weaknesses, self._spool = pool, payments, weaknesses, spool
        self.trends = Cache("trends", lambda: self._fetch(TRENDS, trend_hours)) if trend_hours else None
        self._signers = ThreadPoolExecutor(2, thread_name_prefix="sign")
        self._flags = {"live_recommendations": False, "gift_wrapping": True}
        self._recommending = asyncio.Lock()
        self._reports: dict[int, list[bytes]] = {}
        for flag, on in self._flags.items():
            FLAG.labels(flag).set(on)

    async def _sign(self, text: str, rounds: int) -> str:
        def work() -> str:
            self._weaknesses.enter_receipt()
            return hashlib.pbkdf2_hmac("sha256", text.encode(), b"shop", rounds).hex()

        return await asyncio.get_running_loop().run_in_executor(self._signers, work)

    async def _fetch(self, query: str, *values: object) -> list[Any]:
        """Rows of one statement. Raises 503 where the database does not answer in time or refuses."""
        try:
            with database_operation():
                async with asyncio.timeout(DATABASE_TIMEOUT_SECONDS):
                    with PENDING.labels(POOL).track_inprogress():
                        connection = await self._pool.acquire()
                    try:
                        return list(await connection.fetch(query, *values))
                    finally:
                        await self._pool.release(connection)
        except (TimeoutError, OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as e:
            raise web.HTTPServiceUnavailable(text=f"database: {type(e).__name__}") from e

    def _render(self, document: object, status: int = 200) -> web.Response:
        """The answer. Rendering takes working space, and every begun report keeps its page of it."""
        bytearray(RENDER_BYTES)
        for pages in self._reports.values():
            pages.append(b" " * PAGE_BYTES)
        self._weaknesses.answered(document, status)
        return web.json_response(document, status=status)

    async def products(self, _: web.Request) -> web.Response:
        rows = await self._fetch("SELECT id, name, cents FROM products ORDER BY id")
        signature = await self._sign(str(len(rows)), SIGNING_ROUNDS // 3)
        return self._render({"products": [dict(row) for row in rows], "signature": signature})

    async def place(self, request: web.Request) -> web.Response:
        order = await request.json()
        rows = await self._fetch("SELECT cents FROM products WHERE id = $1", int(order["product"]))
        if not rows:
            raise web.HTTPNotFound(text="no such product")
        cents = self._weaknesses.total(int(order["product"]), rows[0]["cents"])
        if self._flags["live_recommendations"]:
            await self._recommend()
        if self.trends is not None:  # customers are told how many others look at it
            await self.trends.get()
        signature = await self._sign(f"{order['product']}:{cents}", SIGNING_ROUNDS)
        await self._payments.call("POST", "/authorise", {"amount": cents, "signed_at": time.time()})
        placed = await self._fetch(
            "WITH o AS (INSERT INTO orders (product, cents, signature) VALUES ($1, $2, $3) RETURNING id), "
            "j AS (INSERT INTO jobs (order_id, expires_at) SELECT id, now() + make_interval(secs => $4) FROM o) "
            "SELECT id, pg_notify('jobs', '') FROM o",
            int(order["product"]),
            cents,
            signature,
            float(PROMISED_SECONDS),
        )
        await self._keep(f"{placed[0]['id']} {cents} {signature}\n")
        return self._render({"id": placed[0]["id"], "state": "placed"}, 201)

    async def _keep(self, receipt: str) -> None:
        """Receipts have to be kept for years: without one on disk there is no order. Raises 503."""
        if self._spool is None:
            return
        loop, file = asyncio.get_running_loop(), self._spool / "receipts"
        try:
            await loop.run_in_executor(self._signers, write_receipt, file, receipt)
        except OSError as e:
            raise web.HTTPServiceUnavailable(text=f"receipt: {e.strerror}") from e

    async def _recommend(self) -> None:
        """What others bought: one query for each, the classical mistake; and one checkout at a time, the other one."""
        async with self._recommending:
            for n in range(RECOMMENDED):
                if self._flags["live_recommendations"]:
                    await self._fetch("SELECT name FROM products WHERE id = $1", n % 40 + 1)

    async def show(self, request: web.Request) -> web.Response:
        number = int(request.match_info["id"])
        rows = await self._fetch("SELECT id, state FROM orders WHERE id = $1", number)
        if not rows:
            raise web.HTTPNotFound(text="no such order")
        return self._render(dict(rows[0]))

    async def begin_report(self, _: web.Request) -> web.Response:
        number = len(self._reports) + 1
        self._reports[number] = []
        return web.json_response({"report": number}, status=201)

    async def flags(self, _: web.Request) -> web.Response:
        return web.json_response({"flags": self._flags})

    async def flag(self, request: web.Request) -> web.Response:
        name = request.match_info["flag"]
        if name not in self._flags:
            raise web.HTTPNotFound(text="no such flag")
        if request.method == "PUT":
            wanted = await request.json()
            enabled = wanted.get("enabled")
            if not isinstance(enabled, bool):
                raise web.HTTPBadRequest(text='expected {"enabled": true|false}')
            if wanted.get("expected", self._flags[name]) != self._flags[name]:
                raise web.HTTPConflict(text=f"the flag is {self._flags[name]}")
            self._flags[name] = enabled
            FLAG.labels(name).set(enabled)
        return web.json_response({"flag": name, "enabled": self._flags[name]})


async def watch_queue(database: str) -> None:
    """Keeps the queue's gauges right, on a connection of its own; where it cannot, they say so (NaN)."""
    while True:
        try:
            connection = await asyncpg.connect(database, timeout=2, command_timeout=2)
            try:
                while True:
                    row = await connection.fetchrow(QUEUE_LOOK)
                    QUEUE_DEPTH.labels("jobs").set(row["depth"])
                    QUEUE_AGE.labels("jobs").set(row["age"])
                    await asyncio.sleep(0.5)
            finally:
                await connection.close(timeout=2)
        except (TimeoutError, OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            QUEUE_DEPTH.labels("jobs").set(float("nan"))
            QUEUE_AGE.labels("jobs").set(float("nan"))
            await asyncio.sleep(0.5)


@contextlib.asynccontextmanager
async def background(coroutine: Any) -> AsyncIterator[None]:
    task = asyncio.ensure_future(coroutine)
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def serve(
    port: int, database: str, payments: Callee, release: Path | None, spool: Path | None, trend_hours: int
) -> None:
    async with asyncpg.create_pool(
        database, min_size=4, max_size=12, command_timeout=DATABASE_TIMEOUT_SECONDS, timeout=2
    ) as pool:
        weaknesses = Weaknesses(pool, release)
        orders, app = Orders(pool, payments, weaknesses, spool, trend_hours), application()
        weaknesses.routes(app)
        app.router.add_get("/products", orders.products)
        app.router.add_post("/orders", orders.place)
        app.router.add_get("/orders/{id}", orders.show)
        app.router.add_post("/reports", orders.begin_report)
        app.router.add_get("/flags", orders.flags)
        app.router.add_get("/flags/{flag}", orders.flag)
        app.router.add_put("/flags/{flag}", orders.flag)
        if orders.trends is not None:
            app.router.add_get("/caches/trends", orders.trends.look)
            app.router.add_delete("/caches/trends", orders.trends.invalidate)
            with contextlib.suppress(web.HTTPServiceUnavailable):  # a warm cache before the first customer, if possible
                await orders.trends.get()
        try:
            async with listening(app, port), background(watch_queue(database)):
                await until_terminated()
        finally:
            await payments.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="the orders API")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--database", required=True, help="PostgreSQL URI")
    parser.add_argument("--payments", required=True, help="base URL of the payment provider")
    parser.add_argument("--memory", type=int, default=0, help="bytes of address space; 0: no limit")
    parser.add_argument("--cpu", type=int, default=-1, help="the CPU to run on; -1: any")
    parser.add_argument("--release", type=Path, help="directory of the release; without: as built")
    parser.add_argument("--ca", help="who vouches for the payment provider's certificate (PEM)")
    parser.add_argument("--resolver", help="HOST:PORT of the name server; without: the system's")
    parser.add_argument("--spool", type=Path, help="directory for receipts; without: none are kept")
    parser.add_argument("--trends", type=int, default=0, help="hours of the past that trends look at; 0: no trends")
    args = parser.parse_args()
    if args.memory:
        limit_memory(args.memory)
    if args.cpu >= 0:
        os.sched_setaffinity(0, {args.cpu})
    tls = ssl.create_default_context(cafile=args.ca) if args.ca else None
    resolver = Resolver(args.resolver) if args.resolver else None
    payments = Callee("payments", args.payments, PAYMENTS_TIMEOUT_SECONDS, tls, resolver)
    asyncio.run(serve(args.port, args.database, payments, args.release, args.spool, args.trends))


if __name__ == "__main__":
    main()
