"""Our own downstream calls: each behind a circuit breaker, with a stated answer for when there is none.

Made by `agent.app`, one per downstream (Prometheus, Alertmanager's API, topology discovery); whoever calls it goes
through `call` or `ask`. Exists so that a downstream that is down or slow costs an incident nothing but its evidence:
while a breaker is open nothing goes over the network, and what is answered instead needs no network either. The state
machine is `actions.breaker`; its moves are journalled, so that a restart knows them, people see them (`alertmedic
breakers`) and can reset them. Never retries by itself, and never makes up an answer: `Answer.source` says what it is.

After the waiting time one call is the probe. Calls that come meanwhile wait for its end, under their own deadline, so
that the first look after an outage is a whole one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

import msgspec

from actions import breaker as breakers
from actions.breaker import Breaker, BreakerPolicy
from actions.model import BreakerMoved, BreakerState

PREFIX = "dependency:"
# A call that takes longer than 0.8 s is slow, but for evidence, whose queries have a budget of their own.
INTERNAL = BreakerPolicy(
    failures=3,
    window_seconds=120.0,
    min_calls=10,
    failure_ratio=0.5,
    slow_ratio=0.5,
    slow_seconds=0.8,
    open_seconds=5.0,
    max_open_seconds=120.0,
    backoff=2.0,
    probe_seconds=60.0,
)
T = TypeVar("T")


class DependencyOpen(Exception):  # noqa: N818 - a state, not a fault of the caller
    """Nothing was asked: the breaker is open. The text says of what, and for how long."""


@dataclass(frozen=True, slots=True)
class Answer(Generic[T]):
    """What was answered, and what it is. `live`: just now. `stale`: the last good answer, of unix time `at`. `static`:
    what is configured. `none`: there is nothing, and `value` is None. `reason`: why it is not live."""

    value: T | None
    source: Literal["live", "stale", "static", "none"]
    at: float
    reason: str = ""


class Dependency(Generic[T]):
    """One downstream. `on_move` is told each move of the breaker and must not block. `clock` gives unix seconds; how
    long the breaker stays open is counted by a clock that nobody sets. T: what `ask` answers."""

    def __init__(
        self,
        name: str,
        on_move: Callable[[BreakerMoved], None] = lambda _: None,
        *,
        policy: BreakerPolicy = INTERNAL,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.key = PREFIX + name
        self._on_move, self._policy, self._clock, self._monotonic = on_move, policy, clock, monotonic
        self._offset = clock() - monotonic()  # so that journalled times are unix seconds
        self._probe_ended = asyncio.Event()
        self._probe_ended.set()
        self._last: Answer[T] | None = None
        self.breaker = Breaker(key=self.key)

    def restore(self, move: BreakerMoved) -> None:
        """As the journal has it. A probe that was under way has ended with its process."""
        known = breakers.restore(move)
        latest = self._now() + self._policy.max_open_seconds
        state = BreakerState.OPEN if known.state is BreakerState.HALF_OPEN else known.state
        self.breaker = msgspec.structs.replace(
            known, state=state, probe_at=0.0, calls=(), open_until=min(known.open_until, latest)
        )

    def reset(self, reason: str) -> BreakerMoved:
        """Closes it by hand; the move is the caller's to journal."""
        self.breaker, move = breakers.reset(self.breaker, self._clock(), reason)
        self._probe_ended.set()
        return move

    async def call(
        self,
        work: Callable[[], Awaitable[T]],
        *,
        timed: bool = True,
        fails: Callable[[Exception], bool] = lambda _: True,
    ) -> T:
        """What `work` answers or raises. Raises DependencyOpen, without a call, while the breaker is open. `timed`
        False: slowness does not count. `fails` says which exceptions are the downstream's failure."""
        await self._admitted()
        began = self._now()
        self.breaker, ticket, move = breakers.begin(self.breaker, self._policy, began)
        if ticket.probe_at:
            self._probe_ended.clear()
        self._tell(move)
        ok: bool | None = None
        try:
            answer = await work()
            ok = True
            return answer
        except Exception as error:
            ok = not fails(error)
            raise
        finally:
            now = self._now()
            if ok is None:  # cancelled: it says nothing
                self.breaker, move = breakers.abandon(self.breaker, now, ticket)
            else:
                seconds = now - began if timed else 0.0
                self.breaker, move = breakers.end(
                    self.breaker, self._policy, now, ticket, ok=ok, seconds=seconds
                )  # fmt: skip
            if ticket.probe_at:
                self._probe_ended.set()
            self._tell(move)

    async def ask(self, work: Callable[[], Awaitable[T]], *, static: T | None = None, timed: bool = True) -> Answer[T]:
        """The live answer, or the last good one marked stale, or `static`, or none. Raises nothing but cancellation;
        asked again with the same state of the world it answers the same."""
        try:
            value = await self.call(work, timed=timed)
        except Exception as error:  # noqa: BLE001 - whatever it was, it is said in the answer
            reason = str(error) or type(error).__name__
            if self._last is not None:
                return Answer(self._last.value, "stale", self._last.at, reason)
            return Answer(static, "none" if static is None else "static", self._clock(), reason)
        self._last = Answer(value, "live", self._clock())
        return self._last

    async def _admitted(self) -> None:
        """Returns when a call may begin. Raises DependencyOpen."""
        while not breakers.permits(self.breaker, self._policy, self._now()):
            if self.breaker.state is BreakerState.OPEN:
                left = self.breaker.open_until - self._now()
                raise DependencyOpen(f"not asked: the circuit breaker {self.key} is open for another {left:.1f} s")
            await self._probe_ended.wait()
            await asyncio.sleep(0)

    def _now(self) -> float:
        return self._monotonic() + self._offset

    def _tell(self, move: BreakerMoved | None) -> None:
        if move is not None and move.before is not move.after:
            self._on_move(msgspec.structs.replace(move, calls=()))
