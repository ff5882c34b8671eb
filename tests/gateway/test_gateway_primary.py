"""Who is primary: promoted by the score alone (or by force), taken back by a person or by itself, over restarts."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from gateway_world import FAULT, Open, ask

from agent.config import Candidate
from agent.fold_gateway import GatewayCompared, GatewayJudged
from agent.fold_model import Incident
from agent.gateway.channel import ProcessChannel
from agent.gateway.gateway import Gateway, GatewayError, share
from agent.gateway.score import Answered
from rules.model import Alert, Diagnosis, Situation


@pytest.fixture
def candidate(tmp_path: Path) -> Candidate:
    """Packs of another version: one more, which says nothing."""
    (tmp_path / "packs").mkdir()
    text = "pack: more\nversion: 1\ndescription: More\n"
    (tmp_path / "packs" / "more.yaml").write_text(text)
    return Candidate(dirs=(tmp_path / "packs",))


async def score(gateway: Gateway, times: int, right: str) -> None:
    """Recorded and judged comparisons in which one channel alone was right."""
    candidate = await gateway._candidate_packs()
    assert candidate is not None
    versions = (gateway.version, candidate[1])
    if gateway.state.primary == "candidate":
        versions = (candidate[1], "old")
    for n in range(times):
        trace = f"{right}{n}-{gateway.state.compared}"
        a, b = (Answered(status="ok", version=v, cause=c, service="s") for v, c in zip(versions, "ab", strict=True))
        await gateway._store.record(
            GatewayCompared(at=1.0, trace=trace, evidence="e", a=a, b=b, differences=("first cause",)),
            GatewayJudged(at=1.0, trace=trace, cause=right, service="s", who="w"),
        )


async def test_only_the_score_promotes(open_gateway: Open, candidate: Candidate) -> None:
    gateway = await open_gateway(candidate=candidate, min_judged=8)
    stable = gateway.version
    with pytest.raises(GatewayError, match="not about the candidate"):
        await gateway.promote("me", "")
    await score(gateway, 7, "b")
    with pytest.raises(GatewayError, match="7 comparisons are judged, at least 8"):
        await gateway.promote("me", "")
    await score(gateway, 1, "a")
    with pytest.raises(GatewayError, match="does not show"):
        await gateway.promote("me", "")
    await score(gateway, 4, "b")
    told: list[str] = []
    gateway.on_primary = lambda packs: told.append(packs.version)
    await gateway.promote("me", "it is better")
    assert gateway.state.primary == "candidate"
    assert told == [gateway.packs.version] != [stable]
    assert gateway.state.promoted_version == gateway.version == f"{told[0]} #{gateway.version[-12:]}"
    assert gateway.state.board.judged == 0  # the roles are others now
    with pytest.raises(GatewayError, match="already"):
        await gateway.promote("me", "", force=True)
    # B is what was primary; a restart takes the roles up again.
    assert isinstance(gateway.b, ProcessChannel)
    await gateway.b.ready()
    found = await ask(gateway)
    assert (found.a.short.version, found.b.short.version) == (gateway.version, stable)
    gateway = await open_gateway(candidate=candidate)
    assert (gateway.state.primary, gateway.packs.version) == ("candidate", told[0])
    await gateway.rollback("me", "")
    assert (gateway.state.primary, gateway.packs.version) == ("stable", stable)
    with pytest.raises(GatewayError, match="already"):
        await gateway.rollback("me", "")
    assert [(m.after, m.who) for m in gateway.state.moves] == [("candidate", "me"), ("stable", "me")]


async def test_a_regress_is_taken_back_by_itself(open_gateway: Open, candidate: Candidate) -> None:
    gateway = await open_gateway(candidate=candidate)
    await gateway.promote("me", "", force=True)
    await score(gateway, 7, "b")
    assert gateway.state.primary == "candidate"
    await score(gateway, 1, "b")
    await asyncio.gather(*gateway._tasks)
    assert gateway.state.primary == "stable"
    assert gateway.state.moves[-1].reason == "regress: right alone 0 against 8 times"
    assert gateway.state.moves[-1].who == "alertmedic"


async def test_a_candidate_that_was_changed_since_is_not_primary(open_gateway: Open, candidate: Candidate) -> None:
    gateway = await open_gateway(candidate=candidate)
    await gateway.promote("me", "", force=True)
    with (candidate.dirs[0] / "more.yaml").open("a") as file:
        file.write("# edited, and its version not counted up\n")
    gateway = await open_gateway(candidate=candidate)
    assert (gateway.state.primary, gateway.state.moves[-1].who) == ("stable", "alertmedic")


async def test_an_engine_never_acts(open_gateway: Open) -> None:
    gateway = await open_gateway("good")
    with pytest.raises(GatewayError, match="only advises"):
        await gateway.promote("me", "", force=True)


async def test_judged_once_and_only_what_is_known(open_gateway: Open) -> None:
    gateway = await open_gateway("other")
    found = await ask(gateway, "t1")
    with pytest.raises(GatewayError, match="no recorded comparison"):
        await gateway.judge("t2", "c", "s", "me")
    await gateway.judge("t1", found.a.short.cause, found.a.short.service, "me")
    assert gateway.state.board.a_only == 1
    with pytest.raises(GatewayError, match="judged already"):
        await gateway.judge("t1", "x.other", "elsewhere", "me")


# -- live incidents


def incident(id: str, tenant: str = "default", team: str = "") -> Incident:
    made = Alert(
        tenant=tenant,
        fingerprint="f",
        status="firing",
        labels={"alertname": "A", "team": team},
        starts_at=1.0,
        digest="d",
    )
    return Incident(
        id=id,
        tenant=tenant,
        key="k",
        opened_at=1.0,
        opened_seq=1,
        updated_at=1.0,
        updated_seq=1,
        last_alert_at=1.0,
        alerts={"f": made},
    )


async def test_which_incidents_are_looked_at(open_gateway: Open) -> None:
    gateway = await open_gateway("good", percent=30.0, tenants=("a*",), teams=("core", "web-*"))
    low = next(f"inc-{n}" for n in range(100) if share(f"inc-{n}") < 30)
    high = next(f"inc-{n}" for n in range(100) if share(f"inc-{n}") >= 30)
    assert gateway.selected(incident(low, "abc", "web-1"))
    assert not gateway.selected(incident(high, "abc", "web-1"))
    assert not gateway.selected(incident(low, "b", "web-1"))
    assert not gateway.selected(incident(low, "abc", "other"))


async def test_a_look_at_a_live_incident_is_compared_beside_it(open_gateway: Open) -> None:
    gateway = await open_gateway("other")
    situation = Situation(alerts=(), entry="front", onset=1.0, until=2.0)
    mine = Diagnosis(verdict="insufficient_evidence", version="1")
    for n in range(9):
        gateway.shadow(incident(f"inc-{n}"), situation, mine)  # returns at once
    assert len(gateway._tasks) == 4  # the others were left out, and counted
    await asyncio.gather(*gateway._tasks)
    assert {c.record.incident for c in gateway.state.comparisons.values()} == {f"inc-{n}" for n in range(4)}
    answered: list[Any] = [c.record.b.status for c in gateway.state.comparisons.values()]
    assert "ok" in answered
    assert set(answered) <= {"ok", "busy"}


async def test_what_heals_an_incident_judges_its_comparison(open_gateway: Open) -> None:
    gateway = await open_gateway("other")
    found = await ask(gateway, "t", recording=FAULT)
    store = gateway._store
    await store.record(
        GatewayCompared(at=1.0, trace="live", incident="inc-x", evidence="e", a=found.a.short, b=found.b.short)
    )
    store.state.gateway.outcome("inc-x", (found.a.short.cause, found.a.short.service))
    assert store.state.gateway.comparisons["live"].judged == "a"
