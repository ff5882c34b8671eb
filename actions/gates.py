"""The gates: each a small function that may object to a proposal, and the context that they look at.

Called by `actions.guard` only. Pure: what a gate needs of the world, the time included, is in `GuardContext`. A gate
answers None (no objection), a `Cap` (the plan may be shown, but at a lower rung of the ladder) or a `Declined`; every
objection has a `Refusal` and a sentence. Comparisons are written so that NaN objects.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Protocol

import msgspec

from actions.breaker import Breaker, keys_of, permits
from actions.catalog import ActionDefinition
from actions.model import AUTONOMY_ORDER, Autonomy, Declined, ParamValue, Refusal
from actions.policy import HOUR, GuardPolicy, granted, group_of, in_maintenance, storm_until
from sandbox.model import EnforcedBy

PID = re.compile(r"\bpid=([0-9]+)")
LOCAL_HOSTS = frozenset({"", "local", "localhost", "127.0.0.1", "::1"})


class ProposalLike(Protocol):
    """What is needed of a proposal. Plain data: remediation never meets diagnosis."""

    @property
    def action(self) -> str: ...
    @property
    def service(self) -> str: ...
    @property
    def params(self) -> Mapping[str, ParamValue]: ...
    @property
    def reason(self) -> str: ...
    @property
    def autonomy_cap(self) -> Autonomy: ...


class Target(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One thing to act on, as `resolve` printed it. `identity` is what breaker, cooldown and rate limits count by."""

    identity: str
    params: dict[str, ParamValue] = {}
    note: str = ""  # for people: what it is and why it is one


