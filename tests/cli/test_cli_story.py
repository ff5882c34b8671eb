"""The story is pure text: it tells what matters in each state, and nothing that others wrote reaches a terminal raw."""

from __future__ import annotations

import io
import re

import msgspec
import pytest
from cli_world import NASTY, alert, diagnosis, waiting_plan
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from actions.model import Refusal, StepMoved, StepState
from agent.fold_model import Approval, Incident, IncidentState, PastPlan, Refused, StepView, StoryLine
from agent.story import as_rich, as_text, blocks, clock_time, headline, listing, span
from rules.model import Diagnosis
from sandbox.model import EnforcedBy, RunResult

NOW = 1_800_000_000.0


def incident(**changes: object) -> Incident:
    made = Incident(
        id="inc-aaaaaaaaaaaa",
        tenant="default",
        key="k",
        opened_at=NOW - 100.0,
        opened_seq=1,
        updated_at=NOW,
        updated_seq=2,
        last_alert_at=NOW - 100.0,
        alerts={"f": alert("FrontSlow")},
        entry="front",
    )
    return msgspec.structs.replace(made, **changes)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.00 s"),
        (0.25, "0.25 s"),
        (12.34, "12.3 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 00 s"),
        (125, "2 min 05 s"),
        (3600, "1 h 00 min"),
        (11_400, "3 h 10 min"),
        (180_000, "2 d 2 h"),
        (-5, "-5.0 s"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert span(seconds) == text


@given(st.floats(0, 1e9))
def test_a_duration_is_short_and_never_shows_sixty(seconds: float) -> None:
    text = span(seconds)
    assert len(text) <= 14
    assert not re.search(r"(^| )60(\.0*)? (s|min)", text)


def test_times_are_absolute_and_relative() -> None:
    told = incident(story=[StoryLine(NOW - 87.7, "evidence gathered", "diagnosed")])
    text = as_text(told, NOW)
    assert f"{clock_time(NOW - 87.7)}  +12.3 s" in text
    assert "open for 1 min 40 s" in headline(told, NOW)


@pytest.mark.parametrize("state", IncidentState)
def test_every_state_has_an_outcome(state: IncidentState) -> None:
    told = incident(
        state=state, reason="because", refusal=Refusal.STORM, closed_at=NOW if state == "resolved" else None
    )
    (outcome,) = [b for b in blocks(told, NOW) if b.title == "Outcome"]
    (row,) = outcome.rows
    assert "because" in row.text
    assert "storm" in row.text
    if state is IncidentState.AWAITING_APPROVAL:
        assert f"alertmedic approve {told.id}" in row.text


def test_insufficient_evidence_is_an_answer() -> None:
    told = incident(diagnosis=Diagnosis(verdict="insufficient_evidence", candidates=9), diagnosed_at=NOW)
    assert "insufficient evidence; 9 candidates were weighed" in as_text(told, NOW)


def test_a_plan_that_waits_says_how_long_and_what_exactly() -> None:
    plan = waiting_plan("inc-aaaaaaaaaaaa", NOW, ("/bin/sh", "-c", "echo 'x'; rm\n-rf /"))
    told = incident(plan=plan, plan_digest=plan.digest, plan_state="waiting", steps=[StepView()])
    text = as_text(told, NOW + 600.0)
    assert "waits for approval, 50 min 00 s left" in text
    assert plan.digest in text
    assert r"""run    /bin/sh -c 'echo '"'"'x'"'"'; rm\n-rf /'""" in text
    assert "note: limits not enforced (rlimits only)" in text
    assert "the time for approval is over" in as_text(told, NOW + 4000.0)


@pytest.mark.parametrize(
    ("result", "text"),
    [
        (RunResult(exit_code=0, enforced_by=EnforcedBy.CGROUP2), "exit code 0, in 0.00 s; limits enforced by cgroup2"),
        (RunResult(exit_code=None, signal=9), "ended by signal 9"),
        (RunResult(exit_code=None, signal=9, timed_out=True), "timed out"),
        (RunResult(exit_code=None, signal=9, oom_killed=True), "killed: out of memory"),
        (RunResult(exit_code=None, error="no such file"), "could not start: no such file"),
        (RunResult(exit_code=0, stdout="a\n", stdout_dropped=7), "stdout: 7 more bytes were dropped"),
    ],
)
def test_how_a_step_ended(result: RunResult, text: str) -> None:
    move = StepMoved(
        incident="i", plan="p", step=0, before=StepState.INTENT, after=StepState.RAN, at=NOW, result=result
    )
    shown = as_text(incident(steps=[StepView(state=StepState.RAN, moves=(move,), result=result)]), NOW)
    assert text in shown
    assert ("not enforced by cgroup v2" in shown) == (result.enforced_by is not EnforcedBy.CGROUP2)


def test_what_was_tried_before_is_told() -> None:
    told = incident(
        past=[
            PastPlan(
                plan="plan-1",
                cause="c",
                service="s",
                actions=("service.restart",),
                states=(StepState.UNDONE,),
                ended="failed",
                made_at=NOW,
            )
        ],
        refusals=[Refused(at=NOW, action="a", refusal=Refusal.COOLDOWN, detail="5 min left")],
        approvals=[
            Approval(
                at=NOW,
                plan="plan-1",
                digest="d",
                decision="approve",
                who="ann",
                origin="cli uid=0",
                why="too late",
            )
        ],
        reopened=2,
    )
    text = as_text(told, NOW)
    assert "earlier plan plan-1 for c: failed; service.restart undone" in text
    assert "declined: a: cooldown (5 min left)" in text
    assert "approve by ann (cli uid=0); it did not count: too late" in text
    assert "reopened   2 times" in text


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.text(max_size=30), st.text(max_size=30))
def test_nothing_that_others_wrote_reaches_a_terminal_raw(one: str, two: str) -> None:
    bad = NASTY + one
    plan = msgspec.structs.replace(waiting_plan("i", NOW, (bad, two)), reason=bad, notes=(two,), service=bad)
    result = RunResult(exit_code=1, stdout=bad, stderr=two)
    move = StepMoved(
        incident="i",
        plan=bad,
        step=0,
        before=StepState.INTENT,
        after=StepState.FAILED,
        at=NOW,
        reason=two,
        result=result,
    )
    written = msgspec.structs.replace(alert("A"), labels={"alertname": bad, two: bad}, annotations={"summary": two})
    told = incident(
        tenant=bad,
        entry=two,
        reason=bad,
        alerts={"f": written},
        story=[StoryLine(NOW, bad, "noted"), StoryLine(NOW, two, "diagnosed")],
        diagnosis=msgspec.structs.replace(diagnosis(bad), missing={one: two}, sentence=bad),
        plan=plan,
        plan_state="waiting",
        steps=[StepView(state=StepState.FAILED, moves=(move,), result=result)],
        approvals=[Approval(at=NOW, plan="p", digest="d", decision="reject", who=bad, origin=two, note=one)],
    )
    assert all(line.isprintable() for line in as_text(told, NOW).split("\n"))
    assert all(cell.isprintable() for row in listing([told], NOW) for cell in row)
    out = io.StringIO()
    Console(file=out, width=400, color_system=None).print(as_rich(told, NOW))
    assert all(line.isprintable() for line in out.getvalue().split("\n"))


def test_a_long_list_of_alerts_is_cut_and_says_so() -> None:
    many = {str(n): msgspec.structs.replace(alert("A"), fingerprint=str(n)) for n in range(25)}
    text = as_text(incident(alerts=many, alerts_dropped=3, truncated=4), NOW)
    assert "and 15 more" in text
    assert "3 more were counted only; Alertmanager left out 4" in text
