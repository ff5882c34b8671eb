"""What is asked of Alertmanager on start makes no false claims and loses nothing, against a real HTTP server."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from flow_world import NOW, World, nothing, open_world

from agent.config import Alertmanager
from agent.fold_model import IncidentState
from agent.intake import Intake
from agent.reconcile import ReconcileError, reconcile


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    made = await open_world(tmp_path)
    yield made
    await made.store.close()


def entry(name: str, starts_at: str = "2027-01-15T07:59:00.000Z", **more: Any) -> dict[str, Any]:
    """An alert in the shape of the v2 API. The default start is the one that `World.alert` gives: NOW - 60."""
    labels = {"alertname": name, "service": "front"}
    receivers = [{"name": "r"}]
    held = {"fingerprint": name, "labels": labels, "startsAt": starts_at, "receivers": receivers}
    return {**held, "status": {"state": "active"}, **more}


async def ask(
    world: World, held: list[dict[str, Any]], during: Callable[[], Awaitable[Any]] = nothing, **more: Any
) -> tuple[int, int]:
    """Reconciles with an Alertmanager that holds these; `during` happens before it answers."""

    async def answer(request: web.Request) -> web.Response:
        await during()
        return web.json_response(held)

    app = web.Application()
    app.router.add_get("/api/v2/alerts", answer)
    async with TestServer(app) as server:
        config = Alertmanager(url=str(server.make_url("/")), **more)
        return await reconcile(config, world.store, Intake(world.store), NOW)


async def test_what_came_while_it_was_asked_is_not_claimed_to_be_gone(world: World) -> None:
    gone = await world.alert(name="Gone")
    assert await ask(world, [], lambda: world.alert(name="Late")) == (0, 1)
    status = {a.name: a.status for a in world.incident(gone).alerts.values()}
    assert status == {"Gone": "resolved", "Late": "firing"}


async def test_an_escalated_incident_is_not_reopened_by_the_alert_that_still_fires(world: World) -> None:
    id = await world.alert()
    await world.moved(id, "escalated")
    assert await ask(world, [entry("Slow")]) == (0, 0)
    assert world.incident(id).state is IncidentState.ESCALATED


async def test_one_that_began_anew_while_nobody_looked_does_reopen_it(world: World) -> None:
    id = await world.alert()
    await world.moved(id, "escalated")
    assert await ask(world, [entry("Slow", "2027-01-15T07:59:30.000Z")]) == (1, 0)
    assert world.incident(id).state is IncidentState.OPEN


async def test_an_alert_that_cannot_be_understood_holds_up_no_other(world: World) -> None:
    gone = await world.alert(name="Gone")
    held = [entry("Bad", "yesterday"), entry("Good")]
    with pytest.raises(ReconcileError, match=r"Bad.*the others were taken"):
        await ask(world, held)
    status = {a.name: a.status for a in world.incident(gone).alerts.values()}
    assert status == {"Gone": "resolved", "Good": "firing"}
    assert world.store.state.quarantined_count == 1


async def test_a_silenced_alert_is_neither_news_nor_gone(world: World) -> None:
    id = await world.alert(name="Known")
    silenced = {"status": {"state": "suppressed"}}
    assert await ask(world, [entry("Known", **silenced), entry("Other", **silenced)]) == (0, 0)
    assert {a.name: a.status for a in world.incident(id).alerts.values()} == {"Known": "firing"}


ROUTES = {"ours": "default", "team-*": "team-b"}


async def test_only_what_is_routed_to_us_is_news_and_for_its_tenant(world: World) -> None:
    held = [
        entry("Ours", receivers=[{"name": "pager"}, {"name": "ours"}]),
        entry("Theirs", receivers=[{"name": "team-web"}]),
        entry("Watchdog", receivers=[{"name": "pager"}]),
    ]
    assert await ask(world, held, receivers=ROUTES) == (2, 0)
    assert {(i.tenant, i.receiver, *i.alerts) for i in world.store.state.active()} == {
        ("default", "ours", "Ours"),
        ("team-b", "team-web", "Theirs"),
    }
    assert await ask(world, held, receivers=ROUTES) == (0, 0)


async def test_what_another_sender_reported_is_not_claimed_to_be_gone(world: World) -> None:
    grafana = await world.alert(name="Grafana")  # its receiver is "r"
    ours = entry("Ours", receivers=[{"name": "ours"}], labels={"alertname": "Ours", "service": "orders"})
    assert await ask(world, [ours], receivers=ROUTES) == (1, 0)
    assert await ask(world, [], receivers=ROUTES) == (0, 1)
    assert {a.status for a in world.incident(grafana).alerts.values()} == {"firing"}
