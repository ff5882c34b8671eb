"""The incident machine's whole state space on the real investigation and the real fold: every state x every event.

Each case puts an incident into a state by a legal way, lets one thing happen (in the world, by a person, the clock, or
by a step's end), and lets the investigation go on until it waits. All moves that were journalled must be in the table;
together they must be the table, but for the edges that are named at the end with who takes them. No case may leave an
incident that is neither over nor waiting for something.
"""

from __future__ import annotations

import asyncio
import itertools
import shutil
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest
from flow_world import JUSTIFIED, NOW, World, open_world

from actions.model import Autonomy, Declined, Plan, Refusal, Step
from actions.policy import GuardPolicy
from agent.fold_model import FINAL, INCIDENT_MOVES, IncidentState
from agent.incidents import IllegalMove
from agent.journal.records import ApprovalGiven, Diagnosed, IncidentMoved, PlanMade, Stored
from agent.operations import Operations
from rules.model import Diagnosis, Hypothesis
from rules.verify import Verdict

I = IncidentState  # noqa: E741
Edge = tuple[IncidentState, IncidentState]
TABLE = {(before, after) for before, afters in INCIDENT_MOVES.items() for after in afters}
# How each state is reached, and what waits there.
WAYS: dict[IncidentState, tuple[tuple[str, ...], Autonomy | None]] = {
    I.OPEN: ((), None),
    I.INVESTIGATING: (("investigating",), None),
    I.DIAGNOSED: (("investigating", "diagnosed"), None),
    I.SUGGESTED: (("investigating", "diagnosed", "suggested"), "suggest"),
    I.AWAITING_APPROVAL: (("investigating", "diagnosed", "awaiting_approval"), "approve"),
    I.ACTING: (("investigating", "diagnosed", "acting"), "auto"),
    I.DECLINED: (("investigating", "diagnosed", "declined"), None),
    I.VERIFYING: (("investigating", "diagnosed", "acting", "verifying"), "auto"),
    I.RESOLVED: (("investigating", "diagnosed", "acting", "verifying", "resolved"), "auto"),
    I.ESCALATED: (("investigating", "escalated"), None),
}
BEST = Hypothesis(cause="c", fault="crash", title="a cause", service="front", posterior=0.9, confidence=0.9)


class Breakers:
    def __init__(self) -> None:
        self.breakers: dict[str, Any] = {}

    async def reset_breaker(self, key: str, reason: str = "") -> None: ...


