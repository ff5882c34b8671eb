"""The webhook's own protocol, without sockets: a client that does not read its answers gets no more of them."""

from __future__ import annotations

import asyncio
from typing import Any

from agent.http.front import Front, UsualRequest

BODY = b"{}"
REQUEST = b"POST /webhook HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n" + BODY


class Wire(asyncio.Transport):
    """A transport that keeps what is written, and whose other end may stop reading."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes] = []
        self.reading = True
        self.front: Front | None = None
        self.full = False

    def write(self, data: Any) -> None:
        self.written.append(bytes(data))
        if self.full and self.front is not None:
            self.front.pause_writing()

    def is_closing(self) -> bool:
        return False

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def close(self) -> None:
        pass


class Connections:
    def opened(self, connection: Any, transport: Any) -> None:
        pass

    def gone(self, connection: Any) -> None:
        pass


async def test_who_does_not_read_answers_gets_no_more_until_it_does() -> None:
    asked: list[bytes] = []

    async def answer(request: UsualRequest, body: bytes) -> bytes:
        asked.append(body)
        return b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"

    wire = Wire()
    front = wire.front = Front(Connections(), answer)  # type: ignore[arg-type]
    front.connection_made(wire)
    wire.full = True
    front.data_received(REQUEST * 3)
    assert front.task is not None
    await front.task
    assert (len(asked), len(wire.written), wire.reading) == (1, 1, False)
    front.data_received(REQUEST)  # what the kernel had handed over already
    assert front.task is None
    assert not wire.reading
    wire.full = False
    front.resume_writing()
    while front.task is not None:
        await front.task
    assert (len(asked), len(wire.written), wire.reading) == (4, 4, True)
    front.connection_lost(None)
