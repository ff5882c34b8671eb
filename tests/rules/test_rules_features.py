"""Features against a plain reading of their definitions, one series at a time."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rules.evidence import describe
from rules.features import Finding, Traits, findings_of, measure
from rules.model import Evidence, Frame, SeriesId, Situation
from rules.packs import PackSet, Signal
from rules.trends import slopes

ONSET = 1000.0
VALUE = st.one_of(st.floats(-1e6, 1e6, width=32), st.just(math.nan))


def situation(frame: Frame, **changes: object) -> Situation:
    until = float(frame.times[-1]) if frame.times.shape[0] else ONSET
    fields = {"alerts": (), "entry": "s", "onset": ONSET, "until": until, **changes}
    evidence = (Evidence(name="x", source="x", frame=frame),)
    return Situation(evidence=evidence, **fields)  # type: ignore[arg-type]


def frame_of(rows: np.ndarray, normal: int, metric: str = "http_latency_p95") -> Frame:
    times = ONSET + np.arange(-normal, rows.shape[1] - normal, dtype=float)
    return Frame(times, tuple(SeriesId.of(metric, {"service": f"s{i}"}) for i in range(rows.shape[0])), rows)


def signal(**changes: object) -> Signal:
    fields = {"kind": "latency", "bad": "up", "floor": 0.5, "group": "latency", **changes}
    return Signal(**fields)  # type: ignore[arg-type]


def finding(packs: PackSet, metric: str, normal: list[float], abnormal: list[float], **changes: object) -> Finding:
    frame = frame_of(np.array([normal + abnormal], dtype=float), len(normal), metric)
    (found,) = [f for f in findings_of(situation(frame, **changes), packs) if f.signal == metric]
    return found


@settings(max_examples=200, deadline=None)
@given(
    rows=st.integers(1, 4).flatmap(
        lambda k: st.integers(1, 40).flatmap(
            lambda n: st.lists(st.lists(VALUE, min_size=n, max_size=n), min_size=k, max_size=k)
        )
    ),
    split=st.floats(0, 1),
)
def test_level_baseline_and_scale_by_the_book(rows: list[list[float]], split: float) -> None:
    matrix = np.array(rows, dtype=float)
    normal = int(split * matrix.shape[1])
    frame = frame_of(matrix, normal)
    features = measure(frame, Traits.of([signal()] * len(rows)), situation(frame))
    n = matrix.shape[1] - normal
    skip = n // 3 if n < 12 else min(n // 2, 15)
    for i, row in enumerate(matrix):
        base = row[:normal][np.isfinite(row[:normal])]
        base = base[: base.size - (base.size // 6 if base.size >= 12 else 0)]
        held = np.sort(row[normal + skip :][np.isfinite(row[normal + skip :])])
        assert bool(features.based[i]) == (base.size >= 3)
        assert bool(features.present[i]) == (held.size > 0)
        if base.size >= 3:
            q1, q2, q3 = np.percentile(base, [25, 50, 75])
            scale = max((q3 - q1) / 1.35, 0.05 * abs(q2), 0.25 * base.std(), 0.5) * (1 + 2 / base.size)
            assert features.baseline[i] == pytest.approx(q2, rel=1e-9, abs=1e-9)
            assert features.scale[i] == pytest.approx(scale, rel=1e-6, abs=1e-9)
        if held.size:
            assert features.level[i] == held[held.size // 2]
            assert (held >= features.level[i]).sum() * 2 >= held.size  # held for half of the window
        if base.size >= 3 and held.size:
            z = (features.level[i] - features.baseline[i]) / features.scale[i]
            assert features.z[i] == pytest.approx(z, rel=1e-6, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(VALUE, min_size=30, max_size=30), min_size=2, max_size=5))
def test_series_do_not_influence_each_other(rows: list[list[float]]) -> None:
    matrix = np.array(rows, dtype=float)
    frame = frame_of(matrix, 20)
    whole = measure(frame, Traits.of([signal()] * len(rows)), situation(frame))
    for i in range(len(rows)):
        alone = frame_of(matrix[i : i + 1], 20)
        single = measure(alone, Traits.of([signal()]), situation(alone))
        for name in ("baseline", "scale", "level", "z", "onset"):
            np.testing.assert_array_equal(getattr(single, name)[0], getattr(whole, name)[i])


def test_a_spike_is_not_held(packs: PackSet) -> None:
    spike = [0.1, 0.1, 0.1, 9.0, 0.1, 0.1, 0.1, 0.1]
    assert finding(packs, "http_latency_p95", [0.1] * 30, spike).state == "absent"


def test_the_first_abnormal_samples_may_still_be_normal(packs: PackSet) -> None:
    assert finding(packs, "http_latency_p95", [0.1] * 30, [0.1, 0.1, 2.0, 2.0, 2.0]).state == "strong"


@pytest.mark.parametrize(
    ("metric", "before", "after", "state"),
    [
        ("http_latency_p95", 0.1, 2.0, "strong"),
        ("http_latency_p95", 2.0, 0.1, "contrary"),
        ("worker_jobs_rate", 10.0, 0.0, "strong"),
        ("worker_jobs_rate", 10.0, 30.0, "contrary"),
        ("up", 1.0, 0.0, "strong"),
        ("up", 1.0, 1.0, "absent"),
        ("up", 0.0, 0.0, "weak"),
        ("worker_busy_ratio", 0.5, 1.0, "strong"),
        ("worker_busy_ratio", 1.0, 1.0, "absent"),
        ("host_memory_available_ratio", 0.5, 0.01, "strong"),
        ("host_memory_available_ratio", 0.5, 0.5, "absent"),
        ("host_disk_used_ratio", 0.5, 0.99, "strong"),
        ("feature_flag_enabled", 0.0, 1.0, "strong"),
        ("feature_flag_enabled", 1.0, 0.0, "contrary"),
    ],
)
def test_the_bad_direction_belongs_to_the_signal(
    packs: PackSet, metric: str, before: float, after: float, state: str
) -> None:
    assert finding(packs, metric, [before] * 20, [after] * 9).state == state


def test_what_is_absent_before_counts_from_zero_where_that_makes_sense(packs: PackSet) -> None:
    nothing = np.array([[math.nan] * 20 + [5.0] * 9])
    for seen, state in (([1.0] * 29, "strong"), ([math.nan] * 20 + [1.0] * 9, None)):
        frame = frame_of(nothing, 20, "queue_oldest_age_seconds")
        known = Frame(frame.times, (SeriesId.of("up", {"service": "s0"}),), np.array([seen]))
        evidence = (Evidence(name="x", source="x", frame=frame), Evidence(name="up", source="x", frame=known))
        found = findings_of(replace(situation(frame), evidence=evidence), packs)
        assert {f.signal: f.state for f in found}["queue_oldest_age_seconds"] == state  # None: nobody looked before
    assert finding(packs, "http_latency_p95", [math.nan] * 20, [5.0] * 9).state is None


def test_silence(packs: PackSet) -> None:
    """A latency that falls silent while its service is scraped says something; a service that is down says it once."""
    frame = frame_of(np.array([[0.1] * 20 + [math.nan] * 9]), 20)
    alive = Frame(frame.times, (SeriesId.of("up", {"service": "s0"}),), np.ones((1, 29)))
    dead = Frame(frame.times, alive.ids, np.array([[1.0] * 20 + [0.0] * 9]))
    states = []
    for up in (alive, dead):
        evidence = (Evidence(name="x", source="x", frame=frame), Evidence(name="up", source="x", frame=up))
        base = situation(frame)
        found = findings_of(Situation(alerts=(), entry="s0", onset=ONSET, until=base.until, evidence=evidence), packs)
        states.append({f.signal: f.state for f in found}["http_latency_p95"])
    assert states == ["silent", None]


def test_growth_is_seen_through_its_own_baseline(packs: PackSet) -> None:
    ramp = list(np.linspace(1e8, 2e8, 90))
    assert finding(packs, "process_memory_bytes", ramp[:75], ramp[75:]).state == "strong"
    steady = list(1e8 + 1e5 * np.sin(np.arange(90)))
    assert finding(packs, "process_memory_bytes", steady[:75], steady[75:]).state == "absent"


def test_onset_is_when_the_change_began_to_last(packs: PackSet) -> None:
    normal = [0.1] * 30
    normal[10] = 5.0  # a blip that did not last
    abnormal = [0.1, 0.1, 0.1, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0]
    assert finding(packs, "http_latency_p95", normal, abnormal).onset == ONSET + 3
    assert math.isnan(finding(packs, "http_latency_p95", normal, [0.1] * 9).onset)


def test_slope_is_per_second(packs: PackSet) -> None:
    rows = np.array([[0.0] * 20 + [3.0 * i for i in range(9)]])
    found = findings_of(situation(frame_of(rows, 20, "queue_depth")), packs)
    assert {f.signal: f.slope for f in found} == {"queue_depth": 0.0, "queue_trend": pytest.approx(3.0)}


MINUTES = 60.0 * np.arange(90)
NOISE = np.random.default_rng(7).normal(0.0, 1.0, 90)


def trend(packs: PackSet, rows: dict[str, np.ndarray], normal: int, signal: str) -> Finding:
    times = ONSET + 60.0 * (np.arange(90) - normal)
    frame = Frame(times, tuple(SeriesId.of(m, {"service": "s"}) for m in rows), np.vstack(list(rows.values())))
    (found,) = [f for f in findings_of(situation(frame), packs) if f.signal == signal]
    return found


class TestTrends:
    """A leak goes on growing; what is merely higher than before does not."""

    def test_a_leak_is_told_with_its_speed_and_the_time_that_is_left(self, packs: PackSet) -> None:
        used = np.where(MINUTES < 3000, 0.3, 0.3 + (MINUTES - 3000) / 60 * 0.01) + 0.001 * NOISE
        found = trend(packs, {"process_memory_used_ratio": used}, 50, "process_memory_used_trend")
        assert found.state == "strong"
        assert found.slope * 60 == pytest.approx(0.01, rel=0.02)
        assert found.left == pytest.approx((1.0 - found.level) / 0.01 * 60, rel=0.05)
        text = describe(found, packs.signals[found.signal])
        assert text.startswith("memory of its limit of s grows by 0.999 % a minute, now 66 %")
        assert text.endswith("reaches its limit in 34 min")

    def test_a_step_is_high_but_flat(self, packs: PackSet) -> None:
        memory = np.where(MINUTES < 3000, 1e8, 5e8) + 1e6 * NOISE
        rows = {"process_memory_bytes": memory}
        assert trend(packs, rows, 50, "process_memory_bytes").state == "strong"
        found = trend(packs, rows, 50, "process_memory_trend")
        assert (found.state, found.direction) == ("absent", "flat")
        assert "does not go on growing, 47" in describe(found, packs.signals[found.signal])

    @pytest.mark.parametrize("at", range(5, 90, 7))
    def test_no_step_anywhere_is_a_trend(self, packs: PackSet, at: int) -> None:
        memory = np.where(np.arange(90) < at, 1e8, 5e8) + 1e6 * NOISE
        assert trend(packs, {"process_memory_bytes": memory}, 50, "process_memory_trend").state in ("absent", None)

    def test_a_slow_leak_is_seen_over_the_whole_window(self, packs: PackSet) -> None:
        memory = 1e8 + 2e4 * MINUTES + 1e6 * NOISE
        found = trend(packs, {"process_memory_bytes": memory}, 85, "process_memory_trend")
        assert found.state == "strong"
        assert found.slope == pytest.approx(2e4, rel=0.05)

    def test_at_its_limit_nothing_grows_and_that_says_nothing(self, packs: PackSet) -> None:
        rows = {
            "process_memory_bytes": np.where(MINUTES < 3000, 1e8, 5e8) + 1e6 * NOISE,
            "process_memory_used_ratio": np.where(MINUTES < 3000, 0.2, 0.97),
        }
        assert trend(packs, rows, 50, "process_memory_trend").state is None
        assert trend(packs, rows, 50, "process_memory_used_trend").state is None

    def test_the_limit_may_be_a_series_of_its_own(self, packs: PackSet) -> None:
        used = 5e10 + 5e6 * MINUTES
        rows = {"fs_used_bytes": used, "fs_size_bytes": np.full(90, 1e11)}
        found = trend(packs, rows, 50, "fs_used_trend")
        assert found.left == pytest.approx((1e11 - found.level) / 5e6, rel=0.01)

    @given(st.integers(0, 10_000))
    @settings(max_examples=60, deadline=None)
    def test_noise_alone_is_hardly_ever_a_trend(self, seed: int) -> None:
        values = np.random.default_rng(seed).normal(0.0, 1.0, (200, 90))
        seen = slopes(MINUTES, values, MINUTES >= 3000, MINUTES <= 6000)
        assert seen.sustained.mean() <= 0.04  # p <= 0.01 at either of two windows

    def test_it_is_the_median_of_all_slopes(self) -> None:
        values = np.array([[3.0, 5.0, 4.0, 9.0, 11.0, 10.0, 40.0]])
        times = np.arange(7.0)
        seen = slopes(times, values, times >= 0, times >= 0)
        pairs = sorted((values[0, j] - values[0, i]) / (j - i) for i in range(7) for j in range(i + 1, 7))
        assert seen.slope[0] == pairs[len(pairs) // 2]


def test_quiet_windows_are_no_baseline(packs: PackSet) -> None:
    normal = [2.0] * 15 + [0.1] * 5
    found = finding(packs, "http_latency_p95", normal, [2.0] * 9, quiet=((ONSET - 20, ONSET - 6),))
    assert (found.state, found.baseline) == ("strong", pytest.approx(0.1))
    assert finding(packs, "http_latency_p95", normal, [2.0] * 9).state == "absent"


def test_a_window_that_begins_before_anybody_looked_costs_no_baseline(packs: PackSet) -> None:
    """Ten samples before the onset are a baseline, however long a window without any lies before them."""
    found = finding(packs, "http_latency_p95", [math.nan] * 110 + [0.1] * 10, [2.0] * 9)
    assert (found.state, found.baseline) == ("strong", pytest.approx(0.1))


def test_a_series_that_comes_twice_counts_once(packs: PackSet) -> None:
    first = frame_of(np.array([[0.1] * 20 + [2.0] * 9]), 20)
    second = frame_of(np.array([[0.1] * 29]), 20)
    evidence = tuple(Evidence(name="x", source="x", frame=f) for f in (first, second))
    whole = Situation(alerts=(), entry="s0", onset=ONSET, until=ONSET + 9, evidence=evidence)
    (found,) = findings_of(whole, packs)
    assert found.state == "strong"
