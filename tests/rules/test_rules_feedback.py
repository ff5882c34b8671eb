"""Laws of learning from feedback and of recurrence: nothing without counts, expiry, order, bounds, symmetry."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rules_world import FAULTS, golden, quiet

from rules.diagnose import conclude, diagnose, observe
from rules.feedback import Counted, Observation, Refuted, Windows, adjusted, expires, tally
from rules.packs import STATES, PackSet
from rules.recurrence import ALIKE, Precedent, Signature, nearest, signature_of, similarity, weights

SETTINGS = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
CAUSES = ["process.memory_leak", "process.cpu_saturation", "http.bad_flag", "no.such_cause"]
COLUMNS = ["memory", "cpu", "latency", "errors@callers", "flag", "no_such_group"]
TABLES = st.dictionaries(st.sampled_from(COLUMNS), st.sampled_from(STATES), max_size=4)
OBSERVATIONS = st.lists(
    st.builds(
        Observation,
        at=st.floats(0, 10_000),
        incident=st.sampled_from([f"inc-{n}" for n in range(6)]),
        cause=st.sampled_from(CAUSES),
        states=TABLES,
        refuted=st.lists(st.builds(Refuted, cause=st.sampled_from(CAUSES), states=TABLES), max_size=2).map(tuple),
    ),
    max_size=8,
)
WINDOWS = st.builds(Windows, st.floats(1, 5000), st.dictionaries(st.sampled_from(COLUMNS), st.floats(1, 20_000)))


def test_without_feedback_it_is_the_shipped_model_itself(packs: PackSet) -> None:
    assert adjusted(packs, (), "x") is packs
    nobody = (Counted(cause="no.such_cause", column="memory", state="strong", given=5),)
    nothing = (Counted(cause="process.memory_leak", column="no_such_group", state="strong", given=5),)
    assert adjusted(packs, (*nobody, *nothing), "x") is packs


@SETTINGS
@given(OBSERVATIONS, st.floats(0, 30_000), WINDOWS, st.randoms(use_true_random=False))
def test_counts_depend_on_what_was_said_and_when_alone(
    seen: list[Observation], now: float, windows: Windows, rng: Any
) -> None:
    counts = tally(seen, now, windows)
    mixed = seen.copy()
    rng.shuffle(mixed)
    assert tally(mixed, now, windows) == counts
    within = [o for o in seen if any(o.at <= now <= o.at + windows.of(c) for c in COLUMNS)]
    assert tally(within, now, windows) == counts
    end = expires(seen, now, windows)
    assert end >= now
    fresh = [o for o in seen if o.at <= now]
    if math.isfinite(end) and all(o.at <= now for o in seen):
        assert tally(fresh, end, windows) == counts
        assert tally(fresh, math.nextafter(end, math.inf) + 1e-6, windows) != counts
    latest = max((o.at for o in seen), default=0.0)
    assert tally(seen, latest + 25_000, windows) == ()


@SETTINGS
@given(OBSERVATIONS)
def test_tables_stay_probabilities_and_only_what_was_counted_moves(packs: PackSet, seen: list[Observation]) -> None:
    counts = tally(seen, 5_000.0, Windows(1e9))
    moved = adjusted(packs, counts, "x")
    touched = {(c.cause, c.column) for c in counts}
    for name, cause in moved.causes.items():
        before = packs.causes[name]
        assert msgspec.structs.replace(cause, evidence=before.evidence) == before
        for line, old in zip(cause.evidence, before.evidence, strict=True):
            assert list(line.states) == list(old.states)
            for side in (0, 1):
                assert math.fsum(pair[side] for pair in line.states.values()) <= 1.0 + len(STATES) * 1e-3
                assert all(0.0 < pair[side] < 1.0 for pair in line.states.values())
            if (name, line.column) not in touched:
                assert line == old


def test_the_formula_by_hand(packs: PackSet) -> None:
    """Ten times strong: K = 20 imagined observations of the shipped table, Laplace's estimate of what was seen."""
    cause = "process.memory_leak"
    line = next(e for e in packs.causes[cause].evidence if e.column == "memory")
    counts = (Counted(cause=cause, column="memory", state="strong", given=10),)
    moved = next(e for e in adjusted(packs, counts, "x").causes[cause].evidence if e.column == "memory")
    mass = math.fsum(p for p, _ in line.states.values())
    size = len(line.states)
    for state, (p, q) in line.states.items():
        laplace = ((10 if state == "strong" else 0) + 1) / (10 + size)
        assert moved.states[state][0] == pytest.approx((20 * p + 10 * mass * laplace) / 30)
        assert moved.states[state][1] == q


