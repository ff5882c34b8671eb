"""The shapes of remediation: definitions, plans, steps and their state machine.

`actions.catalog` loads `ActionDefinition`s, `actions.guard` turns a proposal into a `Plan` or a `Declined`,
`actions.runner` moves its steps along `STEP_MOVES`, `agent` journals every `StepMoved`. Nothing here does anything.
"""

from __future__ import annotations

import hashlib
from enum import StrEnum
from typing import Literal

import msgspec

from sandbox.model import Limits, Needs, RunResult

ParamValue = str | int | float | bool
Autonomy = Literal["observe", "suggest", "approve", "auto"]
AUTONOMY_ORDER: tuple[Autonomy, ...] = ("observe", "suggest", "approve", "auto")


class StepState(StrEnum):
    PLANNED = "planned"
    INTENT = "intent"  # announced in the journal; the effect may or may not have happened
    RAN = "ran"
    VERIFIED = "verified"
    FAILED = "failed"  # exit code, timeout, OOM
    UNKNOWN = "unknown"  # a crash in intent or undoing; `check` decides
    UNDOING = "undoing"
    UNDONE = "undone"
    UNDO_FAILED = "undo_failed"
    HANDED_OVER = "handed_over"  # a person has it now
    DENIED = "denied"
    EXPIRED = "expired"
    CANCELLED = "cancelled"


_S = StepState
STEP_MOVES: dict[StepState, frozenset[StepState]] = {
    _S.PLANNED: frozenset({_S.INTENT, _S.DENIED, _S.EXPIRED, _S.CANCELLED}),
    _S.INTENT: frozenset({_S.RAN, _S.FAILED, _S.UNKNOWN}),
    _S.RAN: frozenset({_S.VERIFIED, _S.UNDOING, _S.HANDED_OVER}),
    _S.FAILED: frozenset({_S.UNDOING, _S.HANDED_OVER}),
    _S.UNKNOWN: frozenset({_S.RAN, _S.PLANNED, _S.UNDONE, _S.HANDED_OVER}),
    _S.UNDOING: frozenset({_S.UNDONE, _S.UNDO_FAILED, _S.UNKNOWN}),
    _S.UNDO_FAILED: frozenset({_S.HANDED_OVER}),
    _S.VERIFIED: frozenset({_S.UNDOING}),  # a later step of the plan failed: undo in reverse
    _S.UNDONE: frozenset(),
    _S.HANDED_OVER: frozenset(),
    _S.DENIED: frozenset(),
    _S.EXPIRED: frozenset(),
    _S.CANCELLED: frozenset(),
}
STEP_FINAL = frozenset(s for s, after in STEP_MOVES.items() if not after) | {_S.VERIFIED}


class IllegalMove(ValueError):  # noqa: N818 - a name used everywhere by now
    """A move outside the table: a bug, never a situation."""


def check_move(before: StepState, after: StepState) -> None:
    """Raises IllegalMove unless `before -> after` is in STEP_MOVES."""
    if after not in STEP_MOVES[before]:
        raise IllegalMove(f"step: {before} -> {after} is not in the table")


class Refusal(StrEnum):
    """Why nothing was (or will be) done. Also the metric label and the words in the story."""

    NO_PROPOSAL = "no_proposal"
    UNKNOWN_ACTION = "unknown_action"
    BAD_PARAMETERS = "bad_parameters"
    NO_INVENTORY = "no_inventory"  # the service's entry lacks what the action needs
    EMPTY_TARGET = "empty_target"
    TOO_MANY_TARGETS = "too_many_targets"
    NOT_LOCAL = "not_local"
    PROTECTED_TARGET = "protected_target"
    NOT_FIRING = "not_firing"
    STALE_EVIDENCE = "stale_evidence"
    LOW_POSTERIOR = "low_posterior"
    LOW_MARGIN = "low_margin"
    OBSERVE_ONLY = "observe_only"
    SUGGEST_ONLY = "suggest_only"
    NOT_AUTO = "not_auto"  # the action's risk forbids auto; a person must approve
    PAUSED = "paused"
    STORM = "storm"
    MAINTENANCE = "maintenance"
    COOLDOWN = "cooldown"
    RATE_LIMIT = "rate_limit"
    BLAST_RADIUS = "blast_radius"
    MIN_HEALTHY = "min_healthy"  # too few of the group would be left untouched and well
    DEPENDENTS_DEGRADED = "dependents_degraded"  # what needs the service is in trouble of its own
    BUSY_TARGET = "busy_target"  # another incident is acting on it
    BREAKER_OPEN = "breaker_open"
    LIMITS_NOT_ENFORCED = "limits_not_enforced"
    UNVERIFIABLE = "unverifiable"  # no series justified it, so none could tell whether it helped
    APPROVAL_EXPIRED = "approval_expired"
    APPROVAL_REJECTED = "approval_rejected"
    APPROVAL_STALE = "approval_stale"  # the plan's digest is not the approved one
    RESOLVED_BEFORE_START = "resolved_before_start"
    RESOLVE_FAILED = "resolve_failed"  # the action's read-only target look-up failed
    PRECONDITION_FAILED = "precondition_failed"  # a precondition the action states does not hold
    GATE_ERROR = "gate_error"  # a gate could not be evaluated: fails closed


