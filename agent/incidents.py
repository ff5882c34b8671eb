"""Records become incidents: the pure fold, the merging policy, and the check of a record before it becomes durable.

`agent.store` calls `apply` once per record in order of sequence number, at replay and live; the same records always
make the same state. `check` is asked before a record is written, so that an illegal move never becomes durable. Nothing
here reads a clock, a file or the network: time is the records' own, and the merging policy (`agent.fold_merge`) is
journalled in `AgentStarted`. The shapes are in `agent.fold_model` and `agent.fold_state`; import them from here.
"""

from __future__ import annotations

from typing import assert_never

import msgspec

from actions.model import STEP_FINAL, IllegalMove, Refusal, StepState
from actions.model import check_move as check_step_move
from agent import fold_changes, fold_learning
from agent import fold_story as story
from agent.alerts import UsualPayload, decode_usual, usual_alerts
from agent.fold_changes import ChangeTold
from agent.fold_gateway import ChannelMoved, GatewayCompared, GatewayJudged
from agent.fold_merge import Merge
from agent.fold_model import (
    FINAL,
    INCIDENT_MOVES,
    MAX_MOVES,
    MAX_PAST,
    MAY_START,
    UNSETTLED,
    ActionStart,
    Approval,
    Changes,
    Current,
    Incident,
    IncidentState,
    PastPlan,
    PlanState,
    Refused,
    StepView,
    StoryLine,
    check_move,
    incident_id,
    person_of,
)
from agent.fold_state import MAX_QUARANTINE, FrozenState, State, StateError, UnsettledStep
from agent.journal.records import (
    AgentStarted,
    AlertQuarantined,
    AlertsReceived,
    ApprovalGiven,
    BreakerRecorded,
    Diagnosed,
    FeedbackGiven,
    IncidentMoved,
    ModelChosen,
    ModelMade,
    Noted,
    PauseSet,
    PayloadReceived,
    PlanConfirmed,
    PlanDeclined,
    PlanMade,
    Record,
    StepRecorded,
    Stored,
)

__all__ = [
    "FINAL",
    "INCIDENT_MOVES",
    "UNSETTLED",
    "ActionStart",
    "Approval",
    "Changes",
    "Current",
    "FrozenState",
    "Incident",
    "IncidentState",
    "PastPlan",
    "PlanState",
    "Refused",
    "State",
    "StateError",
    "StepView",
    "StoryLine",
    "UnknownIncident",
    "UnsettledStep",
    "apply",
    "check",
    "check_move",
    "incident_id",
    "read_received",
]

FORGET_EVERY = 256  # records; by sequence number, so that every replay forgets at the same places


class UnknownIncident(LookupError):  # noqa: N818
    """A record names an incident that is not (or no longer) there."""


NOTHING = Changes()
NOT_BEGUN: frozenset[PlanState] = frozenset({"waiting", "granted", "approved"})
_I = IncidentState
PLAN_STANDS = frozenset(
    {_I.DIAGNOSED, _I.SUGGESTED, _I.AWAITING_APPROVAL, _I.ACTING}
)  # moves that leave a plan as it is


def apply(state: State, stored: Stored, sent: UsualPayload | None = None) -> Changes:
    """Fold one record into `state`. `sent`: what the body of a `PayloadReceived` says, where that is at hand. Raises
    IllegalMove on a move outside the tables and ValueError on a sequence number that is not the next one: both are
    bugs, `check` keeps them out of the journal."""
    if stored.seq != state.seq + 1:
        raise ValueError(f"fold: record {stored.seq} after {state.seq}, expected {state.seq + 1}")
    changes = _apply(state, stored.seq, stored.record, sent)
    state.seq = stored.seq
    if stored.seq % FORGET_EVERY == 0:
        state.forget()
    return changes


