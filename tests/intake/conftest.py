"""Ports over a real journal, or over a store that the test holds still."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from intake_world import HeldStore, Port

from agent.http.server import Options, build_app, serve
from agent.intake import Intake
from agent.store import Store

Start = Callable[..., Awaitable[Port]]


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    """`await start(store, options=..., **intake)` serves a port; everything is closed after the test."""
    ports: list[Port] = []

    async def begin(store: Any, options: Options | None = None, socket: bool = False, **intake: Any) -> Port:
        taking = Intake(store, **intake)
        port = Port(store, taking, None, aiohttp.ClientSession())  # type: ignore[arg-type]
        ports.append(port)
        app = build_app(
            taking,
            store,
            port.decisions,
            health=lambda: port.health,
            metrics=lambda: (b"up 1\n", "text/plain; version=0.0.4"),
            options=options,
        )
        path = tmp_path / "control.sock" if socket else None
        port.serving = await serve(app, "127.0.0.1", 0, socket_path=path, shutdown_seconds=2)
        return port

    yield begin
    for port in ports:
        await port.session.close()
        if port.serving is not None:
            await port.serving.close()


@pytest.fixture
async def held() -> HeldStore:
    return HeldStore()


@pytest.fixture
async def open_store(tmp_path: Path) -> AsyncIterator[Callable[[], Store]]:
    """`open_store()` opens the journal of this test's directory; the one opened last is closed after the test."""
    opened: list[Store] = []

    def begin() -> Store:
        opened.append(Store.open(tmp_path / "state"))
        return opened[-1]

    yield begin
    for store in opened[-1:]:
        await store.close()
