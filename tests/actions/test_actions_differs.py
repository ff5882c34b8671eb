"""Whether a newer look's plan is the one that waits already."""

from __future__ import annotations

from actions_world import NOW, Proposal, context, definition, plan, step

from actions import guard
from actions.model import Plan
from sandbox.model import Limits


def test_a_plan_made_later_of_the_same_steps_is_no_other() -> None:
    made = plan(autonomy="approve", notes=("posterior 0.9",))
    later = plan(
        id="plan-later",
        autonomy="approve",
        made_at=NOW + 60,
        expires_at=NOW + 660,
        notes=("posterior 0.8",),
        reason="r",
    )
    assert guard.differs(made, later, definition()) == ""
    for other, word in [
        (plan(cause="process.leak", autonomy="approve"), "cause"),
        (plan(service="front", autonomy="approve"), "cause"),
        (plan(step("b"), autonomy="approve"), "action"),
        (plan(step(), step(), autonomy="approve"), "action"),
        (plan(step(target="pid=7,start=1"), autonomy="approve"), "the target is pid=7,start=1 now, not service=a"),
        (plan(step(argv=("do-a", "--force")), autonomy="approve"), "parameters"),
        (plan(step(params={"uid": "b"}), autonomy="approve"), "parameters"),
        (plan(step(limits=Limits(pids=99)), autonomy="approve"), "limits"),
        (plan(step(version=2), autonomy="approve"), "parameters"),
        (plan(step(host="db7"), autonomy="approve"), "parameters"),
        (plan(autonomy="auto"), "autonomy"),
        (plan(autonomy="approve", persons=2), "persons"),
        (plan(autonomy="approve", verify_query="up"), "verify_query"),
    ]:
        assert word in guard.differs(made, other, definition())
        assert guard.differs(other, made, definition()) != ""


def test_when_it_was_planned_is_no_difference_and_anything_else_of_the_plan_is() -> None:
    parameters = {
        "service": {"from": "plan", "pattern": ".+"},
        "when": {"from": "plan", "key": "planned_at", "type": "number"},
        "agent": {"from": "plan", "key": "agent_pid", "type": "int"},
    }
    argv = ["/bin/true", "--service={service}", "--when={when}", "--agent={agent}"]
    action = definition(parameters=parameters, argv=argv, check=["/bin/true", "--when={when}"])

    def made(when: float, agent: int = 7) -> Plan:
        values = {"service": "worker", "when": when, "agent": agent}
        decided = guard.decide(Proposal(), action, context(now=NOW, values=values))
        assert isinstance(decided, Plan)
        return decided

    assert made(1.0).steps != made(2.0).steps
    assert guard.differs(made(1.0), made(2.0), action) == ""
    assert "parameters" in guard.differs(made(1.0), made(2.0, agent=8), action)
    assert "parameters" in guard.differs(made(1.0), made(2.0), None)  # what cannot be compared differs