class Step(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One exact thing to do: nothing is left to be filled in when it runs."""

    action: str
    version: int
    target: str  # identity, `service=worker` or `pid=12,start=1700000000.12`
    argv: tuple[str, ...]
    check: tuple[str, ...] = ()  # exit 0: it has happened; 1: it has not; anything else: cannot tell
    undo: tuple[str, ...] = ()  # empty: the action states `undo: none`
    environment: tuple[str, ...] = ()  # names of variables handed through (secrets stay out of the journal)
    descriptors: tuple[str, ...] = ()  # those of them that come by descriptor: the variable NAME_FD holds its number
    limits: Limits = Limits()
    needs: Needs = Needs()
    user: str = ""
    host: str = ""  # where it runs, by the name in the inventory; "": here
    idempotent: bool = False
    read_only: bool = False
    params: dict[str, ParamValue] = {}


class Plan(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What would be done for an incident, with the autonomy it was granted. Approvals bind to `digest`."""

    id: str
    incident: str
    service: str
    cause: str
    steps: tuple[Step, ...]
    autonomy: Autonomy  # `approve`: waits for a person; `auto`: goes on
    persons: int = 1  # that must approve it, where it waits for approval
    verify: Literal["each", "last"] = "last"
    verify_seconds: float = 60.0
    verify_query: str = ""  # PromQL that must answer with something, besides the series that justified the plan
    made_at: float
    expires_at: float
    reason: str = ""
    notes: tuple[str, ...] = ()  # "limits not enforced (rlimits only)", alternatives passed over
    demoted_by: tuple[Refusal, ...] = ()  # the gates that kept it below `auto`, hardest first

    @property
    def digest(self) -> str:
        return plan_digest(self.id, self.incident, self.steps)

    @property
    def steps_digest(self) -> str:
        """As older journals have it in their decisions: without the plan's id."""
        return _digest([self.incident, self.steps])


def plan_digest(plan: str, incident: str, steps: tuple[Step, ...]) -> str:
    """Over plan, incident and each step's exact argv, target, check, undo, user and limits. The plan's id is in it, so
    that a decision on one plan, sent again, is none on a later plan of the same steps."""
    return _digest([plan, incident, steps])


def _digest(of: list[object]) -> str:
    return hashlib.blake2b(msgspec.json.encode(of, order="sorted"), digest_size=16).hexdigest()


class Declined(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    reason: Refusal
    detail: str = ""
    action: str = ""


class StepMoved(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One move of one step, as journalled. Intent is durable before the effect, the result after it."""

    incident: str
    plan: str
    step: int  # index in Plan.steps
    before: StepState
    after: StepState
    at: float
    reason: str = ""
    result: RunResult | None = None
    leaf: str = ""  # cgroup leaf of the run, so that a restart can find and kill it
    snapshot: str = ""  # fault snapshot kept before the intent, by file name
    refusal: Refusal | None = None  # with denied, expired, cancelled: which gate it was
    stop: bool = False  # with handed_over: nothing more of this plan happens by itself, not even undoing


class BreakerState(StrEnum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class BreakerCall(msgspec.Struct, frozen=True, array_like=True):
    """One ended call that a breaker remembers."""

    at: float
    ok: bool
    slow: bool = False


class BreakerMoved(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A breaker's whole state after one event: the newest record of a key is all that a restart needs. `before` equals
    `after` where only the counts changed."""

    key: str  # "action" or "action|target"
    before: BreakerState
    after: BreakerState
    at: float
    reason: str = ""
    open_until: float = 0.0
    opened_count: int = 0
    consecutive: int = 0  # failures in a row
    probe_at: float = 0.0  # when the probe under way began; 0: none is
    calls: tuple[BreakerCall, ...] = ()  # within the window, oldest first
