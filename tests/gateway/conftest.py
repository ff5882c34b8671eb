from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from gateway_world import Open, config, opened

from agent.gateway.gateway import Gateway
from agent.store import Store


@pytest.fixture
async def open_gateway(tmp_path: Path) -> AsyncIterator[Open]:
    """`await open_gateway("hang", budget_seconds=0.1)`: a started gateway over this test's journal, as after a restart
    when it is not the first. Everything is closed after the test."""
    live: list[tuple[Gateway, Store]] = []

    async def begin(engine: str = "", **more: object) -> Gateway:
        await finish()
        store = Store.open(tmp_path / "state")
        live.append((await opened(store, config(engine, **more)), store))
        return live[-1][0]

    async def finish() -> None:
        while live:
            gateway, store = live.pop()
            await gateway.close()
            await store.close()

    yield begin
    await finish()