def _apply(state: State, seq: int, record: Record, sent: UsualPayload | None) -> Changes:
    match record:
        case PayloadReceived():
            return Merge(state, seq, read_received(record, sent)).run()
        case AlertsReceived():
            return Merge(state, seq, record).run()
        case IncidentMoved():
            return _moved(state, seq, record)
        case Diagnosed():
            return _diagnosed(state, seq, record)
        case PlanMade():
            return _plan_made(state, seq, record)
        case PlanConfirmed():
            return _plan_confirmed(state, seq, record)
        case PlanDeclined():
            return _plan_declined(state, seq, record)
        case ApprovalGiven():
            return _approval(state, seq, record)
        case StepRecorded():
            return _step(state, seq, record)
        case Noted():
            return _noted(state, seq, record)
        case AlertQuarantined():
            state.quarantined.append(record)
            del state.quarantined[:-MAX_QUARANTINE]
            state.quarantined_count += 1
            state.tell(record.at, story.alert_quarantined(record), "alert_quarantined")
            return NOTHING
        case BreakerRecorded():
            state.breakers.pop(record.move.key, None)
            state.breakers[record.move.key] = record.move
            state.tell(record.move.at, story.breaker_recorded(record), "breaker_recorded")
            return NOTHING
        case AgentStarted():
            state.started = record
            if record.policy is not None:
                state.policy = record.policy
            state.tell(record.at, story.agent_started(record), "agent_started")
            return NOTHING
        case FeedbackGiven():
            state.gateway.outcome(record.incident, (record.cause, record.service))
            return fold_learning.feedback(state, seq, record)
        case ModelMade():
            fold_learning.made(state, record)
            return NOTHING
        case ModelChosen():
            fold_learning.chosen(state, record)
            return NOTHING
        case ChangeTold():
            state.tell(record.at, story.change_told(record), "change_told")
            fold_changes.keep(state.changes, record, state.now)
            return NOTHING
        case PauseSet():
            state.paused = record
            state.tell(record.at, story.pause_set(record), "pause_set")
            return NOTHING
        case GatewayCompared():
            state.gateway.compare(record)
            return NOTHING
        case GatewayJudged():
            state.gateway.judge(record.trace, (record.cause, record.service))
            return NOTHING
        case ChannelMoved():
            state.gateway.move(record)
            state.tell(record.at, story.channel_moved(record), "channel_moved")
            return NOTHING
        case _:
            assert_never(record)


def read_received(record: PayloadReceived, sent: UsualPayload | None = None) -> AlertsReceived:
    """What the journalled body says (`sent`, if that was kept), without the alerts that were known already. Raises
    ValueError when it cannot be read, which intake has made sure of."""
    known, tenant = record.known, record.tenant
    if sent is None:
        sent = decode_usual(record.body)
    entries = [e for n, e in enumerate(sent.alerts) if n not in known] if known else sent.alerts
    return AlertsReceived(
        at=record.at,
        tenant=tenant,
        receiver=sent.receiver,
        group_key=sent.groupKey,
        group_labels=sent.groupLabels,
        external_url=sent.externalURL,
        alerts=usual_alerts(entries, tenant),
        truncated=sent.truncatedAlerts,
        traceparent=record.traceparent,
    )


def check(state: State, record: Record) -> None:
    """Would `apply` accept it now? Raises IllegalMove or UnknownIncident; asked before the record becomes durable."""
    match record:
        case IncidentMoved():
            _check_incident_move(_known(state, record.incident), record)
        case Diagnosed() | PlanDeclined() | ApprovalGiven() | FeedbackGiven():
            _known(state, record.incident)
        case ModelMade() | ModelChosen():
            fold_learning.check(state, record)
        case Noted():
            if record.incident:  # "" is a note for the log
                _known(state, record.incident)
        case PlanMade():
            _check_plan(_known(state, record.plan.incident))
        case PlanConfirmed():
            _check_confirmed(_known(state, record.incident), record)
        case StepRecorded():
            _check_step(_known(state, record.move.incident), record)
        case _:
            pass


