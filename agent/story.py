"""An incident's story for people: what was seen, what was thought, what was done, what came of it.

Called by `agent.commands`. Pure text assembly from an `Incident`: it decides nothing, reads no clock (the caller passes
`now`), and imports rich only when a terminal is written to. All text that others could have written (labels,
annotations, command output) has its control characters escaped.

The story is built once as blocks of rows; `as_text` and `as_rich` only lay them out.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal

from actions.model import Plan, Step, StepState
from agent import captured
from agent.fold_model import Incident, IncidentState, StepView
from agent.fold_story import precedent_words
from agent.log import printable
from rules.model import Alert, Contribution, Hypothesis
from sandbox.model import RunResult

if TYPE_CHECKING:
    from rich.console import RenderableType

Tone = Literal["", "good", "bad", "warn", "dim", "title"]
MAX_ALERTS = 10
MISSING_NAMED = 6  # signals that are missing for one reason are named up to here
_COLOURS: dict[Tone, str] = {"good": "green", "bad": "red", "warn": "yellow", "dim": "dim", "title": "bold", "": ""}
_STATES: dict[IncidentState, Tone] = {
    IncidentState.RESOLVED: "good",
    IncidentState.ESCALATED: "bad",
    IncidentState.AWAITING_APPROVAL: "warn",
    IncidentState.SUGGESTED: "warn",
    IncidentState.DECLINED: "warn",
}
_STEPS: dict[StepState, Tone] = {
    StepState.VERIFIED: "good",
    StepState.FAILED: "bad",
    StepState.UNDO_FAILED: "bad",
    StepState.HANDED_OVER: "bad",
    StepState.UNKNOWN: "warn",
    StepState.UNDONE: "warn",
}


@dataclass(frozen=True, slots=True)
class Row:
    """One line: when (unix seconds, None for none), how deep, what, and how it is coloured on a terminal."""

    text: str
    at: float | None = None
    depth: int = 0
    tone: Tone = ""


@dataclass(frozen=True, slots=True)
class Block:
    title: str
    rows: tuple[Row, ...]


def clock_time(at: float) -> str:
    """UTC, RFC 3339 to the second."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def span(seconds: float) -> str:
    """A duration in words as short as they can be: 0.25 s, 12.3 s, 2 min 05 s, 3 h 10 min, 4 d 2 h."""
    if seconds < 0:
        return "-" + span(-seconds)
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 0.995 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = whole // 60
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


def weighed(candidates: int) -> str:
    """`3 candidates were weighed`, for the story and for `alertmedic diagnose`."""
    return "1 candidate was weighed" if candidates == 1 else f"{candidates} candidates were weighed"


def headline(incident: Incident, now: float) -> str:
    """One sentence: what it is, what state it is in, since when, and the best explanation."""
    names = sorted({a.name for a in incident.alerts.values() if a.name})
    what = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    ended = incident.closed_at if incident.closed_at is not None else now
    lasted = f"{'open for' if incident.closed_at is None else 'took'} {span(ended - incident.opened_at)}"
    best = incident.diagnosis.best if incident.diagnosis else None
    cause = f"; cause: {best.title} ({best.service})" if best else ""
    return printable(f"{incident.id} {incident.state.value}: {what or 'no alert'}, {lasted}{cause}")


def blocks(incident: Incident, now: float) -> tuple[Block, ...]:
    """The whole story, in the order in which it happened; empty blocks are left out."""
    made = (
        Block("Incident", tuple(_facts(incident, now))),
        Block("Timeline", tuple(_timeline(incident))),
        Block("Alerts", tuple(_alerts(incident))),
        Block("Evidence", tuple(_evidence(incident))),
        Block("Hypotheses", tuple(_hypotheses(incident))),
        Block("Plan", tuple(_plan(incident, now))),
        Block("Approvals", tuple(_approvals(incident))),
        Block("Steps", tuple(_steps(incident))),
        Block("Verification", tuple(_verification(incident))),
        Block("Outcome", tuple(_outcome(incident, now))),
    )
    return tuple(block for block in made if block.rows)


