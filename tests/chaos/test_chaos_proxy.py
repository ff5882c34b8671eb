"""The link that can be disturbed, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from agent.chaos.proxy import Disturbance, Link


@contextlib.asynccontextmanager
async def echoing() -> AsyncIterator[tuple[Link, int]]:
    """A link to an echo server, and the port of its near end."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
        writer.close()

    far = await asyncio.start_server(echo, "127.0.0.1", 0)
    link = Link(far.sockets[0].getsockname()[1])
    near = await asyncio.start_server(link.serve, "127.0.0.1", 0)
    async with far, near:
        yield link, near.sockets[0].getsockname()[1]


async def exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, data: bytes) -> bytes:
    writer.write(data)
    await writer.drain()
    return await reader.readexactly(len(data))


async def test_an_undisturbed_link_passes_every_byte_in_order() -> None:
    data = bytes(range(256)) * 4096
    async with echoing() as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        assert await exchange(reader, writer, data) == data
        writer.close()


async def test_a_stalled_link_holds_everything_back_and_loses_nothing() -> None:
    async with echoing() as (link, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        assert await exchange(reader, writer, b"before") == b"before"
        link.disturb(Disturbance(stalled=True))
        writer.write(b"during")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(1), 0.3)
        link.disturb(Disturbance())
        assert await asyncio.wait_for(reader.readexactly(6), 5) == b"during"
        writer.close()


async def test_a_refusing_link_cuts_what_is_open_and_what_comes() -> None:
    async with echoing() as (link, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        assert await exchange(reader, writer, b"before") == b"before"
        link.disturb(Disturbance(refusing=True))
        with contextlib.suppress(ConnectionError):
            assert await asyncio.wait_for(reader.read(), 5) == b""
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        with contextlib.suppress(ConnectionError):
            writer.write(b"x")
            assert await asyncio.wait_for(reader.read(), 5) == b""
        link.disturb(Disturbance())
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        assert await exchange(reader, writer, b"after") == b"after"
        writer.close()


async def test_a_delay_is_added_in_both_directions() -> None:
    async with echoing() as (link, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        link.disturb(Disturbance(delay_seconds=0.2))
        clock = asyncio.get_running_loop().time
        begun = clock()
        assert await exchange(reader, writer, b"there and back") == b"there and back"
        assert clock() - begun >= 0.4  # what the delay guarantees; how much more is the machine's affair
        writer.close()


async def test_loss_resets_a_share_of_the_connections_and_passes_the_others_whole() -> None:
    async with echoing() as (link, port):

        async def passed() -> bool:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                return await asyncio.wait_for(exchange(reader, writer, b"there and back"), 5) == b"there and back"
            except (ConnectionError, asyncio.IncompleteReadError):
                return False
            finally:
                writer.close()

        for loss, seen in ((0.0, {True}), (1.0, {False}), (0.5, {True, False})):
            link.disturb(Disturbance(loss=loss))
            assert set(await asyncio.gather(*(passed() for _ in range(64)))) == seen
