"""The HTTP port: one webhook, health, metrics and the API, on TCP and on the Unix socket of the state directory.

Built by `agent.app`. Exists to turn requests into calls of `agent.intake` and `agent.http.api`, and what they return or
raise into status codes; every answer is JSON, an error is `{"error":{"reason","path","hint"}}`. It authenticates before
it reads a byte of a body, bounds what it reads in size and time, and decides nothing itself.

It runs on aiohttp's low-level server: paths are looked up in a table, what every request needs is a few lines in the
handler. A webhook as Alertmanager sends it does not even get that far: `agent.http.front` reads it from the socket.
Overload and an unavailable journal are 503 with Retry-After, never 429: Alertmanager repeats on 5xx only.
"""

from __future__ import annotations

import logging
import os
import re
import resource
import socket
import ssl
import stat
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Final

import orjson
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from agent.alerts import PayloadError, check_tenant
from agent.http.api import Api, Handler, Operations
from agent.http.auth import CHALLENGE, AccessError, Asking, Guard
from agent.http.body import JSON, RequestError, check_type, encoding, read_body, too_large, unpack
from agent.http.front import Reply, Server, UsualRequest
from agent.intake import Accepted, Intake, NothingGoodError, OverloadedError, Quarantined
from agent.journal.wal import JournalError
from agent.store import Store
from sandbox.failpoint import failpoint

MIB: Final = 1024 * 1024
EXPECTED: Final = (PayloadError, AccessError, OverloadedError, JournalError, RequestError)
DRAINING: Final = "the service is shutting down"
BACKLOG: Final = 128  # accepted at one time, at most
MAX_CONNECTIONS: Final = 4096
_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")

logger = logging.getLogger("alertmedic.http")

Health = Callable[[], Mapping[str, object]]
Metrics = Callable[[], tuple[bytes, str]]
Observer = Callable[[int, float, Accepted | None], None]


@dataclass(frozen=True, slots=True)
class Options:
    """How the port behaves. `on_webhook(status, seconds, accepted)` is told of each webhook; it must not raise."""

    guard: Guard = field(default_factory=Guard)
    max_body_bytes: int = 8 * MIB  # as sent, and after decompression
    read_seconds: float = 10.0  # for a whole body
    retry_seconds: int = 5  # Retry-After of a 503
    on_webhook: Observer | None = None


