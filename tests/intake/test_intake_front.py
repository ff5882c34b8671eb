"""The webhook's own protocol, without sockets: a client that does not read its answers gets no more of them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

import pytest

from agent.http.front import BROKEN, Front, Reply, UsualRequest

BODY = b"{}"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
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

    async def answered() -> bytes:
        return OK

    def answer(request: UsualRequest, body: bytes, reply: Reply) -> Awaitable[bytes]:
        asked.append(body)
        return answered()

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


@pytest.mark.parametrize("unread", [False, True])
async def test_answers_that_come_by_a_call_keep_the_order(unread: bool) -> None:
    """Without a task: one request at a time, the next one begins when its predecessor has had its answer."""
    replies: list[Reply] = []
    wire = Wire()
    front = wire.front = Front(Connections(), lambda request, body, reply: replies.append(reply))  # type: ignore
    front.connection_made(wire)
    wire.full = unread
    front.data_received(REQUEST * 3)
    for n in range(3):
        assert (len(replies), len(wire.written), front.busy) == (n + 1, n, True)
        replies[n](OK)
        if unread:
            assert (len(replies), front.busy, wire.reading) == (n + 1, False, False)
            front.resume_writing()
    assert (len(replies), len(wire.written), front.busy) == (3, 3, False)
    front.connection_lost(None)


async def test_a_bug_behind_the_front_is_answered_500_and_ends_the_connection() -> None:
    def answer(request: UsualRequest, body: bytes, reply: Reply) -> None:
        raise ZeroDivisionError("a bug")

    wire = Wire()
    front = wire.front = Front(Connections(), answer)  # type: ignore[arg-type]
    front.connection_made(wire)
    with pytest.raises(ZeroDivisionError):
        front.data_received(REQUEST)
    assert wire.written == [BROKEN]
    front.connection_lost(None)
