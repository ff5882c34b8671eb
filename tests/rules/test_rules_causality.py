"""Who moved first, by a test whose chance is counted, and how the trouble lies on the call graph."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rules_world import ONSET, golden, quiet, sid

from rules.causality import FINE_SECONDS, LEAD, P_LEADS, Clock, direction, lead_lag
from rules.diagnose import diagnose, observe
from rules.model import Evidence, Frame, Situation
from rules.packs import PackSet


def follower(rng: np.random.Generator, lag: int, n: int = 200, noise: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    """x wanders, and y does what x did `lag` samples ago."""
    steps = rng.normal(0, 1, n + lag)
    x = np.cumsum(steps)
    y = np.roll(x, lag)
    return x[lag:], y[lag:] + rng.normal(0, noise, n)


@pytest.mark.parametrize("lag", [1, 3, 10])
@pytest.mark.parametrize("seed", range(5))
def test_who_leads_is_found_and_by_how_much(lag: int, seed: int) -> None:
    x, y = follower(np.random.default_rng(seed), lag)
    found, leads, follows = lead_lag(x, y, 20)
    assert (found, leads < 0.02, follows > 0.5) == (lag, True, True)
    mirrored, leads, follows = lead_lag(y, x, 20)
    assert (mirrored, leads > 0.5, follows < 0.02) == (-lag, True, True)


def test_unrelated_series_lead_as_often_as_the_level_says() -> None:
    """The surrogates' p is honest: of independent pairs, random walks and white noise, about one in twenty each way."""
    rng = np.random.default_rng(5)
    false, pairs = 0, 400
    for i in range(pairs):
        x, y = rng.normal(0, 1, (2, 150))
        if i % 2:
            x, y = np.cumsum(x), np.cumsum(y)
        _, leads, follows = lead_lag(x, y, 10)
        false += (leads <= P_LEADS) + (follows <= P_LEADS)
    assert false / (2 * pairs) <= 1.6 * P_LEADS


def test_what_moves_at_once_leads_nobody() -> None:
    rng = np.random.default_rng(6)
    x = np.cumsum(rng.normal(0, 1, 200))
    _, leads, follows = lead_lag(x, x + rng.normal(0, 0.1, 200), 10)
    assert min(leads, follows) > P_LEADS


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=0, max_size=60),
    st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=0, max_size=60),
    st.integers(1, 12),
)
def test_any_numbers_give_probabilities(x: list[float], y: list[float], lags: int) -> None:
    n = min(len(x), len(y))
    _, leads, follows = lead_lag(np.array(x[:n]), np.array(y[:n]), lags)
    assert 0 < leads <= 1
    assert 0 < follows <= 1


def shifted(situation: Situation, metric: str, service: str, seconds: int, **labels: str) -> Situation:
    """The same incident in which one series did everything so much earlier."""
    moved = sid(metric, service, **labels)

    def earlier(e: Evidence) -> Evidence:
        if moved not in e.frame.ids:
            return e
        values = e.frame.values.copy()
        at = e.frame.ids.index(moved)
        values[at] = np.roll(values[at], -seconds)
        values[at, -seconds:] = values[at, -seconds - 1]
        return replace(e, frame=Frame(e.frame.times, e.frame.ids, values))

    return replace(situation, evidence=tuple(earlier(e) for e in situation.evidence))


def test_what_moved_first_is_told_and_weighs_a_little(packs: PackSet) -> None:
    situation = shifted(golden("memory_leak"), "process_memory_used_ratio", "orders", 5)
    situation = shifted(situation, "process_address_space_used_ratio", "orders", 5)
    situation = shifted(situation, "process_memory_bytes", "orders", 5)
    observer = observe(situation, packs)
    clock = Clock(observer)
    (memory,) = [f for f in observer.findings if f.signal == "process_address_space_used_ratio"]
    lead = clock.lead(memory)
    found = diagnose(situation, packs).hypotheses[0]
    assert found.cause == "process.memory_leak"
    told = [c for c in found.contributions if c.evidence == "order"]
    if lead is not None:
        assert lead.p <= P_LEADS
    assert all(abs(c.log_odds) == LEAD and "surrogates: p =" in c.text for c in told)


def test_a_step_that_comes_first_leads(packs: PackSet) -> None:
    situation = shifted(golden("blocking_session"), "pg_blocking_locks", "postgres", 4)
    situation = shifted(situation, "pg_active_sessions", "postgres", 4)
    observer = observe(situation, packs)
    (locks,) = [f for f in observer.findings if f.signal == "pg_blocking_locks"]
    lead = Clock(observer).lead(locks)
    assert lead is not None
    assert (lead.seconds > 0, lead.nats, lead.p <= P_LEADS) == (True, LEAD, True)


def test_who_moved_first_in_earlier_trouble_says_nothing_of_this(packs: PackSet) -> None:
    """Half a minute before the onset there was trouble in which the locks followed, and it is known as an incident."""
    situation = shifted(golden("blocking_session"), "pg_blocking_locks", "postgres", 4)
    situation = shifted(situation, "pg_active_sessions", "postgres", 4)

    def troubled(e: Evidence) -> Evidence:
        values = e.frame.values.copy()
        for series, late in ((sid("http_latency_p95", "front"), 0), (sid("pg_blocking_locks", "postgres"), 9)):
            if series in e.frame.ids:
                at = (e.frame.times >= ONSET - 60 + late) & (e.frame.times < ONSET - 40 + late)
                values[e.frame.ids.index(series), at] = 50.0
        return replace(e, frame=Frame(e.frame.times, e.frame.ids, values))

    twice = replace(situation, evidence=tuple(troubled(e) for e in situation.evidence))
    for known, leads in (((), False), (((ONSET - 62, ONSET - 25),), True)):
        observer = observe(replace(twice, quiet=known), packs)
        (locks,) = [f for f in observer.findings if f.signal == "pg_blocking_locks"]
        lead = Clock(observer).lead(locks)
        assert (lead is not None and lead.nats > 0) is leads, lead


def test_coarse_samples_are_not_asked(packs: PackSet) -> None:
    situation = shifted(golden("blocking_session"), "pg_blocking_locks", "postgres", 4)
    factor = 60.0
    assert factor > FINE_SECONDS
    coarse = replace(
        situation,
        onset=situation.onset * factor,
        until=situation.until * factor,
        evidence=tuple(
            replace(e, frame=Frame(e.frame.times * factor, e.frame.ids, e.frame.values)) for e in situation.evidence
        ),
    )
    observer = observe(coarse, packs)
    assert all(Clock(observer).lead(f) is None for f in observer.findings)


def test_the_direction_is_told(packs: PackSet) -> None:
    observer = observe(golden("payments_slow"), packs)
    suffering, callers, below, callees = direction(observer, "payments")
    assert (suffering, callers, below, callees) == (1, 1, 0, 0)
    (first, *_) = diagnose(golden("payments_slow"), packs).hypotheses
    (told,) = [c for c in first.contributions if c.evidence == "direction"]
    assert told.log_odds == 0.0
    assert told.state == "travels up"
    assert "1 of 1 that depend on it suffer" in told.text
    assert direction(observe(quiet(), packs), "orders")[0] == 0
