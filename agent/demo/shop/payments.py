"""The payment provider: somebody else's service, which the shop calls and can neither see into nor restart.

Run as `python -m agent.demo.shop.payments --port N`. Like many providers' test systems it lets its own staff set how
slowly it answers (`PUT /sandbox/delay`) and which share of the payments it fails (`PUT /sandbox/failing`).
"""

from __future__ import annotations

import argparse
import asyncio
import random

from aiohttp import web

from agent.demo.shop.metrics import application, listening, until_terminated

USUAL_SECONDS = 0.008


class Provider:
    """Authorises every payment after a moment, which is `delay` seconds longer while its staff want it so."""

    def __init__(self) -> None:
        self.delay = 0.0
        self.failing = 0.0

    async def authorise(self, request: web.Request) -> web.Response:
        order = await request.json()
        await asyncio.sleep(USUAL_SECONDS + self.delay * random.uniform(0.9, 1.3))  # noqa: S311 - a delay, no secret
        if random.random() < self.failing:  # noqa: S311 - a fault, no secret
            return web.json_response({"error": "try again later"}, status=500)
        return web.json_response({"authorised": True, "amount": order["amount"]})

    async def set_delay(self, request: web.Request) -> web.Response:
        self.delay = float((await request.json())["seconds"])
        return web.json_response({"seconds": self.delay})

    async def set_failing(self, request: web.Request) -> web.Response:
        self.failing = float((await request.json())["share"])
        return web.json_response({"share": self.failing})


async def serve(port: int) -> None:
    provider, app = Provider(), application()
    app.router.add_post("/authorise", provider.authorise)
    app.router.add_put("/sandbox/delay", provider.set_delay)
    app.router.add_put("/sandbox/failing", provider.set_failing)
    async with listening(app, port):
        await until_terminated()


def main() -> None:
    parser = argparse.ArgumentParser(description="the payment provider")
    parser.add_argument("--port", type=int, required=True)
    asyncio.run(serve(parser.parse_args().port))


if __name__ == "__main__":
    main()
