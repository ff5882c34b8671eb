"""What people allow: the ladder, thresholds, limits on how much and how often, and times of rest.

`agent.config` fills these from the configuration, `actions.guard` reads them. Pure: the time is always passed in.
Defaults are the careful ones; nothing here acts.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from typing import Annotated, Literal, NamedTuple

import msgspec

from actions.breaker import BreakerPolicy
from actions.model import AUTONOMY_ORDER, Autonomy
from sandbox.model import Protection

Seconds = Annotated[float, msgspec.Meta(gt=0)]
SecondsOrZero = Annotated[float, msgspec.Meta(ge=0)]
Fraction = Annotated[float, msgspec.Meta(ge=0, le=1)]
Count = Annotated[int, msgspec.Meta(ge=1)]
Weekday = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
WEEKDAYS: tuple[Weekday, ...] = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
HOUR = 3600.0


class _Policy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A key nobody knows is an error: a misspelt limit must not be no limit."""


Persons = Annotated[int, msgspec.Meta(ge=1, le=2)]


class AutonomyRule(_Policy, frozen=True, kw_only=True):
    """Globs (fnmatch, case-sensitive) that must all match, and the autonomy then granted. `persons`: how many different
    people must approve what waits for approval."""

    autonomy: Autonomy
    persons: Persons = 1
    action: str = "*"
    service: str = "*"
    alert: str = "*"  # matches when any firing alert's name does
    cause: str = "*"
    tenant: str = "*"
    environment: str = "*"


class AutonomyPolicy(_Policy, frozen=True, kw_only=True):
    """The first rule that matches decides; without one, `default`."""

    default: Autonomy = "suggest"
    persons: Persons = 1  # where no rule says how many
    rules: tuple[AutonomyRule, ...] = ()


class Granted(NamedTuple):
    """What the ladder says of one proposal, and which rule that was, in words."""

    autonomy: Autonomy
    persons: int
    why: str


class StormPolicy(_Policy, frozen=True, kw_only=True):
    """More than `incidents` opened within `window_seconds` is a storm. It ends by itself `cooldown_seconds` after the
    last moment at which that was so."""

    incidents: Count = 10
    window_seconds: Seconds = 300.0
    cooldown_seconds: SecondsOrZero = 600.0


class MaintenanceWindow(_Policy, frozen=True, kw_only=True):
    """No action starts in it. Absolute (`start`, `end`: RFC 3339) or weekly (`from_time`, `to_time` in UTC, on `days`
    or all of them; an end before the start means the next day)."""

    name: str = ""
    services: tuple[str, ...] = ("*",)
    start: str = ""
    end: str = ""
    days: tuple[Weekday, ...] = ()
    from_time: str | None = None
    to_time: str | None = None


class GroupPolicy(_Policy, frozen=True, kw_only=True):
    """Services that stand in for each other. All of its bounds hold; a group of which nobody knows the members lets
    nothing be done."""

    services: tuple[str, ...]  # globs on service names
    max_at_once: Count = 1  # of its services that are acted on at one time
    max_percent: Annotated[float, msgspec.Meta(gt=0, le=100)] = 100.0  # the same, as a share of its members
    min_healthy: Annotated[int, msgspec.Meta(ge=0)] = 0  # members that must stay untouched and without an alert


class ProtectedPolicy(_Policy, frozen=True, kw_only=True):
    """Globs of what no action may touch. The agent, pid 1, kernel threads and supervisors always are."""

    services: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()  # target identities
    processes: tuple[str, ...] = ()  # process names
    users: tuple[str, ...] = ()  # owners of processes
    paths: tuple[str, ...] = ()


class GuardPolicy(_Policy, frozen=True, kw_only=True):
    """Everything that the gates of `actions.guard` compare with."""

    autonomy: AutonomyPolicy = AutonomyPolicy()
    min_posterior: Fraction = 0.6
    min_margin: Fraction = 0.2
    stale_evidence_seconds: Seconds = 300.0
    cooldown_seconds: SecondsOrZero = 900.0  # between two plans of one action on one target
    actions_per_hour: Count = 10  # over everything
    actions_per_action_per_hour: Count = 6
    actions_per_target_per_hour: Count = 3
    max_targets: Count = 1  # of one plan; the action's own bound counts too
    max_steps_at_once: Count = 8  # steps that run at one time; more wait their turn (`make bench`: lag)
    max_services_at_once: Count = 1  # services that are being acted on at one time
    max_actions_per_service: Count = 1  # plans under way on one service
    groups: Mapping[str, GroupPolicy] = {}
    approval_ttl_seconds: Seconds = 1800.0
    approve_suggestions: bool = True  # a person may let run what was only suggested
    storm: StormPolicy = StormPolicy()
    maintenance: tuple[MaintenanceWindow, ...] = ()
    protected: ProtectedPolicy = ProtectedPolicy()
    protection: Protection = "automatic"
    allow_unenforced_auto: bool = False
    breaker: BreakerPolicy = BreakerPolicy()


