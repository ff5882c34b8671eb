"""May this run? Turns a proposal into a `Plan` or a `Declined`.

`agent.investigate` calls `consider` with the best hypothesis' proposal, and `recheck` right before a plan's steps begin
(a plan may have waited for a person). `decide`, `recheck` and `approval_valid` are pure: what they need of the world is
in `GuardContext`, the time included. A gate that cannot be evaluated declines. Nothing here has an effect:
`resolve_targets` and `check_preconditions` run the read-only commands that the action states, in the sandbox.
"""

from __future__ import annotations

import base64
import hashlib
import os
import shlex
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import msgspec

from actions.builtin import NOTHING_DONE
from actions.catalog import ActionDefinition, Catalog
from actions.gates import (
    AT_START,
    BEFORE_TARGETS,
    GATES,
    LOCAL_HOSTS,
    Cap,
    Claim,
    Gate,
    GuardContext,
    PastAction,
    ProposalLike,
    Target,
    resources_of,
)
from actions.model import AUTONOMY_ORDER, Autonomy, Declined, ParamValue, Plan, Refusal, Step
from actions.parameters import ParameterError, render
from actions.policy import GuardPolicy, granted, least
from sandbox.failpoint import failpoint
from sandbox.model import Limits, Needs, RunResult

__all__ = [
    "LOCAL_HOSTS",
    "ApprovalLike",
    "Cap",
    "Claim",
    "GuardContext",
    "PastAction",
    "ProposalLike",
    "SandboxRun",
    "Target",
    "approval_valid",
    "check_preconditions",
    "consider",
    "decide",
    "describe",
    "differs",
    "dry_run",
    "early_values",
    "make_step",
    "plan_id",
    "plan_variables",
    "recheck",
    "rendered",
    "resolve_targets",
    "resources_of",
    "taken",
]

# Reading commands get what a step gets, but never more time.
READ_SECONDS = 20.0
MAX_NOTES = 8

SandboxRun = Callable[[tuple[str, ...], Limits, Mapping[str, str], Needs], Awaitable[RunResult]]
"""Runs a read-only argv in the sandbox with these limits, secrets (names and values) and needs."""


class ApprovalLike(Protocol):
    """What is needed of a person's decision."""

    @property
    def at(self) -> float: ...
    @property
    def plan(self) -> str: ...
    @property
    def digest(self) -> str: ...
    @property
    def decision(self) -> str: ...


async def consider(
    proposal: ProposalLike,
    catalog: Catalog,
    context: GuardContext,
    run: SandboxRun,
    on_host: Callable[[str], SandboxRun] | None = None,
) -> Plan | Declined:
    """The whole way from a proposal to a plan: choose the variant, check parameters, pass the gates that need no
    target, look up the targets, check the preconditions, pass all gates. Never raises for what it was given."""
    definition = catalog.choose(proposal.action, context.inventory.get(proposal.service))
    if isinstance(definition, Declined):
        return definition
    values = early_values(proposal, definition, context)
    if isinstance(values, Declined):
        return values
    context = replace(context, values=values)
    early = _pass(BEFORE_TARGETS, proposal, definition, context)
    if refused := early if isinstance(early, Declined) else _too_low(early, definition):
        return refused
    secrets = {s.name: context.secrets[s.name] for s in definition.environment if s.name in context.secrets}
    if (host := host_of(proposal.service, definition, context)) and on_host is not None:
        run = on_host(host)  # what is looked at is what would be acted on
    targets = await resolve_targets(definition, values, run, secrets)
    if isinstance(targets, Declined):
        return targets
    if failed := await check_preconditions(definition, values, run, secrets):
        return failed
    plan = decide(proposal, definition, replace(context, targets=targets))
    failpoint("guard_after_plan")
    return plan


