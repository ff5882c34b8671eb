"""The shop's standard instruments: an HTTP server that measures itself, an HTTP client and a database that are
measured.

Used by every process of the shop. Names and labels follow OpenTelemetry's semantic conventions in their Prometheus
form, so that rule packs written for other people's services fit. The `service` label is not set here: the scrape adds
it.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import signal
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web
from aiohttp.abc import AbstractResolver
from prometheus_client import CONTENT_TYPE_LATEST, Gauge, Histogram, generate_latest

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

BUCKETS = (
    0.005,
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1.0,
    1.5,
    2.0,
    2.5,
    3.0,
    3.5,
    4.0,
    5.0,
    7.5,
    10.0,
)

SERVER = Histogram(
    "http_server_request_duration_seconds",
    "Duration of HTTP requests served",
    ["http_request_method", "http_route", "http_response_status_code"],
    buckets=BUCKETS,
)
CLIENT = Histogram(
    "http_client_request_duration_seconds",
    "Duration of HTTP requests made",
    ["server_address", "http_response_status_code", "error_type"],
    buckets=BUCKETS,
)
DATABASE = Histogram(
    "db_client_operation_duration_seconds",
    "Duration of database operations",
    ["db_system_name", "server_address", "error_type"],
    buckets=BUCKETS,
)
CLOCK = Gauge("process_clock_seconds", "What this process takes for the time (unix seconds)")
THREADS = Gauge("process_thread_count", "Threads of this process")
MEMORY_LIMIT = Gauge("process_memory_limit_bytes", "Address space this process may use (RLIMIT_AS)")


class CallError(Exception):
    """Another service did not answer properly. `status` is its status, 0 when there was no answer at all."""

    def __init__(self, callee: str, status: int, reason: str) -> None:
        super().__init__(f"{callee}: {reason}")
        self.callee, self.status, self.reason = callee, status, reason


class Callee:
    """One service that is called over HTTP, measured from the caller's side."""

    def __init__(
        self,
        name: str,
        url: str,
        timeout_seconds: float,
        tls: ssl.SSLContext | None = None,
        resolver: AbstractResolver | None = None,
    ) -> None:
        """`tls` says whom to trust. With either of the last two every call has a connection of its own."""
        self.name, self._url, self._tls, self._resolver = name, url, tls, resolver
        self._timeout = aiohttp.ClientTimeout(total=timeout_seconds)
        self._session: aiohttp.ClientSession | None = None

    async def call(self, method: str, path: str, body: object = None) -> Any:
        """The answer's JSON. Raises CallError on a time-out, a broken connection or a status of 400 and above."""
        if self._session is None:
            fresh = self._tls is not None or self._resolver is not None
            connector = aiohttp.TCPConnector(
                limit=0,
                ssl=self._tls if self._tls is not None else True,
                resolver=self._resolver,
                use_dns_cache=self._resolver is None,
                force_close=fresh,
            )
            self._session = aiohttp.ClientSession(connector=connector)
        started, status, error = time.monotonic(), "", ""
        try:
            async with self._session.request(method, self._url + path, json=body, timeout=self._timeout) as answer:
                status = str(answer.status)
                document = await answer.json()
                if answer.status >= 400:
                    error = status
                    raise CallError(self.name, answer.status, f"status {status}")
                return document
        except TimeoutError as e:
            error = "timeout"
            raise CallError(self.name, 0, "no answer in time") from e
        except (aiohttp.ClientError, ValueError) as e:
            error = type(e).__name__
            raise CallError(self.name, 0, str(e)) from e
        except asyncio.CancelledError:
            error = "cancelled"
            raise
        finally:
            CLIENT.labels(self.name, status, error).observe(time.monotonic() - started)

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()


@contextlib.contextmanager
def database_operation() -> Iterator[None]:
    """Measures what is done inside it as one operation on PostgreSQL."""
    started, error = time.monotonic(), ""
    try:
        yield
    except TimeoutError:
        error = "timeout"
        raise
    except BaseException as e:  # not handled: named for the label, and passed on
        error = type(e).__name__
        raise
    finally:
        DATABASE.labels("postgresql", "postgres", error).observe(time.monotonic() - started)


@web.middleware
async def measured(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Counts and times every request. What a handler raises becomes the answer that aiohttp would make of it."""
    started, status = time.monotonic(), 500
    route = request.match_info.route.resource
    name = route.canonical if route is not None else "unknown"
    try:
        response = await handler(request)
        status = response.status
        return response
    except CallError as e:
        status = 504 if e.reason == "no answer in time" else 502
        return web.json_response({"error": str(e)}, status=status)
    except web.HTTPException as e:
        status = e.status
        raise
    except asyncio.CancelledError:
        status = 499
        raise
    finally:
        if name != "/metrics":
            SERVER.labels(request.method, name, str(status)).observe(time.monotonic() - started)


def metrics_text() -> str:
    """What this process tells Prometheus."""
    return generate_latest().decode()


async def _metrics(_: web.Request) -> web.Response:
    return web.Response(body=metrics_text().encode(), headers={"Content-Type": CONTENT_TYPE_LATEST})


async def _health(_: web.Request) -> web.Response:
    return web.json_response({"status": "ok"})


def limit_memory(limit_bytes: int) -> None:
    """Gives this process `limit_bytes` of address space: the budget beyond which allocations raise MemoryError."""
    resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))


def application() -> web.Application:
    """An aiohttp application with the middleware, `/metrics` and `/healthz`."""
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    MEMORY_LIMIT.set(float("inf") if soft == resource.RLIM_INFINITY else float(soft))
    CLOCK.set_function(time.time)
    THREADS.set_function(lambda: sum(1 for _ in Path("/proc/self/task").iterdir()))
    app = web.Application(middlewares=[measured])
    app.router.add_get("/metrics", _metrics)
    app.router.add_get("/healthz", _health)
    return app


@contextlib.asynccontextmanager
async def listening(
    app: web.Application, port: int, tls_port: int = 0, tls: ssl.SSLContext | None = None
) -> AsyncIterator[None]:
    """Serves `app` on the loopback's `port` while the context lasts; with `tls`, on `tls_port` too."""
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", port, shutdown_timeout=0.5).start()
        if tls is not None:
            await web.TCPSite(runner, "127.0.0.1", tls_port, shutdown_timeout=0.5, ssl_context=tls).start()
        yield
    finally:
        await runner.cleanup()


async def until_terminated() -> None:
    """Returns at the first SIGTERM or SIGINT."""
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    await ended.wait()
