"""Seeded schedules of random plans on the real runner and the real journal, in a simulated world of effects.

The process may die before, while and after each record becomes durable (a tail that was never acknowledged may be
torn), and anywhere around an effect; results are random; the clock steps in both directions, also between two records
of one life. After each death the journal is opened from its files again and the plan recovered from the folded state.
The laws: no step that is not idempotent is executed twice, nothing leads from denied, expired or cancelled to an
effect, and after the last restart every step and the incident are in a final state.
"""

from __future__ import annotations

import asyncio
import random
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from effect_world import Clock, Crash, World, assert_lawful_end, law, random_steps
from flow_world import NOW

from actions.model import STEP_FINAL, BreakerMoved, Plan, StepMoved, StepState
from actions.runner import PlanOutcome, Runner
from agent.fold_model import FINAL, Incident
from agent.journal.records import (
    AgentStarted,
    AlertsReceived,
    BreakerRecorded,
    FoldPolicy,
    IncidentMoved,
    PlanMade,
    Record,
    StepRecorded,
)
from agent.store import Store
from rules.model import Alert

SEEDED, FULL = 300, 10_000
CLOSED = (StepState.DENIED, StepState.EXPIRED, StepState.CANCELLED)
INCIDENT = "Broken"


@dataclass
class Tally:
    schedules: int = 0
    crashes: int = 0
    torn: int = 0
    effects: int = 0
    records: int = 0


class Journal:
    """The runner's ledger over a real store that is opened anew after each death."""

    def __init__(self, directory: Path, dice: random.Random, tally: Tally) -> None:
        self.directory, self.dice, self.tally = directory, dice, tally
        self.store: Store | None = None
        self.world: World | None = None
        self.id = ""

    def open(self) -> Store:
        self.store = Store.open(self.directory)
        return self.store

    @property
    def incident(self) -> Incident:
        assert self.store is not None
        found = self.store.state.incident(self.id)
        assert found is not None
        return found

    @property
    def states(self) -> Mapping[int, StepState]:
        return {i: step.state for i, step in enumerate(self.incident.steps)}

    def die(self, torn_from: tuple[Path, int] | None = None) -> None:
        """As kill -9 leaves it. `torn_from`: what was written after that was not acknowledged to anybody, so that any
        part of it may be missing."""
        assert self.store is not None
        self.store._wal.abandon()
        self.store = None
        self.tally.crashes += 1
        if torn_from is not None:
            path, size = torn_from
            end = path.stat().st_size
            with path.open("r+b") as file:
                file.truncate(self.dice.randint(size, end))
            self.tally.torn += 1
        raise Crash

    async def record(self, record: Record) -> None:
        world = self.world
        assert world is not None
        assert self.store is not None
        world.clock.now += self.dice.choice([0.0, 0.0, 0.1, 2.0, 5000.0, -5.0, -4000.0])
        how = self.dice.randrange(15) if world.crashes_left else -1
        if how in (0, 1, 2):
            world.crashes_left -= 1
        if how == 0:
            self.die()
        path = max((self.directory / "journal").glob("*.wal"))
        size = path.stat().st_size
        await self.store.record(record)
        self.tally.records += 1
        if how == 1:
            self.die((path, size))
        if how == 2:
            self.die()

    async def record_step(self, move: StepMoved) -> None:
        world = self.world
        assert world is not None
        if move.after is StepState.INTENT:
            law(not world.cancelled.is_set(), "a step began after the alert had resolved")
            law(not set(CLOSED) & set(self.states.values()), "a step began although the plan was closed")
        await self.record(StepRecorded(move=move))

    async def record_breaker(self, move: BreakerMoved) -> None:
        await self.record(BreakerRecorded(move=move))


async def begin(journal: Journal, dice: random.Random) -> Plan:
    """An incident whose plan may begin."""
    store = journal.open()
    await store.record(
        AgentStarted(at=NOW, version="t", pid=1, sandbox="rlimits", autonomy="auto", policy=FoldPolicy())
    )
    alert = Alert(
        tenant="default",
        fingerprint=INCIDENT,
        status="firing",
        labels={"alertname": INCIDENT, "service": "worker"},
        starts_at=NOW,
        digest="d",
    )
    await store.record(AlertsReceived(at=NOW, tenant="default", receiver="r", group_key="g", alerts=(alert,)))
    current = store.state.current("default", INCIDENT)
    assert current is not None
    journal.id = current.incident
    for before, after in (("open", "investigating"), ("investigating", "diagnosed")):
        await store.record(IncidentMoved(at=NOW, incident=journal.id, before=before, after=after))
    plan = Plan(
        id="plan-test",
        incident=journal.id,
        service="worker",
        cause="c",
        steps=random_steps(dice.choice),
        autonomy="auto",
        verify=dice.choice(["each", "last"]),
        verify_seconds=5.0,
        made_at=NOW,
        expires_at=NOW + 600,
    )
    moved = IncidentMoved(at=NOW, incident=journal.id, before="diagnosed", after="acting")
    await store.record(PlanMade(at=NOW, plan=plan), moved)
    return plan