def as_text(incident: Incident, now: float) -> str:
    """The story as plain text, one row a line; times are absolute, and relative to when the incident opened."""
    lines: list[str] = [headline(incident, now)]
    for block in blocks(incident, now):
        lines += ["", block.title]
        for row in block.rows:
            when = ""
            if row.at is not None:
                when = f"{clock_time(row.at)}  {'+' if row.at >= incident.opened_at else ''}"
                when = f"{when}{span(row.at - incident.opened_at)}".ljust(34)
            lines.append(f"  {when}{'    ' * row.depth}{row.text}")
    return "\n".join(lines) + "\n"


def as_rich(incident: Incident, now: float) -> RenderableType:
    """The same for a terminal: a table whose sections are the blocks."""
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=Text(headline(incident, now)), show_header=False, title_justify="left", expand=False, padding=(0, 1)
    )
    table.add_column("when", no_wrap=True, style="dim")
    table.add_column("offset", no_wrap=True, justify="right", style="cyan")
    table.add_column("what", overflow="fold")
    for block in blocks(incident, now):
        table.add_section()
        table.add_row("", "", Text(block.title, style="bold underline"))
        for row in block.rows:
            when = clock_time(row.at) if row.at is not None else ""
            offset = (
                f"{'+' if row.at >= incident.opened_at else ''}{span(row.at - incident.opened_at)}"
                if row.at is not None
                else ""
            )
            table.add_row(when, offset, Text("    " * row.depth + row.text, style=_COLOURS[row.tone]))
    return table


def listing(incidents: Sequence[Incident], now: float) -> tuple[tuple[str, ...], ...]:
    """Rows of a list: id, state, tenant, opened, age, alerts, cause. The first row is the header."""
    rows: list[tuple[str, ...]] = [("id", "state", "tenant", "opened", "age", "alerts", "cause")]
    for i in incidents:
        best = i.diagnosis.best if i.diagnosis else None
        firing = len(i.firing)
        names = ", ".join(sorted({a.name for a in i.alerts.values() if a.name})[:3])
        cause = f"{best.cause} {best.service} {best.posterior:.0%}" if best else ""
        age = span((i.closed_at if i.closed_at is not None else now) - i.opened_at)
        row = (i.id, i.state.value, i.tenant, clock_time(i.opened_at), age, f"{firing}/{len(i.alerts)} {names}", cause)
        rows.append(tuple(printable(cell) for cell in row))
    return tuple(rows)


def _facts(incident: Incident, now: float) -> Iterator[Row]:
    yield Row(f"state      {incident.state.value}", tone=_STATES.get(incident.state, "title"))
    yield Row(f"tenant     {printable(incident.tenant)}")
    yield Row(f"opened     {clock_time(incident.opened_at)}, {span(max(now - incident.opened_at, 0.0))} ago")
    if incident.closed_at is not None:
        yield Row(f"closed     {clock_time(incident.closed_at)}, after {span(incident.closed_at - incident.opened_at)}")
    yield Row(f"seen at    {printable(incident.entry) if incident.entry else 'no alert names a service'}")
    if incident.reopened:
        yield Row(f"reopened   {incident.reopened} times", tone="warn")


def _timeline(incident: Incident) -> Iterator[Row]:
    if incident.story_dropped:
        yield Row(f"({incident.story_dropped} older lines are no longer kept)", tone="dim")
    for line in incident.story:
        yield Row(printable(line.text), line.at, tone="dim" if line.kind == "noted" else "")