def decide(proposal: ProposalLike, definition: ActionDefinition, context: GuardContext) -> Plan | Declined:
    """The plan that all gates let through, at the rung that they leave, or the first refusal.

    `context.targets` and `context.values` must be filled in. A plan at `suggest` or below is complete too (people see
    the exact argv), it only does not go on by itself.
    """
    caps = _pass(GATES, proposal, definition, context)
    if isinstance(caps, Declined):
        return caps
    steps: list[Step] = []
    for target in context.targets:
        step = make_step(definition, context.values, target, host_of(proposal.service, definition, context))
        if isinstance(step, Declined):
            return step
        steps.append(step)
    if refused := _too_low(caps, definition):
        return refused
    autonomy = least("auto", *(cap.autonomy for cap in caps))
    caps.sort(key=lambda c: AUTONOMY_ORDER.index(c.autonomy))
    notes = [c.detail for c in caps if c.detail] + [t.note for t in context.targets if t.note]
    if not context.enforced_by.limits_enforced:
        notes.append(f"limits not enforced ({context.enforced_by})")
    return Plan(
        id=plan_id(context.incident, tuple(steps), context.now),
        incident=context.incident,
        service=proposal.service,
        cause=context.cause,
        steps=tuple(steps),
        autonomy=autonomy,
        persons=max(definition.risk.persons, _persons(proposal, definition, context)),
        verify=definition.verify,
        verify_seconds=max(definition.verify_seconds, context.verify_at_least),
        verify_query=definition.verify_query,
        made_at=context.now,
        expires_at=context.now + context.policy.approval_ttl_seconds,
        reason=proposal.reason,
        notes=tuple(dict.fromkeys(notes))[:MAX_NOTES],
        demoted_by=tuple(dict.fromkeys(c.reason for c in caps)),
    )


def _persons(proposal: ProposalLike, definition: ActionDefinition, context: GuardContext) -> int:
    """How many people must approve it, by the ladder."""
    return granted(
        context.policy.autonomy,
        action=definition.name,
        service=proposal.service,
        alerts=context.alerts,
        cause=context.cause,
        tenant=context.tenant,
        environment=context.environment,
    ).persons


def taken(plan: Plan, policy: GuardPolicy, now: float) -> Plan | Declined:
    """The request that a person makes of a suggestion: the same steps, and so the same digest, which now wait for
    approval. All gates that time may have closed are asked before it begins, as of every plan."""
    action = plan.steps[0].action if plan.steps else ""
    if plan.autonomy != "suggest" or not policy.approve_suggestions:
        what = "it is only suggested, and the policy lets nobody approve suggestions (guard.approve_suggestions)"
        return Declined(reason=Refusal.SUGGEST_ONLY, detail=what, action=action)
    if not now < plan.expires_at:
        return Declined(reason=Refusal.APPROVAL_EXPIRED, detail="the suggestion has expired", action=action)
    return msgspec.structs.replace(plan, id=plan_id(plan.incident, plan.steps, now), autonomy="approve", made_at=now)


def recheck(plan: Plan, definition: ActionDefinition | None, context: GuardContext) -> Declined | None:
    """The gates that time may have closed since the plan was made, for use right before a step begins. `context.now`,
    firing, pause, history and breakers must be fresh; a person's approval does not open any of these."""
    if definition is None:
        what = "the catalogue has no such action any more"
        return Declined(reason=Refusal.UNKNOWN_ACTION, detail=what, action=plan.steps[0].action)
    if definition.version != plan.steps[0].version:
        what = f"planned with version {plan.steps[0].version}, now it is {definition.version}"
        return Declined(reason=Refusal.APPROVAL_STALE, detail=what, action=definition.name)
    proposal = _Planned(definition.name, plan.service, plan.reason)
    targets = tuple(Target(identity=s.target, params=s.params) for s in plan.steps)
    context = replace(context, incident=plan.incident, cause=plan.cause, targets=targets)
    verdict = _pass(AT_START, proposal, definition, context)
    if isinstance(verdict, Declined):
        return verdict
    # Between plan and step the agent may have been restarted with a policy that allows less.
    if refused := _too_low(verdict, definition):
        return refused
    # Caps say "not by itself": they bind a plan that goes on by itself, a person has decided otherwise.
    if plan.autonomy == "auto" and verdict:
        return Declined(reason=verdict[0].reason, detail=verdict[0].detail, action=definition.name)
    return None