class PastLike(Protocol):
    """What is needed of a step that was begun."""

    @property
    def action(self) -> str: ...
    @property
    def target(self) -> str: ...
    @property
    def service(self) -> str: ...
    @property
    def incident(self) -> str: ...
    @property
    def at(self) -> float: ...
    @property
    def active(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class PastAction:
    """One step that was begun, from the journal."""

    action: str
    target: str
    service: str
    incident: str
    at: float  # of the intent
    active: bool = False  # its plan is not final yet


@dataclass(frozen=True, slots=True)
class Claim:
    """What another incident's plan is acting on, or has just been let begin: its service and its resources."""

    incident: str
    service: str
    resources: frozenset[str]  # of `resources_of`, all its steps together


def resources_of(identity: str, params: Mapping[str, ParamValue]) -> frozenset[str]:
    """What two actions on one thing have in common, however each of them names it: the identity, and the process where
    there is one (a program of supervisord and a process group may be the same pid)."""
    pid = params.get("pid", 0)
    named = {f"pid={n}" for n in PID.findall(identity)}
    given = {f"pid={pid}"} if isinstance(pid, int) and pid > 0 else set()
    return frozenset({identity} | named | given)


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardContext:
    """The world as the gates see it. Times are unix seconds."""

    now: float
    incident: str
    cause: str
    posterior: float
    margin: float
    firing: bool
    evidence_at: float  # end of the window that was looked at
    verifiable: bool = False  # whether series justify the action, by which it can be told whether it helped
    verify_at_least: float = 0.0  # seconds before which the series could not show a recovery, whatever an action says
    policy: GuardPolicy
    inventory: Mapping[str, Mapping[str, str]]
    enforced_by: EnforcedBy
    alerts: tuple[str, ...] = ()  # names of the firing alerts
    tenant: str = "default"
    environment: str = ""
    paused: bool = False
    opened: tuple[float, ...] = ()  # when incidents opened, this one too
    history: Sequence[PastLike] = ()
    begun: float | None = None  # when the incident's own plan was made, while it is under way
    breakers: Mapping[str, Breaker] = field(default_factory=dict)
    secrets: Mapping[str, str] = field(default_factory=dict)
    local_hosts: frozenset[str] = LOCAL_HOSTS
    remote_hosts: frozenset[str] = frozenset()  # where steps can run through SSH
    claims: tuple[Claim, ...] = ()  # of other incidents
    callers: Mapping[str, frozenset[str]] = field(default_factory=dict)  # service -> services that need it
    degraded: Mapping[str, frozenset[str]] = field(default_factory=dict)  # service in trouble -> diagnosed causes
    targets: tuple[Target, ...] = ()
    values: Mapping[str, ParamValue] = field(default_factory=dict)  # of all parameters but those of the target

    def others(self) -> tuple[Claim, ...]:
        """What other incidents are acting on now."""
        begun = (
            Claim(p.incident, p.service, resources_of(p.target, {}))
            for p in self.history
            if p.active and p.incident != self.incident
        )
        return (*(c for c in self.claims if c.incident != self.incident), *begun)

    def past(self) -> list[PastLike]:
        """What counts for cooldown and rates. All of a plan under way is one action: its verified steps are no reason
        against its next one."""
        mine, begun = self.incident, math.inf if self.begun is None else self.begun
        return [p for p in self.history if p.incident != mine or not (p.active or p.at >= begun)]


class Cap(msgspec.Struct, frozen=True):
    """The plan may be made, but at no more than this rung."""

    autonomy: Autonomy
    reason: Refusal
    detail: str = ""


Verdict = Declined | Cap | None
Gate = Callable[[ProposalLike, ActionDefinition, GuardContext], Verdict]


def _no(reason: Refusal, detail: str) -> Declined:
    return Declined(reason=reason, detail=detail)


def gate_firing(_: ProposalLike, __: ActionDefinition, context: GuardContext) -> Verdict:
    if context.firing is not True:
        return _no(Refusal.NOT_FIRING, "no alert of the incident is firing: there is nothing to remedy")
    return None


def gate_paused(_: ProposalLike, __: ActionDefinition, context: GuardContext) -> Verdict:
    if context.paused is not False:
        return _no(Refusal.PAUSED, "remediation is paused: `alertmedic resume` ends that")
    return None


def gate_stale_evidence(_: ProposalLike, __: ActionDefinition, context: GuardContext) -> Verdict:
    age, allowed = context.now - context.evidence_at, context.policy.stale_evidence_seconds
    if not -allowed <= age <= allowed:  # from the future: somebody has set the clock back, its age is unknown
        return _no(Refusal.STALE_EVIDENCE, f"the evidence is {age:.0f} s old, at most {allowed:.0f} s are allowed")
    return None


def gate_posterior(_: ProposalLike, __: ActionDefinition, context: GuardContext) -> Verdict:
    if not context.policy.min_posterior <= context.posterior <= 1.0 + 1e-9:
        what = f"posterior {context.posterior:.2f} is below {context.policy.min_posterior:.2f}"
        return Cap("suggest", Refusal.LOW_POSTERIOR, what)
    return None


def gate_margin(_: ProposalLike, __: ActionDefinition, context: GuardContext) -> Verdict:
    if not context.margin >= context.policy.min_margin:
        what = f"the runner-up is only {context.margin:.2f} behind, {context.policy.min_margin:.2f} is asked for"
        return Cap("suggest", Refusal.LOW_MARGIN, what)
    return None


def gate_ladder(proposal: ProposalLike, definition: ActionDefinition, context: GuardContext) -> Verdict:
    level, _, rule = granted(
        context.policy.autonomy,
        action=definition.name,
        service=proposal.service,
        alerts=context.alerts,
        cause=context.cause,
        tenant=context.tenant,
        environment=context.environment,
    )
    if level == "auto":
        return None
    if level not in AUTONOMY_ORDER:
        return _no(Refusal.GATE_ERROR, f"{level!r} is no rung of the ladder")
    reasons: dict[str, Refusal] = {"observe": Refusal.OBSERVE_ONLY, "suggest": Refusal.SUGGEST_ONLY}
    return Cap(level, reasons.get(level, Refusal.NOT_AUTO), f"{rule}: {level}")


def gate_proposal_cap(proposal: ProposalLike, _: ActionDefinition, __: GuardContext) -> Verdict:
    cap = proposal.autonomy_cap
    if cap == "auto":
        return None
    if cap not in AUTONOMY_ORDER:
        return _no(Refusal.GATE_ERROR, f"{cap!r} is no rung of the ladder")
    reasons: dict[str, Refusal] = {"observe": Refusal.OBSERVE_ONLY, "suggest": Refusal.SUGGEST_ONLY}
    return Cap(cap, reasons.get(cap, Refusal.NOT_AUTO), f"the diagnosis proposes it at {cap} only")


def gate_risk(_: ProposalLike, definition: ActionDefinition, __: GuardContext) -> Verdict:
    if definition.risk.auto != "allowed":
        return Cap("approve", Refusal.NOT_AUTO, f"{definition.name} is never done without a person")
    return None


def gate_limits(_: ProposalLike, definition: ActionDefinition, context: GuardContext) -> Verdict:
    if context.enforced_by.limits_enforced:
        return None
    if context.policy.protection != "automatic":
        what = f"protection is required, and the limits are not enforced here ({context.enforced_by})"
        return _no(Refusal.LIMITS_NOT_ENFORCED, what)
    if context.policy.allow_unenforced_auto is True:
        return None
    return Cap("approve", Refusal.LIMITS_NOT_ENFORCED, f"limits not enforced ({context.enforced_by})")


def gate_verifiable(_: ProposalLike, definition: ActionDefinition, context: GuardContext) -> Verdict:
    """What nothing could tell to have helped is not done without a person."""
    if context.verifiable is True or definition.read_only or definition.verify_query:
        return None
    return Cap("approve", Refusal.UNVERIFIABLE, "no series justify it, so nothing could tell whether it helped")


def gate_storm(_: ProposalLike, __: ActionDefinition, context: GuardContext) -> Verdict:
    until = storm_until(context.opened, context.now, context.policy.storm)
    if until is not None:
        storm = context.policy.storm
        what = f"storm: more than {storm.incidents} incidents in {storm.window_seconds:.0f} s; suggestions only"
        return Cap("suggest", Refusal.STORM, f"{what} for another {until - context.now:.0f} s")
    return None


def gate_maintenance(proposal: ProposalLike, __: ActionDefinition, context: GuardContext) -> Verdict:
    window = in_maintenance(context.policy.maintenance, proposal.service, context.now)
    if window is not None:
        return _no(Refusal.MAINTENANCE, f"maintenance window {window.name or '(without name)'} covers this service")
    return None


def gate_host(proposal: ProposalLike, definition: ActionDefinition, context: GuardContext) -> Verdict:
    host = context.inventory[proposal.service].get("host", "")
    if definition.where == "host" and host not in context.local_hosts | context.remote_hosts:
        hint = f"no remote executor is configured (hosts.{host})"
        return _no(Refusal.NOT_LOCAL, f"{proposal.service} runs on {host}, and {hint}")
    return None


def gate_secrets(_: ProposalLike, definition: ActionDefinition, context: GuardContext) -> Verdict:
    absent = [s.name for s in definition.environment if s.required and s.name not in context.secrets]
    if absent:
        return _no(Refusal.NO_INVENTORY, f"secrets that the action needs are not configured: {', '.join(absent)}")
    return None


def gate_protected_service(proposal: ProposalLike, __: ActionDefinition, context: GuardContext) -> Verdict:
    for glob in context.policy.protected.services:
        if fnmatchcase(proposal.service, glob):
            return _no(Refusal.PROTECTED_TARGET, f"the service {proposal.service} is protected ({glob})")
    return None


def gate_targets(_: ProposalLike, definition: ActionDefinition, context: GuardContext) -> Verdict:
    if not context.targets:
        return _no(Refusal.EMPTY_TARGET, "there is nothing to act on")
    allowed = min(definition.max_targets, context.policy.max_targets)
    if len(context.targets) > allowed:
        return _no(Refusal.TOO_MANY_TARGETS, f"{len(context.targets)} targets, at most {allowed} are allowed")
    return None


def gate_protected_target(_: ProposalLike, __: ActionDefinition, context: GuardContext) -> Verdict:
    for target in context.targets:
        for glob in context.policy.protected.targets:
            if fnmatchcase(target.identity, glob):
                return _no(Refusal.PROTECTED_TARGET, f"{target.identity} is protected ({glob})")
    return None


def gate_busy(_: ProposalLike, __: ActionDefinition, context: GuardContext) -> Verdict:
    wanted = frozenset[str]().union(*(resources_of(t.identity, t.params) for t in context.targets))
    for claim in context.others():
        if common := wanted & claim.resources:
            return _no(Refusal.BUSY_TARGET, f"incident {claim.incident} is acting on {min(common)}")
    return None


def gate_blast_radius(proposal: ProposalLike, __: ActionDefinition, context: GuardContext) -> Verdict:
    others, policy, service = context.others(), context.policy, proposal.service
    on_service = {c.incident for c in others if c.service == service}
    if len(on_service) >= policy.max_actions_per_service:
        return _no(Refusal.BLAST_RADIUS, f"{len(on_service)} other incident(s) act on {service} right now")
    services = {c.service for c in others} | {service}
    if len(services) > policy.max_services_at_once:
        busy = ", ".join(sorted(services - {service}))
        return _no(Refusal.BLAST_RADIUS, f"other services are being acted on right now: {busy}")
    return None


def gate_group(proposal: ProposalLike, definition: ActionDefinition, context: GuardContext) -> Verdict:
    """At most so many, or such a share, of a group at once, and enough of it left that is well."""
    found = group_of(context.policy.groups, proposal.service)
    if found is None or definition.read_only:
        return None
    name, group = found

    def within(services: Iterable[str]) -> set[str]:
        return {s for s in services if any(fnmatchcase(s, glob) for glob in group.services)}

    acting = within(c.service for c in context.others()) | {proposal.service}
    members = within(context.inventory) | acting
    if len(acting) > group.max_at_once:
        what = f"{len(acting)} services of the group {name} would be acted on, at most {group.max_at_once} may be"
        return _no(Refusal.BLAST_RADIUS, what)
    share = 100.0 * len(acting) / len(members)
    if not share <= group.max_percent:
        what = f"{share:.0f} % of the group {name} would be acted on, at most {group.max_percent:g} % may be"
        return _no(Refusal.BLAST_RADIUS, what)
    well = members - acting - set(context.degraded)
    if len(well) < group.min_healthy:
        what = f"only {len(well)} of the group {name} would be left untouched and well, {group.min_healthy} must be"
        return _no(Refusal.MIN_HEALTHY, what)
    return None


def gate_dependents(proposal: ProposalLike, definition: ActionDefinition, context: GuardContext) -> Verdict:
    """What others need is not taken away from them while they are in trouble of their own. Trouble that has this very
    service for its diagnosed cause is no reason: ending it is what the action is for."""
    if definition.read_only or definition.risk.blast_radius in ("none", "session"):
        return None
    needing = context.callers.get(proposal.service, frozenset())
    hurt = sorted(s for s in needing if s in context.degraded and proposal.service not in context.degraded[s])
    if hurt:
        what = f"{', '.join(hurt[:3])} need(s) {proposal.service} and is in trouble of its own: a person decides"
        return Cap("approve", Refusal.DEPENDENTS_DEGRADED, what)
    return None


def gate_cooldown(_: ProposalLike, definition: ActionDefinition, context: GuardContext) -> Verdict:
    past = [p for p in context.past() if p.action == definition.name]
    for target in context.targets:
        mine = [p for p in past if p.target == target.identity]
        last = max((p.at for p in mine), default=None)
        if last is not None and context.now - last < context.policy.cooldown_seconds:
            ago, left = context.now - last, context.policy.cooldown_seconds - (context.now - last)
            return _no(Refusal.COOLDOWN, f"{target.identity} had this action {ago:.0f} s ago; {left:.0f} s left")
    return None


def gate_rate(_: ProposalLike, definition: ActionDefinition, context: GuardContext) -> Verdict:
    recent = [p for p in context.past() if context.now - p.at < HOUR]
    policy, new = context.policy, len(context.targets)
    same_action = sum(p.action == definition.name for p in recent)
    if same_action + new > policy.actions_per_action_per_hour:
        return _no(Refusal.RATE_LIMIT, f"{definition.name} ran {same_action} time(s) within the hour")
    for target in context.targets:
        same_target = sum(p.target == target.identity for p in recent)
        if same_target + 1 > policy.actions_per_target_per_hour:
            return _no(Refusal.RATE_LIMIT, f"{target.identity} was acted on {same_target} time(s) within the hour")
    if len(recent) + new > policy.actions_per_hour:
        return _no(Refusal.RATE_LIMIT, f"{len(recent)} action(s) within the hour over everything")
    return None


def gate_breaker(_: ProposalLike, definition: ActionDefinition, context: GuardContext) -> Verdict:
    for target in context.targets:
        for key in keys_of(definition.name, target.identity):
            breaker = context.breakers.get(key)
            if breaker is not None and not permits(breaker, context.policy.breaker, context.now):
                left = max(0.0, breaker.open_until - context.now)
                return _no(Refusal.BREAKER_OPEN, f"the breaker {key} is {breaker.state} for another {left:.0f} s")
    return None


BEFORE_TARGETS: tuple[Gate, ...] = (
    gate_firing,
    gate_paused,
    gate_maintenance,
    gate_stale_evidence,
    gate_protected_service,
    gate_host,
    gate_secrets,
    gate_limits,
    gate_ladder,
    gate_proposal_cap,
)
AT_START: tuple[Gate, ...] = (
    gate_firing,
    gate_paused,
    gate_maintenance,
    gate_protected_service,
    gate_host,
    gate_secrets,
    gate_limits,
    gate_ladder,
    gate_storm,
    gate_protected_target,
    gate_busy,
    gate_blast_radius,
    gate_group,
    gate_dependents,
    gate_cooldown,
    gate_rate,
    gate_breaker,
)
GATES: tuple[Gate, ...] = (
    *BEFORE_TARGETS,
    gate_risk,
    gate_posterior,
    gate_margin,
    gate_verifiable,
    gate_storm,
    gate_targets,
    gate_protected_target,
    gate_busy,
    gate_blast_radius,
    gate_group,
    gate_dependents,
    gate_cooldown,
    gate_rate,
    gate_breaker,
)