class _NoHttp(logging.Filter):
    """What is no HTTP is answered with 400, and told in one line at debug level: whoever reaches the port can send it,
    a scanner does so all night, and aiohttp would log an error with a traceback each time."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if not isinstance(error, HttpProcessingError):
            return True
        logger.debug("%s: %s", record.getMessage(), error.message[:200])
        return False


logger.addFilter(_NoHttp())


class Webhook:
    """`POST /webhook[/{tenant}]`. `draining` set: 503, the sender comes again after the restart."""

    def __init__(self, intake: Intake, options: Options) -> None:
        self._intake = intake
        self._options = options
        self.draining = False

    async def __call__(self, request: web.BaseRequest, tenant: str) -> web.StreamResponse:
        begin = time.perf_counter()
        accepted: Accepted | None = None
        response: web.StreamResponse
        try:
            accepted = await self._receive(request, tenant)
            failpoint("intake_before_response")
            response = _reply(200, _accepted(accepted))
        except EXPECTED as error:
            accepted = _quarantined(error)
            response = error_reply(error, self._options.retry_seconds)
        if self._options.on_webhook is not None:
            self._options.on_webhook(response.status, time.perf_counter() - begin, accepted)
        return response

    def usual(self, request: UsualRequest, body: bytes, reply: Reply) -> Awaitable[bytes] | None:
        """The same for a request that `agent.http.front` has read. None: `reply` will be called, on the loop, with the
        answer as it goes on the wire. Else it is to be awaited."""
        begin = time.perf_counter()
        size = request.size
        try:
            if request.admitted is None:
                request.admitted = self._usual_parent(request)
            if self.draining:
                raise OverloadedError(DRAINING)
            self._intake.enter(size)
        except EXPECTED as error:
            return self._refused(error, begin)
        done = partial(self._answered, size, begin, reply)
        waits: Awaitable[Accepted] | None = None
        entered = False
        try:
            waits = self._intake.begin(request.tenant, body, request.admitted, done)
            entered = True
        except EXPECTED as error:
            return self._refused(error, begin)
        finally:
            if not entered:
                self._intake.leave(size)
        return None if waits is None else self._waited(waits, size, begin)

    def _usual_parent(self, request: UsualRequest) -> str:
        """The trace that a request continues, if its sender may post: both depend on its head and connection alone."""
        self._admit(request, request.tenant)
        if request.size > self._options.max_body_bytes:
            raise too_large(self._options.max_body_bytes)
        return traceparent([request.headers["traceparent"]]) if "traceparent" in request.headers else ""

    def _answered(self, size: int, begin: float, reply: Reply, result: Accepted | JournalError) -> None:
        self._intake.leave(size)
        if isinstance(result, JournalError):
            reply(self._error(result, begin))
        else:
            failpoint("intake_before_response")
            reply(self._ok(result, begin))

    async def _waited(self, waits: Awaitable[Accepted], size: int, begin: float) -> bytes:
        try:
            try:
                accepted = await waits
            finally:
                self._intake.leave(size)
            failpoint("intake_before_response")
        except EXPECTED as error:
            return self._error(error, begin)
        return self._ok(accepted, begin)

    async def _refused(self, error: Exception, begin: float) -> bytes:
        return self._error(error, begin)

    def _ok(self, accepted: Accepted, begin: float) -> bytes:
        if self._options.on_webhook is not None:
            self._options.on_webhook(200, time.perf_counter() - begin, accepted)
        return _all_good(accepted[0], accepted[1]) if not accepted[2] else _ok_bytes(_accepted(accepted))

    def _error(self, error: Exception, begin: float) -> bytes:
        response = error_reply(error, self._options.retry_seconds)
        if self._options.on_webhook is not None:
            self._options.on_webhook(response.status, time.perf_counter() - begin, _quarantined(error))
        return _error_bytes(response)

    def _admit(self, request: Asking, tenant: str) -> None:
        caller = self._options.guard.admit(request, "webhook")
        if tenant != "default":
            check_tenant(tenant)
        if not caller.sees(tenant):
            raise AccessError(403, f"{caller.name} may not post for tenant {tenant!r}", "add it to the credential")
        if self.draining:
            raise OverloadedError(DRAINING)

    async def _receive(self, request: web.BaseRequest, tenant: str) -> Accepted:
        self._admit(request, tenant)
        headers = request.headers
        check_type(headers.get("Content-Type", ""))
        packed = "Content-Encoding" in headers and encoding(request) == "gzip"
        most = self._options.max_body_bytes
        size = request.content_length or 0
        if size > most:
            raise too_large(most)
        self._intake.enter(size)
        try:
            body = await read_body(request, most, self._options.read_seconds)
            if packed:
                body = unpack(body, most)
            if len(body) > size:
                self._intake.hold(len(body) - size)
                size = len(body)
            parent = traceparent(headers.getall("traceparent")) if "traceparent" in headers else ""
            return await self._intake.receive(tenant, body, parent)
        finally:
            self._intake.leave(size)


class App:
    """Every path of the port. Called by aiohttp for each request; see `serve`."""

    def __init__(self, webhook: Webhook, routes: Mapping[str, Mapping[str, Handler]], options: Options) -> None:
        self.webhook = webhook
        self.routes = routes  # by path and method; `*` is one step of the path
        self._options = options
        self._plain = {path: methods for path, methods in routes.items() if "*" not in path}
        self._patterns = [
            (re.compile(re.escape(path).replace(r"\*", "([^/]+)")), methods)
            for path, methods in routes.items()
            if "*" in path
        ]

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.raw_path == "/webhook" and request.method == "POST":
            return await self.webhook(request, "default")
        try:
            methods, named = self._find(request.path)
            handler = methods.get("GET" if request.method == "HEAD" else request.method)
            if handler is None:
                raise RequestError(405, f"{request.method} is not allowed here", allow=", ".join(methods))
            return await handler(request, named)
        except EXPECTED as error:
            return error_reply(error, self._options.retry_seconds)

    def _find(self, path: str) -> tuple[Mapping[str, Handler], str]:
        """The handlers of a path, and what it names (the tenant or the incident)."""
        if (methods := self._plain.get(path)) is not None:
            return methods, "default" if path == "/webhook" else ""
        for pattern, methods in self._patterns:
            if (matched := pattern.fullmatch(path)) is not None:
                return methods, matched[1]
        raise RequestError(404, f"no such path: {path[:200]}", path[:200], "docs/webhook.md lists them")


def build_app(
    intake: Intake,
    store: Store,
    operations: Operations,
    *,
    health: Health,
    metrics: Metrics,
    options: Options | None = None,
    more: Callable[[Options], Mapping[str, dict[str, Handler]]] = lambda _: {},
) -> App:
    """The whole port. `health()` is the body of /-/ready and must hold `ready` (false: 503); `metrics()` gives the
    exposition and its content type. `more(options)` are further paths."""
    options = options or Options()
    webhook = Webhook(intake, options)

    async def healthy(request: web.BaseRequest, _: str) -> web.StreamResponse:
        return _reply(200, b'{"status":"ok"}')

    async def ready(request: web.BaseRequest, _: str) -> web.StreamResponse:
        body = dict(health())
        body["draining"] = webhook.draining or bool(body.get("draining"))
        body["ready"] = body.get("ready") is True and not body["draining"]
        return _reply(200 if body["ready"] else 503, orjson.dumps(body, default=str))

    async def exposition(request: web.BaseRequest, _: str) -> web.StreamResponse:
        options.guard.admit(request, "read")
        body, kind = metrics()
        return web.Response(body=body, headers={"Content-Type": kind})

    routes: dict[str, dict[str, Handler]] = {
        "/webhook": {"POST": webhook},
        "/webhook/*": {"POST": webhook},
        "/-/healthy": {"GET": healthy},
        "/-/ready": {"GET": ready},
        "/metrics": {"GET": exposition},
        **Api(store, operations, options.guard, options.read_seconds).routes(),
        **more(options),
    }
    return App(webhook, routes, options)


@dataclass(slots=True)
class Serving:
    """A running port. `addresses` are what TCP listens on, (host, port)."""

    runner: web.ServerRunner
    webhook: Webhook
    addresses: list[tuple[str, int]]
    socket_path: Path | None

    def drain(self) -> None:
        """From now on webhooks and /-/ready answer 503; requests under way go on."""
        self.webhook.draining = True

    async def close(self) -> None:
        """Waits for requests under way (bounded), then closes every connection."""
        self.drain()
        await self.runner.cleanup()
        if self.socket_path is not None:
            self.socket_path.unlink(missing_ok=True)


async def serve(
    app: App,
    host: str,
    port: int,
    *,
    socket_path: Path | None = None,
    tls: ssl.SSLContext | None = None,
    shutdown_seconds: float = 10.0,
    max_connections: int = 0,
) -> Serving:
    """Listens on `host`:`port` (0: any free one) and, without TLS, on the Unix socket `socket_path` (mode 0600). At
    most `max_connections` over TCP (0: what the limit of open files allows): one more closes the oldest.

    Raises OSError when an address cannot be bound; then nothing listens.
    """
    server = Server(
        app,
        app.webhook.usual,
        max_connections or _affordable_connections(),
        access_log=None,
        logger=logger,
        auto_decompress=False,  # aiohttp would unpack without a bound on the result
        lingering_time=2.0,  # how long the rest of a refused body is read, so that its sender sees the answer
    )
    runner = web.ServerRunner(server, shutdown_timeout=shutdown_seconds)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port, ssl_context=tls, backlog=BACKLOG).start()
        addresses = [(str(a[0]), int(a[1])) for a in runner.addresses]
        if socket_path is not None:
            await web.SockSite(runner, _unix_socket(socket_path)).start()
    except OSError:
        await runner.cleanup()
        raise
    return Serving(runner, app.webhook, addresses, socket_path)


def _affordable_connections() -> int:
    """Half of the descriptors that are left beside a burst of accepts and what the service itself needs."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_CONNECTIONS if soft == resource.RLIM_INFINITY else min(MAX_CONNECTIONS, max(32, (soft - BACKLOG) // 2))


