"""The fold: which incident an alert joins, what may move, what counts, what is forgotten. Pure: no clock, no disk."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import product

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from journal_kit import alert, moved, note, plan, received, step

from actions.model import (
    STEP_FINAL,
    STEP_MOVES,
    BreakerMoved,
    BreakerState,
    IllegalMove,
    Refusal,
    StepState,
)
from agent.incidents import (
    FINAL,
    INCIDENT_MOVES,
    Changes,
    Incident,
    IncidentState,
    State,
    StateError,
    UnknownIncident,
    apply,
    check,
    check_move,
)
from agent.journal.records import (
    AgentStarted,
    AlertQuarantined,
    ApprovalGiven,
    BreakerRecorded,
    Diagnosed,
    FoldPolicy,
    IncidentMoved,
    Noted,
    PauseSet,
    PlanDeclined,
    Record,
    Stored,
)
from rules.model import Diagnosis, Hypothesis


class Fold:
    """A state that is fed record by record."""

    def __init__(self, *records: Record) -> None:
        self.state = State()
        self.changes: list[Changes] = []
        self.feed(*records)

    def feed(self, *records: Record) -> Changes:
        for record in records:
            self.changes.append(apply(self.state, Stored(self.state.seq + 1, record)))
        return self.changes[-1] if self.changes else Changes()

    @property
    def only(self) -> Incident:
        [incident] = self.state.incidents.values()
        return incident

    def walk(self, *states: str, at: float = 110.0) -> None:
        """Move the only incident along these states."""
        for after in states:
            self.feed(moved(self.only.id, self.only.state, after, at))


def start(**policy: object) -> AgentStarted:
    return AgentStarted(
        at=1.0,
        version="1",
        pid=1,
        sandbox="rlimits",
        autonomy="suggest",
        policy=FoldPolicy(**policy),  # type: ignore[arg-type]
    )


# -- tables


def test_table_is_closed_and_live() -> None:
    """Every state is in the table; every state can be reached; from every state an end can be reached."""
    assert set(INCIDENT_MOVES) == set(IncidentState)
    assert frozenset().union(*INCIDENT_MOVES.values()) == set(IncidentState)
    for begin in IncidentState:
        seen, frontier = {begin}, [begin]
        while frontier:
            for after in INCIDENT_MOVES[frontier.pop()] - seen:
                seen.add(after)
                frontier.append(after)
        assert seen & FINAL
        assert IncidentState.OPEN in seen or begin in FINAL
    assert all(INCIDENT_MOVES[s] == {IncidentState.OPEN} for s in FINAL)


def test_a_claim_of_recovery_leads_to_verifying_from_anywhere_not_final() -> None:
    for state in set(IncidentState) - FINAL - {IncidentState.VERIFYING}:
        assert IncidentState.VERIFYING in INCIDENT_MOVES[state]


@pytest.mark.parametrize(("before", "after"), list(product(IncidentState, IncidentState)))
def test_only_moves_of_the_table(before: IncidentState, after: IncidentState) -> None:
    fold = Fold(received(alert()))
    fold.only.state = before
    record = moved(fold.only.id, before, after)
    legal = after in INCIDENT_MOVES[before]
    if legal:
        check_move(before, after)
    else:
        with pytest.raises(IllegalMove):
            check_move(before, after)
    if legal and before not in FINAL:
        check(fold.state, record)
        fold.feed(record)
        assert fold.only.state is after
    else:  # reopening is the fold's own
        with pytest.raises(IllegalMove):
            check(fold.state, record)
        with pytest.raises(IllegalMove):
            fold.feed(record)


@pytest.mark.parametrize(
    "record",
    [
        moved("inc-x", "open", "investigating"),
        Diagnosed(at=1.0, incident="inc-x", diagnosis=Diagnosis(verdict="ranked")),
        plan("inc-x"),
        step("inc-x", "planned", "intent"),
        PlanDeclined(at=1.0, incident="inc-x", refusal=Refusal.STORM),
        Noted(at=1.0, incident="inc-x", text="?"),
    ],
)
def test_unknown_incidents_are_refused_before_they_are_written(record: Record) -> None:
    with pytest.raises(UnknownIncident, match="inc-x is not known"):
        check(State(), record)


@pytest.mark.parametrize(("before", "after"), [("verifying", "resolved"), ("open", "nonsense"), ("nonsense", "open")])
def test_a_move_from_another_state_is_refused(before: str, after: str) -> None:
    fold = Fold(received(alert()))
    with pytest.raises(IllegalMove):
        check(fold.state, moved(fold.only.id, before, after))


def test_gaps_are_refused() -> None:
    with pytest.raises(ValueError, match="record 2 after 0"):
        apply(State(), Stored(2, note(1)))


# -- merging


def test_one_group_is_one_incident() -> None:
    fold = Fold()
    changes = fold.feed(received(alert("f1"), alert("f2", service="orders"), at=100.0))
    assert changes.opened == changes.incidents == (fold.only.id,)
    changes = fold.feed(received(alert("f3", service="worker"), at=399.0))
    assert changes == Changes((fold.only.id,))
    assert fold.only.services == ["front", "orders", "worker"]
    assert fold.only.entry == "front"
    assert len(fold.only.firing) == 3
    assert fold.only.id.startswith("inc-")
    assert len(fold.only.id) == 16


def test_ids_are_deterministic_and_differ() -> None:
    first, second = Fold(received(alert())), Fold(received(alert()))
    assert first.only.id == second.only.id
    later = Fold(note(1), received(alert()))
    assert later.only.id != first.only.id
    assert Fold(received(alert(tenant="b"), tenant="b")).only.id != first.only.id


@pytest.mark.parametrize(
    ("second", "merged"),
    [
        (received(alert("f2", name="Other", service="db"), at=400.0), True),  # same group, just in the window
        (received(alert("f2", name="Other", service="db"), at=400.1), False),
        (received(alert("f2"), at=150.0, group="h"), True),  # same alert on the same service
        (received(alert("f2", name="Other"), at=150.0, group="h"), True),  # same service
        (received(alert("f2", name="Other", service="orders"), at=150.0, group="h"), True),  # neighbour
        (received(alert("f2", name="Other", service="front2"), at=150.0, group="h"), False),
        (received(alert("f2", name="HighLatency", service=""), at=150.0, group="h"), False),  # no service: no kin
        (received(alert("f2"), at=500.0, group="h"), False),
        (received(alert("f1", starts_at=900.0), at=9_000.0, group="h"), True),  # its own live incident, however late
        (received(alert("f2", tenant="b"), at=150.0, tenant="b"), False),
        (received(alert("f1", tenant="b"), at=150.0, tenant="b"), False),
    ],
)
def test_what_joins(second: Record, merged: bool) -> None:
    fold = Fold(start(neighbours=(("front", "orders"),)), received(alert("f1"), at=100.0), second)
    assert len(fold.state.incidents) == (1 if merged else 2)


def test_the_window_counts_from_the_last_alert() -> None:
    fold = Fold(*(received(alert(f"f{n}"), at=100.0 + 299.0 * n) for n in range(10)))
    assert len(fold.only.alerts) == 10


def test_without_group_key_alerts_are_kin_by_name_and_service_only() -> None:
    fold = Fold(received(alert("f1"), alert("f2", name="B", service="db"), alert("f3"), group=""))
    assert sorted(len(i.alerts) for i in fold.state.incidents.values()) == [1, 2]


def test_a_final_incident_takes_nothing_new_outside_the_reopen_window() -> None:
    fold = Fold(received(alert("f1")))
    fold.walk("verifying", "resolved", at=200.0)
    fold.feed(received(alert("f2"), at=1_100.1))
    assert len(fold.state.incidents) == 2


@pytest.mark.parametrize("end", ["resolved", "escalated"])
@pytest.mark.parametrize("again", [alert("f1", starts_at=900.0), alert("f9")])
def test_reopening(end: str, again: object) -> None:
    fold = Fold(received(alert("f1")))
    fold.walk("investigating", "diagnosed")
    fold.feed(plan(fold.only.id))
    fold.walk("acting", "verifying", end, at=200.0)
    assert fold.state.active() == []
    changes = fold.feed(received(again, at=1_100.0))  # type: ignore[arg-type]
    assert changes.reopened == (fold.only.id,)
    assert fold.only.state is IncidentState.OPEN
    assert (fold.only.reopened, fold.only.rounds, fold.only.closed_at, fold.only.plan) == (1, 0, None, None)
    assert [p.plan for p in fold.only.past] == ["p1"]
    assert fold.state.waiting("default") == [fold.only]


def test_flapping_is_recorded_each_time() -> None:
    """firing(t0), resolved(t0), firing(t0) again: three different current states, one incident."""
    fold = Fold()
    digests = []
    for status, at in (("firing", 100.0), ("resolved", 110.0), ("firing", 120.0)):
        flap = alert("f1", status)  # type: ignore[arg-type]
        assert fold.state.current_digest("default", "f1") != flap.digest
        fold.feed(received(flap, at=at))
        assert fold.state.current_digest("default", "f1") == flap.digest
        digests.append(flap.digest)
    assert digests[0] == digests[2] != digests[1]
    assert len([line for line in fold.only.story if line.kind == "alerts_received"]) == 3
    assert len(fold.only.firing) == 1


def test_resolved_is_matched_by_fingerprint_alone_and_moves_nothing() -> None:
    fold = Fold(received(alert("f1"), alert("f2", service="db")))
    fold.feed(received(alert("f1", "resolved", starts_at=555.0), at=9_999.0, group="another"))
    assert fold.only.state is IncidentState.OPEN
    assert [a.fingerprint for a in fold.only.firing] == ["f2"]
    fold.walk("verifying", "resolved", at=10_000.0)
    changes = fold.feed(received(alert("f2", "resolved"), at=10_001.0))
    assert changes.reopened == ()
    assert fold.only.state is IncidentState.RESOLVED


def test_resolved_without_incident_opens_nothing() -> None:
    fold = Fold(received(alert("f1", "resolved")))
    assert fold.state.incidents == {}
    assert fold.state.current_digest("default", "f1") == alert("f1", "resolved").digest
    assert "no incident here knows it" in fold.state.log[-1].text


def test_an_alert_that_overtakes_the_closing_reopens() -> None:
    """It became durable after the decision to resolve and before its record: it must not lie in a closed incident."""
    fold = Fold(received(alert("f1")))
    fold.walk("verifying")
    seen = fold.state.seq
    fold.feed(received(alert("f2"), at=120.0))
    changes = fold.feed(moved(fold.only.id, "verifying", "resolved", 119.0, seen=seen))
    assert changes.reopened == (fold.only.id,)
    assert fold.only.state is IncidentState.OPEN
    fold.walk("verifying")
    fold.feed(moved(fold.only.id, "verifying", "resolved", 130.0, seen=fold.state.seq))
    assert fold.only.state is IncidentState.RESOLVED


# -- diagnosis, plans, approvals, steps


def test_news_after_the_diagnosis() -> None:
    fold = Fold(received(alert("f1")))
    fold.walk("investigating")
    best = Hypothesis(
        cause="process.crashed", service="worker", fault="crash", title="Crash", posterior=0.9, confidence=0.9
    )
    diagnosis = Diagnosis(verdict="ranked", hypotheses=(best,), missing={"host.cpu": "timeout"})
    fold.feed(Diagnosed(at=105.0, incident=fold.only.id, diagnosis=diagnosis))
    assert not fold.only.has_news
    fold.feed(received(alert("f1", "resolved"), at=106.0))
    assert not fold.only.has_news
    fold.feed(received(alert("f2"), at=107.0))
    assert fold.only.has_news
    assert "without host.cpu" in fold.only.story[2].text
    assert fold.only.rounds == 1


def waiting(expires_at: float = 1_000.0) -> Fold:
    fold = Fold(received(alert()))
    fold.walk("investigating", "diagnosed")
    fold.feed(plan(fold.only.id, autonomy="approve", expires_at=expires_at))
    fold.walk("awaiting_approval")
    return fold


def decision(fold: Fold, decision: str = "approve", at: float = 200.0, **changed: str) -> ApprovalGiven:
    values = {"plan": "p1", "digest": fold.only.plan_digest} | changed
    return ApprovalGiven(
        at=at,
        incident=fold.only.id,
        decision=decision,
        who="me",
        origin="cli uid=0",
        **values,  # type: ignore[arg-type]
    )


def test_an_approval_counts_once() -> None:
    fold = waiting()
    fold.feed(decision(fold))
    assert fold.only.plan_state == "approved"
    fold.feed(decision(fold, "reject", at=201.0))
    assert fold.only.plan_state == "approved"
    assert [a.counted for a in fold.only.approvals] == [True, False]
    assert "this changed nothing: the plan is approved, not waiting" in fold.only.story[-1].text


@pytest.mark.parametrize(
    ("changed", "at", "why"),
    [
        ({"digest": "0" * 32}, 200.0, "digest differs"),
        ({"plan": "p0"}, 200.0, "not the incident's plan"),
        ({}, 1_000.0, "had expired"),
    ],
)
def test_an_approval_of_something_else_changes_nothing(changed: dict[str, str], at: float, why: str) -> None:
    fold = waiting()
    fold.feed(decision(fold, at=at, **changed))
    assert fold.only.plan_state == "waiting"
    assert not fold.only.approvals[0].counted
    assert why in fold.only.approvals[0].why


@pytest.mark.parametrize("to", ["verifying", "investigating", "declined"])
def test_an_approval_that_was_overtaken_starts_nothing(to: str) -> None:
    """Alertmanager said "resolved", or new alerts came: neither a late nor an earlier approval lets a step begin."""
    for early in (False, True):
        fold = waiting()
        if early:
            fold.feed(decision(fold))
        fold.walk(to)
        fold.feed(decision(fold, at=210.0))
        assert fold.only.plan_state == "withdrawn"
        with pytest.raises(IllegalMove, match="intent, but the plan is withdrawn"):
            check(fold.state, step(fold.only.id, "planned", "intent"))


@pytest.mark.parametrize("autonomy", ["observe", "suggest", "approve"])
def test_no_intent_without_leave(autonomy: str) -> None:
    fold = Fold(received(alert()))
    fold.walk("investigating", "diagnosed")
    fold.feed(plan(fold.only.id, autonomy=autonomy))
    for record in (decision(fold, "reject"), note(1)):
        with pytest.raises(IllegalMove):
            check(fold.state, step(fold.only.id, "planned", "intent"))
        fold.feed(record)
    with pytest.raises(IllegalMove):
        check(fold.state, step(fold.only.id, "planned", "intent"))


@pytest.mark.parametrize(("before", "after"), list(product(StepState, StepState)))
def test_step_moves_follow_their_table(before: StepState, after: StepState) -> None:
    fold = Fold(received(alert()), note(1))
    fold.feed(plan(fold.only.id))
    fold.only.steps[0] = msgspec.structs.replace(fold.only.steps[0], state=before)
    record = step(fold.only.id, before, after)
    if after in STEP_MOVES[before]:
        check(fold.state, record)
        fold.feed(record)
        assert fold.only.steps[0].state is after
    else:
        with pytest.raises(IllegalMove):
            check(fold.state, record)


def test_a_step_of_another_plan_or_place_is_refused() -> None:
    fold = Fold(received(alert()))
    fold.feed(plan(fold.only.id))
    for bad in (step(fold.only.id, "planned", "intent", plan="p0"), step(fold.only.id, "planned", "intent", n=1)):
        with pytest.raises(IllegalMove):
            check(fold.state, bad)


def test_the_life_of_a_plan() -> None:
    fold = Fold(received(alert()))
    fold.walk("investigating", "diagnosed")
    fold.feed(plan(fold.only.id, steps=2))
    fold.walk("acting")
    id = fold.only.id
    fold.feed(step(id, "planned", "intent", at=120.0))
    assert fold.only.plan_state == "running"
    assert [(u.incident.id, u.index) for u in fold.state.unsettled_steps()] == [(id, 0)]
    assert fold.state.plans_under_way() == {id: fold.only.plan}
    with pytest.raises(IllegalMove, match="under way"):
        check(fold.state, plan(id, "p2"))
    with pytest.raises(IllegalMove, match="under way"):
        check(fold.state, moved(id, "acting", "escalated"))
    fold.feed(step(id, "intent", "ran"))
    assert fold.state.unsettled_steps() == []
    assert fold.state.plans_under_way() == {id: fold.only.plan}
    fold.feed(step(id, "ran", "verified"))
    assert fold.only.plan_state == "running"
    fold.feed(
        *(step(id, a, b, n=1, at=130.0) for a, b in (("planned", "intent"), ("intent", "ran"), ("ran", "verified")))
    )
    assert fold.only.plan_state == "done"
    assert fold.state.plans_under_way() == {}
    starts = fold.state.action_starts("service.restart.supervisord")
    assert [(a.at, a.target) for a in starts] == [(120.0, "service=worker-0"), (130.0, "service=worker-1")]
    assert fold.state.action_starts(target="service=worker-1", since=130.0) == starts[1:]
    assert fold.state.action_starts(since=130.1) == []
    assert [m.after for m in fold.only.steps[0].moves] == ["intent", "ran", "verified"]


def test_a_failed_plan() -> None:
    fold = Fold(received(alert()))
    fold.feed(plan(fold.only.id))
    for a, b in (("planned", "intent"), ("intent", "unknown"), ("unknown", "handed_over")):
        fold.feed(step(fold.only.id, a, b))
    assert fold.only.plan_state == "failed"
    assert StepState.HANDED_OVER in STEP_FINAL


# -- the rest of the state


def test_breakers_pause_quarantine_and_log() -> None:
    opened = BreakerMoved(key="a|t", before=BreakerState.CLOSED, after=BreakerState.OPEN, at=5.0, opened_count=1)
    fold = Fold(
        start(),
        BreakerRecorded(move=opened),
        PauseSet(at=6.0, paused=True, who="me"),
        AlertQuarantined(at=7.0, tenant="t", digest="d", path="alerts[1]", reason="no labels", index=1),
    )
    assert fold.state.breakers == {"a|t": opened}
    assert fold.state.is_paused
    assert fold.state.quarantined_count == 1
    assert [line.kind for line in fold.state.log] == [
        "agent_started",
        "breaker_recorded",
        "pause_set",
        "alert_quarantined",
    ]
    fold.feed(PauseSet(at=8.0, paused=False, who="me"))
    assert not fold.state.is_paused


def test_quiet_windows() -> None:
    fold = Fold(received(alert("f1", starts_at=90.0), at=100.0))
    id = fold.only.id
    fold.walk("verifying", "resolved", at=200.0)
    assert fold.state.quiet_windows("front", 0.0, 1_000.0) == ((90.0, 200.0),)
    assert fold.state.quiet_windows("front", 150.0, 180.0) == ((150.0, 180.0),)
    assert fold.state.quiet_windows("front", 0.0, 1_000.0, without=id) == ()
    assert fold.state.quiet_windows("orders", 0.0, 1_000.0) == ()
    assert fold.state.quiet_windows("front", 200.0, 1_000.0) == ()


def test_an_escalated_incident_is_no_baseline_until_its_alert_ends() -> None:
    fold = Fold(received(alert("f1", starts_at=90.0), at=100.0))
    fold.walk("escalated", at=101.0)
    assert fold.state.quiet_windows("front", 0.0, 1_000.0) == ((90.0, 1_000.0),)
    fold.feed(received(alert("f1", "resolved", starts_at=340.0), at=401.0))
    assert fold.state.quiet_windows("front", 0.0, 1_000.0) == ((100.0, 400.0),)


def test_closed_incidents_are_forgotten_by_count_and_age() -> None:
    fold = Fold(start(closed=5, merge_seconds=0.0, reopen_seconds=0.0))
    for n in range(9):
        changes = fold.feed(received(alert(f"f{n}", service=f"s{n}"), at=float(n), group=f"g{n}"))
        [id] = changes.opened
        fold.feed(moved(id, "open", "verifying", float(n)), moved(id, "verifying", "resolved", float(n)))
    assert [i.key for i in fold.state.incidents.values()] == [f"g{n}" for n in range(4, 9)]
    assert {value for _, _, value in fold.state.index if value.startswith("g")} == {f"g{n}" for n in range(4, 9)}
    late = 31 * 86400.0
    fold.feed(*(Noted(at=late, incident="", text="") for _ in range(256)))
    assert fold.state.incidents == {}
    assert fold.state.index == {}


def test_alert_states_are_forgotten_by_count_and_age() -> None:
    fold = Fold(start(digests=50))
    for n in range(300):
        fold.feed(received(alert(f"f{n}", "resolved"), at=float(n)))
    assert len(fold.state.digests) <= 50 + 256
    assert ("default", "f299") in fold.state.digests
    keep = Fold(
        start(), received(alert("firing"), alert("resolved")), received(alert("resolved", "resolved"), at=101.0)
    )
    keep.feed(*(Noted(at=8 * 86400.0, incident="", text="") for _ in range(256)))
    assert list(keep.state.digests) == [("default", "firing")]


def test_an_incident_is_bounded() -> None:
    fold = Fold()
    for n in range(12):
        fold.feed(received(*(alert(f"f{n}-{m}", name=f"A{m}") for m in range(100)), at=100.0 + n))
    assert len(fold.only.alerts) == 1_000
    assert fold.only.alerts_dropped == 200
    assert len(fold.only.symptoms) == 100
    fold.feed(*(Noted(at=120.0, incident=fold.only.id, text=str(n)) for n in range(500)))
    assert len(fold.only.story) == 300
    assert fold.only.story[0].text.endswith("it opens the incident")
    assert fold.only.story[-1].text == "499"
    fold.walk("verifying", "resolved")
    assert len(fold.only.alerts) == 50
    assert len(fold.only.story) == 120


def test_hostile_text_stays_one_plain_line() -> None:
    evil = "A\n\x1b[31mred\x1b[0m\u202egnp.exe" + "x" * 10_000
    fold = Fold(received(alert("f1", name=evil, service=evil)), note(1))
    fold.feed(Noted(at=1.0, incident=fold.only.id, text=evil))
    for line in fold.only.story:
        assert line.text.isprintable()
        assert len(line.text) < 1_000
    assert fold.only.alerts["f1"].labels["alertname"] == evil


# -- laws


def random_records(seed: int, count: int) -> list[Record]:
    """A stream that `check` accepts: alerts, moves along the tables, plans, approvals, steps, notes."""
    rng = random.Random(seed)
    state, records, at = State(), [start(merge_seconds=30.0, reopen_seconds=60.0, closed=4, digests=8)], 100.0
    apply(state, Stored(1, records[0]))
    while len(records) < count:
        at += rng.choice([0.5, 5.0, 40.0])
        record = _random_record(rng, state, at)
        try:
            check(state, record)
        except (IllegalMove, UnknownIncident):
            continue
        apply(state, Stored(state.seq + 1, record))
        records.append(record)
    return records


def _random_record(rng: random.Random, state: State, at: float) -> Record:
    ids = list(state.incidents)
    choice = rng.randrange(10)
    if choice < 3 or not ids:
        alerts = [
            alert(f"f{rng.randrange(12)}", rng.choice(["firing", "firing", "resolved"]), service=f"s{rng.randrange(4)}")
            for _ in range(rng.randrange(1, 4))
        ]
        return received(*alerts, at=at, group=rng.choice(["", "g1", "g2", "g3"]))
    incident = state.incidents[rng.choice(ids)]
    if choice < 7:
        after = rng.choice(sorted(INCIDENT_MOVES[incident.state]))
        return IncidentMoved(
            at=at, incident=incident.id, before=incident.state, after=after, seen=rng.choice([0, state.seq - 1])
        )
    if choice == 7:
        return plan(incident.id, f"p{rng.randrange(100)}", rng.choice(["auto", "approve", "suggest"]), 2, at + 100.0)
    if choice == 8 and incident.plan is not None:
        n = rng.randrange(2)
        now = incident.steps[n].state
        after = rng.choice(sorted(STEP_MOVES[now]) or [now])
        return step(incident.id, now, after, at, incident.plan.id, n)
    if choice == 9 and incident.plan is not None:
        return ApprovalGiven(
            at=at,
            incident=incident.id,
            plan=incident.plan.id,
            digest=incident.plan_digest,
            decision=rng.choice(["approve", "reject"]),
            who="me",
            origin="cli",
        )
    return Noted(at=at, incident=incident.id, text="hm")


def replay(records: Sequence[Record], state: State | None = None) -> State:
    state = state if state is not None else State()
    for record in records:
        apply(state, Stored(state.seq + 1, record))
    return state


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1 << 30), count=st.integers(1, 600), data=st.data())
def test_a_snapshot_and_what_follows_is_the_whole(seed: int, count: int, data: st.DataObject) -> None:
    """Anywhere the stream is cut: state = fold(rest, from snapshot of fold(beginning)); the fold is deterministic."""
    records = random_records(seed, count)
    whole = replay(records).to_snapshot()
    assert replay(records).to_snapshot() == whole
    cut = data.draw(st.integers(0, len(records)))
    snapshot = replay(records[:cut]).to_snapshot()
    assert State.from_snapshot(snapshot).to_snapshot() == snapshot
    assert replay(records[cut:], State.from_snapshot(snapshot)).to_snapshot() == whole


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1 << 30))
def test_a_frozen_state_stays_as_it_was(seed: int) -> None:
    records = random_records(seed, 200)
    state = replay(records[:100])
    before = state.to_snapshot()
    frozen = state.freeze()
    replay(records[100:], state)
    assert frozen.encode() == before
    state.thaw()
    assert state.to_snapshot() == replay(records).to_snapshot()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1 << 30))
def test_invariants_of_any_stream(seed: int) -> None:
    state = State()
    for record in random_records(seed, 300):
        apply(state, Stored(state.seq + 1, record))
        assert set(state.live) | set(state.closed) == set(state.incidents)
        assert not set(state.live) & set(state.closed)
        assert all(state.incidents[id].final for id in state.closed)
        assert not any(state.incidents[id].final for id in state.live)
        assert set(state.index.values()) <= set(state.incidents)
        assert len(state.closed) <= state.policy.closed


def test_a_snapshot_of_another_version_is_refused() -> None:
    body = State().to_snapshot()
    with pytest.raises(StateError, match="version 2"):
        State.from_snapshot(body.replace(b'"version":1', b'"version":2'))
    with pytest.raises(StateError, match="another version"):
        State.from_snapshot(b'{"version":1}')
