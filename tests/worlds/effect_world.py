"""A world with real consequences in place of the sandbox: each step is either in effect or not, a run that was cut off
may still take effect until its leaf is killed, and a check tells the truth (or that it cannot tell). The process may
die anywhere around an effect (`Crash`). The laws of the step machine are checked where they could be broken.

Used by the tests of schedules: with hypothesis over a ledger in memory, with seeds over a real journal.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from actions.breaker import BreakerPolicy
from actions.builtin import NOTHING_DONE
from actions.model import Declined, Plan, Refusal, Step, StepState
from actions.runner import RunnerSettings
from sandbox.model import Limits, Protection, RunResult

Choose = Callable[[Sequence[Any]], Any]
SCHEDULE_BREAKER = BreakerPolicy(failures=2, open_seconds=30.0)


class Crash(BaseException):
    """The process dies here: no handler of the code under test may catch it."""


class Ledger(Protocol):
    """Where each step of the plan stands, by what is durable."""

    @property
    def states(self) -> Mapping[int, StepState]: ...


@dataclass
class Clock:
    now: float

    def __call__(self) -> float:
        return self.now


class LawBroken(BaseException):
    """Not an Exception: the runner turns those into outcomes."""


def law(holds: bool, words: str) -> None:
    if not holds:
        raise LawBroken(words)


@dataclass
class World:
    """What is in effect, and the dice of everything that may go wrong."""

    plan: Plan
    choose: Choose
    ledger: Ledger
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
        return self.choose(choices)

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
        **_: object,
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

    async def kill_leaf(self, leaf: str, deadline_seconds: float, host: str = "") -> bool:
        await asyncio.sleep(0)
        self.late_effects()
        self.maybe_crash()
        if not self.has_leaves or not leaf:
            return False
        self.dead.add(leaf)
        self.flying.pop(leaf, None)
        return True

    def leaf_name(self, host: str = "") -> str:
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

    def settings(self) -> RunnerSettings:
        return RunnerSettings(breaker=SCHEDULE_BREAKER, permit=self.permit, snapshot=self.snapshot, grace_seconds=5.0)


def random_steps(choose: Choose) -> tuple[Step, ...]:
    made = []
    for i in range(choose([1, 2, 3])):
        read_only = choose([False, False, False, True])
        made.append(
            Step(
                action="test.x",
                version=1,
                target=f"service={i}",
                argv=(f"do-{i}",),
                check=() if choose([False, False, True]) else (f"check-{i}",),
                undo=() if read_only or choose([False, True]) else (f"undo-{i}",),
                read_only=read_only,
                idempotent=read_only or choose([False, False, True]),
            )
        )
    return tuple(made)


def assert_lawful_end(world: World, states: Sequence[StepState]) -> None:
    """What is said to be undone is undone, what is verified was done, and nothing of ours is alive unless a person
    was told."""
    for i, state in enumerate(states):
        assert not (state is StepState.UNDONE and world.applied.get(i))
        assert state is not StepState.VERIFIED or world.applied.get(i)
    for leaf, (i, _) in world.flying.items():
        assert states[i] is StepState.HANDED_OVER or leaf in world.dead
