"""The worker: takes jobs from PostgreSQL and confirms orders.

Run as `python -m agent.demo.shop.worker --port N --database DSN`. Its pool can be resized while it runs: `GET` and
`PUT /pool` with `{"size": n}`. A claim is one statement (SKIP LOCKED) and a lease: no transaction stays open while a
job is done, and the jobs of a worker that died come back.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
from typing import Any

import asyncpg
from aiohttp import web
from prometheus_client import Counter, Gauge

from agent.demo.shop.metrics import application, database_operation, listening, until_terminated

JOB_SECONDS = 0.1  # picking and packing: waiting, not computing
LEASE_SECONDS = 10
MAX_SIZE = 32

JOBS = Counter("worker_jobs", "Jobs ended", ["status"])
POOL_SIZE = Gauge("worker_pool_size", "Jobs that may be done at once")
BUSY = Gauge("worker_busy", "Jobs being done")

EXPIRE = """
UPDATE jobs SET state = 'expired' WHERE id IN (
    SELECT id FROM jobs WHERE state = 'queued' AND expires_at < now() FOR UPDATE SKIP LOCKED)"""
RECLAIM = f"""
UPDATE jobs SET state = 'queued', claimed_at = NULL
WHERE state = 'running' AND claimed_at < now() - interval '{LEASE_SECONDS} seconds'"""  # noqa: S608 - a constant
CLAIM = """
UPDATE jobs SET state = 'running', claimed_at = now() WHERE id = (
    SELECT id FROM jobs WHERE state = 'queued' ORDER BY id FOR UPDATE SKIP LOCKED LIMIT 1)
RETURNING id, order_id"""
CONFIRM = """
WITH o AS (UPDATE orders SET state = 'confirmed' WHERE id = $2)
UPDATE jobs SET state = 'done' WHERE id = $1"""


class Worker:
    """A pool of tasks that each claim, do and confirm one job after the other."""

    def __init__(self, database: str, size: int) -> None:
        self._database = database
        self._tasks: list[asyncio.Task[None]] = []
        self._work = asyncio.Event()
        self.resize(size)

    @property
    def size(self) -> int:
        return len(self._tasks)

    def resize(self, size: int) -> None:
        while len(self._tasks) < size:
            self._tasks.append(asyncio.ensure_future(self._run()))
        while len(self._tasks) > size:
            self._tasks.pop().cancel()
        POOL_SIZE.set(size)

    def wake(self, *_: object) -> None:
        """Called by the database's notification: there is work."""
        self._work.set()

    async def _run(self) -> None:
        while True:
            try:
                connection = await asyncpg.connect(self._database, timeout=2, command_timeout=5)
                try:
                    await connection.add_listener("jobs", self.wake)
                    while True:
                        await self._step(connection)
                finally:
                    connection.terminate()
            except (TimeoutError, OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
                JOBS.labels("failed").inc()
                await asyncio.sleep(0.5)

    async def _step(self, connection: Any) -> None:
        self._work.clear()
        with database_operation():
            expired = await connection.execute(EXPIRE)  # "UPDATE 3"
            await connection.execute(RECLAIM)
            job = await connection.fetchrow(CLAIM)
        JOBS.labels("expired").inc(int(expired.split()[-1]))
        if job is None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._work.wait(), 0.5)
            return
        with BUSY.track_inprogress():
            await asyncio.sleep(JOB_SECONDS)
            with database_operation():
                await connection.execute(CONFIRM, job["id"], job["order_id"])
        JOBS.labels("done").inc()

    async def pool(self, request: web.Request) -> web.Response:
        if request.method == "PUT":
            wanted = await request.json()
            size = wanted.get("size")
            if not isinstance(size, int) or not 1 <= size <= MAX_SIZE:
                raise web.HTTPBadRequest(text=f'expected {{"size": 1..{MAX_SIZE}}}')
            if wanted.get("expected", self.size) != self.size:
                raise web.HTTPConflict(text=f"the pool has {self.size}")
            self.resize(size)
        return web.json_response({"size": self.size})


async def serve(port: int, database: str, size: int) -> None:
    app = application()
    worker = Worker(database, size)
    app.router.add_get("/pool", worker.pool)
    app.router.add_put("/pool", worker.pool)
    async with listening(app, port):
        await until_terminated()
    worker.resize(0)


def main() -> None:
    parser = argparse.ArgumentParser(description="the shop's worker")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--database", required=True, help="PostgreSQL URI")
    parser.add_argument("--size", type=int, default=2, help="jobs done at once")
    args = parser.parse_args()
    asyncio.run(serve(args.port, args.database, args.size))


if __name__ == "__main__":
    main()
