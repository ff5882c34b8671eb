"""The usual webhook, straight from the socket: the first protocol of a connection, before aiohttp's.

Made by `agent.http.server` for each TCP connection. Exists because aiohttp's streams, tasks and request objects are a
third of what an acknowledged webhook costs, and a request as Alertmanager sends it needs none of them: one POST with a
Content-Length of at most 64 KiB and only the headers of HEADERS, each of them once. What deviates in any way (another
path, a chunked or packed body, a header nobody listed, a body that takes its time) goes to aiohttp with every byte that
came, and the connection stays there: this never refuses anything itself. It decides nothing about alerts.

It also bounds the connections over TCP, and knows when all of them have had their answers.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from aiohttp import web

MAX_BODY: Final = 65_536
MAX_HEAD: Final = 8_190
READ_BYTES: Final = 65_536  # at once
KEEPALIVE_SECONDS: Final = 330.0  # Go clients drop an idle connection after five minutes
PARTIAL_SECONDS: Final = 1.0  # then aiohttp waits for the rest
HEADERS: Final[Mapping[bytes, str]] = {
    name.lower().encode(): name
    for name in (
        "Host",
        "User-Agent",
        "Content-Length",
        "Content-Type",
        "Accept",
        "Accept-Encoding",
        "Authorization",
        "traceparent",
    )
}
JSON: Final = "application/json"
BROKEN: Final = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"

_LINE = re.compile(rb"POST /webhook(?:/([a-zA-Z0-9._-]{1,64}))? HTTP/1\.1")


class UsualRequest:
    """The head of a usual webhook, with what `Guard.admit` asks of a request. It serves every request of its connection
    that has the same head."""

    __slots__ = ("admitted", "headers", "method", "size", "tenant", "transport")

    def __init__(self, transport: asyncio.Transport, tenant: str, headers: Mapping[str, str], size: int) -> None:
        self.transport = transport
        self.method = "POST"
        self.tenant = tenant
        self.headers = headers
        self.size = size  # of the body
        self.admitted: str | None = None  # the trace that it continues, once its sender was let in

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self.transport.get_extra_info(name, default)


def usual_request(head: bytes, transport: asyncio.Transport) -> UsualRequest | None:
    """`head` goes up to the empty line, without it. None for anything that is not as the module says."""
    line, *lines = head.split(b"\r\n")
    matched = _LINE.fullmatch(line)
    if matched is None:
        return None
    headers: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(b": ")
        known = HEADERS.get(name.lower())
        if known is None or known in headers or not value.isascii():
            return None
        text = headers[known] = value.decode()
        if not text.isprintable() or text != text.strip():
            return None
    length = headers.get("Content-Length", "")
    if not (0 < len(length) <= 5 and length.isdigit() and int(length) <= MAX_BODY):
        return None
    if headers.get("Content-Type") != JSON or "Host" not in headers:
        return None
    tenant = matched[1].decode() if matched[1] is not None else "default"
    return UsualRequest(transport, tenant, headers, int(length))


Reply = Callable[[bytes], None]
# The whole answer as it goes on the wire: given to the reply, later and on the loop (None), or to be awaited.
Answer = Callable[[UsualRequest, bytes, Reply], Awaitable[bytes] | None]


class Front(asyncio.BufferedProtocol):
    """One connection over TCP, until something unusual comes. One request at a time; what follows it waits unread.

    All share one buffer to read into. For another protocol asyncio allocates 256 KiB at each read, which the system
    maps and clears anew every time: that took longer than everything else here."""

    def __init__(self, server: Server, answer: Answer) -> None:
        self._server = server
        self._answer = answer
        self._loop = asyncio.get_running_loop()
        self._buffer = b""
        self._head = b""  # of the newest request, which is:
        self._request: UsualRequest | None = None
        self._idle_since = 0.0
        self._timer: asyncio.TimerHandle | None = None  # the connection is idle for too long
        self._late: asyncio.TimerHandle | None = None  # the rest of a request does not come
        self.busy = False  # with a request
        self.task: asyncio.Task[None] | None = None  # of the request under way, if it needs one
        self._over: asyncio.Future[None] | None = None  # somebody waits until it is answered
        self._last = False  # close after the answer
        self._unread = False  # the client does not read its answers: it gets no more until it does
        self._paused = False  # reading

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._server.opened(self, transport)
        self._idle_since = self._loop.time()
        self._timer = self._loop.call_later(KEEPALIVE_SECONDS, self._idle)

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.gone(self)
        self._cancel_timers()

    def pause_writing(self) -> None:
        self._unread = self._paused = True
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._unread = False
        if not self.busy:
            self._goes_on()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._server.buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.data_received(bytes(self._server.buffer[:nbytes]))

    def data_received(self, data: bytes) -> None:
        self._buffer = self._buffer + data if self._buffer else data
        if not self.busy and not self._unread:
            self._advance()
        elif len(self._buffer) > MAX_BODY:
            self._paused = True
            self._transport.pause_reading()

    def eof_received(self) -> None:
        if not self.busy and self._buffer:
            self._hand_over()

    def _advance(self) -> None:
        """Begin with the next request, if all of it is there."""
        raw, end, body = self._buffer.partition(b"\r\n\r\n")
        request = self._request if raw == self._head and end else self._next(raw) if end else None
        if request is None:
            if end or len(raw) > MAX_HEAD or not raw.startswith(b"POST /webhook"[: len(raw)]):
                self._hand_over()
            else:
                self._await_rest()
            return
        size = request.size
        if len(body) < size:
            self._await_rest()
            return
        if self._late is not None:
            self._late.cancel()
            self._late = None
        self._buffer = body[size:]
        self.busy = True
        begun = False
        try:
            waits = self._answer(request, body[:size], self._reply)
            begun = True
        finally:
            if not begun:
                self._reply(BROKEN)
        if waits is not None:
            self.task = self._loop.create_task(self._serve(waits))

    def _next(self, head: bytes) -> UsualRequest | None:
        self._request = usual_request(head, self._transport)
        self._head = head
        return self._request

    def _await_rest(self) -> None:
        if self._late is None:
            self._late = self._loop.call_later(PARTIAL_SECONDS, self._hand_over)

    async def _serve(self, waits: Awaitable[bytes]) -> None:
        answer = BROKEN
        try:
            answer = await waits
        finally:
            self.task = None
            self._reply(answer)

    def _reply(self, answer: bytes) -> None:
        self.busy = False
        if self._over is not None and not self._over.done():
            self._over.set_result(None)
        if self._transport.is_closing():
            return
        self._transport.write(answer)
        if self._last or answer is BROKEN:
            self._transport.close()
        else:
            self._goes_on()

    def _goes_on(self) -> None:
        self._idle_since = self._loop.time()
        if self._unread:
            return
        if self._paused:
            self._paused = False
            self._transport.resume_reading()
        if self._buffer:
            self._advance()

    async def answered(self) -> None:
        """Returns when no request is under way."""
        if self.busy:
            self._over = self._over or self._loop.create_future()
            await asyncio.shield(self._over)

    def _hand_over(self) -> None:
        """From now on this is aiohttp's connection."""
        self._cancel_timers()
        transport, data = self._transport, self._buffer
        self._server.gone(self)
        if transport.is_closing():
            return
        handler = self._server.handler()
        transport.set_protocol(handler)
        handler.connection_made(transport)
        handler.data_received(data)

    def _idle(self) -> None:
        left = self._idle_since + KEEPALIVE_SECONDS - self._loop.time()
        if left > 0 or self.busy:
            self._timer = self._loop.call_later(max(1.0, left), self._idle)
        else:
            self._transport.close()

    def _cancel_timers(self) -> None:
        for timer in (self._timer, self._late):
            if timer is not None:
                timer.cancel()
        self._timer = self._late = None

    def close(self) -> None:
        """At once when idle, else after the answer."""
        self._last = True
        if not self.busy:
            self._transport.close()


