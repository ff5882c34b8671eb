"""Random plans with random crashes, results and clock steps: the laws of the step machine.

A world with real consequences stands in for the sandbox: each step is either in effect or not, a run that was cut off
may still take effect until its leaf is killed, and a check tells the truth (or that it cannot tell). The process may
die at every write of the journal, before or after it is durable, and anywhere around an effect. After each death the
plan is recovered from what the journal holds, until it has ended.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pytest
from actions_world import Clock, Crash, MemoryLedger, plan, step
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from actions.breaker import BreakerPolicy
from actions.builtin import NOTHING_DONE
from actions.model import STEP_FINAL, STEP_MOVES, BreakerMoved, Declined, Plan, Refusal, Step, StepMoved, StepState
from actions.runner import PlanOutcome, Runner, RunnerSettings, _Book
from sandbox.model import Limits, Protection, RunResult

SCHEDULES = 400  # in every run; the full volume is 10,000
NO_EDGE_BACK = (StepState.DENIED, StepState.EXPIRED, StepState.CANCELLED)


class LawBroken(BaseException):
    """Not an Exception: the runner turns those into outcomes."""


def law(holds: bool, words: str) -> None:
    if not holds:
        raise LawBroken(words)


@dataclass
class World:
    """What is in effect, and the dice of everything that may go wrong."""

    plan: Plan
    dice: st.DataObject
    ledger: MemoryLedger
    clock: Clock
    crashes_left: int = 4
    applied: dict[int, bool] = field(default_factory=dict)
    executions: dict[int, int] = field(default_factory=dict)  # effects of a step since it was last undone
    flying: dict[str, tuple[int, bool]] = field(default_factory=dict)  # leaf -> run that was cut off
    dead: set[str] = field(default_factory=set)
    has_leaves: bool = True
    refused: set[int] = field(default_factory=set)  # the step's last run changed nothing, and said so
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)

    def roll(self, *choices: object) -> object:
        return self.dice.draw(st.sampled_from(choices))

    def maybe_crash(self) -> None:
        if self.crashes_left and self.roll(False, False, False, False, False, False, True):
            self.crashes_left -= 1
            raise Crash

    def effect(self, i: int, undoing: bool) -> None:
        """The one place where something really changes."""
        announced = StepState.UNDOING if undoing else StepState.INTENT
        unsettled = (announced, StepState.UNKNOWN)
        law(self.ledger.states.get(i) in unsettled, "an effect that the journal did not announce")
        if undoing:
            law(i not in self.refused, "an undo of a step that had done nothing")
            self.applied[i], self.executions[i] = False, 0
        else:
            self.applied[i] = True
            self.executions[i] = self.executions.get(i, 0) + 1
            if not self.plan.steps[i].idempotent:
                law(self.executions[i] == 1, "a step that is not idempotent was executed twice")

    def late_effects(self) -> None:
        """Runs that a crash cut off are still alive, and may act at any time."""
        for leaf, (i, undoing) in list(self.flying.items()):
            if leaf not in self.dead and self.roll(True, False):
                del self.flying[leaf]
                self.effect(i, undoing)

    # -- the sandbox

    async def run(
        self,
        argv: Sequence[str],
        limits: Limits,
        *,
        env: Mapping[str, str] | None = None,
        user: str = "",
        stdin: bytes = b"",
        protection: Protection = "automatic",
        leaf: str = "",
    ) -> RunResult:
        await asyncio.sleep(0)
        self.late_effects()
        kind, _, name = argv[0].partition("-")
        i = int(name)
        if kind == "check":
            self.maybe_crash()
            answer = self.roll("truth", "truth", "truth", "cannot tell", "lost")
            if answer == "lost":
                raise OSError("the sandbox broke")
            return RunResult(exit_code=94 if answer == "cannot tell" else (0 if self.applied.get(i) else 1))
        undoing = kind == "undo"
        how = self.roll(
            "done",
            "done",
            "done",
            "failed before",
            "failed after",
            "refused",
            "lost before",
            "lost after",
            "lost alive",
        )
        if self.crashes_left and self.roll(False, False, False, True):
            self.crashes_left -= 1
            self.flying[leaf] = (i, undoing)
            self.late_effects()
            raise Crash
        if not undoing:
            self.refused.discard(i)
        if how in ("done", "failed after", "lost after"):
            self.effect(i, undoing)
        elif how == "refused" and not undoing:
            self.refused.add(i)
        if how == "lost alive":
            self.flying[leaf] = (i, undoing)
        if str(how).startswith("lost"):
            raise OSError("the sandbox broke")
        return RunResult(exit_code={"done": 0, "refused": NOTHING_DONE}.get(str(how), 1), seconds=1.0)

    async def kill_leaf(self, leaf: str, deadline_seconds: float) -> bool:
        await asyncio.sleep(0)
        self.late_effects()
        self.maybe_crash()
        if not self.has_leaves or not leaf:
            return False
        self.dead.add(leaf)
        self.flying.pop(leaf, None)
        return True

    def leaf_name(self) -> str:
        self.leaf_count = getattr(self, "leaf_count", 0) + 1
        return f"run-{self.leaf_count}" if self.has_leaves else ""

    # -- the verifier, the permission, the snapshot

    async def verify(self, plan: Plan, step: Step) -> tuple[bool | None, str]:
        await asyncio.sleep(0)
        self.maybe_crash()
        answer = self.roll(True, True, False, None, "error")
        if answer == "error":
            raise ValueError("no answer")
        assert answer is None or isinstance(answer, bool)
        return answer, "seen"

    def permit(self, plan: Plan, i: int) -> Declined | None:
        if self.roll(True, True, True, True, False):
            return None
        return Declined(reason=Refusal.PAUSED, detail="paused")

    async def snapshot(self, plan: Plan, i: int) -> str:
        self.maybe_crash()
        if self.roll(True, True, False):
            return "snapshot-1.json"
        raise OSError("disk full")


@dataclass
class CrashingLedger(MemoryLedger):
    """Durable or not, the process may be gone afterwards."""

    world: World | None = None

    async def record_step(self, move: StepMoved) -> None:
        assert self.world is not None
        self.world.maybe_crash()
        if move.after is StepState.INTENT:
            law(not self.world.cancelled.is_set(), "a step began after the alert had resolved")
        await super().record_step(move)
        self.world.maybe_crash()

    async def record_breaker(self, move: BreakerMoved) -> None:
        assert self.world is not None
        self.world.maybe_crash()
        await super().record_breaker(move)
        self.world.maybe_crash()


@st.composite
def steps(draw: st.DrawFn) -> tuple[Step, ...]:
    made = []
    for i in range(draw(st.integers(1, 3))):
        read_only = draw(st.sampled_from([False, False, False, True]))
        made.append(
            step(
                "x",
                target=f"service={i}",
                argv=(f"do-{i}",),
                check=() if draw(st.sampled_from([False, False, True])) else (f"check-{i}",),
                undo=() if read_only or draw(st.booleans()) else (f"undo-{i}",),
                read_only=read_only,
                idempotent=read_only or draw(st.sampled_from([False, False, True])),
            )
        )
    return tuple(made)


async def live_through(world: World) -> PlanOutcome:
    """Starts the plan and restarts after every crash, like the service does."""
    settings = RunnerSettings(
        breaker=BreakerPolicy(failures=2, open_seconds=30.0),
        permit=world.permit,
        snapshot=world.snapshot,
        grace_seconds=5.0,
    )
    ledger = world.ledger
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
    made = plan(
        *data.draw(steps()),
        verify=data.draw(st.sampled_from(["each", "last"])),
        autonomy=data.draw(st.sampled_from(["auto", "approve"])),
    )
    ledger = CrashingLedger()
    world = World(made, data, ledger, Clock(), has_leaves=data.draw(st.sampled_from([True, True, True, False])))
    ledger.world = world

    world.crashes_left = data.draw(st.integers(0, 4))
    outcome = asyncio.run(live_through(world))

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
    # What is said to be undone is undone; what is verified was done.
    for i, state in enumerate(outcome.states):
        assert not (state is StepState.UNDONE and world.applied.get(i))
        assert state is not StepState.VERIFIED or world.applied.get(i)
    # Once a person has the plan, nothing more is begun by itself.
    stops = [n for n, m in enumerate(ledger.moves) if m.stop]
    begun = [n for n, m in enumerate(ledger.moves) if m.after in (StepState.INTENT, StepState.UNDOING)]
    assert not stops or not begun or begun[-1] < stops[0]
    assert bool(stops) <= (outcome.result == "handed_over")
    # Nothing of ours is alive when the plan has ended, unless a person was told.
    for leaf, (i, _) in world.flying.items():
        assert outcome.states[i] is StepState.HANDED_OVER or leaf in world.dead


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