def _known(state: State, id: str) -> Incident:
    incident = state.incidents.get(id)
    if incident is None:
        raise UnknownIncident(f"incident {story.plain(id, 60)} is not known; hint: `alertmedic incidents` lists them")
    return incident


def _check_incident_move(incident: Incident, record: IncidentMoved) -> None:
    try:
        before, after = IncidentState(record.before), IncidentState(record.after)
    except ValueError as error:
        raise IllegalMove(f"incident {incident.id}: {error}") from error
    if incident.state is not before:
        raise IllegalMove(f"incident {incident.id}: {before} -> {after}, but it is {incident.state}")
    if before in FINAL:
        raise IllegalMove(f"incident {incident.id}: {before} is final; only a firing alert reopens it")
    check_move(before, after)
    if after in FINAL and incident.unsettled:
        raise IllegalMove(f"incident {incident.id}: {after} while step {incident.unsettled[0]} is under way")


def _check_plan(incident: Incident) -> None:
    if incident.unsettled:
        raise IllegalMove(f"incident {incident.id}: a new plan while step {incident.unsettled[0]} is under way")


def _check_confirmed(incident: Incident, record: PlanConfirmed) -> None:
    if incident.state is not _I.DIAGNOSED or incident.plan is None or incident.plan.id != record.plan:
        raise IllegalMove(f"incident {incident.id}: plan {record.plan} is confirmed, but no look came to it")
    if why := incident.why_not_confirmed(record.at):
        raise IllegalMove(f"incident {incident.id}: plan {record.plan} is confirmed, but {why}")


def _check_step(incident: Incident, record: StepRecorded) -> None:
    move = record.move
    if incident.plan is None or incident.plan.id != move.plan:
        raise IllegalMove(f"incident {incident.id}: a step of plan {move.plan}, which is not its plan")
    if not 0 <= move.step < len(incident.steps):
        raise IllegalMove(f"incident {incident.id}: plan {move.plan} has no step {move.step}")
    at = incident.steps[move.step].state
    if at is not move.before:
        raise IllegalMove(f"incident {incident.id}: step {move.step}: {move.before} -> {move.after}, but it is {at}")
    check_step_move(move.before, move.after)
    if move.after is StepState.INTENT and incident.plan_state not in MAY_START:
        raise IllegalMove(f"incident {incident.id}: step {move.step}: intent, but the plan is {incident.plan_state}")


# -- one function per kind


def _moved(state: State, seq: int, record: IncidentMoved) -> Changes:
    if record.incident not in state.incidents:
        raise UnknownIncident(f"fold: record {seq} moves incident {record.incident}, which is not known")
    incident = state.touch(record.incident, record.at, seq)
    _check_incident_move(incident, record)
    after = IncidentState(record.after)
    incident.state, incident.reason, incident.refusal = after, record.reason, record.refusal
    incident.moved_at = record.at
    if not _told_with_plan(incident, record):
        incident.tell(record.at, story.incident_moved(record), "incident_moved")
    if after is IncidentState.INVESTIGATING:
        incident.rounds += 1
    kept = record.keeps_plan and after is _I.INVESTIGATING
    if after not in PLAN_STANDS and incident.plan_state in NOT_BEGUN and not kept:
        # overtaken: an approval must not count any more, nor the one that came allow an intent
        expired = record.refusal is Refusal.APPROVAL_EXPIRED
        incident.plan_state = "expired" if expired else "withdrawn"
    if after not in FINAL:
        return Changes((incident.id,))
    incident.closed_at = record.at
    done = incident.plan_state == "done" and not incident.only_looked
    if after is IncidentState.RESOLVED and incident.plan is not None and done:
        state.gateway.outcome(incident.id, (incident.plan.cause, incident.plan.service))
    if record.seen and incident.last_firing_seq > record.seen:
        # A firing alert became durable between the decision and this record: it would never be looked at.
        state.reopen(incident)
        incident.tell(record.at, story.overtaken(after), "incident_moved")
        return Changes((incident.id,), reopened=(incident.id,))
    state.close(incident)
    return Changes((incident.id,), closed=(incident.id,))