def _alerts(incident: Incident) -> Iterator[Row]:
    ordered = sorted(incident.alerts.values(), key=lambda a: (a.status != "firing", a.starts_at))
    for alert in ordered[:MAX_ALERTS]:
        yield Row(_alert(alert), alert.starts_at, tone="bad" if alert.status == "firing" else "good")
        for name in ("summary", "description"):
            if text := alert.annotations.get(name):
                yield Row(f"{name}: {printable(text)}", depth=1, tone="dim")
                break
    hidden = len(ordered) - MAX_ALERTS
    if hidden > 0:
        yield Row(f"and {hidden} more (see --json)", tone="dim")
    if incident.alerts_dropped or incident.truncated:
        yield Row(
            f"{incident.alerts_dropped} more were counted only; Alertmanager left out {incident.truncated}", tone="warn"
        )


def _alert(alert: Alert) -> str:
    labels = ", ".join(f"{k}={v}" for k, v in sorted(alert.labels.items()) if k != "alertname")
    return printable(f"{alert.status} {alert.name} {{{labels}}}")


def _evidence(incident: Incident) -> Iterator[Row]:
    diagnosis = incident.diagnosis
    if diagnosis is None:
        return
    took = f"gathered in {span(incident.evidence_seconds)}, weighed in {span(incident.diagnosis_seconds)}"
    yield Row(
        f"up to {clock_time(incident.evidence_at)}, {took}" if incident.evidence_at else took, incident.diagnosed_at
    )
    by_reason: dict[str, list[str]] = {}
    for name, reason in sorted(diagnosis.missing.items()):
        by_reason.setdefault(reason, []).append(name)
    for reason, names in by_reason.items():
        told = ", ".join(names[:MISSING_NAMED])
        more = f" and {len(names) - MISSING_NAMED} more" if len(names) > MISSING_NAMED else ""
        yield Row(printable(f"missing: {told}{more}: {reason}"), depth=1, tone="warn")


def _hypotheses(incident: Incident) -> Iterator[Row]:
    diagnosis = incident.diagnosis
    if diagnosis is None:
        return
    verdict = "insufficient evidence" if diagnosis.verdict == "insufficient_evidence" else "ranked"
    tone: Tone = "warn" if diagnosis.best is None else "title"
    if verdict == "ranked":
        verdict += ", the first stands clear" if diagnosis.clear else ", but none stands clear: nothing is proposed"
    yield Row(f"{verdict}; {weighed(diagnosis.candidates)}", incident.diagnosed_at, tone=tone)
    if diagnosis.sentence:
        yield Row(printable(diagnosis.sentence))
    if diagnosis.owner:
        yield Row(printable(f"the object to change: {diagnosis.owner}"))
    for change in diagnosis.changes:
        yield Row(printable(f"changed: {change}"), depth=1)
    for rank, hypothesis in enumerate(diagnosis.hypotheses, 1):
        yield from _hypothesis(rank, hypothesis)
    for precedent in incident.precedents:
        yield Row(printable(precedent_words(precedent, incident.diagnosed_at)), tone="dim")
    if diagnosis.version:
        yield Row(printable(f"weighed with {diagnosis.version}"), tone="dim")
    if (given := incident.feedback) is not None:
        helped = "" if given.helped is None else f"; what was done {'helped' if given.helped else 'did not help'}"
        yield Row(printable(f"the cause was {given.cause} on {given.service}, says {given.who}{helped}"), given.at)


def _hypothesis(rank: int, hypothesis: Hypothesis) -> Iterator[Row]:
    sure = f"posterior {hypothesis.posterior:.1%}, confidence {hypothesis.confidence:.1%}"
    title = f"{rank}. {hypothesis.title} ({hypothesis.cause} on {hypothesis.service}): {sure}"
    yield Row(printable(title), tone="title")
    if hypothesis.sentence:
        yield Row(printable(hypothesis.sentence), depth=1)
    if hypothesis.path:
        yield Row(printable("path: " + " -> ".join(hypothesis.path)), depth=1, tone="dim")
    if hypothesis.rules:
        yield Row(printable("rules: " + ", ".join(hypothesis.rules)), depth=1, tone="dim")
    weighed = sorted(hypothesis.contributions, key=lambda c: -c.log_odds)
    yield from (_contribution("for", c, "good") for c in weighed if c.log_odds > 0)
    yield from (_contribution("against", c, "bad") for c in reversed(weighed) if c.log_odds < 0)
    for proposal in hypothesis.proposals:
        given = ", ".join(f"{k}={v}" for k, v in sorted(proposal.params.items()))
        yield Row(printable(f"proposes {proposal.action}({given}) on {proposal.service}: {proposal.reason}"), depth=1)