def _unix_socket(path: Path) -> socket.socket:
    """A socket that only this user (and root) can open. A stale one of an earlier run is replaced; the journal's lock
    makes sure that no other service uses this state directory."""
    if path.exists() and stat.S_ISSOCK(path.lstat().st_mode):
        path.unlink()
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        listening.bind(str(path))
    except OSError as error:
        listening.close()
        hint = "a path of at most 107 bytes in a directory this user may write"
        raise OSError(error.errno, f"control socket {path}: {error.strerror or error}; hint: {hint}") from error
    finally:
        os.umask(before)
    return listening


def traceparent(values: list[str]) -> str:
    """A valid W3C trace context (level 1) as version 00, else "". A later version is read as far as this one goes."""
    if len(values) != 1:
        return ""
    matched = _TRACEPARENT.fullmatch(values[0].strip())
    if matched is None or len(values[0]) > 512:
        return ""
    version, trace, parent, flags, rest = matched.groups()
    if version == "ff" or (version == "00" and rest) or not trace.strip("0") or not parent.strip("0"):
        return ""
    return f"00-{trace}-{parent}-{flags}"


def error_reply(error: Exception, retry_seconds: int) -> web.Response:
    """The answer to one of the EXPECTED errors."""
    path = hint = ""
    headers: dict[str, str] = {}
    extra: dict[str, object] = {}
    close = False
    reason = str(error)
    if isinstance(error, PayloadError):
        status, reason, path = error.status, error.reason, error.path
        hint = "docs/webhook.md lists the required fields"
        if isinstance(error, NothingGoodError):
            extra = {"accepted": 0, "duplicates": 0, "quarantined": [_named(q) for q in error.quarantined]}
    elif isinstance(error, AccessError):
        status, hint = error.status, error.hint
        if status == 401:
            headers["WWW-Authenticate"] = CHALLENGE
    elif isinstance(error, RequestError):
        status, path, hint, close = error.status, error.path, error.hint, error.close
        if error.allow:
            headers["Allow"] = error.allow
    else:
        status = 503
        hint = "nothing was recorded; send it again"
        headers["Retry-After"] = str(retry_seconds)
    body = orjson.dumps({"error": {"reason": reason, "path": path, "hint": hint}, **extra})
    response = _reply(status, body, headers)
    if close:
        response.force_close()
    return response