async def live_through(journal: Journal, world: World) -> PlanOutcome:
    """One life after the other, as the service does, until the plan has ended."""
    for _ in range(20):
        store = journal.store or journal.open()
        moves = [move for step in journal.incident.steps for move in step.moves]
        runner = Runner(journal, world, world, world.clock, world.settings(), store.state.breakers.values())
        try:
            if moves:
                return await runner.recover(world.plan, moves, world.cancelled)
            return await runner.run(world.plan, world.cancelled)
        except Crash:
            if journal.store is not None:  # it died around an effect
                journal.store._wal.abandon()
                journal.store = None
                journal.tally.crashes += 1
            world.clock.now += world.choose([0.0, 1.0, 1000.0, -50.0])
            if world.roll(False, False, True):
                world.cancelled.set()
    raise AssertionError("the plan does not end")


async def keep_the_laws(seed: int, directory: Path, tally: Tally) -> None:
    dice = random.Random(seed)
    journal = Journal(directory, dice, tally)
    plan = await begin(journal, dice)
    world = World(plan, dice.choice, journal, Clock(NOW), has_leaves=dice.random() < 0.75)
    world.crashes_left = dice.randint(0, 4)
    journal.world = world
    outcome = await live_through(journal, world)
    store = journal.store
    assert store is not None
    try:
        assert outcome.result != "interrupted", outcome
        assert all(state in STEP_FINAL for state in outcome.states), outcome
        assert tuple(journal.states.values()) == outcome.states
        for step in journal.incident.steps:
            path = [move.after for move in step.moves]
            assert not set(CLOSED) & set(path[:-1])
        assert_lawful_end(world, outcome.states)
        incident = journal.incident
        assert not incident.unsettled
        way = ("verifying", "resolved") if outcome.result == "verified" else ("escalated",)
        if not any(step.intents for step in incident.steps):
            way = ("declined", "escalated")
        for after in way:
            before = journal.incident.state
            await store.record(IncidentMoved(at=world.clock.now, incident=journal.id, before=before, after=after))
        assert journal.incident.state in FINAL
        tally.effects += sum(world.executions.values())
    finally:
        await store.close()


def run_schedules(seeds: range, directory: Path) -> Tally:
    tally = Tally()
    for seed in seeds:
        place = directory / str(seed)
        try:
            asyncio.run(keep_the_laws(seed, place, tally))
        except BaseException as error:
            raise AssertionError(f"schedule {seed}: {type(error).__name__}: {error}") from error
        shutil.rmtree(place)
        tally.schedules += 1
    return tally


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """In memory where there is such a place: what a disk would add is waiting."""
    memory = Path("/dev/shm")
    place = memory / f"alertmedic-schedules-{tmp_path.name}" if memory.is_dir() else tmp_path
    place.mkdir(exist_ok=True)
    yield place
    shutil.rmtree(place, ignore_errors=True)


def told(tally: Tally) -> str:
    return (
        f"\nschedules: {tally.schedules} on the real journal, {tally.crashes} crashes ({tally.torn} with a torn tail), "
        f"{tally.records} records, {tally.effects} effects: none repeated, none without an end"
    )


def test_seeded_schedules_keep_the_laws(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tally = run_schedules(range(SEEDED), directory)
    assert tally.crashes > SEEDED // 2
    assert tally.effects > SEEDED // 5  # the world is still one in which something happens
    assert tally.torn
    with capsys.disabled():
        print(told(tally))


@pytest.mark.full
def test_ten_thousand_schedules_keep_the_laws(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tally = run_schedules(range(SEEDED, SEEDED + FULL), directory)
    assert tally.schedules == FULL
    assert tally.effects > FULL // 5
    with capsys.disabled():
        print(told(tally))
