"""An incident is neither lost, nor closed over a firing alert, nor worked on for ever, whatever comes in between."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from flow_world import JUSTIFIED, NOW, World, open_world

from actions.model import Declined, Refusal, StepMoved, StepState
from agent.fold_model import IncidentState
from agent.investigate import Investigation, Ranked
from agent.journal.records import Diagnosed, IncidentMoved, StepRecorded
from agent.journal.wal import JournalUnavailable
from agent.packs import load_packs
from rules.model import Diagnosis, Hypothesis, Situation
from rules.packs import PackSet
from rules.verify import Verdict

_I = IncidentState


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    made = await open_world(tmp_path)
    yield made
    await made.store.close()


async def acted(world: World, id: str) -> None:
    """One run of the incident's plan, to its end."""
    await world.investigation.advance(id)
    await asyncio.wait_for(asyncio.gather(*world.investigation.acting.values()), 5)


async def diagnosed(world: World, id: str, justification: object = JUSTIFIED) -> None:
    diagnosis = Diagnosis(verdict="insufficient_evidence")
    await world.store.record(
        Diagnosed(at=world.now, incident=id, diagnosis=diagnosis, evidence_at=world.now, justification=justification)  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("blind", [True, False])
async def test_an_alert_that_fires_during_the_look_is_not_closed_over(
    world: World, blind: bool, caplog: pytest.LogCaptureFixture
) -> None:
    id = await world.alert()
    if not blind:
        await diagnosed(world, id)
    await world.alert("resolved")
    await world.moved(id, "verifying")

    async def fires() -> None:
        await world.alert("firing")
        world.situations.during = world.verifier.during = nothing

    async def nothing() -> None:
        pass

    world.situations.during = world.verifier.during = fires
    incident = world.incident(id)
    with caplog.at_level("INFO"):
        await world.investigation._verifying(incident)
    assert world.incident(id).state is _I.OPEN
    assert world.incident(id).reopened == 1
    (told,) = caplog.records
    assert told.getMessage().endswith("; it fires again")
    assert told.__dict__["state"] == "open"


@pytest.mark.parametrize("justification", [None, JUSTIFIED])
async def test_what_fires_again_is_investigated_again(world: World, justification: object) -> None:
    id = await world.alert()
    await diagnosed(world, id, justification)
    await world.alert("resolved")
    await world.moved(id, "verifying")
    await world.alert("firing")
    await world.investigation._verifying(world.incident(id))
    assert world.incident(id).state is _I.INVESTIGATING


async def test_a_diagnosis_goes_first(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before what else would compete with it: entered around the ranking alone, and left before its outcome is told."""
    seen: list[str] = []
    ranked = Investigation._rank

    @contextmanager
    def first() -> Iterator[None]:
        seen.append("first")
        yield
        seen.append("over")

    def rank(self: Investigation, situation: Situation, packs: PackSet) -> Ranked:
        seen.append("ranked")
        return ranked(self, situation, packs)

    world.investigation.first = first
    monkeypatch.setattr(Investigation, "_rank", rank)
    world.investigation.shadow = lambda *_: seen.append("told")
    await world.investigation.advance(await world.alert())
    assert seen[:4] == ["first", "ranked", "over", "told"]


async def test_a_claim_is_believed_where_diagnosis_had_no_series_either(world: World) -> None:
    id = await world.alert()
    await world.investigation.advance(id)  # nothing to be had: insufficient evidence, no series
    assert world.incident(id).state is _I.DIAGNOSED
    await world.alert("resolved", ends_at=NOW)
    await world.investigation.advance(id)
    assert world.incident(id).state is _I.RESOLVED
    assert "no series to look at" in world.incident(id).reason


async def test_a_claim_from_the_future_is_judged_by_what_there_is(world: World) -> None:
    id = await world.alert()
    await diagnosed(world, id)
    await world.alert("resolved", ends_at=NOW + 3600)
    await world.investigation.advance(id)
    assert world.incident(id).state is _I.RESOLVED
    assert world.verifier.since == [NOW]


async def test_a_failure_that_cannot_be_told_raises_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slot of the schedule that got an exception would be gone for good."""
    id = await world.alert()

    async def broken() -> None:
        raise RuntimeError("a bug")

    async def refuses(*records: object) -> None:
        if isinstance(records[0], IncidentMoved) and records[0].after == "escalated":
            raise LookupError("the state moved on")
        await record(*records)  # type: ignore[arg-type]

    record = world.store.record
    world.situations.during = broken
    monkeypatch.setattr(world.store, "record", refuses)
    assert await world.investigation.advance(id) == NOW + 5
    monkeypatch.undo()
    assert await world.investigation.advance(id) is None
    assert world.incident(id).state is _I.ESCALATED
    assert "RuntimeError: a bug" in world.incident(id).reason


async def test_acting_that_fails_without_a_journal_is_looked_at_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    id = await world.acting()
    world.remediation.outcome = RuntimeError("a bug")

    async def full(*records: object) -> None:
        raise JournalUnavailable("no space left")

    monkeypatch.setattr(world.store, "record", full)
    await acted(world, id)
    assert world.wakes == [(id, NOW + 5)]
    assert world.investigation.acting == {}
    monkeypatch.undo()
    await acted(world, id)
    assert world.incident(id).state is _I.ESCALATED


async def test_a_plan_without_an_end_goes_to_a_person(world: World) -> None:
    id = await world.acting()
    world.remediation.outcome = world.outcome(id, "interrupted", "planned")
    for _ in range(4):
        await acted(world, id)
        assert world.incident(id).state is _I.ACTING
        assert world.wakes[-1] == (id, NOW + 5)
    await acted(world, id)
    assert world.incident(id).state is _I.ESCALATED


async def test_a_plan_whose_step_may_run_is_kept_and_told_once(world: World) -> None:
    id = await world.acting()
    move = StepMoved(
        incident=id, plan=f"plan-{id}", step=0, before=StepState.PLANNED, after=StepState.INTENT, at=NOW, leaf="l"
    )
    await world.store.record(StepRecorded(move=move))
    world.remediation.outcome = world.outcome(id, "interrupted", "intent")
    for _ in range(8):
        await acted(world, id)
    assert world.incident(id).state is _I.ACTING
    assert sum("cannot go on" in line.text for line in world.incident(id).story) == 1
    world.remediation.outcome = RuntimeError("a bug")
    for _ in range(3):
        await acted(world, id)
    assert sum("a bug" in line.text for line in world.incident(id).story) == 1


async def test_nobody_looks_while_the_task_that_acted_closes_it(world: World) -> None:
    id = await world.acting()
    world.remediation.outcome = world.outcome(id, "verified", "verified")
    seen: list[float | None] = []

    def on_record(stored: object, changes: object) -> None:
        if world.incident(id).state is _I.VERIFYING:
            looks.append(asyncio.ensure_future(world.investigation.advance(id)))

    looks: list[asyncio.Future[float | None]] = []
    world.store.subscribe(on_record)
    world.verifier.verdict = Verdict(recovered=False, text="not yet")
    await acted(world, id)
    seen = await asyncio.gather(*looks)
    assert seen == [None]
    assert world.verifier.since == []
    assert world.incident(id).state is _I.RESOLVED


async def test_a_look_resolves_nothing(world: World) -> None:
    id = await world.acting(read_only=True)
    await world.verified(id)
    world.remediation.outcome = world.outcome(id, "verified", "verified")
    await acted(world, id)
    assert world.incident(id).state is _I.VERIFYING
    await world.investigation.advance(id)
    incident = world.incident(id)
    assert incident.state in (_I.INVESTIGATING, _I.DIAGNOSED)
    assert incident.plan is not None, "what it captured stays where people look"
    assert any("nothing was changed" in line.text for line in incident.story)
    assert 'healings_total{result="started"} 1.0' not in world.telemetry.render()[0].decode()


async def test_a_look_that_fails_does_not_stand_before_the_remedy(world: World) -> None:
    id = await world.acting(read_only=True)
    await world.went(id, StepState.INTENT, StepState.FAILED, StepState.HANDED_OVER)
    world.remediation.outcome = world.outcome(id, "handed_over", "handed_over")
    await acted(world, id)
    await world.investigation.advance(id)
    incident = world.incident(id)
    assert incident.state in (_I.INVESTIGATING, _I.DIAGNOSED)
    assert incident.carried_out == ("a",), "it is not looked at again"
    assert any("the look failed (handed_over)" in line.text for line in incident.story)


async def test_healing_is_counted_once_however_often_it_is_tried(world: World) -> None:
    id = await world.acting()
    world.remediation.outcome = world.outcome(id, "interrupted", "planned")
    await acted(world, id)
    world.remediation.outcome = world.outcome(id, "verified", "verified")
    await acted(world, id)
    other = await world.acting("Other") if world.incident(id).final else ""
    world.remediation.outcome = world.outcome(other, "cancelled", "cancelled")
    await acted(world, other)
    text = world.telemetry.render()[0].decode()
    assert 'alertmedic_healings_total{result="started"} 1.0' in text
    assert "alertmedic_healing_success_ratio 1.0" in text


async def test_evidence_that_is_always_too_old_ends_in_a_persons_hands(world: World) -> None:
    id = await world.alert()
    await world.moved(id, "investigating", "diagnosed")
    best = Hypothesis(cause="c", service="front", fault="f", title="c", posterior=1.0, confidence=1.0)
    world.remediation.plan = Declined(reason=Refusal.STALE_EVIDENCE, detail="old")
    for _ in range(20):
        diagnosis = Diagnosis(verdict="ranked", hypotheses=(best,))
        await world.store.record(Diagnosed(at=NOW, incident=id, diagnosis=diagnosis, evidence_at=NOW - 600))
        await world.investigation._diagnosed(world.incident(id))
        if world.incident(id).state is _I.DECLINED:
            break
        await world.moved(id, "diagnosed")
    assert world.incident(id).state is _I.DECLINED
    assert world.incident(id).rounds <= world.config.investigate.rounds + 2


# cause, posterior of it and of the next: whether a better explanation may still show
WITHOUT_REMEDY = {
    "stands clear": ("postgres.slow", 0.9, 0.05, False),
    "less likely than would be acted upon": ("postgres.slow", 0.55, 0.05, True),
    "the next is close": ("postgres.slow", 0.61, 0.45, True),
    "only says where": ("alert.one_part", 0.95, 0.01, True),
    "says what is seen, not why": ("service.fails_requests", 0.95, 0.01, True),
}


@pytest.mark.parametrize("case", WITHOUT_REMEDY)
async def test_a_cause_without_remedy_ends_the_looks_only_where_it_is_well_supported(world: World, case: str) -> None:
    cause, first, second, weak = WITHOUT_REMEDY[case]
    world.investigation.packs = load_packs()
    id = await world.alert()
    await world.moved(id, "investigating", "diagnosed")
    world.remediation.plan = Declined(reason=Refusal.NO_PROPOSAL, detail="no safe remedy is known")
    ranked = tuple(
        Hypothesis(cause=c, service="front", fault="f", title=c, posterior=p, confidence=p)
        for c, p in ((cause, first), ("other", second))
    )
    looks = 1
    while True:
        told = Diagnosis(verdict="ranked", hypotheses=ranked)
        await world.store.record(Diagnosed(at=world.now, incident=id, diagnosis=told, evidence_at=world.now))
        due = await world.investigation._diagnosed(world.incident(id))
        if world.incident(id).state is _I.DECLINED:
            break
        assert due == world.now + world.config.investigate.round_seconds  # not at once: it has to have time to show
        world.now = due
        await world.investigation._diagnosed(world.incident(id))
        assert world.incident(id).state is _I.INVESTIGATING
        await world.moved(id, "diagnosed")
        looks += 1
    assert looks == (world.config.investigate.rounds if weak else 1)
    assert world.incident(id).refusal is Refusal.NO_PROPOSAL


async def test_what_joins_while_it_is_being_healed_is_not_closed_with_it(world: World) -> None:
    id = await world.acting()
    await diagnosed(world, id)
    await world.alert(name="Another")
    world.remediation.outcome = world.outcome(id, "verified", "verified")
    plan = world.incident(id).plan
    assert plan is not None
    for before, after in itertools.pairwise([StepState.PLANNED, StepState.INTENT, StepState.RAN, StepState.VERIFIED]):
        move = StepMoved(incident=id, plan=plan.id, step=0, before=before, after=after, at=NOW)
        await world.store.record(StepRecorded(move=move))
    await acted(world, id)
    assert world.incident(id).state is _I.VERIFYING
    # Its own service shows nothing: Alertmanager has the time of a verification to say that it is over.
    await world.investigation.advance(id)
    assert world.incident(id).state is _I.VERIFYING
    world.now += world.config.verify.deadline_seconds
    await world.investigation._verifying(world.incident(id))
    assert world.incident(id).state is _I.INVESTIGATING
    assert "Another" in world.incident(id).reason


async def test_an_echo_that_is_over_does_not_keep_a_healed_incident_open(world: World) -> None:
    id = await world.acting()
    await diagnosed(world, id)
    await world.alert(name="Echo")
    world.remediation.outcome = world.outcome(id, "verified", "verified")
    for before, after in itertools.pairwise([StepState.PLANNED, StepState.INTENT, StepState.RAN, StepState.VERIFIED]):
        move = StepMoved(incident=id, plan=f"plan-{id}", step=0, before=before, after=after, at=NOW)
        await world.store.record(StepRecorded(move=move))
    await acted(world, id)
    await world.alert("resolved", name="Echo")
    await world.investigation.advance(id)
    assert world.incident(id).state is _I.RESOLVED


async def test_what_fires_while_evidence_is_gathered_is_news(world: World) -> None:
    id = await world.alert()

    async def fires() -> None:
        await world.alert(name="Another")

    world.situations.during = fires
    await world.moved(id, "investigating")
    await world.investigation._investigating(world.incident(id))
    assert world.incident(id).has_news
    assert [a.name for a in world.incident(id).news] == ["Another"]