def differs(waiting: Plan, fresh: Plan, definition: ActionDefinition | None) -> str:
    """What a newer look's plan has that the waiting one has not, "" where both do the same to the same targets for the
    same cause, on the same terms. That they were made at different times is no difference; what people read beside a
    plan (reason, notes, the gates that demoted it) is none either. What cannot be compared differs."""
    if (waiting.cause, waiting.service) != (fresh.cause, fresh.service):
        return f"the cause is {fresh.cause} on {fresh.service} now, not {waiting.cause} on {waiting.service}"
    if [s.action for s in waiting.steps] != [s.action for s in fresh.steps]:
        return f"the action is {_names(s.action for s in fresh.steps)} now"
    before, now = [s.target for s in waiting.steps], [s.target for s in fresh.steps]
    if before != now:
        return f"the target is {_names(now)} now, not {_names(before)}"
    try:
        steps = tuple(_made_at(f, w, definition) for f, w in zip(fresh.steps, waiting.steps, strict=True))
    except (ParameterError, KeyError) as error:
        return f"the steps cannot be compared: {error}"
    if steps != waiting.steps:
        return "the steps have other parameters or limits now"
    terms = ("autonomy", "persons", "verify", "verify_seconds", "verify_query")
    changed = [name for name in terms if getattr(waiting, name) != getattr(fresh, name)]
    return f"{_names(changed)} changed" if changed else ""


def _made_at(fresh: Step, waiting: Step, definition: ActionDefinition | None) -> Step:
    """The fresh step as it would have been when the waiting one was made."""
    declared = definition.parameters if definition is not None and definition.name == fresh.action else {}
    moments = [n for n, p in declared.items() if p.origin == "plan" and p.source_key == "planned_at"]
    if definition is None or not moments:
        return fresh
    params = {**fresh.params, **{n: waiting.params[n] for n in moments}}
    return msgspec.structs.replace(
        fresh,
        params=params,
        argv=rendered(definition.argv, params, definition),
        check=rendered(definition.check, params, definition),
        undo=rendered(definition.undo, params, definition),
    )


def _names(names: Iterable[str]) -> str:
    return _shorten(", ".join(names))


def approval_valid(plan: Plan, approval: ApprovalLike, now: float) -> Declined | None:
    """None when the decision lets the plan begin at `now`. It is bound to the plan, to the digest of its exact steps,
    and to the time until the plan expires. A suggestion waits for nobody: `taken` makes a request of it first."""
    action = plan.steps[0].action if plan.steps else ""
    if approval.plan != plan.id or approval.digest != plan.digest:
        what = "the decision is about another plan: look at it again and decide anew"
        return Declined(reason=Refusal.APPROVAL_STALE, detail=what, action=action)
    if approval.decision != "approve":
        return Declined(reason=Refusal.APPROVAL_REJECTED, detail="a person rejected it", action=action)
    if not (plan.made_at <= approval.at < plan.expires_at and now < plan.expires_at):
        what = "the plan expired before it was approved and begun"
        return Declined(reason=Refusal.APPROVAL_EXPIRED, detail=what, action=action)
    if plan.autonomy not in ("approve", "auto"):
        return Declined(reason=Refusal.SUGGEST_ONLY, detail="the plan is a suggestion, not a request", action=action)
    return None


def early_values(
    proposal: ProposalLike, definition: ActionDefinition, context: GuardContext
) -> dict[str, ParamValue] | Declined:
    """Checked values of every parameter that does not come from the target. A proposal's parameter that the action
    does not declare is ignored: a family's variants need not all use it."""
    return definition.values(
        {
            "proposal": proposal.params,
            "inventory": context.inventory.get(proposal.service, {}),
            "plan": plan_variables(proposal.service, context),
        }
    )


def plan_variables(service: str, context: GuardContext) -> dict[str, ParamValue]:
    """What an action may ask of the plan itself (`from: plan`). Lists are comma-separated."""
    protected = context.policy.protected
    ports = sorted({int(e["listen_port"]) for e in context.inventory.values() if e.get("listen_port", "").isdecimal()})
    return {
        "incident": context.incident,
        "service": service,
        "planned_at": context.now,
        "agent_pid": os.getpid(),
        "known_ports": ",".join(map(str, ports)),
        "protected_processes": ",".join(protected.processes),
        "protected_users": ",".join(protected.users),
        "protected_paths": ",".join(protected.paths),
    }


