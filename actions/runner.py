"""Does a plan: moves its steps along `STEP_MOVES`, in the sandbox, with every move in the journal.

`agent.investigate` calls `run` for a plan that may begin and `recover` for one that a crash interrupted; `close` ends a
plan that shall not begin. The order around each effect is fixed: permission, breaker, fault snapshot, **intent** made
durable, effect, **result** made durable, verification. A plan that fails is undone in reverse; what cannot be undone is
handed over. After a crash the rule is: never repeat blindly. The old run's leaf is emptied first, then the action's own
`check` says whether it had happened.

Never raises for what a plan does (that becomes a `PlanOutcome`), never decides whether a plan is wise (that is
`actions.guard`), and never looks at series itself (the verifier does).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import msgspec

from actions import breaker as breakers
from actions.breaker import Breaker, BreakerPolicy, Ticket
from actions.builtin import DONE, FAILED, NOTHING_DONE
from actions.guard import describe
from actions.model import BreakerMoved, Declined, Plan, Refusal, Step, StepMoved, StepState, check_move
from sandbox import SandboxUnavailable
from sandbox.execution import LEAST_SECRET, REDACTED
from sandbox.failpoint import failpoint
from sandbox.model import Limits, Needs, Protection, RunResult

_S = StepState
CLOSING = (_S.DENIED, _S.EXPIRED, _S.CANCELLED)
# The sandbox replaces its whole default environment when it is given one; TMPDIR is then the private directory.
BASE_ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LANG": "C.UTF-8",
    "HOME": "/",
    "TMPDIR": ".",
}


class Ledger(Protocol):
    """The journal. Each call returns when the record is durable, and raises when it cannot be made so."""

    async def record_step(self, move: StepMoved) -> None: ...
    async def record_breaker(self, move: BreakerMoved) -> None: ...


class Sandbox(Protocol):
    """What carries a step out: `agent.remote.Executors`, here or on another host. `host`: "" is this one."""

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
        needs: Needs | None = None,
        secrets: Mapping[str, str] | None = None,
        redact: Sequence[str] = (),
        host: str = "",
    ) -> RunResult: ...
    async def kill_leaf(self, leaf: str, deadline_seconds: float, host: str = "") -> bool: ...
    def leaf_name(self, host: str = "") -> str: ...


class Verifier(Protocol):
    """Asks the series that justified the action. Waits for them itself, up to `plan.verify_seconds`."""

    async def verify(self, plan: Plan, step: Step) -> tuple[bool | None, str]:
        """True: recovered. False: not recovered in time. None: cannot tell. And a sentence on it."""
        ...


Result = Literal["verified", "undone", "handed_over", "cancelled", "denied", "expired", "interrupted"]


class PlanOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """How a plan ended. `interrupted`: the journal failed us or contradicts itself, so it has not ended."""

    plan: str
    result: Result
    states: tuple[StepState, ...]
    reason: str = ""
    refusal: Refusal | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerSettings:
    """What a runner keeps to. `secrets`: values by name, for the variables that a step names. `environment`: more
    variables for a plan's processes (a trace's identity). `permit` is asked before each step begins. `snapshot` keeps a
    fault snapshot and returns its file name when that is durable."""

    protection: Protection = "automatic"
    user: str = ""  # for steps that name none
    breaker: BreakerPolicy = field(default_factory=BreakerPolicy)
    secrets: Mapping[str, str] = field(default_factory=dict)
    environment: Callable[[Plan], Mapping[str, str]] = lambda _: {}
    permit: Callable[[Plan, int], Declined | None] = lambda _, __: None
    snapshot: Callable[[Plan, int], Awaitable[str]] | None = None
    snapshot_seconds: float = 5.0
    kill_seconds: float = 15.0  # for an old leaf to be empty
    grace_seconds: float = 30.0  # beyond its own deadline, until a call that does not return is taken for lost
    at_once: int = 8  # steps between permission and result; more wait their turn
    max_attempts: int = 2  # of one step, or of its undo, counting those that a crash ended


class _Interrupted(Exception):  # noqa: N818 - not an error of the plan
    """The journal could not record a move: nothing more may happen."""


class _Book:
    """Where each step of a plan stands; every change goes through the table and then into the journal."""

    def __init__(self, plan: Plan, ledger: Ledger, clock: Callable[[], float], moves: Iterable[StepMoved] = ()) -> None:
        self.plan, self._ledger, self._clock = plan, ledger, clock
        self.states = [_S.PLANNED] * len(plan.steps)
        self.last: list[StepMoved | None] = [None] * len(plan.steps)
        self.results: list[RunResult | None] = [None] * len(plan.steps)  # of the step itself
        self.attempts = [0] * len(plan.steps)
        self.undo_attempts = [0] * len(plan.steps)
        self.tickets: dict[int, list[Ticket]] = {}
        self.concluded: set[int] = set()  # steps whose breakers know how this attempt went
        self.stopped = False  # a person has the plan: nothing more by itself
        self.reason = ""
        self.refusal: Refusal | None = None
        for move in moves:
            if move.plan == plan.id:
                check_move(move.before, move.after)
                self._apply(move)

    def _apply(self, move: StepMoved) -> None:
        i = move.step
        self.states[i], self.last[i] = move.after, move
        self.attempts[i] += move.after is _S.INTENT
        self.undo_attempts[i] += move.after is _S.UNDOING
        self.stopped = self.stopped or move.stop
        if move.after in (_S.RAN, _S.FAILED):
            self.results[i] = move.result

    async def move(
        self, i: int, after: StepState, reason: str = "", *, result: RunResult | None = None, leaf: str = "",
        snapshot: str = "", refusal: Refusal | None = None, stop: bool = False,
    ) -> None:  # fmt: skip
        """Returns when the move is durable. Raises _Interrupted when it cannot be made so, IllegalMove on a bug."""
        check_move(self.states[i], after)
        move = StepMoved(
            incident=self.plan.incident,
            plan=self.plan.id,
            step=i,
            before=self.states[i],
            after=after,
            at=self._clock(),
            reason=reason,
            result=result,
            leaf=leaf,
            snapshot=snapshot,
            refusal=refusal,
            stop=stop,
        )
        try:
            await self._ledger.record_step(move)
        except Exception as error:
            raise _Interrupted(f"the journal did not take {move.before} -> {after}: {error}") from error
        self._apply(move)

    async def stop(self, i: int, reason: str) -> None:
        """A person has the plan from here."""
        self.reason = self.reason or reason
        await self.move(i, _S.HANDED_OVER, reason, stop=True)

    def having(self, *states: StepState) -> list[int]:
        return [i for i, s in enumerate(self.states) if s in states]

    @property
    def backing_out(self) -> bool:
        """Whether something went wrong, so that what was done is to be undone."""
        # An undo that a crash interrupted and that has not taken effect brings its step back to RAN.
        again = any(self.states[i] is _S.RAN and self.undo_attempts[i] for i in range(len(self.states)))
        return again or bool(self.having(_S.FAILED, _S.UNDONE, _S.UNDO_FAILED, _S.HANDED_OVER))

    def outcome(self, result: Result, reason: str = "") -> PlanOutcome:
        return PlanOutcome(
            plan=self.plan.id,
            result=result,
            states=tuple(self.states),
            reason=reason or self.reason,
            refusal=self.refusal,
        )


class Runner:
    """Runs plans, several at once. Holds the breakers; everything else about a plan is in its records."""

    def __init__(
        self,
        ledger: Ledger,
        sandbox: Sandbox,
        verifier: Verifier,
        clock: Callable[[], float],
        settings: RunnerSettings | None = None,
        known_breakers: Iterable[BreakerMoved] = (),
    ) -> None:
        self._ledger, self._sandbox, self._verifier, self._clock = ledger, sandbox, verifier, clock
        self._settings = settings or RunnerSettings()
        self.breakers: dict[str, Breaker] = breakers.fold(known_breakers)
        self._slots = asyncio.Semaphore(self._settings.at_once)
        # Gates are asked for one step a turn of the loop: many at once would hold up everything else for their sum.
        self._turn = asyncio.Lock()

    async def run(self, plan: Plan, cancelled: asyncio.Event) -> PlanOutcome:
        """Begins and ends a plan. `cancelled` stops steps that have not begun (the alert resolved)."""
        return await self._guarded(_Book(plan, self._ledger, self._clock), cancelled)

    async def recover(self, plan: Plan, moves: Iterable[StepMoved], cancelled: asyncio.Event) -> PlanOutcome:
        """Ends a plan that a crash interrupted. `moves`: what the journal holds of its steps, each step's in order."""
        try:
            book = _Book(plan, self._ledger, self._clock, moves)
        except (ValueError, IndexError) as error:
            # The journal contradicts the table: nobody knows what ran, so nothing more may.
            states = tuple(_S.UNKNOWN for _ in plan.steps)
            what = f"the journal's moves of this plan make no sense: {error}"
            return PlanOutcome(plan=plan.id, result="interrupted", states=states, reason=what)
        return await self._guarded(book, cancelled)

    async def close(self, plan: Plan, after: StepState, reason: str, refusal: Refusal | None = None) -> PlanOutcome:
        """Ends a plan of which nothing has begun: DENIED, EXPIRED or CANCELLED."""
        if after not in CLOSING:
            raise ValueError(f"close: {after} is not a way to end a plan that has not begun")
        book = _Book(plan, self._ledger, self._clock)
        book.refusal = refusal
        try:
            await self._close_planned(book, after, reason)
        except _Interrupted as error:
            return book.outcome("interrupted", str(error))
        return self._sum_up(book)

    async def reset_breaker(self, key: str, reason: str = "reset by a person") -> None:
        """Closes a breaker by hand. Raises what the ledger raises, and then the breaker is as it was."""
        after, move = breakers.reset(self.breakers.get(key, Breaker(key=key)), self._clock(), reason)
        await self._ledger.record_breaker(move)
        breakers.keep(self.breakers, after)

    # -- the whole plan

    async def _guarded(self, book: _Book, cancelled: asyncio.Event) -> PlanOutcome:
        if book.plan.autonomy not in ("approve", "auto"):
            book.refusal = Refusal.SUGGEST_ONLY
            return book.outcome("cancelled", f"the plan's autonomy is {book.plan.autonomy}: it is not ours to do")
        try:
            return await self._drive(book, cancelled)
        except _Interrupted as error:
            return book.outcome("interrupted", str(error))
        except Exception as error:  # noqa: BLE001 - whatever happens to a plan becomes its outcome
            return book.outcome("interrupted", f"{type(error).__name__}: {error}")

    async def _drive(self, book: _Book, cancelled: asyncio.Event) -> PlanOutcome:
        """From any consistent set of states to a final one: a fresh plan and a recovered one take the same way."""
        for i in book.having(_S.INTENT, _S.UNDOING):
            await self._lost(book, i)
        for i in book.having(_S.UNKNOWN):
            await self._settle(book, i)
        if not (book.stopped or book.backing_out):
            await self._forward(book, cancelled)
        if not book.stopped and book.backing_out:
            await self._back_out(book)
        if book.stopped:
            await self._hand_over_rest(book)
        return self._sum_up(book)

    async def _forward(self, book: _Book, cancelled: asyncio.Event) -> None:
        """Begins what is planned and verifies what ran, until something goes wrong."""
        plan = book.plan
        if closed := book.having(*CLOSING):
            # A crash came between the closing of one step and of the next: the decision was about all of them.
            last = book.last[closed[0]]
            assert last is not None
            book.refusal = last.refusal
            await self._close_planned(book, last.after, last.reason)
        for i, step in enumerate(plan.steps):
            while book.states[i] is _S.PLANNED:
                async with self._slots:
                    await self._begin(book, i, cancelled)
            if book.states[i] is _S.RAN and step.read_only:
                await book.move(i, _S.VERIFIED, "read-only: there is nothing to verify")
                await self._conclude(book, i, ok=True)
            if book.states[i] is _S.RAN and plan.verify == "each":
                await self._verify(book, [i])
            if book.stopped or book.backing_out:
                return
        if ran := book.having(_S.RAN):
            await self._verify(book, ran)

    async def _begin(self, book: _Book, i: int, cancelled: asyncio.Event) -> None:
        """Does step i, or closes what is planned because it may not begin."""
        async with self._turn:
            stop = self._why_not(book, i, cancelled)
        snapshot, remark = "", ""
        if stop is None:
            # The snapshot takes its time, in which somebody may pause or the alert resolve: asked again.
            snapshot, remark = await self._snapshot(book.plan, i)
            async with self._turn:
                stop = self._why_not(book, i, cancelled)
        if stop is not None:
            after, reason, book.refusal = stop
            await self._close_planned(book, after, reason)
        else:
            await self._perform(book, i, snapshot, remark)

    def _why_not(self, book: _Book, i: int, cancelled: asyncio.Event) -> tuple[StepState, str, Refusal] | None:
        """What forbids to begin step i now: (how it ends, why, refusal)."""
        if cancelled.is_set():
            return _S.CANCELLED, "the alert resolved before this began", Refusal.RESOLVED_BEFORE_START
        # Expiry is about beginning: a plan under way goes on, so that it ends whole.
        if not self._clock() < book.plan.expires_at and not any(book.attempts):
            return _S.EXPIRED, "nobody began it in time", Refusal.APPROVAL_EXPIRED
        if declined := self._settings.permit(book.plan, i):
            return _S.CANCELLED, f"{declined.reason}: {declined.detail}", declined.reason
        step = book.plan.steps[i]
        for key in breakers.keys_of(step.action, step.target):
            known = self.breakers.get(key)
            if known and not breakers.permits(known, self._settings.breaker, self._clock()):
                return _S.CANCELLED, f"the breaker {key} is {known.state}", Refusal.BREAKER_OPEN
        return None

    async def _close_planned(self, book: _Book, after: StepState, reason: str) -> None:
        book.reason = book.reason or reason
        for i in book.having(_S.PLANNED):
            await book.move(i, after, reason, refusal=book.refusal)

    async def _back_out(self, book: _Book) -> None:
        """Undoes in reverse what was done. Ends early when a person must have the plan."""
        await self._close_planned(book, _S.CANCELLED, "an earlier step of the plan went wrong")
        for i in reversed(range(len(book.states))):
            while book.states[i] in (_S.FAILED, _S.RAN, _S.VERIFIED, _S.UNDO_FAILED) and not book.stopped:
                if not await self._undo(book, i):
                    break

    async def _hand_over_rest(self, book: _Book) -> None:
        """Nothing more by itself: what ran stays as it is, for a person to judge."""
        await self._close_planned(book, _S.CANCELLED, "a person has the plan now")
        for i in book.having(_S.RAN, _S.FAILED, _S.UNDO_FAILED):
            await book.stop(i, "another step of the plan was handed over")

    def _sum_up(self, book: _Book) -> PlanOutcome:
        states = set(book.states)
        if _S.HANDED_OVER in states:
            return book.outcome("handed_over")
        if _S.UNDONE in states:
            # What is verified and has no undo stays although a later step was undone: a person must know.
            kept = any(not book.plan.steps[i].read_only for i in book.having(_S.VERIFIED))
            return book.outcome("handed_over" if kept else "undone")
        if _S.VERIFIED in states and states <= {_S.VERIFIED, *CLOSING}:
            return book.outcome("verified")
        if states <= set(CLOSING):
            ways: tuple[Result, ...] = ("denied", "expired", "cancelled")
            return book.outcome(next((w for w in ways if StepState(w) in states), "cancelled"))
        return book.outcome("interrupted", f"{', '.join(book.states)} is no end of a plan")

    # -- one step

    async def _perform(self, book: _Book, i: int, snapshot: str, remark: str) -> None:
        """planned -> intent -> ran | failed; where the sandbox itself fails, what `_settle` finds."""
        step = book.plan.steps[i]
        await self._begin_calls(book, i)
        failpoint("runner_before_intent")
        leaf = self._leaf_name(step)
        await book.move(i, _S.INTENT, remark, leaf=leaf, snapshot=snapshot)
        failpoint("runner_after_intent")
        result = await self._effect(book.plan, step, step.argv, leaf)
        failpoint("runner_after_run")
        if isinstance(result, str):
            await self._lost(book, i, result)
            await self._settle(book, i)
            return
        failpoint("runner_before_result")
        await book.move(i, _S.RAN if result.ok else _S.FAILED, "" if result.ok else describe(result), result=result)
        failpoint("runner_after_result")
        if not result.ok:
            book.reason = f"{step.action} on {step.target} failed: {describe(result)}"
            await self._conclude(book, i, ok=None if _nothing_done(result) else False)

    async def _effect(self, plan: Plan, step: Step, argv: tuple[str, ...], leaf: str) -> RunResult | str:
        """The run's result; how the sandbox itself failed, when nobody knows whether it happened."""
        secrets = {n: self._settings.secrets[n] for n in step.environment if n in self._settings.secrets}
        by_descriptor = {n: value for n, value in secrets.items() if n in step.descriptors}
        by_name = {n: value for n, value in secrets.items() if n not in step.descriptors}
        extra = {**self._settings.environment(plan), **by_name}
        where: dict[str, Any] = {"host": step.host} if step.host else {}
        try:
            async with asyncio.timeout(step.limits.timeout_seconds + self._settings.grace_seconds):
                return await self._sandbox.run(
                    argv,
                    step.limits,
                    env={**BASE_ENVIRONMENT, **extra} if extra else None,
                    user=step.user or self._settings.user,
                    protection=self._settings.protection,
                    leaf=leaf,
                    needs=step.needs,
                    secrets=by_descriptor,
                    redact=tuple(by_name.values()),
                    **where,
                )
        except SandboxUnavailable as error:
            return RunResult(exit_code=None, error=str(error))
        except Exception as error:  # noqa: BLE001 - said in the move; `check` will tell what came of it
            return _without(f"{type(error).__name__}: {error}", secrets.values())[:300]

    async def _snapshot(self, plan: Plan, i: int) -> tuple[str, str]:
        """(file name, remark). A snapshot that fails does not stop the step: the fault may be a full disk, and what
        undo needs is in the plan."""
        if self._settings.snapshot is None:
            return "", ""
        try:
            async with asyncio.timeout(self._settings.snapshot_seconds):
                return await self._settings.snapshot(plan, i), ""
        except Exception as error:  # noqa: BLE001 - said in the intent
            return "", f"no fault snapshot: {type(error).__name__}: {error}"

    async def _verify(self, book: _Book, steps: list[int]) -> None:
        """ran -> verified for `steps`; not verified: the last of them is undone (the others by `_back_out`)."""
        failpoint("runner_before_verify")
        ok, text = await self._ask_verifier(book.plan, book.plan.steps[steps[-1]])
        failpoint("runner_after_verify")
        book.reason = text
        if ok:
            for i in steps:
                await book.move(i, _S.VERIFIED, text)
        elif ok is None:
            await book.stop(steps[-1], f"cannot be verified: {text}")
        else:
            await self._undo(book, steps[-1], f"not verified: {text}")
        for i in steps:
            await self._conclude(book, i, ok=ok)

    async def _ask_verifier(self, plan: Plan, step: Step) -> tuple[bool | None, str]:
        try:
            async with asyncio.timeout(plan.verify_seconds + self._settings.grace_seconds):
                return await self._verifier.verify(plan, step)
        except TimeoutError:
            return False, f"no recovery was seen within {plan.verify_seconds:.0f} s"
        except Exception as error:  # noqa: BLE001 - said in the move
            return None, f"the verification failed: {type(error).__name__}: {error}"

    async def _undo(self, book: _Book, i: int, reason: str = "the plan is undone") -> bool:
        """One attempt to undo step i, or what stands in its place. True when the step's state has changed."""
        step, state = book.plan.steps[i], book.states[i]
        if state is _S.UNDO_FAILED:
            await book.stop(i, "its undo failed")
            return True
        result = book.results[i]
        if state is _S.FAILED and result is not None and _nothing_done(result):
            await book.move(i, _S.HANDED_OVER, "nothing was done")
            return True
        if not step.undo:
            if state is _S.VERIFIED:  # stays: the table has no other way for it, and it did help
                return False
            await book.move(i, _S.HANDED_OVER, f"{reason}; it has no undo")
            return True
        if book.undo_attempts[i] >= self._settings.max_attempts:
            await book.stop(i, f"its undo was begun {book.undo_attempts[i]} times")
            return True
        failpoint("runner_before_undo")
        leaf = self._leaf_name(step)
        await book.move(i, _S.UNDOING, reason, leaf=leaf)
        failpoint("runner_after_undo_intent")
        undone = await self._effect(book.plan, step, step.undo, leaf)
        failpoint("runner_after_undo")
        if isinstance(undone, str):
            await self._lost(book, i, undone)
            await self._settle(book, i)
        elif undone.ok:
            await book.move(i, _S.UNDONE, result=undone)
        else:
            await book.move(i, _S.UNDO_FAILED, describe(undone), result=undone)
        return True

    # -- after a crash

    async def _lost(self, book: _Book, i: int, why: str = "") -> None:
        """intent | undoing -> unknown: nobody saw how it ended."""
        last = book.last[i]
        reason = f"nobody saw how it ended ({why})" if why else "nobody saw how it ended"
        await book.move(i, _S.UNKNOWN, reason, leaf=last.leaf if last else "")

    async def _settle(self, book: _Book, i: int) -> None:
        """unknown -> ran | planned | undone | handed_over. The old run is made certainly dead before `check` looks."""
        step, last = book.plan.steps[i], book.last[i]
        assert last is not None
        alive = not await self._kill(step, last.leaf)
        happened = None if alive else await self._happened(book.plan, step)
        if alive:
            await book.stop(i, "its old run may still be alive: this host cannot tell, look at its processes")
        elif last.before is _S.UNDOING:
            if happened is None:
                await book.stop(i, "nobody can tell whether its undo took effect")
            else:
                await book.move(i, _S.RAN if happened else _S.UNDONE, "found by its check")
        elif happened:
            await book.move(i, _S.RAN, "its check says that it happened")
        elif happened is None and not (step.idempotent or step.read_only):
            await book.stop(i, "nobody can tell whether it happened")
        elif book.attempts[i] >= self._settings.max_attempts:
            await book.stop(i, f"it was begun {book.attempts[i]} times and never ended")
        else:
            why = "its check says that it has not happened" if happened is False else "it may be repeated"
            await book.move(i, _S.PLANNED, why)
        if book.states[i] in (_S.PLANNED, _S.HANDED_OVER):
            await self._conclude(book, i, ok=False)

    def _leaf_name(self, step: Step) -> str:
        return self._sandbox.leaf_name(step.host) if step.host else self._sandbox.leaf_name()

    async def _kill(self, step: Step, leaf: str) -> bool:
        where = (step.host,) if step.host else ()
        try:
            return await self._sandbox.kill_leaf(leaf, self._settings.kill_seconds, *where)
        except (OSError, ValueError):
            return False

    async def _happened(self, plan: Plan, step: Step) -> bool | None:
        """What the action's own check says; None when it has none or cannot tell."""
        if not step.check:
            return None
        result = await self._effect(plan, step, step.check, self._leaf_name(step))
        if isinstance(result, str) or result.timed_out or result.oom_killed or result.error:
            return None
        return {DONE: True, FAILED: False}.get(-1 if result.exit_code is None else result.exit_code)

    # -- breakers

    async def _begin_calls(self, book: _Book, i: int) -> None:
        """Takes the step's two permissions. No other coroutine runs between `_why_not` and the end of the first loop,
        so there is exactly one probe."""
        step, now, moves, book.tickets[i] = book.plan.steps[i], self._clock(), [], []
        book.concluded.discard(i)
        for key in breakers.keys_of(step.action, step.target):
            known = self.breakers.get(key, Breaker(key=key))
            after, ticket, move = breakers.begin(known, self._settings.breaker, now)
            breakers.keep(self.breakers, after)
            book.tickets[i].append(ticket)
            if move is not None:
                moves.append(move)
        for move in moves:
            await self._record(move)

    async def _conclude(self, book: _Book, i: int, *, ok: bool | None) -> None:
        """Tells the step's breakers how it went, once; None: it says nothing about the action."""
        if i in book.concluded:
            return
        book.concluded.add(i)
        step, now, result = book.plan.steps[i], self._clock(), book.results[i]
        tickets = book.tickets.pop(i, None)
        if tickets is None:  # begun before a crash: then the probe under way, if there is one, was this call
            keys = breakers.keys_of(step.action, step.target)
            known = [self.breakers.get(key, Breaker(key=key)) for key in keys]
            tickets = [Ticket(b.key, b.probe_at) for b in known]
        for ticket in tickets:
            before = self.breakers.get(ticket.key, Breaker(key=ticket.key))
            if ok is None:
                after, move = breakers.abandon(before, now, ticket)
            else:
                seconds = result.seconds if result else 0.0
                after, move = breakers.end(before, self._settings.breaker, now, ticket, ok=ok, seconds=seconds)
            breakers.keep(self.breakers, after)
            if move is not None:
                await self._record(move)

    async def _record(self, move: BreakerMoved) -> None:
        try:
            await self._ledger.record_breaker(move)
        except Exception as error:
            raise _Interrupted(f"the journal did not take the breaker {move.key}: {error}") from error


def _without(text: str, secrets: Iterable[str]) -> str:
    """`text` as it may be journalled: what an exception says was not written with secrets in mind."""
    for value in secrets:
        if len(value) >= LEAST_SECRET:
            text = text.replace(value, REDACTED.decode())
    return text


def _nothing_done(result: RunResult) -> bool:
    return bool(result.error) or (result.exit_code == NOTHING_DONE and not result.timed_out)
