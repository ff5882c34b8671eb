"""The arms of the comparison: who, if anybody, puts right what was broken.

Used by `agent.chaos.run`. All of them see the same shop with the same monitoring and the same faults; none of them sees
the scenario. The baselines are given what favours them: a fast liveness probe, and the one command that heals most.

    nothing    nobody does anything
    liveness   a supervisor that restarts a program whose health check fails (as an orchestrator's liveness probe)
    command    alert -> one fixed command, run at once, as a webhook-to-command bridge does
    auto       AlertMedic, allowed to act
    approve    AlertMedic, with a person who approves what has been asked for a minute
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from agent.chaos.world import ChaosWorld
from agent.demo.faults import Supervisor

PROGRAMS = ("front", "orders", "worker")
LIVENESS_SECONDS, LIVENESS_TIMEOUT, LIVENESS_FAILURES = 2.0, 1.0, 3
COMMAND_PAUSE_SECONDS = 30.0  # the bridge does not run its command again for a group that fires on, within this time
# Restarting all three heals every fault that lives in a process of the shop: no single command heals more of them.
COMMANDS: dict[str, tuple[str, ...]] = {
    "ShopCheckoutDegraded": PROGRAMS,
    "ShopBrowseDegraded": PROGRAMS,
    "ShopOrdersLate": ("worker",),
    "ShopDatabaseErrors": PROGRAMS,
}
APPROVER_SECONDS = 60.0
LOOKING = frozenset({"investigating", "diagnosed", "awaiting_approval"})  # states between two requests for the same


@dataclass
class Doings:
    """What an arm did, beside the agent's own records: (unix seconds, what, to which service)."""

    done: list[tuple[float, str, str]] = field(default_factory=list)
    acknowledged: list[float] = field(default_factory=list)


ArmContext = Callable[[ChaosWorld], AbstractAsyncContextManager[Doings]]


@contextlib.asynccontextmanager
async def nothing(_: ChaosWorld) -> AsyncIterator[Doings]:
    yield Doings()


@contextlib.asynccontextmanager
async def liveness(world: ChaosWorld) -> AsyncIterator[Doings]:
    doings = Doings()

    async def watch(program: str) -> None:
        failures, url = 0, world.ports.url(program) + "/healthz"
        timeout = aiohttp.ClientTimeout(total=LIVENESS_TIMEOUT)
        async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(force_close=True)) as session:
            while True:
                await asyncio.sleep(LIVENESS_SECONDS)
                try:
                    async with session.get(url) as answer:
                        failures = 0 if answer.status == 200 else failures + 1
                except (aiohttp.ClientError, TimeoutError, OSError):
                    failures += 1
                if failures >= LIVENESS_FAILURES:
                    failures = 0
                    doings.done.append((time.time(), "restart", program))
                    await Supervisor(world.ports.url("supervisor")).restart(program)

    async with _background(*(watch(program) for program in PROGRAMS)):
        yield doings


@contextlib.asynccontextmanager
async def command(world: ChaosWorld) -> AsyncIterator[Doings]:
    doings = Doings()
    last: dict[str, float] = {}
    orders: asyncio.Queue[str] = asyncio.Queue(100)

    async def webhook(request: web.Request) -> web.Response:
        doings.acknowledged.append(time.time())
        for alert in (await request.json())["alerts"]:
            name = alert["labels"].get("alertname", "")
            due = time.monotonic() - last.get(name, -COMMAND_PAUSE_SECONDS) >= COMMAND_PAUSE_SECONDS
            if alert["status"] == "firing" and name in COMMANDS and due and not orders.full():
                last[name] = time.monotonic()
                orders.put_nowait(name)
        return web.Response()

    async def work() -> None:
        while True:
            for program in COMMANDS[await orders.get()]:
                doings.done.append((time.time(), "restart", program))
                await Supervisor(world.ports.url("supervisor")).restart(program)

    app = web.Application()
    app.router.add_post("/webhook", webhook)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", world.ports.agent, shutdown_timeout=0.5).start()
        async with _background(work()):
            yield doings
    finally:
        await runner.cleanup()


@contextlib.asynccontextmanager
async def auto(world: ChaosWorld) -> AsyncIterator[Doings]:
    world.autonomy = "auto"
    await world.start_agent()
    try:
        yield Doings()
    finally:
        await world.end_child("agent")


@dataclass
class Person:
    """Who approves. While an alert comes and goes the agent looks again, and the same plan or another one waits: the
    same action on the same targets needs no second thought; anything else, or the same after it was done, a minute."""

    since: dict[str, tuple[Any, float]] = field(default_factory=dict)  # what waits, and since when, by incident

    def decides(self, incidents: Iterable[dict[str, Any]], now: float) -> list[str]:
        """The incidents whose plan is approved at `now` (seconds on any steady clock)."""
        decided: list[str] = []
        for incident in incidents:
            id, plan = incident["id"], incident["plan"]
            if incident["state"] not in LOOKING:
                self.since.pop(id, None)
            if incident["state"] != "awaiting_approval" or plan is None:
                continue
            asked = [(step["action"], step["target"]) for step in plan["steps"]]
            known, since = self.since.get(id, (None, now))
            if known != asked:
                self.since[id] = asked, now
            elif now - since >= APPROVER_SECONDS:
                decided.append(id)
        return decided


@contextlib.asynccontextmanager
async def approve(world: ChaosWorld) -> AsyncIterator[Doings]:
    """The person looks at the API every second and approves, by the command line, what they have known for a minute."""
    world.autonomy = "approve"
    await world.start_agent()
    doings, person = Doings(), Person()

    async def look() -> None:
        while True:
            await asyncio.sleep(1.0)
            with contextlib.suppress(aiohttp.ClientError, TimeoutError, ValueError):
                for id in person.decides(await world.agent_incidents(), time.monotonic()):
                    await _approve(world, id, doings)

    try:
        async with _background(look()):
            yield doings
    finally:
        await world.end_child("agent")


async def _approve(world: ChaosWorld, id: str, doings: Doings) -> None:
    """By the command line, as a person would. A refusal (the plan has changed meanwhile) shows as no action."""
    beside = Path(sys.executable).with_name("alertmedic")
    program = (str(beside),) if beside.exists() else (sys.executable, "-m", "agent")
    config = world.place("agent") / "alertmedic.yaml"
    process = await asyncio.create_subprocess_exec(
        *(*program, "approve", id, "--config", str(config), "--note", "looks right", "--json"),
        env=world.agent_environment(),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, _ = await asyncio.wait_for(process.communicate(), 20)
    with contextlib.suppress(ValueError):
        doings.done.append((time.time(), "approval", str(json.loads(out).get("outcome", ""))))


@contextlib.asynccontextmanager
async def _background(*coroutines: Any) -> AsyncIterator[None]:
    """Runs them while the context lasts; one that fails takes the context with it."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(c) for c in coroutines]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()


ARMS: dict[str, ArmContext] = {
    "nothing": nothing,
    "liveness": liveness,
    "command": command,
    "auto": auto,
    "approve": approve,
}
WITH_AGENT = frozenset({"auto", "approve"})