def _told_with_plan(incident: Incident, record: IncidentMoved) -> bool:
    """Moves of a look that confirms a plan: what becomes of it is told by `PlanConfirmed`, once in a while."""
    match record.after:
        case _I.AWAITING_APPROVAL | _I.SUGGESTED:
            return incident.confirmed > 0 and record.before == _I.DIAGNOSED
        case _I.INVESTIGATING:
            return incident.told_before and record.keeps_plan
        case _:
            return incident.told_before and record.after == _I.DIAGNOSED


def _diagnosed(state: State, seq: int, record: Diagnosed) -> Changes:
    if record.incident not in state.incidents:
        return NOTHING
    incident = state.touch(record.incident, record.at, seq)
    incident.diagnosis, incident.diagnosed_at = record.diagnosis, record.at
    incident.diagnosed_seq = record.seen or seq  # what fired while it was being looked at is news
    incident.fresh = {f: n for f, n in incident.fresh.items() if n > incident.diagnosed_seq}
    incident.evidence_seconds, incident.diagnosis_seconds = record.evidence_seconds, record.diagnosis_seconds
    incident.evidence_at = record.evidence_at
    incident.justification = record.justification
    incident.signature, incident.precedents = record.signature, record.precedents
    best, plan = record.diagnosis.best, incident.plan
    if incident.told_before and best and plan and (best.cause, best.service) == (plan.cause, plan.service):
        return Changes((incident.id,))
    incident.tell(record.at, story.diagnosed(record), "diagnosed")
    if record.precedents:
        incident.tell(record.at, story.precedent_words(record.precedents[0], record.at), "diagnosed")
    return Changes((incident.id,))


def _plan_made(state: State, seq: int, record: PlanMade) -> Changes:
    plan = record.plan
    if plan.incident not in state.incidents:
        return NOTHING
    incident = state.touch(plan.incident, record.at, seq)
    _check_plan(incident)
    if record.replaces and incident.plan_state in NOT_BEGUN:
        incident.plan_state = "withdrawn"
    incident.archive_plan(record.why)
    incident.plan, incident.plan_digest = plan, plan.digest
    incident.steps = [StepView() for _ in plan.steps]
    incident.plan_state = (
        "granted" if plan.autonomy == "auto" else "waiting" if plan.autonomy == "approve" else "suggested"
    )
    incident.tell(record.at, story.plan_made(record), "plan_made")
    return Changes((incident.id,))


def _plan_confirmed(state: State, seq: int, record: PlanConfirmed) -> Changes:
    if record.incident not in state.incidents:
        return NOTHING
    incident = state.touch(record.incident, record.at, seq)
    _check_confirmed(incident, record)
    again = incident.plan_state == "withdrawn"
    if again:
        incident.plan_state = "waiting"
    if again or not incident.told_before:
        incident.tell(record.at, story.plan_confirmed(record, incident.confirmed, again=again), "plan_confirmed")
    incident.confirmed += 1
    return Changes((incident.id,))


def _plan_declined(state: State, seq: int, record: PlanDeclined) -> Changes:
    if record.incident not in state.incidents:
        return NOTHING
    incident = state.touch(record.incident, record.at, seq)
    refused = Refused(at=record.at, action=record.action, refusal=record.refusal, detail=record.detail)
    incident.refusals.append(refused)
    del incident.refusals[:-MAX_PAST]
    incident.tell(record.at, story.plan_declined(record), "plan_declined")
    return Changes((incident.id,))


