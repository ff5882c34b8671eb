"""The person of the arm `approve`: a minute for a new request, none for the same one asked again."""

from __future__ import annotations

from typing import Any

from agent.chaos.arms import APPROVER_SECONDS, Person


def incident(state: str = "awaiting_approval", target: str = "root=/log", id: str = "inc-1") -> dict[str, Any]:
    plan = {"id": "new each time", "steps": [{"action": "disk.free_logs", "target": target}]}
    return {"id": id, "state": state, "plan": plan if state == "awaiting_approval" else None}


def test_a_plan_is_approved_a_minute_after_it_was_first_asked_for_however_often_it_is_asked_again() -> None:
    person = Person()
    for second in range(int(APPROVER_SECONDS)):
        # An alert comes and goes: the agent looks again every few seconds.
        state = "investigating" if second % 7 == 3 else "awaiting_approval"
        assert person.decides([incident(state)], float(second)) == []
    assert person.decides([incident("investigating")], APPROVER_SECONDS) == []
    assert person.decides([incident()], APPROVER_SECONDS + 1) == ["inc-1"]
    # It came too late for the agent, which was looking again: a second later it is said again.
    assert person.decides([incident("investigating")], APPROVER_SECONDS + 2) == []
    assert person.decides([incident()], APPROVER_SECONDS + 3) == ["inc-1"]


def test_what_was_done_and_is_asked_for_again_is_thought_over_again() -> None:
    person = Person()
    assert person.decides([incident()], 0.0) == []
    assert person.decides([incident()], APPROVER_SECONDS) == ["inc-1"]
    assert person.decides([incident("acting")], APPROVER_SECONDS + 1) == []
    assert person.decides([incident()], APPROVER_SECONDS + 2) == []
    assert person.decides([incident()], 2 * APPROVER_SECONDS + 2) == ["inc-1"]


def test_another_target_is_another_request() -> None:
    person = Person()
    assert person.decides([incident()], 0.0) == []
    assert person.decides([incident(target="root=/other")], APPROVER_SECONDS) == []
    assert person.decides([incident(target="root=/other")], 2 * APPROVER_SECONDS - 1) == []
    assert person.decides([incident(target="root=/other")], 2 * APPROVER_SECONDS) == ["inc-1"]


def test_an_incident_that_ended_is_forgotten_and_others_have_clocks_of_their_own() -> None:
    person = Person()
    assert person.decides([incident()], 0.0) == []
    assert person.decides([incident("resolved"), incident(id="inc-2")], 30.0) == []
    assert person.decides([incident(), incident(id="inc-2")], 30.0 + APPROVER_SECONDS) == ["inc-2"]
