"""A circuit breaker per action and per (action, target), so that a remedy that does not help is not repeated for ever.

`actions.guard` asks `permits`, `actions.runner` calls `begin` before a step and `end` or `abandon` after it, and
journals the `BreakerMoved` that each returns. Pure: no clock, no lock, no I/O; a breaker is a value.

closed -> open: `failures` in a row, or at least `failure_ratio` (or `slow_ratio`) of at least `min_calls` within the
window. open -> half_open: the waiting time is over and one caller takes the only probe. half_open -> closed: the probe
was good; -> open: it was bad or slow, and the waiting time grows by `backoff` up to `max_open_seconds`. (The pattern of
M. Nygard's Release It!, with the counting window of resilience4j.)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import msgspec

from actions.model import BreakerCall, BreakerMoved, BreakerState

_CLOSED, _OPEN, _HALF = BreakerState.CLOSED, BreakerState.OPEN, BreakerState.HALF_OPEN
MAX_BREAKERS = 10_000  # kept; a process' breaker is never asked again once the process is gone
MAX_CALLS = 100  # remembered; older ones are forgotten before their window ends


class BreakerPolicy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When a breaker opens, and for how long."""

    failures: Annotated[int, msgspec.Meta(ge=1)] = 3  # in a row
    window_seconds: Annotated[float, msgspec.Meta(gt=0)] = 3600.0
    min_calls: Annotated[int, msgspec.Meta(ge=1, le=MAX_CALLS)] = 10
    failure_ratio: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.5
    slow_ratio: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.8
    slow_seconds: Annotated[float, msgspec.Meta(gt=0)] = 60.0
    open_seconds: Annotated[float, msgspec.Meta(gt=0)] = 900.0
    max_open_seconds: Annotated[float, msgspec.Meta(gt=0)] = 21_600.0
    backoff: Annotated[float, msgspec.Meta(ge=1)] = 2.0
    probe_seconds: Annotated[float, msgspec.Meta(gt=0)] = 1800.0  # a probe that has not ended by then is given up


class Breaker(msgspec.Struct, frozen=True, kw_only=True):
    """The state of one breaker. `key` is an action's name or `action|target`."""

    key: str
    state: BreakerState = _CLOSED
    open_until: float = 0.0
    opened_count: int = 0  # openings since it was last closed
    consecutive: int = 0
    probe_at: float = 0.0
    calls: tuple[BreakerCall, ...] = ()


class Ticket(msgspec.Struct, frozen=True):
    """Given by `begin`, handed back to `end` or `abandon`: whether this call is the probe, and which one."""

    key: str
    probe_at: float = 0.0  # 0: an ordinary call


def keys_of(action: str, target: str) -> tuple[str, str]:
    """The two breakers that guard a step."""
    return action, f"{action}|{target}"


def permits(breaker: Breaker, policy: BreakerPolicy, now: float) -> bool:
    """Whether `begin` would succeed at `now`."""
    if breaker.state is _CLOSED:
        return True
    if breaker.state is _OPEN:
        return now >= breaker.open_until
    return breaker.probe_at == 0.0 or now - breaker.probe_at >= policy.probe_seconds


def begin(breaker: Breaker, policy: BreakerPolicy, now: float) -> tuple[Breaker, Ticket, BreakerMoved | None]:
    """Takes permission for one call. Raises PermissionError when there is none: ask `permits` first."""
    if not permits(breaker, policy, now):
        raise PermissionError(f"breaker {breaker.key}: {breaker.state}, no call may begin")
    if breaker.state is _CLOSED:
        return breaker, Ticket(breaker.key), None
    probing = msgspec.structs.replace(breaker, state=_HALF, probe_at=now)
    return probing, Ticket(breaker.key, now), _moved(breaker, probing, now, "probe begins")


def end(
    breaker: Breaker, policy: BreakerPolicy, now: float, ticket: Ticket, *, ok: bool, seconds: float
) -> tuple[Breaker, BreakerMoved | None]:
    """Counts a call that has ended. Calls that began before the breaker opened no longer count."""
    slow = not seconds < policy.slow_seconds
    if breaker.state is _CLOSED:
        return _count(breaker, policy, now, BreakerCall(now, ok, slow))
    if breaker.state is not _HALF or ticket.probe_at == 0.0 or ticket.probe_at != breaker.probe_at:
        return breaker, None
    if ok and not slow:
        closed = Breaker(key=breaker.key)
        return closed, _moved(breaker, closed, now, "the probe was good")
    return _open(breaker, policy, now, "the probe was slow" if ok else "the probe failed")


