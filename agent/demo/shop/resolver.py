"""Looks names up at one name server, over UDP (RFC 1035), instead of the system's resolver.

Used by `agent.demo.shop.orders` where it is told a name server. Asks for IPv4 addresses only, caches nothing, and
raises OSError, as the system's resolver does, when the server says no or nothing.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
import struct

from aiohttp.abc import AbstractResolver, ResolveResult

TRY_SECONDS, TRIES = 0.7, 2
CODES = {1: "format error", 2: "server failure", 3: "no such name", 4: "not implemented", 5: "refused"}
HEADER = struct.Struct("!6H")
A, IN = 1, 1


def question(name: str, number: int) -> bytes:
    labels = b"".join(bytes([len(label)]) + label.encode("ascii") for label in name.rstrip(".").split("."))
    return HEADER.pack(number, 0x0100, 1, 0, 0, 0) + labels + b"\0" + struct.pack("!2H", A, IN)


def addresses(name: str, number: int, answer: bytes) -> list[str]:
    """The IPv4 addresses of an answer. Raises OSError where it holds none or is another's."""
    try:
        got, flags, questions, records, _, _ = HEADER.unpack_from(answer)
        if got != number or flags & 0x000F:
            raise OSError(f"{name}: {CODES.get(flags & 0x000F, 'not the answer to this question')}")
        at, found = HEADER.size, []
        for _ in range(questions):
            at = _after_name(answer, at) + 4
        for _ in range(records):
            at = _after_name(answer, at)
            kind, _, _, length = struct.unpack_from("!2HIH", answer, at)
            at += 10
            if kind == A and length == 4:
                found.append(socket.inet_ntoa(answer[at : at + 4]))
            at += length
    except (struct.error, IndexError) as e:
        raise OSError(f"{name}: the answer is cut short") from e
    if not found:
        raise OSError(f"{name}: no address")
    return found


def _after_name(packet: bytes, at: int) -> int:
    while length := packet[at]:
        if length >= 0xC0:  # a pointer ends the name
            return at + 2
        at += length + 1
    return at + 1


class _Exchange(asyncio.DatagramProtocol):
    def __init__(self) -> None:
        self.answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def datagram_received(self, data: bytes, addr: tuple[str | object, int]) -> None:
        if not self.answer.done():
            self.answer.set_result(data)

    def error_received(self, exc: Exception) -> None:
        if not self.answer.done():
            self.answer.set_exception(exc)


class Resolver(AbstractResolver):
    """aiohttp's interface to it. `server`: HOST:PORT."""

    def __init__(self, server: str) -> None:
        host, _, port = server.rpartition(":")
        self._server = (host, int(port))

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        for _ in range(TRIES):
            number = secrets.randbelow(1 << 16)
            try:
                found = addresses(host, number, await self._ask(question(host, number)))
            except TimeoutError:
                continue
            return [
                ResolveResult(
                    hostname=host, host=one, port=port, family=socket.AF_INET, proto=0, flags=socket.AI_NUMERICHOST
                )
                for one in found
            ]
        raise OSError(f"{host}: the name server does not answer")

    async def _ask(self, packet: bytes) -> bytes:
        loop = asyncio.get_running_loop()
        transport, exchange = await loop.create_datagram_endpoint(_Exchange, remote_addr=self._server)
        try:
            transport.sendto(packet)
            return await asyncio.wait_for(exchange.answer, TRY_SECONDS)
        finally:
            transport.close()

    async def close(self) -> None:
        """Holds nothing."""
