"""A network link that can be disturbed: a TCP proxy that delays, stalls and cuts what goes through it.

Run by `agent.chaos.world` as `python -m agent.chaos.proxy --listen PORT --to PORT --control PORT`, in place of kernel
network emulation, which many kernels lack. Its control address is known to the injector only:

    PUT /link {"delay_seconds": 0.2, "stalled": false, "refusing": false, "loss": 0.3}   (left out: as usual)
    GET /link

`delay_seconds` is added to everything in both directions; `stalled` holds all bytes back without closing anything, as a
lost route does; `refusing` closes what is open and whatever comes; `loss` resets that share of the connections, each
at the first bytes that it sends. It never looks at what passes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
import random
from dataclasses import asdict, dataclass

from aiohttp import web

from agent.demo.shop.metrics import listening, until_terminated

CHUNK = 64 * 1024
MAX_DELAY_SECONDS = 30.0


@dataclass(frozen=True)
class Disturbance:
    """What the link does at the moment."""

    delay_seconds: float = 0.0
    stalled: bool = False
    refusing: bool = False
    loss: float = 0.0


class Link:
    """Everything that passes one link. Bytes keep their order, and each chunk waits its own time: a delay lowers no
    throughput beyond what `CHUNK` bytes under way in each direction allow."""

    def __init__(self, to: int) -> None:
        self._to = to
        self.state = Disturbance()
        self._free = asyncio.Event()
        self._free.set()
        self._open: set[asyncio.StreamWriter] = set()

    def disturb(self, state: Disturbance) -> None:
        self.state = state
        if state.stalled:
            self._free.clear()
        else:
            self._free.set()
        if state.refusing:
            for writer in list(self._open):
                writer.transport.abort()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, until either end closes."""
        if self.state.refusing:
            writer.transport.abort()
            return
        if self.state.loss and random.random() < self.state.loss:  # noqa: S311 - a fault, no secret
            await reader.read(1)
            writer.transport.abort()
            return
        try:
            await self._free.wait()
            there_reader, there_writer = await asyncio.open_connection("127.0.0.1", self._to)
        except OSError:
            writer.transport.abort()
            return
        ends = (writer, there_writer)
        self._open.update(ends)
        pumps = [
            asyncio.ensure_future(self._pump(reader, there_writer)),
            asyncio.ensure_future(self._pump(there_reader, writer)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            for end in ends:
                self._open.discard(end)
                end.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while chunk := await reader.read(CHUNK):
                if self.state.delay_seconds:
                    await asyncio.sleep(self.state.delay_seconds)
                await self._free.wait()
                writer.write(chunk)
                await writer.drain()

    async def put(self, request: web.Request) -> web.Response:
        wanted = await request.json()
        delay, stalled, refusing, loss = (wanted.get(k) for k in ("delay_seconds", "stalled", "refusing", "loss"))
        try:
            state = Disturbance(float(delay or 0.0), bool(stalled), bool(refusing), float(loss or 0.0))
        except (TypeError, ValueError) as e:
            raise web.HTTPBadRequest(text=f"delay_seconds, loss: {e}") from e
        if not math.isfinite(state.delay_seconds) or not 0 <= state.delay_seconds <= MAX_DELAY_SECONDS:
            raise web.HTTPBadRequest(text=f"delay_seconds: 0 to {MAX_DELAY_SECONDS}")
        if not 0 <= state.loss <= 1:
            raise web.HTTPBadRequest(text="loss: 0 to 1")
        self.disturb(state)
        return await self.get(request)

    async def get(self, _: web.Request) -> web.Response:
        return web.json_response(asdict(self.state))


async def run(listen: int, to: int, control: int) -> None:
    link, app = Link(to), web.Application()
    app.router.add_put("/link", link.put)
    app.router.add_get("/link", link.get)
    server = await asyncio.start_server(link.serve, "127.0.0.1", listen)
    async with server, listening(app, control):
        await until_terminated()


def main() -> None:
    parser = argparse.ArgumentParser(description="a TCP link that can be disturbed")
    for name in ("listen", "to", "control"):
        parser.add_argument(f"--{name}", type=int, required=True)
    args = parser.parse_args()
    asyncio.run(run(args.listen, args.to, args.control))


if __name__ == "__main__":
    main()
