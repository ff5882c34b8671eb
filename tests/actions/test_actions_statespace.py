"""The step machine's whole state space on the real runner: every position x everything that may happen from there.

A position is an edge of the table by which a state was entered (what a crash in `undoing` leaves is another `unknown`
than what one in `intent` leaves). From each, recovery goes on in every world: the run, its check, its undo and its
verification end in every way, with and without an undo, whether or not the old leaf can be emptied. The moves that are
seen, together, must be exactly the table: nothing outside it, and nothing in it that never happens.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Iterator

import pytest
from actions_world import NOW, Clock, MemoryLedger, ScriptedSandbox, ScriptedVerifier, done, plan, step

from actions.breaker import Breaker, BreakerState
from actions.builtin import NOTHING_DONE
from actions.model import STEP_FINAL, STEP_MOVES, Declined, Refusal, StepMoved, StepState
from actions.runner import CLOSING, Runner, RunnerSettings
from sandbox.model import RunResult

S = StepState
Edge = tuple[StepState, StepState]
World = tuple[str, str, str, str, bool, bool, str]  # run, check, undo, verdict, has undo, leaf killable, gate
TABLE = {(before, after) for before, afters in STEP_MOVES.items() for after in afters}
RUNS: dict[str, RunResult | BaseException] = {
    "done": done(0),
    "failed": done(1),
    "timed out": RunResult(exit_code=None, signal=9, timed_out=True),
    "out of memory": RunResult(exit_code=None, signal=9, oom_killed=True),
    "not started": RunResult(exit_code=None, error="no such file"),
    "refused": done(NOTHING_DONE),
    "lost": OSError("the sandbox broke"),
}
CHECKS: dict[str, RunResult | BaseException] = {"yes": done(0), "no": done(1), "cannot tell": done(94)}
UNDOES: dict[str, RunResult | BaseException] = {
    "done": done(0),
    "failed": done(1),
    "lost": OSError("the sandbox broke"),
}
VERDICTS: dict[str, tuple[bool | None, str] | Exception] = {
    "recovered": (True, "good"),
    "not recovered": (False, "bad"),
    "cannot tell": (None, "no series"),
    "broken": ValueError("no answer"),
}
GATES = ("open", "resolved", "expired", "refused", "breaker")


def path_to(edge: Edge | None) -> list[Edge]:
    """The shortest way from the beginning that ends with `edge`."""
    if edge is None:
        return []
    ways: deque[tuple[StepState, list[Edge]]] = deque([(S.PLANNED, [])])
    seen = {S.PLANNED}
    while ways:
        at, way = ways.popleft()
        if at is edge[0]:
            return [*way, edge]
        for after in sorted(STEP_MOVES[at] - seen):
            seen.add(after)
            ways.append((after, [*way, (at, after)]))
    raise AssertionError(f"{edge[0]} cannot be reached")


def journalled(edge: Edge | None, index: int = 0) -> list[StepMoved]:
    def moved(before: StepState, after: StepState) -> StepMoved:
        result = {S.RAN: done(0), S.FAILED: done(1)}.get(after)
        return StepMoved(
            incident="inc-test",
            plan="plan-test",
            step=index,
            before=before,
            after=after,
            at=NOW,
            result=result,
            leaf="l",
        )

    return [moved(*e) for e in path_to(edge)]


def worlds() -> Iterator[World]:
    usual = [run for run in RUNS if run not in ("timed out", "out of memory")]  # which are failures like any other
    yield from itertools.product(usual, CHECKS, UNDOES, VERDICTS, (True, False), (True,), ("open",))
    yield from itertools.product(RUNS, CHECKS, UNDOES, ["not recovered"], (True,), (True, False), ("open",))
    yield from itertools.product(["done"], ["no"], ["done"], ["recovered"], (True,), (True,), GATES)


class Explored:
    """What one recovery did."""

    def __init__(self, edge: Edge | None, world: World) -> None:
        run, check, undo, verdict, has_undo, killable, gate = world
        self.plan = plan(
            step("a", undo=("undo-a",) if has_undo else ()),
            expires_at=NOW - 1 if gate == "expired" else NOW + 600,
        )
        self.sandbox = ScriptedSandbox(
            answers={"do-a": [RUNS[run]], "check-a": [CHECKS[check]], "undo-a": [UNDOES[undo]]},
            kills=killable,
        )
        self.moves = journalled(edge)
        self.ledger = MemoryLedger(states={m.step: m.after for m in self.moves})
        refused = Declined(reason=Refusal.PAUSED, detail="paused") if gate == "refused" else None
        settings = RunnerSettings(permit=lambda _, __: refused)
        verifier = ScriptedVerifier([VERDICTS[verdict]])
        self.runner = Runner(self.ledger, self.sandbox, verifier, Clock(), settings)
        if gate == "breaker":
            self.runner.breakers["test.a"] = Breaker(key="test.a", state=BreakerState.OPEN, open_until=NOW + 99)
        self.cancelled = asyncio.Event()
        if gate == "resolved":
            self.cancelled.set()

    async def explore(self) -> Explored:
        self.outcome = await self.runner.recover(self.plan, self.moves, self.cancelled)
        self.edges = {(m.before, m.after) for m in self.ledger.moves}
        return self


async def test_the_moves_from_every_position_in_every_world_are_the_table() -> None:
    seen: set[Edge] = set()
    for edge in [None, *sorted(TABLE)]:
        at = edge[1] if edge else S.PLANNED
        for world in worlds():
            explored = await Explored(edge, world).explore()
            seen |= explored.edges
            where = (edge, world, explored.outcome)
            assert explored.edges <= TABLE, where
            assert explored.outcome.result != "interrupted", where
            assert set(explored.outcome.states) <= STEP_FINAL, where
            if at in STEP_FINAL:
                assert not explored.edges, where
                assert not explored.sandbox.ran, where
            if at in CLOSING:
                assert explored.outcome.result == at.value, where
            if not world[5] and at in (S.INTENT, S.UNKNOWN, S.UNDOING):  # the old run may be alive
                assert not explored.sandbox.ran, where
                assert explored.outcome.result == "handed_over", where
    # The two edges that one step alone never takes: a person's no, and undoing what a later step made useless.
    assert TABLE - seen == {(S.PLANNED, S.DENIED), (S.VERIFIED, S.UNDOING)}


def test_a_later_step_that_fails_undoes_the_verified_one_and_a_no_denies_all() -> None:
    made = plan(step("a"), step("b"), verify="each")
    sandbox = ScriptedSandbox(answers={"do-b": [done(1)]})
    ledger = MemoryLedger()
    runner = Runner(ledger, sandbox, ScriptedVerifier(), Clock())
    assert asyncio.run(runner.run(made, asyncio.Event())).result == "undone"
    assert (S.VERIFIED, S.UNDOING) in {(m.before, m.after) for m in ledger.moves}
    ledger = MemoryLedger()
    closed = asyncio.run(
        Runner(ledger, sandbox, ScriptedVerifier(), Clock()).close(made, S.DENIED, "no", Refusal.APPROVAL_REJECTED)
    )
    assert closed.states == (S.DENIED, S.DENIED)
    assert {m.refusal for m in ledger.moves} == {Refusal.APPROVAL_REJECTED}


@pytest.mark.parametrize("closed", CLOSING)
@pytest.mark.parametrize("other", [S.PLANNED, S.VERIFIED])
def test_nothing_begins_in_a_plan_that_was_being_closed_when_a_crash_came(closed: StepState, other: StepState) -> None:
    made = plan(step("a"), step("b"), step("c"), verify="each")
    moves = journalled((S.RAN, S.VERIFIED)) if other is S.VERIFIED else []
    moves += journalled((S.PLANNED, closed), 1)
    ledger, sandbox = MemoryLedger(states={m.step: m.after for m in moves}), ScriptedSandbox()
    runner = Runner(ledger, sandbox, ScriptedVerifier(), Clock())
    outcome = asyncio.run(runner.recover(made, moves, asyncio.Event()))
    assert outcome.states == (closed if other is S.PLANNED else other, closed, closed)
    assert not sandbox.ran
