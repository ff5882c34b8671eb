"""What the same time of earlier days leads to expect: laws over features, and what follows for a diagnosis."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rules.diagnose import moved
from rules.features import Finding, findings_of
from rules.model import Evidence, Frame, History, SeriesId, Situation
from rules.packs import PackSet

DAY, WEEK = 86400.0, 604800.0
ONSET = 20 * DAY
STEP = 30.0
NORMAL, ABNORMAL = 60, 24
LATENCY = SeriesId.of("http_latency_p95", {"service": "shop"})
TRAFFIC = SeriesId.of("http_request_rate", {"service": "shop"})


def evidence(series: SeriesId, before: float, after: float, offset: float = 0.0, seed: int = 1) -> Evidence:
    rng = np.random.default_rng(seed + int(offset))
    times = ONSET - offset + STEP * np.arange(-NORMAL, ABNORMAL)
    values = np.where(times < ONSET - offset, before, after) * rng.uniform(0.97, 1.03, times.shape)
    return Evidence(series.metric, "x", Frame(times, (series,), values[None, :]))


def situation(today: tuple[float, float], *days: tuple[float, float], series: SeriesId = LATENCY) -> Situation:
    history = tuple(
        History(offset, (evidence(series, *day, offset),)) for offset, day in zip((DAY, WEEK), days, strict=False)
    )
    until = ONSET + STEP * (ABNORMAL - 1)
    return Situation((), "shop", ONSET, until, (evidence(series, *today),), history=history)


def found(packs: PackSet, *days: tuple[float, float], series: SeriesId = LATENCY) -> Finding:
    (finding,) = findings_of(situation(days[0], *days[1:], series=series), packs)
    return finding


FLAT, PEAK = (0.1, 0.1), (0.1, 0.8)


def test_a_peak_that_recurs_is_no_anomaly(packs: PackSet) -> None:
    assert found(packs, PEAK).state == "strong"
    recurring = found(packs, PEAK, PEAK)
    assert (recurring.state, recurring.seasonal, recurring.direction) == ("absent", True, "flat")
    assert found(packs, PEAK, FLAT, PEAK).state == "absent", "weekdays differ from Sundays"
    assert found(packs, PEAK, FLAT, FLAT).state == "strong", "it never was there"


def test_what_comes_on_top_of_the_peak_is_found(packs: PackSet) -> None:
    fault = found(packs, (0.1, 3.0), PEAK, PEAK)
    assert (fault.state, fault.seasonal) == ("strong", True)
    assert fault.baseline == pytest.approx(0.8, rel=0.05)
    assert fault.onset >= ONSET


def test_a_peak_that_fails_to_come_is_seen_only_where_every_day_had_it(packs: PackSet) -> None:
    high, low = (100.0, 400.0), (100.0, 100.0)
    assert found(packs, low, high, high, series=TRAFFIC).state == "contrary"  # far fewer requests than at this time
    assert found(packs, low, low, high, series=TRAFFIC).state == "absent"
    assert found(packs, low, series=TRAFFIC).state == "absent"


def test_what_was_wrong_then_is_not_what_is_usual(packs: PackSet) -> None:
    whole = situation(PEAK, PEAK)
    wrong = replace(whole, quiet=((ONSET - DAY - 60.0, ONSET - DAY + ABNORMAL * STEP),))
    (finding,) = findings_of(wrong, packs)
    assert (finding.state, finding.seasonal) == ("strong", False)


def test_silence_that_recurs_says_nothing(packs: PackSet) -> None:
    nan = float("nan")
    assert found(packs, (0.1, nan)).direction == "silent"
    assert found(packs, (0.1, nan), (0.1, nan)).state is None
    assert found(packs, (0.1, nan), (0.1, nan)).direction != "silent"


@settings(max_examples=60, deadline=None)
@given(
    today=st.tuples(st.floats(0.01, 10), st.floats(0.01, 10)),
    flat=st.floats(0.01, 10),
)
def test_a_day_without_a_change_changes_nothing(packs: PackSet, today: tuple[float, float], flat: float) -> None:
    told = [repr(found(packs, today, *days)) for days in ((), ((flat, flat),))]  # NaN is not equal to itself
    assert told[0] == told[1]


@settings(max_examples=60, deadline=None)
@given(before=st.floats(0.05, 5), factor=st.floats(1, 20), drift=st.floats(0.5, 2))
def test_the_same_day_again_is_never_bad(packs: PackSet, before: float, factor: float, drift: float) -> None:
    """Whatever the day was like, and however much more or less there is of everything today, by a constant."""
    day = (before, before * factor)
    assert not found(packs, day, day).bad
    shifted = (before + drift, before * factor + drift)
    assert not found(packs, shifted, day).bad


def test_only_what_moved_is_asked_again(packs: PackSet) -> None:
    names = moved(situation(PEAK), packs)
    assert LATENCY.metric in names
    assert "host_swap_in_pages" not in names
    assert LATENCY.metric not in moved(situation(FLAT), packs)