class Server(web.Server):
    """aiohttp's server, with a `Front` before it and a bound on connections over TCP: idle ones, or heads that never
    end, must not use up the descriptors that the journal, the sandbox and the operator's Unix socket need. What is
    closed is the oldest; a request under way is answered first, and Alertmanager connects anew."""

    def __init__(self, handler: Any, answer: Answer, max_connections: int, **options: Any) -> None:
        super().__init__(handler, keepalive_timeout=KEEPALIVE_SECONDS, **options)
        self._answer = answer
        self._most = max_connections
        self.buffer = memoryview(bytearray(READ_BYTES))
        self._over_tcp: dict[Any, None] = {}  # Front or aiohttp's handler, oldest first
        self.handler = super().__call__

    def __call__(self) -> Any:
        return Front(self, self._answer)

    def opened(self, connection: Any, transport: Any) -> None:
        if not isinstance(transport.get_extra_info("peername"), tuple):
            return
        self._over_tcp[connection] = None
        if len(self._over_tcp) > self._most:
            oldest = next(iter(self._over_tcp))
            del self._over_tcp[oldest]
            # aiohttp's close() waits for an answer and leaves an idle connection open, force_close() waits for nothing.
            if isinstance(oldest, Front) or getattr(oldest, "_request_in_progress", False):
                oldest.close()
            else:
                oldest.force_close()

    def gone(self, connection: Any) -> None:
        self._over_tcp.pop(connection, None)

    def connection_made(self, handler: Any, transport: Any) -> None:
        super().connection_made(handler, transport)
        self.opened(handler, transport)

    def connection_lost(self, handler: Any, exc: BaseException | None = None) -> None:
        self.gone(handler)
        super().connection_lost(handler, exc)

    def pre_shutdown(self) -> None:
        super().pre_shutdown()
        for front in self._fronts():
            front.close()

    async def shutdown(self, timeout: float | None = None) -> None:
        busy = [front for front in self._fronts() if front.busy]
        if busy:
            _, late = await asyncio.wait([asyncio.create_task(f.answered()) for f in busy], timeout=timeout)
            for waiting in late:
                waiting.cancel()
            for task in [front.task for front in busy if front.task is not None]:
                task.cancel()
        await super().shutdown(timeout)

    def _fronts(self) -> list[Front]:
        return [c for c in self._over_tcp if isinstance(c, Front)]
