"""Random plans with random crashes, results and clock steps: the laws of the step machine.

A world with real consequences stands in for the sandbox: each step is either in effect or not, a run that was cut off
may still take effect until its leaf is killed, and a check tells the truth (or that it cannot tell). The process may
die at every write of the journal, before or after it is durable, and anywhere around an effect. After each death the
plan is recovered from what the journal holds, until it has ended.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest
from actions_world import Clock, Crash, MemoryLedger, plan, step
from effect_world import World, assert_lawful_end, law, random_steps
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from actions.model import STEP_FINAL, STEP_MOVES, BreakerMoved, StepMoved, StepState
from actions.runner import PlanOutcome, Runner, _Book

SCHEDULES = 400  # in every run; the full volume is 10,000
NO_EDGE_BACK = (StepState.DENIED, StepState.EXPIRED, StepState.CANCELLED)


@dataclass
class CrashingLedger(MemoryLedger):
    """Durable or not, the process may be gone afterwards."""

    world: World | None = None

    async def record_step(self, move: StepMoved) -> None:
        assert self.world is not None
        self.world.maybe_crash()
        if move.after is StepState.INTENT:
            law(not self.world.cancelled.is_set(), "a step began after the alert had resolved")
            law(not set(NO_EDGE_BACK) & set(self.states.values()), "a step began although the plan was closed")
        await super().record_step(move)
        self.world.maybe_crash()

    async def record_breaker(self, move: BreakerMoved) -> None:
        assert self.world is not None
        self.world.maybe_crash()
        await super().record_breaker(move)
        self.world.maybe_crash()


async def live_through(world: World, ledger: MemoryLedger) -> PlanOutcome:
    """Starts the plan and restarts after every crash, like the service does."""
    settings = world.settings()
    for life in range(20):
        runner = Runner(ledger, world, world, world.clock, settings, ledger.breakers)
        try:
            if life == 0:
                return await runner.run(world.plan, world.cancelled)
            return await runner.recover(world.plan, list(ledger.moves), world.cancelled)
        except Crash:
            world.clock.now += float(world.roll(0.0, 1.0, 1000.0, -50.0))  # type: ignore[arg-type]
            if world.roll(False, False, True):
                world.cancelled.set()
    raise AssertionError("the plan does not end")


def schedules(count: int) -> settings:
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=count, deadline=None, suppress_health_check=checks)


@schedules(SCHEDULES)
@given(st.data())
def test_no_schedule_of_crashes_breaks_the_laws(data: st.DataObject) -> None:
    keep_the_laws(data)


@pytest.mark.full
@schedules(10_000)
@given(st.data())
def test_no_schedule_of_ten_thousand_breaks_the_laws(data: st.DataObject) -> None:
    keep_the_laws(data)


def keep_the_laws(data: st.DataObject) -> None:
    def choose(choices: object) -> object:
        return data.draw(st.sampled_from(choices))  # type: ignore[call-overload]

    made = plan(
        *random_steps(choose),
        verify=data.draw(st.sampled_from(["each", "last"])),
        autonomy=data.draw(st.sampled_from(["auto", "approve"])),
    )
    ledger = CrashingLedger()
    world = World(made, choose, ledger, Clock(), has_leaves=data.draw(st.sampled_from([True, True, True, False])))
    ledger.world = world

    world.crashes_left = data.draw(st.integers(0, 4))
    outcome = asyncio.run(live_through(world, ledger))

    # Always a final state, and the journal agrees with the outcome.
    assert outcome.result != "interrupted", outcome
    assert all(s in STEP_FINAL for s in outcome.states), outcome
    assert [ledger.states.get(i, StepState.PLANNED) for i in range(len(made.steps))] == list(outcome.states)
    # Nothing leads from a closed step to an effect.
    for i in range(len(made.steps)):
        path = [m.after for m in ledger.moves if m.step == i]
        assert not any(s in NO_EDGE_BACK for s in path[:-1])
        if path and path[-1] in NO_EDGE_BACK and StepState.INTENT not in path:
            assert not world.executions.get(i)
    assert_lawful_end(world, outcome.states)
    # Once a person has the plan, nothing more is begun by itself.
    stops = [n for n, m in enumerate(ledger.moves) if m.stop]
    begun = [n for n, m in enumerate(ledger.moves) if m.after in (StepState.INTENT, StepState.UNDOING)]
    assert not stops or not begun or begun[-1] < stops[0]
    assert bool(stops) <= (outcome.result == "handed_over")


def test_the_world_is_one_in_which_steps_take_effect() -> None:
    """The runner takes whatever its sandbox raises for a lost run: a world of the wrong shape would test nothing."""
    made = plan(*random_steps(lambda choices: choices[0]))
    ledger = CrashingLedger()
    world = World(made, lambda choices: choices[0], ledger, Clock(), crashes_left=0)
    ledger.world = world
    outcome = asyncio.run(live_through(world, ledger))
    assert (outcome.result, world.executions) == ("verified", {0: 1})


EVENTS = list(StepState)


@pytest.mark.parametrize("before", EVENTS)
@pytest.mark.parametrize("after", EVENTS)
def test_every_pair_of_states_is_decided_by_the_table(before: StepState, after: StepState) -> None:
    """A ledger record that contradicts the table is refused by recovery, one that agrees is accepted."""
    made = plan(step())
    move = StepMoved(incident="inc-test", plan=made.id, step=0, before=before, after=after, at=1.0)
    ledger = MemoryLedger(states={0: after})
    world = World(made, None, ledger, Clock())  # type: ignore[arg-type]
    runner = Runner(ledger, world, world, Clock())
    allowed = after in STEP_MOVES[before]
    if allowed:
        assert _Book(made, ledger, Clock(), [move]).states == [after]
    else:
        outcome = asyncio.run(runner.recover(made, [move], asyncio.Event()))
        assert outcome.result == "interrupted"
        assert not ledger.moves


def test_the_table_is_complete() -> None:
    assert set(STEP_MOVES) == set(StepState)
    for final in STEP_FINAL - {StepState.VERIFIED}:
        assert not STEP_MOVES[final]
    for closed in NO_EDGE_BACK:
        assert [s for s in StepState if closed in STEP_MOVES[s]] == [StepState.PLANNED]
