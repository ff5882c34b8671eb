"""The world's name server and the shop's resolver, over real sockets: what is answered, refused, and not answered."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.chaos.names import Server, reply
from agent.demo.shop import resolver
from agent.demo.shop.resolver import Resolver, addresses, question

NAMES = {"payments.shop.test": "127.0.0.7"}


@contextlib.asynccontextmanager
async def serving() -> AsyncIterator[tuple[Server, Resolver]]:
    server = Server(NAMES)
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_datagram_endpoint(lambda: server, local_addr=("127.0.0.1", 0))
    try:
        yield server, Resolver(f"127.0.0.1:{transport.get_extra_info('sockname')[1]}")
    finally:
        transport.close()


async def test_a_known_name_has_its_address_and_no_other_name_has_one() -> None:
    async with serving() as (_, asked):
        found = await asked.resolve("payments.shop.test", 443)
        assert [(one["host"], one["port"]) for one in found] == [("127.0.0.7", 443)]
        with pytest.raises(OSError, match="no such name"):
            await asked.resolve("elsewhere.test")


async def test_a_failing_server_is_told_from_a_silent_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolver, "TRY_SECONDS", 0.05)
    async with serving() as (server, asked):
        server.mode = "failing"
        with pytest.raises(OSError, match="server failure"):
            await asked.resolve("payments.shop.test")
        server.mode = "silent"
        with pytest.raises(OSError, match="does not answer"):
            await asked.resolve("payments.shop.test")
        server.mode = "answering"
        assert await asked.resolve("payments.shop.test")


@given(st.binary(max_size=80), st.sampled_from(["answering", "failing", "silent"]))
def test_whatever_is_sent_to_it_the_server_lives(packet: bytes, mode: str) -> None:
    reply(packet, NAMES, mode)


@given(st.binary(max_size=80), st.binary(max_size=40))
def test_whatever_is_answered_the_resolver_says_so(packet: bytes, tail: bytes) -> None:
    """An address or OSError, nothing else."""
    whole = reply(question("payments.shop.test", 7), NAMES, "answering")
    assert whole is not None
    assert addresses("payments.shop.test", 7, whole) == ["127.0.0.7"]
    for answer in (packet, whole[: len(tail)] + tail):
        with contextlib.suppress(OSError):
            addresses("payments.shop.test", 7, answer)
