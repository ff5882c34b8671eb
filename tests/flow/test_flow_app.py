"""The wiring: after a restart everybody is looked at, timers do not pile up, readiness tells of the journal alone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flow_world import NOW, World, open_world

from actions.model import StepMoved, StepState
from agent import app as module
from agent.app import App
from agent.config import Config, Intake, Investigate, ListenTls
from agent.gateway.gateway import Gateway
from agent.journal.records import StepRecorded


@dataclass
class Looked:
    """Stands for the investigation: remembers who was looked at, and asks to be woken at `again`."""

    again: float | None = None
    ids: list[str] = field(default_factory=list)
    acting: dict[str, Any] = field(default_factory=dict)
    situations: Any = field(default_factory=lambda: SimpleNamespace(topology_state="static"))

    async def advance(self, id: str) -> float | None:
        self.ids.append(id)
        return self.again


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    config = Config(
        listen="127.0.0.1:0",
        state_dir=tmp_path,
        intake=Intake(max_waiting=1),
        investigate=Investigate(concurrency=1),
    )
    made = await open_world(tmp_path, config=config)
    yield made
    await made.store.close()


def app_of(world: World, looked: Looked) -> App:
    gateway = Gateway(world.config, world.store, None, world.telemetry)  # type: ignore[arg-type]
    app = App(world.config, world.store, world.telemetry, SimpleNamespace(runner=None), gateway)  # type: ignore[arg-type]
    app.investigation = looked  # type: ignore[assignment]
    return app


async def until(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


async def other(world: World, n: int) -> str:
    """An incident of its own, in state suggested."""
    world.now = NOW + n * 3600.0  # outside the merging windows
    id = await world.alert(name=f"A{n}")
    await world.moved(id, "investigating", "diagnosed", "suggested")
    return id


async def test_after_a_restart_everybody_is_looked_at_however_many_wait(world: World) -> None:
    ids = [await other(world, n) for n in range(5)]
    assert len(set(ids)) == 5
    looked = Looked()
    app = app_of(world, looked)
    await app.listen(())
    app.begin()
    try:
        await until(lambda: len(looked.ids) >= 5)
        assert set(looked.ids) == set(ids)
    finally:
        await app.stop()


async def test_the_timer_of_an_incident_that_ended_is_dropped(world: World) -> None:
    id = await other(world, 0)
    app = app_of(world, Looked(again=time.time() + 3600))
    await app.listen(())
    app.begin()
    try:
        await until(lambda: id in app._timers)
        await world.moved(id, "escalated")
        assert app._timers == {}
    finally:
        await app.stop()


async def test_a_journal_that_works_again_is_found_out_without_any_alert(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.01)
    app = app_of(world, Looked())
    await app.listen(())
    app.begin()
    try:
        assert app.health()["ready"] is True
        world.store._wal._unavailable = "no space left"
        assert app.health()["ready"] is False
        await until(lambda: app.health()["ready"])
        assert "no space left" in world.store.state.log[-1].text
    finally:
        await app.stop()


async def test_a_nearly_full_disk_is_told_and_is_no_reason_not_to_be_ready(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = app_of(world, Looked())
    usage = SimpleNamespace(free=1024, total=10**9)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    assert app.health()["ready"] is True
    assert app.health()["disk"] == {"free_bytes": 1024, "total_bytes": 10**9, "low": True}

    def gone(path: Path) -> None:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr("shutil.disk_usage", gone)
    assert "No such file" in str(app.health()["disk"])


async def step(world: World, id: str, before: StepState, after: StepState) -> None:
    move = StepMoved(incident=id, plan=f"plan-{id}", step=0, before=before, after=after, at=NOW)
    await world.store.record(StepRecorded(move=move))


async def test_a_drain_waits_for_an_effect_and_not_for_a_verification(world: World) -> None:
    id = await world.acting()
    await step(world, id, StepState.PLANNED, StepState.INTENT)
    looked = Looked()
    app = app_of(world, looked)
    ended: list[str] = []
    let_go = asyncio.Event()

    async def act() -> None:
        try:
            await let_go.wait()
            await step(world, id, StepState.INTENT, StepState.RAN)
            await asyncio.Event().wait()  # the verification
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    await app.listen(())
    app.begin()
    looked.acting[id] = asyncio.create_task(act())
    stopping = asyncio.create_task(app.stop())
    done, _ = await asyncio.wait([stopping], timeout=0.3)
    assert not done
    assert ended == []
    let_go.set()
    await asyncio.wait_for(stopping, 10)
    assert world.incident(id).steps[0].state is StepState.RAN
    assert ended == ["cancelled"]


async def test_a_certificate_that_cannot_be_used_is_named(world: World, tmp_path: Path) -> None:
    certificate = tmp_path / "cert.pem"
    certificate.write_text("nothing of the kind")
    config = Config(listen="127.0.0.1:0", state_dir=tmp_path, listen_tls=ListenTls(cert_file=certificate))
    world.config = config
    with pytest.raises(OSError, match=r"cert\.pem.*hint: PEM"):
        await app_of(world, Looked()).listen(())
