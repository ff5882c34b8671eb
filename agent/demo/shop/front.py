"""The shop's web front: customers browse and check out here.

Run as `python -m agent.demo.shop.front --port N --orders URL`. A checkout places the order and then waits until the
worker has confirmed it, for `CONFIRM_SECONDS` at most: what breaks behind it shows here as slow or failed checkouts.
"""

from __future__ import annotations

import argparse
import asyncio
import time

from aiohttp import web

from agent.demo.shop.metrics import Callee, application, listening, until_terminated

ORDERS_TIMEOUT_SECONDS = 3.0
CONFIRM_SECONDS = 2.0


class Front:
    """Holds the connection to `orders`."""

    def __init__(self, orders: Callee) -> None:
        self._orders = orders

    async def browse(self, _: web.Request) -> web.Response:
        return web.json_response(await self._orders.call("GET", "/products"))

    async def checkout(self, request: web.Request) -> web.Response:
        placed = await self._orders.call("POST", "/orders", await request.json())
        deadline, pause = time.monotonic() + CONFIRM_SECONDS, 0.04
        while True:
            await asyncio.sleep(pause)
            order = await self._orders.call("GET", f"/orders/{placed['id']}")
            if order["state"] == "confirmed":
                return web.json_response(order)
            if time.monotonic() >= deadline:
                return web.json_response({"error": f"order {placed['id']}: not confirmed in time"}, status=504)
            pause = min(pause * 1.6, 0.4, max(0.01, deadline - time.monotonic()))


async def serve(port: int, orders_url: str) -> None:
    orders = Callee("orders", orders_url, ORDERS_TIMEOUT_SECONDS)
    front, app = Front(orders), application()
    app.router.add_get("/", front.browse)
    app.router.add_post("/checkout", front.checkout)
    try:
        async with listening(app, port):
            await until_terminated()
    finally:
        await orders.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="the shop's web front")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--orders", required=True, help="base URL of the orders API")
    args = parser.parse_args()
    asyncio.run(serve(args.port, args.orders))


if __name__ == "__main__":
    main()
