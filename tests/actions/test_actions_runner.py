"""The runner, one situation at a time: what is journalled, in which order, and how the plan ends."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from actions_world import (
    NOW,
    Clock,
    MemoryLedger,
    ScriptedSandbox,
    ScriptedVerifier,
    done,
    plan,
    step,
)

from actions.breaker import BreakerPolicy
from actions.builtin import NOTHING_DONE
from actions.model import BreakerState, Declined, Plan, Refusal, StepMoved, StepState
from actions.runner import PlanOutcome, Runner, RunnerSettings
from sandbox import SandboxUnavailable

S = StepState


class Bench:
    """A runner with everything scripted."""

    def __init__(self, answers: dict[str, list[Any]] | None = None, verdicts: list[Any] | None = None, **more: Any):
        self.ledger, self.clock = MemoryLedger(), Clock()
        self.sandbox = ScriptedSandbox(answers or {})
        self.verifier = ScriptedVerifier(verdicts) if verdicts else ScriptedVerifier()
        self.cancelled = asyncio.Event()
        self.runner = Runner(self.ledger, self.sandbox, self.verifier, self.clock, RunnerSettings(**more))

    async def run(self, made: Plan) -> PlanOutcome:
        return await self.runner.run(made, self.cancelled)

    async def recover(self, made: Plan, *path: S, **last: Any) -> PlanOutcome:
        """As after a crash that left one step at the end of `path`."""
        moves, before = [], S.PLANNED
        for after in path:
            more = last if after is path[-1] or after in (S.INTENT, S.UNDOING) else {}
            moves.append(
                StepMoved(incident="inc-test", plan=made.id, step=0, before=before, after=after, at=NOW, **more)
            )
            before = after
        self.ledger.states[0] = before
        return await self.runner.recover(made, moves, self.cancelled)


@pytest.mark.parametrize("how", ["resolved", "paused"])
async def test_what_happens_while_the_snapshot_is_taken_still_stops_the_step(how: str) -> None:
    paused = False

    async def snapshot(_: Plan, __: int) -> str:
        nonlocal paused
        if how == "resolved":
            bench.cancelled.set()
        else:
            paused = True
        return "a.snap"

    def permit(_: Plan, __: int) -> Declined | None:
        return Declined(reason=Refusal.PAUSED, detail="paused") if paused else None

    bench = Bench(permit=permit, snapshot=snapshot)
    outcome = await bench.run(plan())
    assert bench.ledger.path(0) == "planned cancelled"
    assert outcome.refusal is (Refusal.PAUSED if how == "paused" else Refusal.RESOLVED_BEFORE_START)
    assert bench.sandbox.programs() == []


async def test_a_good_step_goes_straight_through() -> None:
    bench = Bench()
    outcome = await bench.run(plan())
    assert bench.ledger.path(0) == "planned intent ran verified"
    assert (outcome.result, outcome.reason) == ("verified", "recovered")
    assert bench.sandbox.programs() == ["do-a"]
    assert bench.ledger.moves[0].leaf == "run-1"
    assert bench.ledger.moves[1].result == done()


async def test_verify_last_asks_once_and_verify_each_asks_after_every_step() -> None:
    last, each = Bench(), Bench()
    assert (await last.run(plan(step("a"), step("b")))).result == "verified"
    assert last.verifier.asked == ["test.b"]
    assert (await each.run(plan(step("a"), step("b"), verify="each"))).result == "verified"
    assert each.verifier.asked == ["test.a", "test.b"]


async def test_a_read_only_step_needs_no_series() -> None:
    bench = Bench()
    assert (await bench.run(plan(step(read_only=True, undo=(), idempotent=True)))).result == "verified"
    assert bench.verifier.asked == []


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (done(2, stderr="no such program\n"), "exit code 2: no such program"),
        (done(0, timed_out=True), "no end after"),
        (done(0, oom_killed=True), "out of memory"),
    ],
)
async def test_a_failed_step_is_undone_because_it_may_be_half_done(result: Any, words: str) -> None:
    bench = Bench({"do-a": [result]})
    outcome = await bench.run(plan())
    assert bench.ledger.path(0) == "planned intent failed undoing undone"
    assert outcome.result == "undone"
    assert words in outcome.reason


async def test_later_steps_are_not_begun_and_earlier_ones_are_undone_in_reverse() -> None:
    bench = Bench({"do-c": [done(1)]})
    outcome = await bench.run(plan(step("a"), step("b"), step("c"), step("d")))
    assert outcome.states == (S.UNDONE, S.UNDONE, S.UNDONE, S.CANCELLED)
    assert bench.sandbox.programs() == ["do-a", "do-b", "do-c", "undo-c", "undo-b", "undo-a"]


async def test_not_verified_means_undone_in_reverse() -> None:
    bench = Bench(verdicts=[(False, "still slow")])
    outcome = await bench.run(plan(step("a"), step("b")))
    assert outcome.states == (S.UNDONE, S.UNDONE)
    assert bench.sandbox.programs()[-2:] == ["undo-b", "undo-a"]
    assert outcome.reason == "still slow"


async def test_what_cannot_be_undone_is_handed_over_and_the_rest_is_still_undone() -> None:
    bench = Bench(verdicts=[(False, "still slow")])
    outcome = await bench.run(plan(step("a"), step("b", undo=())))
    assert outcome.states == (S.UNDONE, S.HANDED_OVER)
    assert outcome.result == "handed_over"


async def test_a_verified_step_without_undo_stays_and_a_person_hears_of_it() -> None:
    bench = Bench({"do-b": [done(1)]})
    outcome = await bench.run(plan(step("a", undo=()), step("b"), verify="each"))
    assert outcome.states == (S.VERIFIED, S.UNDONE)
    assert outcome.result == "handed_over"


async def test_a_failed_undo_stops_everything() -> None:
    bench = Bench({"undo-b": [done(1)]}, verdicts=[(False, "still slow")])
    outcome = await bench.run(plan(step("a"), step("b")))
    assert bench.ledger.path(1) == "planned intent ran undoing undo_failed handed_over"
    assert outcome.states == (S.HANDED_OVER, S.HANDED_OVER)
    assert "undo-a" not in bench.sandbox.programs()


@pytest.mark.parametrize("verdict", [(None, "Prometheus is down"), ValueError("bug")])
async def test_what_cannot_be_verified_is_left_as_it_is_for_a_person(verdict: Any) -> None:
    bench = Bench(verdicts=[verdict])
    outcome = await bench.run(plan(step("a"), step("b")))
    assert outcome.states == (S.HANDED_OVER, S.HANDED_OVER)
    assert not any(name.startswith("undo") for name in bench.sandbox.programs())


async def test_a_verifier_that_does_not_return_counts_as_not_recovered() -> None:
    bench = Bench(grace_seconds=0.01)

    async def verify(_: Any, __: Any) -> tuple[bool, str]:
        await asyncio.Event().wait()
        return True, ""

    bench.verifier.verify = verify  # type: ignore[method-assign]
    outcome = await bench.run(plan(verify_seconds=0.05))
    assert outcome.states == (S.UNDONE,)
    assert "no recovery was seen" in outcome.reason


async def test_a_refusal_at_the_moment_of_execution_has_nothing_to_undo() -> None:
    bench = Bench({"do-b": [done(NOTHING_DONE)]})
    outcome = await bench.run(plan(step("a"), step("b")))
    assert outcome.states == (S.UNDONE, S.HANDED_OVER)
    assert bench.sandbox.programs() == ["do-a", "do-b", "undo-a"]


async def test_required_protection_that_is_not_there_starts_nothing() -> None:
    bench = Bench({"do-a": [SandboxUnavailable("no cgroup v2")]}, protection="required")
    outcome = await bench.run(plan())
    assert bench.ledger.path(0) == "planned intent failed handed_over"
    assert "no cgroup v2" in outcome.reason


async def test_an_alert_that_resolved_stops_what_has_not_begun() -> None:
    bench = Bench()
    bench.cancelled.set()
    outcome = await bench.run(plan(step("a"), step("b")))
    assert outcome.states == (S.CANCELLED, S.CANCELLED)
    assert (outcome.result, outcome.refusal) == ("cancelled", Refusal.RESOLVED_BEFORE_START)
    assert bench.sandbox.ran == []


async def test_an_alert_that_resolves_between_steps_leaves_the_first_to_verification() -> None:
    bench = Bench()

    async def resolve(_: Plan, i: int) -> str:
        if i == 1:
            bench.cancelled.set()
        return ""

    bench.runner._settings = RunnerSettings(snapshot=resolve)
    outcome = await bench.run(plan(step("a"), step("b")))
    assert outcome.states == (S.VERIFIED, S.CANCELLED)
    assert outcome.result == "verified"


async def test_an_expired_plan_is_not_begun() -> None:
    bench = Bench()
    bench.clock.now = NOW + 600
    outcome = await bench.run(plan())
    assert (outcome.states, outcome.result) == ((S.EXPIRED,), "expired")


@pytest.mark.parametrize("autonomy", ["observe", "suggest"])
async def test_a_suggestion_is_never_run(autonomy: Any) -> None:
    bench = Bench()
    outcome = await bench.run(plan(autonomy=autonomy))
    assert (outcome.result, outcome.refusal) == ("cancelled", Refusal.SUGGEST_ONLY)
    assert (bench.ledger.moves, bench.sandbox.ran) == ([], [])


async def test_permission_is_asked_before_every_step() -> None:
    def permit(_: Plan, i: int) -> Declined | None:
        return Declined(reason=Refusal.PAUSED, detail="paused by ann") if i == 1 else None

    bench = Bench(permit=permit)
    outcome = await bench.run(plan(step("a"), step("b")))
    assert outcome.states == (S.VERIFIED, S.CANCELLED)
    assert outcome.refusal is Refusal.PAUSED


@pytest.mark.parametrize(
    ("after", "result"), [(S.DENIED, "denied"), (S.EXPIRED, "expired"), (S.CANCELLED, "cancelled")]
)
async def test_closing_a_plan_that_shall_not_begin(after: S, result: str) -> None:
    bench = Bench()
    outcome = await bench.runner.close(plan(step("a"), step("b")), after, "ann said no")
    assert (outcome.result, outcome.states) == (result, (after, after))
    assert bench.sandbox.ran == []
    # And afterwards nothing can bring it back.
    again = await bench.runner.recover(plan(step("a"), step("b")), bench.ledger.moves, bench.cancelled)
    assert again.states == (after, after)
    assert bench.sandbox.ran == []


async def test_a_plan_can_only_be_closed_with_a_closing_state() -> None:
    with pytest.raises(ValueError, match="close"):
        await Bench().runner.close(plan(), S.VERIFIED, "")


async def test_the_snapshot_is_named_in_the_intent_and_its_failure_too() -> None:
    async def good(_: Plan, i: int) -> str:
        return f"snapshot-{i}.json"

    async def bad(_: Plan, __: int) -> str:
        raise OSError(28, "No space left on device")

    async def slow(_: Plan, __: int) -> str:
        await asyncio.Event().wait()
        return ""

    bench = Bench(snapshot=good)
    await bench.run(plan())
    assert bench.ledger.moves[0].snapshot == "snapshot-0.json"
    for failing in (bad, slow):
        bench = Bench(snapshot=failing, snapshot_seconds=0.05)
        assert (await bench.run(plan())).result == "verified"
        assert "no fault snapshot" in bench.ledger.moves[0].reason


async def test_secrets_reach_the_environment_and_never_the_journal() -> None:
    bench = Bench(secrets={"PGPASSWORD": "hunter2", "OTHER": "x"}, environment=lambda p: {"TRACEPARENT": p.id})
    await bench.run(plan(step(environment=("PGPASSWORD", "ABSENT"))))
    environment = bench.sandbox.environments[0]
    assert environment is not None
    assert environment["PGPASSWORD"] == "hunter2"
    assert environment["TRACEPARENT"] == "plan-test"
    assert "OTHER" not in environment
    assert "hunter2" not in repr(bench.ledger.moves)


async def test_what_the_sandbox_raises_is_journalled_without_secrets_and_bounded() -> None:
    raised = ValueError("bad variable PGPASSWORD=hunter2 " + "x" * 1000)
    bench = Bench({"do-a": [raised], "check-a": [done(0)]}, secrets={"PGPASSWORD": "hunter2"})
    await bench.run(plan(step(environment=("PGPASSWORD",))))
    reason = bench.ledger.moves[1].reason
    assert "bad variable PGPASSWORD=[secret]" in reason
    assert "hunter2" not in repr(bench.ledger.moves)
    assert len(reason) < 400


# -- the journal fails


@pytest.mark.parametrize("good_writes", [0, 1, 2])
async def test_when_the_journal_fails_nothing_more_happens(good_writes: int) -> None:
    bench = Bench()
    original, left = bench.ledger.record_step, [good_writes]

    async def record(move: StepMoved) -> None:
        if not left[0]:
            raise OSError(28, "No space left on device")
        left[0] -= 1
        await original(move)

    bench.ledger.record_step = record  # type: ignore[method-assign]
    outcome = await bench.run(plan(step("a"), step("b")))
    assert outcome.result == "interrupted"
    assert "No space left" in outcome.reason
    # The effect only ever follows a durable intent, and nothing follows an effect whose result is not durable.
    assert bench.sandbox.programs() == ([] if good_writes == 0 else ["do-a"])


# -- after a crash


async def test_an_intent_whose_effect_happened_is_verified_and_not_repeated() -> None:
    bench = Bench({"check-a": [done(0)]})
    outcome = await bench.recover(plan(), S.INTENT, leaf="run-old")
    assert bench.sandbox.killed == ["run-old"]
    assert bench.sandbox.programs() == ["check-a"]
    assert bench.ledger.path(0) == "planned unknown ran verified"
    assert outcome.result == "verified"


async def test_the_leaf_of_the_intent_is_the_one_that_is_killed() -> None:
    bench = Bench({"do-a": [OSError("lost")], "check-a": [done(0)]})
    await bench.run(plan())
    intent = bench.ledger.moves[0]
    assert intent.leaf
    assert bench.sandbox.killed == [intent.leaf]
    unknown = bench.ledger.moves[1]
    assert (unknown.after, unknown.reason) == (S.UNKNOWN, "nobody saw how it ended (OSError: lost)")


async def test_an_intent_whose_effect_did_not_happen_is_done_once() -> None:
    bench = Bench({"check-a": [done(1)]})
    outcome = await bench.recover(plan(), S.INTENT, leaf="run-old")
    assert bench.sandbox.programs() == ["check-a", "do-a"]
    assert bench.ledger.path(0) == "planned unknown planned intent ran verified"
    assert outcome.result == "verified"


@pytest.mark.parametrize("code", [2, 94, 255])
async def test_an_intent_that_nobody_can_judge_is_handed_over(code: int) -> None:
    bench = Bench({"check-a": [done(code)]})
    outcome = await bench.recover(plan(), S.INTENT, leaf="run-old")
    assert bench.ledger.path(0) == "planned unknown handed_over"
    assert bench.sandbox.programs() == ["check-a"]
    assert outcome.result == "handed_over"


async def test_without_a_check_only_what_is_idempotent_is_repeated() -> None:
    careful, plain = Bench(), Bench()
    assert (await careful.recover(plan(step(check=())), S.INTENT, leaf="l")).result == "handed_over"
    assert careful.sandbox.ran == []
    assert (await plain.recover(plan(step(check=(), idempotent=True)), S.INTENT, leaf="l")).result == "verified"
    assert plain.sandbox.programs() == ["do-a"]


async def test_where_the_old_run_may_be_alive_nothing_is_touched() -> None:
    bench = Bench()
    bench.sandbox.kills = False
    outcome = await bench.recover(plan(step(idempotent=True)), S.INTENT, leaf="")
    assert outcome.result == "handed_over"
    assert bench.sandbox.ran == []


@pytest.mark.parametrize(("code", "path"), [(1, "unknown undone"), (0, "unknown ran undoing undone")])
async def test_an_interrupted_undo_is_finished(code: int, path: str) -> None:
    bench = Bench({"check-a": [done(code)]})
    outcome = await bench.recover(plan(), S.INTENT, S.RAN, S.UNDOING, leaf="run-old")
    assert bench.ledger.path(0) == f"planned {path}"
    assert outcome.result == "undone"


async def test_a_step_that_crashes_the_agent_again_and_again_is_given_to_a_person() -> None:
    bench = Bench({"check-a": [done(1)]})
    moves = [S.INTENT, S.UNKNOWN, S.PLANNED, S.INTENT]
    outcome = await bench.recover(plan(), *moves, leaf="run-old")
    assert outcome.result == "handed_over"
    assert "do-a" not in bench.sandbox.programs()


async def test_a_recovered_step_whose_alert_has_resolved_is_not_repeated() -> None:
    bench = Bench({"check-a": [done(1)]})
    bench.cancelled.set()
    outcome = await bench.recover(plan(), S.INTENT, leaf="run-old")
    assert bench.ledger.path(0) == "planned unknown planned cancelled"
    assert outcome.result == "cancelled"


async def test_recovery_of_an_ended_plan_changes_nothing() -> None:
    bench = Bench()
    await bench.run(plan())
    before = list(bench.ledger.moves)
    outcome = await bench.runner.recover(plan(), before, bench.cancelled)
    assert outcome.result == "verified"
    assert bench.ledger.moves == before


# -- breakers


async def test_the_breaker_opens_after_failures_and_stops_the_next_plan() -> None:
    bench = Bench({"do-a": [done(1)]}, breaker=BreakerPolicy(failures=2, open_seconds=60.0))
    for _ in range(2):
        bench.ledger.states.clear()
        await bench.run(plan())
    assert bench.runner.breakers["test.a|service=a"].state is BreakerState.OPEN
    bench.ledger.states.clear()
    outcome = await bench.run(plan())
    assert (outcome.result, outcome.refusal) == ("cancelled", Refusal.BREAKER_OPEN)
    # A restart knows it from the records alone.
    again = Runner(bench.ledger, bench.sandbox, bench.verifier, bench.clock, None, bench.ledger.breakers)
    assert again.breakers == bench.runner.breakers
    await again.reset_breaker("test.a")
    await again.reset_breaker("test.a|service=a")
    bench.sandbox.answers = {}
    bench.ledger.states.clear()
    assert (await again.run(plan(), bench.cancelled)).result == "verified"


async def test_a_remedy_that_runs_but_does_not_help_counts_as_a_failure() -> None:
    bench = Bench(verdicts=[(False, "no")], breaker=BreakerPolicy(failures=1))
    await bench.run(plan())
    assert bench.runner.breakers["test.a"].state is BreakerState.OPEN


@pytest.mark.parametrize("way", ["refused", "unavailable", "cannot verify"])
async def test_what_says_nothing_about_the_action_is_not_counted(way: str) -> None:
    answers: dict[str, list[Any]] = {
        "refused": [done(NOTHING_DONE)],
        "unavailable": [SandboxUnavailable("none")],
        "cannot verify": [done()],
    }
    bench = Bench({"do-a": answers[way]}, verdicts=[(None, "?")], breaker=BreakerPolicy(failures=1))
    await bench.run(plan())
    assert bench.runner.breakers["test.a"].state is BreakerState.CLOSED


async def test_of_many_plans_at_once_exactly_one_is_the_probe() -> None:
    bench = Bench({"do-a": [done(1)]}, breaker=BreakerPolicy(failures=1, open_seconds=60.0))
    await bench.run(plan())
    bench.clock.now += 61
    bench.sandbox.answers = {}
    ledgers = [MemoryLedger() for _ in range(8)]

    class Shared:
        async def record_step(self, move: StepMoved) -> None:
            await ledgers[int(move.plan.rpartition("-")[2])].record_step(move)

        record_breaker = bench.ledger.record_breaker

    bench.runner._ledger = Shared()
    outcomes = await asyncio.gather(*(bench.run(plan(id=f"plan-{i}")) for i in range(8)))
    assert sorted(o.result for o in outcomes) == ["cancelled"] * 7 + ["verified"]
    assert bench.runner.breakers["test.a"].state is BreakerState.CLOSED


async def test_a_probe_that_a_crash_interrupted_is_counted_when_it_is_recovered() -> None:
    bench = Bench({"do-a": [done(1)]}, breaker=BreakerPolicy(failures=1, open_seconds=60.0))
    await bench.run(plan())
    bench.clock.now += 61
    bench.ledger.states.clear()
    bench.ledger.moves.clear()
    bench.sandbox.answers = {"do-a": [KeyboardInterrupt()], "check-a": [done(0)]}
    with pytest.raises(KeyboardInterrupt):
        await bench.run(plan())
    again = Runner(
        bench.ledger, bench.sandbox, bench.verifier, bench.clock, bench.runner._settings, bench.ledger.breakers
    )
    assert again.breakers["test.a"].state is BreakerState.HALF_OPEN
    assert (await again.recover(plan(), list(bench.ledger.moves), bench.cancelled)).result == "verified"
    assert again.breakers["test.a"].state is BreakerState.CLOSED
