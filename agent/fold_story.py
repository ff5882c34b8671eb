"""The sentence that each kind of record adds to a story: one function per kind, plain text.

Called by the fold only, so that the command line, the API and every other reader tell the same story. Text from outside
(labels, notes, reasons) is cut and its control characters are made visible; nothing here is markup, and nothing may be
read back from a sentence: data stays in the incident.
"""

from __future__ import annotations

from collections.abc import Sequence

from actions.model import BreakerState, Plan, StepState
from agent.fold_changes import ChangeTold
from agent.fold_gateway import ChannelMoved
from agent.journal.records import (
    AgentStarted,
    AlertQuarantined,
    ApprovalGiven,
    BreakerRecorded,
    Diagnosed,
    FeedbackGiven,
    IncidentMoved,
    ModelChosen,
    ModelMade,
    Noted,
    PauseSet,
    PlanConfirmed,
    PlanDeclined,
    PlanMade,
    StepRecorded,
)
from rules.model import Alert
from rules.recurrence import Precedent
from sandbox.model import RunResult

TEXT = 240  # characters of any one text from outside
NAMED = 5  # alerts named in one sentence

_CONTROL = {n: f"\\x{n:02x}" for n in (*range(0x20), *range(0x7F, 0xA0))} | {
    n: f"\\u{n:04x}" for n in (0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
}


def plain(text: str, limit: int = TEXT) -> str:
    """`text` on one line: control and direction characters made visible, at most `limit` characters."""
    if len(text) > limit:
        text = text[: limit - 1] + "…"
    return text if text.isprintable() else text.translate(_CONTROL)


def _because(reason: str) -> str:
    return f": {plain(reason)}" if reason else ""


def alert_words(alert: Alert, service: str) -> str:
    name = plain(alert.name or alert.fingerprint, 80)
    return f"{name} on {plain(service, 80)}" if service else name


def alerts_received(alerts: Sequence[tuple[Alert, str]], how: str, truncated: int) -> str:
    """`alerts` are (alert, service); `how` says what they did to the incident ("opened the incident", ...)."""
    resolved = [a for a in alerts if a[0].status == "resolved"]
    firing = [a for a in alerts if a[0].status == "firing"] if resolved else alerts
    parts = [f"{_alert_list(firing)} firing"] if firing else []
    if resolved:
        parts.append(f"{_alert_list(resolved)} resolved, says the sender (the series must confirm it)")
    text = "; ".join(parts)
    if how:
        text += f"; {how}"
    if truncated:
        text += f"; the sender left out {truncated} more alerts"
    return text


def _alert_list(alerts: Sequence[tuple[Alert, str]]) -> str:
    names: list[str] = []
    before: tuple[str, str] | None = None
    for alert, service in alerts[:NAMED]:  # of a group, most have the words of the one before
        told = (alert.labels.get("alertname") or alert.fingerprint, service)
        names.append(names[-1] if told == before else alert_words(alert, service))
        before = told
    return _list(names, len(alerts))


def _list(names: Sequence[str], count: int = 0) -> str:
    shown = ", ".join(names[:NAMED])
    rest = (count or len(names)) - NAMED
    return f"{shown} and {rest} more" if rest > 0 else shown


def resolved_unknown(alert: Alert, service: str) -> str:
    return f"{alert_words(alert, service)} resolved, but no incident here knows it"


def alert_quarantined(record: AlertQuarantined) -> str:
    what = "a request body" if record.index is None else f"alert {record.index} of a request"
    where = f"{plain(record.path, 80)}: {plain(record.reason)}"
    return f"{what} of tenant {plain(record.tenant, 80)} is in quarantine: {where}"


def incident_moved(record: IncidentMoved) -> str:
    text = f"{record.before} -> {record.after}"
    if record.refusal is not None:
        text += f" ({record.refusal})"
    return text + _because(record.reason)


def overtaken(after: str) -> str:
    return f"{after} -> open: an alert fired again while that was being written down"


def diagnosed(record: Diagnosed) -> str:
    best = record.diagnosis.best
    if best is None:
        return f"no cause stands clear of the others{_because(record.diagnosis.sentence)}"
    where = plain(best.service, 80)
    text = f"most likely {plain(best.title, 120)} ({best.cause}) on {where}, posterior {best.posterior:.2f}"
    if record.diagnosis.missing:
        text += f"; without {_list([plain(m, 60) for m in sorted(record.diagnosis.missing)])}"
    return text


def precedent_words(precedent: Precedent, now: float) -> str:
    days = max(0.0, now - precedent.at) / 86400.0
    ago = f"{days:.0f} days" if days >= 2 else f"{days * 24:.0f} hours" if days * 24 >= 2 else f"{days * 1440:.0f} min"
    sure = {"feedback": "a person said so", "verified": "verified by what fixed it"}
    named = plain(precedent.title or precedent.cause, 80)
    cause = f"{named} on {plain(precedent.service, 80)}" if precedent.cause else "cause unknown"
    fixed = f", fixed by {_list([plain(a, 80) for a in precedent.fixed_by])}" if precedent.fixed_by else ""
    alike = f"{precedent.similarity:.0%} alike"
    known = sure.get(precedent.confirmed, "unconfirmed")
    return f"seen before: {precedent.incident} {ago} ago, {alike}: {cause} ({known}){fixed}"


def feedback_given(record: FeedbackGiven) -> str:
    helped = "" if record.helped is None else f"; what was done {'helped' if record.helped else 'did not help'}"
    said = f"{plain(record.cause, 80)} on {plain(record.service, 80)}"
    whence = f"({plain(record.origin, 80)}){_because(record.note)}"
    return f"{plain(record.who, 80)} says that the cause was {said}{helped} {whence}"


def model_made(record: ModelMade) -> str:
    what = f"model {record.number} from the feedback of {record.incidents} incidents, golden incidents: {record.golden}"
    return f"{what}; refused: {plain(record.refused)}" if record.refused else f"{what}; it may serve"


def model_chosen(record: ModelChosen) -> str:
    what = f"model {record.number}" if record.number else "the shipped model"
    held = " until another is chosen" if record.pinned else ""
    return f"{plain(record.who, 80)}: {what} serves{held}{_because(record.reason)}"


def change_told(record: ChangeTold) -> str:
    what = f"{record.kind} {plain(record.id, 80)} of {plain(record.service, 80)}"
    return f"{plain(record.who, 80)} told of a change: {what}{_because(record.text)}"


def plan_made(record: PlanMade) -> str:
    plan = record.plan
    steps = _list([f"{s.action} on {plain(s.target, 120)}" for s in plan.steps])
    waits = "waits for approval" if plan.persons == 1 else f"waits for approval by {plan.persons} people"
    word = {"auto": "goes on by itself", "approve": waits}.get(plan.autonomy, "is a suggestion only")
    notes = f" ({plain('; '.join(plan.notes))})" if plan.notes else ""
    instead = f"; it takes the place of {plain(record.replaces, 80)}: {plain(record.why)}" if record.replaces else ""
    return f"plan {plan.id}: {steps}; it {word}{notes}{instead}"


def plan_confirmed(record: PlanConfirmed, before: int, *, again: bool) -> str:
    """`before`: looks that confirmed it already; `again`: it had been withdrawn, and waits again."""
    looks = f"{before + 1} newer looks confirm" if before else "a newer look confirms"
    stays = "it waits again" if again else "it stays as it is"
    return f"{looks} plan {plain(record.plan, 80)}: {stays}"


def plan_declined(record: PlanDeclined) -> str:
    action = f"{plain(record.action, 80)} " if record.action else ""
    return f"{action}declined ({record.refusal}){_because(record.detail)}"


def approval_given(record: ApprovalGiven, why: str, left: int) -> str:
    """`why` it changed nothing, "" where it counts; `left`: people who must still approve."""
    word = "approved" if record.decision == "approve" else "rejected"
    whence = f"({plain(record.origin, 80)}){_because(record.note)}"
    text = f"{plain(record.who, 80)} {word} plan {plain(record.plan, 80)} {whence}"
    if why:
        return f"{text}; this changed nothing: {why}"
    return f"{text}; {left} more must approve it" if left else text


def step_recorded(record: StepRecorded, plan: Plan | None) -> str:
    move = record.move
    step = plan.steps[move.step] if plan is not None and move.step < len(plan.steps) else None
    name = f"{step.action} on {plain(step.target, 120)}" if step is not None else f"step {move.step}"
    if move.after is StepState.INTENT:
        return f"{name}: about to run{_because(move.reason)}"
    text = f"{name}: {move.before} -> {move.after}"
    if move.refusal is not None:
        text += f" ({move.refusal})"
    if move.result is not None:
        text += f", {_outcome(move.result)}"
    return text + _because(move.reason)


def _outcome(result: RunResult) -> str:
    if result.error:
        return f"could not start: {plain(result.error)}"
    if result.oom_killed:
        how = "out of memory"
    elif result.timed_out:
        how = "timed out"
    elif result.signal is not None:
        how = f"signal {result.signal}"
    else:
        how = f"exit code {result.exit_code}"
    return f"{how} after {result.seconds:.2f} s, limits by {result.enforced_by}"


def breaker_recorded(record: BreakerRecorded) -> str:
    move = record.move
    text = f"breaker {plain(move.key)}: {move.before} -> {move.after}"
    if move.after is BreakerState.OPEN and move.opened_count:
        text += f" (opened {move.opened_count} times)"
    return text + _because(move.reason)


def noted(record: Noted) -> str:
    return plain(record.text, 600)


def agent_started(record: AgentStarted) -> str:
    return (
        f"alertmedic {plain(record.version, 40)} started (pid {record.pid}, sandbox {plain(record.sandbox, 80)}, "
        f"autonomy {plain(record.autonomy, 40)})"
    )


def channel_moved(record: ChannelMoved) -> str:
    return f"{plain(record.who, 80)}: the {record.after} diagnosis channel is primary now{_because(record.reason)}"


def pause_set(record: PauseSet) -> str:
    return f"{plain(record.who, 80)} {'paused' if record.paused else 'resumed'} all actions{_because(record.note)}"