def _ok_bytes(body: bytes) -> bytes:
    """A 200 with a JSON body, as it leaves in one write."""
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


@lru_cache(maxsize=1024)
def _all_good(accepted: int, duplicates: int) -> bytes:
    return _ok_bytes(_accepted(Accepted(accepted, duplicates)))


def _error_bytes(response: web.Response) -> bytes:
    body = response.body
    assert isinstance(body, bytes)
    lines = [f"HTTP/1.1 {response.status} {response.reason}", *(f"{n}: {v}" for n, v in response.headers.items())]
    if "Content-Length" not in response.headers:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def _reply(status: int, body: bytes, headers: Mapping[str, str] | None = None) -> web.Response:
    return web.Response(status=status, body=body, headers={"Content-Type": JSON, **(headers or {})})


def _accepted(accepted: Accepted) -> bytes:
    if not accepted.quarantined:
        return b'{"accepted":%d,"duplicates":%d,"quarantined":[]}' % (accepted.accepted, accepted.duplicates)
    return orjson.dumps(
        {
            "accepted": accepted.accepted,
            "duplicates": accepted.duplicates,
            "quarantined": [_named(q) for q in accepted.quarantined],
        }
    )


def _quarantined(error: Exception) -> Accepted | None:
    """What an observer is told of a refused request of which something is in quarantine; a whole body counts as one."""
    if isinstance(error, NothingGoodError):
        return Accepted(0, 0, error.quarantined)
    if isinstance(error, PayloadError) and error.kept:
        return Accepted(0, 0, (Quarantined(0, error.path, error.reason),))
    return None


def _named(quarantined: Quarantined) -> dict[str, object]:
    return {"index": quarantined.index, "path": quarantined.path, "reason": quarantined.reason}