def _why_not_counted(incident: Incident, record: ApprovalGiven) -> str:
    """Why a decision changes nothing, "" if it counts."""
    plan = incident.plan
    if plan is None or plan.id != record.plan:
        return "that plan is not the incident's plan now"
    if record.digest not in (incident.plan_digest, plan.steps_digest):
        return "it was given for other steps (the digest differs)"
    if incident.plan_state != "waiting":
        return f"the plan is {incident.plan_state}, not waiting"
    if not record.at < plan.expires_at:
        return "the plan had expired"
    person = person_of(record.who, record.origin)
    if record.decision == "approve" and person in _approvers(incident, plan.id):
        return "the same person has approved it already; another one must"
    return ""


def _approvers(incident: Incident, plan: str) -> set[str]:
    """The people whose approval of the plan counts."""
    return {a.person for a in incident.approvals if a.counted and a.plan == plan and a.decision == "approve"}


def _persons_left(incident: Incident, record: ApprovalGiven) -> int:
    """How many more people must approve after this one."""
    given = _approvers(incident, record.plan) | {person_of(record.who, record.origin)}
    needed = incident.plan.persons if incident.plan is not None else 1
    return max(0, needed - len(given))


def _approval(state: State, seq: int, record: ApprovalGiven) -> Changes:
    if record.incident not in state.incidents:
        return NOTHING
    incident = state.touch(record.incident, record.at, seq)
    why = _why_not_counted(incident, record)
    left = 0
    if not why and record.decision == "reject":
        incident.plan_state = "rejected"
    elif not why:
        left = _persons_left(incident, record)
        if not left:
            incident.plan_state = "approved"
    incident.approvals.append(
        Approval(
            at=record.at,
            plan=record.plan,
            digest=record.digest,
            decision=record.decision,
            who=record.who,
            origin=record.origin,
            note=record.note,
            asked=record.asked,
            token=record.token,
            counted=not why,
            why=why,
        )
    )
    del incident.approvals[:-MAX_PAST]
    incident.tell(record.at, story.approval_given(record, why, left), "approval_given")
    return Changes((incident.id,))


def _step(state: State, seq: int, record: StepRecorded) -> Changes:
    move = record.move
    if move.incident not in state.incidents:
        raise UnknownIncident(f"fold: record {seq} moves a step of incident {move.incident}, which is not known")
    incident = state.touch(move.incident, move.at, seq)
    _check_step(incident, record)
    view = incident.steps[move.step]
    incident.steps[move.step] = msgspec.structs.replace(
        view,
        state=move.after,
        moves=(*view.moves[-MAX_MOVES + 1 :], move),
        result=move.result if move.result is not None else view.result,
        leaf=move.leaf or view.leaf,
        snapshot=move.snapshot or view.snapshot,
        intents=view.intents + (move.after is StepState.INTENT),
    )
    incident.plan_state = _plan_state(incident)
    if move.after is StepState.INTENT and incident.plan is not None:
        step = incident.plan.steps[move.step]
        state.actions.append(
            ActionStart(move.at, step.action, step.target, incident.plan.service, incident.id, incident.tenant)
        )
    incident.tell(move.at, story.step_recorded(record, incident.plan), "step_recorded")
    return Changes((incident.id,))


def _plan_state(incident: Incident) -> PlanState:
    """What the steps make of the plan's state."""
    begun = any(s.intents for s in incident.steps)
    states = {s.state for s in incident.steps}
    if not begun:
        ended = states & STEP_FINAL and incident.plan_state in NOT_BEGUN
        return "withdrawn" if ended else incident.plan_state
    if not states <= STEP_FINAL:
        return "running"
    return "done" if states == {StepState.VERIFIED} else "failed"


def _noted(state: State, seq: int, record: Noted) -> Changes:
    if record.incident not in state.incidents:
        state.tell(record.at, story.noted(record), "noted")
        return NOTHING
    incident = state.touch(record.incident, record.at, seq)
    incident.tell(record.at, story.noted(record), "noted")
    return Changes((incident.id,))
