"""What a step printed: a short head that is safe to look at, and the whole of it on request."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from cli_world import NASTY, waiting_plan
from hypothesis import given
from hypothesis import strategies as st
from test_cli_story import NOW, incident

from actions.model import StepMoved, StepState
from agent.captured import HEAD_LINES, HEAD_WIDTH, head, is_cut, shortened, whole
from agent.commands.output import Exit
from agent.commands.story import story
from agent.fold_model import StepView
from agent.http.render import incident_json, output_json
from agent.journal.records import AgentStarted, AlertsReceived, FoldPolicy, IncidentMoved, PlanMade, StepRecorded
from agent.store import Store
from agent.story import as_text
from rules.model import Alert
from sandbox.model import RunResult

THREADS = "".join(f'"worker-{n}" \x1b[31mwaits\x1b[0m\n\tat Lock.java:{n}\n' for n in range(400))
DUMP = json.dumps({"pod": "pod/shop/cart-0", "exit_code": 0, "stderr": "", "stdout": THREADS})


def test_a_dump_shows_its_beginning_and_its_size() -> None:
    lines = head(DUMP)
    assert lines[0] == "pod: pod/shop/cart-0, exit_code: 0, stderr: "
    assert lines[1:4] == ("stdout:", '"worker-0" \\x1b[31mwaits\\x1b[0m', "\\tat Lock.java:0")
    assert lines[-1] == f"(first {HEAD_LINES} of 802 lines, {len(DUMP)} bytes in all)"
    assert len(lines) == HEAD_LINES + 1


def test_the_whole_of_it_is_lines_again() -> None:
    told = whole(DUMP)
    assert told.count("\n") == 802
    assert "worker-399" in told
    assert "\x1b" not in told


def test_of_other_text_the_end_is_shown() -> None:
    lines = head("".join(f"line {n}\n" for n in range(40)))
    assert lines[-2:] == ("line 39", "(last 6 of 40 lines, 310 bytes in all)")
    assert head("a\nb\n") == ("a", "b")
    assert head('{"already": "stopped"}') == ('{"already": "stopped"}',)
    assert head("") == ()


def test_nested_values_are_shown_line_by_line() -> None:
    text = json.dumps({"processes": [{"pid": n, "state": "sleeping"} for n in range(50)], "top": []})
    assert head(text)[:4] == ("top: []", "processes:", "[", " {")


@pytest.mark.parametrize(
    "text", ['{"a":' * 50_000, '{"a":' * 800 + "1" + "}" * 800, '{"a": ' + "9" * 9000 + "}", "[" * 9000]
)
def test_what_is_no_document_is_text(text: str) -> None:
    assert len(head(text)[0]) <= HEAD_WIDTH
    assert whole(text)


@given(st.text(), st.integers(1, 300))
def test_it_is_short_and_printable_whatever_was_said(text: str, times: int) -> None:
    for said in (text * times, json.dumps({"stdout": text * times, text: text})):
        lines = head(said)
        assert all(line.isprintable() for line in lines)
        assert all(line.isprintable() for line in whole(said).split("\n"))
        if is_cut(said):
            assert len(lines) <= HEAD_LINES + 1
        else:
            assert shortened(said) == said


def test_story_and_api_show_the_head() -> None:
    plan = waiting_plan("inc-aaaaaaaaaaaa", NOW, ("true",))
    result = RunResult(exit_code=0, stdout=DUMP, stderr=NASTY)
    move = StepMoved(
        incident="i", plan=plan.id, step=0, before=StepState.INTENT, after=StepState.RAN, at=NOW, result=result
    )
    told = incident(plan=plan, steps=[StepView(state=StepState.RAN, moves=(move,), result=result)])
    text = as_text(told, NOW)
    assert "worker-0" in text
    assert "worker-9" not in text
    assert "stdout: the whole of it: alertmedic story inc-aaaaaaaaaaaa --output" in text
    shown = incident_json(told)["plan"]["steps"][0]["result"]
    assert shown["stdout_bytes"] == len(DUMP)
    assert len(shown["stdout"]) < 1500
    assert shown["stderr"] == NASTY
    (whole_of_it,) = output_json(told)["steps"]
    assert whole_of_it["stdout"] == DUMP


async def test_the_journal_gives_all_that_was_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store.open(tmp_path)
    try:
        started = AgentStarted(at=NOW, version="t", pid=1, sandbox="none", autonomy="auto", policy=FoldPolicy())
        labels = {"alertname": "Slow"}
        alert = Alert(tenant="default", fingerprint="f", status="firing", labels=labels, starts_at=NOW, digest="d")
        await store.record(
            started, AlertsReceived(at=NOW, tenant="default", receiver="r", group_key="g", alerts=(alert,))
        )
        (id,) = store.state.incidents
        for before, after in (("open", "investigating"), ("investigating", "diagnosed")):
            await store.record(IncidentMoved(at=NOW, incident=id, before=before, after=after))
    finally:
        await store.close()
    assert story(tmp_path, id, as_json=False, output=True) is Exit.OK
    assert "has printed anything" in capsys.readouterr().out
    store = Store.open(tmp_path)
    try:
        plan = msgspec.structs.replace(waiting_plan(id, NOW, ("true",)), autonomy="auto")
        await store.record(
            PlanMade(at=NOW, plan=plan), IncidentMoved(at=NOW, incident=id, before="diagnosed", after="acting")
        )
        result = RunResult(exit_code=0, stdout=DUMP)
        path = ((StepState.PLANNED, StepState.INTENT, None), (StepState.INTENT, StepState.RAN, result))
        for one, two, brought in path:
            move = StepMoved(incident=id, plan=plan.id, step=0, before=one, after=two, at=NOW, result=brought)
            await store.record(StepRecorded(move=move))
    finally:
        await store.close()
    assert story(tmp_path, id, as_json=False, output=True) is Exit.OK
    told = capsys.readouterr().out
    assert f"{plan.steps[0].action} on {plan.steps[0].target}: stdout, {len(DUMP)} bytes\n" in told
    assert told.endswith(whole(DUMP))