async def resolve_targets(
    definition: ActionDefinition,
    params: Mapping[str, ParamValue],
    run: SandboxRun,
    secrets: Mapping[str, str] | None = None,
) -> tuple[Target, ...] | Declined:
    """The action's targets: those its read-only look-up prints, or the one that its `target` template names.

    An empty list is EMPTY_TARGET (there is nothing to do), more than the action allows TOO_MANY_TARGETS; everything
    else than a well-formed list is RESOLVE_FAILED.
    """

    def declined(reason: Refusal, detail: str) -> Declined:
        return Declined(reason=reason, detail=detail, action=definition.name)

    if not definition.resolve:
        try:
            (identity,) = render([definition.target], params, definition.parameters, _specials())
        except (ParameterError, ValueError) as error:
            return declined(Refusal.BAD_PARAMETERS, str(error))
        return (Target(identity=identity),)
    result = await _read(definition.resolve, definition, params, run, secrets or {})
    if isinstance(result, Declined):
        return result
    if result.exit_code == NOTHING_DONE:
        return declined(Refusal.PROTECTED_TARGET, f"the target must not be touched: {describe(result)}")
    if not result.ok or result.stdout_dropped:
        return declined(Refusal.RESOLVE_FAILED, f"the look-up of targets failed: {describe(result)}")
    try:
        targets = msgspec.json.decode(result.stdout, type=tuple[Target, ...])
    except msgspec.DecodeError as error:
        return declined(Refusal.RESOLVE_FAILED, f"the look-up of targets printed no list of targets: {error}")
    if not targets:
        return declined(Refusal.EMPTY_TARGET, "the look-up found nothing to act on")
    if len(targets) > definition.max_targets:
        what = f"{len(targets)} targets, this action takes at most {definition.max_targets}"
        return declined(Refusal.TOO_MANY_TARGETS, what)
    identities = [t.identity for t in targets]
    if len(set(identities)) < len(identities) or not all(_plain(t) and len(t) <= 200 for t in identities):
        return declined(Refusal.RESOLVE_FAILED, "the look-up of targets printed an identity twice or an unusable one")
    return tuple(msgspec.structs.replace(t, note=_shorten(t.note)) for t in targets)


async def check_preconditions(
    definition: ActionDefinition,
    params: Mapping[str, ParamValue],
    run: SandboxRun,
    secrets: Mapping[str, str] | None = None,
) -> Declined | None:
    """The first precondition that does not hold or cannot be checked."""
    for condition in definition.preconditions:
        result = await _read(condition.argv, definition, params, run, secrets or {})
        if isinstance(result, Declined):
            return result
        if not result.ok:
            what = f"does not hold: {condition.text} ({describe(result)})"
            return Declined(reason=Refusal.PRECONDITION_FAILED, detail=what, action=definition.name)
    return None


def host_of(service: str, definition: ActionDefinition, context: GuardContext) -> str:
    """The remote host that the action runs on; "" for this one."""
    host = context.inventory.get(service, {}).get("host", "")
    return host if definition.where == "host" and host in context.remote_hosts else ""


def make_step(
    definition: ActionDefinition, values: Mapping[str, ParamValue], target: Target, host: str = ""
) -> Step | Declined:
    """The exact step for one target: nothing is left to fill in. Its digest covers every argument."""
    from_target = definition.values({"target": target.params})
    if isinstance(from_target, Declined):
        return from_target
    params = {**values, **from_target}

    def argv(template: tuple[str, ...]) -> tuple[str, ...]:
        return render(template, params, definition.parameters, _specials())

    try:
        return Step(
            action=definition.name,
            version=definition.version,
            target=target.identity,
            argv=argv(definition.argv),
            check=argv(definition.check),
            undo=argv(definition.undo),
            environment=tuple(s.name for s in definition.environment),
            descriptors=tuple(s.name for s in definition.environment if s.by == "descriptor"),
            limits=definition.limits,
            needs=definition.needs,
            user=definition.user,
            host=host,
            idempotent=definition.idempotent,
            read_only=definition.read_only,
            params=params,
        )
    except (ParameterError, KeyError) as error:
        return Declined(reason=Refusal.BAD_PARAMETERS, detail=str(error), action=definition.name)