def _contribution(word: str, c: Contribution, tone: Tone) -> Row:
    series = f" [{'; '.join(c.series[:3])}]" if c.series else ""
    return Row(
        printable(f"{word:<7} {c.log_odds:+.2f}  {c.evidence} is {c.state}: {c.text}{series}"), depth=1, tone=tone
    )


def _plan(incident: Incident, now: float) -> Iterator[Row]:
    for past in incident.past:
        ended = ", ".join(f"{a} {s.value}" for a, s in zip(past.actions, past.states, strict=False))
        yield Row(
            printable(f"earlier plan {past.plan} for {past.cause}: {past.ended}; {ended}"), past.made_at, tone="dim"
        )
    for refused in incident.refusals:
        action = f"{refused.action}: " if refused.action else ""
        detail = f" ({refused.detail})" if refused.detail else ""
        yield Row(printable(f"declined: {action}{refused.refusal.value}{detail}"), refused.at, tone="warn")
    plan = incident.plan
    if plan is None:
        return
    yield Row(
        printable(f"{plan.id} for {plan.cause} on {plan.service}: {incident.plan_state}"), plan.made_at, tone="title"
    )
    yield from _plan_terms(incident, plan, now)
    for index, step in enumerate(plan.steps):
        yield from _step(index, step)


def _plan_terms(incident: Incident, plan: Plan, now: float) -> Iterator[Row]:
    yield Row(f"autonomy {plan.autonomy}, digest {incident.plan_digest or plan.digest}", depth=1)
    if incident.plan_state == "waiting":
        left = plan.expires_at - now
        by = "" if plan.persons == 1 else f" by {plan.persons} different people"
        yield Row(
            f"waits for approval{by}, {span(left)} left" if left > 0 else "the time for approval is over",
            depth=1,
            tone="warn",
        )
    if plan.reason:
        yield Row(printable(f"because {plan.reason}"), depth=1)
    for note in plan.notes:
        yield Row(printable(f"note: {note}"), depth=1, tone="warn")


def _step(index: int, step: Step) -> Iterator[Row]:
    yield Row(printable(f"step {index}: {step.action} v{step.version} on {step.target}"), depth=1)
    yield Row(f"run    {_argv(step.argv)}", depth=2)
    if step.check:
        yield Row(f"check  {_argv(step.check)}", depth=2)
    yield Row(f"undo   {_argv(step.undo)}" if step.undo else "undo   none", depth=2)
    limits = step.limits
    cpu = limits.cpu_quota_us / limits.cpu_period_us if limits.cpu_period_us else 0.0
    text = (
        f"limits {cpu:.0%} CPU, {limits.memory_bytes / 2**20:.0f} MiB, {limits.pids} pids, {limits.timeout_seconds:g} s"
    )
    yield Row(printable(text + (f", user {step.user}" if step.user else "")), depth=2, tone="dim")


def _argv(argv: Iterable[str]) -> str:
    return printable(shlex.join(argv))


def _approvals(incident: Incident) -> Iterator[Row]:
    for approval in incident.approvals:
        text = f"{approval.decision} by {approval.who} ({approval.origin})"
        text += f": {approval.note}" if approval.note else ""
        text += "" if approval.counted else f"; it did not count: {approval.why}"
        tone: Tone = "dim" if not approval.counted else "good" if approval.decision == "approve" else "warn"
        yield Row(printable(text), approval.at, tone=tone)


