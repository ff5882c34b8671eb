"""What the gates and the diagnosis are told of the world."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from flow_world import JUSTIFIED, NOW, World, open_world

from actions.catalog import ActionDefinition, Catalog, load_catalog, parse_action
from actions.model import Declined, Plan, Refusal, StepMoved, StepState
from actions.policy import AutonomyPolicy
from agent.config import Config, InventoryEntry, Prometheus, Sandbox
from agent.journal.records import AlertsReceived, PlanMade, StepRecorded
from agent.remediation import Remediation
from agent.situation import Situations
from rules.model import Alert, Diagnosis, Hypothesis, Proposal, Topology
from rules.packs import PackSet


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    made = await open_world(tmp_path)
    yield made
    await made.store.close()


async def test_verified_steps_of_the_plan_under_way_do_not_count_against_its_next_one(world: World) -> None:
    id = await world.acting(steps=2)
    path = [StepState.PLANNED, StepState.INTENT, StepState.RAN, StepState.VERIFIED]
    for before, after in itertools.pairwise(path):
        move = StepMoved(incident=id, plan=f"plan-{id}", step=0, before=before, after=after, at=NOW)
        await world.store.record(StepRecorded(move=move))
    remediation = Remediation(
        world.config,
        load_catalog((), ()),
        world.store,
        world.verifier,  # type: ignore[arg-type]
        world.telemetry,
        clock=lambda: NOW,
    )
    assert len(remediation.context(world.incident(id)).history) == 1
    assert not remediation.context(world.incident(id)).past()
    world.now = NOW + 3600.0  # outside the merging windows: an incident of its own, for which it does count
    other = await world.alert(name="Other")
    assert other != id
    (theirs,) = remediation.context(world.incident(other)).past()
    assert theirs.incident == id


async def test_two_plans_that_ask_at_the_same_moment_are_not_both_let_begin(world: World) -> None:
    one = await world.acting("One")
    world.now += 3600.0
    two = await world.acting("Two")
    assert one != two
    config = Config(
        autonomy=AutonomyPolicy(default="auto"),
        inventory={"front": InventoryEntry()},
        sandbox=Sandbox(allow_unenforced_auto=True),
    )
    catalog = Catalog([parse_action({**ACTION, "name": "a"}, "test")])
    remediation = Remediation(
        config,
        catalog,
        world.store,
        world.verifier,  # type: ignore[arg-type]
        world.telemetry,
        clock=lambda: world.now,
    )
    plans = [world.incident(id).plan for id in (one, two)]
    assert plans[0] is not None
    assert plans[1] is not None
    assert remediation._permit(plans[0], 0) is None
    refused = remediation._permit(plans[1], 0)
    assert refused is not None
    assert refused.reason is Refusal.BUSY_TARGET
    # The first one's task ends without having begun: the second may.
    await remediation.run(world.incident(one), cancelled())
    assert remediation._permit(plans[1], 0) is None


def cancelled() -> asyncio.Event:
    event = asyncio.Event()
    event.set()
    return event


def action(name: str, **more: object) -> ActionDefinition:
    return parse_action({**ACTION, "name": name, **more}, "test")


async def test_a_plan_waits_until_the_series_can_show_that_it_helped(world: World) -> None:
    """With the default resolution: a rate window of four steps and one sample more than is asked for, each 30 s."""
    id = await world.alert()
    await world.moved(id, "investigating", "diagnosed")
    config = Config(inventory={"front": InventoryEntry()})
    assert config.recovery_seconds == 4 * 30 + 4 * 30 <= config.verify.deadline_seconds
    verifier: Any = world.verifier
    quick = action("quick")
    remediation = Remediation(config, Catalog([quick]), world.store, verifier, world.telemetry, clock=lambda: world.now)
    incident = world.incident(id)
    best = Hypothesis(
        cause="c",
        service="front",
        fault="hang",
        title="it hangs",
        posterior=0.99,
        confidence=0.99,
        proposals=(Proposal(action="quick", service="front"),),
    )
    incident.diagnosis = Diagnosis(verdict="ranked", hypotheses=(best,))
    incident.justification, incident.evidence_at = JUSTIFIED, NOW
    plan = await remediation.consider(incident)
    assert isinstance(plan, Plan), plan
    assert quick.verify_seconds < plan.verify_seconds == config.recovery_seconds


async def test_a_look_comes_before_the_remedy_and_not_in_its_place(world: World) -> None:
    id = await world.alert()
    await world.moved(id, "investigating", "diagnosed")
    nothing = {"reversible": False, "blast_radius": "none", "changes": "nothing", "auto": "allowed"}
    look, mend = action("look", read_only=True, risk=nothing), action("mend")
    config = Config(
        autonomy=AutonomyPolicy(default="auto"),
        inventory={"front": InventoryEntry()},
        sandbox=Sandbox(allow_unenforced_auto=True),
    )

    def remediation(*actions: ActionDefinition) -> Remediation:
        verifier: Any = world.verifier
        return Remediation(config, Catalog(actions), world.store, verifier, world.telemetry, clock=lambda: world.now)

    incident = world.incident(id)
    proposals = tuple(Proposal(action=name, service="front") for name in ("look", "mend"))
    best = Hypothesis(
        cause="c", service="front", fault="hang", title="it hangs", posterior=0.99, confidence=0.99, proposals=proposals
    )
    incident.diagnosis = Diagnosis(verdict="ranked", hypotheses=(best,))
    incident.justification, incident.evidence_at = JUSTIFIED, NOW
    first = await remediation(look, mend).consider(incident)
    assert isinstance(first, Plan), first
    assert [step.action for step in first.steps] == ["look"]
    await world.store.record(PlanMade(at=NOW, plan=first))
    await world.moved(id, "acting")
    await world.verified(id)
    assert incident.only_looked
    second = await remediation(look, mend).consider(incident)
    assert isinstance(second, Plan), second
    assert [step.action for step in second.steps] == ["mend"]
    without = msgspec.structs.replace(best, proposals=proposals[:1])
    incident.diagnosis = Diagnosis(verdict="ranked", hypotheses=(without,))
    third = await remediation(look, mend).consider(incident)
    assert isinstance(third, Declined)
    assert "what look captured is kept" in third.detail


ACTION = {
    "description": "For tests.",
    "target": "t",
    "parameters": {},
    "argv": ["/bin/true"],
    "check": ["/bin/true"],
    "undo": "none",
    "idempotent": True,
    "risk": {"reversible": False, "blast_radius": "service", "changes": "runtime", "auto": "allowed"},
}


class Graph:
    """Discovery that answers `found`, or never."""

    def __init__(self, found: Topology | None) -> None:
        self.found = found

    async def __call__(self, deadline_seconds: float) -> Topology:
        if self.found is None:
            await asyncio.Event().wait()
        assert self.found is not None
        return self.found


async def test_who_calls_whom_is_not_forgotten_while_metrics_are_silent() -> None:
    config = Config(prometheus=Prometheus(timeout_seconds=0.05))
    graph = Graph(Topology(edges=(("front", "orders"),)))
    now = NOW
    situations = Situations(config, PackSet.of(()), (), Topology(kinds={"front": "http"}), graph, lambda: now)
    assert (await situations._topology(now)).edges == (("front", "orders"),)
    for silent in (Topology(), None):
        now += 1000.0
        graph.found = silent
        assert (await situations._topology(now)).edges == (("front", "orders"),)


async def fires(world: World, name: str, starts_at: float) -> str:
    """The incident that an alert of the front opens."""
    labels = {"alertname": name, "service": "front"}
    alert = Alert(tenant="default", fingerprint=name, status="firing", labels=labels, starts_at=starts_at, digest=name)
    record = AlertsReceived(at=starts_at, tenant="default", receiver="r", group_key=name, alerts=(alert,))
    await world.store.record(record)
    current = world.store.state.current("default", name)
    assert current is not None
    return current.incident


@pytest.mark.parametrize(("fires_since", "quiet"), [(3600.0, True), (3 * 86400.0, False)])
async def test_an_alert_that_fires_for_days_is_how_things_are(world: World, fires_since: float, quiet: bool) -> None:
    """An earlier, escalated incident's alert still fires: no baseline as far as it reaches, but not instead of one."""
    config = Config(prometheus=Prometheus(window_seconds=7200.0, history_seconds=()))

    chronic = await fires(world, "Chronic", NOW - fires_since)
    world.now = NOW - fires_since
    await world.moved(chronic, "escalated")
    fresh = await fires(world, "Fresh", NOW - 60.0)
    assert fresh != chronic
    situations = Situations(config, PackSet.of(()), (), Topology(kinds={"front": "http"}), None, lambda: NOW)
    look = await situations.of(world.incident(fresh), world.store.state)
    assert bool(look.quiet) is quiet


