"""The customers: a steady stream of browsing and buying, in an open loop as customers are.

Run as `python -m agent.demo.shop.load --front URL --seed N`. A customer does not wait for other customers: requests
start on time whatever becomes of those before, up to a bound beyond which they stay away.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random

import aiohttp

from agent.demo.shop.metrics import until_terminated

PATIENCE_SECONDS = 6.0
MAX_WAITING = 200


async def customer(session: aiohttp.ClientSession, front: str, buys: bool, product: int) -> None:
    with contextlib.suppress(aiohttp.ClientError, TimeoutError):
        if buys:
            async with session.post(f"{front}/checkout", json={"product": product}) as answer:
                await answer.read()
        else:
            async with session.get(f"{front}/") as answer:
                await answer.read()


async def stream(front: str, seed: int, browse_rate: float, checkout_rate: float) -> None:
    """Runs until SIGTERM. Rates are per second; gaps are uniform within 50 % of the mean, not exponential, so that
    short windows see a steady stream."""
    chance = random.Random(seed)  # noqa: S311 - arrival times, no secret
    waiting: set[asyncio.Task[None]] = set()
    ended = asyncio.ensure_future(until_terminated())
    timeout = aiohttp.ClientTimeout(total=PATIENCE_SECONDS)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:

        async def arrive(rate: float, buys: bool) -> None:
            clock = asyncio.get_running_loop().time
            due = clock()
            while rate > 0:
                due += chance.uniform(0.5, 1.5) / rate
                await asyncio.sleep(max(0.0, due - clock()))
                if len(waiting) < MAX_WAITING:
                    task = asyncio.ensure_future(customer(session, front, buys, chance.randint(1, 40)))
                    waiting.add(task)
                    task.add_done_callback(waiting.discard)

        arrivals = [
            asyncio.ensure_future(arrive(browse_rate, False)),
            asyncio.ensure_future(arrive(checkout_rate, True)),
        ]
        await ended
        for task in (*arrivals, *waiting):
            task.cancel()
        await asyncio.gather(*arrivals, *waiting, return_exceptions=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="the shop's customers")
    parser.add_argument("--front", required=True, help="base URL of the front")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--browse", type=float, default=14.0, help="browsing customers a second")
    parser.add_argument("--checkout", type=float, default=10.0, help="buying customers a second")
    args = parser.parse_args()
    asyncio.run(stream(args.front, args.seed, args.browse, args.checkout))


if __name__ == "__main__":
    main()