@pytest.mark.parametrize("fault", FAULTS)
def test_confirmation_makes_it_no_less_sure(packs: PackSet, fault: str) -> None:
    """What a person confirmed again and again, seen once more, is at least as likely as before, and comes first."""
    _, cause, service = FAULTS[fault]
    situation = golden(fault)
    observer = observe(situation, packs)
    states = signature_of(observer).states_of(service)
    assert states
    seen = [Observation(at=float(n), incident=f"inc-{n}", cause=cause, states=states) for n in range(12)]
    learned = adjusted(packs, tally(seen, 20.0, Windows()), "x")
    before, after = diagnose(situation, packs).hypotheses[0], diagnose(situation, learned).hypotheses[0]
    assert (after.cause, after.service) == (before.cause, before.service) == (cause, service)
    gain = sum(c.log_odds for c in after.contributions) - sum(c.log_odds for c in before.contributions)
    assert gain >= -0.5
    assert "feedback" not in diagnose(situation, packs).version
    assert diagnose(situation, learned).version.endswith("x")


@pytest.mark.parametrize("fault", FAULTS)
def test_an_incident_is_most_like_itself(packs: PackSet, fault: str) -> None:
    weight = weights(packs)
    mine = signature_of(observe(golden(fault), packs))
    again = signature_of(observe(golden(fault, seed=3), packs))
    assert similarity(mine, mine, weight) == pytest.approx(1.0)
    assert similarity(mine, again, weight) >= ALIKE
    calm = signature_of(observe(quiet(1), packs))
    assert similarity(mine, calm, weight) < ALIKE
    others = [f for f in FAULTS if FAULTS[f][1] != FAULTS[fault][1]]
    for other in others:
        theirs = signature_of(observe(golden(other), packs))
        assert similarity(mine, theirs, weight) < similarity(mine, again, weight), other


VECTORS = st.dictionaries(
    st.sampled_from([f"{d}/{k}/{g}" for d in "012" for k in ("http", "host") for g in ("cpu", "memory", "latency")]),
    st.sampled_from([0.25, 0.5, 1.0]),
    max_size=8,
)


@SETTINGS
@given(VECTORS, VECTORS, VECTORS)
def test_similarity_is_symmetric_bounded_and_one_for_equals_alone(
    a: dict[str, float], b: dict[str, float], c: dict[str, float]
) -> None:
    weight = {"cpu": 3.0, "memory": 2.0}
    x, y, z = Signature(vector=a), Signature(vector=b), Signature(vector=c)
    alike = similarity(x, y, weight)
    assert 0.0 <= alike <= 1.0 + 1e-12
    assert alike == similarity(y, x, weight)
    assert (alike > 1.0 - 1e-12) == (a == b and bool(a))
    # 1 - Ruzicka's index is a metric: what is like a third is like the other.
    assert (1 - similarity(x, z, weight)) <= (1 - alike) + (1 - similarity(y, z, weight)) + 1e-9 or not (a and b and c)


def test_the_nearest_are_the_most_alike_then_the_confirmed_then_the_newest() -> None:
    def of(id: str, alike: float, at: float, confirmed: str = "") -> Precedent:
        return Precedent(incident=id, at=at, similarity=alike, cause="c", service="s", confirmed=confirmed)  # type: ignore[arg-type]

    found = [of("low", 0.1, 9), of("old", 0.9, 1), of("new", 0.9, 2), of("sure", 0.9, 1, "feedback"), of("best", 1, 0)]
    assert [p.incident for p in nearest(found)] == ["best", "sure", "new"]
    assert [p.incident for p in nearest(reversed(found))] == ["best", "sure", "new"]


def test_names_do_not_matter_to_what_an_incident_is_like(packs: PackSet) -> None:
    situation = golden("memory_leak")
    mine = signature_of(observe(situation, packs))
    assert all("orders" not in key for key in mine.vector)
    assert mine == signature_of(observe(situation, packs))
    assert msgspec.json.decode(msgspec.json.encode(mine), type=Signature) == mine
    assert len(msgspec.json.encode(mine)) < 20_000
    assert conclude(observe(situation, packs)) == diagnose(situation, packs)
