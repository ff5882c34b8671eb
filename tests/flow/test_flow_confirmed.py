"""An alert that comes and goes does not take a waiting plan from the person who is about to approve it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from flow_world import JUSTIFIED, NOW, World, open_world

from actions.model import Plan, Refusal, Step
from actions.policy import GuardPolicy
from agent import signed
from agent.fold_model import CONFIRMED_TOLD, Incident, IncidentState
from agent.incidents import IllegalMove
from agent.investigate import Investigation, Ranked
from agent.journal.records import PlanConfirmed, PlanMade, Stored
from agent.operations import Operations
from agent.store import Store
from rules.model import Diagnosis, Hypothesis
from rules.recurrence import Signature
from rules.verify import Verdict

KEY = b"k" * 32
LEAK = Hypothesis(
    cause="process.memory_leak", fault="memory", title="a leak", service="orders", posterior=0.9, confidence=0.9
)
_I = IncidentState


class NoBreakers:
    def __init__(self) -> None:
        self.breakers: dict[str, object] = {}

    async def reset_breaker(self, key: str, reason: str = "") -> None: ...


class Flapping:
    """A world whose looks find a leak, and propose the plan of `target`, each with the id of its own moment."""

    def __init__(self, world: World, directory: Path) -> None:
        self.world, self.directory = world, directory
        self.target, self.autonomy, self.persons = "pid=12,start=5", "approve", 1
        self.id, self.made = "", 0
        self.records: list[object] = []
        self.connect()

    def connect(self) -> None:
        world = self.world
        world.remediation.consider = self.consider  # type: ignore[method-assign]
        world.verifier.verdict = Verdict(recovered=False, text="still bad")
        world.store.subscribe(lambda stored, _: self.noted(stored))
        self.operations = Operations(world.store, NoBreakers(), lambda: world.now, GuardPolicy())  # type: ignore[arg-type]

    def noted(self, stored: Stored) -> None:
        self.records.append(stored.record)

    async def consider(self, incident: Incident) -> Plan:
        self.made += 1
        step = Step(action="process.restart", version=1, target=self.target, argv=("restart", self.target))
        return Plan(
            id=f"plan-{self.made}",
            incident=incident.id,
            service="orders",
            cause="process.memory_leak",
            steps=(step,),
            autonomy=self.autonomy,  # type: ignore[arg-type]
            persons=self.persons,
            made_at=self.world.now,
            expires_at=self.world.now + 900,
            notes=(f"posterior {self.made}",),
        )

    async def fires(self, name: str = "Slow") -> Incident:
        self.world.now += 10
        self.id = await self.world.alert(name=name)
        return await self.go_on()

    async def go_on(self) -> Incident:
        await self.world.investigation.advance(self.id)
        return self.incident

    async def restart(self) -> None:
        """As after kill -9: only what is durable is left."""
        await self.world.store.close()
        now, remediation = self.world.now, self.world.remediation
        self.world = World(Store.open(self.directory), remediation=remediation, now=now)
        self.connect()

    @property
    def incident(self) -> Incident:
        return self.world.incident(self.id)

    @property
    def plan(self) -> Plan:
        assert self.incident.plan is not None
        return self.incident.plan

    def link(self, person: str = "ann") -> str:
        digest = self.incident.plan_digest
        return signed.mint(
            KEY, incident=self.id, digest=digest, decision="approve", person=person, expires_at=NOW + 800
        )

    async def redeem(self, token: str) -> tuple[str, str]:
        answer = await self.operations.redeem(token, KEY, "link 10.0.0.4")
        return answer.outcome, answer.detail


@pytest.fixture
async def flapping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Flapping]:
    def rank(self: Investigation, *_: Any) -> Ranked:
        return Ranked(Diagnosis(verdict="ranked", hypotheses=(LEAK,), clear=True), JUSTIFIED, Signature())

    monkeypatch.setattr(Investigation, "_rank", rank)
    made = Flapping(await open_world(tmp_path), tmp_path)
    yield made
    await made.world.store.close()


async def test_the_first_link_approves_after_the_alert_fired_again_and_again(flapping: Flapping) -> None:
    await flapping.fires()
    first, token = flapping.plan, flapping.link()
    await flapping.fires()
    await flapping.fires("Another")
    assert flapping.made == 3  # each was a look of its own
    assert (flapping.plan, flapping.incident.plan_state) == (first, "waiting")
    assert flapping.plan.expires_at == NOW + 10 + 900  # a newer look gives it no more time
    assert (await flapping.redeem(token))[0] == "approved"
    assert [r.plan.id for r in flapping.records if isinstance(r, PlanMade)] == [first.id]  # asked for once
    flapping.world.remediation.outcome = flapping.world.outcome(flapping.id, "verified", "verified")
    await flapping.go_on()
    await asyncio.wait_for(asyncio.gather(*flapping.world.investigation.acting.values()), 5)
    moves = [line.text for line in flapping.incident.story if "-> acting" in line.text]
    assert len(moves) == 1


async def test_another_target_is_another_plan_and_the_old_link_says_why_it_is_none(flapping: Flapping) -> None:
    await flapping.fires()
    first, token = flapping.plan, flapping.link()
    flapping.target = "pid=77,start=9"
    incident = await flapping.fires()
    assert flapping.plan.id != first.id
    assert incident.past[-1].ended == "withdrawn"
    outcome, why = await flapping.redeem(token)
    assert outcome == "stale_digest"
    assert "the target is pid=77,start=9 now, not pid=12,start=5" in why
    assert incident.plan_state == "waiting"
    assert any(f"takes the place of {first.id}" in line.text for line in incident.story)


async def test_who_approves_during_the_look_waits_for_it(flapping: Flapping) -> None:
    await flapping.fires()
    token = flapping.link()
    answers: list[tuple[str, str]] = []

    async def approves() -> None:
        answers.append(await flapping.redeem(token))

    flapping.world.situations.during = approves
    incident = await flapping.fires()
    assert answers == [
        ("approved", "the incident is being looked at again: it begins when that comes to the same plan")
    ]
    assert (incident.state, incident.plan_state) == (_I.ACTING, "approved")


@pytest.mark.parametrize("change", [{"target": "pid=77,start=9"}, {"autonomy": "suggest"}, {"persons": 2}])
async def test_what_was_approved_during_the_look_does_not_run_where_that_comes_to_another_plan(
    flapping: Flapping, change: dict[str, Any]
) -> None:
    await flapping.fires()
    first, token = flapping.plan, flapping.link()

    async def approves() -> None:
        assert (await flapping.redeem(token))[0] == "approved"

    flapping.world.situations.during = approves
    for name, value in change.items():
        setattr(flapping, name, value)
    incident = await flapping.fires()
    assert flapping.plan.id != first.id
    assert incident.plan_state in ("waiting", "suggested")
    assert incident.past[-1].ended == "withdrawn"
    answer = await flapping.operations.approve(flapping.id, first.digest, "ann", "link 10.0.0.4", "")
    assert answer.outcome == "stale_digest"  # nobody is told that his approval stands


async def test_who_rejects_during_the_look_is_not_asked_again(flapping: Flapping) -> None:
    await flapping.fires()

    async def rejects() -> None:
        await flapping.operations.reject(flapping.id, flapping.plan.digest, "ann", "http x", "")

    flapping.world.situations.during = rejects
    incident = await flapping.fires()
    assert (incident.state, incident.refusal) == (_I.ESCALATED, Refusal.APPROVAL_REJECTED)


async def test_one_of_two_approvals_is_kept(flapping: Flapping) -> None:
    flapping.persons = 2
    await flapping.fires()
    ann, bob = flapping.link("ann"), flapping.link("bob")
    assert (await flapping.redeem(ann))[0] == "partly_approved"
    await flapping.fires()
    assert (await flapping.redeem(bob))[0] == "approved"


async def test_what_resolved_withdrew_waits_again_when_it_was_not_over(flapping: Flapping) -> None:
    await flapping.fires()
    first, token = flapping.plan, flapping.link()
    for _ in range(5):  # more often than there are rounds
        await flapping.world.alert("resolved")
        incident = await flapping.go_on()
        assert (incident.state, incident.plan_state) == (_I.VERIFYING, "withdrawn")
        assert (await flapping.redeem(token))[0] == "nothing_waiting"
        incident = await flapping.fires()
        assert (incident.state, incident.plan_state, incident.plan) == (_I.AWAITING_APPROVAL, "waiting", first)
    assert (await flapping.redeem(token))[0] == "approved"


async def test_an_approval_that_resolved_took_back_is_asked_for_anew(flapping: Flapping) -> None:
    await flapping.fires()
    first = flapping.plan
    assert (await flapping.redeem(flapping.link()))[0] == "approved"
    await flapping.world.alert("resolved")
    await flapping.go_on()
    incident = await flapping.fires()
    assert (incident.plan_state, flapping.plan.steps) == ("waiting", first.steps)
    assert flapping.plan.id != first.id


async def test_what_has_expired_is_not_confirmed(flapping: Flapping) -> None:
    await flapping.fires()
    first, token = flapping.plan, flapping.link()
    flapping.world.now = first.expires_at - 10
    await flapping.fires()  # fires when it expires
    assert flapping.plan.id != first.id
    assert (await flapping.redeem(token))[0] == "refused"


async def test_a_suggestion_stays_too(flapping: Flapping) -> None:
    flapping.autonomy = "suggest"
    await flapping.fires()
    first = flapping.plan
    incident = await flapping.fires()
    assert (incident.state, incident.plan) == (_I.SUGGESTED, first)
    answer = await flapping.operations.approve(flapping.id, first.digest, "ann", "http x", "")
    assert answer.outcome == "approved"


async def test_the_story_tells_of_one_confirmation_in_many(flapping: Flapping) -> None:
    await flapping.fires()
    for _ in range(3 * CONFIRMED_TOLD):
        await flapping.fires()
    lines = [line for line in flapping.incident.story if line.kind != "alerts_received"]
    assert sum(line.kind == "plan_confirmed" for line in lines) == 3
    assert flapping.incident.confirmed == 3 * CONFIRMED_TOLD
    assert len(lines) < 30
    await flapping.world.alert("resolved")
    await flapping.go_on()
    assert "resolved" in flapping.incident.story[-1].text  # what is news is told


@pytest.mark.parametrize("killed_in", [_I.INVESTIGATING, _I.DIAGNOSED])
async def test_a_crash_during_the_look_leaves_the_plan(flapping: Flapping, killed_in: IncidentState) -> None:
    await flapping.fires()
    first, token = flapping.plan, flapping.link()

    async def dies(*_: Any) -> Any:
        raise asyncio.CancelledError

    flapping.world.investigation._steps[killed_in] = dies
    with pytest.raises(asyncio.CancelledError):
        await flapping.fires()
    assert flapping.incident.state is killed_in
    body = flapping.world.store.state.to_snapshot()
    await flapping.restart()
    assert flapping.world.store.state.to_snapshot() == body
    incident = await flapping.go_on()
    assert (incident.state, incident.plan) == (_I.AWAITING_APPROVAL, first)
    assert (await flapping.redeem(token))[0] == "approved"


async def test_a_confirmation_of_what_no_look_came_to_never_becomes_durable(flapping: Flapping) -> None:
    await flapping.fires()
    seq = flapping.world.store.state.seq
    for plan in (flapping.plan.id, "plan-other"):
        with pytest.raises(IllegalMove):
            await flapping.world.store.record(PlanConfirmed(at=NOW, incident=flapping.id, plan=plan))
    await flapping.world.moved(flapping.id, "declined", "investigating", "diagnosed")
    assert flapping.incident.plan_state == "withdrawn"  # a move as older journals have it takes it back
    late = PlanConfirmed(at=flapping.plan.expires_at, incident=flapping.id, plan=flapping.plan.id)
    with pytest.raises(IllegalMove, match="expired"):
        await flapping.world.store.record(late)
    assert flapping.world.store.state.seq == seq + 3