class Case:
    """One incident in one state, in a store of its own, with every move noted."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.edges: set[Edge] = set()
        self.id = ""
        world.store.subscribe(self._noted)

    def _noted(self, stored: Stored, _: object) -> None:
        if self.id and isinstance(stored.record, IncidentMoved):
            self.edges.add((IncidentState(stored.record.before), IncidentState(stored.record.after)))

    async def begin(self, state: IncidentState, *, known: bool) -> None:
        world = self.world
        id = await world.alert()
        way, autonomy = WAYS[state]
        for after in way:
            if after == "diagnosed" and known:
                answer = Diagnosis(verdict="ranked", hypotheses=(BEST,))
                await world.store.record(
                    Diagnosed(at=NOW, incident=id, diagnosis=answer, evidence_at=NOW, justification=JUSTIFIED)
                )
            if after in ("suggested", "awaiting_approval", "acting") and autonomy is not None:
                await world.store.record(PlanMade(at=NOW, plan=self.plan(id, autonomy)))
            await world.moved(id, after)
        assert world.incident(id).state is state
        world.remediation.plan = Declined(reason=Refusal.COOLDOWN, detail="a moment ago")
        world.remediation.outcome = world.outcome(id, "verified", "verified")
        self.id = id

    def plan(self, id: str, autonomy: Autonomy) -> Plan:
        step = Step(action="a", version=1, target="t", argv=("true",))
        return Plan(
            id=f"plan-{autonomy}",
            incident=id,
            service="front",
            cause="c",
            steps=(step,),
            autonomy=autonomy,
            made_at=NOW,
            expires_at=NOW + 900,
        )

    async def go_on(self) -> float | None:
        """As the service does: each time it is woken, until it waits."""
        wake: float | None = None
        for _ in range(8):
            self.world.wakes.clear()
            wake = await self.world.investigation.advance(self.id)
            tasks = list(self.world.investigation.acting.values())
            if tasks:
                await asyncio.wait_for(asyncio.gather(*tasks), 10)
            if not tasks and not any(at <= self.world.now for _, at in self.world.wakes):
                break
        return wake


Event = Callable[[Case], Awaitable[None]]


def plans(autonomy: Autonomy) -> Event:
    async def event(case: Case) -> None:
        case.world.remediation.plan = case.plan(case.id, autonomy)

    return event


def declines(reason: Refusal) -> Event:
    async def event(case: Case) -> None:
        case.world.remediation.plan = Declined(reason=reason, detail="because")

    return event


def ends(result: str) -> Event:
    async def event(case: Case) -> None:
        state = {"handed_over": "handed_over", "interrupted": "planned"}.get(result, result)
        case.world.remediation.outcome = case.world.outcome(case.id, result, state)

    return event


def decides(decision: Literal["approve", "reject"]) -> Event:
    async def event(case: Case) -> None:
        store = case.world.store
        desk = Operations(store, Breakers(), lambda: case.world.now, GuardPolicy())  # type: ignore[arg-type]
        digest = case.world.incident(case.id).plan_digest
        await (desk.approve if decision == "approve" else desk.reject)(case.id, digest, "ann", "http x", "")

    return event


def refuses_then(decision: Event) -> Event:
    async def event(case: Case) -> None:
        case.world.remediation.refusal = Declined(reason=Refusal.PAUSED, detail="paused")
        await decision(case)

    return event


async def nothing(case: Case) -> None:
    pass


async def resolves(case: Case) -> None:
    await case.world.alert("resolved")


async def more_alerts(case: Case) -> None:
    await case.world.alert(name="Another")


async def time_passes(case: Case) -> None:
    case.world.now += 10_000.0


async def clock_back(case: Case) -> None:
    case.world.now -= 10_000.0


async def evidence_breaks(case: Case) -> None:
    async def broken() -> None:
        raise OSError("no evidence at all")

    case.world.situations.during = broken


async def series_stay_bad(case: Case) -> None:
    case.world.verifier.verdict = Verdict(recovered=False, text="still bad")


async def resolves_but_stays_bad(case: Case) -> None:
    await series_stay_bad(case)
    await resolves(case)


async def resolves_but_stays_bad_for_long(case: Case) -> None:
    await resolves_but_stays_bad(case)
    await time_passes(case)


async def rounds_are_over(case: Case) -> None:
    incident = case.world.store.state.touch(case.id, NOW, case.world.store.state.seq)
    incident.rounds = 99
    await series_stay_bad(case)
    await time_passes(case)


async def runner_raises(case: Case) -> None:
    case.world.remediation.outcome = RuntimeError("a bug")


EVENTS: dict[str, Event] = {
    "nothing": nothing,
    "alert resolves": resolves,
    "more alerts": more_alerts,
    "time passes": time_passes,
    "the clock is set back": clock_back,
    "evidence breaks": evidence_breaks,
    "series stay bad": series_stay_bad,
    "resolved, but bad": resolves_but_stays_bad,
    "resolved, but bad for long": resolves_but_stays_bad_for_long,
    "no rounds left": rounds_are_over,
    "the runner raises": runner_raises,
    **{f"plan: {a}": plans(a) for a in ("suggest", "approve", "auto")},
    **{f"declined: {r}": declines(r) for r in (Refusal.PAUSED, Refusal.STALE_EVIDENCE)},
    **{
        f"ends {r}": ends(r)
        for r in ("verified", "undone", "handed_over", "cancelled", "denied", "expired", "interrupted")
    },
    "approved": decides("approve"),
    "rejected": decides("reject"),
    "approved, but a gate has closed": refuses_then(decides("approve")),
}
# Edges that an investigation never takes by itself.
BY_OTHERS = {
    (I.RESOLVED, I.OPEN): "the fold, when the alert fires again",
    (I.ESCALATED, I.OPEN): "the fold, when the alert fires again",
    (I.OPEN, I.ESCALATED): "only where the first move itself cannot be made",
}


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    memory = Path("/dev/shm")
    place = memory / f"alertmedic-statespace-{tmp_path.name}" if memory.is_dir() else tmp_path
    place.mkdir(exist_ok=True)
    yield place
    shutil.rmtree(place, ignore_errors=True)


async def test_the_moves_from_every_state_under_every_event_are_the_table(directory: Path) -> None:
    seen: set[Edge] = set()
    cases = itertools.product(INCIDENT_MOVES, EVENTS.items(), (True, False))
    for n, (state, (name, event), known) in enumerate(cases):
        world = await open_world(directory / str(n))
        case = Case(world)
        await case.begin(state, known=known)
        await event(case)
        wake = await case.go_on()
        seen |= case.edges
        where = (state, name, known)
        assert case.edges <= TABLE, where
        after = world.incident(case.id)
        woken = wake is not None or bool(world.wakes)
        assert after.final or woken or after.state in (I.AWAITING_APPROVAL, I.SUGGESTED, I.ACTING), where
        if state in FINAL and name != "more alerts":
            assert not case.edges, where
        await world.store.close()
    assert TABLE - seen == set(BY_OTHERS)


@pytest.mark.parametrize("before", IncidentState)
@pytest.mark.parametrize("after", IncidentState)
async def test_a_move_outside_the_table_never_becomes_durable(
    before: IncidentState, after: IncidentState, directory: Path
) -> None:
    world = await open_world(directory / "store")
    case = Case(world)
    await case.begin(before, known=True)
    seq = world.store.state.seq
    move = IncidentMoved(at=NOW, incident=case.id, before=before, after=after)
    if after in INCIDENT_MOVES[before] and before not in FINAL:
        await world.store.record(move)
        assert world.incident(case.id).state is after
    else:
        with pytest.raises(IllegalMove):
            await world.store.record(move)
        assert world.store.state.seq == seq
    await world.store.close()


@pytest.mark.parametrize("state", sorted(FINAL))
async def test_only_a_firing_alert_reopens_what_is_over(state: IncidentState, directory: Path) -> None:
    world = await open_world(directory / "store")
    case = Case(world)
    await case.begin(state, known=True)
    given = ApprovalGiven(at=NOW, incident=case.id, plan="p", digest="d", decision="approve", who="a", origin="http x")
    await world.store.record(given)
    assert world.incident(case.id).state is state
    await world.alert("firing", name="Slow")
    assert world.incident(case.id).state is I.OPEN
    assert msgspec.json.encode(world.incident(case.id))
    await world.store.close()