@pytest.mark.parametrize(
    ("lasted", "reaches"),
    [(0.3, 1.0), (0.5, 1.0), (0.9, 1.4), (1.5, 2.0), (3.4, 3.9), (3.8, 4.0), (5.0, 1.0)],
)
async def test_a_look_reaches_back_behind_the_trouble_before(world: World, lasted: float, reaches: float) -> None:
    """In windows: how long an earlier incident lasted that ended when this one began, and how far the look goes back.
    Half a window to compare with is enough; after trouble without an end the window is the usual one."""
    window = 7200.0
    about = Prometheus(window_seconds=window, history_seconds=(), onset_margin_seconds=0.0, rate_seconds=30.0)
    fresh_at = NOW - 60.0
    earlier = await fires(world, "Earlier", fresh_at - lasted * window)
    world.now = fresh_at - lasted * window
    await world.moved(earlier, "escalated")
    fresh = await fires(world, "Fresh", fresh_at)
    assert fresh != earlier
    topology = Topology(kinds={"front": "http"})
    situations = Situations(Config(prometheus=about), PackSet.of(()), (), topology, None, lambda: NOW)
    incident, state = world.incident(fresh), world.store.state
    start = situations._start(incident, state, incident.onset)
    assert (incident.onset - start) / window == pytest.approx(reaches, abs=0.11)
    look = await situations.of(incident, state)
    free = incident.onset - start - sum(end - begin for begin, end in look.quiet)
    assert free >= window / 10.0