def abandon(breaker: Breaker, now: float, ticket: Ticket) -> tuple[Breaker, BreakerMoved | None]:
    """Gives the probe back unused: the call did not take place, so it says nothing."""
    if breaker.state is not _HALF or ticket.probe_at == 0.0 or ticket.probe_at != breaker.probe_at:
        return breaker, None
    free = msgspec.structs.replace(breaker, probe_at=0.0)
    return free, _moved(breaker, free, now, "the probe did not take place")


def reset(breaker: Breaker, now: float, reason: str = "reset by a person") -> tuple[Breaker, BreakerMoved]:
    """Closes the breaker and forgets its past."""
    closed = Breaker(key=breaker.key)
    return closed, _moved(breaker, closed, now, reason)


def restore(move: BreakerMoved) -> Breaker:
    """The breaker as it was after `move`."""
    return Breaker(
        key=move.key,
        state=move.after,
        open_until=move.open_until,
        opened_count=move.opened_count,
        consecutive=move.consecutive,
        probe_at=move.probe_at,
        calls=move.calls,
    )


def fold(moves: Iterable[BreakerMoved]) -> dict[str, Breaker]:
    """All breakers, from their records in journal order. The newest record of each key suffices."""
    return {move.key: restore(move) for move in moves}


def keep(known: dict[str, Breaker], breaker: Breaker) -> None:
    """Puts `breaker` into `known`, which is in the order of the last change. Beyond MAX_BREAKERS the closed one whose
    change is longest ago is forgotten; open ones never are."""
    known.pop(breaker.key, None)
    known[breaker.key] = breaker
    if len(known) > MAX_BREAKERS and (oldest := next((k for k, b in known.items() if b.state is _CLOSED), None)):
        del known[oldest]


def _count(
    breaker: Breaker, policy: BreakerPolicy, now: float, call: BreakerCall
) -> tuple[Breaker, BreakerMoved | None]:
    recent = tuple(c for c in breaker.calls if now - c.at < policy.window_seconds)
    calls = (*recent, call)[-MAX_CALLS:]
    counted = msgspec.structs.replace(breaker, calls=calls, consecutive=0 if call.ok else breaker.consecutive + 1)
    if counted.consecutive >= policy.failures:
        return _open(counted, policy, now, f"{counted.consecutive} failures in a row")
    if len(calls) >= policy.min_calls:
        failed, slow = sum(not c.ok for c in calls), sum(c.slow for c in calls)
        if failed >= policy.failure_ratio * len(calls):
            return _open(counted, policy, now, f"{failed} of {len(calls)} calls failed")
        if slow >= policy.slow_ratio * len(calls):
            return _open(counted, policy, now, f"{slow} of {len(calls)} calls were slow")
    return counted, _moved(breaker, counted, now, "")


def _open(breaker: Breaker, policy: BreakerPolicy, now: float, reason: str) -> tuple[Breaker, BreakerMoved]:
    # Multiplied step by step and stopped at the cap: backoff ** opened_count overflows after enough openings.
    wait = min(policy.open_seconds, policy.max_open_seconds)
    for _ in range(breaker.opened_count):
        wait *= policy.backoff
        if wait >= policy.max_open_seconds or policy.backoff == 1:
            break
    opened = Breaker(
        key=breaker.key,
        state=_OPEN,
        open_until=now + min(wait, policy.max_open_seconds),
        opened_count=breaker.opened_count + 1,
    )
    return opened, _moved(breaker, opened, now, reason)


def _moved(before: Breaker, after: Breaker, now: float, reason: str) -> BreakerMoved:
    return BreakerMoved(
        key=after.key,
        before=before.state,
        after=after.state,
        at=now,
        reason=reason,
        open_until=after.open_until,
        opened_count=after.opened_count,
        consecutive=after.consecutive,
        probe_at=after.probe_at,
        calls=after.calls,
    )
