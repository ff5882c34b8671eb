"""A gateway over a real store, with recordings as evidence and engines of this directory as the other channel."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec

from agent.config import Candidate, Config
from agent.gateway.channel import ProcessChannel
from agent.gateway.gateway import Evaluation, Gateway, Request
from agent.packs import load_packs
from agent.store import Store
from agent.telemetry import Telemetry

RECORDINGS = Path(__file__).parents[1] / "data" / "golden"
FAULT = "petshop-overload"
Open = Callable[..., Awaitable[Gateway]]


def config(engine: str = "", **more: Any) -> Config:
    candidate = more.pop("candidate", Candidate(engine=f"gateway_engines:{engine}" if engine else ""))
    section = {"recordings": RECORDINGS, "budget_seconds": 60.0, "candidate": candidate, **more}
    return msgspec.structs.replace(Config(), gateway=msgspec.structs.replace(Config().gateway, **section))


async def opened(store: Store, of: Config) -> Gateway:
    made = Gateway(of, store, None, Telemetry("test"))  # type: ignore[arg-type]
    packs = await asyncio.to_thread(load_packs, of.packs.dirs, of.packs.disable, of.packs.model)
    await made.start(packs)
    if isinstance(made.b, ProcessChannel):
        await made.b.ready()
    return made


async def ask(gateway: Gateway, trace: str = "t", recording: str = FAULT, **more: Any) -> Evaluation:
    return await gateway.evaluate(Request(trace_id=trace, recording=recording, **more))