def _steps(incident: Incident) -> Iterator[Row]:
    names = [step.action for step in incident.plan.steps] if incident.plan else []
    for index, view in enumerate(incident.steps):
        if not view.moves:
            continue
        name = names[index] if index < len(names) else "step"
        yield Row(printable(f"step {index}: {name}: {view.state.value}"), tone=_STEPS.get(view.state, "title"))
        yield from _moves(incident.id, view)


def _moves(incident: str, view: StepView) -> Iterator[Row]:
    for move in view.moves:
        reason = f": {move.reason}" if move.reason else ""
        yield Row(
            printable(f"{move.before.value} -> {move.after.value}{reason}"), move.at, 1, _STEPS.get(move.after, "")
        )
        if move.result is not None:
            yield from _result(incident, move.result)


def _result(incident: str, result: RunResult) -> Iterator[Row]:
    if result.error:
        ended = f"could not start: {result.error}"
    elif result.timed_out:
        ended = "timed out"
    elif result.oom_killed:
        ended = "killed: out of memory"
    elif result.signal is not None:
        ended = f"ended by signal {result.signal}"
    else:
        ended = f"exit code {result.exit_code}"
    used = [f"in {span(result.seconds)}"]
    used += [f"{result.cpu_seconds:.2f} s CPU"] if result.cpu_seconds is not None else []
    used += [f"{result.memory_peak_bytes / 2**20:.0f} MiB peak"] if result.memory_peak_bytes is not None else []
    held = f"limits enforced by {result.enforced_by.value}"
    held += "" if result.enforced_by.limits_enforced else " (not enforced by cgroup v2)"
    tone: Tone = "" if result.enforced_by.limits_enforced else "warn"
    yield Row(printable(f"{ended}, {', '.join(used)}; {held}"), depth=2, tone=tone)
    for name, text, dropped in (
        ("stdout", result.stdout, result.stdout_dropped),
        ("stderr", result.stderr, result.stderr_dropped),
    ):
        lines = captured.head(text)
        yield from (Row(f"{name}: {line}", depth=2, tone="dim") for line in lines)
        if captured.is_cut(text):
            yield Row(f"{name}: the whole of it: alertmedic story {incident} --output", depth=2, tone="dim")
        if dropped:
            yield Row(f"{name}: {dropped} more bytes were dropped", depth=2, tone="dim")


def _verification(incident: Incident) -> Iterator[Row]:
    """What the series said: the moves that only a verification makes."""
    decided = {StepState.VERIFIED, StepState.UNDOING, StepState.UNDONE, StepState.HANDED_OVER}
    for index, view in enumerate(incident.steps):
        for move in view.moves:
            if move.before is StepState.RAN and move.after in decided:
                good = move.after is StepState.VERIFIED
                said = "the series are back in bounds" if good else "the series are not back in bounds"
                reason = f": {move.reason}" if move.reason else ""
                yield Row(printable(f"step {index}: {said}{reason}"), move.at, tone="good" if good else "bad")


def _outcome(incident: Incident, now: float) -> Iterator[Row]:
    tone = _STATES.get(incident.state, "")
    if incident.state is IncidentState.RESOLVED:
        text = "resolved"
    elif incident.state is IncidentState.ESCALATED:
        text = "escalated: a person has to look at it"
    elif incident.state is IncidentState.AWAITING_APPROVAL:
        text = f"waits for a person: alertmedic approve {incident.id} (or reject)"
    elif incident.state is IncidentState.SUGGESTED:
        text = f"suggested only, nothing was run: alertmedic approve {incident.id} makes a request of it"
    else:
        text = f"not over: {incident.state.value}, for {span(max(now - incident.opened_at, 0.0))}"
    because = [incident.reason] if incident.reason else []
    because += [f"refusal {incident.refusal.value}"] if incident.refusal else []
    yield Row(printable(text + (f" ({'; '.join(because)})" if because else "")), incident.closed_at, tone=tone)
