"""An alert of a service's own latency finds the cause in what the service depends on."""

from __future__ import annotations

import pytest
from anyalert_world import STEP, Server
from dependency_world import Depends

from agent.config import Config
from agent.config import Prometheus as Section
from agent.expressions import Expressions, rules_of
from agent.packs import load_packs
from agent.situation import Situations
from agent.sources.prometheus import Prometheus, PrometheusSource
from agent.systems import SystemsSeen
from rules.diagnose import diagnose
from rules.model import Diagnosis, Situation
from rules.packs import Cause, Reference

EVERY = load_packs()


def source(url: str) -> PrometheusSource:
    return PrometheusSource(Prometheus(url=url, rate=f"{4 * STEP}s", timeout_seconds=60.0, concurrency=4))


async def looked(known: PrometheusSource, systems: SystemsSeen, scenario: Depends) -> Situation:
    config = Config(prometheus=Section(url=known.config.url, step_seconds=float(STEP), timeout_seconds=60.0))
    made = Situations(
        *(config, EVERY, [known], scenario.topology, None),
        clock=lambda: scenario.until,
        expressions=Expressions(rules_of(known)),
        systems=systems,
    )
    return await made.around((scenario.alert,))


def told(diagnosis: Diagnosis) -> str:
    return ", ".join(f"{h.cause}@{h.service} {h.posterior:.2f}" for h in diagnosis.hypotheses) or "nothing"


async def test_a_symptom_above_finds_the_cause_below(below: Server, dependencies: list[Depends]) -> None:
    """First, clear of the others, with evidence for and against it, and with a proposal or the reason for none."""
    wrong: list[str] = []
    async with source(below.url) as known:
        systems = SystemsSeen(known, at=dependencies[0].until)
        for scenario in (one for one in dependencies if one.cause):
            situation = await looked(known, systems, scenario)
            found = diagnose(situation, EVERY)
            first = found.hypotheses[0] if found.hypotheses else None
            if first is None or (first.cause, first.service) != (scenario.cause, scenario.culprit) or not found.clear:
                wrong.append(f"{scenario.cause}@{scenario.culprit}: {told(found)}")
                continue
            assert first.path[0] == scenario.alert.labels["service"]
            odds = [c.log_odds for c in first.contributions if c.evidence not in ("prior", "symptom")]
            assert max(odds) > 0
            known_cause = EVERY.causes[scenario.cause]
            assert bool(first.no_remedy) == (not known_cause.proposals)
            assert [p.action for p in first.proposals] or first.no_remedy or _points_at_nothing(known_cause), first
    assert not wrong, "\n".join(wrong)


def _points_at_nothing(cause: Cause) -> bool:
    """Whether each proposal takes a parameter from a label that a simulated series need not have."""
    return all(any(isinstance(v, Reference) for v in p.params.values()) for p in cause.proposals)


@pytest.mark.full
def test_the_full_volume_has_every_cause(dependencies: list[Depends]) -> None:
    assert {one.cause for one in dependencies} >= EVERY.reachable_causes


async def test_nothing_below_is_blamed_when_all_is_well_there(below: Server, dependencies: list[Depends]) -> None:
    scenario = next(one for one in dependencies if not one.cause)
    async with source(below.url) as known:
        situation = await looked(known, SystemsSeen(known, at=scenario.until), scenario)
    found = diagnose(situation, EVERY)
    assert not {h.cause for h in found.hypotheses} & EVERY.reachable_causes, told(found)


async def test_a_system_is_asked_for_where_it_is_and_nowhere_else(below: Server, dependencies: list[Depends]) -> None:
    scenario = dependencies[0]
    async with source(below.url) as known:
        systems = SystemsSeen(known, at=scenario.until)
        has = await systems(EVERY.reached_by, 10.0)
        situation = await looked(known, systems, scenario)
        unasked = await looked(known, SystemsSeen(known, at=scenario.at - 30 * 86400), scenario)
    assert has[scenario.node("redis")] == {"redis_up"}
    (memory,) = (e for e in situation.evidence if e.name == "redis_memory_ratio")
    assert f'service=~"{scenario.node("host")}|{scenario.node("redis")}"' in memory.query
    assert [s.service for s in memory.frame.ids] == [scenario.node("redis")]
    assert not [e for e in unasked.evidence if e.name.startswith("redis_")]
    assert len(unasked.evidence) < len(situation.evidence) - 40


async def test_a_server_that_cannot_be_asked_reaches_nothing_and_is_asked_again() -> None:
    now = 0.0
    async with source("http://127.0.0.1:9") as gone:
        systems = SystemsSeen(gone, clock=lambda: now)
        assert await systems(("redis_up",), 1.0) == {}
        first = systems._until
        now = first + 1.0
        assert await systems(("redis_up",), 1.0) == {}
        assert systems._until > first
