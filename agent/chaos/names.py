"""The world's name server: one UDP socket that knows one domain, and can be made to fail.

Run by `agent.chaos.world` as `python -m agent.chaos.names --listen PORT --control PORT NAME=ADDRESS...`. Its control
address is known to the injector only:

    PUT /names {"mode": "answering" | "failing" | "silent"}

`failing` answers every question with "server failure", as a resolver whose upstream is gone; `silent` answers nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import struct
from typing import Any, cast

from aiohttp import web

from agent.demo.shop.metrics import listening, until_terminated

MODES = ("answering", "failing", "silent")
HEADER = struct.Struct("!6H")
SERVER_FAILURE, NO_SUCH_NAME = 2, 3


def reply(packet: bytes, names: dict[str, str], mode: str) -> bytes | None:
    """The answer to a question, None: none. A packet that is no question gets none."""
    try:
        number, flags, questions, *_ = HEADER.unpack_from(packet)
        at, labels = HEADER.size, []
        while length := packet[at]:
            labels.append(packet[at + 1 : at + 1 + length].decode("ascii", "replace").lower())
            at += length + 1
        asked = packet[HEADER.size : at + 5]
        kind, _ = struct.unpack_from("!2H", packet, at + 1)
    except (struct.error, IndexError):
        return None
    if mode == "silent" or flags & 0x8000 or questions != 1:
        return None
    address = names.get(".".join(labels))
    code = SERVER_FAILURE if mode == "failing" else 0 if address else NO_SUCH_NAME
    record = b""
    if code == 0 and kind == 1 and address is not None:
        record = struct.pack("!3HIH", 0xC00C, 1, 1, 0, 4) + socket.inet_aton(address)
    return HEADER.pack(number, 0x8180 | code, 1, 1 if record else 0, 0, 0) + asked + record


class Server(asyncio.DatagramProtocol):
    def __init__(self, names: dict[str, str]) -> None:
        self._names, self.mode = names, MODES[0]
        self._transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[str | Any, int]) -> None:
        answer = reply(data, self._names, self.mode)
        if answer is not None and self._transport is not None:
            self._transport.sendto(answer, addr)

    async def put(self, request: web.Request) -> web.Response:
        mode = (await request.json()).get("mode", MODES[0])
        if mode not in MODES:
            raise web.HTTPBadRequest(text=f"mode: one of {', '.join(MODES)}")
        self.mode = mode
        return web.json_response({"mode": mode})


async def run(listen: int, control: int, names: dict[str, str]) -> None:
    server, app = Server(names), web.Application()
    app.router.add_put("/names", server.put)
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_datagram_endpoint(lambda: server, local_addr=("127.0.0.1", listen))
    try:
        async with listening(app, control):
            await until_terminated()
    finally:
        transport.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="a name server that can be made to fail")
    parser.add_argument("--listen", type=int, required=True)
    parser.add_argument("--control", type=int, required=True)
    parser.add_argument("names", nargs="+", metavar="NAME=ADDRESS")
    args = parser.parse_args()
    asyncio.run(run(args.listen, args.control, dict(name.split("=", 1) for name in args.names)))


if __name__ == "__main__":
    main()
