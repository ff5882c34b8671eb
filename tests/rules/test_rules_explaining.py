"""Generic causes yield to specific ones that account for them, and keep their place where nothing else speaks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from rules_world import FAULTS, ONSET, golden

from rules.diagnose import diagnose
from rules.explaining import COMMON, EFFECT, FAR, _accounted, _gain
from rules.model import Evidence, Frame, SeriesId, Situation, Topology
from rules.packs import PackSet


def busier(situation: Situation, factor: float) -> Situation:
    """The same incident with so many more requests that every service's own latency and failures can be told."""
    return replace(
        situation,
        evidence=tuple(
            replace(e, frame=Frame(e.frame.times, e.frame.ids, e.frame.values * factor))
            if e.name == "http_request_rate"
            else e
            for e in situation.evidence
        ),
    )


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("seed", range(4))
def test_a_specific_cause_is_not_hidden_by_what_it_does(packs: PackSet, fault: str, seed: int) -> None:
    _, cause, service = FAULTS[fault]
    found = diagnose(busier(golden(fault, seed=seed), 10.0), packs, 20)
    assert found.best is not None, found.sentence
    assert (found.best.cause, found.best.service) == (cause, service)
    assert found.margin >= 0.2


def test_the_effects_really_are_there(packs: PackSet) -> None:
    """Without them the test above would show nothing: the leak's generic rival is a candidate, and comes after it."""
    found = diagnose(busier(golden("memory_leak"), 10.0), packs, 20)
    causes = [(h.cause, h.service) for h in found.hypotheses]
    assert any(packs.causes[cause].generic and service == "orders" for cause, service in causes)
    leak = found.hypotheses[0]
    (effects,) = [c for c in leak.contributions if c.evidence == "effects"]
    assert effects.log_odds > 1
    assert "orders" in effects.text


def slow(*services: str, series: dict[str, str] | None = None) -> Situation:
    """A chain front -> a -> b -> c, of which only some are measured; the named ones became slow."""
    times = ONSET + 60.0 * np.arange(-60, 6)
    rng = np.random.default_rng(3)
    ids, rows = [], []
    for i, service in enumerate(("front", "a", "b")):
        base = 0.4 - 0.1 * i
        level = np.where((times >= ONSET) & (service in services), base + 2.0, base)
        ids += [SeriesId.of(name, {"service": service}) for name in ("latency_avg_seconds", "requests_sum")]
        rows += [level * rng.normal(1, 0.02, times.size), np.full(times.size, 600.0)]
    for name, service in (series or {}).items():
        ids.append(SeriesId.of(name, {"service": service}))
        rows.append(np.where(times >= ONSET, 95.0, 20.0) + rng.normal(0, 0.5, times.size))
    evidence = Evidence("all", "recorded", Frame(times, tuple(ids), np.array(rows)))
    edges = (("front", "a"), ("a", "b"), ("b", "c"))
    return Situation((), "front", ONSET, float(times[-1]), (evidence,), Topology(edges))


def test_a_generic_cause_stands_where_nothing_is_more_telling(packs: PackSet) -> None:
    found = diagnose(slow("front", "a", "b"), packs)
    assert found.hypotheses[0].service == "b"
    assert packs.causes[found.hypotheses[0].cause].generic


def test_what_nobody_measures_shows_as_its_callers_own(packs: PackSet) -> None:
    """c is not measured, and its CPU is at its limit: what b adds itself is c's doing."""
    found = diagnose(slow("front", "a", "b", series={"cpu_usage_percent": "c"}), packs, 20)
    assert (found.hypotheses[0].service, found.hypotheses[0].cause) == ("c", "service.cpu_exhausted")
    assert any(c.evidence == "effects" for c in found.hypotheses[0].contributions)


def test_a_measured_callee_that_is_well_explains_little_of_its_caller(packs: PackSet) -> None:
    """a is slow by itself; b is measured and fast, and happens to use much CPU: only a timeout could lead from one to
    the other. Nobody measures c, which counts for more."""

    def effects(service: str) -> float:
        found = diagnose(slow("front", "a", "b", series={"cpu_usage_percent": service}), packs, 20)
        (cpu,) = [h for h in found.hypotheses if h.cause == "service.cpu_exhausted"]
        return sum(c.log_odds for c in cpu.contributions if c.evidence == "effects")

    assert diagnose(slow("front", "a", series={"cpu_usage_percent": "b"}), packs).hypotheses[0].service in ("a", "b")
    assert effects("c") > 0
    near, far = _gain(6.0, EFFECT), _gain(6.0, FAR)
    assert near - far > 1.5


def test_several_victims_count_little_more_than_the_worst() -> None:
    effects = dict.fromkeys("abcdefgh", (6.0, "generic"))
    one, many = _accounted({"a": EFFECT}, effects), _accounted(dict.fromkeys(effects, EFFECT), effects)
    assert one is not None
    assert many is not None
    assert many.nats == pytest.approx(one.nats + COMMON)
    assert _accounted({"z": EFFECT}, effects) is None


def test_accounting_never_costs_and_never_gains_more_than_the_evidence() -> None:
    for weight in np.linspace(0.01, 200, 50):
        assert 0 < _gain(float(weight), FAR) < _gain(float(weight), EFFECT) <= weight
    assert _gain(100.0, EFFECT) == pytest.approx(100.0 + np.log(EFFECT))
