"""Every gate objects when it should, with its own reason, and fails closed."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from actions_world import NOW, Proposal, action_data, context, definition, done, plan, policy, step
from hypothesis import given
from hypothesis import strategies as st

from actions import gates, guard
from actions.breaker import Breaker
from actions.catalog import Catalog, parse_action
from actions.gates import Claim, GuardContext, PastAction, Target, resources_of
from actions.model import Autonomy, BreakerState, Declined, Plan, Refusal
from actions.policy import (
    AutonomyPolicy,
    AutonomyRule,
    GroupPolicy,
    GuardPolicy,
    MaintenanceWindow,
    ProtectedPolicy,
    StormPolicy,
    in_maintenance,
    storm_until,
)
from sandbox.model import EnforcedBy, Limits, Needs, RunResult

WORKER = Target(identity="service=worker")


def past(**more: Any) -> PastAction:
    values = {
        "action": "test.restart",
        "target": "service=worker",
        "service": "worker",
        "incident": "inc-old",
        "at": NOW - 60,
    }
    return PastAction(**(values | more))  # type: ignore[arg-type]


def decide(context_: GuardContext, proposal: Proposal | None = None, **more: Any) -> Plan | Declined:
    return guard.decide(proposal or Proposal(), definition(**more), context_)


def test_nothing_objects_and_the_plan_is_complete() -> None:
    made = decide(context())
    assert isinstance(made, Plan)
    assert (made.autonomy, made.demoted_by, made.notes) == ("auto", (), ())
    assert made.steps[0].argv == ("/bin/true", "--service=worker")
    assert made.expires_at == NOW + policy().approval_ttl_seconds
    assert made.id == guard.plan_id("inc-test", made.steps, NOW)
    assert guard.dry_run(made.steps[0]) == "/bin/true --service=worker"


def test_by_default_everything_is_only_suggested() -> None:
    made = decide(context(policy=GuardPolicy()))
    assert isinstance(made, Plan)
    assert made.autonomy == "suggest"
    assert made.demoted_by == (Refusal.SUGGEST_ONLY,)


STORMY = tuple(NOW - i for i in range(12))
REFUSED: list[tuple[str, dict[str, Any], Refusal]] = [
    ("not firing", {"firing": False}, Refusal.NOT_FIRING),
    ("firing unknown", {"firing": None}, Refusal.NOT_FIRING),
    ("paused", {"paused": True}, Refusal.PAUSED),
    ("pause unknown", {"paused": None}, Refusal.PAUSED),
    ("stale", {"evidence_at": NOW - 301}, Refusal.STALE_EVIDENCE),
    ("evidence from the future", {"evidence_at": NOW + 301}, Refusal.STALE_EVIDENCE),
    ("evidence without time", {"evidence_at": math.nan}, Refusal.STALE_EVIDENCE),
    ("protected service", {"policy": policy(protected=ProtectedPolicy(services=("work*",)))}, Refusal.PROTECTED_TARGET),
    (
        "protected target",
        {"policy": policy(protected=ProtectedPolicy(targets=("service=*",)))},
        Refusal.PROTECTED_TARGET,
    ),
    ("other host", {"inventory": {"worker": {"host": "db7"}}}, Refusal.NOT_LOCAL),
    ("no target", {"targets": ()}, Refusal.EMPTY_TARGET),
    ("two targets", {"targets": (WORKER, Target(identity="b"))}, Refusal.TOO_MANY_TARGETS),
    (
        "required limits",
        {"policy": policy(protection="required"), "enforced_by": EnforcedBy.RLIMITS},
        Refusal.LIMITS_NOT_ENFORCED,
    ),
    (
        "maintenance",
        {"policy": policy(maintenance=(MaintenanceWindow(from_time="00:00", to_time="23:59"),))},
        Refusal.MAINTENANCE,
    ),
    (
        "broken window",
        {"policy": policy(maintenance=(MaintenanceWindow(start="never", end="ever"),))},
        Refusal.GATE_ERROR,
    ),
    ("cooldown", {"history": (past(),)}, Refusal.COOLDOWN),
    ("busy target", {"history": (past(active=True, at=NOW - 5000, action="x"),)}, Refusal.BUSY_TARGET),
    ("busy service", {"history": (past(active=True, target="other", action="x"),)}, Refusal.BLAST_RADIUS),
    ("another service", {"history": (past(active=True, target="o", service="orders"),)}, Refusal.BLAST_RADIUS),
    (
        "same group",
        {
            "history": (past(active=True, target="o", service="orders"),),
            "policy": policy(max_services_at_once=9, groups={"shop": GroupPolicy(services=("worker", "ord*"))}),
        },
        Refusal.BLAST_RADIUS,
    ),
    (
        "share of a group",
        {
            "history": (past(active=True, target="o", service="w2"),),
            "inventory": {"worker": {}, "w2": {}, "w3": {}},
            "policy": policy(
                max_services_at_once=9, groups={"w": GroupPolicy(services=("w*",), max_at_once=9, max_percent=50)}
            ),
        },
        Refusal.BLAST_RADIUS,
    ),
    (
        "too few of the group are well",
        {
            "inventory": {"worker": {}, "w2": {}, "w3": {}},
            "degraded": {"w2": frozenset()},
            "policy": policy(groups={"w": GroupPolicy(services=("w*",), min_healthy=2)}),
        },
        Refusal.MIN_HEALTHY,
    ),
    (
        "one host process by two names",
        {
            "targets": (Target(identity="program=worker", params={"pid": 12}),),
            "history": (past(active=True, target="pid=12,start=1.00", service="orders", action="x"),),
            "policy": policy(max_services_at_once=9),
        },
        Refusal.BUSY_TARGET,
    ),
    (
        "a plan that was just let begin",
        {
            "claims": (Claim("inc-other", "orders", resources_of("service=worker", {})),),
            "policy": policy(max_services_at_once=9),
        },
        Refusal.BUSY_TARGET,
    ),
    ("rate of the action", {"history": tuple(past(target=str(i)) for i in range(6))}, Refusal.RATE_LIMIT),
    (
        "rate of the target",
        {"history": tuple(past(action=str(i)) for i in range(3))},
        Refusal.RATE_LIMIT,
    ),
    (
        "rate of everything",
        {"history": tuple(past(action=str(i), target=str(i)) for i in range(10))},
        Refusal.RATE_LIMIT,
    ),
    (
        "breaker of the action",
        {"breakers": {"test.restart": Breaker(key="test.restart", state=BreakerState.OPEN, open_until=NOW + 9)}},
        Refusal.BREAKER_OPEN,
    ),
    (
        "breaker of the target",
        {"breakers": {"test.restart|service=worker": Breaker(key="k", state=BreakerState.HALF_OPEN, probe_at=NOW - 1)}},
        Refusal.BREAKER_OPEN,
    ),
    ("autonomy observe", {"policy": policy(autonomy=AutonomyPolicy(default="observe"))}, Refusal.OBSERVE_ONLY),
    ("unknown rung", {"policy": policy(autonomy=AutonomyPolicy(default="yolo"))}, Refusal.GATE_ERROR),  # type: ignore[arg-type]
    ("service not in inventory", {"inventory": {}}, Refusal.GATE_ERROR),
]


@pytest.mark.parametrize(("change", "refusal"), [pytest.param(c, r, id=n) for n, c, r in REFUSED])
def test_a_gate_refuses(change: dict[str, Any], refusal: Refusal) -> None:
    answer = decide(context(**change))
    assert isinstance(answer, Declined), answer
    assert answer.reason is refusal
    assert answer.detail
    assert answer.action == "test.restart"


CAPPED: list[tuple[str, dict[str, Any], Refusal, str]] = [
    ("posterior", {"posterior": 0.59}, Refusal.LOW_POSTERIOR, "suggest"),
    ("posterior is no number", {"posterior": math.nan}, Refusal.LOW_POSTERIOR, "suggest"),
    ("posterior is no probability", {"posterior": 7.0}, Refusal.LOW_POSTERIOR, "suggest"),
    ("margin", {"margin": 0.1}, Refusal.LOW_MARGIN, "suggest"),
    ("margin is no number", {"margin": math.nan}, Refusal.LOW_MARGIN, "suggest"),
    ("storm", {"opened": STORMY}, Refusal.STORM, "suggest"),
    ("limits", {"enforced_by": EnforcedBy.CGROUP2_KILL}, Refusal.LIMITS_NOT_ENFORCED, "approve"),
    ("nothing to verify by", {"verifiable": False}, Refusal.UNVERIFIABLE, "approve"),
    ("ladder", {"policy": policy(autonomy=AutonomyPolicy(default="approve"))}, Refusal.NOT_AUTO, "approve"),
]


@pytest.mark.parametrize(("change", "refusal", "level"), [pytest.param(c, r, a, id=n) for n, c, r, a in CAPPED])
def test_a_gate_lowers_the_rung_and_the_plan_stays_readable(
    change: dict[str, Any], refusal: Refusal, level: str
) -> None:
    made = decide(context(**change))
    assert isinstance(made, Plan), made
    assert (made.autonomy, made.demoted_by) == (level, (refusal,))
    assert made.steps
    assert made.notes


def test_unenforced_limits_go_on_by_themselves_only_when_somebody_says_so() -> None:
    made = decide(context(enforced_by=EnforcedBy.RLIMITS, policy=policy(allow_unenforced_auto=True)))
    assert isinstance(made, Plan)
    assert made.autonomy == "auto"
    assert "limits not enforced (rlimits)" in made.notes


def test_the_lowest_of_policy_proposal_and_risk_counts() -> None:
    never = action_data()["risk"] | {"auto": "never"}
    made = decide(context(), risk=never)
    assert isinstance(made, Plan)
    assert (made.autonomy, made.demoted_by) == ("approve", (Refusal.NOT_AUTO,))
    made = decide(context(), Proposal(autonomy_cap="suggest"), risk=never)
    assert isinstance(made, Plan)
    assert made.autonomy == "suggest"
    assert made.demoted_by[0] is Refusal.SUGGEST_ONLY
    assert isinstance(decide(context(), Proposal(autonomy_cap="observe")), Declined)


def test_the_first_matching_rule_decides() -> None:
    rules = (
        AutonomyRule(autonomy="observe", environment="prod", action="test.*"),
        AutonomyRule(autonomy="approve", alert="Slow*"),
        AutonomyRule(autonomy="auto", service="worker", cause="process.*", tenant="shop"),
    )
    ladder = policy(autonomy=AutonomyPolicy(default="suggest", rules=rules))

    def level(**more: Any) -> str:
        made = decide(context(policy=ladder, **more))
        return made.autonomy if isinstance(made, Plan) else "observe"

    assert level(environment="prod", alerts=("SlowFront",)) == "observe"
    assert level(environment="test", alerts=("Other", "SlowFront")) == "approve"
    assert level(tenant="shop") == "auto"
    assert level(tenant="shop", cause="postgres.down") == "suggest"


def test_an_action_over_the_network_does_not_care_about_the_host() -> None:
    assert isinstance(decide(context(inventory={"worker": {"host": "db7"}}), where="network"), Plan)


def test_a_required_secret_that_is_absent_refuses() -> None:
    needs = [{"name": "TOKEN"}, {"name": "OTHER", "required": False}]
    answer = decide(context(), environment=needs)
    assert isinstance(answer, Declined)
    assert answer.reason is Refusal.NO_INVENTORY
    assert isinstance(decide(context(secrets={"TOKEN": "x"}), environment=needs), Plan)


def test_what_is_over_does_not_count() -> None:
    history = (past(at=NOW - 901), past(at=NOW - 3601), past(target="x", incident="inc-test", active=True))
    assert isinstance(decide(context(history=history)), Plan)


@given(
    posterior=st.floats(),
    margin=st.floats(),
    evidence_at=st.floats(),
    firing=st.booleans(),
    paused=st.booleans(),
    enforced=st.sampled_from(list(EnforcedBy)),
    cap=st.sampled_from(["observe", "suggest", "approve", "auto"]),
    default=st.sampled_from(["observe", "suggest", "approve", "auto"]),
)
def test_auto_needs_everything_at_once(
    posterior: float,
    margin: float,
    evidence_at: float,
    firing: bool,
    paused: bool,
    enforced: EnforcedBy,
    cap: Any,
    default: Any,
) -> None:
    made = decide(
        context(
            posterior=posterior,
            margin=margin,
            evidence_at=evidence_at,
            firing=firing,
            paused=paused,
            enforced_by=enforced,
            policy=policy(autonomy=AutonomyPolicy(default=default)),
        ),
        Proposal(autonomy_cap=cap),
    )
    good = 0.6 <= posterior <= 1.0 + 1e-9 and margin >= 0.2 and NOW - evidence_at <= 300 and firing and not paused
    good = good and enforced is EnforcedBy.CGROUP2 and cap == "auto" and default == "auto"
    assert good == (isinstance(made, Plan) and made.autonomy == "auto")


def test_a_gate_that_breaks_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def gate_broken(*_: Any) -> None:
        raise KeyError("what")

    monkeypatch.setattr(guard, "GATES", (*gates.GATES, gate_broken))
    answer = decide(context())
    assert isinstance(answer, Declined)
    assert answer.reason is Refusal.GATE_ERROR
    assert "gate_broken" in answer.detail


# -- storms and windows


def test_a_storm_begins_above_the_bound_and_ends_by_itself() -> None:
    storm = StormPolicy(incidents=3, window_seconds=60, cooldown_seconds=100)
    three, four = [1000.0, 1010.0, 1020.0], [1000.0, 1010.0, 1020.0, 1030.0]
    assert storm_until(three, 1031.0, storm) is None
    assert storm_until([], 1031.0, storm) is None
    assert storm_until(four, 1030.0, storm) == 1160.0
    assert storm_until(four, 1159.9, storm) == 1160.0
    assert storm_until(four, 1160.0, storm) is None
    assert storm_until([1000.0, 1020.0, 1040.0, 1060.0], 1061.0, storm) is None  # not within one window


@given(st.lists(st.floats(0, 1000), max_size=30), st.floats(0, 2000))
def test_a_storm_is_what_a_second_by_second_watch_would_see(opened: list[float], now: float) -> None:
    storm = StormPolicy(incidents=3, window_seconds=50, cooldown_seconds=70)
    opened.sort()
    now += opened[-1] if opened else 0.0
    crowded = [t for t in opened if sum(t - 50 < o <= t for o in opened) > 3]
    until = storm_until(opened, now, storm)
    if until is not None:
        assert crowded
        assert now < until <= max(crowded) + 50 + 70 + 1e-6
    elif crowded:
        assert now >= max(crowded) + 70 - 1e-6


def test_a_storm_is_seen_although_the_clock_was_set_back_and_ends_by_itself_even_so() -> None:
    storm = StormPolicy(incidents=3, window_seconds=60, cooldown_seconds=100)
    # Two before the clock went back by an hour, two after: four within half a minute.
    opened = [5000.0, 5010.0, 1410.0, 1420.0]
    until = storm_until(opened, 1421.0, storm)
    assert until is not None
    assert 1421.0 < until <= 1421.0 + 160
    assert storm_until(opened, until, storm) is None
    # All of them in the future of a clock that has only just gone back.
    assert storm_until([5000.0, 5010.0, 5020.0, 5030.0], 1430.0, storm) is not None


def test_what_others_need_is_a_persons_decision_while_they_are_in_trouble_of_their_own() -> None:
    needed = {"callers": {"worker": frozenset({"front"})}}
    hurt = context(**needed, degraded={"front": frozenset({"postgres"})})
    plan = guard.decide(Proposal(), definition(), hurt)
    assert isinstance(plan, Plan)
    assert (plan.autonomy, plan.demoted_by) == ("approve", (Refusal.DEPENDENTS_DEGRADED,))
    # Trouble that comes from the very service is what the action is for; a session is not the service.
    for calm in (context(**needed, degraded={"front": frozenset({"worker"})}), context(**needed)):
        plan = guard.decide(Proposal(), definition(), calm)
        assert isinstance(plan, Plan)
        assert plan.autonomy == "auto"
    risk = {"reversible": False, "blast_radius": "session", "changes": "runtime", "auto": "allowed"}
    plan = guard.decide(Proposal(), definition(risk=risk), hurt)
    assert isinstance(plan, Plan)
    assert plan.autonomy == "auto"


def test_a_suggestion_becomes_a_request_of_the_same_steps() -> None:
    plan = guard.decide(Proposal(autonomy_cap="suggest"), definition(), context())
    assert isinstance(plan, Plan)
    assert plan.autonomy == "suggest"
    request = guard.taken(plan, policy(), NOW + 5)
    assert isinstance(request, Plan)
    assert (request.steps, request.autonomy, request.expires_at) == (plan.steps, "approve", plan.expires_at)
    assert request.id != plan.id
    assert request.digest != plan.digest  # a decision on one is none on the other
    for refused, why in (
        (guard.taken(plan, policy(approve_suggestions=False), NOW), Refusal.SUGGEST_ONLY),
        (guard.taken(plan, policy(), plan.expires_at), Refusal.APPROVAL_EXPIRED),
        (guard.taken(request, policy(), NOW), Refusal.SUGGEST_ONLY),
    ):
        assert isinstance(refused, Declined)
        assert refused.reason is why


@pytest.mark.parametrize(("by_rule", "by_risk", "persons"), [(1, 1, 1), (2, 1, 2), (1, 2, 2)])
def test_who_must_approve_is_said_by_the_ladder_or_the_action(by_rule: int, by_risk: int, persons: int) -> None:
    ladder = AutonomyPolicy(rules=(AutonomyRule(autonomy="approve", persons=by_rule),))
    risk = action_data()["risk"] | {"persons": by_risk}
    plan = guard.decide(Proposal(), definition(risk=risk), context(policy=policy(autonomy=ladder)))
    assert isinstance(plan, Plan)
    assert plan.persons == persons


@pytest.mark.parametrize(
    ("window", "inside"),
    [
        # NOW is Tuesday, 14 November 2023, 22:13:20 UTC.
        (MaintenanceWindow(start="2023-11-14T22:00:00Z", end="2023-11-14T23:00:00+00:00"), True),
        (MaintenanceWindow(start="2023-11-14T22:14:00Z", end="2023-11-14T23:00:00Z"), False),
        (MaintenanceWindow(start="2023-11-14T23:00:00+01:00", end="2023-11-14T23:14:00+01:00"), True),
        (MaintenanceWindow(from_time="22:00", to_time="23:00"), True),
        (MaintenanceWindow(from_time="22:00", to_time="02:00", days=("tue",)), True),
        (MaintenanceWindow(from_time="22:00", to_time="02:00", days=("mon",)), False),
        (MaintenanceWindow(from_time="23:00", to_time="22:30", days=("mon",)), True),  # began on Monday
        (MaintenanceWindow(from_time="23:00", to_time="22:30", days=("tue",)), False),
        (MaintenanceWindow(from_time="22:00", to_time="23:00", services=("front", "w*")), True),
        (MaintenanceWindow(from_time="22:00", to_time="23:00", services=("front",)), False),
    ],
)
def test_maintenance_windows(window: MaintenanceWindow, inside: bool) -> None:
    assert (in_maintenance([window], "worker", NOW) is window) == inside


@pytest.mark.parametrize(
    "window",
    [
        MaintenanceWindow(),
        MaintenanceWindow(start="2023-11-14T22:00:00", end="2023-11-14T23:00:00"),
        MaintenanceWindow(from_time="25:00", to_time="26:00"),
        MaintenanceWindow(from_time="22:00"),
    ],
)
def test_a_window_that_cannot_be_understood_refuses(window: MaintenanceWindow) -> None:
    answer = decide(context(policy=policy(maintenance=(window,))))
    assert isinstance(answer, Declined)
    assert answer.reason is Refusal.GATE_ERROR


# -- approvals


class Approval(msgspec.Struct):
    plan: str
    digest: str
    at: float = NOW + 10
    decision: str = "approve"


def test_an_approval_is_bound_to_plan_digest_and_time() -> None:
    made = plan(autonomy="approve")
    good = Approval(made.id, made.digest)
    assert guard.approval_valid(made, good, NOW + 20) is None
    assert guard.approval_valid(made, good, NOW + 20) is None  # asking twice changes nothing

    def reason(changed: Plan, approval: Approval, now: float = NOW + 20) -> Refusal:
        answer = guard.approval_valid(changed, approval, now)
        assert answer is not None
        return answer.reason

    other = plan(step(argv=("do-a", "--force")), autonomy="approve")
    assert reason(other, good) is Refusal.APPROVAL_STALE
    assert reason(plan(step(target="service=b"), autonomy="approve"), good) is Refusal.APPROVAL_STALE
    assert reason(plan(step(undo=()), autonomy="approve"), good) is Refusal.APPROVAL_STALE
    assert reason(plan(step(user="root"), autonomy="approve"), good) is Refusal.APPROVAL_STALE
    assert reason(plan(step(limits=Limits(pids=99)), autonomy="approve"), good) is Refusal.APPROVAL_STALE
    assert reason(made, Approval("plan-other", made.digest)) is Refusal.APPROVAL_STALE
    assert reason(made, Approval(made.id, made.digest, decision="reject")) is Refusal.APPROVAL_REJECTED
    assert reason(made, Approval(made.id, made.digest, at=made.expires_at)) is Refusal.APPROVAL_EXPIRED
    assert reason(made, Approval(made.id, made.digest, at=NOW - 1)) is Refusal.APPROVAL_EXPIRED
    assert reason(made, good, now=made.expires_at) is Refusal.APPROVAL_EXPIRED
    assert reason(plan(autonomy="suggest"), good) is Refusal.SUGGEST_ONLY


def test_the_gates_that_time_closes_are_asked_again() -> None:
    made = decide(context())
    assert isinstance(made, Plan)
    assert guard.recheck(made, definition(), context()) is None
    running = (past(incident="inc-test", at=NOW, active=True),)
    assert guard.recheck(made, definition(), context(history=running)) is None  # our own first step
    for change, refusal in [
        ({"firing": False}, Refusal.NOT_FIRING),
        ({"paused": True}, Refusal.PAUSED),
        ({"history": (past(active=True, action="x"),)}, Refusal.BUSY_TARGET),
        ({"opened": STORMY}, Refusal.STORM),
    ]:
        answer = guard.recheck(made, definition(), context(**change))
        assert answer is not None
        assert answer.reason is refusal
    approved = msgspec.structs.replace(made, autonomy="approve")
    assert guard.recheck(approved, definition(), context(opened=STORMY)) is None  # a person decided
    assert guard.recheck(made, None, context()) is not None
    changed = guard.recheck(made, definition(version=2), context())
    assert changed is not None
    assert changed.reason is Refusal.APPROVAL_STALE


# -- looking up targets


RESOLVING: dict[str, Any] = {
    "target": ...,
    "resolve": ["/bin/look", "--service={service}"],
    "max_targets": 2,
    "parameters": {
        "service": {"from": "plan", "pattern": ".+"},
        "pid": {"from": "target", "type": "int", "min": 2},
    },
    "argv": ["/bin/true", "{pid}"],
}


async def look(result: RunResult | Exception, **more: Any) -> Plan | Declined:
    async def run(argv: tuple[str, ...], limits: Limits, secrets: Any, needs: Needs) -> RunResult:
        assert argv == ("/bin/look", "--service=worker")
        if isinstance(result, Exception):
            raise result
        return result

    catalog = Catalog([parse_action(action_data(**(RESOLVING | more)), "test")])
    allowing = policy(max_targets=5)
    return await guard.consider(Proposal(), catalog, context(targets=(), values={}, policy=allowing), run)


async def test_every_target_becomes_a_step() -> None:
    seven = '{"identity": "pid=7", "params": {"pid": 7}, "note": "seven\\u001b[31m"}'
    printed = f'[{seven}, {{"identity": "pid=8", "params": {{"pid": 8}}}}]'
    made = await look(done(stdout=printed))
    assert isinstance(made, Plan)
    assert [(s.target, s.argv) for s in made.steps] == [("pid=7", ("/bin/true", "7")), ("pid=8", ("/bin/true", "8"))]
    assert made.notes == ("seven\N{REPLACEMENT CHARACTER}[31m",)


@pytest.mark.parametrize(
    ("result", "refusal"),
    [
        (done(stdout="[]"), Refusal.EMPTY_TARGET),
        (done(stdout=""), Refusal.RESOLVE_FAILED),
        (done(stdout="{}"), Refusal.RESOLVE_FAILED),
        (done(stdout='[{"identity": "a"}, {"identity": "a"}]'), Refusal.RESOLVE_FAILED),
        (done(stdout='[{"identity": "a\\nb", "params": {"pid": 7}}]'), Refusal.RESOLVE_FAILED),
        (done(stdout='[{"identity": "", "params": {"pid": 7}}]'), Refusal.RESOLVE_FAILED),
        (done(stdout='[{"identity": "a", "params": {"pid": 7}, "shell": "x"}]'), Refusal.RESOLVE_FAILED),
        (done(stdout='[{"identity": "a", "params": {"pid": [7]}}]'), Refusal.RESOLVE_FAILED),
        (done(stdout='[{"identity": "a", "params": {"pid": "7"}}]'), Refusal.BAD_PARAMETERS),
        (done(stdout='[{"identity": "a", "params": {"pid": 1}}]'), Refusal.BAD_PARAMETERS),
        (done(stdout='[{"identity": "a", "params": {}}]'), Refusal.BAD_PARAMETERS),
        (done(stdout="[" + ",".join(f'{{"identity": "{i}"}}' for i in range(3)) + "]"), Refusal.TOO_MANY_TARGETS),
        (done(stdout='[{"identity": "a", "params": {"pid": 7}}]', stdout_dropped=1), Refusal.RESOLVE_FAILED),
        (done(1), Refusal.RESOLVE_FAILED),
        (done(93, stderr="protected: pid 1"), Refusal.PROTECTED_TARGET),
        (done(0, timed_out=True), Refusal.RESOLVE_FAILED),
        (RuntimeError("no cgroup"), Refusal.RESOLVE_FAILED),
    ],
)
async def test_a_look_up_that_went_wrong_plans_nothing(result: Any, refusal: Refusal) -> None:
    answer = await look(result)
    assert isinstance(answer, Declined), answer
    assert answer.reason is refusal


async def test_a_precondition_that_does_not_hold_plans_nothing() -> None:
    asked = []

    async def run(argv: tuple[str, ...], limits: Limits, secrets: Any, needs: Needs) -> RunResult:
        asked.append(argv)
        return done(1, stderr="it is Friday")

    condition = [{"text": "the standby has caught up", "argv": ["/bin/ready", "{service}"]}]
    catalog = Catalog([definition(preconditions=condition)])
    answer = await guard.consider(Proposal(), catalog, context(), run)
    assert isinstance(answer, Declined)
    assert answer.reason is Refusal.PRECONDITION_FAILED
    assert "the standby has caught up" in answer.detail
    assert "it is Friday" in answer.detail
    assert asked == [("/bin/ready", "worker")]


@pytest.mark.parametrize(
    ("change", "proposal", "refusal"),
    [
        ({"firing": False}, Proposal(params={"level": 3}), Refusal.NOT_FIRING),
        ({"paused": True}, Proposal(params={"level": 3}), Refusal.PAUSED),
        ({}, Proposal(params={"level": 3}, autonomy_cap="observe"), Refusal.OBSERVE_ONLY),
        ({"inventory": {}}, Proposal(), Refusal.NO_INVENTORY),
        ({}, Proposal(action="test.unknown"), Refusal.UNKNOWN_ACTION),
        ({}, Proposal(params={"level": "high"}), Refusal.BAD_PARAMETERS),
        ({}, Proposal(params={}), Refusal.BAD_PARAMETERS),
    ],
)
async def test_nothing_is_looked_up_for_what_is_refused_anyway(
    change: Any, proposal: Proposal, refusal: Refusal
) -> None:
    async def run(*_: Any) -> RunResult:
        raise AssertionError("nothing may run")

    parameters = RESOLVING["parameters"] | {"level": {"from": "proposal", "type": "int"}}
    data = action_data(**(RESOLVING | {"parameters": parameters, "argv": ["/bin/true", "{pid}", "{level}"]}))
    answer = await guard.consider(proposal, Catalog([parse_action(data, "test")]), context(**change), run)
    assert isinstance(answer, Declined)
    assert answer.reason is refusal


def test_the_plan_may_ask_for_what_the_policy_and_inventory_say() -> None:
    protected = ProtectedPolicy(processes=("java*", "cron"), users=("app",), paths=("/srv/*",))
    inventory = {"worker": {"listen_port": "9102"}, "front": {"listen_port": "80"}, "x": {"listen_port": "no"}}
    values = guard.plan_variables("worker", context(policy=policy(protected=protected), inventory=inventory))
    assert values["known_ports"] == "80,9102"
    assert values["protected_processes"] == "java*,cron"
    assert values["protected_users"] == "app"
    assert values["protected_paths"] == "/srv/*"


def test_the_policy_comes_from_plain_data_and_refuses_what_it_does_not_know() -> None:
    made = msgspec.convert({"min_posterior": 0.8, "storm": {"incidents": 3}}, GuardPolicy)
    assert (made.min_posterior, made.storm.incidents) == (0.8, 3)
    for wrong in ({"min_posteriors": 0.8}, {"min_posterior": 1.5}, {"storm": {"incident": 3}}, {"max_targets": 0}):
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert(wrong, GuardPolicy)


def test_a_replay_makes_the_same_plan() -> None:
    assert decide(context()) == decide(replace(context()))


@pytest.mark.parametrize(
    ("level", "reason"),
    [("approve", Refusal.NOT_AUTO), ("suggest", Refusal.SUGGEST_ONLY), ("observe", Refusal.OBSERVE_ONLY)],
)
def test_a_policy_that_allows_less_by_now_stops_what_goes_on_by_itself(level: Autonomy, reason: Refusal) -> None:
    made = decide(context())
    assert isinstance(made, Plan)
    assert made.autonomy == "auto"
    answer = guard.recheck(made, definition(), context(policy=policy(autonomy=AutonomyPolicy(default=level))))
    assert answer is not None
    assert answer.reason is reason


def test_where_people_only_observe_by_now_not_even_an_approved_plan_begins() -> None:
    made = decide(context(policy=policy(autonomy=AutonomyPolicy(default="approve"))))
    assert isinstance(made, Plan)
    now = context(policy=policy(autonomy=AutonomyPolicy(default="suggest")))
    assert guard.recheck(made, definition(), now) is None  # a person decided
    answer = guard.recheck(made, definition(), context(policy=policy(autonomy=AutonomyPolicy(default="observe"))))
    assert answer is not None
    assert answer.reason is Refusal.OBSERVE_ONLY