async def test_an_alert_that_comes_and_goes_leaves_its_own_trouble_out_of_the_baseline(world: World) -> None:
    """Three minutes after it began the alert starts anew, and nobody saw it recover: the time between is not normal."""
    about = Prometheus(history_seconds=(), onset_margin_seconds=10.0)
    begun = NOW - 300.0
    id = await fires(world, "Flaps", begun)
    await fires(world, "Flaps", NOW - 120.0)
    topology = Topology(kinds={"front": "http"})
    situations = Situations(Config(prometheus=about), PackSet.of(()), (), topology, None, lambda: NOW)
    look = await situations.of(world.incident(id), world.store.state)
    assert look.onset == NOW - 120.0 - 10.0
    assert look.quiet == ((begun - 10.0, look.onset),)


async def test_what_was_seen_to_recover_and_comes_again_is_compared_with_the_time_between(world: World) -> None:
    id = await fires(world, "Again", NOW - 300.0)
    world.now = NOW - 250.0
    await world.moved(id, "verifying")
    await world.moved(id, "resolved")
    assert await fires(world, "Again", NOW - 120.0) == id
    topology = Topology(kinds={"front": "http"})
    config = Config(prometheus=Prometheus(history_seconds=(), onset_margin_seconds=10.0))
    look = await Situations(config, PackSet.of(()), (), topology, None, lambda: NOW).of(
        world.incident(id), world.store.state
    )
    assert look.quiet == ()
