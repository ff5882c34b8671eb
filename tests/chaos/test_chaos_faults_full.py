"""Each fault of the injector really breaks a real shop, and clearing it really mends it. Nobody heals here."""

from __future__ import annotations

import asyncio
import time

import pytest

from agent.chaos.world import ClockWorld
from agent.demo.children import missing_programs
from agent.demo.probe import degraded_at

FAULTS = (
    "pool_leak",
    "deadlock",
    "thread_leak",
    "log_storm",
    "bad_deploy",
    "clock_skew",
    "names_failing",
    "certificate_expired",
    "payments_loss",
    "cache_stampede",
)
DEGRADED_SECONDS, MENDED_SECONDS = 60.0, 120.0


@pytest.mark.full
async def test_every_fault_breaks_the_shop_and_is_mended() -> None:
    if missing := missing_programs():
        pytest.skip("; ".join(missing))
    async with ClockWorld.running(11) as world, world.browse.probing():
        for fault in FAULTS:
            await world.quiet(4, MENDED_SECONDS)
            settings = {"seconds": 0.0} if fault in ("names_failing", "certificate_expired", "payments_loss") else {}
            at = await world.inject(fault, settings)
            deadline = time.monotonic() + DEGRADED_SECONDS
            while degraded_at(world.probe.since(at)) is None:
                assert time.monotonic() < deadline, f"{fault} breaks nothing"
                await asyncio.sleep(0.25)
            await world.clear(fault)
            await world.clear(fault)
        await world.quiet(4, MENDED_SECONDS)
