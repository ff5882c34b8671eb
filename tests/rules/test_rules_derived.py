"""What is derived: own changes over the call graph, shares, differences, calls; gaps and log flow from spans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.packs import load_packs
from rules.derived import derived_findings
from rules.diagnose import diagnose
from rules.features import Finding
from rules.model import Evidence, Frame, Logs, SeriesId, Situation, Spans, Topology
from rules.packs import PackSet
from rules.traces import template_of

ONSET, STEP, NORMAL, ABNORMAL = 10_000.0, 60.0, 60, 6
TIMES = ONSET + STEP * np.arange(-NORMAL, ABNORMAL)
EDGES = (("front", "orders"), ("front", "stock"), ("orders", "db"), ("stock", "db"))


@pytest.fixture(scope="module")
def packs() -> PackSet:
    return load_packs()


def steps(before: float, after: float) -> list[float]:
    return [before] * NORMAL + [after] * ABNORMAL


def situation(
    series: Mapping[tuple[str, str], Sequence[float]],
    edges: Sequence[tuple[str, str]] = EDGES,
    **more: Any,
) -> Situation:
    evidence = tuple(
        Evidence(metric, "recorded", Frame(TIMES, (SeriesId.of(metric, {"service": service}),), np.array([row])))
        for (metric, service), row in series.items()
    )
    return Situation((), "front", ONSET, float(TIMES[-1]), evidence, Topology(tuple(edges)), **more)


def shop(**latency: tuple[float, float]) -> dict[tuple[str, str], Sequence[float]]:
    """Latency (before, after) and 100 requests a sample at each service, twice as many at the database."""
    found: dict[tuple[str, str], Sequence[float]] = {}
    for service, requests in (("front", 100.0), ("orders", 100.0), ("stock", 100.0), ("db", 200.0)):
        found["latency_avg_seconds", service] = steps(*latency.get(service, (0.1, 0.1)))
        found["requests_sum", service] = steps(requests, requests)
    return found


def by(findings: Sequence[Finding], signal: str) -> dict[str, Finding]:
    return {f.service: f for f in findings if f.signal == signal}


def test_a_callee_explains_its_callers(packs: PackSet) -> None:
    """The database takes 0.4 s more; so do both of its callers, and the alerting service 0.8 s (it calls both)."""
    slow = shop(db=(0.1, 0.5), orders=(0.2, 0.6), stock=(0.2, 0.6), front=(0.5, 1.3))
    found = derived_findings(situation(slow), packs)
    own = by(found, "own_latency")
    assert {s: f.state for s, f in own.items()} == {
        "front": "absent",
        "orders": "absent",
        "stock": "absent",
        "db": "strong",
    }
    # 200 requests of 0.4 s more for each 100 of the alerting service, whose requests usually take 0.5 s.
    assert own["db"].level - own["db"].baseline == pytest.approx(0.4 * 2 / 0.5)
    assert by(found, "own_latency_share")["db"].level == pytest.approx(1.0)


def test_own_changes_add_up_to_the_change_of_the_alerting_service(packs: PackSet) -> None:
    slow = shop(db=(0.1, 0.15), orders=(0.2, 0.35), stock=(0.2, 0.25), front=(0.5, 0.8))
    own = by(derived_findings(situation(slow), packs), "own_latency")
    assert sum(f.level - f.baseline for f in own.values()) == pytest.approx((0.8 - 0.5) / 0.5)


def test_a_callee_that_was_never_called_before_explains_nothing(packs: PackSet) -> None:
    series = shop(orders=(0.2, 0.6), front=(0.5, 0.9))
    series["requests_sum", "new"] = steps(0.0, 100.0)
    series["latency_avg_seconds", "new"] = steps(float("nan"), 0.4)
    found = by(derived_findings(situation(series, (*EDGES, ("orders", "new"))), packs), "own_latency")
    assert found["orders"].state == "strong"
    assert "new" not in found


def test_few_requests_say_nothing(packs: PackSet) -> None:
    series = shop(orders=(0.2, 2.0))
    series["requests_sum", "orders"] = steps(10.0, 10.0)
    assert "orders" not in by(derived_findings(situation(series), packs), "own_latency")


def test_failures_below_full_availability(packs: PackSet) -> None:
    series = shop()
    for service in ("front", "orders", "stock", "db"):
        series["availability_avg_percent", service] = steps(100.0, 100.0)
    series["availability_avg_percent", "orders"] = steps(100.0, 96.0)
    series["availability_avg_percent", "front"] = steps(100.0, 96.0)
    found = by(derived_findings(situation(series), packs), "own_failures")
    assert found["orders"].level == pytest.approx(0.04)
    assert found["front"].state == "absent"


def test_time_lost_between_caller_and_callee(packs: PackSet) -> None:
    frames = []
    for metric, row in (
        ("edge_source_latency_p50_seconds", steps(0.011, 0.5)),
        ("edge_destination_latency_p50_seconds", steps(0.01, 0.01)),
    ):
        series = SeriesId.of(metric, {"service": "orders", "caller": "front"})
        frames.append(Evidence(metric, "recorded", Frame(TIMES, (series,), np.array([row]))))
    base = situation({})
    found = by(derived_findings(Situation((), "front", ONSET, base.until, tuple(frames)), packs), "edge_gap_seconds")
    assert found["orders"].state == "strong"
    assert found["orders"].level == pytest.approx(0.49)


def test_calls_that_are_no_longer_made(packs: PackSet) -> None:
    """Only a callee that nobody else calls tells who stopped calling; shot noise of few calls is no change."""
    series = shop()
    series["requests_sum", "mail"] = steps(90.0, 0.0)
    edges = (*EDGES, ("orders", "mail"))
    found = by(derived_findings(situation(series, edges), packs), "calls_made")
    assert (found["orders"].state, found["orders"].peer) == ("strong", "mail")
    assert "db" not in {f.peer for f in found.values()}
    series["requests_sum", "mail"] = steps(2.0, 1.0)
    assert by(derived_findings(situation(series, edges), packs), "calls_made")["orders"].state == "absent"


@settings(max_examples=25, deadline=None)
@given(values=st.lists(st.floats(-1e12, 1e12) | st.just(float("nan")), min_size=8, max_size=8))
def test_whatever_the_numbers_are_nothing_is_raised(values: list[float]) -> None:
    packs = load_packs()
    series = shop()
    for i, key in enumerate(series):
        series[key] = steps(values[i], values[(i + 3) % 8])
    for finding in derived_findings(situation(series), packs):
        assert np.isfinite(finding.z)
    diagnose(situation(series), packs)


# -- spans and logs


def traces(
    executions: Sequence[tuple[float, float, tuple[str, ...], tuple[str, ...]]], errors: frozenset[str] = frozenset()
) -> tuple[Spans, Logs]:
    """For each (time, seconds on the way, lines of front, of orders): a span of front that calls one of orders."""
    start, duration, service, parent = [], [], [], []
    lines: list[tuple[int, str, int, float]] = []
    for at, gap, of_front, of_orders in executions:
        row = len(start)
        start += [at, at]
        duration += [0.1 + gap, 0.1]
        service += [0, 1]
        parent += [-1, row]
        lines += [(0, text, row, at) for text in of_front] + [(1, text, row + 1, at) for text in of_orders]
    texts = sorted({text for _, text, _, _ in lines})
    spans = Spans(
        ("front", "orders"),
        ("buy", "order"),
        np.array(service, dtype=np.intp),
        np.array(service, dtype=np.intp),
        np.array(parent, dtype=np.intp),
        np.array(start),
        np.array(duration),
    )
    logs = Logs(
        ("front", "orders"),
        tuple(texts),
        np.array([s for s, _, _, _ in lines], dtype=np.intp),
        np.array([texts.index(t) for _, t, _, _ in lines], dtype=np.intp),
        np.array([r for _, _, r, _ in lines], dtype=np.intp),
        np.array([a for _, _, _, a in lines]),
        np.array([t in errors for _, t, _, _ in lines], dtype=bool),
    )
    return spans, logs


BEFORE = [ONSET - 300.0 + 5 * i for i in range(20)]
AFTER = [ONSET + 5.0 * i for i in range(12)]
CALM = [(at, 0.001, ("asked", "answered"), ("found", "saved")) for at in BEFORE]


def told(spans: Spans, logs: Logs, packs: PackSet) -> dict[tuple[str, str], Finding]:
    found = derived_findings(situation({}, (("front", "orders"),), spans=spans, logs=logs), packs)
    return {(f.signal, f.service): f for f in found}


def test_the_gap_between_parent_and_child(packs: PackSet) -> None:
    found = told(*traces(CALM + [(at, 0.5, ("asked", "answered"), ("found", "saved")) for at in AFTER]), packs)
    gap = found["call_gap_seconds", "orders"]
    assert (gap.state, gap.level) == ("strong", pytest.approx(0.5))
    assert found["log_break", "orders"].state == "absent"


def test_the_deepest_broken_service_is_the_one(packs: PackSet) -> None:
    """orders stops after its first line, so that front does not answer either."""
    spans, logs = traces(CALM + [(at, 0.001, ("asked",), ("found",)) for at in AFTER])
    found = told(spans, logs, packs)
    assert found["log_break", "orders"].state == "strong"
    assert found["log_break", "orders"].series.label("line") == "saved"
    assert found["log_break", "front"].state == "absent"
    assert found["log_missing", "front"].state == "strong"
    diagnosis = diagnose(situation({}, (("front", "orders"),), spans=spans, logs=logs), packs)
    assert diagnosis.hypotheses[0].service == "orders"
    assert diagnosis.hypotheses[0].cause == "service.throws"


def test_a_new_error_line_speaks_for_an_early_return(packs: PackSet) -> None:
    lost = [(at, 0.001, ("asked", "answered"), ("found", "no such thing")) for at in AFTER]
    spans, logs = traces(CALM + lost, frozenset({"no such thing"}))
    diagnosis = diagnose(situation({}, (("front", "orders"),), spans=spans, logs=logs), packs)
    assert (diagnosis.hypotheses[0].service, diagnosis.hypotheses[0].fault) == ("orders", "return")


def test_who_waits_for_a_slow_call_is_not_broken(packs: PackSet) -> None:
    found = told(*traces(CALM + [(at, 2.0, ("asked",), ("found", "saved")) for at in AFTER]), packs)
    assert found["call_gap_seconds", "orders"].state == "strong"
    assert found["log_break", "front"].state == "absent"


def test_few_executions_say_nothing(packs: PackSet) -> None:
    found = told(*traces(CALM[:3] + [(at, 0.001, ("asked",), ("found",)) for at in AFTER[:3]]), packs)
    assert not any(f.bad for f in found.values())


def test_an_error_that_is_gone_is_no_fault(packs: PackSet) -> None:
    failing = [(at, 0.001, ("asked", "answered"), ("found", "bad thing")) for at in BEFORE]
    healed = [(at, 0.001, ("asked", "answered"), ("found",)) for at in AFTER]
    found = told(*traces(failing + healed, frozenset({"bad thing"})), packs)
    assert found["log_missing", "orders"].state == "absent"


def test_a_span_that_is_its_own_ancestor_ends(packs: PackSet) -> None:
    spans, logs = traces(CALM + [(at, 0.001, ("asked",), ("found",)) for at in AFTER])
    spans.parent[:] = np.roll(np.arange(spans.parent.size), 1)
    told(spans, logs, packs)


@pytest.mark.parametrize(
    ("message", "template"),
    [
        (
            "INFO  t.s.Travel#372 TraceID: 88eb SpanID: dd84 [get][Seat request][seat: 12]",
            "t.s.Travel#372 [get][Seat request][seat",
        ),
        ("2023-01-29T08:43:04.123Z ERROR payment of user 42 failed: timeout", "payment of user * failed"),
        ("GET /orders/17 took 12ms", "GET /orders/* took *"),
        ("", ""),
    ],
)
def test_templates(message: str, template: str) -> None:
    assert template_of(message) == template


def without_spans(logs: Logs, packs: PackSet) -> dict[str, Finding]:
    bare = replace(logs, span=np.full_like(logs.span, -1))
    found = derived_findings(situation({}, (("front", "orders"),), spans=None, logs=bare), packs)
    return {f.service: f for f in found if f.signal == "log_new"}


BROKEN = [(at, 0.001, ("asked", "order failed"), ("found", "cannot save")) for at in AFTER]


def test_lines_never_seen_before_without_spans(packs: PackSet) -> None:
    errors = frozenset({"cannot save", "order failed"})
    _, logs = traces(CALM + BROKEN, errors)
    found = without_spans(logs, packs)
    assert (found["orders"].state, found["orders"].level) == ("strong", len(AFTER))
    assert found["orders"].series.label("line") == "cannot save"
    assert found["front"].state == "absent"  # its callee explains what it writes
    _, quiet = traces(CALM + BROKEN)
    assert without_spans(quiet, packs)["orders"].state == "weak"  # no error among them
    _, calm = traces(CALM + [(at, 0.001, ("asked", "answered"), ("found", "saved")) for at in AFTER])
    assert {f.state for f in without_spans(calm, packs).values()} == {"absent"}


def test_who_always_writes_something_new_says_nothing_by_that(packs: PackSet) -> None:
    lines = [(at, 0.001, ("asked", "answered"), ("found", f"odd {i}")) for i, at in enumerate(BEFORE + AFTER)]
    _, logs = traces(lines, frozenset(f"odd {i}" for i in range(len(lines))))
    assert without_spans(logs, packs)["orders"].state == "absent"


def test_new_lines_are_left_to_the_spans_where_there_are_any(packs: PackSet) -> None:
    spans, logs = traces(CALM + BROKEN, frozenset({"cannot save"}))
    assert not [signal for signal, _ in told(spans, logs, packs) if signal == "log_new"]
