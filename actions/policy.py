"""What people allow: the ladder, thresholds, limits on how much and how often, and times of rest.

`agent.config` fills these from the configuration, `actions.guard` reads them. Pure: the time is always passed in.
Defaults are the careful ones; nothing here acts.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from typing import Annotated, Literal

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


class AutonomyRule(_Policy, frozen=True, kw_only=True):
    """Globs (fnmatch, case-sensitive) that must all match, and the autonomy then granted."""

    autonomy: Autonomy
    action: str = "*"
    service: str = "*"
    alert: str = "*"  # matches when any firing alert's name does
    cause: str = "*"
    tenant: str = "*"
    environment: str = "*"


class AutonomyPolicy(_Policy, frozen=True, kw_only=True):
    """The first rule that matches decides; without one, `default`."""

    default: Autonomy = "suggest"
    rules: tuple[AutonomyRule, ...] = ()


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
    max_services_at_once: Count = 1  # services that are being acted on at one time
    max_actions_per_service: Count = 1  # plans under way on one service
    max_actions_per_group: Count = 1  # plans under way on one group of services
    approval_ttl_seconds: Seconds = 1800.0
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
) -> tuple[Autonomy, str]:
    """The autonomy that the first matching rule grants, and which rule that was, in words."""
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
            return rule.autonomy, f"autonomy rule {i + 1}"
    return policy.default, "default autonomy"


def storm_until(opened: Sequence[float], now: float, policy: StormPolicy) -> float | None:
    """When the present storm ends if no further incident opens, or None when there is none.

    `opened`: times at which incidents opened, in any order. A storm lasts from the moment at which more than
    `policy.incidents` lie within the window until the cooldown after the last moment at which they did.
    """
    times = sorted(t for t in opened if t <= now)
    end: float | None = None
    for i in range(policy.incidents, len(times)):
        first, last = times[i - policy.incidents], times[i]
        if last - first < policy.window_seconds:
            crowded_until = first + policy.window_seconds
            end = max(end or 0.0, crowded_until + policy.cooldown_seconds)
    return end if end is not None and now < end else None


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