def rendered(
    template: tuple[str, ...], values: Mapping[str, ParamValue], definition: ActionDefinition
) -> tuple[str, ...]:
    """The argv of one of the action's templates. Raises ParameterError and KeyError."""
    return render(template, values, definition.parameters, _specials())


def dry_run(step: Step) -> str:
    """What the step would execute, quoted so that a person may paste it into a shell. We never do."""
    return shlex.join(step.argv)


def plan_id(incident: str, steps: tuple[Step, ...], made_at: float) -> str:
    """`plan-` and 12 characters that depend on what is planned and when, so that a replay makes the same id."""
    body = msgspec.json.encode([incident, steps, made_at], order="sorted")
    return "plan-" + base64.b32encode(hashlib.blake2b(body, digest_size=10).digest()).decode().lower()[:12]


def describe(result: RunResult) -> str:
    """One line on how a run ended."""
    if result.error:
        return f"not started: {result.error}"
    if result.timed_out:
        return f"no end after {result.seconds:.1f} s"
    if result.oom_killed:
        return "out of memory"
    how = f"signal {result.signal}" if result.signal is not None else f"exit code {result.exit_code}"
    lines = (result.stderr.strip() or result.stdout.strip()).splitlines()
    return f"{how}: {_shorten(lines[-1])}" if lines else how


@dataclass(frozen=True, slots=True)
class _Planned:
    """A plan's action in the shape of a proposal, for the gates of `recheck`."""

    action: str
    service: str
    reason: str
    params: Mapping[str, ParamValue] = field(default_factory=dict)
    autonomy_cap: Autonomy = "auto"


def _pass(
    gates: tuple[Gate, ...], proposal: ProposalLike, definition: ActionDefinition, context: GuardContext
) -> list[Cap] | Declined:
    """The first refusal, else every cap. A gate that fails to answer is a refusal."""
    caps: list[Cap] = []
    for gate in gates:
        try:
            verdict = gate(proposal, definition, context)
        except (ValueError, TypeError, KeyError, ArithmeticError, AttributeError) as error:
            what = f"the gate {gate.__name__} could not be evaluated: {error}"
            return Declined(reason=Refusal.GATE_ERROR, detail=what, action=definition.name)
        if isinstance(verdict, Declined):
            return msgspec.structs.replace(verdict, action=definition.name)
        if verdict is not None:
            caps.append(verdict)
    return caps


def _too_low(caps: list[Cap], definition: ActionDefinition) -> Declined | None:
    """Where people only want to observe, not even a plan is made."""
    low = [c.detail for c in caps if c.autonomy == "observe"]
    return Declined(reason=Refusal.OBSERVE_ONLY, detail="; ".join(low), action=definition.name) if low else None


async def _read(
    template: tuple[str, ...],
    definition: ActionDefinition,
    params: Mapping[str, ParamValue],
    run: SandboxRun,
    secrets: Mapping[str, str],
) -> RunResult | Declined:
    limits = definition.limits
    limits = msgspec.structs.replace(limits, timeout_seconds=min(limits.timeout_seconds, READ_SECONDS))
    try:
        argv = render(template, params, definition.parameters, _specials())
        return await run(argv, limits, secrets, definition.needs)
    except (ParameterError, KeyError) as error:
        return Declined(reason=Refusal.BAD_PARAMETERS, detail=str(error), action=definition.name)
    except (OSError, RuntimeError, ValueError) as error:
        what = f"the sandbox could not run the look-up: {error}"
        return Declined(reason=Refusal.RESOLVE_FAILED, detail=what, action=definition.name)


def _specials() -> dict[str, str]:
    return {"python": sys.executable}


def _plain(text: str) -> bool:
    return bool(text) and text.isprintable()


def _shorten(text: str, limit: int = 200) -> str:
    shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"
