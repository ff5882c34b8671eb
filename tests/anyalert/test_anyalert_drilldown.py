"""Drill-down: laws, and planted truths that must be found."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rules.anyalert import DRILLDOWN, PARTS, with_parts
from rules.drilldown import Drilldown, drill
from rules.model import Evidence, Frame, SeriesId, Situation

GRID = [
    {"zone": z, "version": v, "instance": f"{z}-{v}-{i}", "model": m}
    for z, v, (i, m) in itertools.product("abc", ("1", "2"), ((0, "x"), (1, "y"), (2, "x")))
]
SIZES = st.lists(st.floats(0.1, 100), min_size=len(GRID), max_size=len(GRID))


def planted(where: dict[str, str], factor: float, base: np.ndarray) -> np.ndarray:
    hit = np.array([all(row[k] == v for k, v in where.items()) for row in GRID])
    return np.where(hit, base * factor, base)


@pytest.mark.parametrize(
    "where",
    [
        {"zone": "b"},
        {"version": "2"},
        {"model": "y"},
        {"instance": "a-1-0"},
        {"zone": "a", "version": "2"},
        {"zone": "c", "model": "x"},
        {"zone": "a", "version": "1", "model": "x"},
    ],
)
@given(st.lists(st.floats(5, 20), min_size=len(GRID), max_size=len(GRID)), st.floats(5, 50))
@settings(max_examples=25, deadline=None)
def test_a_planted_combination_is_found(where: dict[str, str], sizes: list[float], factor: float) -> None:
    base = np.array(sizes)
    found = drill(GRID, base, planted(where, factor, base))
    assert found.best is not None
    assert dict(found.best.labels) == where or set(where.items()) <= {*found.best.labels, *found.best.also}
    assert found.best.power == pytest.approx(1.0)
    assert found.best.fit == pytest.approx(1.0)
    assert not found.even


@given(SIZES, st.floats(1.5, 50))
@settings(max_examples=50, deadline=None)
def test_what_concerns_all_alike_is_said_so(sizes: list[float], factor: float) -> None:
    base = np.array(sizes)
    found = drill(GRID, base, base * factor)
    assert found.even
    assert found.alike == pytest.approx(1.0)


@given(SIZES)
def test_no_change_is_explained_by_nothing(sizes: list[float]) -> None:
    base = np.array(sizes)
    assert drill(GRID, base, base) == Drilldown(None, 0.0, len(GRID))


@given(SIZES, SIZES, st.permutations(range(len(GRID))), st.floats(0.01, 1000))
@settings(max_examples=50, deadline=None)
def test_order_scale_and_names_do_not_matter(
    before: list[float], after: list[float], order: list[int], scale: float
) -> None:
    b, a = np.array(before), np.array(after)
    first = drill(GRID, b, a)
    shuffled = drill([GRID[i] for i in order], b[order], a[order])
    scaled = drill(GRID, b * scale, a * scale)
    renamed = drill([{f"x_{k}": f"y_{v}" for k, v in row.items()} for row in GRID], b, a)
    for other in (shuffled, scaled, renamed):
        assert (other.best is None) == (first.best is None)
        assert other.alike == pytest.approx(first.alike, abs=1e-9)
        if first.best is not None and other.best is not None:
            assert other.best.series == first.best.series
            assert other.best.power == pytest.approx(first.best.power)
            assert other.best.surprise == pytest.approx(first.best.surprise, abs=1e-9)
    if first.best is not None and renamed.best is not None:
        assert renamed.best.labels == tuple((f"x_{k}", f"y_{v}") for k, v in first.best.labels)


@given(SIZES, SIZES)
@settings(max_examples=50, deadline=None)
def test_figures_are_fractions_and_few_are_singled_out(before: list[float], after: list[float]) -> None:
    found = drill(GRID, np.array(before), np.array(after))
    assert 0 <= found.alike <= 1
    if found.best is not None:
        assert 0.6 <= found.best.fit <= 1
        assert found.best.power >= 0.67
        assert 0 <= found.best.surprise <= np.log(2)
        assert 0 < found.best.series <= found.best.of / 2
        assert len(found.best.labels) <= 3


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=18, max_size=18))
def test_any_number_is_survived(values: list[float]) -> None:
    drill(GRID, np.array(values), np.array(values[::-1]))


def test_something_out_of_nothing_is_found() -> None:
    """Errors where there were none: there is no former share to expect."""
    after = np.array([4.0 if row["zone"] == "c" else 0.0 for row in GRID])
    found = drill(GRID, np.zeros(len(GRID)), after)
    assert found.best is not None
    assert found.best.labels == (("zone", "c"),)


def test_many_series_and_labels_are_bounded() -> None:
    rng = np.random.default_rng(1)
    rows = [{f"l{k}": str(rng.integers(0, 50)) for k in range(25)} | {"id": str(i)} for i in range(6000)]
    before = rng.uniform(1, 2, len(rows))
    after = before * np.where([row["l3"] == "7" for row in rows], 20.0, 1.0)
    found = drill(rows, before, after)
    assert found.of == 2000
    assert found.best is not None
    assert found.best.labels == (("l3", "7"),)


@pytest.mark.parametrize("n", range(3))
def test_fewer_than_three_series_are_not_drilled(n: int) -> None:
    assert drill(GRID[:n], np.ones(n), np.full(n, 5.0)).best is None


def test_parts_are_compared_with_what_there_was_however_far_the_window_reaches_back() -> None:
    """Series that began twenty samples before the onset, in a window of six hundred: one instance of four jumps."""
    onset = 1000.0
    times = onset + np.arange(-600.0, 30.0)
    ids = tuple(SeriesId.of(PARTS, {"instance": f"host-{i}"}) for i in range(4))
    values = np.where(times < onset - 20.0, np.nan, np.full((4, times.size), 50.0))
    values[2, times >= onset] = 90.0
    parts = Evidence(PARTS, "recorded", Frame(times, ids, values))
    situation = Situation((), "", onset, float(times[-1]), evidence=(parts,))
    (told,) = with_parts(situation).facts(DRILLDOWN)
    assert told.subject == "instance host-2"
