"""A decision counts once, for what the person saw, from as many people as are asked; a link decides one thing once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from flow_world import NOW, World, open_world
from hypothesis import given
from hypothesis import strategies as st

from actions.model import Autonomy, Plan, Refusal, Step
from actions.policy import GuardPolicy
from agent import signed
from agent.fold_model import IncidentState
from agent.incidents import State
from agent.journal.records import ApprovalGiven, PlanMade
from agent.operations import Operations
from agent.store import Store

KEY = b"k" * 32
_I = IncidentState


class NoBreakers:
    def __init__(self) -> None:
        self.breakers: dict[str, object] = {}

    async def reset_breaker(self, key: str, reason: str = "") -> None: ...


class Desk:
    """Operations over a world, with an incident whose plan waits (or is suggested)."""

    def __init__(self, world: World, policy: GuardPolicy) -> None:
        self.world = world
        self.refused: list[Refusal] = []
        self.operations = Operations(
            world.store,
            NoBreakers(),  # type: ignore[arg-type]
            lambda: world.now,
            policy,
            self.refused.append,
        )
        self.id = ""

    async def plan(self, autonomy: Autonomy = "approve", persons: int = 1) -> Plan:
        world = self.world
        self.id = await world.alert()
        await world.moved(self.id, "investigating", "diagnosed")
        plan = Plan(
            id="plan-seen",
            incident=self.id,
            service="front",
            cause="c",
            steps=(Step(action="a", version=1, target="t", argv=("true", "x")),),
            autonomy=autonomy,
            persons=persons,
            made_at=world.now,
            expires_at=world.now + 900,
        )
        await world.store.record(PlanMade(at=world.now, plan=plan))
        await world.moved(self.id, "awaiting_approval" if autonomy == "approve" else "suggested")
        return plan

    async def approve(self, digest: str, who: str = "ann", origin: str = "http 10.0.0.4") -> str:
        return (await self.operations.approve(self.id, digest, who, origin, "")).outcome

    @property
    def counted(self) -> list[str]:
        return [a.who for a in self.world.incident(self.id).approvals if a.counted]


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    world = await open_world(tmp_path)
    yield Desk(world, GuardPolicy())
    await world.store.close()


async def test_sent_twice_it_is_recorded_once_and_answered_alike(desk: Desk) -> None:
    plan = await desk.plan()
    answers = await asyncio.gather(*(desk.approve(plan.digest) for _ in range(5)))
    assert set(answers) == {"approved"}
    assert desk.counted == ["ann"]
    again = await desk.operations.approve(desk.id, plan.digest, "ann", "http 10.9.9.9", "")
    assert (again.outcome, again.plan) == ("approved", plan.id)
    assert "before" in again.detail
    assert await desk.approve(plan.digest, "bob") == "refused"
    assert desk.refused == [Refusal.APPROVAL_STALE]


async def test_a_replay_decides_nothing_about_a_later_plan_of_the_same_steps(desk: Desk) -> None:
    plan = await desk.plan()
    later = msgspec.structs.replace(plan, id="plan-later", made_at=plan.made_at + 60)
    await desk.world.moved(desk.id, "investigating", "diagnosed")
    await desk.world.store.record(PlanMade(at=NOW, plan=later))
    await desk.world.moved(desk.id, "awaiting_approval")
    assert await desk.approve(plan.digest) == "stale_digest"
    assert desk.world.incident(desk.id).plan_state == "waiting"
    assert await desk.approve(later.digest) == "approved"


async def test_two_people_are_two_credentials_or_two_uids(desk: Desk) -> None:
    plan = await desk.plan(persons=2)
    assert await desk.approve(plan.digest, "ann (uid=1000)", "cli uid=1000") == "partly_approved"
    assert desk.world.incident(desk.id).plan_state == "waiting"
    # The name on a command line is a claim; the uid is not.
    assert await desk.approve(plan.digest, "bob (uid=1000)", "cli uid=1000") == "partly_approved"
    assert desk.world.incident(desk.id).plan_state == "waiting"
    assert await desk.approve(plan.digest, "ci", "http 10.0.0.4") == "approved"
    assert desk.world.incident(desk.id).plan_state == "approved"
    assert len(desk.counted) == 2


async def test_one_no_among_two_is_a_no(desk: Desk) -> None:
    plan = await desk.plan(persons=2)
    assert await desk.approve(plan.digest, "ann") == "partly_approved"
    assert (await desk.operations.reject(desk.id, plan.digest, "bob", "http x", "")).outcome == "rejected"
    assert desk.world.incident(desk.id).plan_state == "rejected"
    assert await desk.approve(plan.digest, "eve") == "refused"


async def test_a_decision_survives_a_restart_and_expires(desk: Desk, tmp_path: Path) -> None:
    plan = await desk.plan(persons=2)
    await desk.approve(plan.digest, "ann")
    await desk.world.store.close()
    desk.world.store = store = Store.open(tmp_path)
    again = Operations(store, NoBreakers(), lambda: desk.world.now)  # type: ignore[arg-type]
    assert (await again.approve(desk.id, plan.digest, "ann", "http x", "")).outcome == "partly_approved"
    desk.world.now += 900
    assert (await again.approve(desk.id, plan.digest, "bob", "http x", "")).outcome == "expired"


async def test_a_suggestion_is_made_a_request_by_who_approves_it(desk: Desk) -> None:
    plan = await desk.plan("suggest")
    assert await desk.approve("0" * 32) == "stale_digest"
    assert await desk.approve(plan.digest) == "approved"
    incident = desk.world.incident(desk.id)
    assert incident.plan is not None
    assert (incident.state, incident.plan_state) == (_I.AWAITING_APPROVAL, "approved")
    assert (incident.plan.autonomy, incident.plan.steps) == ("approve", plan.steps)
    assert incident.plan.id != plan.id
    assert await desk.approve(plan.digest) == "approved"  # the same click again
    assert len(incident.approvals) == 1


async def test_a_request_that_a_crash_left_half_written_is_gone_on_with(desk: Desk) -> None:
    plan = await desk.plan("suggest")
    request = msgspec.structs.replace(plan, id="plan-request", autonomy="approve")
    await desk.world.store.record(PlanMade(at=NOW, plan=request))  # and then the lights went out
    assert await desk.approve(plan.digest) == "stale_digest"
    assert await desk.approve(request.digest) == "approved"
    incident = desk.world.incident(desk.id)
    assert (incident.state, incident.plan_state) == (_I.AWAITING_APPROVAL, "approved")
    assert incident.plan == request


async def test_where_suggestions_are_only_that_nobody_approves_them(tmp_path: Path) -> None:
    world = await open_world(tmp_path)
    desk = Desk(world, GuardPolicy(approve_suggestions=False))
    plan = await desk.plan("suggest")
    assert await desk.approve(plan.digest) == "refused"
    assert desk.refused == [Refusal.SUGGEST_ONLY]
    assert world.incident(desk.id).state is _I.SUGGESTED
    assert "suggest_only" in world.incident(desk.id).story[-1].text
    await world.store.close()


async def test_more_alerts_make_the_agent_look_again_while_the_plan_waits(desk: Desk) -> None:
    plan = await desk.plan()
    world = desk.world
    incident = world.store.state.touch(desk.id, NOW, world.store.state.seq)
    incident.diagnosed_seq = world.store.state.seq
    await world.alert(name="Worse")
    await world.investigation._awaiting_approval(world.incident(desk.id))
    assert world.incident(desk.id).state is _I.INVESTIGATING
    assert await desk.approve(plan.digest) == "approved"
    assert world.incident(desk.id).state is _I.INVESTIGATING  # it begins when the look comes to the same plan


async def test_decisions_of_an_older_journal_still_count(desk: Desk) -> None:
    """Their digest had no plan in it."""
    plan = await desk.plan()
    given = ApprovalGiven(
        at=NOW, incident=desk.id, plan=plan.id, digest=plan.steps_digest, decision="approve", who="ann", origin="http x"
    )
    await desk.world.store.record(given)
    assert desk.world.incident(desk.id).plan_state == "approved"


# -- signed links


def link(plan: Plan, **more: object) -> str:
    values = {"incident": plan.incident, "digest": plan.digest, "decision": "approve", "person": "ann@example.org"}
    return signed.mint(KEY, **(values | {"expires_at": NOW + 300} | more))  # type: ignore[arg-type]


async def test_a_link_decides_once(desk: Desk) -> None:
    plan = await desk.plan(persons=2)
    token = link(plan)
    assert (await desk.operations.redeem(token, KEY, "link 10.0.0.4")).outcome == "partly_approved"
    used = await desk.operations.redeem(token, KEY, "link 10.0.0.4")
    assert (used.outcome, used.detail) == ("refused", "the link was used already")
    other = await desk.operations.redeem(link(plan, person="bob@example.org"), KEY, "link 10.0.0.4")
    assert other.outcome == "approved"
    assert desk.counted == ["ann@example.org", "bob@example.org"]


async def test_a_link_expires_and_is_bound_to_its_plan(desk: Desk) -> None:
    plan = await desk.plan()
    assert (await desk.operations.redeem(link(plan, digest="0" * 32), KEY, "link")).outcome == "stale_digest"
    token = link(plan)
    desk.world.now += 300
    late = await desk.operations.redeem(token, KEY, "link")
    assert (late.outcome, late.detail) == ("refused", "the link has expired")
    assert not desk.counted


@given(st.data())
def test_no_changed_link_is_taken(data: st.DataObject) -> None:
    token = signed.mint(KEY, incident="i", digest="d", decision="reject", person="ann", expires_at=NOW)
    assert signed.verified(token, KEY, NOW - 1).decision == "reject"
    at = data.draw(st.integers(0, len(token) - 1))
    letter = data.draw(st.characters())
    changed = data.draw(st.sampled_from([token[:at] + letter + token[at + 1 :], token[:at], token + letter, letter]))
    if changed != token:
        with pytest.raises(signed.LinkError):
            signed.verified(changed, KEY, NOW - 1)
    with pytest.raises(signed.LinkError):
        signed.verified(token, b"x" * 32, NOW - 1)


def test_a_short_key_is_no_key() -> None:
    with pytest.raises(ValueError, match="at least 32"):
        signed.mint(b"short", incident="i", digest="d", decision="approve", person="p", expires_at=NOW)


def test_the_fold_is_the_same_after_replay(tmp_path: Path) -> None:
    async def write() -> bytes:
        world = await open_world(tmp_path)
        desk = Desk(world, GuardPolicy())
        plan = await desk.plan("suggest", persons=2)
        await desk.approve(plan.digest, "ann")
        await desk.approve(world.incident(desk.id).plan_digest, "bob")
        body = world.store.state.to_snapshot()
        await world.store.close()
        return body

    body = asyncio.run(write())
    again = Store.open(tmp_path)
    assert again.state.to_snapshot() == body
    assert State.from_snapshot(body).to_snapshot() == body
    asyncio.run(again.close())
