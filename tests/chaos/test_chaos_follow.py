"""By which ranking a run is judged (stories made by hand, as the agent's API tells them look by look), and what of the
shop belongs to it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import pytest

from agent.chaos import follow as following
from agent.chaos.arms import Doings
from agent.chaos.faults import known
from agent.chaos.follow import Job, Rankings, follow
from agent.chaos.scenario import load_scenarios
from agent.chaos.world import HARNESS_FAULTS
from agent.demo.probe import Checkout, Probe

LOCK, SLOW, LEAK = "postgres.blocking_session@postgres", "service.adds_latency@postgres", "process.memory_leak@orders"


def plan(cause: str, state: str, *, read_only: bool = False) -> dict[str, Any]:
    step = {"action": "diagnostic.look" if read_only else "mend", "state": state, "read_only": read_only}
    return {"cause": cause.partition("@")[0], "service": "postgres", "steps": [step]}


def past(cause: str, state: str) -> dict[str, Any]:
    return {"cause": cause.partition("@")[0], "service": "postgres", "actions": ["mend"], "states": [state]}


def incident(
    *ranking: str,
    id: str = "inc-1",
    state: str = "acting",
    plan: dict[str, Any] | None = None,
    past: tuple[dict[str, Any], ...] = (),
    verdict: str = "ranked",
) -> dict[str, Any]:
    pairs = (name.partition("@") for name in ranking)
    hypotheses = [{"cause": cause, "service": service} for cause, _, service in pairs]
    verdict = verdict if ranking else ""
    return {"id": id, "state": state, "verdict": verdict, "hypotheses": hypotheses, "plan": plan, "past_plans": past}


ACTED = incident(LOCK, SLOW, plan=plan(LOCK, "intent"))
Looks = list[list[dict[str, Any]]]
# name: (what the API told, look by look; by which ranking the run is judged)
STORIES: dict[str, tuple[Looks, list[str]]] = {
    "it never ranked anything": ([[incident(state="open")], [incident(state="escalated")]], []),
    "it acted, and looked again at a world that it had changed": (
        [[incident(LOCK, SLOW)], [ACTED], [incident(SLOW, LOCK, state="resolved", past=(past(LOCK, "verified"),))]],
        [LOCK, SLOW],
    ),
    "it acted between two looks of ours": (
        [[incident(LOCK, SLOW)], [incident(SLOW, state="investigating", past=(past(LOCK, "verified"),))]],
        [LOCK, SLOW],
    ),
    "its ranking was never seen, its plan is": (
        [[incident(SLOW, state="investigating", past=(past(LOCK, "verified"),))]],
        [LOCK],
    ),
    "the first action was wrong, the second right: the first counts": (
        [
            [incident(LEAK, LOCK, plan=plan(LEAK, "intent"))],
            [incident(LOCK, plan=plan(LOCK, "intent"), past=(past(LEAK, "verify_failed"),))],
        ],
        [LEAK, LOCK],
    ),
    "a plan that was cancelled is no action": (
        [[incident(LEAK, plan=plan(LEAK, "cancelled"))], [incident(LOCK, SLOW, plan=plan(LOCK, "ran"))]],
        [LOCK, SLOW],
    ),
    "a read-only step is no action": (
        [[incident(LEAK, plan=plan(LEAK, "ran", read_only=True))], [incident(LOCK, state="escalated")]],
        [LOCK],
    ),
    "another incident was only looked at": (
        [[incident(SLOW, id="inc-0", state="escalated"), incident(LOCK, plan=plan(LOCK, "intent"))]],
        [LOCK],
    ),
    "of two incidents that were acted upon, the one acted upon first": (
        [
            [incident(SLOW, id="inc-0"), incident(LOCK, plan=plan(LOCK, "intent"))],
            [incident(SLOW, id="inc-0", plan=plan(SLOW, "intent")), incident(LOCK, plan=plan(LOCK, "verified"))],
        ],
        [LOCK],
    ),
    "nothing was done: what people were handed": (
        [
            [incident(LEAK, state="diagnosed")],
            [incident(LEAK, state="resolved"), incident(LOCK, SLOW, id="inc-2", state="escalated")],
        ],
        [LOCK, SLOW],
    ),
    "nothing was done: the last word, not an earlier one": (
        [[incident(LEAK, state="diagnosed")], [incident(LOCK, state="escalated")]],
        [LOCK],
    ),
    "nothing was done and nobody handed anything": ([[incident(LOCK, state="resolved")]], [LOCK]),
    "what is insufficient ranks nothing": (
        [[incident(LOCK, state="escalated", verdict="insufficient_evidence")]],
        [],
    ),
}


@pytest.mark.parametrize("name", STORIES)
def test_a_run_is_judged_by_the_ranking_that_its_first_action_rests_on(name: str) -> None:
    looks, right = STORIES[name]
    rankings = Rankings()
    for look in looks:
        rankings.see(look)
    assert [f"{cause}@{service}" for cause, service in rankings.judged(looks[-1])] == right


class Mending:
    """A shop that is fine until it is put right again, which takes a restart."""

    def __init__(self) -> None:
        self.probe, self.browse = Probe("http://127.0.0.1:9/"), Probe("http://127.0.0.1:9/")

    def check(self) -> None: ...
    async def quiet(self, seconds: float, patience: float) -> None: ...
    async def kill_agent(self) -> None: ...

    async def alerts(self) -> dict[str, float]:
        return {}

    async def agent_incidents(self) -> list[dict[str, Any]]:
        return []

    async def inject(self, fault: str, settings: Mapping[str, float]) -> float:
        return time.time()

    async def clear(self, fault: str) -> None:
        self.probe._seen += [Checkout(time.time() + 0.01 * n, 0.75, False) for n in (1, 2, 3)]


async def test_what_is_put_right_after_a_run_is_no_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "CONTROL_SECONDS", 0.0)
    scenario = load_scenarios(None, known() | HARNESS_FAULTS)["control_good_deploy"]
    shop = Mending()
    run = await follow(shop, Job(scenario, "nothing", 1, 1), Doings())
    assert len(shop.probe.since(run.at)) == 3
    assert (run.degraded, run.void) == (None, "")