def least(*levels: Autonomy) -> Autonomy:
    """The lowest of the given rungs."""
    return min(levels, key=AUTONOMY_ORDER.index)


def granted(
    policy: AutonomyPolicy,
    *,
    action: str,
    service: str,
    alerts: Sequence[str],
    cause: str,
    tenant: str,
    environment: str,
) -> Granted:
    """What the first matching rule grants."""
    for i, rule in enumerate(policy.rules):
        pairs = (
            (action, rule.action),
            (service, rule.service),
            (cause, rule.cause),
            (tenant, rule.tenant),
            (environment, rule.environment),
        )
        named = rule.alert == "*" or any(fnmatchcase(name, rule.alert) for name in alerts)
        if named and all(fnmatchcase(value, glob) for value, glob in pairs):
            return Granted(rule.autonomy, rule.persons, f"autonomy rule {i + 1}")
    return Granted(policy.default, policy.persons, "default autonomy")


def storm_until(opened: Sequence[float], now: float, policy: StormPolicy) -> float | None:
    """When the present storm ends if no further incident opens, or None when there is none.

    `opened`: times at which incidents opened, in the order in which they did. A storm lasts from the moment at which
    more than `policy.incidents` lie within the window until the cooldown after the last moment at which they did. Where
    the clock was set back between two of them, no time is taken to have passed: what opened "in the future" opened a
    moment ago.
    """
    if len(opened) <= policy.incidents:
        return None
    times, passed = _passed(opened, now)
    end: float | None = None
    for i in range(policy.incidents, len(times)):
        first, last = times[i - policy.incidents], times[i]
        if last - first < policy.window_seconds:
            crowded_until = first + policy.window_seconds
            end = max(end or 0.0, crowded_until + policy.cooldown_seconds)
    return now + (end - passed) if end is not None and passed < end else None


def _passed(opened: Sequence[float], now: float) -> tuple[list[float], float]:
    """`opened` and `now` on a clock that never goes back."""
    times: list[float] = []
    elapsed = 0.0
    for before, at in itertools.pairwise([opened[0], *opened] if opened else []):
        elapsed += max(0.0, at - before)
        times.append(elapsed)
    return times, elapsed + (max(0.0, now - opened[-1]) if opened else 0.0)


def group_of(groups: Mapping[str, GroupPolicy], service: str) -> tuple[str, GroupPolicy] | None:
    """The first group that a service belongs to."""
    for name, group in groups.items():
        if any(fnmatchcase(service, glob) for glob in group.services):
            return name, group
    return None


def in_maintenance(windows: Sequence[MaintenanceWindow], service: str, now: float) -> MaintenanceWindow | None:
    """The first window that covers `service` at `now`. Raises ValueError where a window cannot be understood."""
    for window in windows:
        if any(fnmatchcase(service, glob) for glob in window.services) and _covers(window, now):
            return window
    return None


def _covers(window: MaintenanceWindow, now: float) -> bool:
    moment = datetime.fromtimestamp(now, UTC)
    if window.start or window.end:
        start, end = datetime.fromisoformat(window.start), datetime.fromisoformat(window.end)
        if start.tzinfo is None or end.tzinfo is None:
            raise ValueError(f"maintenance window {window.name!r}: a time without zone")
        return start <= moment < end
    if window.from_time is None or window.to_time is None:
        raise ValueError(f"maintenance window {window.name!r}: neither absolute nor weekly")
    start_minute, end_minute = _minutes(window.from_time), _minutes(window.to_time)
    minute = moment.hour * 60 + moment.minute
    if start_minute < end_minute:
        return _on(window, moment) and start_minute <= minute < end_minute
    if minute >= start_minute:
        return _on(window, moment)
    return minute < end_minute and _on(window, moment - timedelta(days=1))


def _on(window: MaintenanceWindow, moment: datetime) -> bool:
    return not window.days or WEEKDAYS[moment.weekday()] in window.days


def _minutes(text: str) -> int:
    hours, _, minutes = text.partition(":")
    value = int(hours) * 60 + int(minutes)
    if not 0 <= value < 24 * 60:
        raise ValueError(f"{text!r} is no time of day")
    return value
